//! What can go wrong with the ledger.

use rusqlite::ErrorCode;

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
