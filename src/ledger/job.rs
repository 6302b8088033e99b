//! A run or a turn, as its row has it.

use std::fmt;

use rusqlite::Row;
use serde::{Deserialize, Serialize};

use super::idempotency::Key;
use super::status::Status;
use crate::agent::contract::Facts;

/// Which run, or which turn of which session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobId {
    /// 32 hex digits.
    Run(String),
    /// A turn.
    Turn {
        /// 32 hex digits.
        session_id: String,
        /// Its number in the session, from 1. Those that failed count too.
        turn: i64,
    },
}

impl JobId {
    /// The job that is called so.
    pub fn named(name: &str) -> Option<Self> {
        match name.rsplit_once('-') {
            None => Some(Self::Run(name.to_owned())),
            Some((session_id, turn)) => Some(Self::Turn { session_id: session_id.to_owned(), turn: turn.parse().ok()? }),
        }
    }

    /// The table, and what is true of the row alone, by the first two parameters.
    pub(super) fn row(&self) -> (&'static str, &'static str) {
        match self {
            Self::Run(_) => ("runs", "run_id = ?1 AND ?2 IS NULL"),
            Self::Turn { .. } => ("session_events", "session_id = ?1 AND turn = ?2"),
        }
    }

    /// The first two parameters.
    pub(super) fn parameters(&self) -> (&str, Option<i64>) {
        match self {
            Self::Run(run_id) => (run_id, None),
            Self::Turn { session_id, turn } => (session_id, Some(*turn)),
        }
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(run_id) => f.write_str(run_id),
            Self::Turn { session_id, turn } => write!(f, "{session_id}-{turn}"),
        }
    }
}

/// What is known of a job before it starts.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What it is called.
    pub id: JobId,
    /// The caller's token name.
    pub app_name: String,
    /// The caller's address.
    pub client_ip: String,
    /// Who makes a run, where that is not claude. A turn's agent is its session's.
    pub agent: Option<String>,
    /// The model asked for.
    pub model: Option<String>,
    /// The prompt as the app sent it.
    pub prompt: String,
    /// The names of the files that come with it.
    pub files: Vec<String>,
    /// Who is told of its end.
    pub webhook: Option<String>,
    /// Bytes of the files that come with a turn, and stay in its session.
    pub attached: u64,
    /// Bytes that a session's files may have together.
    pub most_attached: u64,
    /// Where it goes on, and what has to be known to go on with it after a restart, of one that another machine carries out.
    pub elsewhere: Option<(Machine, String)>,
}

/// A machine that carries work out, from one start to its next; or a try of such a one to carry a job out.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Hash, Serialize)]
pub struct Machine {
    /// Its name.
    pub worker: String,
    /// That of the start, and behind a dot that of the try.
    pub instance: String,
}

impl Machine {
    /// A try of this machine to carry a job out. Work that comes twice is tried twice, and only one of them may.
    #[must_use]
    pub fn tries(&self, number: u64) -> Self {
        Self { worker: self.worker.clone(), instance: format!("{}.{number}", self.instance) }
    }

    /// Whether it is a try of this machine.
    pub fn is_of(&self, machine: &Self) -> bool {
        self.worker == machine.worker && self.instance.split('.').next() == Some(&machine.instance)
    }
}

/// Of a job that waits.
#[derive(Clone, Debug, Default)]
pub struct Queued {
    /// What it needs to be started after a restart; without one it ends with the server.
    pub request: Option<String>,
    /// The key under which it was asked for.
    pub key: Option<Key>,
}

/// What came of the wish for a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is there.
    Written,
    /// The key was taken before.
    KeyTaken,
    /// The session is closed.
    SessionClosed,
    /// The session's files would have more bytes than they may.
    TooMuchAttached,
}

/// What is known of a job at its end.
#[derive(Clone, Debug)]
pub struct JobEnd {
    /// Milliseconds from the process's start; the time in the queue is not in it.
    pub duration_ms: i64,
    /// Whether the agent answered.
    pub ok: bool,
    /// `end_turn` and its like from the agent, or `error`, `timeout`, `cancelled`, `interrupted`.
    pub stop_reason: String,
    /// What went wrong, in words.
    pub error: Option<String>,
    /// The reply's text.
    pub result: Option<String>,
    /// Milliseconds from the process's start to the first piece of the reply, where it came in pieces.
    pub first_text_ms: Option<i64>,
    /// Tokens read, those from the cache included.
    pub input_tokens: Option<i64>,
    /// Of them, those that were read from the cache.
    pub cached_tokens: Option<i64>,
    /// Tokens written.
    pub output_tokens: Option<i64>,
    /// What the agent says it would have cost, in US dollars.
    pub cost_usd: Option<f64>,
}

