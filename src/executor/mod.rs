//! Where work is carried out: runs and turns, and what sessions are on a disk.

pub mod here;

use std::io::{self, ErrorKind};

use serde::{Deserialize, Serialize};

use crate::agent::acpx::command;

/// Why there is no session.
#[derive(Clone, Debug, Deserialize, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Unmade {
    /// There is no such program.
    #[error("{0} is not installed")]
    NotInstalled(String),
    /// What speaks to its agent failed, or the agent did.
    #[error("{0}")]
    Failed(String),
    /// The disk is full.
    #[error("the disk is full")]
    DiskFull,
    /// The disk failed, in words.
    #[error("{0}")]
    Disk(String),
}

impl From<command::Error> for Unmade {
    fn from(error: command::Error) -> Self {
        match error {
            command::Error::NotInstalled(program) => Self::NotInstalled(program.to_string_lossy().into_owned()),
            command::Error::Failed(error) => Self::Failed(error),
        }
    }
}

impl From<io::Error> for Unmade {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::Disk(error.to_string()),
        }
    }
}
