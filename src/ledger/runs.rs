//! The table `runs`: every run, written before its process starts and completed however it ends.

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::idempotency::{Key, claim};
use super::{Error, Ledger};
use crate::clock;

/// What is known of a run before it starts.
#[derive(Clone, Debug)]
pub struct NewRun {
    /// 32 hex digits.
    pub run_id: String,
    /// The caller's token name.
    pub app_name: String,
    /// The caller's address.
    pub client_ip: String,
    /// The model asked for.
    pub model: String,
    /// The prompt as the app sent it.
    pub prompt: String,
}

/// What is known of a run at its end.
#[derive(Clone, Debug)]
pub struct RunEnd {
    /// Milliseconds from the process's start; the time in the queue is not in it.
    pub duration_ms: i64,
    /// Whether Claude answered.
    pub ok: bool,
    /// `end_turn` and its like from Claude, or `error`, `timeout`, `cancelled`, `interrupted`.
    pub stop_reason: String,
    /// What went wrong, in words.
    pub error: Option<String>,
    /// The reply's text.
    pub result: Option<String>,
    /// Tokens read, those from the cache included.
    pub input_tokens: Option<i64>,
    /// Tokens written.
    pub output_tokens: Option<i64>,
    /// What the CLI says it would have cost, in US dollars.
    pub cost_usd: Option<f64>,
}

impl RunEnd {
    /// Of what never began.
    pub fn failed(stop_reason: &str, error: String) -> Self {
        Self {
            duration_ms: 0,
            ok: false,
            stop_reason: stop_reason.to_owned(),
            error: Some(error),
            result: None,
            input_tokens: None,
            output_tokens: None,
            cost_usd: None,
        }
    }
}

/// A run's row.
#[derive(Clone, Debug)]
pub struct RunRow {
    /// What was known before it started.
    pub new: NewRun,
    /// `queued`, `running`, `succeeded`, `failed`, `timed_out`, `cancelled` or `interrupted`.
    pub status: String,
    /// Unix seconds; `None` for a run of an older release.
    pub queued_at: Option<i64>,
    /// Unix seconds; of one that waits, when it was accepted.
    pub started_at: i64,
    /// Unix seconds, and what is known of its end.
    pub finished: Option<(i64, RunEnd)>,
}

/// Which runs are wanted.
#[derive(Clone, Debug, Default)]
pub struct RunsWanted {
    /// Of this app; of all where there is none.
    pub app_name: Option<String>,
    /// Older than the run of this id.
    pub before: Option<String>,
    /// Of this status.
    pub status: Option<String>,
    /// At most so many.
    pub limit: u32,
    /// Characters of prompts and results.
    pub characters: u32,
}

const COLUMNS: &str =
    "run_id, app_name, client_ip, model, substr(prompt, 1, ?1), status, queued_at, started_at, finished_at, duration_ms, ok,
    stop_reason, error, substr(result, 1, ?1), input_tokens, output_tokens, cost_usd";

impl Ledger {
    /// Writes the row of a run that is about to start.
    pub async fn begin_run(&self, run: NewRun) -> Result<(), Error> {
        self.write(move |db| insert(db, &run, false, None)).await
    }

    /// Writes the row of a run that waits for its place. `request` is what it needs to be started after a restart; without one
    /// it ends with the server. False where the key was taken before.
    pub async fn accept_run(&self, run: NewRun, request: Option<String>, key: Option<Key>) -> Result<bool, Error> {
        self.write(move |db| {
            if let Some(key) = key
                && !claim(db, &key, &run.run_id)?
            {
                return Ok(false);
            }
            insert(db, &run, true, request.as_deref()).map(|()| true)
        })
        .await
    }

    /// Notes that a run that waited starts. From here on a crash ends it.
    pub async fn start_run(&self, run_id: &str) -> Result<(), Error> {
        let (run_id, now) = (run_id.to_owned(), clock::now());
        self.write(move |db| {
            db.prepare_cached("UPDATE runs SET queued = 0, request = NULL, started_at = ?2 WHERE run_id = ?1")?
                .execute(params![run_id, now])
        })
        .await
        .map(drop)
    }

    /// The runs that waited when the server ended and are to be started, in the order that they came, each with its request.
    pub async fn waiting_runs(&self) -> Result<Vec<(NewRun, String)>, Error> {
        self.read(|db| {
            db.prepare(
                "SELECT run_id, app_name, client_ip, model, prompt, request FROM runs
                 WHERE finished_at IS NULL AND queued AND request IS NOT NULL ORDER BY run_id",
            )?
            .query_map([], |row| Ok((new_run(row)?, row.get(5)?)))?
            .collect()
        })
        .await
    }

