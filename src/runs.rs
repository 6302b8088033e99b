//! A run, from its place in the queue to the end of its row.
//!
//! Each run is a task of its own, and the request that asked for it holds a guard. When a client leaves, its request is
//! dropped and nothing after its `.await` happens, so ending the processes, removing the folder and completing the row
//! all live in the task.

use std::ffi::OsString;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::agent::Workshop;
use crate::agent::claude::{self, Answer, Reader, Usage};
use crate::agent::desk::{Desk, Desks, NotStarted};
use crate::agent::family;
use crate::agent::folder::{Attachment, blocking, clear};
use crate::agent::process::{self, End, Talk, Waiting};
use crate::agent::queue::{self, Place, Queue, Wanted};
use crate::agent::standby::{self, Hold, Pool, Want};
use crate::clock;
use crate::ledger::{self, Ledger, Limits, NewRun, RunEnd};

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
    /// What its app may cost the others.
    pub limits: Limits,
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
    /// The app has spent what it may today.
    #[error("the app has spent its budget")]
    Spent,
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

impl From<queue::Refused> for NoRun {
    fn from(refused: queue::Refused) -> Self {
        match refused {
            queue::Refused::Full => Self::Full,
            queue::Refused::Closed => Self::Closed,
        }
    }
}

/// All runs of a server.
pub struct Runs {
    queue: Queue,
    tasks: TaskTracker,
    shared: Arc<Shared>,
}

struct Shared {
    desks: Desks,
    standby: Pool,
    ledger: Ledger,
    /// Ends every run, at the end of the drain.
    stop: CancellationToken,
}

impl Runs {
    /// Runs that have their places from `queue`.
    pub fn new(queue: Queue, desks: Desks, standby: Pool, ledger: Ledger) -> Self {
        let shared = Arc::new(Shared { desks, standby, ledger, stop: CancellationToken::new() });
        Self { queue, tasks: TaskTracker::new(), shared }
    }

    /// Waits for a place and runs. A caller that stops waiting cancels the run.
    pub async fn run(&self, request: Request) -> Result<Outcome, NoRun> {
        let hold = self.shared.standby.hold();
        let (app, limits) = (&request.row.app_name, request.limits);
        check_budget(&self.shared.ledger, app, limits).await?;
        let place = self.queue.enter(Wanted { app: app.clone(), most: limits.at_once(), run: true }).await?;
        // Once more: what was going on while this one waited has cost something.
        check_budget(&self.shared.ledger, app, limits).await?;
        let cancel = self.shared.stop.child_token();
        let guard = cancel.clone().drop_guard();
        let (answer, answered) = oneshot::channel();
        let shared = self.shared.clone();
        self.tasks.spawn(async move { shared.carry_out(request, place, hold, &cancel, answer).await });
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
        self.shared.desks.sweep().await
    }
}

impl Shared {
    async fn carry_out(
        &self,
        request: Request,
        place: Place,
        hold: Hold,
        cancel: &CancellationToken,
        answer: oneshot::Sender<Result<Outcome, NoRun>>,
    ) {
        let (begun, prepared) = tokio::join!(self.ledger.begin_run(request.row.clone()), self.prepare(&request));
        if let Err(error) = begun {
            if let Ok(Prepared { desk, waiting, .. }) = prepared {
                desk.leave(waiting).await;
            }
            let _ = answer.send(Err(error.into()));
            return;
        }
        let (said, saying) = oneshot::channel();
        let working = async {
            let prepared = match prepared {
                Ok(prepared) => prepared,
                Err(error) => return drop(said.send((failed(Ending::Unprepared(error)), Usage::default()))),
            };
            // A defect must not cost more than its own run.
            let mark = prepared.desk.mark();
            let conversation = AssertUnwindSafe(self.converse(&request, prepared, hold, cancel, said)).catch_unwind();
            match conversation.await {
                Ok(Some(desk)) => desk.clear_away().await,
                Ok(None) => {}
                Err(_) => drop(family::end(&mark).await),
            }
        };
        // The caller has its answer while the agent ends and its desk is cleared away. The place is held until then.
        tokio::join!(working, self.settle(&request, saying, answer));
        drop(place);
    }

    /// Completes the row and answers.
    async fn settle(
        &self,
        request: &Request,
        saying: oneshot::Receiver<(Outcome, Usage)>,
        answer: oneshot::Sender<Result<Outcome, NoRun>>,
    ) {
        let run_id = &request.row.run_id;
        let defect = || (failed(Ending::Failed("the server met a defect; its operator finds it in its log".to_owned())), Usage::default());
        let (outcome, usage) = saying.await.unwrap_or_else(|_| defect());
        let end = row_end(&outcome, usage);
        let written = self.ledger.finish_run(run_id, end.clone()).await;
        tracing::info!(
            run_id,
            app = request.row.app_name,
            model = request.row.model,
            ok = end.ok,
            stop_reason = end.stop_reason,
            duration_ms = end.duration_ms,
            "run"
        );
        if end.ok {
            self.standby.used(Want::Run { model: request.row.model.clone(), system: request.system.clone() });
        }
        // The answer is paid for: the caller gets it also while the ledger can't take it.
        let _ = answer.send(Ok(outcome));
        if let Err(error) = written {
            tracing::error!(run_id, %error, "the run's row was not completed; trying again until it is, or the server stops");
            finish_later(run_id, &self.stop, || self.ledger.finish_run(run_id, end.clone())).await;
        }
    }

