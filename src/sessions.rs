//! Sessions: conversations of many turns, from their creation to the end of their files.
//!
//! What a session is stands in the ledger and on disk, so it outlives the server; here is only what is going on. The
//! turns of one session go through its lane, one at a time and in the order that they came. Each step is a task of its
//! own that the request only guards, as with runs.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::poll_immediate;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::agent::acpx::{self, Acpx, Heard, Target, Turn};
use crate::agent::events::{Event, Events, TurnEnd};
use crate::agent::family;
use crate::agent::folder::{ATTACHING, Attachment, attach_for_good, blocking, clear, is_expired};
use crate::agent::queue::{Promise, Queue, Wanted};
use crate::agent::room::Room;
use crate::agent::standby::{Pool, Want};
use crate::agent::{claude, process};
use crate::clock;
use crate::feed::{Feed, Feeds, Final};
use crate::ledger::{
    self, AgentOfTurn, BeginSession, BeginTurn, Key, Ledger, Limits as AppLimits, NewSession, RunEnd, Session, TurnBegun, TurnRow,
    WaitingTurn, turn_id,
};
use crate::metrics::METRICS;
use crate::runs::{self, NoRun, Way};

/// How long the end of a turn may take beyond its stop: the cancel, its grace, and the last look for processes.
const END_GRACE: Duration = Duration::from_secs(30);

/// Turns of one session that wait or go on, at most.
const MOST_IN_LANE: usize = 64;

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

/// Why a session was not created, or a turn not begun.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// As many are open as may be.
    #[error("all sessions are taken")]
    Full,
    /// The session is closed.
    #[error("the session is closed")]
    Closed,
    /// As many runs and turns wait as may.
    #[error("too much is waiting")]
    Busy,
    /// The app has spent what it may today.
    #[error("the app has spent its budget")]
    Spent,
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
    /// It was cancelled before it began.
    #[error("it was cancelled before it began")]
    Cancelled,
    /// There is no such program.
    #[error("{} is not installed", .0.display())]
    NotInstalled(OsString),
    /// acpx failed.
    #[error("{0}")]
    Failed(String),
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] std::io::Error),
    /// The session's files would have more than so many bytes.
    #[error("the session's files would have more than {0} bytes")]
    TooMuchAttached(u64),
    /// A file expired while the turn waited for it.
    #[error("a file expired")]
    FileGone,
    /// A task died of a defect.
    #[error("a task died")]
    Died,
}

impl From<NoRun> for Refused {
    fn from(error: NoRun) -> Self {
        match error {
            NoRun::Full => Self::Busy,
            NoRun::Spent => Self::Spent,
            NoRun::Closed => Self::Stopping,
            NoRun::Ledger(error) => Self::Ledger(error),
            NoRun::Disk(error) => Self::Disk(error),
            NoRun::Died => Self::Died,
        }
    }
}

impl From<acpx::Error> for Refused {
    fn from(error: acpx::Error) -> Self {
        match error {
            acpx::Error::NotInstalled(program) => Self::NotInstalled(program),
            acpx::Error::Failed(error) => Self::Failed(error),
        }
    }
}

/// What an app asks of a turn.
#[derive(Clone, Debug)]
pub struct TurnRequest {
    /// What the ledger keeps of it.
    pub row: TurnRow,
    /// What else there is to it.
    pub details: TurnDetails,
}

/// What the ledger keeps of a request only until the turn starts.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct TurnDetails {
    /// Files to put into the session's folder for this turn.
    pub files: Vec<Attachment>,
    /// How long it may take, from its start.
    pub timeout: Duration,
    /// What its app may cost the others.
    pub limits: AppLimits,
}

/// A turn that waits or goes on.
#[derive(Debug)]
pub struct Submitted {
    /// Its number, where it has one before it starts.
    pub turn: Option<i64>,
    /// The answer.
    pub answered: oneshot::Receiver<Final>,
    /// Dropped, it cancels the turn; `None` for one that goes on without its client.
    pub guard: Option<DropGuard>,
}

/// Makes the answer of what came of a turn of a session.
pub type Render = fn(&str, Result<Outcome, Refused>) -> Final;

/// How a turn ended.
#[derive(Debug)]
pub enum Ending {
    /// The agent stopped, for this reason.
    Completed(String),
    /// The agent or acpx failed.
    Failed(String),
    /// The time was up.
    TimedOut(String),
    /// The client left, or closed the session.
    Cancelled,
    /// The server stopped.
    Interrupted,
}

