//! The table `responses`: what was asked for by those that are kept for their apps to go on with.

use rusqlite::{OptionalExtension, Row, params};

use super::db::Ledger;
use super::error::Error;
use crate::clock;

/// A response that is kept. What came of it is in the feed of its run.
#[derive(Clone, Debug)]
pub struct KeptResponse {
    /// 32 hex digits.
    pub run_id: String,
    /// The app.
    pub app_name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// The run of the response that it goes on with.
    pub previous: Option<String>,
    /// The request without its input, as JSON.
    pub request: String,
    /// The items of its input, as JSON.
    pub input: String,
}

impl Ledger {
    /// Keeps a response.
    pub async fn keep_response(&self, response: KeptResponse) -> Result<(), Error> {
        self.write(move |db| {
            let KeptResponse { run_id, app_name, created_at, previous, request, input } = &response;
            db.prepare_cached(
                "INSERT INTO responses (run_id, app_name, created_at, used_at, previous, request, input) VALUES (?1, ?2, ?3, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![run_id, app_name, created_at, previous, request, input])
            .map(drop)
        })
        .await
    }

    /// The app's response of that run, if it is kept.
    pub async fn response(&self, app: &str, run_id: &str) -> Result<Option<KeptResponse>, Error> {
        let (app, run_id) = (app.to_owned(), run_id.to_owned());
        self.read(move |db| {
            db.prepare_cached(
                "SELECT run_id, app_name, created_at, previous, request, input FROM responses WHERE run_id = ?1 AND app_name = ?2",
            )?
            .query_row([run_id, app], kept)
            .optional()
        })
        .await
    }

    /// Notes that responses are used, so that they are kept on. False where one of them is not there any more.
    pub async fn use_responses(&self, run_ids: Vec<String>) -> Result<bool, Error> {
        self.write(move |db| {
            let mut touch = db.prepare_cached("UPDATE responses SET used_at = ?2 WHERE run_id = ?1")?;
            run_ids.iter().try_fold(true, |all, run_id| Ok(touch.execute(params![run_id, clock::now()])? == 1 && all))
        })
        .await
    }

    /// Forgets the app's response of that run. False where there was none.
    pub async fn forget_response(&self, app: &str, run_id: &str) -> Result<bool, Error> {
        let (app, run_id) = (app.to_owned(), run_id.to_owned());
        self.write(move |db| Ok(db.execute("DELETE FROM responses WHERE run_id = ?1 AND app_name = ?2", [&run_id, &app])? == 1)).await
    }

    /// Forgets the responses that were not used for `secs` seconds.
    pub async fn forget_responses(&self, secs: u64) -> Result<usize, Error> {
        let before = clock::now() - i64::try_from(secs).unwrap_or(i64::MAX);
        self.write(move |db| db.execute("DELETE FROM responses WHERE used_at < ?1", [before])).await
    }
}

fn kept(row: &Row<'_>) -> rusqlite::Result<KeptResponse> {
    Ok(KeptResponse {
        run_id: row.get(0)?,
        app_name: row.get(1)?,
        created_at: row.get(2)?,
        previous: row.get(3)?,
        request: row.get(4)?,
        input: row.get(5)?,
    })
}
