//! What is asked of an agent, what it says, and how it ends. Below everything: no paths, no HTTP, no SQL. All of it can be kept
//! and read by a later release.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::completion::{Completion, ModelMessage};
use super::questions::{Ask, By};

/// What an agent is to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Spec {
    /// The prompt as the app sent it; of a completion the text of its last message, for the ledger.
    pub prompt: String,
    /// The model, where one was named.
    pub model: Option<String>,
    /// Added to the CLI's own system prompt; of a completion all of it.
    pub system: Option<String>,
    /// What the reply has to fit, as a JSON Schema.
    pub schema: Option<Box<RawValue>>,
    /// Files to put where the agent works.
    pub files: Vec<Attachment>,
    /// How long it may take, from its start.
    pub timeout: Duration,
    /// The conversation that it goes on with; `None` for a run, which has none.
    pub session: Option<Conversation>,
    /// What the model is asked instead of the prompt, without an agent's tools.
    pub completion: Option<Completion>,
    /// How the claude of a run asks before it acts, if it does. A setup says it of its own agent.
    pub ask: Option<Ask>,
    /// The agent of a run, and what it is started with, where that is not claude.
    pub agent: Option<Setup>,
    /// What binds the agent of a run.
    pub rules: Rules,
    /// Whether it yields to all others: it is of a batch.
    pub yields: bool,
}

impl Spec {
    /// The same, for an app whose agents are bound by these rules. A completion has no agent.
    #[must_use]
    pub fn bound_by(self, rules: &Rules) -> Self {
        let bound = |setup| Setup { rules: rules.clone(), ..setup };
        let session = self.session.map(|conversation| Conversation { setup: bound(conversation.setup), ..conversation });
        let own = if self.completion.is_some() { Rules::default() } else { rules.clone() };
        Self { rules: own, session, agent: self.agent.map(bound), ..self }
    }
}

/// What binds an app's agents, beside what binds all.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Rules {
    /// What they reach of the network.
    #[serde(default)]
    pub network: Network,
    /// The name under which claude's memory folder is kept for them from run to run; none where it is not.
    #[serde(default)]
    pub memory: Option<String>,
}

impl Rules {
    /// What [`Rules::home`] is called: nothing lasts, or claude's memories do.
    pub const HOMES: [&'static str; 2] = ["fresh", "kept"];

    /// Those of the app of this name, by what its home is called.
    pub fn new(network: Network, home: &str, app: &str) -> Self {
        Self { network, memory: (home == Self::HOMES[1]).then(|| app.to_owned()) }
    }

    /// What lasts from one run to the next.
    pub fn home(&self) -> &'static str {
        Self::HOMES[usize::from(self.memory.is_some())]
    }
}

/// What an agent reaches of the network.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// What the server's user does.
    #[default]
    Open,
    /// The web outside private networks, and the models' APIs.
    Web,
    /// The models' APIs.
    Model,
}

/// The session that a turn is of.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Conversation {
    /// 32 hex digits.
    pub session_id: String,
    /// What its agent is started with.
    pub setup: Setup,
    /// What speaks to its agent.
    pub driver: Driver,
    /// What the agent calls the session, where it has said so.
    pub agent_session: Option<String>,
    /// The machine that it lives on; `None` for the server's own.
    pub worker: Option<String>,
}

/// With what a session's agent is started, each time anew, or that of a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// One of the configured agents.
    pub agent: String,
    /// The model of every turn.
    pub model: Option<String>,
    /// Added to the agent's own system prompt.
    pub system: Option<String>,
    /// `approve-all`, `approve-reads`, `deny-all` or `ask`.
    pub permissions: String,
    /// How it asks, if it does.
    pub ask: Option<Ask>,
    /// What binds it: not the session's own, but of whoever uses it.
    #[serde(default)]
    pub rules: Rules,
}

impl Network {
    /// The rule of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Open, Self::Web, Self::Model].into_iter().find(|rule| rule.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Web => "web",
            Self::Model => "model",
        }
    }
}

/// What speaks to a session's agent. A session keeps the one that it was created with.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// acpx.
    #[default]
    Acpx,
    /// This program.
    Direct,
}

impl Driver {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Acpx => "acpx",
            Self::Direct => "direct",
        }
    }
}

/// A file to attach.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Attachment {
    /// Its token, which is its name among the uploads. Earlier releases kept a whole path.
    #[serde(alias = "source", deserialize_with = "last_part")]
    pub file_token: String,
    /// A name without separators that does not begin with a dot.
    pub name: String,
    /// In bytes.
    #[serde(default)]
    pub size: u64,
}

fn last_part<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let path = String::deserialize(deserializer)?;
    Ok(path.rsplit('/').next().unwrap_or_default().to_owned())
}

/// Something that an agent says while it works.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "name", content = "data", rename_all = "snake_case")]
pub enum Event {
    /// A piece of the reply.
    Text {
        /// The piece.
        content: String,
    },
    /// A piece of what it thinks.
    Thinking {
        /// The piece.
        content: String,
    },
    /// It calls a tool.
    ToolCall {
        /// Its arguments.
        args: Value,
        /// The call's id.
        id: Value,
        /// The tool's name.
        name: Value,
    },
    /// A tool has answered.
    ToolCallUpdate {
        /// The call's id.
        id: Value,
        /// What it gave.
        result: Value,
        /// `completed` or `failed`.
        status: String,
    },
    /// The API is asked again.
    Retry {
        /// Counted from 1.
        attempt: Value,
        /// What was wrong.
        error: Value,
        /// At most so many.
        max_retries: Value,
    },
    /// An event of a completion's stream, as the Messages API has it.
    Model {
        /// Its type; of a delta and of a block's start with the type of that behind a dot.
        kind: String,
        /// The event, whole.
        event: Box<RawValue>,
    },
    /// It asks before it acts: the message whole, with what was added.
    PermissionRequest {
        /// The message.
        message: Box<RawValue>,
    },
    /// What it asked is answered.
    PermissionResolved {
        /// Which question.
        permission_id: String,
        /// With which option, if with any.
        option_id: Option<String>,
        /// By whom.
        by: By,
    },
    /// A message of the Agent Client Protocol, whole.
    Acp {
        /// The `type` that was added to it.
        kind: String,
        /// The message with what was added.
        message: Box<RawValue>,
    },
}