/// A turn that is over.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// The session's completed turns, this one included where it is.
    pub turn_index: i64,
    /// Every message, in order.
    pub events: Vec<Event>,
    /// The texts of the messages, joined.
    pub text: String,
    /// The end of acpx's standard error.
    pub stderr: String,
    /// From the start of acpx.
    pub duration: Duration,
    /// The names of the files that came with it, in the session's folder.
    pub files: Vec<String>,
}

impl Outcome {
    /// Of a turn that the server's end cut short.
    fn interrupted() -> Self {
        let (events, text, stderr, files) = (Vec::new(), String::new(), String::new(), Vec::new());
        Self { ending: Ending::Interrupted, turn_index: 0, events, text, stderr, duration: Duration::ZERO, files }
    }
}

/// All sessions of a server. Clones share them.
#[derive(Clone)]
pub struct Sessions {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Queue,
    feeds: Feeds,
    render: Render,
    acpx: Acpx,
    standby: Pool,
    ledger: Ledger,
    limits: Limits,
    tasks: TaskTracker,
    /// Ends every step, at the end of the drain.
    stop: CancellationToken,
    lanes: Mutex<HashMap<String, Arc<Lane>>>,
    /// What the ledger counts as open, for who must not wait for it.
    open: AtomicU32,
}

/// Where a session's turns wait for each other.
#[derive(Default)]
struct Lane {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Turns that wait or go on.
    busy: AtomicUsize,
    turns: Mutex<Vec<TurnInLane>>,
    closing: CancellationToken,
}

/// A turn that waits or goes on.
#[derive(Clone)]
struct TurnInLane {
    cancel: CancellationToken,
    over: CancellationToken,
}

impl Lane {
    fn turns(&self) -> MutexGuard<'_, Vec<TurnInLane>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn that waits for those before it.
struct WaitingInLane {
    place: InLane,
    lock: Pin<Box<dyn Future<Output = OwnedMutexGuard<()>> + Send>>,
    cancel: CancellationToken,
}

/// A turn with a row, and what it says.
struct Accepted {
    begun: TurnBegun,
    feed: Arc<Feed>,
}

/// A place in a lane, waiting or going on. The last one takes the lane away.
struct InLane {
    shared: Arc<Shared>,
    id: String,
    lane: Arc<Lane>,
    /// Of a turn: comes when it is over.
    over: Option<CancellationToken>,
}

impl Drop for InLane {
    fn drop(&mut self) {
        // Under the lock under which lanes are entered.
        let mut lanes = self.shared.lanes();
        if self.lane.busy.fetch_sub(1, Ordering::Relaxed) == 1 {
            lanes.remove(&self.id);
        }
        if let Some(over) = &self.over {
            over.cancel();
            self.lane.turns().retain(|turn| !turn.over.is_cancelled());
        }
    }
}

impl Shared {
    fn lanes(&self) -> MutexGuard<'_, HashMap<String, Arc<Lane>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, id: &str) -> InLane {
        self.enter_in(&mut self.lanes(), id)
    }

    /// `None` while a turn waits or goes on.
    fn enter_idle(self: &Arc<Self>, id: &str) -> Option<InLane> {
        let mut lanes = self.lanes();
        (!lanes.contains_key(id)).then(|| self.enter_in(&mut lanes, id))
    }

    fn enter_in(self: &Arc<Self>, lanes: &mut HashMap<String, Arc<Lane>>, id: &str) -> InLane {
        let lane = lanes.entry(id.to_owned()).or_default().clone();
        lane.busy.fetch_add(1, Ordering::Relaxed);
        InLane { shared: self.clone(), id: id.to_owned(), lane, over: None }
    }

    fn enter_turn(self: &Arc<Self>, id: &str, cancel: &CancellationToken) -> InLane {
        let mut lanes = self.lanes();
        let mut place = self.enter_in(&mut lanes, id);
        let turn = TurnInLane { cancel: cancel.clone(), over: CancellationToken::new() };
        place.over = Some(turn.over.clone());
        place.lane.turns().push(turn);
        place
    }
}

