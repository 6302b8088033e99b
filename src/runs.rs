//! A run, from its place in the queue to the end of its row.
//!
//! Each run is a task of its own, and the request that asked for it holds a guard. When a client leaves, its request is
//! dropped and nothing after its `.await` happens, so ending the processes, removing the folder and completing the row
//! all live in the task.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::agent::claude::{self, Answer, Reader, Usage};
use crate::agent::family;
use crate::agent::folder::{self, Attachment, Folder};
use crate::agent::process::{self, End, Talk};
use crate::agent::queue::{Place, Queue, Refused};
use crate::agent::{Workshop, programs};
use crate::clock;
use crate::ledger::{self, Ledger, NewRun, RunEnd};

/// How long the end of a run may take beyond its stop: two graces and the last look for its processes.
const END_GRACE: Duration = Duration::from_secs(15);

/// What an app asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The run's id.
    pub uuid: Uuid,
    /// What the ledger keeps of it.
    pub row: NewRun,
    /// Added to the CLI's own system prompt.
    pub system: Option<String>,
    /// Files to put into the run's folder.
    pub files: Vec<Attachment>,
    /// How long the CLI may take.
    pub timeout: Duration,
}

/// How a run ended.
#[derive(Debug)]
pub enum Ending {
    /// Claude answered.
    Replied {
        /// The reply's text.
        text: String,
        /// Why the model stopped.
        stop_reason: String,
    },
    /// The CLI failed; its own words where it gave any.
    Failed(String),
    /// The time was up; what the CLI was doing, where it said.
    TimedOut(String),
    /// The client left.
    Cancelled,
    /// The server stopped.
    Interrupted,
    /// There is no such program.
    NotInstalled(OsString),
    /// The disk did not take what the run needs.
    Unprepared(io::Error),
}

/// A run that is over.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// The end of the CLI's standard error.
    pub stderr: String,
    /// From the start of the process.
    pub duration: Duration,
}

/// Why there was no run.
#[derive(Debug, thiserror::Error)]
pub enum NoRun {
    /// As many runs wait as may.
    #[error("all places are taken and the queue is full")]
    Full,
    /// The server is stopping.
    #[error("the server is stopping")]
    Closed,
    /// Its row could not be written.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// Its task died of a defect.
    #[error("the run's task died")]
    Died,
}

/// All runs of a server.
pub struct Runs {
    queue: Queue,
    tasks: TaskTracker,
    shared: Arc<Shared>,
}

struct Shared {
    workshop: Workshop,
    claude: OsString,
    ledger: Ledger,
    /// Ends every run, at the end of the drain.
    stop: CancellationToken,
    live: Mutex<HashSet<String>>,
}

impl Runs {
    /// Runs with `places` at once and `most_waiting` in the queue.
    pub fn new(workshop: Workshop, claude: OsString, ledger: Ledger, places: usize, most_waiting: usize) -> Self {
        let shared = Arc::new(Shared { workshop, claude, ledger, stop: CancellationToken::new(), live: Mutex::default() });
        Self { queue: Queue::new(places, most_waiting), tasks: TaskTracker::new(), shared }
    }

    /// Waits for a place and runs. A caller that stops waiting cancels the run.
    pub async fn run(&self, request: Request) -> Result<Outcome, NoRun> {
        let place = self.queue.enter().await.map_err(|refused| match refused {
            Refused::Full => NoRun::Full,
            Refused::Closed => NoRun::Closed,
        })?;
        let cancel = self.shared.stop.child_token();
        let guard = cancel.clone().drop_guard();
        let (answer, answered) = oneshot::channel();
        let shared = self.shared.clone();
        self.tasks.spawn(async move { shared.carry_out(request, place, &cancel, answer).await });
        let outcome = answered.await.map_err(|_| NoRun::Died)?;
        guard.disarm();
        outcome
    }

    /// Lets runs finish until `drained`, then ends them. Whoever waits for a place is refused at once. When this returns,
    /// no process of a run is alive.
    pub async fn finish(&self, drained: impl Future<Output = ()>) {
        self.queue.close();
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => {}
            () = drained => tracing::info!(runs = self.tasks.len(), "ending the runs that are still going on"),
        }
        self.shared.stop.cancel();
        if timeout(END_GRACE, self.tasks.wait()).await.is_err() {
            tracing::error!(runs = self.tasks.len(), "runs did not end in time");
        }
    }

    /// Removes the folders of runs that are over, where that failed at their end.
    pub async fn sweep(&self) -> io::Result<usize> {
        let shared = self.shared.clone();
        blocking(move || clear(&shared.workshop.folder, |id| shared.live().contains(id))).await
    }
}

