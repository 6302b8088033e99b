//! The warm pool: agents that are started before they are needed, so that a caller waits for the model and for nothing else.
//!
//! One pool holds `claude` processes for runs, `acpx prompt` processes for turns, and whole sessions that nobody has created yet. It
//! learns from traffic: what was asked for last is likely next. A process serves one run, turn or session; its successor is started when that has its answer, and while
//! nobody waits for a place or for an agent to start. One that died, printed something, or was started with another program,
//! sign-in or setting than there is now is thrown away, and the run starts cold.

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::acpx::command::{Acpx, Target};
use super::claude::command::Purpose;
use super::claude::files::{kept_in_its_state, obstacle_for, read_at_start};
use super::claude::sign_in::SignIn;
use super::claude::workspace::{RunDir, RunDirs};
use super::contract::{Rules, Setup};
use super::direct::{Direct, Unclaimed};
use super::launcher::Launcher;
use super::process::Waiting;
use super::programs;
use crate::blocking::blocking;
use crate::metrics::METRICS;

/// How long what was asked for is expected to be asked for again. Shorter than acpx's owners live without a turn (300 s).
const EXPECTED: Duration = Duration::from_mins(4);
/// How long a start may take of the processors for itself, before the next one.
const SETTLE: Duration = Duration::from_secs(1);
/// How often standbys are looked after.
const LOOK: Duration = Duration::from_secs(2);
/// How many uses are remembered, at least.
const USES: usize = 16;
/// How long a standby may take to end when it is ended.
const END_GRACE: Duration = Duration::from_secs(10);

/// What is asked for: all that must be known when the agent is started.
#[derive(Clone, Debug, PartialEq)]
pub enum WarmKey {
    /// A run, or a completion.
    Claude {
        /// Which of them.
        purpose: Purpose,
        /// Its model.
        model: String,
        /// What binds it.
        rules: Rules,
    },
    /// A session's next turn.
    Turn(Target),
    /// A session whose agent is spoken to directly.
    Session(Setup),
}

/// The pool. Clones share it.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    most: usize,
    run_dirs: RunDirs,
    acpx: Acpx,
    direct: Direct,
    sign_in: SignIn,
    state: Mutex<State>,
    wake: Notify,
    /// Comes when nothing is to be started any more.
    stop: CancellationToken,
    /// Held while one is being started.
    starting: tokio::sync::Mutex<()>,
    ending: TaskTracker,
}

#[derive(Default)]
struct State {
    /// The newest first.
    uses: VecDeque<(WarmKey, Instant)>,
    ready: Vec<WarmProcess>,
    holds: usize,
}

struct WarmProcess {
    want: WarmKey,
    agent: WarmAgent,
    print: Option<Fingerprint>,
}

enum WarmAgent {
    Claude(Box<RunDir>, Waiting),
    Turn(Waiting),
    Session(Unclaimed),
}

impl WarmAgent {
    fn is_ready(&mut self) -> bool {
        match self {
            Self::Claude(_, process) | Self::Turn(process) => process.is_ready(),
            Self::Session(session) => session.is_alive(),
        }
    }

    async fn end(self) {
        match self {
            Self::Claude(run_dir, process) => run_dir.leave(Some(process)).await,
            // What else is tagged as the session's is the session's.
            Self::Turn(process) => process.end().await,
            Self::Session(session) => session.end().await,
        }
    }
}

/// While there is one, nothing is started ahead: somebody waits for a place, or for an agent to start.
pub struct Hold(Pool);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.state().holds -= 1;
        self.0.0.wake.notify_one();
    }
}