impl Sessions {
    /// Sessions in the folder of acpx's workshop.
    pub fn new(queue: Queue, acpx: Acpx, standby: Pool, ledger: Ledger, feeds: Feeds, render: Render, limits: Limits) -> Self {
        let shared = Shared {
            queue,
            feeds,
            render,
            acpx,
            standby,
            ledger,
            limits,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            lanes: Mutex::default(),
            open: AtomicU32::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// How many sessions are open.
    pub fn open(&self) -> u32 {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// Where the agent of a session of that id works.
    pub fn cwd(&self, session_id: &str) -> PathBuf {
        self.shared.room(session_id).work()
    }

    /// Creates a session. One that a caller stopped waiting for is taken away again, unless it has a key. `None` where that was
    /// taken before.
    pub async fn create(&self, new: NewSession, key: Option<Key>) -> Result<Option<Session>, Refused> {
        if self.shared.tasks.is_closed() {
            return Err(Refused::Stopping);
        }
        let shared = self.shared.clone();
        let cancel = shared.stop.child_token();
        let stays = key.is_some();
        let guard = (!stays).then(|| cancel.clone().drop_guard());
        let (answer, answered) = oneshot::channel();
        self.shared.tasks.spawn(async move {
            let created = shared.create(&new, key, &cancel).await;
            if let Err(Ok(Some(session))) = answer.send(created)
                && !stays
            {
                let place = shared.enter(&session.new.session_id);
                if let Err(error) = shared.close(&session, place, "close", None).await {
                    tracing::warn!(%error, "a session that nobody waited for is left open until it is idle for too long");
                }
            }
        });
        let created = answered.await.map_err(|_| Refused::Died)?;
        guard.map(DropGuard::disarm);
        created
    }

    /// Takes a turn on, behind those that came before it. `None` where its key was taken meanwhile.
    pub async fn submit(&self, session: Session, request: TurnRequest, way: Way) -> Result<Option<Submitted>, Refused> {
        if self.shared.tasks.is_closed() {
            return Err(Refused::Stopping);
        }
        runs::check_budget(&self.shared.ledger, &session.new.app_name, request.details.limits).await?;
        let cancel = self.shared.stop.child_token();
        let waiting = self.wait(&session, cancel).await;
        if waiting.place.lane.busy.load(Ordering::Relaxed) > MOST_IN_LANE {
            return Err(Refused::Busy);
        }
        let guard = (!way.detached).then(|| waiting.cancel.clone().drop_guard());
        // Of its own: a client that leaves in the middle must not leave a row behind that nobody ends.
        let sessions = self.clone();
        let accepting = self.shared.tasks.spawn(async move { sessions.accept(session, request, waiting, way).await });
        let accepted = accepting.await.map_err(|_| Refused::Died)??;
        Ok(accepted.map(|(turn, answered)| Submitted { turn, answered, guard }))
    }

    async fn accept(
        &self,
        session: Session,
        request: TurnRequest,
        waiting: WaitingInLane,
        way: Way,
    ) -> Result<Option<(Option<i64>, oneshot::Receiver<Final>)>, Refused> {
        let mut accepted = None;
        if way.accepted {
            let details = way.detached.then(|| serde_json::to_string(&request.details).expect("details are JSON"));
            let most = self.shared.limits.most_attached;
            let begun = match self.shared.ledger.accept_turn(request.row.clone(), details, way.key, most).await? {
                BeginTurn::Begun(begun) => begun,
                BeginTurn::KeyTaken => return Ok(None),
                BeginTurn::Closed => return Err(Refused::Closed),
                BeginTurn::TooMuchAttached => return Err(Refused::TooMuchAttached(most)),
            };
            accepted = Some(self.shared.begin_feed(&session, begun, &waiting.cancel).await?);
        }
        let turn = accepted.as_ref().map(|accepted| accepted.begun.turn);
        Ok(Some((turn, self.spawn(session, request, waiting, accepted, way.detached))))
    }

    /// A place in the lane, behind those that have one.
    async fn wait(&self, session: &Session, cancel: CancellationToken) -> WaitingInLane {
        let place = self.shared.enter_turn(&session.new.session_id, &cancel);
        let mut lock: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(place.lane.turn.clone().lock_owned());
        // Asked for here, so that the order is that of the requests and not that of the tasks.
        if let Some(held) = poll_immediate(&mut lock).await {
            lock = Box::pin(std::future::ready(held));
        }
        WaitingInLane { place, lock, cancel }
    }

    fn spawn(
        &self,
        session: Session,
        request: TurnRequest,
        waiting: WaitingInLane,
        accepted: Option<Accepted>,
        detached: bool,
    ) -> oneshot::Receiver<Final> {
        let (answer, answered) = oneshot::channel();
        let shared = self.shared.clone();
        self.shared.tasks.spawn(async move {
            let WaitingInLane { place, lock, cancel } = waiting;
            let attached = request.row.attached;
            let wanted = Wanted { app: session.new.app_name.clone(), most: request.details.limits.at_once(), run: false };
            let begin = async {
                let came = Instant::now();
                let turn = lock.await;
                let place = shared
                    .queue
                    .join(wanted, if detached { Promise::Old } else { Promise::None })
                    .map_err(NoRun::from)?
                    .place()
                    .await
                    .map_err(NoRun::from)?;
                runs::check_budget(&shared.ledger, &session.new.app_name, request.details.limits).await?;
                Ok::<_, Refused>((turn, place, METRICS.begins("turn", came.elapsed())))
            };
            let begun = tokio::select! {
                biased;
                () = place.lane.closing.cancelled() => Err(Refused::Closed),
                () = cancel.cancelled() => Err(if shared.stop.is_cancelled() { Refused::Stopping } else { Refused::Cancelled }),
                begun = begin => begun,
            };
            // A stop may have begun while it waited.
            let begun = begun.and_then(|held| if shared.tasks.is_closed() { Err(Refused::Stopping) } else { Ok(held) });
            let came = match begun {
                // It starts after the restart.
                Err(Refused::Stopping) if detached => return,
                Err(refused) => shared.refuse(&session, accepted, attached, refused).await,
                // Held as long as the turn goes on. acpx's last second is not: it lets the next turn wait by itself.
                Ok(_held) => {
                    let row = request.row.clone();
                    match shared.begin(&session, row, accepted.as_ref(), &cancel).await {
                        Ok(Accepted { begun, feed }) => {
                            let came = shared.clone().take_turn(&session, request, begun, place, cancel, feed.clone()).await;
                            let came = (shared.render)(&session.new.session_id, came);
                            feed.end(&came);
                            came
                        }
                        Err(refused) => shared.refuse(&session, accepted, attached, refused).await,
                    }
                }
            };
            let _ = answer.send(came);
        });
        answered
    }

    /// Starts what waited when the server ended.
    pub async fn resume(&self) -> anyhow::Result<()> {
        for WaitingTurn { session, row, begun, request } in self.shared.ledger.waiting_turns().await? {
            let id = turn_id(&row.session_id, begun.turn);
            let refused_before = self.shared.feeds.answer(&id).await?.is_some();
            let Some(details) = serde_json::from_str::<TurnDetails>(&request).ok().filter(|_| !refused_before) else {
                // It was refused, and only its row could not be told; or another release kept it in a form of its own.
                let end = RunEnd::failed("error", runs::COULD_NOT_START.to_owned());
                self.shared.ledger.finish_turn(&row.session_id, begun, end, AgentOfTurn::default()).await?;
                let refused = Refused::Failed(runs::COULD_NOT_START.to_owned());
                self.shared.feeds.end(&id, &(self.shared.render)(&row.session_id, Err(refused))).await?;
                continue;
            };
            tracing::info!(session_id = row.session_id, turn = begun.turn, "a turn that waited when the server ended");
            let waiting = self.wait(&session, self.shared.stop.child_token()).await;
            let accepted = self.shared.begin_feed(&session, begun, &waiting.cancel).await.map_err(anyhow::Error::new)?;
            let attached = details.files.iter().map(|file| file.size).sum();
            let request = TurnRequest { row: TurnRow { attached, ..row }, details };
            drop(self.spawn(session, request, waiting, Some(accepted), true));
        }
        Ok(())
    }

    /// Cancels the turns of a session that wait or go on. Gives how many there were. When it returns they are over.
    pub async fn cancel(&self, session_id: &str) -> usize {
        let turns = self.shared.lanes().get(session_id).map(|lane| lane.turns().clone()).unwrap_or_default();
        for turn in &turns {
            turn.cancel.cancel();
        }
        for turn in &turns {
            turn.over.cancelled().await;
        }
        turns.len()
    }

    /// Closes a session; a turn that goes on is cancelled first. False where it was closed already.
    pub async fn close(&self, session: Session) -> Result<bool, Refused> {
        if session.closed_at.is_some() {
            return Ok(false);
        }
        let shared = self.shared.clone();
        let place = shared.enter(&session.new.session_id);
        // Of its own: a caller that leaves in the middle must not leave it half closed.
        let closing = self.shared.tasks.spawn(async move { shared.close(&session, place, "close", None).await });
        closing.await.map_err(|_| Refused::Died)?
    }

    /// Lets turns finish until `drained`, then cancels them.
    pub async fn finish(&self, drained: impl Future<Output = ()>) {
        self.shared.tasks.close();
        runs::end_tasks("turns", &self.shared.tasks, &self.shared.stop, drained, END_GRACE).await;
    }

    /// Closes the sessions that are idle for too long, and deletes those that are closed for long enough. Gives how many
    /// of both there were.
    pub async fn sweep(&self) -> Result<usize, Refused> {
        let Limits { idle, closed, .. } = self.shared.limits;
        let before = |age: Duration| clock::now() - clock::millis(age) / 1000;
        let mut swept = 0;
        for session in self.shared.ledger.idle_sessions(before(idle)).await? {
            let Some(place) = self.shared.enter_idle(&session.new.session_id) else { continue };
            swept += usize::from(self.shared.close(&session, place, "sweep_close", Some(before(idle))).await?);
        }
        for session in self.shared.ledger.old_sessions(before(closed)).await? {
            // Not while its close is still going on.
            let Some(_place) = self.shared.enter_idle(&session.new.session_id) else { continue };
            // One that can't be deleted must not keep the others.
            match self.shared.delete(&session).await {
                Ok(()) => swept += 1,
                Err(error) => tracing::warn!(session_id = session.new.session_id, %error, "the session was not deleted"),
            }
        }
        Ok(swept)
    }

    /// Settles what a crash left: turns that were going on, sessions that were being created.
    pub async fn recover(&self) -> Result<usize, Refused> {
        let settled = self.shared.ledger.settle_turns().await?;
        for (session_id, turn) in &settled {
            // Its readers get an end too.
            let interrupted = (self.shared.render)(session_id, Ok(Outcome::interrupted()));
            self.shared.feeds.end(&turn_id(session_id, *turn), &interrupted).await?;
        }
        let turns = settled.len();
        for session in self.shared.ledger.half_created_sessions().await? {
            self.shared.forget(&session.new).await;
        }
        let rooms = self.shared.acpx.workshop.folder.read_dir()?.flatten().map(|session| Room::new(session.path()));
        for (room, error) in rooms.filter_map(|room| room.renew().err().map(|error| (room, error))) {
            tracing::warn!(path = %room.folder().display(), %error, "a session's settings are those of an earlier release");
        }
        // The files of turns that a crash cut short. One that can't be removed must not stop the start.
        if turns > 0 {
            for session in self.shared.acpx.workshop.folder.read_dir()?.flatten() {
                if let Err(error) = clear(&Room::new(session.path()).work(), |name| !name.starts_with(ATTACHING)) {
                    tracing::warn!(path = %session.path().display(), %error, "the files of a turn may be left");
                }
            }
        }
        self.forget_owners().await;
        self.shared.count_open().await;
        Ok(turns)
    }

    /// Removes what acpx's owners leave when they are killed. Only for when none is alive.
    pub async fn forget_owners(&self) {
        let folder = self.shared.acpx.workshop.folder.clone();
        let forget = move || {
            for session in folder.read_dir()?.flatten() {
                if let Err(error) = Room::new(session.path()).forget_owner() {
                    tracing::warn!(path = %session.path().display(), %error, "a lock or a socket of acpx may be left");
                }
            }
            Ok(())
        };
        if let Err(error) = blocking(forget).await {
            tracing::warn!(%error, "locks and sockets of acpx may be left");
        }
    }
}

impl Shared {
    fn room(&self, session_id: &str) -> Room {
        Room::new(self.acpx.workshop.folder.join(session_id))
    }

    fn target(&self, new: &NewSession) -> Target {
        Target {
            name: new.session_id.clone(),
            room: self.room(&new.session_id),
            agent: new.agent.clone(),
            model: new.model.clone(),
            permissions: new.permissions.clone(),
        }
    }

    async fn create(self: &Arc<Self>, new: &NewSession, key: Option<Key>, cancel: &CancellationToken) -> Result<Option<Session>, Refused> {
        let created_at = match self.ledger.begin_session(new.clone(), key, self.limits.most_open).await? {
            BeginSession::Begun(at) => at,
            BeginSession::Full => return Err(Refused::Full),
            BeginSession::KeyTaken => return Ok(None),
        };
        self.count_open().await;
        match self.create_on_disk(new, cancel).await {
            Ok(()) => {
                tracing::info!(session_id = new.session_id, app = new.app_name, agent = new.agent, model = new.model, "session created");
                self.standby.used(Want::Turn(self.target(new)));
                let new = new.clone();
                Ok(Some(Session { new, created_at, last_turn_at: None, turn_count: 0, closed_at: None }))
            }
            Err(error) => {
                self.forget(new).await;
                Err(error)
            }
        }
    }

    async fn create_on_disk(&self, new: &NewSession, cancel: &CancellationToken) -> Result<(), Refused> {
        let _hold = self.standby.hold();
        if let Some(why) = self.acpx.workshop.obstacle().await {
            return Err(Refused::Failed(why));
        }
        let (room, environment) = (self.room(&new.session_id), self.acpx.workshop.environment.clone());
        blocking(move || room.make(&environment)).await?;
        let record_id = self.acpx.create(&self.target(new), cancel).await?;
        Ok(self.ledger.finish_session_create(&new.session_id, record_id).await?)
    }

    /// Takes back what there is of a session that does not come to exist.
    async fn forget(&self, new: &NewSession) {
        family::end(&self.acpx.mark(&new.session_id)).await;
        let room = self.room(&new.session_id);
        if let Err(error) = blocking(move || room.remove()).await {
            tracing::warn!(session_id = new.session_id, %error, "the folder of a session that was not created is left");
        }
        if let Err(error) = self.ledger.forget_session(&new.session_id).await {
            tracing::warn!(session_id = new.session_id, %error, "the row of a session that was not created is left until the next start");
        }
        self.count_open().await;
    }

    async fn count_open(&self) {
        if let Ok(open) = self.ledger.open_sessions().await {
            self.open.store(open, Ordering::Relaxed);
        }
    }

    /// The feed of a turn that has a row. Where there can't be one, the row ends.
    async fn begin_feed(self: &Arc<Self>, session: &Session, begun: TurnBegun, cancel: &CancellationToken) -> Result<Accepted, Refused> {
        match self.feeds.begin(&turn_id(&session.new.session_id, begun.turn), cancel.clone()).await {
            Ok(feed) => Ok(Accepted { begun, feed: Arc::new(feed) }),
            Err(error) => {
                self.finish_turn(session, begun, RunEnd::failed("error", error.to_string()), AgentOfTurn::default()).await;
                Err(error.into())
            }
        }
    }

    /// The row of a turn that starts now, and its feed.
    async fn begin(
        self: &Arc<Self>,
        session: &Session,
        row: TurnRow,
        accepted: Option<&Accepted>,
        cancel: &CancellationToken,
    ) -> Result<Accepted, Refused> {
        let Some(Accepted { begun, feed }) = accepted else {
            let most = self.limits.most_attached;
            let begun = match self.ledger.begin_turn(row, most).await? {
                BeginTurn::Begun(begun) => begun,
                BeginTurn::TooMuchAttached => return Err(Refused::TooMuchAttached(most)),
                BeginTurn::Closed | BeginTurn::KeyTaken => return Err(Refused::Closed),
            };
            return self.begin_feed(session, begun, cancel).await;
        };
        let begun = self.ledger.start_turn(*begun).await?.ok_or(Refused::Closed)?;
        Ok(Accepted { begun, feed: feed.clone() })
    }

    /// Answers a turn that does not come about.
    async fn refuse(self: &Arc<Self>, session: &Session, accepted: Option<Accepted>, attached: u64, why: Refused) -> Final {
        let stop_reason = match why {
            Refused::Cancelled | Refused::Closed => "cancelled",
            Refused::Stopping => "interrupted",
            _ => "error",
        };
        let end = RunEnd::failed(stop_reason, why.to_string());
        let answer = (self.render)(&session.new.session_id, Err(why));
        if let Some(Accepted { begun, feed }) = accepted {
            self.take_back_attached(&session.new.session_id, attached).await;
            self.finish_turn(session, begun, end, AgentOfTurn::default()).await;
            feed.end(&answer);
        }
        answer
    }

    /// Answers when the agent has ended the turn. acpx itself ends a second later, in a task of its own.
    async fn take_turn(
        self: Arc<Self>,
        session: &Session,
        request: TurnRequest,
        begun: TurnBegun,
        place: InLane,
        cancel: CancellationToken,
        feed: Arc<Feed>,
    ) -> Result<Outcome, Refused> {
        // What came of it before has nothing to do with this turn.
        let _ = self.why_ended(session);
        let started = Instant::now();
        let deadline = started + request.details.timeout;
        let mut names = Vec::new();
        let stopped = cancel.child_token();
        let (over, mut ended) = oneshot::channel();
        let (attached_as, attached) = oneshot::channel();
        let talking = self.tasks.spawn({
            let (shared, target, stopped) = (self.clone(), self.target(&session.new), stopped.clone());
            let (folder, files, prompt) = (PathBuf::from(&session.new.cwd), request.details.files, request.row.prompt);
            let hold = self.standby.hold();
            async move {
                let files = shared.attach(&target.name, folder.clone(), files).await?;
                let paths: Vec<_> = files.iter().map(|name| folder.join(name)).collect();
                let _ = attached_as.send(files);
                let prompt = claude::prompt_text(&prompt, &paths);
                let mut first_text = Some(());
                let said = |event: &Event| {
                    if event.kind() == "text" && first_text.take().is_some() {
                        METRICS.first_text("turn", started.elapsed());
                    }
                    feed.tell(event_name(event), event);
                };
                let heard = Heard { begun: || drop(hold), said, over: |turn| drop(over.send(turn)) };
                let standby = shared.standby.take_turn(&target).await;
                if let Some(why) = if standby.is_none() { shared.acpx.workshop.obstacle().await } else { None } {
                    return Err(Refused::Failed(why));
                }
                Ok::<_, Refused>(shared.acpx.turn(&target, &prompt, standby, deadline, &stopped, heard).await?)
            }
        });
        let turn = tokio::select! {
            turn = &mut ended => turn,
            () = place.lane.closing.cancelled() => {
                stopped.cancel();
                ended.await
            }
        };
        if let Ok(files) = attached.await {
            names = files;
        }
        let cut_short = || Instant::now() >= deadline || stopped.is_cancelled();
        let (turn, finished) = match turn {
            // Without a last word of acpx's, the way that it ended is what there is to tell. And a cancel that is still on
            // its way must not meet the next turn.
            Ok(turn) if turn.end.is_none() || cut_short() => (turn, Some(talking.await)),
            Ok(turn) => (turn, None),
            Err(_) => (Turn { events: Events::default(), end: None }, Some(talking.await)),
        };
        let finished = match finished.map(|talked| talked.unwrap_or(Err(Refused::Died))).transpose() {
            Ok(finished) => finished,
            Err(error) => {
                family::end(&self.acpx.mark(&session.new.session_id)).await;
                let (duration, stderr) = (started.elapsed(), String::new());
                let ending = Ending::Failed(error.to_string());
                let end = row_end(&ending, &turn.events, duration);
                let turn_index = self.finish_turn(session, begun, end, AgentOfTurn::default()).await;
                return match error {
                    Refused::Failed(_) => {
                        Ok(Outcome { ending, turn_index, events: Vec::new(), text: String::new(), stderr, duration, files: names })
                    }
                    other => Err(other),
                };
            }
        };
        let why = Why { late: Instant::now() >= deadline, stopping: self.stop.is_cancelled(), cancelled: stopped.is_cancelled() };
        let ending = match (
            ending(&turn, &why, finished.as_ref().map(|finished| &finished.end), request.details.timeout),
            self.why_ended(session),
        ) {
            (Ending::Failed(_), Some(why)) => Ending::Failed(why),
            (ending, _) => ending,
        };
        let duration = started.elapsed();
        let agent = AgentOfTurn {
            acp_session_id: turn.events.session_id().map(str::to_owned),
            cost_usd: turn.events.cost_usd(),
            began: turn.events.agent_began(),
        };
        let turn_index = self.finish_turn(session, begun, row_end(&ending, &turn.events, duration), agent).await;
        if matches!(ending, Ending::Completed(_)) && !place.lane.closing.is_cancelled() {
            // In the lane: a close comes after it, and expects no further turn.
            self.standby.used(Want::Turn(self.target(&session.new)));
        }
        let text = turn.events.text().to_owned();
        let stderr = finished.map(|finished| finished.stderr).unwrap_or_default();
        Ok(Outcome { ending, turn_index, events: turn.events.into_events(), text, stderr, duration, files: names })
    }

    /// Puts a turn's files into the session's folder, where they stay. Gives their names there.
    async fn attach(&self, session_id: &str, folder: PathBuf, files: Vec<Attachment>) -> Result<Vec<String>, Refused> {
        if files.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = files.iter().map(|file| file.size).sum();
        match blocking(move || attach_for_good(&folder, &files)).await {
            Ok(names) => Ok(names),
            Err(error) => {
                self.take_back_attached(session_id, bytes).await;
                Err(if is_expired(&error) { Refused::FileGone } else { error.into() })
            }
        }
    }

    /// Counts a turn's files no more, which did not come to be in the session's folder.
    async fn take_back_attached(&self, session_id: &str, bytes: u64) {
        if bytes == 0 {
            return;
        }
        if let Err(error) = self.ledger.take_back_attached(session_id, bytes).await {
            tracing::warn!(session_id, bytes, %error, "files that were not attached count all the same");
        }
    }

    /// Why the session's processes were ended, if that was for their memory.
    fn why_ended(&self, session: &Session) -> Option<String> {
        self.acpx.workshop.memory.as_ref()?.why_ended(&session.new.session_id)
    }

    /// Completes a turn's row, later where the ledger can't take it now. Gives the session's turns so far.
    async fn finish_turn(self: &Arc<Self>, session: &Session, begun: TurnBegun, end: RunEnd, agent: AgentOfTurn) -> i64 {
        let session_id = session.new.session_id.clone();
        tracing::info!(
            session_id,
            app = session.new.app_name,
            ok = end.ok,
            stop_reason = end.stop_reason,
            duration_ms = end.duration_ms,
            "turn"
        );
        let count_up = |cost_usd| {
            let model = session.new.model.as_deref().unwrap_or_default();
            METRICS.ended("turn", &session.new.app_name, model, &RunEnd { cost_usd, ..end.clone() });
        };
        match self.ledger.finish_turn(&session_id, begun, end.clone(), agent.clone()).await {
            Ok((count, cost)) => {
                count_up(cost);
                count
            }
            Err(error) => {
                count_up(None);
                tracing::error!(session_id, %error, "the turn's row was not completed; trying again until it is, or the server stops");
                let shared = self.clone();
                let count = begun.turn_count + i64::from(end.ok);
                self.tasks.spawn(async move {
                    let finish = || shared.ledger.finish_turn(&session_id, begun, end.clone(), agent.clone());
                    runs::finish_later(&session_id, &shared.stop, finish).await;
                });
                count
            }
        }
    }

    /// Closes a session after what goes on in it was cancelled. False where it was closed already, or where it was used
    /// since `idle_since`.
    async fn close(
        self: &Arc<Self>,
        session: &Session,
        place: InLane,
        how: &'static str,
        idle_since: Option<i64>,
    ) -> Result<bool, Refused> {
        // An idle session has no turn to cancel, and may prove to have been used.
        if idle_since.is_none() {
            place.lane.closing.cancel();
        }
        let _turn = place.lane.turn.clone().lock_owned().await;
        let session_id = &session.new.session_id;
        if !self.ledger.close_session(session_id, how, idle_since).await? {
            return Ok(false);
        }
        place.lane.closing.cancel();
        self.count_open().await;
        self.standby.forget_session(session_id);
        self.acpx.close(&self.target(&session.new)).await;
        let room = self.room(session_id);
        if let Err(error) = blocking(move || room.forget_owner()).await {
            tracing::warn!(session_id, %error, "a lock or a socket of acpx may be left until the session is deleted");
        }
        tracing::info!(session_id, how, "session closed");
        Ok(true)
    }

    /// Takes away all that there is of a closed session.
    async fn delete(&self, session: &Session) -> Result<(), Refused> {
        let session_id = &session.new.session_id;
        self.standby.forget_session(session_id);
        family::end(&self.acpx.mark(session_id)).await;
        let room = self.room(session_id);
        blocking(move || room.remove()).await?;
        self.feeds.forget_session(session_id).await?;
        self.ledger.delete_session(session_id).await?;
        tracing::info!(session_id, "session deleted");
        Ok(())
    }
}

/// What a message is called among the server-sent events. The last of those are called `result` and `error`.
fn event_name(event: &Event) -> &str {
    match event.kind() {
        "error" => "agent_error",
        "result" => "agent_result",
        kind if kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') => kind,
        _ => "other",
    }
}

/// What may have made an agent end a turn before it was done.
struct Why {
    late: bool,
    stopping: bool,
    cancelled: bool,
}

fn ending(turn: &Turn, why: &Why, process: Option<&process::End>, timeout: Duration) -> Ending {
    let early = || {
        if why.late {
            Some(Ending::TimedOut(format!("the turn did not end within {} s", timeout.as_secs())))
        } else if why.stopping {
            Some(Ending::Interrupted)
        } else {
            why.cancelled.then_some(Ending::Cancelled)
        }
    };
    match turn.end.clone() {
        Some(TurnEnd::Stopped(stop_reason)) if stop_reason != "cancelled" => Ending::Completed(stop_reason),
        Some(TurnEnd::Stopped(stop_reason)) => early().unwrap_or(Ending::Completed(stop_reason)),
        Some(TurnEnd::Failed(error)) => early().unwrap_or(Ending::Failed(error)),
        None => early().unwrap_or_else(|| {
            Ending::Failed(match process {
                Some(process::End::Exited(status)) => match turn.events.last_error() {
                    Some(error) => error.to_owned(),
                    None => format!("acpx ended ({status}) before the turn did"),
                },
                _ => "acpx printed too much, or closed its output, before the turn ended".to_owned(),
            })
        }),
    }
}

/// What the ledger keeps of a turn.
fn row_end(ending: &Ending, events: &Events, duration: Duration) -> RunEnd {
    let (ok, stop_reason, error) = match ending {
        Ending::Completed(stop_reason) => (true, stop_reason.as_str(), None),
        Ending::Failed(error) => (false, "error", Some(error.clone())),
        Ending::TimedOut(error) => (false, "timeout", Some(error.clone())),
        Ending::Cancelled => (false, "cancelled", Some("the client left, or closed the session".to_owned())),
        Ending::Interrupted => (false, "interrupted", Some("the server stopped before the turn ended".to_owned())),
    };
    let usage = events.usage();
    RunEnd {
        duration_ms: clock::millis(duration),
        ok,
        stop_reason: stop_reason.to_owned(),
        error,
        result: Some(events.text().to_owned()),
        input_tokens: usage.map(|(read, _)| read),
        output_tokens: usage.map(|(_, written)| written),
        cost_usd: None,
    }
}
