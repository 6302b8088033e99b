//! The table `deliveries`: webhooks that are to be sent, or were. Rows are added by triggers where a run, a turn or a session ends, so
//! that there is one whenever there is an end.

use rusqlite::{OptionalExtension, Row, params};

use super::db::Ledger;
use super::error::Error;
use crate::clock;
use crate::network::Networks;

/// The app of the operator's own webhooks.
pub const OPERATOR: &str = "";
/// How long one that is being sent is nobody else's: a crash in the middle has it sent again after that, in seconds.
const LEASE: i64 = 60;

/// A webhook, as far as it has come.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// What it is called, to its receiver too.
    pub delivery_id: String,
    /// The app; [`OPERATOR`] for the operator's.
    pub app_name: String,
    /// `run.finished` and the like.
    pub event: String,
    /// The run's, turn's or session's name, where there is one.
    pub subject: Option<String>,
    /// Where it goes.
    pub url: String,
    /// Unix seconds of what it tells of.
    pub created_at: i64,
    /// How often it was tried.
    pub attempts: u32,
    /// Unix seconds of the next try; `None` where it is over.
    pub next_at: Option<i64>,
    /// Unix seconds, where it arrived.
    pub delivered_at: Option<i64>,
    /// The status of the last answer, where there was one.
    pub http_status: Option<u16>,
    /// Why the last try failed, in words.
    pub error: Option<String>,
}

/// One that is due, with what it is signed and bound by.
#[derive(Clone, Debug)]
pub struct Due {
    /// It.
    pub delivery: Delivery,
    /// Which receiver it is for: the address up to its path.
    pub origin: String,
    /// The app's secrets, as they were shown: the newest, and the one before while it is good. None of the operator's.
    pub secrets: Vec<String>,
    /// Where the app's token may come from; `None` where it is out of force.
    pub networks: Option<Networks>,
}

/// What came of a try.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The status of the answer, where there was one.
    pub http_status: Option<u16>,
    /// Why it failed, in words; `None` where it arrived.
    pub error: Option<String>,
    /// Unix seconds of the next try; `None` where there is none.
    pub next_at: Option<i64>,
    /// Whether its receiver wants no more.
    pub ends_subscription: bool,
}

const COLUMNS: &str = "delivery_id, app_name, event, subject, url, created_at, attempts, next_at, delivered_at, http_status, error";

impl Ledger {
    /// Has a webhook sent that no row tells of. Gives its id.
    pub async fn add_delivery(&self, app: &str, event: &'static str, url: &str) -> Result<String, Error> {
        let (id, app, url, now) = (format!("msg_{}", uuid::Uuid::new_v4().simple()), app.to_owned(), url.to_owned(), clock::now());
        let sent = id.clone();
        self.write(move |db| {
            db.execute(
                "INSERT INTO deliveries (delivery_id, app_name, event, url, created_at, next_at) VALUES (?1, ?2, ?3, ?4, ?5, ?5)",
                params![id, app, event, url, now],
            )
        })
        .await?;
        Ok(sent)
    }

    /// The same, unless there was one of that event since `since`, in Unix seconds.
    pub async fn add_delivery_once(&self, app: &str, event: &'static str, url: &str, since: i64) -> Result<(), Error> {
        let (app_name, before) = (app.to_owned(), since);
        let known = self
            .read(move |db| {
                db.prepare_cached("SELECT 1 FROM deliveries WHERE app_name = ?1 AND event = ?2 AND created_at >= ?3")?
                    .exists(params![app_name, event, before])
            })
            .await?;
        if known { Ok(()) } else { self.add_delivery(app, event, url).await.map(drop) }
    }

