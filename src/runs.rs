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
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::agent::Workshop;
use crate::agent::claude::{self, Answer, Reader, Usage};
use crate::agent::desk::{Desk, Desks, NotStarted};
use crate::agent::family;
use crate::agent::folder::{Attachment, blocking, clear};
use crate::agent::process::{self, End, Talk, Waiting};
use crate::agent::queue::{self, Place, Promise, Queue, Ticket, Wanted};
use crate::agent::standby::{self, Hold, Pool, Want};
use crate::clock;
use crate::feed::{Feed, Feeds, Final, Live};
use crate::ledger::{self, Key, Ledger, Limits, NewRun, RunEnd};
use crate::metrics::METRICS;
use crate::schema::{Schemas, Wrong};

/// How long the end of a run may take beyond its stop: two graces and the last look for its processes.
const END_GRACE: Duration = Duration::from_secs(15);

/// What is said of work that waited for a start of the server, and did not come about.
pub(crate) const COULD_NOT_START: &str = "it could not be started; send it again";

/// What an app asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The run's id.
    pub uuid: Uuid,
    /// What the ledger keeps of it.
    pub row: NewRun,
    /// What else there is to it.
    pub details: Details,
}

/// What the ledger keeps of a request only until the run starts.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Details {
    /// Added to the CLI's own system prompt.
    pub system: Option<String>,
    /// Files to put into the run's folder.
    pub files: Vec<Attachment>,
    /// What the reply has to fit, as a JSON Schema.
    pub schema: Option<Box<RawValue>>,
    /// How long the CLI may take.
    pub timeout: Duration,
    /// What its app may cost the others.
    pub limits: Limits,
}

/// How a run is asked for.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// Whether it has a row from its acceptance on, and not only from its start.
    pub accepted: bool,
    /// Whether it goes on without its client, and after a restart if it has not begun. Then it is accepted too.
    pub detached: bool,
    /// The key under which the request may be sent again.
    pub key: Option<Key>,
}

/// A run that waits or goes on.
#[derive(Debug)]
pub struct Submitted {
    /// What there is to see of it.
    pub live: Live,
    /// Dropped, it cancels the run; `None` for one that goes on without its client.
    pub guard: Option<DropGuard>,
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
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] io::Error),
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

/// Makes the answer of what came of a run.
pub type Render = fn(Result<Outcome, NoRun>) -> Final;

/// All runs of a server. Clones share them.
#[derive(Clone)]
pub struct Runs {
    queue: Queue,
    tasks: TaskTracker,
    shared: Arc<Shared>,
}

struct Shared {
    desks: Desks,
    standby: Pool,
    ledger: Ledger,
    feeds: Feeds,
    schemas: Schemas,
    render: Render,
    /// Ends every run, at the end of the drain.
    stop: CancellationToken,
}

impl Runs {
    /// Runs that have their places from `queue`.
    pub fn new(queue: Queue, desks: Desks, standby: Pool, ledger: Ledger, feeds: Feeds, render: Render) -> Self {
        let schemas = Schemas::new(desks.workshop.mark.clone());
        let shared = Arc::new(Shared { desks, standby, ledger, feeds, schemas, render, stop: CancellationToken::new() });
        Self { queue, tasks: TaskTracker::new(), shared }
    }

    /// Whether this is a schema that replies to an app can be checked against.
    pub async fn check_schema(&self, app: &str, schema: &RawValue) -> Result<(), Wrong> {
        self.shared.schemas.check(app, schema).await
    }

    /// Takes a run on. `None` where its key was taken meanwhile.
    pub async fn submit(&self, request: Request, way: Way) -> Result<Option<Submitted>, NoRun> {
        let (app, limits) = (&request.row.app_name, request.details.limits);
        check_budget(&self.shared.ledger, app, limits).await?;
        let ticket = self.queue.join(wanted(&request), if way.detached { Promise::New } else { Promise::None })?;
        let cancel = self.shared.stop.child_token();
        let guard = (!way.detached).then(|| cancel.clone().drop_guard());
        // Of its own: a client that leaves in the middle must not leave a row behind that nobody ends.
        let runs = self.clone();
        let accepting = self.tasks.spawn(async move { runs.accept(request, ticket, way, cancel).await });
        let live = accepting.await.map_err(|_| NoRun::Died)??;
        Ok(live.map(|live| Submitted { live, guard }))
    }