impl Shared {
    fn live(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn carry_out(&self, request: Request, place: Place, cancel: &CancellationToken, answer: oneshot::Sender<Result<Outcome, NoRun>>) {
        let run_id = &request.row.run_id;
        self.live().insert(run_id.clone());
        let (begun, prepared) = tokio::join!(self.ledger.begin_run(request.row.clone()), self.prepare(&request));
        if let Err(error) = begun {
            if let Ok(prepared) = prepared {
                self.clear_away(&request, prepared.folder).await;
            }
            self.live().remove(run_id);
            let _ = answer.send(Err(error.into()));
            return;
        }
        let (outcome, usage, folder) = match prepared {
            Ok(prepared) => {
                let conversation = AssertUnwindSafe(self.converse(&request, &prepared, cancel)).catch_unwind();
                let (outcome, usage) = match conversation.await {
                    Ok(done) => done,
                    Err(_) => self.after_a_panic(run_id).await,
                };
                (outcome, usage, Some(prepared.folder))
            }
            Err(error) => {
                (Outcome { ending: Ending::Unprepared(error), stderr: String::new(), duration: Duration::ZERO }, Usage::default(), None)
            }
        };
        let end = row_end(&outcome, usage);
        let cleared = async {
            if let Some(folder) = folder {
                self.clear_away(&request, folder).await;
            }
        };
        let (written, ()) = tokio::join!(self.ledger.finish_run(run_id, end.clone()), cleared);
        self.live().remove(run_id);
        drop(place);
        tracing::info!(
            run_id,
            app = request.row.app_name,
            model = request.row.model,
            ok = end.ok,
            stop_reason = end.stop_reason,
            duration_ms = end.duration_ms,
            "run"
        );
        // The answer is paid for: the caller gets it also while the ledger can't take it.
        let _ = answer.send(Ok(outcome));
        if let Err(error) = written {
            tracing::error!(run_id, %error, "the run's row was not completed; trying again until it is, or the server stops");
            finish_later(run_id, &self.stop, || self.ledger.finish_run(run_id, end.clone())).await;
        }
    }

    /// A defect must not cost more than its own run.
    async fn after_a_panic(&self, run_id: &str) -> (Outcome, Usage) {
        family::end(&self.workshop.mark.run(run_id)).await;
        let ending = Ending::Failed("the server met a defect; its operator finds it in its log".to_owned());
        (Outcome { ending, stderr: String::new(), duration: Duration::ZERO }, Usage::default())
    }

    /// Makes the run's folder and puts into it what the run needs.
    async fn prepare(&self, request: &Request) -> io::Result<Prepared> {
        let (parent, run_id) = (self.workshop.folder.clone(), request.row.run_id.clone());
        let (system, files) = (request.system.clone(), request.files.clone());
        blocking(move || {
            let folder = Folder::create(&parent, &run_id)?;
            let filled = system.map(|text| folder.write_system_prompt(&text)).transpose();
            match filled.and_then(|system_file| Ok((system_file, folder.attach(&files)?))) {
                Ok((system_file, files)) => Ok(Prepared { folder, system_file, files }),
                Err(error) => folder.remove().and(Err(error)),
            }
        })
        .await
    }

    async fn clear_away(&self, request: &Request, folder: Folder) {
        let (session_id, environment) = (request.uuid.to_string(), self.workshop.environment.clone());
        if let Err(error) = blocking(move || folder.remove().and(claude::clean_up(&session_id, &environment))).await {
            tracing::warn!(run_id = request.row.run_id, %error, "the run's folder was not removed; the sweeper tries again");
        }
    }

    async fn converse(&self, request: &Request, prepared: &Prepared, cancel: &CancellationToken) -> (Outcome, Usage) {
        let Prepared { folder, system_file, files } = prepared;
        let started = Instant::now();
        let ended = |ending, stderr| Outcome { ending, stderr, duration: started.elapsed() };
        let Some(program) = programs::find(&self.claude, &self.workshop.environment) else {
            return (ended(Ending::NotInstalled(self.claude.clone()), String::new()), Usage::default());
        };
        let mut command = self.workshop.command(&program, folder.path());
        claude::prepare(&mut command, request.uuid, &request.row.model, system_file.as_deref(), &folder.temporary());
        let input = claude::input(&request.row.prompt, files);
        let mark = self.workshop.mark.run(&request.row.run_id);
        let mut reader = Reader::default();
        let talk = Talk { input, hold_input: true, deadline: started + request.timeout, cancel };
        let finished = process::converse(&mut command, &mark, talk, |line| reader.line(line)).await;
        let finished = match finished {
            Ok(finished) => finished,
            Err(error) => {
                let why = format!("{} could not be started ({error}); check that it is a program of this machine", program.display());
                return (ended(Ending::Failed(why), String::new()), Usage::default());
            }
        };
        let ending = ending(finished.end, &mut reader, self.stop.is_cancelled(), request.timeout);
        (ended(ending, finished.stderr), reader.usage())
    }
}

/// A run's folder with what was put into it.
struct Prepared {
    folder: Folder,
    system_file: Option<PathBuf>,
    files: Vec<PathBuf>,
}

/// Does work that waits for the disk on a thread for such.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|died| Err(io::Error::other(died)))
}

