//! A run by the `claude` CLI, from its folder to its end.

use std::io;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::command;
use super::output::{self, Answer, Reader};
use super::workspace::{NotStarted, RunDir, RunDirs};
use crate::agent::contract::{Ending, Outcome, Spec};
use crate::agent::control::{Emit, Report};
use crate::agent::family;
use crate::agent::folder::unprepared;
use crate::agent::process::{self, ConverseOptions, End, Line, Waiting};
use crate::agent::warm_pool::{Pool, WarmKey};

/// Runs by the `claude` CLI. Clones share the folders and the pool.
#[derive(Clone)]
pub struct Claude {
    run_dirs: RunDirs,
    warm: Pool,
}

/// A folder with what the run needs in it.
#[derive(Debug)]
pub struct Ready {
    run_dir: RunDir,
    files: Vec<PathBuf>,
    /// The claude that waits there already.
    waiting: Option<Waiting>,
}

/// How long a claude that was given its prompt may say nothing, of the time that it has. It says something within 0.03 s.
fn patience(timeout: Duration) -> Duration {
    Duration::from_secs(3).min(timeout / 4)
}

impl Claude {
    /// Runs in these folders, by a process of the pool where one waits.
    pub fn new(run_dirs: RunDirs, warm: Pool) -> Self {
        Self { run_dirs, warm }
    }

    /// Makes ready what the run needs: a folder in which claude waits already, or a new one.
    pub async fn prepare(&self, uuid: Uuid, spec: &Spec) -> io::Result<Ready> {
        match self.warm.take_run(spec.model.as_deref().unwrap_or_default()).await {
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

    async fn prepare_cold(&self, uuid: Uuid, spec: &Spec) -> io::Result<Ready> {
        let (run_dir, files) = self.run_dirs.set_up(uuid, spec.files.clone()).await?;
        Ok(Ready { run_dir, files, waiting: None })
    }

    /// Has claude do it. Reports at its reply, or when there is nothing more to wait for; returns when nothing of it is left.
    pub async fn work(&self, ready: io::Result<Ready>, spec: &Spec, emit: Emit<'_>, cancel: &CancellationToken, mut report: Report) {
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => return report.say(Outcome::of(Ending::Unprepared(unprepared(&error)))),
        };
        // A defect must not cost more than its own run.
        let tag = ready.run_dir.tag();
        match AssertUnwindSafe(self.converse(ready, spec, emit, cancel, report)).catch_unwind().await {
            Ok(Some(run_dir)) => run_dir.clear_away().await,
            Ok(None) => {}
            Err(_) => drop(family::end(&tag).await),
        }
    }

    /// Gives the folder when all that worked there has ended.
    async fn converse(&self, ready: Ready, spec: &Spec, emit: Emit<'_>, cancel: &CancellationToken, mut report: Report) -> Option<RunDir> {
        let mut hold = Some(self.warm.hold());
        let Ready { mut run_dir, mut files, waiting: mut warm } = ready;
        let model = spec.model.as_deref().unwrap_or_default();
        let started = Instant::now();
        let ended = |ending| Outcome { duration: started.elapsed(), ..Outcome::of(ending) };
        loop {
            let is_warm = warm.is_some();
            if let Some(why) = if is_warm { None } else { run_dir.obstacle().await } {
                report.say(ended(Ending::Failed(why)));
                return Some(run_dir);
            }
            let waiting = match warm.take().map_or_else(|| run_dir.start(model), Ok) {
                Ok(waiting) => waiting,
                Err(error) => {
                    report.say(ended(match error {
                        NotStarted::NotInstalled(program) => Ending::NotInstalled(program.to_string_lossy().into_owned()),
                        NotStarted::Failed(why) => Ending::Failed(why),
                    }));
                    return Some(run_dir);
                }
            };
            let input = command::input(&spec.prompt, &files, spec.system.as_deref(), spec.schema.as_deref());
            let mut reader = Reader::default();
            let read = |line: Line<'_>| {
                hold.take();
                if let Line::Whole(line) = line {
                    output::progress(line, emit);
                }
                let next = reader.line(line);
                // A failure waits for the end of standard error.
                if let Some((text, stop_reason)) = reader.take_reply() {
                    self.warm.used(WarmKey::Run { model: model.to_owned() });
                    report.say(Outcome { text, usage: reader.usage(), ..ended(Ending::Completed(stop_reason)) });
                }
                next
            };
            let options = ConverseOptions {
                input,
                hold_input: true,
                deadline: started + spec.timeout,
                cancel,
                patience: is_warm.then(|| patience(spec.timeout)),
            };
            let finished = process::converse_with(waiting, &run_dir.tag(), options, read).await;
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
                let outcome = match (outcome(finished.end, &mut reader, spec.timeout), run_dir.why_ended()) {
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
fn outcome(end: End, reader: &mut Reader, timeout: Duration) -> Outcome {
    let trouble = reader.trouble();
    let with_trouble = |text: String| match &trouble {
        Some(trouble) => format!("{text}; {trouble}"),
        None => text,
    };
    let ending = match (reader.take_answer(), end) {
        (Some(Answer::Reply { text, stop_reason }), _) => return Outcome { text, ..Outcome::of(Ending::Completed(stop_reason)) },
        (_, End::TimedOut) => Ending::TimedOut(with_trouble(format!("claude did not answer within {} s", timeout.as_secs()))),
        (_, End::Cancelled) => Ending::Cancelled,
        (Some(Answer::Failure(message)), _) => Ending::Failed(message),
        (None, End::Exited(status)) => Ending::Failed(with_trouble(format!("claude ended ({status}) without an answer"))),
        (None, End::Lingered) => Ending::Failed(with_trouble("claude closed its output without an answer".to_owned())),
        (None, End::Stopped | End::Silent) => Ending::Failed(with_trouble("claude gave no answer".to_owned())),
    };
    Outcome::of(ending)
}