    async fn accept(&self, request: Request, ticket: Ticket, way: Way, cancel: CancellationToken) -> Result<Option<Live>, NoRun> {
        let run_id = request.row.run_id.clone();
        let feed = self.shared.feeds.begin(&run_id, cancel.clone()).await?;
        if way.accepted {
            let kept = way.detached.then(|| serde_json::to_string(&request.details).expect("details are JSON"));
            let accepted = self.shared.ledger.accept_run(request.row.clone(), kept, way.key).await;
            if !matches!(accepted, Ok(true)) {
                self.shared.feeds.forget(&run_id).await;
                return Ok(accepted.map(|_| None)?);
            }
        }
        let live = self.shared.feeds.live(&run_id);
        self.spawn(request, ticket, feed, cancel, way.accepted, way.detached);
        Ok(live)
    }

    /// Starts what waited when the server ended.
    pub async fn resume(&self) -> anyhow::Result<()> {
        for (row, details) in self.shared.ledger.waiting_runs().await? {
            let request = Uuid::try_parse(&row.run_id).ok().zip(serde_json::from_str(&details).ok());
            let refused_before = self.shared.feeds.answer(&row.run_id).await?.is_some();
            let Some((uuid, details)) = request.filter(|_| !refused_before) else {
                // It was refused, and only its row could not be told; or another release kept it in a form of its own.
                let end = RunEnd::failed("error", COULD_NOT_START.to_owned());
                self.shared.ledger.finish_run(&row.run_id, end).await?;
                let outcome = failed(Ending::Failed(COULD_NOT_START.to_owned()));
                self.shared.feeds.end(&row.run_id, &(self.shared.render)(Ok(outcome))).await?;
                continue;
            };
            let request = Request { uuid, row, details };
            let cancel = self.shared.stop.child_token();
            let feed = self.shared.feeds.begin(&request.row.run_id, cancel.clone()).await?;
            tracing::info!(run_id = request.row.run_id, "a run that waited when the server ended");
            let ticket = self.queue.join(wanted(&request), Promise::Old).map_err(NoRun::from)?;
            self.spawn(request, ticket, feed, cancel, true, true);
        }
        Ok(())
    }

    fn spawn(&self, request: Request, ticket: Ticket, feed: Feed, cancel: CancellationToken, accepted: bool, detached: bool) {
        let shared = self.shared.clone();
        // Nothing is started ahead while somebody waits for a place, but for whom only the own app's limit keeps waiting.
        let waits = (!self.queue.has_free()).then(|| shared.standby.hold());
        self.tasks.spawn(async move {
            let place = async {
                let came = Instant::now();
                let place = ticket.place().await?;
                drop(waits);
                let going_on = METRICS.begins("run", came.elapsed());
                // Once more: what was going on while this one waited has cost something.
                check_budget(&shared.ledger, &request.row.app_name, request.details.limits).await?;
                Ok::<_, NoRun>((place, going_on))
            };
            let has_row = match cancel.run_until_cancelled(place).await {
                Some(Ok((place, _going_on))) => shared.carry_out(&request, place, shared.standby.hold(), &cancel, accepted, &feed).await,
                // It starts after the restart.
                Some(Err(NoRun::Closed)) if detached => true,
                None if shared.stop.is_cancelled() && detached => true,
                Some(Err(refused)) => shared.refuse(&request, accepted, &feed, refused).await,
                None => {
                    let ending = if shared.stop.is_cancelled() { Ending::Interrupted } else { Ending::Cancelled };
                    shared.conclude(&request, accepted, &feed, failed(ending), Usage::default()).await
                }
            };
            if !has_row {
                shared.feeds.forget(&request.row.run_id).await;
            }
        });
    }

