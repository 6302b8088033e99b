//! A run by the `claude` CLI, from its folder to its end.

use std::io;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::command::Purpose;
use super::models::{KnownModels, Model};
use super::output::{self, Reader};
use super::result::Answer;
use super::workspace::{NotStarted, RunDir, RunDirs};
use super::{completion, completion_lines};
use crate::agent::contract::{Ending, Outcome, Rules, Spec};
use crate::agent::control::{Control, Report};
use crate::agent::family;
use crate::agent::folder::unprepared;
use crate::agent::process::{self, ConverseOptions, End, Line, Next, Waiting};
use crate::agent::warm_pool::{Pool, WarmKey};

/// Runs and completions by the `claude` CLI. Clones share the folders and the pool.
#[derive(Clone)]
pub struct Claude {
    run_dirs: RunDirs,
    warm: Pool,
    models: KnownModels,
    /// One asks the CLI for them at once; when that was last.
    asking: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

/// A folder with what the run needs in it.
#[derive(Debug)]
pub struct Ready {
    run_dir: RunDir,
    files: Vec<PathBuf>,
    /// The claude that waits there already.
    waiting: Option<Waiting>,
}

/// How long the CLI may take to tell its models.
const ASKING: Duration = Duration::from_secs(10);
/// After how long a CLI that did not tell them is asked again.
const ASK_AGAIN: Duration = Duration::from_mins(1);

/// What a process has to be started for.
fn purpose(spec: &Spec) -> Purpose {
    match spec {
        Spec { completion: Some(_), .. } => Purpose::Completion,
        Spec { ask: Some(_), .. } => Purpose::Asking,
        _ => Purpose::Run,
    }
}

/// The same, with all else that must be known by then.
fn warm_key(spec: &Spec) -> WarmKey {
    WarmKey::Claude { purpose: purpose(spec), model: spec.model.clone().unwrap_or_default(), rules: spec.rules.clone() }
}

/// How long a claude that was given its prompt may say nothing, of the time that it has. It says something within 0.03 s.
fn patience(timeout: Duration) -> Duration {
    Duration::from_secs(3).min(timeout / 4)
}

impl Claude {
    /// Runs in these folders, by a process of the pool where one waits.
    pub fn new(run_dirs: RunDirs, warm: Pool, models: KnownModels) -> Self {
        Self { run_dirs, warm, models, asking: Arc::default() }
    }

    /// Makes ready what the run needs: a folder in which claude waits already, or a new one.
    pub async fn prepare(&self, uuid: Uuid, spec: &Spec) -> io::Result<Ready> {
        // What was started ahead is for those who wait.
        let warm = if spec.yields { None } else { self.warm.take_claude(warm_key(spec)).await };
        match warm {
            Some((run_dir, waiting)) => {
                let (run_dir, attached) = run_dir.attach(spec.files.clone()).await;
                match attached {
                    Ok(files) => Ok(Ready { run_dir, files, waiting: Some(waiting) }),
                    Err(error) => {
                        run_dir.leave(Some(waiting)).await;
                        Err(error)
                    }
                }
            }
            None => self.prepare_cold(uuid, spec).await,
        }
    }

    /// The models that the CLI says it has. Where it has not told yet it is asked, which takes half a second; none where it does not tell.
    pub async fn models(&self) -> Vec<Model> {
        let mut asked = self.asking.clone().lock_owned().await;
        let known = self.models.all();
        if !known.is_empty() || asked.is_some_and(|asked| asked.elapsed() < ASK_AGAIN) {
            return known;
        }
        *asked = Some(Instant::now());
        let claude = self.clone();
        // Of its own: a caller that leaves must not leave a folder behind.
        let asking = async move {
            claude.ask_for_models().await;
            drop(asked);
        };
        let _ = self.warm.spawn(asking).await;
        self.models.all()
    }

    async fn ask_for_models(&self) {
        let Ok((run_dir, _)) = self.run_dirs.set_up(Uuid::now_v7(), Vec::new()).await else { return };
        // What it would wait for when it starts is waited for by nobody here: it has little time.
        if let Ok(waiting) = run_dir.start(Purpose::Completion, "sonnet", &Rules::default()) {
            let (time_up, cancel) = (Box::pin(sleep(ASKING)), CancellationToken::new());
            let options =
                ConverseOptions { input: completion_lines::ask(), hold_input: true, time_up, cancel: &cancel, patience: None, more: None };
            let read = |line: Line<'_>| match line {
                Line::Whole(line) if completion::told_models(line, &self.models) => Next::Answered,
                Line::Whole(_) => Next::More,
                Line::TooLong => Next::Stop,
            };
            process::converse_with(waiting, &run_dir.tag(), options, read).await;
        }
        run_dir.clear_away().await;
    }

    async fn prepare_cold(&self, uuid: Uuid, spec: &Spec) -> io::Result<Ready> {
        let (run_dir, files) = self.run_dirs.set_up(uuid, spec.files.clone()).await?;
        Ok(Ready { run_dir, files, waiting: None })
    }

