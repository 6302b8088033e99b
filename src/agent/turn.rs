//! A turn that goes on: its messages as they come, and how it ended.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::acp::{Messages, TurnEnd, TypedMessage};
use super::contract::{Ending, Event, Facts, Outcome, Usage};
use super::control::Emit;
use crate::blocking::aside;

/// The agent that is claude.
pub const CLAUDE_AGENT: &str = "claude";
/// The permission by which every tool runs.
pub const APPROVE_ALL: &str = "approve-all";
/// The permissions that a session may be created with.
pub const PERMISSIONS: [&str; 3] = [APPROVE_ALL, "approve-reads", "deny-all"];

/// Bytes of a turn's messages that are kept: they all stand in its answer.
const MAX_TURN: usize = 16 << 20;

/// Whether what an agent does in one of its modes is up to the permissions. In others it asks for nothing.
fn keeps(permissions: &str, mode: &str) -> bool {
    matches!(mode, "default" | "plan") || (permissions == APPROVE_ALL && matches!(mode, "acceptEdits" | "bypassPermissions"))
}

/// What a message means for whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// There are more to come.
    More,
    /// The turn has ended.
    Ended,
    /// The turn is not to go on.
    Stop,
}

/// A turn that goes on.
pub struct Turn<'a> {
    agent: &'a str,
    permissions: &'a str,
    emit: Emit<'a>,
    cancel: &'a CancellationToken,
    started: Instant,
    timeout: Duration,
    /// The names of its files in the session's folder.
    files: Vec<String>,
    messages: Messages,
    end: Option<TurnEnd>,
    /// Of all messages so far, and at most.
    bytes: usize,
    most: usize,
}

impl<'a> Turn<'a> {
    /// A turn that begins now. Its prompt, of so many bytes, comes back among the messages.
    pub fn new(
        (agent, permissions): (&'a str, &'a str),
        emit: Emit<'a>,
        cancel: &'a CancellationToken,
        (started, timeout): (Instant, Duration),
        files: Vec<String>,
        prompt: usize,
    ) -> Self {
        let (messages, most) = (Messages::default(), MAX_TURN + prompt);
        Self { agent, permissions, emit, cancel, started, timeout, files, messages, end: None, bytes: 0, most }
    }

    /// When its time is up.
    pub fn deadline(&self) -> Instant {
        self.started + self.timeout
    }

    /// Whether nobody wants it any more, or its time is up.
    pub fn is_unwanted(&self) -> bool {
        self.cancel.is_cancelled() || Instant::now() >= self.deadline()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Takes a message.
    pub fn line(&mut self, line: &[u8]) -> Heard {
        self.bytes += line.len();
        if self.bytes > self.most {
            return Heard::Stop;
        }
        let count = self.messages.count();
        let end = aside(line.len(), || self.messages.line(line));
        if let Some(message) = self.messages.last().filter(|_| self.messages.count() > count) {
            (self.emit)(Event::Acp { kind: message.kind().to_owned(), message: message.raw() });
        }
        if let Some(mode) = self.messages.mode_at_work().filter(|mode| self.agent == CLAUDE_AGENT && !keeps(self.permissions, mode)) {
            self.end = Some(TurnEnd::Failed(format!(
                "the agent worked in its mode \"{mode}\", where the session's permissions ({}) do not hold, and was ended; ask the operator to look for \"defaultMode\" in claude's managed settings",
                self.permissions
            )));
            return Heard::Stop;
        }
        self.end = end;
        if self.has_ended() { Heard::Ended } else { Heard::More }
    }

    /// How it ended; `why` where no message says so.
    pub fn ending(&self, why: impl FnOnce(Option<&str>) -> String) -> Ending {
        let early = || {
            if Instant::now() >= self.deadline() {
                Some(Ending::TimedOut(format!("the turn did not end within {} s", self.timeout.as_secs())))
            } else {
                self.cancel.is_cancelled().then_some(Ending::Cancelled)
            }
        };
        match self.end.clone() {
            Some(TurnEnd::Stopped(stop_reason)) if stop_reason != "cancelled" => Ending::Completed(stop_reason),
            Some(TurnEnd::Stopped(stop_reason)) => early().unwrap_or(Ending::Completed(stop_reason)),
            Some(TurnEnd::Failed(error)) => early().unwrap_or(Ending::Failed(error)),
            None => early().unwrap_or_else(|| Ending::Failed(why(self.messages.last_error()))),
        }
    }

    /// What the agent calls the session, where it was started for this turn.
    pub fn began(&self) -> Option<&str> {
        self.messages.session_id().filter(|_| self.messages.agent_began())
    }

    /// What came of it. Its messages are gone then.
    pub fn outcome(&mut self, ending: Ending, stderr: String, began_at_usd: f64) -> Outcome {
        let messages = std::mem::take(&mut self.messages);
        let (input_tokens, output_tokens) = messages.usage().unzip();
        let facts = Facts {
            agent_session: messages.session_id().map(str::to_owned),
            total_cost_usd: messages.cost_usd(),
            began: messages.agent_began(),
            began_at_usd,
            files: std::mem::take(&mut self.files),
        };
        let (text, usage) = (messages.text().to_owned(), Usage { input_tokens, output_tokens, cost_usd: None });
        let events = aside(self.bytes, || messages.into_messages().iter().map(TypedMessage::raw).collect());
        Outcome { text, events, usage, facts, stderr, duration: self.started.elapsed(), ..Outcome::of(ending) }
    }
}
