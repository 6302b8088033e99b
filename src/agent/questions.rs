//! What an agent asks before it acts, from the question to the answer. Whoever carries a job out asks ([`Questions::ask`]) and hears the
//! answers ([`Questions::next`]); whoever may answer finds the open ones in the same place. What nobody answers in time is refused.

use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use crate::clock;

/// Questions that may be open at once in a job; more are refused.
const MOST_OPEN: usize = 64;

/// How an agent is to ask.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Ask {
    /// After how long a question is refused that nobody answered.
    pub timeout: Duration,
    /// Whether what is allowed may be allowed for always.
    pub allow_always: bool,
}

/// An answer that may be given.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// What the agent calls it.
    #[serde(alias = "optionId")]
    pub option_id: String,
    /// `allow_once`, `allow_always`, `reject_once` or `reject_always`.
    pub kind: String,
    /// What it says to people.
    #[serde(default)]
    pub name: String,
}

impl Choice {
    /// To answer a question that has no options of its own.
    pub fn of_a_wish_to_know() -> Vec<Self> {
        [["accept", "allow_once", "Answer"], ["decline", "reject_once", "Decline"]].map(Self::new).into()
    }

    /// To let a tool do what it is about to do.
    pub fn of_a_tool() -> Vec<Self> {
        [["allow", "allow_once", "Allow"], ["deny", "reject_once", "Deny"]].map(Self::new).into()
    }

    fn new([option_id, kind, name]: [&str; 3]) -> Self {
        Self { option_id: option_id.to_owned(), kind: kind.to_owned(), name: name.to_owned() }
    }
}

/// Something that an agent asks.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Question {
    /// 32 hex digits.
    pub permission_id: String,
    /// By which the agent knows it.
    pub agent_id: Value,
    /// Unix seconds.
    pub asked_at: i64,
    /// Unix seconds at which it is refused.
    pub expires_at: i64,
    /// Whether the agent wants to know something, and not to do it.
    pub is_elicitation: bool,
    /// What it may be answered with.
    pub options: Vec<Choice>,
    /// The agent's message, whole, with what was added.
    pub message: Box<RawValue>,
}

impl Question {
    /// A question of now. Its message is still to come.
    pub fn new(agent_id: Value, options: Vec<Choice>, ask: Ask) -> Self {
        let offered = |choice: &Choice| choice.kind.ends_with("_once") || ask.allow_always;
        let asked_at = clock::now();
        Self {
            permission_id: Uuid::now_v7().simple().to_string(),
            agent_id,
            asked_at,
            expires_at: asked_at + ask.timeout.as_secs().cast_signed(),
            is_elicitation: false,
            options: options.into_iter().filter(offered).collect(),
            message: RawValue::NULL.to_owned(),
        }
    }

    /// What is added to its message.
    pub fn added(&self) -> Map<String, Value> {
        let Self { permission_id, asked_at, expires_at, .. } = self;
        let Value::Object(added) = json!({"permission_id": permission_id, "asked_at": asked_at, "expires_at": expires_at}) else {
            return Map::new();
        };
        added
    }

    /// Whether an answer lets the agent go on.
    pub fn is_allowed(&self, answer: &Answer) -> bool {
        self.options.iter().any(|choice| Some(&choice.option_id) == answer.option_id.as_ref() && choice.kind.starts_with("allow"))
    }
}

/// What is answered.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Answer {
    /// One of the options; `None` where it is refused without one.
    pub option_id: Option<String>,
    /// What the tool gets instead of what it was to get.
    pub updated_input: Option<Value>,
    /// What the agent is told, where it is refused.
    pub message: Option<String>,
    /// To questions that are none of permission, by their texts or fields.
    pub answers: Option<Value>,
}

/// Which answer is meant.
#[derive(Clone, Debug)]
pub enum Pick {
    /// The option of this id.
    Option(String),
    /// To allow it, once.
    Allow,
    /// To refuse it, once.
    Deny,
}

impl Pick {
    /// The option that is meant.
    pub fn among(&self, options: &[Choice]) -> Option<String> {
        let is_it = |choice: &&Choice| match self {
            Self::Option(id) => choice.option_id == *id,
            Self::Allow => choice.kind == "allow_once",
            Self::Deny => choice.kind == "reject_once",
        };
        options.iter().find(is_it).map(|choice| choice.option_id.clone())
    }
}

/// Who answered.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// The app.
    Client,
    /// Nobody, in time.
    Timeout,
    /// Nobody: the agent does not wait for it any more.
    Cancel,
    /// The operator.
    Operator,
}

impl By {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Timeout => "timeout",
            Self::Cancel => "cancel",
            Self::Operator => "operator",
        }
    }
}

/// A question that is answered.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The question.
    pub question: Question,
    /// Its answer.
    pub answer: Answer,
    /// Who gave it.
    pub by: By,
}

/// What became of a question.
#[derive(Clone, Debug)]
pub enum Change {
    /// It was asked.
    Asked(Question),
    /// It is answered.
    Settled(Settled),
}

/// Why an answer was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotTaken {
    /// There is no such question here.
    Unknown,
    /// It does not have that option.
    NotOffered,
    /// It was answered otherwise.
    AnsweredOtherwise,
    /// It is over.
    Over,
}

/// The questions of a job. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Questions(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    /// For how much longer a question stays open here.
    grace: Duration,
}

#[derive(Debug, Default)]
struct State {
    open: Vec<(Question, Instant)>,
    settled: Vec<Settled>,
    /// Of those that are settled, how many the agent has been told.
    told: usize,
    /// From when on one was open, and for how long it was before.
    open_since: Option<Instant>,
    stood: Duration,
    record: Option<mpsc::UnboundedSender<Change>>,
}

