//! What goes between machines, and where. JSON, by `serde`: all machines of a house have the same release, and those of another protocol
//! don't meet.

use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::agent::contract::{Conversation, Driver, Event, Outcome, Setup};
use crate::agent::questions::{Answer, By, Question};
use crate::ledger::Machine;

/// The stream of work that is handed out. Each piece is gone when a machine has taken it.
pub const WORK: &str = "clawdforge-1-work";
/// The consumer of that from which any machine with a free place takes runs.
pub const ANY: &str = "any";
/// The bucket of files.
pub const FILES: &str = "clawdforge-1-files";
/// The header that says how many bytes of a job's lines came before.
pub const AT: &str = "Clawdforge-At";
/// Bytes of a message, at most. NATS takes 1 MiB.
pub const MOST: usize = 256 << 10;
/// The place of a machine's name in subjects of what is no machine's.
pub const NOBODY: &str = "_";

/// The stream of what is said to a gateway.
pub fn events_stream(gateway: &str) -> String {
    format!("clawdforge-1-events-{gateway}")
}

/// The consumer of work for one machine alone.
pub fn consumer_of(worker: &str) -> String {
    format!("on-{worker}")
}

/// Where work is put: for one machine, or for any.
pub fn work(worker: Option<&str>) -> String {
    worker.map_or_else(|| "clawdforge.1.work.any".to_owned(), |worker| format!("clawdforge.1.work.on.{worker}"))
}

/// Where a machine says what becomes of a job.
pub fn events(gateway: &str, worker: &str, name: &str) -> String {
    format!("clawdforge.1.events.{gateway}.{worker}.{name}")
}

/// Where a machine asks a gateway something.
pub fn ask(gateway: &str, worker: &str) -> String {
    format!("clawdforge.1.ask.{gateway}.{worker}")
}

/// Where a machine says that it is there.
pub fn beat(worker: &str) -> String {
    format!("clawdforge.1.beat.{worker}")
}

/// Where a gateway says that it is there, and who it is.
pub const HELLO: &str = "clawdforge.1.hello";

/// Where a machine is told what to do at once.
pub fn order(worker: &str) -> String {
    format!("clawdforge.1.order.{worker}")
}

/// Which job of which gateway.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Hash, Serialize)]
pub struct Name {
    /// What its ledger is known by.
    pub gateway: String,
    /// What the job is called there.
    pub job: String,
}

/// A run or a turn that is to be carried out.
#[derive(Debug, Deserialize, Serialize)]
pub struct Work {
    /// What it is called.
    pub name: Name,
    /// A run's id.
    pub uuid: Uuid,
    /// What is to be done.
    pub spec: Asked,
}

/// What is to be done, a [`Spec`](crate::agent::contract::Spec), or where that stands.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// Here.
    Inline(Box<RawValue>),
    /// In the bucket of files, under this name: it is too large for a message.
    Stored(String),
}

/// What a machine asks a gateway.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// May it start this job? The answer is a [`bool`].
    Claim {
        /// The job.
        job: String,
        /// The machine, and which of its tries.
        machine: Machine,
    },
    /// These sessions live there. Which of them are over? The answer is a [`Held`].
    Holds(Vec<String>),
}

/// Of a machine's sessions, those that it has nothing to do with any more.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Held {
    /// Closed: their agents are to end.
    pub closed: Vec<Conversation>,
    /// Deleted: nothing of them is to stay.
    pub unknown: Vec<String>,
}

/// That a machine is there. Each two seconds.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Beat {
    /// The machine.
    pub machine: Machine,
    /// The release that it runs.
    pub version: String,
    /// Runs that it may have at once; none where it is stopping.
    pub places: usize,
    /// What it carries out.
    pub jobs: Vec<Name>,
    /// Unix milliseconds of its clock.
    pub now_ms: i64,
    /// Unix seconds of its start.
    pub started_at: i64,
    /// Whether it takes no more.
    pub stopping: bool,
}

/// A line of what is said of a job.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The agent said something.
    Event(Event),
    /// It asks.
    Asked(Box<Question>),
    /// That is over, by the agent or by time.
    Settled {
        /// Which question.
        permission_id: String,
        /// With which answer.
        answer: Answer,
        /// By whom.
        by: By,
    },
    /// It is over for its caller.
    Outcome(Box<Outcome>),
    /// Nothing of it is left.
    Gone,
}

/// What a machine is told to do at once. Each can be told twice.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// To end a job. The answer is `true`.
    Cancel(Name),
    /// To tell an agent the answer to its question. The answer is `true`.
    Answer {
        /// The job.
        name: Name,
        /// Which question.
        permission_id: String,
        /// What is answered.
        answer: Answer,
        /// Who answered.
        by: By,
    },
    /// To name a session that is to be. The answer is a [`Taken`].
    Take {
        /// With what its agent is started.
        setup: Setup,
        /// Whether one that was started ahead will do.
        ahead: bool,
    },
    /// To take it back. The answer is `true`.
    GiveBack(String),
    /// To make it. The answer is a `Result<String, Unmade>`, with what its driver calls it.
    Create {
        /// Whose it is.
        gateway: String,
        /// What it is to be.
        conversation: Conversation,
    },
    /// To end its agent. The answer is `true`.
    Close(Conversation),
    /// To take away all that there is of it. The answer is a `Result<(), Unmade>`.
    Remove(String),
}

/// A session that is to be.
#[derive(Debug, Deserialize, Serialize)]
pub struct Taken {
    /// The id that it has to have.
    pub session_id: String,
    /// The folder that its agent works in.
    pub cwd: String,
    /// What is to speak to its agent.
    pub driver: Driver,
}

/// What a gateway says of itself.
#[derive(Debug, Deserialize, Serialize)]
pub struct Hello {
    /// What its ledger is known by.
    pub gateway: String,
}

/// As it is sent.
pub fn bytes(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("what goes between machines is JSON").into()
}
