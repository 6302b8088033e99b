//! Where work is carried out: runs and turns, and what sessions are on a disk. On this machine ([`here`]) or on another
//! ([`crate::cluster::elsewhere`]), and nobody else knows which it was.

pub mod here;

use std::collections::{HashMap, HashSet};
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::agent::acpx::command;
use crate::agent::backend::{self, Executed};
use crate::agent::contract::{Conversation, Driver, Setup, Spec};
use crate::agent::control::Control;
use crate::cluster::elsewhere::{Carried, Claimed, Elsewhere};
use crate::ledger::Machine;
use here::Here;

/// How often it is looked whether somebody is there.
const LOOK: Duration = Duration::from_secs(1);

/// What carries work out. Clones share it.
#[derive(Clone)]
pub struct Executors {
    here: Here,
    /// Runs that go on here, where they may go on elsewhere.
    slots: Arc<Semaphore>,
    places: usize,
    elsewhere: Option<Elsewhere>,
}

/// What carries a job out.
pub enum Executor<'a> {
    /// This machine. A run holds one of its places.
    Here(&'a Here, Option<OwnedSemaphorePermit>),
    /// Another one, which has taken it.
    Elsewhere(Claimed),
}

/// A job for which all is ready.
pub enum Ready<'a> {
    /// On this machine.
    Here(backend::Ready<'a>, Option<OwnedSemaphorePermit>),
    /// On another one.
    Elsewhere(Claimed),
}

/// What came of a job.
pub enum Came<'a> {
    /// It is over for its caller.
    Over(Box<Executed<'a>>),
    /// It goes on without this server, which finds it at its next start.
    GoesOn,
}

/// What an earlier life of this server was told of a job that goes on elsewhere. It is told all of it again.
#[derive(Debug, Default)]
pub struct Retold {
    /// So many events.
    pub events: u64,
    /// The questions that are over.
    pub resolved: HashSet<String>,
}

/// A session that is to be: it has a name, and no owner yet.
pub struct Taken {
    /// The id that it has to have.
    pub session_id: String,
    /// The folder that its agent works in.
    pub cwd: String,
    /// What is to speak to its agent.
    pub driver: Driver,
    /// The machine that it is to live on; `None` for this one.
    pub worker: Option<String>,
    here: Option<here::Taken>,
}

impl Executors {
    /// This machine, with places for so many runs at once, and others.
    pub fn new(here: Here, places: usize, elsewhere: Option<Elsewhere>) -> Self {
        Self { here, slots: Arc::new(Semaphore::new(places)), places, elsewhere }
    }

    /// Other machines, if there can be any.
    pub fn elsewhere(&self) -> Option<&Elsewhere> {
        self.elsewhere.as_ref()
    }

    /// This machine.
    pub fn here(&self) -> &Here {
        &self.here
    }

    /// The machine that a session's turns would wait for, which is away.
    pub fn awaited(&self, session: &Conversation) -> Option<String> {
        let worker = session.worker.as_deref()?;
        let is_away = self.elsewhere.as_ref().is_none_or(|elsewhere| elsewhere.is_away(Some(worker)));
        is_away.then(|| worker.to_owned())
    }

    /// Whether there is no machine that makes runs.
    pub fn is_nowhere(&self) -> bool {
        self.places == 0 && self.elsewhere.as_ref().is_none_or(|elsewhere| elsewhere.is_away(None))
    }

    /// Comes when nobody is there who could carry a job out, and says who would be waited for.
    pub async fn nobody(&self, session: Option<&Conversation>) -> Unmade {
        if self.elsewhere.is_none() {
            return std::future::pending().await;
        }
        loop {
            match session {
                Some(session) => {
                    if let Some(worker) = self.awaited(session) {
                        return Unmade::Away(worker);
                    }
                }
                None if self.is_nowhere() => return Unmade::Nowhere,
                None => {}
            }
            sleep(LOOK).await;
        }
    }

