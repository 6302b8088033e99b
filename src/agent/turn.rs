//! A turn that goes on: its messages as they come, and how it ended.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;

use super::acp::{Messages, TurnEnd, TypedMessage};
use super::contract::{Ending, Event, Facts, Outcome, Setup};
use super::control::Control;
use super::kinds;
use super::questions::{Ask, Choice, Question};
use crate::blocking::aside;

/// The agent that is claude.
pub const CLAUDE_AGENT: &str = "claude";
/// The permission by which every tool runs.
pub const APPROVE_ALL: &str = "approve-all";
/// The permissions that a session may be created with.
pub const PERMISSIONS: [&str; 4] = [APPROVE_ALL, "approve-reads", "deny-all", ASK];
/// The permission by which whoever has the agent work is asked.
pub const ASK: &str = "ask";
/// The method by which an agent asks what it wants to know.
pub const ELICITATION: &str = "elicitation/create";

/// Bytes of a turn's messages that are kept: they all stand in its answer.
const MAX_TURN: usize = 16 << 20;

/// The type of a message by which an agent asks before it acts.
pub const QUESTION: &str = "permission_request";

/// What an agent asks by a message of the protocol. What it wants to know is answered or not; what it wants to do has options of its own.
fn question(message: &str, ask: Ask) -> Option<Question> {
    #[derive(Deserialize)]
    struct Asked {
        id: Value,
        method: String,
        params: Params,
    }
    #[derive(Deserialize)]
    struct Params {
        #[serde(default)]
        options: Vec<Choice>,
    }
    let Asked { id, method, params: Params { options } } = serde_json::from_str(message).ok()?;
    let is_elicitation = method == ELICITATION;
    let options = if is_elicitation { Choice::of_a_wish_to_know() } else { options };
    Some(Question { is_elicitation, ..Question::new(id, options, ask) })
}

/// What a message means for whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// There are more to come.
    More,
    /// The same; it is a question, and whoever is asked answers it.
    Asked,
    /// The turn has ended.
    Ended,
    /// The turn is not to go on.
    Stop,
}

/// A turn that goes on.
pub struct Turn<'a> {
    setup: &'a Setup,
    control: Control<'a>,
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
    pub fn new(setup: &'a Setup, control: Control<'a>, (started, timeout): (Instant, Duration), files: Vec<String>, prompt: usize) -> Self {
        let (messages, most) = (Messages::default(), MAX_TURN + prompt);
        Self { setup, control, started, timeout, files, messages, end: None, bytes: 0, most }
    }

    /// When its time is up, but for the time for which its clock stands.
    pub fn deadline(&self) -> Instant {
        self.started + self.timeout
    }

    fn is_late(&self) -> bool {
        self.control.questions.deadline(self.deadline()).is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Waits until nobody wants it any more, or its time is up.
    pub async fn unwanted(&self) {
        tokio::select! {
            () = self.control.cancel.cancelled() => {}
            () = self.control.questions.time_up(self.deadline()) => {}
        }
    }

    /// Whether nobody wants it any more, or its time is up.
    pub fn is_unwanted(&self) -> bool {
        self.control.cancel.is_cancelled() || self.is_late()
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
        let asked = self.messages.count() > count && self.ask();
        if let Some(message) = self.messages.last().filter(|_| self.messages.count() > count) {
            (self.control.emit)(Event::Acp { kind: message.kind().to_owned(), message: message.raw() });
        }
        if let Some(mode) = self
            .messages
            .mode_at_work()
            .filter(|mode| kinds::of(&self.setup.agent).is_some_and(|kind| !kind.keeps(&self.setup.permissions, mode)))
        {
            self.end = Some(TurnEnd::Failed(format!(
                "the agent worked in its mode \"{mode}\", where the session's permissions ({}) do not hold, and was ended; ask the operator to look for \"defaultMode\" in claude's managed settings",
                self.setup.permissions
            )));
            return Heard::Stop;
        }
        self.end = end;
        match &self.end {
            Some(_) => Heard::Ended,
            None if asked => Heard::Asked,
            None => Heard::More,
        }
    }

    /// Has the message answered by whoever may, where it is a question and somebody is to be asked. Whether it is.
    fn ask(&mut self) -> bool {
        let Some(ask) = self.setup.ask.filter(|_| !self.is_unwanted()) else { return false };
        let Some(message) = self.messages.last_mut().filter(|message| message.kind() == QUESTION) else { return false };
        let Some(mut question) = question(message.raw().get(), ask) else { return false };
        message.add(question.added());
        question.message = message.raw();
        self.control.questions.ask(question);
        true
    }

    /// How it ended; `why` where no message says so.
    pub fn ending(&self, why: impl FnOnce(Option<&str>) -> String) -> Ending {
        let early = || {
            if self.is_late() {
                Some(Ending::TimedOut(format!("the turn did not end within {} s", self.timeout.as_secs())))
            } else {
                self.control.cancel.is_cancelled().then_some(Ending::Cancelled)
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
        let facts = Facts {
            agent_session: messages.session_id().map(str::to_owned),
            total_cost_usd: messages.cost_usd(),
            began: messages.agent_began(),
            began_at_usd,
            files: std::mem::take(&mut self.files),
        };
        let (text, usage) = (messages.text().to_owned(), messages.usage());
        let events = aside(self.bytes, || messages.into_messages().iter().map(TypedMessage::raw).collect());
        Outcome { text, events, usage, facts, stderr, duration: self.started.elapsed(), ..Outcome::of(ending) }
    }
}
