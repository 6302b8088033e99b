//! The ledger: `SQLite` and nothing else. One file per table; SQL stands nowhere but here.
//!
//! People query the file by hand, so columns have plain names. Every call runs on a blocking thread. Several connections
//! keep who-may-call answers apart from the records, and both from the history: a ledger that another program has locked
//! delays a run's row, not the look-up of a token.

use std::collections::HashMap;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout};

mod copy;
mod files;
mod idempotency;
mod runs;
mod sessions;
mod tokens;
mod usage;

pub use copy::{NoLedger, check, copy, settle};
pub use files::File;
pub use idempotency::{Claimed, Key};
pub use runs::{NewRun, RunEnd, RunRow, RunsWanted};
pub use sessions::{AgentOfTurn, BeginSession, BeginTurn, NewSession, Session, TurnBegun, TurnRow, TurnState, WaitingTurn, turn_id};
pub use tokens::{App, Limits, NameTaken, TokenRow};
pub use usage::UsageRow;

/// How long a write waits for another program's lock.
const BUSY: Duration = Duration::from_secs(2);

/// Append only: each entry takes a database from the version that is its index to the next.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE tokens (
        name TEXT PRIMARY KEY,
        token_sha256 TEXT NOT NULL UNIQUE,
        ip_cidrs TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        last_used INTEGER,
        enabled INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE TABLE files (
        file_token TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        name TEXT NOT NULL,
        size INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX files_expires_at ON files (expires_at);
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        client_ip TEXT NOT NULL,
        model TEXT NOT NULL,
        prompt TEXT NOT NULL,
        started_at INTEGER NOT NULL,
        finished_at INTEGER,
        duration_ms INTEGER,
        ok INTEGER,
        stop_reason TEXT,
        error TEXT,
        result TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER,
        cost_usd REAL
    ) STRICT;
    CREATE INDEX runs_started_at ON runs (started_at);
    CREATE INDEX runs_open ON runs (run_id) WHERE finished_at IS NULL;
",
    "
    CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        agent TEXT NOT NULL,
        model TEXT,
        permissions TEXT NOT NULL,
        meta TEXT,
        cwd TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        last_turn_at INTEGER,
        turn_count INTEGER NOT NULL DEFAULT 0,
        closed_at INTEGER,
        acpx_record_id TEXT,
        acp_session_id TEXT
    ) STRICT;
    CREATE INDEX sessions_app ON sessions (app_name, created_at);
    CREATE TABLE session_events (
        id INTEGER PRIMARY KEY,
        session_id TEXT NOT NULL,
        app_name TEXT NOT NULL,
        event TEXT NOT NULL,
        started_at INTEGER NOT NULL,
        finished_at INTEGER,
        model TEXT,
        client_ip TEXT,
        prompt TEXT,
        duration_ms INTEGER,
        ok INTEGER,
        stop_reason TEXT,
        error TEXT,
        result TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER
    ) STRICT;
    CREATE INDEX session_events_session ON session_events (session_id);
    CREATE INDEX session_events_started_at ON session_events (started_at);
",
    "
    ALTER TABLE tokens ADD COLUMN max_concurrent INTEGER;
    ALTER TABLE tokens ADD COLUMN daily_usd REAL;
    ALTER TABLE sessions ADD COLUMN agent_cost_usd REAL;
    ALTER TABLE session_events ADD COLUMN cost_usd REAL;
    CREATE INDEX runs_app ON runs (app_name, started_at, model, finished_at, input_tokens, output_tokens, cost_usd);
    CREATE INDEX session_events_app ON session_events (app_name, started_at, model, event, finished_at, input_tokens, output_tokens, cost_usd);
",
    // `request` is what else a queued run or turn needs, to start after a restart.
    "
    ALTER TABLE runs ADD COLUMN queued_at INTEGER;
    ALTER TABLE runs ADD COLUMN queued INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN request TEXT;
    ALTER TABLE runs ADD COLUMN status TEXT AS (CASE
        WHEN finished_at IS NULL THEN iif(queued, 'queued', 'running')
        WHEN ok THEN 'succeeded'
        WHEN stop_reason = 'timeout' THEN 'timed_out'
        WHEN stop_reason IN ('cancelled', 'interrupted') THEN stop_reason
        ELSE 'failed' END) VIRTUAL;
    CREATE TABLE idempotency (
        app_name TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        id TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (app_name, key)
    ) STRICT;
    CREATE INDEX idempotency_created_at ON idempotency (created_at);
    ALTER TABLE session_events ADD COLUMN turn INTEGER;
    ALTER TABLE session_events ADD COLUMN queued_at INTEGER;
    ALTER TABLE session_events ADD COLUMN queued INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE session_events ADD COLUMN request TEXT;
    ALTER TABLE session_events ADD COLUMN status TEXT AS (CASE
        WHEN finished_at IS NULL THEN iif(queued, 'queued', 'running')
        WHEN ok THEN 'succeeded'
        WHEN stop_reason = 'timeout' THEN 'timed_out'
        WHEN stop_reason IN ('cancelled', 'interrupted') THEN stop_reason
        ELSE 'failed' END) VIRTUAL;
    UPDATE session_events SET turn = (SELECT count(*) FROM session_events AS before
        WHERE before.session_id = session_events.session_id AND before.event = 'turn' AND before.id <= session_events.id)
    WHERE event = 'turn';
    CREATE UNIQUE INDEX session_events_turn ON session_events (session_id, turn) WHERE turn IS NOT NULL;
