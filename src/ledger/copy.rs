//! Copies of the whole database: for backups, and to put one back.

use std::path::Path;

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags, ffi};

use super::error::Error;
use super::migrations::MIGRATIONS;
use super::writer::BUSY;

/// Why a file is no ledger of ours.
#[derive(Debug, thiserror::Error)]
pub enum NoLedger {
    /// Not a database, or a damaged one.
    #[error("it is not an intact SQLite database ({0})")]
    Damaged(String),
    /// A database of something else.
    #[error("it is a database, but not clawdforge's ledger")]
    Foreign,
    /// Written by a newer release.
    #[error(transparent)]
    TooNew(Error),
}

/// Copies the database `from`, which may be in use, into the empty file `to`. The copy is of one moment, and a single
/// file.
pub fn copy(from: &Path, to: &Path) -> rusqlite::Result<()> {
    let from = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    from.busy_timeout(BUSY)?;
    let mut to = Connection::open(to)?;
    // All pages in one step: beside a writer, a copy in several would begin again and again.
    let step = Backup::new(&from, &mut to)?.step(-1)?;
    if step != StepResult::Done {
        return Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_BUSY), None));
    }
    to.pragma_update(None, "journal_mode", "DELETE")
}

/// Brings what stands in the database's journal into its file, where that can be done.
pub fn settle(file: &Path) {
    if let Ok(database) = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE) {
        let _ = database.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    }
}

/// Makes sure that the file is an intact ledger of this release or an older one.
pub fn check(file: &Path) -> Result<(), NoLedger> {
    let damaged = |error: rusqlite::Error| NoLedger::Damaged(error.to_string());
    let database = Connection::open(file).map_err(damaged)?;
    let verdict: String = database.query_row("PRAGMA quick_check", [], |row| row.get(0)).map_err(damaged)?;
    if verdict != "ok" {
        return Err(NoLedger::Damaged(verdict));
    }
    let version: u32 = database.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(damaged)?;
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    if version > known {
        return Err(NoLedger::TooNew(Error::TooNew { found: version, known }));
    }
    match database.prepare("SELECT run_id FROM runs LEFT JOIN tokens ON name = app_name") {
        Ok(_) if version > 0 => Ok(()),
        _ => Err(NoLedger::Foreign),
    }
}
