//! Runs in a list.

use rusqlite::params;

use super::db::Ledger;
use super::error::Error;
use super::job::{COLUMNS, JobId, JobRow, job_row};
use super::status::Status;

/// Which runs are wanted.
#[derive(Clone, Debug, Default)]
pub struct RunsWanted {
    /// Of this app; of all where there is none.
    pub app_name: Option<String>,
    /// Older than the run of this id.
    pub before: Option<String>,
    /// Of this status.
    pub status: Option<Status>,
    /// At most so many.
    pub limit: u32,
    /// Characters of prompts and results.
    pub characters: u32,
}

impl Ledger {
    /// Runs, newest first.
    pub async fn runs(&self, wanted: RunsWanted) -> Result<Vec<JobRow>, Error> {
        self.look_through(move |db| {
            let RunsWanted { app_name, before, status, limit, characters } = wanted;
            db.prepare_cached(&format!(
                "SELECT {COLUMNS}, 0, run_id FROM runs
                 WHERE (?1 IS NULL OR app_name = ?1) AND (?2 IS NULL OR run_id < ?2) AND (?4 IS NULL OR status = ?4)
                 ORDER BY run_id DESC LIMIT ?5"
            ))?
            .query_map(params![app_name, before, characters, status.map(Status::as_str), limit], |row| {
                job_row(row, JobId::Run(row.get(17)?))
            })?
            .collect()
        })
        .await
    }
}
