//! Sessions, from their creation to the end of their files. What a session is stands in the ledger and on disk, so it outlives the
//! server. Its turns are jobs ([`crate::job`]), and go through its lane; so does its end.

mod recover;
mod sweep;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::agent::contract::{Driver, Setup};
use crate::executor::{Executors, Unmade};
use crate::job::end_tasks;
use crate::job::feed::Feeds;
use crate::job::lane::{InLane, Lanes, Turn};
use crate::ledger::{self, BeginSession, Key, Ledger, NewSession, Session};

/// How many may be open, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open sessions at once.
    pub most_open: usize,
    /// After how long without a turn a session is closed.
    pub idle: Duration,
    /// After how long a closed session is deleted.
    pub closed: Duration,
    /// Bytes of the files that may be attached to all turns of a session together.
    pub most_attached: u64,
}

/// Why a session was not created or closed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// As many are open as may be.
    #[error("all sessions are taken")]
    Full,
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
    /// What it needs could not be made.
    #[error(transparent)]
    Unmade(#[from] Unmade),
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] std::io::Error),
    /// A task died of a defect.
    #[error("a task died")]
    Defect,
}

/// What came of the wish for a session.
#[derive(Debug)]
pub enum Created {
    /// It is there.
    Session(Box<Session>),
    /// Its key was taken before.
    KeyTaken,
}

/// All sessions of a server. Clones share them.
#[derive(Clone)]
pub struct Sessions(Arc<Shared>);

struct Shared {
    lanes: Lanes,
    feeds: Feeds,
    executors: Executors,
    ledger: Ledger,
    limits: Limits,
    tasks: TaskTracker,
    /// Ends every step, at the end of the drain.
    stop: CancellationToken,
    /// What the ledger counts as open, for those who must not wait for it.
    open: AtomicU32,
}

impl Sessions {
    /// Sessions, on this machine and on others.
    pub fn new(lanes: Lanes, executors: Executors, ledger: Ledger, feeds: Feeds, limits: Limits) -> Self {
        let (tasks, stop, open) = (TaskTracker::new(), CancellationToken::new(), AtomicU32::new(0));
        Self(Arc::new(Shared { lanes, feeds, executors, ledger, limits, tasks, stop, open }))
    }

    /// How many sessions are open.
    pub fn open(&self) -> u32 {
        self.0.open.load(Ordering::Relaxed)
    }

    /// What is to speak to an agent of this name.
    pub fn driver_of(&self, agent: &str) -> Driver {
        self.0.executors.here().driver_of(agent)
    }

    /// Creates a session of an app, with the app's own object. One that a caller stopped waiting for is taken away again, unless it has
    /// a key.
    pub async fn create(&self, app: String, setup: Setup, meta: Option<String>, key: Option<Key>) -> Result<Created, Error> {
        if self.0.tasks.is_closed() {
            return Err(Error::Stopping);
        }
        let shared = self.0.clone();
        let cancel = shared.stop.child_token();
        let stays = key.is_some();
        let guard = (!stays).then(|| cancel.clone().drop_guard());
        let (answer, answered) = oneshot::channel();
        self.0.tasks.spawn(async move {
            let created = shared.create(app, setup, meta, key, &cancel).await;
            if let Err(Ok(Created::Session(session))) = answer.send(created)
                && !stays
            {
                let place = shared.lanes.enter(&session.new.session_id);
                if let Err(error) = shared.close(&session, place).await {
                    tracing::warn!(%error, "a session that nobody waited for is left open until it is idle for too long");
                }
            }
        });
        let created = answered.await.map_err(|_| Error::Defect)?;
        guard.map(DropGuard::disarm);
        created
    }

    /// Closes a session; a turn that goes on is cancelled first. False where it was closed already.
    pub async fn close(&self, session: Session) -> Result<bool, Error> {
        if session.closed_at.is_some() {
            return Ok(false);
        }
        let shared = self.0.clone();
        let place = shared.lanes.enter(&session.new.session_id);
        // Of its own: a caller that leaves in the middle must not leave it half closed.
        let closing = self.0.tasks.spawn(async move { shared.close(&session, place).await });
        closing.await.map_err(|_| Error::Defect)?
    }