    /// A desk with what the run needs: one at which claude waits already, or a new one.
    async fn prepare(&self, request: &Request) -> io::Result<Prepared> {
        match self.standby.take_run(&request.row.model, request.system.as_deref()) {
            Some((desk, waiting)) => {
                let (desk, attached) = desk.attach(request.files.clone()).await;
                match attached {
                    Ok(files) => Ok(Prepared { desk, files, waiting: Some(waiting) }),
                    Err(error) => {
                        desk.leave(Some(waiting)).await;
                        Err(error)
                    }
                }
            }
            None => self.prepare_cold(request, request.uuid).await,
        }
    }

    async fn prepare_cold(&self, request: &Request, uuid: Uuid) -> io::Result<Prepared> {
        let (desk, files) = self.desks.set_up(uuid, request.system.clone(), request.files.clone()).await?;
        Ok(Prepared { desk, files, waiting: None })
    }

    /// Says how the run ended: at claude's reply, or when there is nothing more to wait for. Gives the desk when all that
    /// worked there has ended.
    async fn converse(
        &self,
        request: &Request,
        prepared: Prepared,
        hold: Hold,
        cancel: &CancellationToken,
        said: oneshot::Sender<(Outcome, Usage)>,
    ) -> Option<Desk> {
        let (mut hold, mut said) = (Some(hold), Some(said));
        let Prepared { mut desk, mut files, waiting: mut standby } = prepared;
        loop {
            let started = Instant::now();
            let ended = |ending, stderr| Outcome { ending, stderr, duration: started.elapsed() };
            let is_standby = standby.is_some();
            let waiting = match standby.take().map_or_else(|| desk.start(&request.row.model), Ok) {
                Ok(waiting) => waiting,
                Err(error) => {
                    let ending = match error {
                        NotStarted::NotInstalled(program) => Ending::NotInstalled(program),
                        NotStarted::Failed(why) => Ending::Failed(why),
                    };
                    say(&mut said, ended(ending, String::new()), Usage::default());
                    return Some(desk);
                }
            };
            let input = claude::input(&request.row.prompt, &files);
            let patience = is_standby.then(|| standby::patience_with_claude(request.timeout));
            let mut reader = Reader::default();
            let read = |line: process::Line<'_>| {
                hold.take();
                let next = reader.line(line);
                // A failure waits for the end of standard error.
                if let Some((text, stop_reason)) = reader.take_reply() {
                    say(&mut said, ended(Ending::Replied { text, stop_reason }, String::new()), reader.usage());
                }
                next
            };
            let talk = Talk { input, hold_input: true, deadline: started + request.timeout, cancel, patience };
            let finished = process::converse_with(waiting, &desk.mark(), talk, read).await;
            if is_standby && finished.never_spoke() {
                tracing::info!(run_id = request.row.run_id, end = ?finished.end, "a standby was of no use; starting cold");
                desk.clear_away().await;
                match self.prepare_cold(request, Uuid::now_v7()).await {
                    Ok(prepared) => Prepared { desk, files, .. } = prepared,
                    Err(error) => {
                        say(&mut said, failed(Ending::Unprepared(error)), Usage::default());
                        return None;
                    }
                }
                continue;
            }
            let ending = match (ending(finished.end, &mut reader, self.stop.is_cancelled(), request.timeout), desk.why_ended()) {
                (Ending::Failed(_), Some(why)) => Ending::Failed(why),
                (ending, _) => ending,
            };
            say(&mut said, ended(ending, finished.stderr), reader.usage());
            return Some(desk);
        }
    }
}

/// Says how a run ended, unless that was said.
fn say(said: &mut Option<oneshot::Sender<(Outcome, Usage)>>, outcome: Outcome, usage: Usage) {
    if let Some(said) = said.take() {
        let _ = said.send((outcome, usage));
    }
}

/// A run that took no time.
fn failed(ending: Ending) -> Outcome {
    Outcome { ending, stderr: String::new(), duration: Duration::ZERO }
}

/// A desk with what was put onto it.
struct Prepared {
    desk: Desk,
    files: Vec<PathBuf>,
    /// The claude that waits there already.
    waiting: Option<Waiting>,
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
        (None, End::Stopped | End::Silent) => Ending::Failed(with_trouble("claude gave no answer".to_owned())),
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

/// Refuses an app that has spent what it may today, in UTC. What is going on is not known yet, and goes on.
pub(crate) async fn check_budget(ledger: &Ledger, app: &str, limits: Limits) -> Result<(), NoRun> {
    let Some(daily_usd) = limits.daily_usd else { return Ok(()) };
    if ledger.spent(app, clock::midnight()).await? < daily_usd { Ok(()) } else { Err(NoRun::Spent) }
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