/// What the end of the process and what it said make of the run. A whole reply is one, however its process ended.
fn ending(end: End, reader: &mut Reader, stopping: bool, timeout: Duration) -> Ending {
    let trouble = reader.trouble();
    let with_trouble = |text: String| match &trouble {
        Some(trouble) => format!("{text}; {trouble}"),
        None => text,
    };
    match (reader.take_answer(), end) {
        (Some(Answer::Reply { text, stop_reason }), _) => Ending::Replied { text, stop_reason },
        (_, End::TimedOut) => Ending::TimedOut(with_trouble(format!("claude did not answer within {} s", timeout.as_secs()))),
        (_, End::Cancelled) if stopping => Ending::Interrupted,
        (_, End::Cancelled) => Ending::Cancelled,
        (Some(Answer::Failure(message)), _) => Ending::Failed(message),
        (None, End::Exited(status)) => Ending::Failed(with_trouble(format!("claude ended ({status}) without an answer"))),
        (None, End::Lingered) => Ending::Failed(with_trouble("claude closed its output without an answer".to_owned())),
        (None, End::Stopped) => Ending::Failed(with_trouble("claude gave no answer".to_owned())),
    }
}

/// What the ledger keeps of an outcome.
fn row_end(outcome: &Outcome, usage: Usage) -> RunEnd {
    let failed = |stop_reason: &str, error: String| (false, stop_reason.to_owned(), Some(error), None);
    let (ok, stop_reason, error, result) = match &outcome.ending {
        Ending::Replied { text, stop_reason } => (true, stop_reason.clone(), None, Some(text.clone())),
        Ending::Failed(error) => failed("error", error.clone()),
        Ending::TimedOut(error) => failed("timeout", error.clone()),
        Ending::Cancelled => failed("cancelled", "the client left before the answer".to_owned()),
        Ending::Interrupted => failed("interrupted", "the server stopped before the answer".to_owned()),
        Ending::NotInstalled(program) => failed("error", format!("{} is not installed", program.display())),
        Ending::Unprepared(error) => failed("error", format!("the run's folder could not be made: {error}")),
    };
    RunEnd {
        duration_ms: clock::millis(outcome.duration),
        ok,
        stop_reason,
        error,
        result,
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        cost_usd: usage.cost_usd,
    }
}

/// Ends what a crash left running, removes its folders and settles its rows. Before the first run.
pub async fn recover(workshop: &Workshop, ledger: &Ledger) -> anyhow::Result<()> {
    let processes = family::end(&workshop.mark).await;
    let runs_folder = workshop.folder.clone();
    let folders = blocking(move || clear(&runs_folder, |_| false)).await?;
    let rows = ledger.settle_runs().await?;
    if processes + folders + rows > 0 {
        tracing::warn!(processes, folders, rows, "cleared away what an earlier end left");
    }
    Ok(())
}

/// Completes a row each second until that succeeds, or a last time when `stop` comes.
pub(crate) async fn finish_later<T, F: Future<Output = Result<T, ledger::Error>>>(
    id: &str,
    stop: &CancellationToken,
    finish: impl Fn() -> F,
) {
    loop {
        let stopping = stop.run_until_cancelled(sleep(Duration::from_secs(1))).await.is_none();
        match finish().await {
            Ok(_) => return tracing::info!(id, "the row is completed"),
            Err(error) if stopping => return tracing::error!(id, %error, "the row stays open"),
            Err(_) => {}
        }
    }
}

/// Removes what `folder` holds, but for what is to be kept. What can't be removed is logged, and left.
pub(crate) fn clear(folder: &Path, keep: impl Fn(&str) -> bool) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if keep(&entry.file_name().to_string_lossy()) {
            continue;
        }
        match folder::remove_tree(&entry.path()) {
            Ok(()) => removed += 1,
            Err(error) => tracing::warn!(path = %entry.path().display(), %error, "not removed"),
        }
    }
    Ok(removed)
}