impl State {
    fn settle(&mut self, at: usize, answer: Answer, by: By) {
        let (question, _) = self.open.remove(at);
        if self.open.is_empty() {
            self.stood += self.open_since.take().map(|since| since.elapsed()).unwrap_or_default();
        }
        let settled = Settled { question, answer, by };
        self.record.iter().for_each(|record| drop(record.send(Change::Settled(settled.clone()))));
        self.settled.push(settled);
    }
}

impl Questions {
    /// Those of a job that another machine decides on: it refuses what is not answered in time, and here that comes later.
    pub fn of_another(grace: Duration) -> Self {
        Self(Arc::new(Shared { grace, ..Shared::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all that becomes of them told, until [`Questions::end`].
    pub fn record(&self) -> mpsc::UnboundedReceiver<Change> {
        let (record, recorded) = mpsc::unbounded_channel();
        self.state().record = Some(record);
        recorded
    }

    /// Asks. The clock of the job stands from now on.
    pub fn ask(&self, question: Question) {
        let left = u64::try_from(question.expires_at - question.asked_at).unwrap_or(0);
        let mut state = self.state();
        state.open_since.get_or_insert_with(Instant::now);
        state.record.iter().for_each(|record| drop(record.send(Change::Asked(question.clone()))));
        state.open.push((question, Instant::now() + Duration::from_secs(left) + self.0.grace));
        if state.open.len() > MOST_OPEN {
            state.settle(MOST_OPEN, Answer::default(), By::Cancel);
        }
        drop(state);
        self.0.changed.send_replace(());
    }

    /// Those that are open.
    pub fn open(&self) -> Vec<Question> {
        self.state().open.iter().map(|(question, _)| question.clone()).collect()
    }

    /// Answers one.
    pub fn answer(&self, permission_id: &str, pick: &Pick, answer: Answer, by: By) -> Result<Settled, NotTaken> {
        let mut state = self.state();
        let Some(at) = state.open.iter().position(|(question, _)| question.permission_id == permission_id) else {
            let settled = state.settled.iter().find(|settled| settled.question.permission_id == permission_id).ok_or(NotTaken::Unknown)?;
            let option_id = pick.among(&settled.question.options);
            return again(settled.by, settled.answer == Answer { option_id, ..answer }).map(|()| settled.clone());
        };
        let option_id = pick.among(&state.open[at].0.options).ok_or(NotTaken::NotOffered)?;
        state.settle(at, Answer { option_id: Some(option_id), ..answer }, by);
        let settled = state.settled.last().cloned().ok_or(NotTaken::Unknown)?;
        drop(state);
        self.0.changed.send_replace(());
        Ok(settled)
    }

    /// It was settled elsewhere, if it is open.
    pub fn settle(&self, permission_id: &str, answer: Answer, by: By) {
        let mut state = self.state();
        if let Some(at) = state.open.iter().position(|(question, _)| question.permission_id == permission_id) {
            state.settle(at, answer, by);
        }
        drop(state);
        self.0.changed.send_replace(());
    }

    /// The agent takes a question back.
    pub fn withdraw(&self, agent_id: &Value) {
        self.cancel(|question| question.agent_id == *agent_id);
    }

    /// Nobody waits for answers any more.
    pub fn cancel_all(&self) {
        self.cancel(|_| true);
    }

    /// Nothing more becomes of them.
    pub fn end(&self) {
        self.cancel_all();
        self.state().record = None;
    }

    /// Nothing more is told of them, and they stay as they are.
    pub fn leave(&self) {
        self.state().record = None;
    }

    fn cancel(&self, which: impl Fn(&Question) -> bool) {
        let mut state = self.state();
        while let Some(at) = state.open.iter().position(|(question, _)| which(question)) {
            state.settle(at, Answer::default(), By::Cancel);
        }
        drop(state);
        self.0.changed.send_replace(());
    }

    /// The next one that is answered, which the agent is then to be told. For one listener.
    pub async fn next(&self) -> Settled {
        let mut changed = self.0.changed.subscribe();
        loop {
            let soonest = {
                let mut state = self.state();
                let now = Instant::now();
                while let Some(at) = state.open.iter().position(|(_, until)| *until <= now) {
                    let option_id = Pick::Deny.among(&state.open[at].0.options);
                    state.settle(at, Answer { option_id, ..Answer::default() }, By::Timeout);
                }
                if let Some(settled) = state.settled.get(state.told).cloned() {
                    state.told += 1;
                    return settled;
                }
                state.open.iter().map(|(_, until)| *until).min()
            };
            let expires = async {
                match soonest {
                    Some(soonest) => sleep_until(soonest).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                _ = changed.changed() => {}
                () = expires => {}
            }
        }
    }

    /// A deadline, less the time for which the clock stood; `None` while it stands.
    pub fn deadline(&self, deadline: Instant) -> Option<Instant> {
        let state = self.state();
        state.open_since.is_none().then_some(deadline + state.stood)
    }

    /// Comes when the time is up that ends at this deadline, and stands while a question is open.
    pub async fn time_up(&self, deadline: Instant) {
        let mut changed = self.0.changed.subscribe();
        loop {
            let up = async {
                match self.deadline(deadline) {
                    Some(deadline) => sleep_until(deadline).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                () = up => return,
                _ = changed.changed() => {}
            }
        }
    }
}

/// What comes of an answer to what was answered before.
pub fn again(by: By, same: bool) -> Result<(), NotTaken> {
    match by {
        By::Client | By::Operator if same => Ok(()),
        By::Client | By::Operator => Err(NotTaken::AnsweredOtherwise),
        By::Timeout | By::Cancel => Err(NotTaken::Over),
    }
}

#[cfg(test)]
mod tests;
