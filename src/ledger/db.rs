//! The open database: its connections, and how they are used.

use std::path::Path;
use std::sync::Arc;

use rusqlite::Connection;
use tokio::sync::Mutex;

use super::error::Error;
use super::migrations::{MIGRATIONS, migrate};
use super::used::Used;
use super::writer::{BUSY, Writer};

/// The open database. Clones share it.
#[derive(Clone)]
pub struct Ledger {
    records: Arc<Writer>,
    access: Arc<Mutex<Connection>>,
    /// For what takes long.
    history: Arc<Mutex<Connection>>,
    pub(super) used: Used,
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
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.records.write(work).await
    }

    /// Looks something up with `work`.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        on_thread(&self.access, work).await
    }

    /// Looks through many rows with `work`, and keeps nobody else waiting but who does the same.
    pub(super) async fn look_through<T: Send + 'static>(
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

pub(super) fn connect(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}