    /// Lets runs finish until `drained`, then ends them. Whoever waits for a place is refused at once, or starts after the
    /// restart. When this returns, no process of a run is alive.
    pub async fn finish(&self, drained: impl Future<Output = ()>) {
        self.queue.close();
        self.tasks.close();
        end_tasks("runs", &self.tasks, &self.shared.stop, drained, END_GRACE).await;
    }

    /// How many runs and turns wait for a place.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// Removes the folders of runs that are over, where that failed at their end.
    pub async fn sweep(&self) -> io::Result<usize> {
        self.shared.desks.sweep().await
    }
}

fn wanted(request: &Request) -> Wanted {
    Wanted { app: request.row.app_name.clone(), most: request.details.limits.at_once(), run: true }
}

impl Shared {
    /// As the next ones, says whether there is a row.
    async fn carry_out(
        &self,
        request: &Request,
        place: Place,
        hold: Hold,
        cancel: &CancellationToken,
        accepted: bool,
        feed: &Feed,
    ) -> bool {
        let begin = async {
            if accepted { self.ledger.start_run(&request.row.run_id).await } else { self.ledger.begin_run(request.row.clone()).await }
        };
        let (begun, prepared) = tokio::join!(begin, self.prepare(request));
        if let Err(error) = begun {
            if let Ok(Prepared { desk, waiting, .. }) = prepared {
                desk.leave(waiting).await;
            }
            return self.refuse(request, accepted, feed, error.into()).await;
        }
        let (said, saying) = oneshot::channel();
        let working = async {
            let prepared = match prepared {
                Ok(prepared) => prepared,
                Err(error) => return drop(said.send((failed(Ending::Unprepared(error)), Usage::default()))),
            };
            // A defect must not cost more than its own run.
            let mark = prepared.desk.mark();
            let conversation = AssertUnwindSafe(self.converse(request, prepared, hold, cancel, said, feed)).catch_unwind();
            match conversation.await {
                Ok(Some(desk)) => desk.clear_away().await,
                Ok(None) => {}
                Err(_) => drop(family::end(&mark).await),
            }
        };
        let settling = async {
            let defect =
                || (failed(Ending::Failed("the server met a defect; its operator finds it in its log".to_owned())), Usage::default());
            let (mut outcome, usage) = saying.await.unwrap_or_else(|_| defect());
            if let (Ending::Replied { text, .. }, Some(schema)) = (&outcome.ending, &request.details.schema)
                && let Err(wrong) = self.schemas.fit(&request.row.app_name, schema, text).await
            {
                outcome.ending = Ending::Failed(wrong.to_string());
            }
            self.conclude(request, true, feed, outcome, usage).await
        };
        // The caller has its answer while the agent ends and its desk is cleared away. The place is held until then.
        tokio::join!(working, settling);
        drop(place);
        true
    }

    /// Answers a run that does not come about.
    async fn refuse(&self, request: &Request, accepted: bool, feed: &Feed, why: NoRun) -> bool {
        let end = RunEnd::failed("error", why.to_string());
        let answer = (self.render)(Err(why));
        self.complete(request, accepted, feed, end, answer).await
    }

    /// Completes the row and answers.
    async fn conclude(&self, request: &Request, has_row: bool, feed: &Feed, outcome: Outcome, usage: Usage) -> bool {
        let end = row_end(&outcome, usage);
        if end.ok {
            self.standby.used(Want::Run { model: request.row.model.clone() });
        }
        self.complete(request, has_row, feed, end, (self.render)(Ok(outcome))).await
    }

