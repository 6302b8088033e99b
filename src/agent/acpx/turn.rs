//! A turn by `acpx prompt`, from its files to its end.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::json;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::command::{Acpx, Error, Target, end_alone};
use crate::agent::children::Started;
use crate::agent::claude::command::prompt_text;
use crate::agent::claude::files::obstacle_for;
use crate::agent::contract::{Conversation, Ending, Outcome, Spec};
use crate::agent::control::{Control, Report};
use crate::agent::family;
use crate::agent::folder::unprepared;
use crate::agent::process::{self, ConverseOptions, End, ExitCause, Finished, Line, Next, Waiting};
use crate::agent::turn::{Heard, Turn};
use crate::agent::warm_pool::{Hold, Pool, WarmKey};
use crate::blocking::{aside, blocking};

/// How long `cancel` may take: it only hands a message to the owner.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a turn may take to end when it was cancelled. acpx needs a second after its last line.
const CANCELLED_GRACE: Duration = Duration::from_secs(4);
/// How long an acpx that was given its prompt may say nothing, of the time that it has. It may have to start the session's
/// agent again, which takes 1.5 s.
fn patience(timeout: Duration) -> Duration {
    Duration::from_secs(10).min(timeout / 4)
}

/// Turns by acpx. Clones share the pool.
#[derive(Clone)]
pub struct Turns {
    acpx: Acpx,
    warm: Pool,
}

impl Turns {
    /// Turns by this acpx, or by one of the pool where that waits.
    pub fn new(acpx: Acpx, warm: Pool) -> Self {
        Self { acpx, warm }
    }

    /// Has the session's agent take the turn. Reports when acpx says that it ended, or when there is nothing more to wait for;
    /// returns when the `acpx prompt` has ended, which may be a second later. The session's processes stay.
    pub async fn work(&self, conversation: &Conversation, spec: &Spec, control: Control<'_>, mut report: Report) {
        let target = self.acpx.target(&conversation.session_id, &conversation.setup);
        // A defect must not cost more than its own session's processes.
        if AssertUnwindSafe(self.take(&target, spec, control, &mut report)).catch_unwind().await.is_err() {
            family::end(&self.acpx.tag(&target.name)).await;
        }
    }

    async fn take(&self, target: &Target, spec: &Spec, control: Control<'_>, report: &mut Report) {
        // What came of it before has nothing to do with this turn.
        let _ = self.acpx.why_ended(&target.name);
        let hold = self.warm.hold();
        let started = Instant::now();
        let folder = target.dir.work();
        let files = match self.acpx.attach(target, &spec.files).await {
            Ok(files) => files,
            Err(error) => return report.say(Outcome::of(Ending::Unprepared(unprepared(&error)))),
        };
        let paths: Vec<_> = files.iter().map(|name| folder.join(name)).collect();
        // As content blocks: acpx trims a bare text, and takes one that looks like blocks for blocks.
        let input = json!([{"type": "text", "text": prompt_text(&spec.prompt, &paths)}]).to_string().into_bytes();
        let turn = Turn::new(&target.setup, control, (started, spec.timeout), files, input.len());
        let mut turn = AcpxTurn { turns: self, target, cancel: control.cancel, report, hold: Some(hold), turn };
        let finished = self.prompt(input, &mut turn).await;
        turn.finish(finished).await;
    }

    /// Sends the prompt, by an acpx of the pool if there is one. Gives how the process ended.
    async fn prompt(&self, input: Vec<u8>, turn: &mut AcpxTurn<'_>) -> Result<Finished, Error> {
        let (target, cancel, deadline) = (turn.target, turn.cancel, turn.turn.deadline());
        let mut warm = self.warm.take_turn(target).await;
        if warm.is_none()
            && let Some(why) = obstacle_for(&self.acpx.launcher.environment).await
        {
            return Err(Error::Failed(why));
        }
        self.end_lost_owner(target).await;
        loop {
            let is_warm = warm.is_some();
            let waiting = warm.take().map_or_else(|| self.acpx.start_prompt(target), Ok)?;
            let patience = is_warm.then(|| patience(deadline - Instant::now()));
            let options = ConverseOptions {
                input: input.clone(),
                hold_input: false,
                time_up: Box::pin(sleep_until(deadline)),
                cancel,
                patience,
                more: None,
            };
            let finished = self.converse(waiting, options, turn).await;
            if !(is_warm && finished.never_spoke()) {
                return Ok(finished);
            }
            tracing::info!(session_id = target.name, end = ?finished.end, "a standby was of no use; starting cold");
        }
    }

