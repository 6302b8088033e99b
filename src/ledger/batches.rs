//! The tables `batches` and `batch_lines`: many runs at once. A batch's runs are rows of `runs`; what of a request was read so far stands in
//! `batch_lines`, until all of it is, so that it comes to be as a whole or not at all. Triggers count what has ended.

use rusqlite::{OptionalExtension, Row, params};

use super::db::Ledger;
use super::error::Error;
use super::job::{COLUMNS, JobId, JobRow, NewJob, job_row, names};
use super::recover::{WaitingJob, waiting_run};
use super::status::Status;
use crate::clock;

/// How long what was read of a request is kept that is not whole, in seconds.
const UNFINISHED: i64 = clock::DAY;

/// A run that is to be one of a batch.
#[derive(Clone, Debug)]
pub struct BatchLine {
    /// Its number in the request, from 1.
    pub line: i64,
    /// What the app calls it.
    pub custom_id: Option<String>,
    /// What its row is to be.
    pub job: NewJob,
    /// What else it needs to be started.
    pub request: String,
}

/// A batch, and how far it has come.
#[derive(Clone, Debug)]
pub struct Batch {
    /// 32 hex digits.
    pub batch_id: String,
    /// Who is told of its end.
    pub webhook: Option<String>,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds, where it was cancelled.
    pub cancelled_at: Option<i64>,
    /// Unix seconds, where all of it has ended.
    pub finished_at: Option<i64>,
    /// Its runs.
    pub total: i64,
    /// Its runs by what has become of them; those of which there are none are left out.
    pub counts: Vec<(Status, i64)>,
    /// How long those took that have succeeded, on average, in milliseconds.
    pub average_ms: Option<f64>,
}

/// A run of a batch that has ended.
#[derive(Clone, Debug)]
pub struct BatchResult {
    /// The how manieth it was that ended, from 1.
    pub seq: i64,
    /// What the app calls it.
    pub custom_id: Option<String>,
    /// Its row.
    pub run: JobRow,
}

const BATCH: &str = "batch_id, webhook, created_at, cancelled_at, finished_at, total";
const WAITS: &str = "queued AND finished_at IS NULL AND batch_id IS NOT NULL";

impl Ledger {
    /// Keeps what was read of a request. Gives the number of a line whose `custom_id` there was before.
    pub async fn keep_batch_lines(&self, batch_id: &str, lines: Vec<BatchLine>) -> Result<Option<i64>, Error> {
        let (batch_id, now) = (batch_id.to_owned(), clock::now());
        self.write(move |db| {
            let mut insert = db.prepare_cached(
                "INSERT INTO batch_lines (batch_id, line, run_id, custom_id, agent, model, prompt, files, request, created_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT DO NOTHING",
            )?;
            for BatchLine { line, custom_id, job: NewJob { id, agent, model, prompt, files, .. }, request } in &lines {
                let files = names(files);
                if insert.execute(params![batch_id, line, id.to_string(), custom_id, agent, model, prompt, files, request, now])? == 0 {
                    return Ok(Some(*line));
                }
            }
            Ok(None)
        })
        .await
    }

    /// Makes a batch of what was kept. Gives how many runs it has.
    pub async fn begin_batch(&self, batch_id: &str, app: &str, client_ip: &str, webhook: Option<String>) -> Result<i64, Error> {
        let (batch_id, app, client_ip, now) = (batch_id.to_owned(), app.to_owned(), client_ip.to_owned(), clock::now());
        self.write(move |db| {
            let total: i64 = db.query_row("SELECT count(*) FROM batch_lines WHERE batch_id = ?1", [&batch_id], |row| row.get(0))?;
            db.execute(
                "INSERT INTO batches (batch_id, app_name, webhook, created_at, total) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![batch_id, app, webhook, now, total],
            )?;
            db.execute(
                "INSERT INTO runs (run_id, app_name, client_ip, agent, model, prompt, queued_at, started_at, queued, request, files, batch_id, custom_id)
                 SELECT run_id, ?2, ?3, coalesce(agent, 'claude'), coalesce(model, ''), prompt, ?4, ?4, 1, request, files, batch_id, custom_id
                 FROM batch_lines WHERE batch_id = ?1 ORDER BY line",
                params![batch_id, app, client_ip, now],
            )?;
            db.execute("DELETE FROM batch_lines WHERE batch_id = ?1", [&batch_id])?;
            Ok(total)
        })
        .await
    }