    async fn complete(&self, request: &Request, has_row: bool, feed: &Feed, end: RunEnd, answer: Final) -> bool {
        let run_id = &request.row.run_id;
        if !has_row {
            feed.end(&answer);
            return false;
        }
        METRICS.ended("run", &request.row.app_name, &request.row.model, &end);
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
        // The answer is paid for: the caller gets it also while the ledger can't take it.
        feed.end(&answer);
        if let Err(error) = written {
            tracing::error!(run_id, %error, "the run's row was not completed; trying again until it is, or the server stops");
            finish_later(run_id, &self.stop, || self.ledger.finish_run(run_id, end.clone())).await;
        }
        true
    }

    /// A desk with what the run needs: one at which claude waits already, or a new one.
    async fn prepare(&self, request: &Request) -> io::Result<Prepared> {
        match self.standby.take_run(&request.row.model).await {
            Some((desk, waiting)) => {
                let (desk, attached) = desk.attach(request.details.files.clone()).await;
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
        let (desk, files) = self.desks.set_up(uuid, request.details.files.clone()).await?;
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
        feed: &Feed,
    ) -> Option<Desk> {
        let (mut hold, mut said) = (Some(hold), Some(said));
        let Prepared { mut desk, mut files, waiting: mut standby } = prepared;
        loop {
            let started = Instant::now();
            let ended = |ending, stderr| Outcome { ending, stderr, duration: started.elapsed() };
            let is_standby = standby.is_some();
            if let Some(why) = if is_standby { None } else { desk.obstacle().await } {
                say(&mut said, ended(Ending::Failed(why), String::new()), Usage::default());
                return Some(desk);
            }
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
            let Details { system, schema, timeout, .. } = &request.details;
            let input = claude::input(&request.row.prompt, &files, system.as_deref(), schema.as_deref());
            let patience = is_standby.then(|| standby::patience_with_claude(*timeout));
            let mut reader = Reader::default();
            let mut first_text = Some(());
            let read = |line: process::Line<'_>| {
                hold.take();
                if let process::Line::Whole(line) = line {
                    claude::said(line, |event, data| {
                        if event == "text" && first_text.take().is_some() {
                            METRICS.first_text("run", started.elapsed());
                        }
                        feed.tell(event, &data);
                    });
                }
                let next = reader.line(line);
                // A failure waits for the end of standard error.
                if let Some((text, stop_reason)) = reader.take_reply() {
                    say(&mut said, ended(Ending::Replied { text, stop_reason }, String::new()), reader.usage());
                }
                next
            };
            let talk = Talk { input, hold_input: true, deadline: started + *timeout, cancel, patience };
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
            let ending = match (ending(finished.end, &mut reader, self.stop.is_cancelled(), *timeout), desk.why_ended()) {
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
        Ending::Cancelled => failed("cancelled", "it was cancelled, or the client left, before the answer".to_owned()),
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
pub async fn recover(workshop: &Workshop, ledger: &Ledger, feeds: &Feeds, render: Render) -> anyhow::Result<()> {
    let processes = family::end(&workshop.mark).await;
    let runs_folder = workshop.folder.clone();
    let folders = blocking(move || clear(&runs_folder, |_| false)).await?;
    let runs = ledger.settle_runs().await?;
    for run_id in &runs {
        // Its readers get an end too.
        feeds.end(run_id, &render(Ok(failed(Ending::Interrupted)))).await?;
    }
    let rows = runs.len();
    if processes + folders + rows > 0 {
        tracing::warn!(processes, folders, rows, "cleared away what an earlier end left");
    }
    Ok(())
}

/// Lets tasks finish until `drained`, then has `stop` end them, for which they have the grace.
pub(crate) async fn end_tasks(
    what: &str,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    drained: impl Future<Output = ()>,
    grace: Duration,
) {
    tokio::select! {
        () = tasks.wait() => {}
        () = drained => tracing::info!(what, count = tasks.len(), "ending what still goes on"),
    }
    stop.cancel();
    if timeout(grace, tasks.wait()).await.is_err() {
        tracing::error!(what, count = tasks.len(), "did not end in time");
    }
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
