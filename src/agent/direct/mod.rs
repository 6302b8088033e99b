//! Sessions whose agent is spoken to directly, by the Agent Client Protocol over its input and output.
//!
//! An adapter is a process of its own for each session, which stays for the next turn. One that has had none for a while is ended, and
//! the next turn starts another, which resumes the conversation from disk; so it is after a crash. Between the server and the agent
//! there is nothing else.

mod connection;
pub mod run;
mod turn;

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::acpx::command::{Acpx, Error, Target};
use super::contract::Setup;
use super::family;
use super::kinds;
use super::turn::CLAUDE_AGENT;
use crate::blocking::blocking;
use connection::Connection;

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
    /// How long an agent stays without a turn.
    stays: Duration,
    ending: TaskTracker,
}

/// A session that was started ahead of need, and has neither a row nor an owner.
pub struct Unclaimed {
    direct: Direct,
    target: Target,
    connection: Connection,
}

impl Unclaimed {
    /// The id that it has to have.
    pub fn session_id(&self) -> &str {
        &self.target.name
    }

    /// Whether its agent waits.
    pub fn is_alive(&self) -> bool {
        !self.connection.is_over()
    }

    /// Ends it, with its folder.
    pub async fn end(self) {
        self.connection.end().await;
        self.direct.clear_away(&self.target).await;
    }
}

impl Direct {
    /// Agents by this adapter, in the folders of acpx's launcher, that stay for so long without a turn.
    pub fn new(acpx: Acpx, adapter: OsString, stays: Duration) -> Self {
        Self(Arc::new(Shared { acpx, adapter, idle: Mutex::default(), stays, ending: TaskTracker::new() }))
    }

    /// The folder of the sessions' folders.
    pub fn folder(&self) -> &Path {
        &self.0.acpx.launcher.folder
    }

    fn idle(&self) -> MutexGuard<'_, HashMap<String, (Connection, Instant)>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates the session, or takes over one that was started ahead, with its folder. Gives what its agent calls it.
    pub async fn create(&self, target: &Target, ahead: Option<Unclaimed>, cancel: &CancellationToken) -> Result<String, Error> {
        let connection = match ahead {
            Some(Unclaimed { target: Target { dir, .. }, connection, .. }) => {
                blocking(move || dir.claim()).await.map_err(|error| Error::Failed(error.to_string()))?;
                connection
            }
            None => self.begin(target, cancel).await?,
        };
        let name = connection.session().to_owned();
        self.keep_idle(target, connection);
        Ok(name)
    }

    async fn begin(&self, target: &Target, cancel: &CancellationToken) -> Result<Connection, Error> {
        tokio::select! {
            biased;
            connection = self.connect(target, None, Instant::now() + BEGIN) => connection,
            () = cancel.cancelled() => Err(Error::Failed("it was not waited for".to_owned())),
        }
    }

    /// Starts a session that nobody has asked for yet, in a folder of its own. An error is in words.
    pub async fn start_ahead(&self, setup: &Setup, cancel: &CancellationToken) -> Result<Unclaimed, String> {
        let target = self.make_unclaimed(setup).await.map_err(|error| error.to_string())?;
        match self.begin(&target, cancel).await {
            Ok(connection) => Ok(Unclaimed { direct: self.clone(), target, connection }),
            Err(error) => {
                self.clear_away(&target).await;
                Err(error.to_string())
            }
        }
    }

    /// Makes the folder of a session that is nobody's.
    async fn make_unclaimed(&self, setup: &Setup) -> io::Result<Target> {
        let target = self.0.acpx.target(&Uuid::now_v7().simple().to_string(), setup);
        let (dir, environment) = (target.dir.clone(), self.0.acpx.launcher.environment.clone());
        let made = blocking(move || dir.make(&environment).and_then(|()| dir.set_unclaimed())).await;
        match made {
            Ok(()) => Ok(target),
            Err(error) => {
                self.clear_away(&target).await;
                Err(error)
            }
        }
    }

    /// The programs of such a session.
    pub fn programs(&self, setup: &Setup) -> Vec<OsString> {
        match kinds::of(&setup.agent) {
            Some(kind) if setup.agent != CLAUDE_AGENT => vec![kind.program.into()],
            _ => vec![self.0.adapter.clone(), self.0.acpx.claude_program.clone()],
        }
    }

    /// Ends all that there is of a session that is nobody's.
    async fn clear_away(&self, target: &Target) {
        family::end(&self.0.acpx.tag(&target.name)).await;
        let dir = target.dir.clone();
        if let Err(error) = blocking(move || dir.remove()).await {
            tracing::warn!(path = %target.dir.folder().display(), %error, "the folder of a session that is nobody's is left until the next start");
        }
    }

    /// Ends the agent of a session, and all that it started.
    pub async fn end(&self, session_id: &str) {
        let connection = self.idle().remove(session_id);
        if let Some((connection, _)) = connection {
            connection.end().await;
        }
        family::end(&self.0.acpx.tag(session_id)).await;
    }

    fn keep_idle(&self, target: &Target, mut connection: Connection) {
        connection.waits();
        self.idle().insert(target.name.clone(), (connection, Instant::now()));
    }

    /// Ends agents that had no turn for long, or are dead, for ever.
    pub async fn keep(&self) {
        loop {
            sleep(LOOK.min(self.0.stays)).await;
            let is_old =
                |_: &String, (connection, since): &mut (Connection, Instant)| since.elapsed() > self.0.stays || connection.is_over();
            let old: Vec<_> = self.idle().extract_if(is_old).collect();
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