    /// Lets nobody wait for the turns of sessions that were closed because their machine does not come back.
    pub async fn close_forgotten(&self, worker: &str) -> Result<(), ledger::Error> {
        for session in self.0.ledger.sessions_of_worker(worker).await? {
            if session.closed_at.is_some() {
                self.0.lanes.enter(&session.new.session_id).close();
            }
        }
        self.0.count_open().await;
        Ok(())
    }

    /// Lets steps finish until `drained`, then ends them.
    pub async fn finish(&self, drained: impl Future<Output = ()>) {
        end_tasks("steps of sessions", &self.0.tasks, &self.0.stop, drained).await;
    }
}

impl Shared {
    async fn create(
        &self,
        app_name: String,
        setup: Setup,
        meta: Option<String>,
        key: Option<Key>,
        cancel: &CancellationToken,
    ) -> Result<Created, Error> {
        let may_be_full = usize::try_from(self.open.load(Ordering::Relaxed)).is_ok_and(|open| open >= self.limits.most_open);
        let open = self.ledger.open_sessions_by_worker().await?;
        let taken = self.executors.take_session(&setup, !may_be_full, &open).await?;
        let (session_id, cwd, driver, worker) = (taken.session_id.clone(), taken.cwd.clone(), taken.driver, taken.worker.clone());
        let new = NewSession { session_id, app_name, setup, meta, cwd, driver, worker };
        let created_at = match self.ledger.begin_session(new.clone(), key, self.limits.most_open).await {
            Ok(BeginSession::Begun(at)) => at,
            begun => {
                self.executors.give_back(taken).await;
                return match begun? {
                    BeginSession::KeyTaken => Ok(Created::KeyTaken),
                    BeginSession::Full | BeginSession::Begun(_) => Err(Error::Full),
                };
            }
        };
        self.count_open().await;
        let session = Session { new, created_at, last_turn_at: None, turn_count: 0, closed_at: None, agent_session: None };
        let created = async {
            let name = self.executors.create_session(taken, &session.conversation(), cancel).await?;
            Ok(self.ledger.finish_session_create(&session.new.session_id, driver, name).await?)
        };
        if let Err(error) = created.await {
            self.forget(&session).await;
            return Err(error);
        }
        let NewSession { session_id, app_name, setup: Setup { agent, model, .. }, .. } = &session.new;
        tracing::info!(session_id, app = app_name, agent, model, "session created");
        Ok(Created::Session(Box::new(session)))
    }

    /// Takes back what there is of a session that does not come to exist.
    async fn forget(&self, session: &Session) {
        let session_id = &session.new.session_id;
        if let Err(error) = self.executors.remove_session(&session.conversation()).await {
            tracing::warn!(session_id, %error, "the folder of a session that was not created is left");
        }
        if let Err(error) = self.ledger.forget_session(session_id).await {
            tracing::warn!(session_id, %error, "the row of a session that was not created is left until the next start");
        }
        self.count_open().await;
    }

    async fn count_open(&self) {
        if let Ok(open) = self.ledger.open_sessions().await {
            self.open.store(open, Ordering::Relaxed);
        }
    }

    /// Closes a session after what goes on in it was cancelled. False where it was closed already.
    async fn close(&self, session: &Session, place: InLane) -> Result<bool, Error> {
        place.close();
        let closed = tokio::select! {
            biased;
            turn = place.turn() => self.close_in_turn(session, &place, turn, "close", None).await,
            // Who closes is not to wait for the ledger.
            () = place.stuck() => Err(ledger::Error::Locked.into()),
        };
        if closed.is_err() {
            place.reopen();
        }
        closed
    }

    /// Closes a session in which nothing goes on. False where it was closed already, or was used since `idle_since`.
    async fn close_in_turn(
        &self,
        session: &Session,
        place: &InLane,
        _turn: Turn,
        how: &'static str,
        idle_since: Option<i64>,
    ) -> Result<bool, Error> {
        let session_id = &session.new.session_id;
        if !self.ledger.close_session(session_id, how, idle_since).await? {
            return Ok(false);
        }
        place.close();
        self.count_open().await;
        self.executors.close_session(&session.conversation()).await;
        tracing::info!(session_id, how, "session closed");
        Ok(true)
    }
}