    /// Has claude do it. Reports at its reply, or when there is nothing more to wait for; returns when nothing of it is left.
    pub async fn work(&self, ready: io::Result<Ready>, spec: &Spec, control: Control<'_>, mut report: Report) {
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => return report.say(Outcome::of(Ending::Unprepared(unprepared(&error)))),
        };
        // A defect must not cost more than its own run.
        let tag = ready.run_dir.tag();
        match AssertUnwindSafe(self.converse(ready, spec, control, report)).catch_unwind().await {
            Ok(Some(run_dir)) => run_dir.clear_away().await,
            Ok(None) => {}
            Err(_) => drop(family::end(&tag).await),
        }
    }

    /// Gives the folder when all that worked there has ended.
    async fn converse(&self, ready: Ready, spec: &Spec, control: Control<'_>, mut report: Report) -> Option<RunDir> {
        // Nothing is started ahead meanwhile, but for others than a batch.
        let mut hold = (!spec.yields).then(|| self.warm.hold());
        let Ready { mut run_dir, mut files, waiting: mut warm } = ready;
        let (purpose, model) = (purpose(spec), spec.model.as_deref().unwrap_or_default());
        let started = Instant::now();
        let ended = |ending| Outcome { duration: started.elapsed(), ..Outcome::of(ending) };
        loop {
            let is_warm = warm.is_some();
            if let Some(why) = if is_warm { None } else { run_dir.obstacle().await } {
                report.say(ended(Ending::Failed(why)));
                return Some(run_dir);
            }
            let waiting = match warm.take().map_or_else(|| run_dir.start(purpose, model, &spec.rules), Ok) {
                Ok(waiting) => waiting,
                Err(error) => {
                    report.say(ended(match error {
                        NotStarted::NotInstalled(program) => Ending::NotInstalled(program.to_string_lossy().into_owned()),
                        NotStarted::Failed(why) => Ending::Failed(why),
                    }));
                    return Some(run_dir);
                }
            };
            if spec.yields {
                waiting.yield_to_others();
            }
            let mut reader = Reader::new(spec, &self.models);
            let (say, more) = mpsc::unbounded_channel();
            let input = reader.opening(spec, &files);
            let read = |line: Line<'_>| {
                hold.take();
                let next = reader.read(line, control);
                // A failure waits for the end of standard error.
                if let Some(reply) = reader.take_reply() {
                    if !spec.yields {
                        self.warm.used(warm_key(spec));
                    }
                    report.say(Outcome { duration: started.elapsed(), ..reply });
                }
                next
            };
            let options = ConverseOptions {
                input,
                hold_input: true,
                time_up: Box::pin(control.questions.time_up(started + spec.timeout)),
                cancel: control.cancel,
                patience: is_warm.then(|| patience(spec.timeout)),
                more: Some(more),
            };
            let answering = async {
                loop {
                    if let Some(line) = output::answer_to(&control.questions.next().await) {
                        let _ = say.send(line);
                    }
                }
            };
            let tag = run_dir.tag();
            let finished = tokio::select! {
                finished = process::converse_with(waiting, &tag, options, read) => finished,
                // It never comes to an end.
                () = answering => continue,
            };
            if is_warm && finished.never_spoke() {
                tracing::info!(end = ?finished.end, "a standby was of no use; starting cold");
                run_dir.clear_away().await;
                match self.prepare_cold(Uuid::now_v7(), spec).await {
                    Ok(cold) => Ready { run_dir, files, .. } = cold,
                    Err(error) => {
                        report.say(ended(Ending::Unprepared(unprepared(&error))));
                        return None;
                    }
                }
                continue;
            }
            if !report.is_said() {
                let outcome = match (outcome(finished.end, &finished.stderr, &mut reader, spec.timeout), run_dir.why_ended()) {
                    (Outcome { ending: Ending::Failed(_), .. }, Some(why)) => Outcome::of(Ending::Failed(why)),
                    (outcome, _) => outcome,
                };
                report.say(Outcome { usage: reader.usage(), stderr: finished.stderr, duration: started.elapsed(), ..outcome });
            }
            return Some(run_dir);
        }
    }
}

impl Ready {
    /// Takes it away unused.
    pub async fn abandon(self) {
        self.run_dir.leave(self.waiting).await;
    }
}

/// What the end of the process and what it said make of the run. A whole reply is one, however its process ended.
fn outcome(end: End, stderr: &str, reader: &mut Reader<'_>, timeout: Duration) -> Outcome {
    if let Some(reply) = reader.take_reply() {
        return reply;
    }
    // What this program says that was to become claude, in the sandbox.
    let own = stderr.lines().find_map(|line| line.strip_prefix("clawdforge: ")).map(str::to_owned);
    let trouble = reader.trouble().or(own);
    let with_trouble = |text: String| match &trouble {
        Some(trouble) => format!("{text}; {trouble}"),
        None => text,
    };
    let failure = match reader.take_answer() {
        Some(Answer::Failure { error, api_status }) => Some((error, api_status)),
        _ => None,
    };
    let ending = match (failure, end) {
        (_, End::TimedOut) => Ending::TimedOut(with_trouble(format!("claude did not answer within {} s", timeout.as_secs()))),
        (_, End::Cancelled) => Ending::Cancelled,
        (Some((error, api_status)), _) => return Outcome { api_status, ..Outcome::of(Ending::Failed(error)) },
        (None, End::Exited(status)) => Ending::Failed(with_trouble(format!("claude ended ({status}) without an answer"))),
        (None, End::Lingered) => Ending::Failed(with_trouble("claude closed its output without an answer".to_owned())),
        (None, End::Stopped | End::Silent) => Ending::Failed(with_trouble("claude gave no answer".to_owned())),
    };
    Outcome::of(ending)
}