impl Pool {
    /// A pool of at most `most` processes.
    pub fn new(most: usize, run_dirs: RunDirs, acpx: Acpx, direct: Direct, sign_in: SignIn) -> Self {
        let shared = Shared {
            most,
            run_dirs,
            acpx,
            direct,
            sign_in,
            state: Mutex::default(),
            wake: Notify::new(),
            stop: CancellationToken::new(),
            starting: tokio::sync::Mutex::default(),
            ending: TaskTracker::new(),
        };
        Self(Arc::new(shared))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait.
    pub fn ready(&self) -> usize {
        self.state().ready.len()
    }

    /// Keeps the pool from starting anything until the guard is dropped.
    pub fn hold(&self) -> Hold {
        self.state().holds += 1;
        Hold(self.clone())
    }

    /// A folder in which claude waits for the prompt of a run, or for a completion.
    pub async fn take_claude(&self, key: WarmKey) -> Option<(RunDir, Waiting)> {
        let WarmKey::Claude { purpose, .. } = key else { return None };
        let found = self.take(|want| *want == key).await;
        METRICS.standby(purpose.name(), found.is_some());
        match found?.agent {
            WarmAgent::Claude(run_dir, process) => Some((*run_dir, process)),
            WarmAgent::Turn(_) | WarmAgent::Session(_) => None,
        }
    }

    /// An acpx that waits for the prompt of the session's next turn.
    pub async fn take_turn(&self, target: &Target) -> Option<Waiting> {
        let found = self.take(|want| matches!(want, WarmKey::Turn(other) if other == target)).await;
        METRICS.standby("turn", found.is_some());
        match found?.agent {
            WarmAgent::Turn(process) => Some(process),
            WarmAgent::Claude(..) | WarmAgent::Session(_) => None,
        }
    }

    /// A session that was started with this.
    pub async fn take_session(&self, setup: &Setup) -> Option<Unclaimed> {
        let found = self.take(|want| matches!(want, WarmKey::Session(other) if other == setup)).await;
        METRICS.standby("session", found.is_some());
        match found?.agent {
            WarmAgent::Session(session) => Some(session),
            WarmAgent::Claude(..) | WarmAgent::Turn(_) => None,
        }
    }

    async fn take(&self, is_it: impl Fn(&WarmKey) -> bool) -> Option<WarmProcess> {
        if self.0.most == 0 {
            return None;
        }
        {
            let mut state = self.state();
            // Noted again when it is over: until then its successor has time.
            if let Some(at) = state.uses.iter().position(|(want, _)| is_it(want)) {
                state.uses.remove(at);
            }
        }
        loop {
            let mut standby = self.take_ready(&is_it)?;
            if standby.agent.is_ready() && standby.print == self.fingerprint(&standby.want).await {
                return Some(standby);
            }
            tracing::info!("a standby was thrown away: it had ended, or its program or sign-in has changed");
            self.end(standby);
        }
    }

    fn take_ready(&self, is_it: impl Fn(&WarmKey) -> bool) -> Option<WarmProcess> {
        let mut state = self.state();
        let at = state.ready.iter().position(|standby| is_it(&standby.want))?;
        Some(state.ready.remove(at))
    }

    /// Has claude's sign-in renewed where it would end soon. Before any claude is started.
    pub async fn renew_sign_in(&self) {
        self.0.sign_in.renew().await;
    }

    /// Notes that this was asked for, and went well.
    pub fn used(&self, want: WarmKey) {
        if self.0.most == 0 {
            return;
        }
        let mut state = self.state();
        if matches!(want, WarmKey::Turn(_)) {
            state.uses.retain(|(use_, _)| *use_ != want);
        }
        state.uses.push_front((want, Instant::now()));
        state.uses.truncate(USES.max(self.0.most));
        self.0.wake.notify_one();
    }

    /// Expects no further turn of a session, and ends what waits for one.
    pub fn forget_session(&self, name: &str) {
        let is_it = |want: &WarmKey| matches!(want, WarmKey::Turn(target) if target.name == name);
        self.state().uses.retain(|(want, _)| !is_it(want));
        while let Some(standby) = self.take_ready(is_it) {
            self.end(standby);
        }
    }

    /// Starts what is missing and ends what is not expected any more, for ever.
    pub async fn keep(&self) {
        loop {
            let next = self.look_after();
            match next {
                Some(want) => {
                    self.start(want).await;
                    sleep(SETTLE).await;
                }
                None if self.state().ready.is_empty() => self.0.wake.notified().await,
                None => drop(timeout(LOOK, self.0.wake.notified()).await),
            }
        }
    }

    /// Ends what is dead or not expected. Gives what is to be started.
    fn look_after(&self) -> Option<WarmKey> {
        let mut state = self.state();
        state.uses.retain(|(_, at)| at.elapsed() < EXPECTED);
        let mut missing = expected(&state.uses, self.0.most);
        for mut standby in std::mem::take(&mut state.ready) {
            let wanted = missing.iter().position(|want| *want == standby.want);
            if !standby.agent.is_ready() {
                // What does not last is not started again and again, but after the next use.
                tracing::info!("a standby was thrown away: it ended by itself, or printed something");
                state.uses.iter().position(|(want, _)| *want == standby.want).map(|at| state.uses.remove(at));
                wanted.map(|at| missing.remove(at));
                self.end(standby);
            } else if let Some(at) = wanted {
                missing.remove(at);
                state.ready.push(standby);
            } else {
                self.end(standby);
            }
        }
        (state.holds == 0 && !self.0.stop.is_cancelled()).then(|| missing.into_iter().next()).flatten()
    }

    async fn start(&self, want: WarmKey) {
        let _starting = self.0.starting.lock().await;
        if self.0.stop.is_cancelled() {
            return;
        }
        self.renew_sign_in().await;
        let print = self.fingerprint(&want).await;
        let started = match &want {
            WarmKey::Claude { .. } if let Some(why) = obstacle_for(&self.0.run_dirs.launcher.environment).await => Err(why),
            WarmKey::Claude { purpose, model, rules } => match self.0.run_dirs.set_up(Uuid::now_v7(), Vec::new()).await {
                Ok((run_dir, _)) => match run_dir.start(*purpose, model, rules) {
                    Ok(process) => Ok(WarmAgent::Claude(Box::new(run_dir), process)),
                    Err(error) => {
                        run_dir.clear_away().await;
                        Err(format!("{error:?}"))
                    }
                },
                Err(error) => Err(error.to_string()),
            },
            WarmKey::Turn(target) => self.0.acpx.start_prompt(target).map(WarmAgent::Turn).map_err(|error| format!("{error:?}")),
            WarmKey::Session(setup) => self.0.direct.start_ahead(setup, &self.0.stop).await.map(WarmAgent::Session),
        };
        let mut state = self.state();
        match started {
            Ok(agent) => {
                if let WarmAgent::Claude(_, process) | WarmAgent::Turn(process) = &agent {
                    process.set_idle(true);
                }
                let still_expected = !self.0.stop.is_cancelled() && state.uses.iter().any(|(use_, _)| *use_ == want);
                let standby = WarmProcess { want, agent, print };
                if still_expected {
                    state.ready.push(standby);
                } else {
                    self.end(standby);
                }
            }
            Err(error) => {
                tracing::info!(error, "a standby was not started");
                state.uses.retain(|(use_, _)| *use_ != want);
            }
        }
    }

    /// Does something that an end of the server waits for, whoever waits for it.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.0.ending.spawn(work)
    }