    /// Finds what carries a job out, which may have to be waited for.
    pub async fn find(&self, job: &str, uuid: Uuid, spec: &Spec) -> Executor<'_> {
        let Some(elsewhere) = &self.elsewhere else { return Executor::Here(&self.here, None) };
        match &spec.session {
            Some(Conversation { worker: None, .. }) => Executor::Here(&self.here, None),
            Some(Conversation { worker, .. }) => Executor::Elsewhere(elsewhere.offer(job, uuid, spec, worker.as_deref()).await),
            None => {
                if self.is_lighter(elsewhere)
                    && let Ok(slot) = self.slots.clone().try_acquire_owned()
                {
                    return Executor::Here(&self.here, Some(slot));
                }
                tokio::select! {
                    claimed = elsewhere.offer(job, uuid, spec, None) => Executor::Elsewhere(claimed),
                    // The semaphore is never closed.
                    Ok(slot) = self.slots.clone().acquire_owned() => Executor::Here(&self.here, Some(slot)),
                }
            }
        }
    }

    /// Whether this machine has fewer runs than its share of all.
    fn is_lighter(&self, elsewhere: &Elsewhere) -> bool {
        let (there, places) = elsewhere.load();
        let here = self.places - self.slots.available_permits();
        here * places <= there * self.places
    }

    /// What carries a job out since an earlier start of this server, which was told `retold` of it. `None` where there are no other machines.
    pub fn rejoin(&self, job: &str, machine: Machine, retold: Retold) -> Option<Executor<'_>> {
        self.elsewhere.as_ref().map(|elsewhere| Executor::Elsewhere(elsewhere.rejoin(job, machine, retold)))
    }

    /// Nothing of a job is needed any more: its row is written.
    pub fn forget(&self, job: &str) {
        if let Some(elsewhere) = &self.elsewhere {
            elsewhere.forget(job);
        }
    }

    /// From now on, what goes on elsewhere goes on without this server.
    pub fn leave(&self) {
        if let Some(elsewhere) = &self.elsewhere {
            elsewhere.leave();
        }
    }

    /// A session that was started ahead, if `ahead` may be looked for, or a name for one, on the machine of which the fewest are open.
    pub async fn take_session(&self, setup: &Setup, ahead: bool, open: &HashMap<Option<String>, u32>) -> Result<Taken, Unmade> {
        let here = (self.places > 0 || self.elsewhere.is_none()).then_some(None);
        if let (None, Some(elsewhere)) = (&here, &self.elsewhere) {
            elsewhere.anyone().await;
        }
        let others = self.elsewhere.iter().flat_map(|elsewhere| elsewhere.names().into_iter().map(Some));
        let all = here.into_iter().chain(others);
        match all.min_by_key(|worker| open.get(worker).copied().unwrap_or_default()) {
            None => Err(Unmade::Nowhere),
            Some(None) => {
                let taken = self.here.take_session(setup, ahead).await;
                let (session_id, cwd, driver) = (taken.session_id.clone(), taken.cwd.clone(), taken.driver);
                Ok(Taken { session_id, cwd, driver, worker: None, here: Some(taken) })
            }
            Some(Some(worker)) => {
                let elsewhere = self.elsewhere.as_ref().ok_or(Unmade::Nowhere)?;
                let taken = elsewhere.take_session(&worker, setup, ahead).await?;
                Ok(Taken { session_id: taken.session_id, cwd: taken.cwd, driver: taken.driver, worker: Some(worker), here: None })
            }
        }
    }

    /// Gives it back.
    pub async fn give_back(&self, taken: Taken) {
        match (taken, &self.elsewhere) {
            (Taken { here: Some(taken), .. }, _) => taken.give_back().await,
            (Taken { worker: Some(worker), session_id, .. }, Some(elsewhere)) => elsewhere.give_back(&worker, session_id).await,
            _ => {}
        }
    }

    /// Makes the session. Gives what its driver calls it. Where it fails, something may be left.
    pub async fn create_session(&self, taken: Taken, conversation: &Conversation, cancel: &CancellationToken) -> Result<String, Unmade> {
        match (taken.here, self.of(conversation)) {
            (Some(taken), _) => self.here.create_session(taken, conversation, cancel).await,
            (None, Some((elsewhere, worker))) => elsewhere.create_session(worker, conversation, cancel).await,
            (None, None) => Err(Unmade::Nowhere),
        }
    }

    /// Where a session lives, if it is elsewhere.
    fn of<'a>(&'a self, conversation: &'a Conversation) -> Option<(&'a Elsewhere, &'a str)> {
        Some((self.elsewhere.as_ref()?, conversation.worker.as_deref()?))
    }

    /// Ends the agent of a session. Its folder stays.
    pub async fn close_session(&self, conversation: &Conversation) {
        match (self.of(conversation), &conversation.worker) {
            (Some((elsewhere, worker)), _) => elsewhere.close_session(worker, conversation).await,
            (None, None) => self.here.close_session(conversation).await,
            (None, Some(_)) => {}
        }
    }

    /// Takes away all that there is of a session.
    pub async fn remove_session(&self, conversation: &Conversation) -> Result<(), Unmade> {
        match (self.of(conversation), &conversation.worker) {
            (Some((elsewhere, worker)), _) => elsewhere.remove_session(worker, &conversation.session_id).await,
            (None, None) => Ok(self.here.remove_session(&conversation.session_id).await?),
            (None, Some(_)) => Ok(()),
        }
    }
}

impl<'a> Executor<'a> {
    /// The machine, unless it is this one.
    pub fn machine(&self) -> Option<&Machine> {
        match self {
            Self::Here(..) => None,
            Self::Elsewhere(claimed) => Some(claimed.machine()),
        }
    }

    /// Makes ready what the job needs and nobody else sees.
    pub async fn prepare(self, uuid: Uuid, spec: &'a Spec) -> Ready<'a> {
        match self {
            Self::Here(here, slot) => Ready::Here(here.backends.prepare(uuid, spec).await, slot),
            // Its machine does meanwhile.
            Self::Elsewhere(claimed) => Ready::Elsewhere(claimed),
        }
    }
}

impl<'a> Ready<'a> {
    /// Takes it back.
    pub async fn abandon(self) {
        if let Self::Here(ready, _) = self {
            ready.abandon().await;
        }
    }

    /// Has it done, until its time is up or it is cancelled.
    pub async fn execute(self, spec: &'a Spec, control: Control<'a>) -> Came<'a> {
        match self {
            Self::Here(ready, slot) => {
                let Executed { outcome, cleanup, keeps_place } = ready.execute(spec, control).await;
                let cleanup: BoxFuture<'a, ()> = match slot {
                    None => cleanup,
                    Some(slot) => Box::pin(async {
                        cleanup.await;
                        drop(slot);
                    }),
                };
                Came::Over(Box::new(Executed { outcome, cleanup, keeps_place }))
            }
            Self::Elsewhere(claimed) => match claimed.execute(control).await {
                Carried::GoesOn => Came::GoesOn,
                Carried::Over(outcome, rest) => {
                    let cleanup = Box::pin(rest.over());
                    Came::Over(Box::new(Executed { outcome: *outcome, cleanup, keeps_place: spec.session.is_none() }))
                }
            },
        }
    }
}

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
    /// The machine is away.
    #[error("the machine {0} is away")]
    Away(String),
    /// There is no machine.
    #[error("no machine is there")]
    Nowhere,
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