",
    // Of the files that were attached to its turns.
    "ALTER TABLE sessions ADD COLUMN attached_bytes INTEGER NOT NULL DEFAULT 0;",
];

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
    records: Arc<Mutex<Connection>>,
    access: Arc<Mutex<Connection>>,
    /// For what takes long.
    history: Arc<Mutex<Connection>>,
    /// When tokens were last used, on the way to the table.
    used: Arc<std::sync::Mutex<HashMap<String, i64>>>,
    /// Since when a write waits for another program's lock.
    shut_out: Arc<std::sync::Mutex<Option<Instant>>>,
}

impl Ledger {
    /// Opens the database in `file`, made or migrated as needed.
    pub fn open(file: &Path) -> Result<Self, Error> {
        let mut records = connect(file)?;
        // A record that was acknowledged outlives a power cut.
        records.pragma_update(None, "synchronous", "FULL")?;
        migrate(&mut records, MIGRATIONS)?;
        let [access, history] = [connect(file)?, connect(file)?].map(|connection| Arc::new(Mutex::new(connection)));
        Ok(Self { records: Arc::new(Mutex::new(records)), access, history, used: Arc::default(), shut_out: Arc::default() })
    }

    /// Runs `work` in one transaction on the records. It is immediate, so that a lock is met at its start and not in
    /// its middle, and it is whole or nothing.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let ledger = self.clone();
        let mut connection = pin!(self.records.clone().lock_owned());
        // Whoever comes while another program holds the lock waits as long as the first, not in turn behind it. Behind other
        // writes it waits as long as they take.
        let connection = loop {
            match timeout(BUSY, &mut connection).await {
                Ok(connection) => break connection,
                Err(_) if self.shut_out().is_some_and(|since| since.elapsed() > BUSY / 2) => return Err(Error::Locked),
                Err(_) => {}
            }
        };
        on_thread(connection, move |connection| {
            *ledger.shut_out() = Some(Instant::now());
            let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate);
            *ledger.shut_out() = None;
            let transaction = begun?;
            let used = std::mem::take(&mut *ledger.used());
            let noted = tokens::note_used(&transaction, &used);
            let done = noted.and_then(|()| work(&transaction)).and_then(|value| transaction.commit().map(|()| value));
            if done.is_err() {
                // Not written, unless they were used again since.
                let mut later = ledger.used();
                for (name, at) in used {
                    later.entry(name).or_insert(at);
                }
            }
            done
        })
        .await
    }

    /// Looks something up with `work`.
    async fn read<T: Send + 'static>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static) -> Result<T, Error> {
        on_thread(self.access.clone().lock_owned().await, move |connection| work(connection)).await
    }

    /// Looks through many rows with `work`, and keeps nobody else waiting but who does the same.
    async fn look_through<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        on_thread(self.history.clone().lock_owned().await, move |connection| work(connection)).await
    }

    fn shut_out(&self) -> MutexGuard<'_, Option<Instant>> {
        self.shut_out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self) -> MutexGuard<'_, HashMap<String, i64>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn on_thread<T: Send + 'static>(
    mut connection: OwnedMutexGuard<Connection>,
    work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(move || work(&mut connection));
    Ok(done.await.expect("ledger calls neither panic nor are cancelled")?)
}

fn connect(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// Brings the database to the newest version in one transaction.
fn migrate(connection: &mut Connection, migrations: &[&str]) -> Result<(), Error> {
    let known = u32::try_from(migrations.len()).unwrap_or(u32::MAX);
    let version = |connection: &Connection| connection.query_row("PRAGMA user_version", [], |row| row.get(0));
    // A database that is up to date is not written to, so that a command can look into one that is in use.
    if version(connection)? == known {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: u32 = version(&transaction)?;
    let Some(missing) = migrations.get(found as usize..) else { return Err(Error::TooNew { found, known }) };
    for migration in missing {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", known)?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrating_twice_keeps_the_rows_and_a_newer_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ledger.db");
        let mut connection = connect(&file).unwrap();
        migrate(&mut connection, &["CREATE TABLE a (x)"]).unwrap();
        connection.execute("INSERT INTO a VALUES (7)", []).unwrap();
        let newer = ["CREATE TABLE a (x)", "ALTER TABLE a ADD COLUMN y DEFAULT 8"];
        migrate(&mut connection, &newer).unwrap();
        migrate(&mut connection, &newer).unwrap();
        let row: (i64, i64) = connection.query_row("SELECT x, y FROM a", [], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
        assert_eq!(row, (7, 8));
        let refused = migrate(&mut connection, &newer[..1]).unwrap_err();
        assert!(matches!(refused, Error::TooNew { found: 2, known: 1 }), "{refused}");
    }

    #[tokio::test]
    async fn a_write_that_fails_loses_nothing_of_when_tokens_were_used() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("ledger.db")).unwrap();
        ledger.touch_token("app");
        ledger.write(|db| db.execute("INSERT INTO nowhere VALUES (1)", [])).await.unwrap_err();
        assert!(ledger.used().contains_key("app"));
        ledger.flush_used().await.unwrap();
        assert!(ledger.used().is_empty());
    }

    #[test]
    fn a_migration_that_fails_leaves_the_database_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let mut connection = connect(&folder.path().join("ledger.db")).unwrap();
        migrate(&mut connection, &["CREATE TABLE a (x)", "CREATE TABLE a (x)"]).unwrap_err();
        let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
        let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0)).unwrap();
        assert_eq!((version, tables), (0, 0));
    }
}