    async fn converse(&self, waiting: Waiting, options: ConverseOptions<'_>, turn: &mut AcpxTurn<'_>) -> Finished {
        let target = turn.target;
        let wind_down = async |agent: &mut Started, cause: &ExitCause| {
            match cause {
                ExitCause { answered: true, .. } => end_alone(agent, cause).await,
                // Its turn may go on in the owner, where nothing tells any more when it ends, or must not.
                ExitCause { end: End::Exited(_) | End::Silent | End::Stopped, .. } => {
                    family::end(&self.acpx.tag(&target.name)).await;
                }
                ExitCause { .. } => self.stop_turn(target, agent).await,
            }
        };
        process::converse_and(waiting, options, |line| turn.line(line), wind_down).await
    }

    /// Ends the session's processes where its owner can't be reached any more. The turn starts others.
    async fn end_lost_owner(&self, target: &Target) {
        let dir = target.dir.clone();
        if blocking(move || Ok(dir.has_lost_socket())).await.unwrap_or(false) {
            tracing::warn!(session_id = target.name, "acpx's socket was taken away; starting the session's processes again");
            family::end(&self.acpx.tag(&target.name)).await;
            let dir = target.dir.clone();
            if let Err(error) = blocking(move || dir.forget_owner()).await {
                tracing::warn!(session_id = target.name, %error, "a lock of acpx is left");
            }
        }
    }

    /// Cancels the turn that goes on, and sees that it ended; else ends the session's family.
    async fn stop_turn(&self, target: &Target, agent: &mut Started) {
        let cancelled = match self.acpx.command(target, ["cancel", "-s", &target.name]) {
            // A cancel that hangs is not waited for: it may hang for the reason that the turn does.
            Ok(command) => Box::pin(self.acpx.control(command, target, CANCEL_TIMEOUT, &CancellationToken::new())).await.is_ok(),
            Err(_) => false,
        };
        if !cancelled || timeout(CANCELLED_GRACE, agent.child.wait()).await.is_err() {
            tracing::warn!(session_id = target.name, "the turn did not let itself be cancelled; ending the session's processes");
            family::end(&self.acpx.tag(&target.name)).await;
        }
    }
}

/// A turn that goes on.
struct AcpxTurn<'a> {
    turns: &'a Turns,
    target: &'a Target,
    cancel: &'a CancellationToken,
    report: &'a mut Report,
    /// Until the agent has started.
    hold: Option<Hold>,
    turn: Turn<'a>,
}

impl AcpxTurn<'_> {
    fn line(&mut self, line: Line<'_>) -> Next {
        if self.turn.has_ended() {
            return Next::More;
        }
        let Line::Whole(line) = line else { return Next::Stop };
        // Said when the agent has started, and the prompt goes to it.
        self.hold.take_if(|_| line.windows(16).any(|part| part == b"\"session/prompt\""));
        match self.turn.line(line) {
            Heard::More | Heard::Asked => return Next::More,
            Heard::Stop => return Next::Stop,
            Heard::Ended => {}
        }
        // A cancel that is still on its way must not meet the next turn.
        if !self.turn.is_unwanted() {
            self.say(None, String::new());
        }
        Next::Answered
    }

    /// Reports what was not reported at acpx's last word: the way that it ended is what there is to tell.
    async fn finish(&mut self, finished: Result<Finished, Error>) {
        if self.report.is_said() {
            return;
        }
        match finished {
            Ok(Finished { end, stderr, .. }) => self.say(Some(&end), stderr),
            Err(error) => {
                family::end(&self.turns.acpx.tag(&self.target.name)).await;
                let ending = match error {
                    Error::NotInstalled(program) => Ending::NotInstalled(program.to_string_lossy().into_owned()),
                    Error::Failed(error) => Ending::Failed(error),
                };
                self.tell(ending, String::new());
            }
        }
    }

    fn say(&mut self, process: Option<&End>, stderr: String) {
        let ending = self.turn.ending(|last_error| match (process, last_error) {
            (Some(End::Exited(_)), Some(error)) => error.to_owned(),
            (Some(End::Exited(status)), None) => format!("acpx ended ({status}) before the turn did"),
            _ => "acpx printed too much, or closed its output, before the turn ended".to_owned(),
        });
        self.tell(ending, stderr);
    }

    fn tell(&mut self, ending: Ending, stderr: String) {
        let ending = ending.or_failed(self.turns.acpx.why_ended(&self.target.name));
        // A close comes after it in the lane, and expects no further turn.
        if matches!(ending, Ending::Completed(_)) && !self.cancel.is_cancelled() {
            self.turns.warm.used(WarmKey::Turn(self.target.clone()));
        }
        // At a turn for which the agent was started, which took more than a second.
        let kept = self.turn.began().map_or(0.0, |session| aside(usize::MAX, || self.target.dir.kept_cost(session)));
        self.report.say(self.turn.outcome(ending, stderr, kept));
    }
}
