//! `/runs`: what became of one's runs.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Caller;
use super::error::{ApiError, Problem};
use super::run::{RunFailure, render};
use super::work::{self, Work};
use crate::agent::reply::Reply;
use crate::feed::Final;
use crate::ledger::{RunEnd, RunRow};
use crate::runs::{Ending, Outcome};
use crate::server::App;

/// A run, as far as it has come.
#[derive(Serialize, ToSchema)]
pub(super) struct RunState {
    #[schema(pattern = "^[0-9a-f]{32}$")]
    run_id: String,
    /// `queued`, `running`, `succeeded`, `failed`, `timed_out`, `cancelled` or `interrupted` (by the end of the server).
    #[schema(example = "running")]
    status: String,
    model: String,
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

impl From<RunRow> for RunState {
    fn from(row: RunRow) -> Self {
        let RunRow { new, status, queued_at, started_at, finished } = row;
        let finished_at = finished.as_ref().map(|(at, _)| *at);
        let end = finished.map(|(_, end)| end);
        let started_at = (status != "queued").then_some(started_at);
        let (mut stop_reason, mut error, mut result) = (None, None, None);
        let (mut duration_ms, mut input_tokens, mut output_tokens, mut cost_usd) = (None, None, None, None);
        if let Some(end) = end {
            (stop_reason, error, result) = (Some(end.stop_reason), end.error, end.result.map(Reply::read));
            duration_ms = Some(end.duration_ms);
            (input_tokens, output_tokens, cost_usd) = (end.input_tokens, end.output_tokens, end.cost_usd);
        }
        Self {
            run_id: new.run_id,
            status,
            model: new.model,
            queued_at,
            started_at,
            finished_at,
            duration_ms,
            result,
            error,
            stop_reason,
            input_tokens,
            output_tokens,
            cost_usd,
        }
    }
}

/// The answer of a run, as far as its row tells. `None` while there is none.
pub(super) async fn answer_of(app: &App, caller: &str, run_id: &str) -> Result<Option<Final>, ApiError> {
    let row = app.ledger.run(caller, run_id).await?.ok_or(ApiError::NotFound)?;
    let Some((_, RunEnd { duration_ms, ok, stop_reason, error, result, .. })) = row.finished else { return Ok(None) };
    let ending = match (row.status.as_str(), error.unwrap_or_default()) {
        _ if ok => Ending::Replied { text: result.unwrap_or_default(), stop_reason },
        ("cancelled", _) => Ending::Cancelled,
        ("interrupted", _) => Ending::Interrupted,
        ("timed_out", error) => Ending::TimedOut(error),
        (_, error) => Ending::Failed(error),
    };
    let duration = Duration::from_millis(duration_ms.unsigned_abs());
    Ok(Some(render(Ok(Outcome { ending, stderr: String::new(), duration }))))
}

/// See a run
#[utoipa::path(get, path = "/runs/{id}", operation_id = "get_run", tag = "runs", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = RunState),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn state(State(app): State<Arc<App>>, caller: Caller, id: Result<Path<String>, PathRejection>) -> Result<Json<RunState>, ApiError> {
    Ok(Json(find(&app, &caller, id).await?.into()))
}

/// Follow a run
///
/// Its events from the first, or behind `Last-Event-ID`, and on as they happen, to `result` or `error`.
#[utoipa::path(get, path = "/runs/{id}/events", operation_id = "follow_run", tag = "runs", security(("app" = [])),
    params(("id" = String, Path), ("Last-Event-ID" = Option<String>, Header)), responses(
    (status = OK, content((work::SentEvent = "text/event-stream")), description = "`result` has this body", headers(("x-run-id" = String))),
    (status = BAD_GATEWAY, body = RunFailure, description = "Never sent as a status: the body of the event `error`"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn events(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let row = find(&app, &caller, id).await?;
    let run_id = row.new.run_id.clone();
    work::follow(&app, Work::Run(&caller.app, &run_id), work::last_event_id(&headers)?, None).await
}

#[derive(Serialize, ToSchema)]
struct RunCancelled {
    ok: bool,
    run_id: String,
    /// Whether it was over before.
    already_over: bool,
}

/// Cancel a run
///
/// When the answer comes, the run is over, and so are its processes.
#[utoipa::path(delete, path = "/runs/{id}", operation_id = "cancel_run", tag = "runs", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = RunCancelled),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn cancel(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<RunCancelled>, ApiError> {
    let RunRow { new, finished, .. } = find(&app, &caller, id).await?;
    app.feeds.cancel(&new.run_id).await;
    if finished.is_none() {
        // One that waits for the next start of the server has only its row.
        let end = RunEnd::failed("cancelled", "it was cancelled before it began".to_owned());
        app.ledger.finish_run(&new.run_id, end).await?;
    }
    Ok(Json(RunCancelled { ok: true, run_id: new.run_id, already_over: finished.is_some() }))
}

/// The caller's own run; another's does not exist.
async fn find(app: &App, caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<RunRow, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound)?;
    app.ledger.run(&caller.app, &id).await?.ok_or(ApiError::NotFound)
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(state, cancel)).routes(routes!(events))
}