    /// The app's run of that id.
    pub async fn run(&self, app: &str, run_id: &str) -> Result<Option<RunRow>, Error> {
        let (app, run_id) = (app.to_owned(), run_id.to_owned());
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM runs WHERE run_id = ?2 AND app_name = ?3"))?
                .query_row(params![i64::MAX, run_id, app], run_row)
                .optional()
        })
        .await
    }

    /// Runs, newest first.
    pub async fn runs(&self, wanted: RunsWanted) -> Result<Vec<RunRow>, Error> {
        self.look_through(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM runs
                 WHERE (?2 IS NULL OR app_name = ?2) AND (?3 IS NULL OR run_id < ?3) AND (?4 IS NULL OR status = ?4)
                 ORDER BY run_id DESC LIMIT ?5"
            ))?
            .query_map(params![wanted.characters, wanted.app_name, wanted.before, wanted.status, wanted.limit], run_row)?
            .collect()
        })
        .await
    }

    /// Completes the row of a run.
    pub async fn finish_run(&self, run_id: &str, end: RunEnd) -> Result<(), Error> {
        let (run_id, now) = (run_id.to_owned(), clock::now());
        self.write(move |db| {
            db.prepare_cached(
                "UPDATE runs SET finished_at = ?2, duration_ms = ?3, ok = ?4, stop_reason = ?5, error = ?6, result = ?7,
                     input_tokens = ?8, output_tokens = ?9, cost_usd = ?10, request = NULL
                 WHERE run_id = ?1 AND finished_at IS NULL",
            )?
            .execute(params![
                run_id,
                now,
                end.duration_ms,
                end.ok,
                end.stop_reason,
                end.error,
                end.result,
                end.input_tokens,
                end.output_tokens,
                end.cost_usd,
            ])
        })
        .await
        .map(drop)
    }

    /// Settles the rows that a crash left open, but for those of runs that are still to start. Gives their ids.
    pub async fn settle_runs(&self) -> Result<Vec<String>, Error> {
        let now = clock::now();
        self.write(move |db| {
            db.prepare(
                "UPDATE runs SET finished_at = ?1, ok = 0, stop_reason = 'interrupted', request = NULL,
                     error = 'the server ended while this run was going on'
                 WHERE finished_at IS NULL AND NOT (queued AND request IS NOT NULL) RETURNING run_id",
            )?
            .query_map([now], |row| row.get(0))?
            .collect()
        })
        .await
    }

    /// Deletes the rows of runs that ended more than `days` days ago.
    pub async fn forget_runs(&self, days: u32) -> Result<usize, Error> {
        let before = clock::now() - i64::from(days) * clock::DAY;
        self.write(move |db| db.execute("DELETE FROM runs WHERE started_at < ?1 AND finished_at < ?1", [before])).await
    }
}

fn insert(db: &Transaction<'_>, run: &NewRun, queued: bool, request: Option<&str>) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO runs (run_id, app_name, client_ip, model, prompt, queued_at, started_at, queued, request)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?7, ?8)",
    )?
    .execute(params![run.run_id, run.app_name, run.client_ip, run.model, run.prompt, clock::now(), queued, request])
    .map(drop)
}

fn new_run(row: &Row<'_>) -> rusqlite::Result<NewRun> {
    Ok(NewRun { run_id: row.get(0)?, app_name: row.get(1)?, client_ip: row.get(2)?, model: row.get(3)?, prompt: row.get(4)? })
}

fn run_row(row: &Row<'_>) -> rusqlite::Result<RunRow> {
    let (new, status, queued_at, started_at) = (new_run(row)?, row.get(5)?, row.get(6)?, row.get(7)?);
    Ok(RunRow { new, status, queued_at, started_at, finished: finished(row, 8)? })
}

/// When some work ended, and how, from nine columns that begin with the former.
pub(super) fn finished(row: &Row<'_>, at: usize) -> rusqlite::Result<Option<(i64, RunEnd)>> {
    let Some(finished_at) = row.get(at)? else { return Ok(None) };
    let end = RunEnd {
        duration_ms: row.get::<_, Option<i64>>(at + 1)?.unwrap_or_default(),
        ok: row.get(at + 2)?,
        stop_reason: row.get(at + 3)?,
        error: row.get(at + 4)?,
        result: row.get(at + 5)?,
        input_tokens: row.get(at + 6)?,
        output_tokens: row.get(at + 7)?,
        cost_usd: row.get(at + 8)?,
    };
    Ok(Some((finished_at, end)))
}
