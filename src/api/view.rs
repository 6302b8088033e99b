//! Runs and turns as far as they have come, from their rows.

use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use super::reply::Reply;
use crate::agent::contract::{Ending, Outcome};
use crate::job::feed_format::End;
use crate::ledger::{JobEnd, JobRow, Status};

/// A run, as far as it has come.
#[derive(Serialize, ToSchema)]
pub(super) struct RunState {
    #[schema(pattern = "^[0-9a-f]{32}$")]
    run_id: String,
    /// `queued`, `running`, `succeeded`, `failed`, `timed_out`, `cancelled` or `interrupted` (by the end of the server).
    #[schema(example = "running")]
    status: String,
    agent: String,
    /// Null where another agent than claude chose its own.
    #[schema(required)]
    model: Option<String>,
    /// Unix seconds of its acceptance.
    #[schema(required)]
    queued_at: Option<i64>,
    /// Unix seconds.
    #[schema(required)]
    started_at: Option<i64>,
    /// Unix seconds.
    #[schema(required)]
    finished_at: Option<i64>,
    /// Milliseconds; the time in the queue is not in it.
    #[schema(required)]
    duration_ms: Option<i64>,
    /// As in the answer of `POST /run`.
    #[schema(required, value_type = serde_json::Value)]
    result: Option<Reply>,
    /// What went wrong, in words.
    #[schema(required)]
    error: Option<String>,
    #[schema(required)]
    stop_reason: Option<String>,
    #[schema(required)]
    input_tokens: Option<i64>,
    #[schema(required)]
    output_tokens: Option<i64>,
    #[schema(required)]
    cost_usd: Option<f64>,
}

impl RunState {
    /// The same, without what the agent answered.
    pub(super) fn without_answer(self) -> Self {
        Self { result: None, ..self }
    }
}

impl From<JobRow> for RunState {
    fn from(row: JobRow) -> Self {
        let (finished_at, end) = row.finished.unzip();
        let end = end.unwrap_or_else(nothing);
        let known = finished_at.is_some();
        Self {
            run_id: row.id.to_string(),
            status: row.status.to_string(),
            agent: row.agent.unwrap_or_default(),
            model: row.model,
            queued_at: row.queued_at,
            started_at: (row.status != Status::Queued).then_some(row.started_at),
            finished_at,
            duration_ms: known.then_some(end.duration_ms),
            result: end.result.map(Reply::read),
            error: end.error,
            stop_reason: known.then_some(end.stop_reason),
            input_tokens: end.input_tokens,
            output_tokens: end.output_tokens,
            cost_usd: end.cost_usd,
        }
    }
}

/// A turn, as far as it has come.
#[derive(Serialize, ToSchema)]
pub(super) struct TurnStatus {
    session_id: String,
    /// Its number in the session, from 1; those that failed count too.
    turn: i64,
    /// `queued`, `running`, `succeeded`, `failed`, `timed_out`, `cancelled` or `interrupted` (by the end of the server).
    #[schema(example = "running")]
    status: String,
    /// Unix seconds of its acceptance.
    #[schema(required)]
    queued_at: Option<i64>,
    /// Unix seconds.
    #[schema(required)]
    started_at: Option<i64>,
    /// Unix seconds.
    #[schema(required)]
    finished_at: Option<i64>,
    /// Milliseconds.
    #[schema(required)]
    duration_ms: Option<i64>,
    /// As in the answer of the turn.
    #[schema(required)]
    text: Option<String>,
    /// What went wrong, in words.
    #[schema(required)]
    error: Option<String>,
    #[schema(required)]
    stop_reason: Option<String>,
    #[schema(required)]
    input_tokens: Option<i64>,
    #[schema(required)]
    output_tokens: Option<i64>,
    #[schema(required)]
    cost_usd: Option<f64>,
}

impl TurnStatus {
    /// The same, without what the agent answered.
    pub(super) fn without_answer(self) -> Self {
        Self { text: None, ..self }
    }

    pub(super) fn new(session_id: &str, turn: i64, row: JobRow) -> Self {
        let (finished_at, end) = row.finished.unzip();
        let end = end.unwrap_or_else(nothing);
        let known = finished_at.is_some();
        Self {
            session_id: session_id.to_owned(),
            turn,
            status: row.status.to_string(),
            queued_at: row.queued_at,
            started_at: (row.status != Status::Queued).then_some(row.started_at),
            finished_at,
            duration_ms: known.then_some(end.duration_ms),
            text: end.result,
            error: end.error,
            stop_reason: known.then_some(end.stop_reason),
            input_tokens: end.input_tokens,
            output_tokens: end.output_tokens,
            cost_usd: end.cost_usd,
        }
    }
}

/// A run in a list.
#[derive(Serialize, ToSchema)]
pub(super) struct ListedRun {
    run_id: String,
    app_name: String,
    #[schema(example = "succeeded")]
    status: String,
    agent: String,
    /// Null where another agent than claude chose its own.
    #[schema(required)]
    model: Option<String>,
    /// Unix seconds; of one that waits, when it was accepted.
    started_at: i64,
    /// Unix seconds.
    #[schema(required)]
    finished_at: Option<i64>,
    /// Milliseconds; the time in the queue is not in it.
    #[schema(required)]
    duration_ms: Option<i64>,
    #[schema(required)]
    stop_reason: Option<String>,
    #[schema(required)]
    error: Option<String>,
    #[schema(required)]
    input_tokens: Option<i64>,
    #[schema(required)]
    output_tokens: Option<i64>,
    #[schema(required)]
    cost_usd: Option<f64>,
    /// Its first 200 characters.
    prompt: String,
    /// Its first 200 characters.
    #[schema(required)]
    result: Option<String>,
}

impl From<JobRow> for ListedRun {
    fn from(row: JobRow) -> Self {
        let (finished_at, end) = row.finished.unzip();
        let end = end.unwrap_or_else(nothing);
        let known = finished_at.is_some();
        Self {
            run_id: row.id.to_string(),
            app_name: row.app_name,
            status: row.status.to_string(),
            agent: row.agent.unwrap_or_default(),
            model: row.model,
            started_at: row.started_at,
            finished_at,
            duration_ms: known.then_some(end.duration_ms),
            stop_reason: known.then_some(end.stop_reason),
            error: end.error,
            input_tokens: end.input_tokens,
            output_tokens: end.output_tokens,
            cost_usd: end.cost_usd,
            prompt: row.prompt,
            result: end.result,
        }
    }
}

/// What is known of the end of a job that has none.
fn nothing() -> JobEnd {
    JobEnd { error: None, ..JobEnd::failed("", String::new()) }
}

/// How a job ended, as far as its row tells: of a turn without its events. `None` while it goes on.
pub(super) fn end_of(row: &JobRow) -> Option<End> {
    let (_, JobEnd { duration_ms, ok, stop_reason, error, result, .. }) = row.finished.as_ref()?;
    let error = error.clone().unwrap_or_default();
    let ending = match row.status {
        _ if *ok => Ending::Completed(stop_reason.clone()),
        Status::Cancelled => Ending::Cancelled,
        Status::Interrupted => Ending::Interrupted,
        Status::TimedOut => Ending::TimedOut(error),
        Status::Queued | Status::Running | Status::Succeeded | Status::Failed => Ending::Failed(error),
    };
    let (text, duration) = (result.clone().unwrap_or_default(), Duration::from_millis(duration_ms.unsigned_abs()));
    let outcome = Box::new(Outcome { text, duration, ..Outcome::of(ending) });
    Some(End::Settled { outcome, turn_index: row.turn_index })
}
