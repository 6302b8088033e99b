//! Why there is no job, or no longer: nothing was begun.

use std::io::{self, ErrorKind};

use serde::{Deserialize, Serialize};

use super::queue::Refused;
use crate::ledger;

/// Why an agent was not asked.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Rejection {
    /// As many wait as may.
    #[error("all places are taken and the queue is full")]
    Full,
    /// The app has spent what it may today.
    #[error("the app has spent its budget")]
    Spent,
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
    /// It was cancelled before it began.
    #[error("it was cancelled before it began")]
    Cancelled,
    /// Its session is closed.
    #[error("the session is closed")]
    SessionClosed,
    /// The session's files would have more than so many bytes.
    #[error("the session's files would have more than {0} bytes")]
    TooMuchAttached(u64),
    /// The machine that its session lives on is away.
    #[error("the machine {0} is away")]
    Away(String),
    /// There is no machine that makes runs.
    #[error("no machine is there")]
    Nowhere,
    /// Another program holds the ledger's lock.
    #[error("{}", ledger::Error::Locked)]
    LedgerLocked,
    /// The ledger's disk is full, or fails.
    #[error("the disk that holds the ledger is full or failing; free some space, then try again")]
    LedgerFull,
    /// The disk is full.
    #[error("the disk is full")]
    DiskFull,
    /// The data folder can't be used, for a reason that is the operator's alone.
    #[error("the server can't use its data folder")]
    Disk,
    /// It waited for a start of the server, and could not be read any more.
    #[error("it could not be started; send it again")]
    Unreadable,
    /// A task died of a defect.
    #[error("the server met a defect; its operator finds it in its log")]
    Defect,
}

impl From<ledger::Error> for Rejection {
    fn from(error: ledger::Error) -> Self {
        // Here, because the cause goes no further.
        tracing::error!(?error, "the ledger failed");
        match error {
            ledger::Error::Locked => Self::LedgerLocked,
            ledger::Error::Full(_) => Self::LedgerFull,
            ledger::Error::TooNew { .. } | ledger::Error::Sqlite(_) => Self::Disk,
        }
    }
}

impl From<io::Error> for Rejection {
    fn from(error: io::Error) -> Self {
        tracing::error!(%error, "the disk failed");
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::Disk,
        }
    }
}

impl From<Refused> for Rejection {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self::Full,
            Refused::Closed => Self::Stopping,
        }
    }
}
