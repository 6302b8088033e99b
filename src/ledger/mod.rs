//! The ledger: `SQLite` and nothing else. One file per table; SQL stands nowhere but here.
//!
//! People query the file by hand, so columns have plain names. Writes go through one thread ([`writer`]). Two more connections keep
//! who-may-call answers apart from the records, and both from the history: a ledger that another program has locked delays a
//! run's row, not the look-up of a token.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};
use tokio::sync::Mutex;

mod copy;
mod files;
mod history;
mod idempotency;
mod job;
mod jobs;
mod migrations;
mod recover;
mod sessions;
mod status;
mod tokens;
mod usage;
mod writer;

pub use copy::{NoLedger, check, copy, settle};
pub use files::File;
pub use history::RunsWanted;
pub use idempotency::{Claimed, Key};
pub use job::{Finish, Finished, Inserted, JobEnd, JobId, JobRow, NewJob, Queued};
pub use recover::WaitingJob;
pub use sessions::{BeginSession, NewSession, Session};
pub use status::Status;
pub use tokens::{App, Limits, NameTaken, TokenRow};
pub use usage::UsageRow;

use migrations::{MIGRATIONS, migrate};
use writer::Writer;

/// How long a write waits for another program's lock.
const BUSY: Duration = Duration::from_secs(2);

/// Why the ledger could not do what was asked. Its `Display` says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another program holds the database's lock.
    #[error("the ledger is locked by another program; end what holds clawdforge.db open in a transaction, then try again")]
    Locked,
    /// The disk is full, or fails.
    #[error("the disk that holds the ledger is full or failing; free some space, then try again")]
    Full(#[source] rusqlite::Error),
    /// The file was written by a newer release.
    #[error("the ledger is of version {found}, and this release knows versions up to {known}; run the newer release, or restore a backup")]
    TooNew {
        /// The file's version.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
    /// Anything else that `SQLite` says.
    #[error("the ledger could not be used ({0}); check that clawdforge.db is intact and writable")]
    Sqlite(#[source] rusqlite::Error),
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked,
            // A WAL or its index that can't grow is reported as a failed write.
            Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure) => Self::Full(error),
            _ => Self::Sqlite(error),
        }
    }
}

/// The open database. Clones share it.
#[derive(Clone)]
pub struct Ledger {
    records: Arc<Writer>,
    access: Arc<Mutex<Connection>>,
    /// For what takes long.
    history: Arc<Mutex<Connection>>,
    used: Used,
}

/// When tokens were last used, on the way to the table.
#[derive(Clone, Default)]
struct Used(Arc<std::sync::Mutex<HashMap<String, i64>>>);

impl Used {
    fn get(&self) -> MutexGuard<'_, HashMap<String, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// Opens the database in `file`, made or migrated as needed.
    pub fn open(file: &Path) -> Result<Self, Error> {
        let mut records = connect(file)?;
        // A record that was acknowledged outlives a power cut.
        records.pragma_update(None, "synchronous", "FULL")?;
        migrate(&mut records, MIGRATIONS)?;
        let [access, history] = [connect(file)?, connect(file)?].map(|connection| Arc::new(Mutex::new(connection)));
        let used = Used::default();
        Ok(Self { records: Arc::new(Writer::start(records, used.clone())), access, history, used })
    }

    /// Runs `work` in a transaction on the records, alone or with others: it is whole or nothing, and on disk when this returns.
    /// It may be run again, where what it was together with could not be written.
    async fn write<T: Send + 'static>(&self, work: impl Fn(&Connection) -> rusqlite::Result<T> + Send + 'static) -> Result<T, Error> {
        self.records.write(work).await
    }

    /// Looks something up with `work`.
    async fn read<T: Send + 'static>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static) -> Result<T, Error> {
        on_thread(&self.access, work).await
    }

    /// Looks through many rows with `work`, and keeps nobody else waiting but who does the same.
    async fn look_through<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        on_thread(&self.history, work).await
    }
}

async fn on_thread<T: Send + 'static>(
    connection: &Arc<Mutex<Connection>>,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let connection = connection.clone().lock_owned().await;
    let done = tokio::task::spawn_blocking(move || work(&connection));
    Ok(done.await.expect("ledger calls neither panic nor are cancelled")?)
}

fn connect(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}
