//! `/sessions/{id}/turn` and `/sessions/{id}/turns/{turn}`: the turns of a session.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Caller;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::render::{TurnFailure, TurnReply};
use super::sessions;
use super::stream::{self, SentEvent};
use super::submission::{self, SubmitOptions};
use super::validate::{attachments, check_files, check_prompt, check_timeout};
use super::view::TurnStatus;
use super::webhooks;
use crate::agent::contract::{Rules, Spec};
use crate::app::App;
use crate::ledger::{JobId, JobRow};

#[derive(Debug, Deserialize, Serialize, ToSchema)]
struct TurnBody {
    /// Up to 10 MiB.
    #[serde(default)]
    #[schema(required, min_length = 1, max_length = 10_485_760)]
    prompt: String,
    /// Tokens from `POST /files`. The files stay in the session's folder.
    #[schema(max_items = 256)]
    files: Option<Vec<String>>,
    /// How long the turn may take, in seconds; 600 by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 5, maximum = 3600)]
    timeout_secs: Option<i64>,
    /// Who is told of its end (`turn.finished`), where it goes on in the background; the app's own webhook by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "https://app.lan/hook")]
    webhook: Option<String>,
}

impl Validate for TurnBody {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_prompt(&self.prompt, &mut errors);
        check_files(self.files.as_deref(), &mut errors);
        check_timeout(self.timeout_secs, 3600, &mut errors);
        errors
    }
}

/// Send a turn
///
/// With `Accept: text/event-stream` the events come as they happen, last `result` with this body or `error` with the error's.
/// With `Prefer: respond-async` the turn goes on in the background. With an `Idempotency-Key` the request can be sent again.
#[utoipa::path(post, path = "/sessions/{id}/turn", operation_id = "take_turn", tag = "sessions", security(("app" = [])),
    params(
        ("id" = String, Path),
        ("Prefer" = Option<String>, Header, description = "`respond-async` for an answer at once (RFC 7240)"),
        ("Idempotency-Key" = Option<String>, Header, description = "Up to 255 characters; the same key and body lead to one turn, for 24 hours"),
    ),
    request_body = TurnBody, responses(
    (status = OK, headers(("x-turn" = i64, description = "The turn's number, where it was accepted before it started")), body = TurnReply),
    (status = ACCEPTED, description = "It goes on in the background; the body is as that of GET /sessions/{id}/turns/{turn}", headers(("location" = String, description = "Where to see it"))),
    (status = BAD_GATEWAY, body = TurnFailure, description = "The agent failed or ran out of time; the session stays usable"),
    (status = GONE, body = Problem, content_type = "application/problem+json", description = "The session is closed"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The turn was refused"),
))]
async fn turn(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    options: SubmitOptions,
    ValidJson(asked): ValidJson<TurnBody>,
) -> Result<Response, ApiError> {
    let session = sessions::find(&app, &caller, id).await?;
    let conversation = session.conversation();
    let new = session.new;
    let key = options.key(&caller.app, &format!("/sessions/{}/turn", new.session_id), &asked);
    if let Some(id) = submission::claimed(&app, key.as_ref()).await? {
        return submission::replay(&app, &caller, &options, &id).await;
    }
    if session.closed_at.is_some() {
        return Err(ApiError::Gone);
    }
    let webhook = webhooks::told_of(&app, &caller, &options, asked.webhook)?;
    let spec = Spec {
        prompt: asked.prompt,
        model: new.setup.model,
        system: None,
        schema: None,
        files: attachments(&app, &caller, asked.files.unwrap_or_default()).await?,
        timeout: Duration::from_secs(asked.timeout_secs.unwrap_or(600).cast_unsigned()),
        session: Some(conversation),
        completion: None,
        ask: None,
        agent: None,
        rules: Rules::default(),
        yields: false,
    };
    submission::submit(&app, &caller, &options, key, Uuid::nil(), spec, webhook).await
}

/// See a turn
#[utoipa::path(get, path = "/sessions/{id}/turns/{turn}", operation_id = "get_turn", tag = "sessions", security(("app" = [])),
    params(("id" = String, Path), ("turn" = i64, Path)), responses(
    (status = OK, body = TurnStatus),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn turn_status(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: Result<Path<(String, i64)>, PathRejection>,
) -> Result<Json<TurnStatus>, ApiError> {
    let (session_id, turn, row) = find_turn(&app, &caller, path).await?;
    Ok(Json(TurnStatus::new(&session_id, turn, row)))
}

/// Follow a turn
///
/// Its events from the first, or behind `Last-Event-ID`, and on as they happen, to `result` or `error`.
#[utoipa::path(get, path = "/sessions/{id}/turns/{turn}/events", operation_id = "follow_turn", tag = "sessions", security(("app" = [])),
    params(("id" = String, Path), ("turn" = i64, Path), ("Last-Event-ID" = Option<String>, Header)), responses(
    (status = OK, content((SentEvent = "text/event-stream"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn turn_events(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: Result<Path<(String, i64)>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (_, _, row) = find_turn(&app, &caller, path).await?;
    stream::follow(&app, &caller, &row.id, stream::last_event_id(&headers)?, None).await
}

#[derive(Serialize, ToSchema)]
struct TurnCancelled {
    ok: bool,
    session_id: String,
    turn: i64,
    /// Whether it was over before.
    already_over: bool,
}

/// Cancel a turn
///
/// When the answer comes, the turn is over, and so is what it ran.
#[utoipa::path(delete, path = "/sessions/{id}/turns/{turn}", operation_id = "cancel_turn", tag = "sessions", security(("app" = [])),
    params(("id" = String, Path), ("turn" = i64, Path)), responses(
    (status = OK, body = TurnCancelled),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn cancel_turn(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: Result<Path<(String, i64)>, PathRejection>,
) -> Result<Json<TurnCancelled>, ApiError> {
    let (session_id, turn, row) = find_turn(&app, &caller, path).await?;
    app.jobs.cancel(&row).await?;
    Ok(Json(TurnCancelled { ok: true, session_id, turn, already_over: row.finished.is_some() }))
}

#[derive(Serialize, ToSchema)]
struct TurnsCancelled {
    ok: bool,
    session_id: String,
    /// How many turns waited or went on.
    cancelled: usize,
}

/// Cancel a session's turns
///
/// The one that goes on and those that wait. When the answer comes they are over, and so is what they ran.
#[utoipa::path(post, path = "/sessions/{id}/cancel", operation_id = "cancel_turns", tag = "sessions", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = TurnsCancelled),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn cancel(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<TurnsCancelled>, ApiError> {
    let session_id = sessions::find(&app, &caller, id).await?.new.session_id;
    let cancelled = app.jobs.cancel_turns(&session_id).await;
    Ok(Json(TurnsCancelled { ok: true, session_id, cancelled }))
}

/// A turn of the caller's own session.
async fn find_turn(
    app: &App,
    caller: &Caller,
    path: Result<Path<(String, i64)>, PathRejection>,
) -> Result<(String, i64, JobRow), ApiError> {
    let Path((session_id, turn)) = path.map_err(|_| ApiError::NotFound)?;
    let id = JobId::Turn { session_id: session_id.clone(), turn };
    let row = app.ledger.job(&caller.app, &id).await?.ok_or(ApiError::NotFound)?;
    Ok((session_id, turn, row))
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(turn))
        .routes(routes!(turn_status, cancel_turn))
        .routes(routes!(turn_events))
        .routes(routes!(cancel))
}