    /// Forgets what was read of a request that came to nothing.
    pub async fn forget_batch_lines(&self, batch_id: &str) -> Result<(), Error> {
        let batch_id = batch_id.to_owned();
        self.write(move |db| db.execute("DELETE FROM batch_lines WHERE batch_id = ?1", [&batch_id])).await.map(drop)
    }

    /// Forgets what was read of requests that broke off: all of it, or only what is old.
    pub async fn forget_broken_batches(&self, all: bool) -> Result<usize, Error> {
        let before = if all { i64::MAX } else { clock::now() - UNFINISHED };
        self.write(move |db| db.execute("DELETE FROM batch_lines WHERE created_at < ?1", [before])).await
    }

    /// How many runs of batches wait.
    pub async fn waiting_of_batches(&self) -> Result<i64, Error> {
        self.look_through(|db| db.prepare_cached(&format!("SELECT count(*) FROM runs WHERE {WAITS}"))?.query_row([], |row| row.get(0)))
            .await
    }

    /// The apps of which a run of a batch waits, and whose token is in force.
    pub async fn apps_with_batches(&self) -> Result<Vec<String>, Error> {
        self.read(|db| {
            let in_force = "app_name IN (SELECT name FROM tokens WHERE enabled)";
            db.prepare_cached(&format!("SELECT DISTINCT app_name FROM runs WHERE {WAITS} AND {in_force}"))?
                .query_map([], |row| row.get(0))?
                .collect()
        })
        .await
    }

    /// The run that is the app's next of a batch, but for these: of the batch that came first, the one that came first.
    pub async fn next_of_batches(&self, app: &str, taken: Vec<String>) -> Result<Option<WaitingJob>, Error> {
        let (app, taken) = (app.to_owned(), serde_json::to_string(&taken).expect("names are JSON"));
        self.read(move |db| {
            db.prepare_cached(&format!(
                "SELECT app_name, client_ip, nullif(model, ''), prompt, request, run_id FROM runs
                 WHERE {WAITS} AND app_name = ?1 AND run_id NOT IN (SELECT value FROM json_each(?2)) ORDER BY batch_id, run_id LIMIT 1"
            ))?
            .query_row(params![app, taken], waiting_run)
            .optional()
        })
        .await
    }

    /// A batch of the app, or of any.
    pub async fn batch(&self, app: Option<&str>, batch_id: &str) -> Result<Option<Batch>, Error> {
        let (app, batch_id) = (app.map(str::to_owned), batch_id.to_owned());
        self.look_through(move |db| {
            let found = db
                .prepare_cached(&format!("SELECT {BATCH} FROM batches WHERE batch_id = ?1 AND app_name = coalesce(?2, app_name)"))?
                .query_row(params![batch_id, app], batch_at)
                .optional()?;
            found.map(|batch| counted(db, batch)).transpose()
        })
        .await
    }

    /// The app's batches, newest first: at most `limit`, older than `before`.
    pub async fn batches(&self, app: &str, before: Option<String>, limit: u32) -> Result<Vec<Batch>, Error> {
        let app = app.to_owned();
        self.look_through(move |db| {
            let found: Vec<_> = db
                .prepare_cached(&format!(
                    "SELECT {BATCH} FROM batches WHERE app_name = ?1 AND (?2 IS NULL OR batch_id < ?2) ORDER BY batch_id DESC LIMIT ?3"
                ))?
                .query_map(params![app, before, limit], batch_at)?
                .collect::<Result<_, _>>()?;
            found.into_iter().map(|batch| counted(db, batch)).collect()
        })
        .await
    }