    fn end(&self, standby: WarmProcess) {
        self.0.ending.spawn(standby.agent.end());
    }

    /// Starts nothing any more, and ends all that there are.
    pub async fn finish(&self) {
        self.0.stop.cancel();
        let _starting = self.0.starting.lock().await;
        for standby in std::mem::take(&mut self.state().ready) {
            self.end(standby);
        }
        self.0.ending.close();
        if timeout(END_GRACE, self.0.ending.wait()).await.is_err() {
            tracing::error!("standbys did not end in time");
        }
    }

    /// Looks at files, on a thread for such. `None` where that failed, which is like no other.
    async fn fingerprint(&self, want: &WarmKey) -> Option<Fingerprint> {
        let RunDirs { launcher: Launcher { environment, .. }, claude, .. } = &self.0.run_dirs;
        let environment = environment.clone();
        // What the session's own agent read is its own affair.
        let (programs, is_new) = match want {
            WarmKey::Claude { .. } => (vec![claude.clone()], true),
            WarmKey::Turn(_) => (vec![self.0.acpx.program.clone()], false),
            WarmKey::Session(setup) => (self.0.direct.programs(setup), true),
        };
        let look = move || {
            let files = if is_new { read_at_start(&environment) } else { Vec::new() };
            let settings = if is_new { kept_in_its_state(&environment) } else { String::new() };
            let programs = programs.iter().filter_map(|program| programs::find(program, &environment));
            Ok(Fingerprint { files: programs.chain(files).map(as_it_is).collect(), settings })
        };
        blocking(look).await.ok()
    }
}

/// What is expected next, the likeliest first. A session has one turn at a time.
fn expected(uses: &VecDeque<(WarmKey, Instant)>, most: usize) -> Vec<WarmKey> {
    let mut expected: Vec<WarmKey> = Vec::new();
    for (want, _) in uses {
        if expected.len() < most && !(matches!(want, WarmKey::Turn(_)) && expected.contains(want)) {
            expected.push(want.clone());
        }
    }
    expected
}

/// What a process was started with, as far as it stands in files.
#[derive(PartialEq)]
struct Fingerprint {
    files: Vec<Option<FileAsItIs>>,
    settings: String,
}

/// Device, inode, size and time of change.
type FileAsItIs = (u64, u64, u64, i64, i64);

fn as_it_is(path: PathBuf) -> Option<FileAsItIs> {
    let file = path.metadata().ok()?;
    Some((file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec()))
}