    /// Takes those that are due, at most `most` for each receiver, and none for those that are `busy`.
    pub async fn take_due(&self, most: u32, busy: Vec<String>) -> Result<Vec<Due>, Error> {
        let now = clock::now();
        if !self.read(move |db| db.prepare_cached("SELECT 1 FROM deliveries WHERE next_at <= ?1")?.exists([now])).await? {
            return Ok(Vec::new());
        }
        let busy = serde_json::to_string(&busy).expect("names are JSON");
        self.write(move |db| {
            let mut due = db.prepare_cached(&format!(
                "WITH due AS (
                     SELECT *, row_number() OVER (PARTITION BY origin ORDER BY next_at, rowid) AS place FROM deliveries
                     WHERE next_at <= ?1 AND origin NOT IN (SELECT value FROM json_each(?2))
                 )
                 SELECT {COLUMNS}, origin, webhook_secret, iif(old_webhook_secret_until > ?1, old_webhook_secret, NULL), ip_cidrs
                 FROM due LEFT JOIN (SELECT name, webhook_secret, old_webhook_secret, old_webhook_secret_until, ip_cidrs FROM tokens WHERE enabled)
                     ON name = app_name
                 WHERE place <= ?3 LIMIT 64"
            ))?;
            let due = due.query_map(params![now, busy, most], due_at)?.collect::<Result<Vec<_>, _>>()?;
            let mut lease = db.prepare_cached("UPDATE deliveries SET next_at = ?2, attempts = attempts + 1 WHERE delivery_id = ?1")?;
            for one in &due {
                lease.execute(params![one.delivery.delivery_id, now + LEASE])?;
            }
            Ok(due)
        })
        .await
    }

    /// Notes what came of a try. Where its receiver wants no more, nothing of the app's is sent there again.
    pub async fn note_delivery(&self, delivery: &Delivery, tried: Tried) -> Result<(), Error> {
        let (delivery, now) = (delivery.clone(), clock::now());
        self.write(move |db| {
            let Tried { http_status, error, next_at, ends_subscription } = &tried;
            db.prepare_cached("UPDATE deliveries SET http_status = ?2, error = ?3, next_at = ?4, delivered_at = ?5 WHERE delivery_id = ?1")?
                .execute(params![delivery.delivery_id, http_status, error, next_at, error.is_none().then_some(now)])?;
            if *ends_subscription {
                let (app, url) = (&delivery.app_name, &delivery.url);
                db.execute("UPDATE tokens SET webhook = NULL WHERE name = ?1 AND webhook = ?2", [app, url])?;
                db.execute(
                    "UPDATE deliveries SET next_at = NULL, error = 'its receiver wants no more (410)' WHERE app_name = ?1 AND url = ?2 AND next_at IS NOT NULL",
                    [app, url],
                )?;
            }
            Ok(())
        })
        .await
    }

    /// The app's webhooks, newest first: at most `limit`, older than `before`.
    pub async fn deliveries(&self, app: &str, before: Option<String>, limit: u32) -> Result<Vec<Delivery>, Error> {
        let app = app.to_owned();
        self.look_through(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM deliveries
                 WHERE app_name = ?1 AND (?2 IS NULL OR rowid < (SELECT rowid FROM deliveries WHERE delivery_id = ?2)) ORDER BY rowid DESC LIMIT ?3"
            ))?
            .query_map(params![app, before, limit], delivery_at)?
            .collect()
        })
        .await
    }

    /// Has one of the app's sent again, now. `None` where it has none of that id.
    pub async fn retry_delivery(&self, app: &str, delivery_id: &str) -> Result<Option<Delivery>, Error> {
        let (app, delivery_id, now) = (app.to_owned(), delivery_id.to_owned(), clock::now());
        self.write(move |db| {
            db.prepare_cached(&format!(
                "UPDATE deliveries SET next_at = ?3, attempts = 0, delivered_at = NULL WHERE delivery_id = ?1 AND app_name = ?2 RETURNING {COLUMNS}"
            ))?
            .query_row(params![delivery_id, app, now], delivery_at)
            .optional()
        })
        .await
    }

    /// Deletes the rows of those that are over and older than so many days.
    pub async fn forget_deliveries(&self, days: u32) -> Result<usize, Error> {
        let before = clock::now() - i64::from(days) * clock::DAY;
        self.write(move |db| db.execute("DELETE FROM deliveries WHERE created_at < ?1 AND next_at IS NULL", [before])).await
    }
}

fn delivery_at(row: &Row<'_>) -> rusqlite::Result<Delivery> {
    Ok(Delivery {
        delivery_id: row.get(0)?,
        app_name: row.get(1)?,
        event: row.get(2)?,
        subject: row.get(3)?,
        url: row.get(4)?,
        created_at: row.get(5)?,
        attempts: row.get(6)?,
        next_at: row.get(7)?,
        delivered_at: row.get(8)?,
        http_status: row.get(9)?,
        error: row.get(10)?,
    })
}

fn due_at(row: &Row<'_>) -> rusqlite::Result<Due> {
    let secrets = [row.get::<_, Option<String>>(12)?, row.get(13)?];
    let networks: Option<String> = row.get(14)?;
    Ok(Due {
        delivery: delivery_at(row)?,
        origin: row.get(11)?,
        secrets: secrets.into_iter().flatten().collect(),
        // What someone edited into nonsense is no network.
        networks: networks.and_then(|networks| networks.parse().ok()),
    })
}
