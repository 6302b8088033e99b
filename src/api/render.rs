//! What the caller gets of what came of a run or a turn.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::answer::Answer;
use super::error::ApiError;
use super::reply::Reply;
use crate::agent::contract::{Ending, Outcome, Unprepared};
use crate::agent::kinds::{self, Kind};
use crate::blocking::aside;
use crate::clock;
use crate::job::feed_format::End;
use crate::job::rejection::Rejection;
use crate::ledger::JobId;

#[derive(Serialize, ToSchema)]
pub(super) struct RunReply {
    ok: bool,
    /// The parsed value where the whole reply is a JSON object or array, the reply's text otherwise.
    #[schema(value_type = serde_json::Value)]
    result: Reply,
    /// Milliseconds; the time in the queue is not in it.
    duration_ms: i64,
    /// Why the model stopped.
    #[schema(example = "end_turn")]
    stop_reason: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct RunFailure {
    ok: bool,
    /// The cause in words.
    error: String,
    /// The last 4,000 characters of the CLI's standard error.
    stderr: String,
    /// Milliseconds; the time in the queue is not in it.
    duration_ms: i64,
    /// `timeout` where the time was up.
    #[schema(example = "error")]
    stop_reason: &'static str,
}

// Only described: events are written as they came.
/// An ACP message, whole, with the keys of its `type` added.
#[derive(Serialize, ToSchema)]
#[schema(as = Event)]
struct EventDocument {
    /// `text`, `thinking`, `tool_call`, `tool_call_update`, `plan`, `usage_update`, `permission_request`, `stop`, `error`,
    /// `protocol`, or the name of another update.
    r#type: String,
    /// Of `text`, `thinking` and `error`.
    content: Option<String>,
    /// Of `tool_call`: the last known name, arguments, result and status of the call.
    name: Option<String>,
    args: Option<Value>,
    result: Option<Value>,
    status: Option<String>,
    #[serde(flatten)]
    message: BTreeMap<String, Value>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct TurnReply {
    ok: bool,
    session_id: String,
    /// Counts the session's completed turns from 1.
    turn_index: i64,
    /// Every ACP message that the agent's client printed, with a `type` added.
    #[schema(value_type = Vec<EventDocument>)]
    events: Vec<Box<RawValue>>,
    /// The `content` of the `text` events, joined.
    text: String,
    /// Why the agent stopped.
    #[schema(example = "end_turn")]
    stop_reason: String,
    /// Milliseconds.
    duration_ms: i64,
    /// The names that the turn's files have in the session's folder, in the order of its `files`; only where it had some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    files: Vec<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct TurnFailure {
    ok: bool,
    session_id: String,
    #[schema(value_type = Vec<EventDocument>)]
    events: Vec<Box<RawValue>>,
    /// The cause in words.
    error: String,
    /// The last 4,000 characters of the client's standard error.
    stderr: String,
    /// `timeout` where the time was up.
    #[schema(example = "error")]
    stop_reason: &'static str,
    /// Milliseconds.
    duration_ms: i64,
    /// As in the answer of a turn that went well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    files: Vec<String>,
}

/// Whose answer it is.
#[derive(Clone, Debug)]
pub(super) enum Of {
    Run,
    /// Of a session of that id.
    Turn(String),
}

impl From<&JobId> for Of {
    fn from(id: &JobId) -> Self {
        match id {
            JobId::Run(_) => Self::Run,
            JobId::Turn { session_id, .. } => Self::Turn(session_id.clone()),
        }
    }
}

impl Of {
    /// The answer of what ended so.
    pub(super) fn answer(&self, end: &End) -> Answer {
        match (end, self) {
            (End::Settled { outcome, .. }, Self::Run) => aside(outcome.text.len(), || run(outcome)),
            (End::Settled { outcome, turn_index }, Self::Turn(session_id)) => {
                let bytes = outcome.events.iter().map(|event| event.get().len()).sum();
                aside(bytes, || turn(session_id, outcome, *turn_index))
            }
            (End::Rejected(Rejection::Cancelled), Self::Run) => run(&Outcome::of(Ending::Cancelled)),
            (End::Rejected(why @ Rejection::Unreadable), Self::Run) => run(&Outcome::of(Ending::Failed(why.to_string()))),
            (End::Rejected(why), _) => ApiError::from(why.clone()).into_answer(),
            (End::Sent { status, problem, body }, _) => Answer {
                status: StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                problem: *problem,
                body: body.clone().into(),
            },
        }
    }
}

fn run(outcome: &Outcome) -> Answer {
    let Outcome { ending, text, stderr, duration, .. } = outcome;
    let (duration_ms, stderr) = (clock::millis(*duration), stderr.clone());
    let failed =
        |status, stop_reason, error: String| Answer::json(status, &RunFailure { ok: false, error, stderr, duration_ms, stop_reason });
    match ending {
        Ending::Completed(stop_reason) => {
            let reply = RunReply { ok: true, result: Reply::read(text.clone()), duration_ms, stop_reason: stop_reason.clone() };
            Answer::json(StatusCode::OK, &reply)
        }
        Ending::Failed(error) => failed(StatusCode::BAD_GATEWAY, "error", error.clone()),
        Ending::TimedOut(error) => failed(StatusCode::BAD_GATEWAY, "timeout", error.clone()),
        Ending::Cancelled => failed(StatusCode::BAD_GATEWAY, "cancelled", "the run was cancelled".to_owned()),
        Ending::Interrupted => {
            failed(StatusCode::BAD_GATEWAY, "error", "the server stopped before the answer; send the prompt again".to_owned())
        }
        Ending::Lost(worker) => {
            let error = format!("the machine {worker} was lost before the answer; look what it has done, then send the prompt again");
            failed(StatusCode::BAD_GATEWAY, "error", error)
        }
        Ending::NotInstalled(program) => {
            let error = match kinds::with_program(program) {
                Some(Kind { name, package, .. }) => format!(
                    "{name} is not installed on the server (looked for \"{program}\"); install it with \"npm install -g {package}\""
                ),
                None => format!(
                    "the claude CLI is not installed on the server (looked for \"{program}\"); install it with \"npm install -g @anthropic-ai/claude-code\", or set CLAWDFORGE_CLAUDE_BIN"
                ),
            };
            failed(StatusCode::SERVICE_UNAVAILABLE, "error", error)
        }
        Ending::Unprepared(why) => unprepared(why, "run"),
    }
}

fn turn(session_id: &str, outcome: &Outcome, turn_index: i64) -> Answer {
    let Outcome { ending, text, events, facts, stderr, duration, .. } = outcome;
    let (session_id, events, files) = (session_id.to_owned(), events.clone(), facts.files.clone());
    let (duration_ms, text, stderr) = (clock::millis(*duration), text.clone(), stderr.clone());
    let (stop_reason, error) = match ending {
        Ending::Completed(stop_reason) => {
            let stop_reason = stop_reason.clone();
            return Answer::json(
                StatusCode::OK,
                &TurnReply { ok: true, session_id, turn_index, events, text, stop_reason, duration_ms, files },
            );
        }
        Ending::Failed(error) => ("error", error.clone()),
        Ending::TimedOut(error) => ("timeout", error.clone()),
        Ending::Cancelled => ("cancelled", "the turn was cancelled, or its session closed, before it ended".to_owned()),
        Ending::Interrupted => ("error", "the server stopped before the turn ended; send it again".to_owned()),
        Ending::Lost(worker) => ("error", format!("the machine {worker} was lost before the turn ended; send it again when it is back")),
        Ending::NotInstalled(program) => return ApiError::AcpxMissing(program.into()).into_answer(),
        Ending::Unprepared(why) => return unprepared(why, "turn"),
    };
    Answer::json(StatusCode::BAD_GATEWAY, &TurnFailure { ok: false, session_id, events, error, stderr, stop_reason, duration_ms, files })
}

fn unprepared(why: &Unprepared, what: &str) -> Answer {
    let refused = match why {
        Unprepared::FileExpired => ApiError::BadRequest(format!("Upload the files again: one of them expired while the {what} waited.")),
        Unprepared::DiskFull => ApiError::Rejected(Rejection::DiskFull),
        Unprepared::Disk(_) => ApiError::Rejected(Rejection::Disk),
    };
    refused.into_answer()
}