    /// At most `limit` of the batch's runs that have ended, in the order that they did, behind the `after`th.
    pub async fn batch_results(&self, batch_id: &str, after: i64, limit: u32) -> Result<Vec<BatchResult>, Error> {
        let batch_id = batch_id.to_owned();
        self.look_through(move |db| {
            let columns = COLUMNS.replace("?3", "?4");
            db.prepare_cached(&format!(
                "SELECT {columns}, 0, run_id, batch_seq, custom_id FROM runs WHERE batch_id = ?1 AND batch_seq > ?2 ORDER BY batch_seq LIMIT ?3"
            ))?
            .query_map(params![batch_id, after, limit, i64::MAX], |row| {
                let run = job_row(row, JobId::Run(row.get(21)?))?;
                Ok(BatchResult { seq: row.get(22)?, custom_id: row.get(23)?, run })
            })?
            .collect()
        })
        .await
    }

    /// Cancels those of a batch's runs that wait, but for these.
    pub async fn cancel_waiting_of_batch(&self, batch_id: &str, but: Vec<String>) -> Result<(), Error> {
        let (batch_id, but, now) = (batch_id.to_owned(), serde_json::to_string(&but).expect("names are JSON"), clock::now());
        self.write(move |db| {
            db.execute("UPDATE batches SET cancelled_at = coalesce(cancelled_at, ?2) WHERE batch_id = ?1 AND finished_at IS NULL", params![batch_id, now])?;
            db.execute(
                "UPDATE runs SET request = NULL, finished_at = ?2, duration_ms = 0, ok = 0, stop_reason = 'cancelled', error = 'its batch was cancelled'
                 WHERE batch_id = ?1 AND queued AND finished_at IS NULL AND run_id NOT IN (SELECT value FROM json_each(?3))",
                params![batch_id, now, but],
            )
        })
        .await
        .map(drop)
    }

    /// The batch's runs that have not ended.
    pub async fn open_of_batch(&self, batch_id: &str) -> Result<Vec<JobRow>, Error> {
        let batch_id = batch_id.to_owned();
        self.look_through(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS}, 0, run_id FROM runs WHERE batch_id = ?1 AND finished_at IS NULL"))?
                .query_map(params![batch_id, 0, 0], |row| job_row(row, JobId::Run(row.get(21)?)))?
                .collect()
        })
        .await
    }

    /// Deletes the rows of batches that ended more than `days` days ago.
    pub async fn forget_batches(&self, days: u32) -> Result<usize, Error> {
        let before = clock::now() - i64::from(days) * clock::DAY;
        self.write(move |db| db.execute("DELETE FROM batches WHERE finished_at < ?1", [before])).await
    }
}

fn batch_at(row: &Row<'_>) -> rusqlite::Result<Batch> {
    Ok(Batch {
        batch_id: row.get(0)?,
        webhook: row.get(1)?,
        created_at: row.get(2)?,
        cancelled_at: row.get(3)?,
        finished_at: row.get(4)?,
        total: row.get(5)?,
        counts: Vec::new(),
        average_ms: None,
    })
}

fn counted(db: &rusqlite::Connection, batch: Batch) -> rusqlite::Result<Batch> {
    let mut statement = db.prepare_cached("SELECT status, count(*), avg(duration_ms) FROM runs WHERE batch_id = ?1 GROUP BY status")?;
    let rows: Vec<(Status, i64, Option<f64>)> =
        statement.query_map([&batch.batch_id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect::<Result<_, _>>()?;
    let average_ms = rows.iter().find(|(status, ..)| *status == Status::Succeeded).and_then(|(.., average)| *average);
    Ok(Batch { counts: rows.into_iter().map(|(status, count, _)| (status, count)).collect(), average_ms, ..batch })
}