impl JobEnd {
    /// Of what never began.
    pub fn failed(stop_reason: &str, error: String) -> Self {
        Self {
            duration_ms: 0,
            ok: false,
            stop_reason: stop_reason.to_owned(),
            error: Some(error),
            result: None,
            first_text_ms: None,
            input_tokens: None,
            cached_tokens: None,
            output_tokens: None,
            cost_usd: None,
        }
    }
}

/// What is to be written at a job's end.
#[derive(Clone, Debug)]
pub struct Finish {
    /// How it ended.
    pub end: JobEnd,
    /// What its agent told of the session.
    pub facts: Facts,
    /// Whether its key may be used again: no agent has begun with it.
    pub frees_key: bool,
    /// Bytes that count no more among the session's files.
    pub gives_back: u64,
}

/// What was written at a job's end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Finished {
    /// The session's completed turns.
    pub turn_count: i64,
    /// What the job cost, in US dollars.
    pub cost_usd: Option<f64>,
    /// False where it was complete before.
    pub written: bool,
}

/// A job's row.
#[derive(Clone, Debug)]
pub struct JobRow {
    /// What it is called.
    pub id: JobId,
    /// The app.
    pub app_name: String,
    /// Who makes it; `None` for turns of older releases.
    pub agent: Option<String>,
    /// The model asked for.
    pub model: Option<String>,
    /// The prompt, or its beginning.
    pub prompt: String,
    /// The names of the files that came with it.
    pub files: Vec<String>,
    /// What has become of it.
    pub status: Status,
    /// The machine that carried it out, where that was not the server's own.
    pub worker: Option<String>,
    /// Unix seconds; `None` for a job of an older release.
    pub queued_at: Option<i64>,
    /// Unix seconds; of one that waits, when it was accepted.
    pub started_at: i64,
    /// The session's completed turns up to this one.
    pub turn_index: i64,
    /// Unix seconds, and what is known of its end.
    pub finished: Option<(i64, JobEnd)>,
}

/// Names of files, as they are kept.
pub(super) fn names(files: &[String]) -> Option<String> {
    (!files.is_empty()).then(|| serde_json::to_string(files).expect("names are JSON"))
}

/// Of a job, with so many characters of its texts as the third parameter says.
pub(super) const COLUMNS: &str =
    "app_name, nullif(model, ''), substr(prompt, 1, ?3), status, queued_at, started_at, finished_at, duration_ms, ok,
    stop_reason, error, substr(result, 1, ?3), input_tokens, output_tokens, cost_usd, agent, first_text_ms, cached_tokens, files, worker";

/// From [`COLUMNS`] and the turn's index.
pub(super) fn job_row(row: &Row<'_>, id: JobId) -> rusqlite::Result<JobRow> {
    let finished = match row.get(6)? {
        None => None,
        Some(finished_at) => Some((
            finished_at,
            JobEnd {
                duration_ms: row.get::<_, Option<i64>>(7)?.unwrap_or_default(),
                ok: row.get(8)?,
                stop_reason: row.get(9)?,
                error: row.get(10)?,
                result: row.get(11)?,
                input_tokens: row.get(12)?,
                output_tokens: row.get(13)?,
                cost_usd: row.get(14)?,
                first_text_ms: row.get(16)?,
                cached_tokens: row.get(17)?,
            },
        )),
    };
    Ok(JobRow {
        id,
        app_name: row.get(0)?,
        model: row.get(1)?,
        prompt: row.get(2)?,
        status: row.get(3)?,
        queued_at: row.get(4)?,
        started_at: row.get(5)?,
        agent: row.get(15)?,
        files: row.get::<_, Option<String>>(18)?.and_then(|files| serde_json::from_str(&files).ok()).unwrap_or_default(),
        worker: row.get(19)?,
        turn_index: row.get(20)?,
        finished,
    })
}