impl Event {
    /// Whether it is a piece of the reply.
    pub fn is_text(&self) -> bool {
        match self {
            Self::Text { .. } => true,
            Self::Acp { kind, .. } => kind == "text",
            Self::Model { kind, .. } => kind == "content_block_delta.text_delta",
            _ => false,
        }
    }
}

/// How an agent's work ended.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// It answered, and stopped for this reason.
    Completed(String),
    /// It failed; its own words where it gave any.
    Failed(String),
    /// The time was up; what it was doing, where it said.
    TimedOut(String),
    /// Nobody wants the answer any more.
    Cancelled,
    /// The server stopped.
    Interrupted,
    /// The machine of this name was not heard of any more.
    Lost(String),
    /// There is no such program.
    NotInstalled(String),
    /// It did not begin: what it needs could not be put in place.
    Unprepared(Unprepared),
}

impl Ending {
    /// Where it failed: the reason that is known better, if there is one.
    #[must_use]
    pub fn or_failed(self, known: Option<String>) -> Self {
        match (self, known) {
            (Self::Failed(_), Some(why)) => Self::Failed(why),
            (ending, _) => ending,
        }
    }
}

/// Why what an agent needs could not be put in place.
#[derive(Clone, Debug, Deserialize, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Unprepared {
    /// A file expired while it was waited for.
    #[error("a file expired")]
    FileExpired,
    /// The disk is full.
    #[error("the disk is full")]
    DiskFull,
    /// The disk failed, in words.
    #[error("the folder could not be made ready: {0}")]
    Disk(String),
}

/// Tokens and cost, as the agent reports them.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Usage {
    /// Tokens read, those from the cache included.
    pub input_tokens: Option<i64>,
    /// Of them, those that were read from the cache.
    #[serde(default)]
    pub cached_tokens: Option<i64>,
    /// Tokens written.
    pub output_tokens: Option<i64>,
    /// US dollars at list price, also where a subscription pays.
    pub cost_usd: Option<f64>,
}

/// What an agent told of a conversation.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Facts {
    /// What it calls the session.
    pub agent_session: Option<String>,
    /// What it says the session has cost since it was started, in US dollars.
    pub total_cost_usd: Option<f64>,
    /// Whether it was started for this turn.
    pub began: bool,
    /// With what its account began then, in US dollars: an agent that ended by itself goes on with what it had.
    #[serde(default)]
    pub began_at_usd: f64,
    /// The names of the attached files, in the session's folder.
    pub files: Vec<String>,
}

/// An agent's work that is over.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// The reply's text; of a turn as far as it came.
    pub text: String,
    /// Every message of a turn, in order, with what was added.
    pub events: Vec<Box<RawValue>>,
    /// What it used. Of a turn the cost stands in the facts, as a running total.
    pub usage: Usage,
    /// What it told of the conversation.
    pub facts: Facts,
    /// The model's message, of a completion.
    #[serde(default)]
    pub message: Option<Box<ModelMessage>>,
    /// The status by which the model's API refused, of what failed.
    #[serde(default)]
    pub api_status: Option<u16>,
    /// The last 4,000 characters of its standard error.
    pub stderr: String,
    /// From the start of the process.
    pub duration: Duration,
    /// From there to the first piece of the reply, where it came in pieces.
    #[serde(default)]
    pub first_text: Option<Duration>,
}

impl Outcome {
    /// Of what took no time.
    pub fn of(ending: Ending) -> Self {
        Self {
            ending,
            text: String::new(),
            events: Vec::new(),
            usage: Usage::default(),
            facts: Facts::default(),
            message: None,
            api_status: None,
            stderr: String::new(),
            duration: Duration::ZERO,
            first_text: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_can_be_read_again() {
        let message = RawValue::from_string(r#"{"z":1.10,"type":"plan"}"#.to_owned()).unwrap();
        for event in [Event::Text { content: "a".to_owned() }, Event::Acp { kind: "plan".to_owned(), message: message.clone() }] {
            let kept = serde_json::to_string(&event).unwrap();
            let read: Event = serde_json::from_str(&kept).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), kept);
        }
        let outcome = Outcome { events: vec![message], ..Outcome::of(Ending::Unprepared(Unprepared::FileExpired)) };
        let kept = serde_json::to_string(&outcome).unwrap();
        assert_eq!(serde_json::to_string(&serde_json::from_str::<Outcome>(&kept).unwrap()).unwrap(), kept);
    }

    #[test]
    fn a_file_that_an_earlier_release_kept_is_found_by_the_end_of_its_path() {
        let file: Attachment = serde_json::from_str(r#"{"source": "/data/files/ff_1", "name": "a", "size": 2}"#).unwrap();
        assert_eq!(file.file_token, "ff_1");
    }
}
