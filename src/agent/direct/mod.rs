//! Sessions whose agent is spoken to directly, by the Agent Client Protocol over its input and output.
//!
//! An adapter is a process of its own for each session, which stays for the next turn. One that has had none for five minutes is ended, and
//! the next turn starts another, which resumes the conversation from disk; so it is after a crash. Between the server and the agent
//! there is nothing else.

mod connection;
mod turn;

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::acpx::command::{Acpx, Error, Target};
use super::family;
use connection::Connection;

/// How long an agent stays without a turn.
const IDLE: Duration = Duration::from_mins(5);
/// How often those that stay are looked after.
const LOOK: Duration = Duration::from_secs(5);
/// How long an agent may take to begin, or to take up a conversation.
const BEGIN: Duration = Duration::from_mins(1);

/// Agents that are spoken to directly. Clones share them.
#[derive(Clone)]
pub struct Direct(Arc<Shared>);

struct Shared {
    /// The sessions' folders, and how their claude is started.
    acpx: Acpx,
    /// The adapter: a path, or a name on PATH.
    adapter: OsString,
    idle: Mutex<HashMap<String, (Connection, Instant)>>,
    ending: TaskTracker,
}

impl Direct {
    /// Agents by this adapter, in the folders of acpx's launcher.
    pub fn new(acpx: Acpx, adapter: OsString) -> Self {
        Self(Arc::new(Shared { acpx, adapter, idle: Mutex::default(), ending: TaskTracker::new() }))
    }

    fn idle(&self) -> MutexGuard<'_, HashMap<String, (Connection, Instant)>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates the session. Gives what its agent calls it.
    pub async fn create(&self, target: &Target, cancel: &CancellationToken) -> Result<String, Error> {
        let connection = tokio::select! {
            biased;
            connection = self.connect(target, None, Instant::now() + BEGIN) => connection?,
            () = cancel.cancelled() => return Err(Error::Failed("it was not waited for".to_owned())),
        };
        let name = connection.session().to_owned();
        self.keep_idle(target, connection);
        Ok(name)
    }

    /// Ends the agent of a session, and all that it started.
    pub async fn end(&self, target: &Target) {
        let connection = self.idle().remove(&target.name);
        if let Some((connection, _)) = connection {
            connection.end().await;
        }
        family::end(&self.0.acpx.tag(&target.name)).await;
    }

    fn keep_idle(&self, target: &Target, mut connection: Connection) {
        connection.waits();
        self.idle().insert(target.name.clone(), (connection, Instant::now()));
    }

    /// Ends agents that had no turn for long, or are dead, for ever.
    pub async fn keep(&self) {
        loop {
            sleep(LOOK).await;
            let old: Vec<_> = self.idle().extract_if(|_, (connection, since)| since.elapsed() > IDLE || connection.is_over()).collect();
            for (_, (connection, _)) in old {
                self.0.ending.spawn(connection.end());
            }
        }
    }

    /// Ends all agents. What they said last gets to the disk.
    pub async fn finish(&self) {
        for (_, (connection, _)) in std::mem::take(&mut *self.idle()) {
            self.0.ending.spawn(connection.end());
        }
        self.0.ending.close();
        self.0.ending.wait().await;
    }
}
