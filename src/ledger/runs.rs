//! The table `runs`: every run, written before its process starts and completed however it ends.

use rusqlite::params;

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

impl Ledger {
    /// Writes the row of a run that is about to start.
    pub async fn begin_run(&self, run: NewRun) -> Result<(), Error> {
        let now = clock::now();
        self.write(move |db| {
            db.prepare_cached("INSERT INTO runs (run_id, app_name, client_ip, model, prompt, started_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
                .execute(params![run.run_id, run.app_name, run.client_ip, run.model, run.prompt, now])
        })
        .await
        .map(drop)
    }

    /// Completes the row of a run.
    pub async fn finish_run(&self, run_id: &str, end: RunEnd) -> Result<(), Error> {
        let (run_id, now) = (run_id.to_owned(), clock::now());
        self.write(move |db| {
            db.prepare_cached(
                "UPDATE runs SET finished_at = ?2, duration_ms = ?3, ok = ?4, stop_reason = ?5, error = ?6, result = ?7,
                     input_tokens = ?8, output_tokens = ?9, cost_usd = ?10
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

    /// Settles the rows that a crash left open. Gives how many there were.
    pub async fn settle_runs(&self) -> Result<usize, Error> {
        let now = clock::now();
        self.write(move |db| {
            db.execute(
                "UPDATE runs SET finished_at = ?1, ok = 0, stop_reason = 'interrupted',
                     error = 'the server ended while this run was going on'
                 WHERE finished_at IS NULL",
                [now],
            )
        })
        .await
    }

    /// Deletes the rows of runs that ended more than `days` days ago.
    pub async fn forget_runs(&self, days: u32) -> Result<usize, Error> {
        let before = clock::now() - i64::from(days) * 86_400;
        self.write(move |db| db.execute("DELETE FROM runs WHERE started_at < ?1 AND finished_at < ?1", [before])).await
    }
}
