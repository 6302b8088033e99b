//! `/sessions`: conversations of many turns.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Caller;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::run::{attachments, check_files, check_model, check_prompt};
use crate::agent::acpx::PERMISSIONS;
use crate::agent::events::Event;
use crate::clock;
use crate::ledger::{NewSession, Session, TurnRow};
use crate::server::App;
use crate::sessions::{Ending, Outcome, TurnRequest};

#[derive(Debug, Deserialize, ToSchema)]
struct SessionRequest {
    /// One of the server's agents; `claude` by default.
    agent: Option<String>,
    /// The model of every turn.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$")]
    model: Option<String>,
    /// The app's own object, kept as it is.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    meta: Option<Box<RawValue>>,
    /// What the agent may do without being asked: `approve-all` (the default), `approve-reads` or `deny-all`.
    #[schema(pattern = "^(approve-all|approve-reads|deny-all)$")]
    permissions: Option<String>,
}

impl Validate for SessionRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_model(self.model.as_deref(), &mut errors);
        if self.meta.as_ref().is_some_and(|meta| !meta.get().starts_with('{')) {
            errors.push(FieldError::new("/meta", "meta must be a JSON object"));
        }
        if self.permissions.as_ref().is_some_and(|wanted| PERMISSIONS.iter().all(|(name, _)| name != wanted)) {
            errors.push(FieldError::new("/permissions", "permissions must be approve-all, approve-reads or deny-all"));
        }
        errors
    }
}

#[derive(Serialize, ToSchema)]
struct SessionCreated {
    ok: bool,
    #[schema(pattern = "^[0-9a-f]{32}$")]
    session_id: String,
    agent: String,
    #[schema(required)]
    model: Option<String>,
    /// The session's folder on the server.
    cwd: String,
    /// Unix seconds.
    created_at: i64,
    #[schema(required, value_type = Option<BTreeMap<String, Value>>)]
    meta: Option<Box<RawValue>>,
}

#[derive(Debug, Deserialize, ToSchema)]
struct TurnBody {
    /// Up to 10 MiB.
    #[serde(default)]
    #[schema(required, min_length = 1, max_length = 10_485_760)]
    prompt: String,
    /// Tokens from `POST /files`.
    #[schema(max_items = 256)]
    files: Option<Vec<String>>,
    /// How long the turn may take, in seconds; 600 by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 5, maximum = 3600)]
    timeout_secs: Option<i64>,
}

impl Validate for TurnBody {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_prompt(&self.prompt, &mut errors);
        check_files(self.files.as_deref(), &mut errors);
        if self.timeout_secs.is_some_and(|secs| !(5..=3600).contains(&secs)) {
            errors.push(FieldError::new("/timeout_secs", "the timeout must be from 5 to 3600 seconds"));
        }
        errors
    }
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
struct TurnReply {
    ok: bool,
    session_id: String,
    /// Counts the session's completed turns from 1.
    turn_index: i64,
    /// Every ACP message that the agent's client printed, with a `type` added.
    #[schema(value_type = Vec<EventDocument>)]
    events: Vec<Event>,
    /// The `content` of the `text` events, joined.
    text: String,
    /// Why the agent stopped.
    #[schema(example = "end_turn")]
    stop_reason: String,
    /// Milliseconds.
    duration_ms: i64,
}

#[derive(Serialize, ToSchema)]
struct TurnFailure {
    ok: bool,
    session_id: String,
    #[schema(value_type = Vec<EventDocument>)]
    events: Vec<Event>,
    /// The cause in words.
    error: String,
    /// The last 4,000 characters of the client's standard error.
    stderr: String,
    /// `timeout` where the time was up.
    #[schema(example = "error")]
    stop_reason: &'static str,
    /// Milliseconds.
    duration_ms: i64,
}

#[derive(Serialize, ToSchema)]
struct SessionState {
    session_id: String,
    agent: String,
    #[schema(required)]
    model: Option<String>,
    cwd: String,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds of the end of the last turn.
    #[schema(required)]
    last_turn_at: Option<i64>,
    turn_count: i64,
    /// Unix seconds.
    #[schema(required)]
    closed_at: Option<i64>,
    /// Whether a turn could be sent.
    live: bool,
    #[schema(required, value_type = Option<BTreeMap<String, Value>>)]
    meta: Option<Box<RawValue>>,
    permissions: String,
}

impl From<Session> for SessionState {
    fn from(session: Session) -> Self {
        Self {
            meta: meta(&session),
            session_id: session.new.session_id,
            agent: session.new.agent,
            model: session.new.model,
            cwd: session.new.cwd,
            created_at: session.created_at,
            last_turn_at: session.last_turn_at,
            turn_count: session.turn_count,
            closed_at: session.closed_at,
            live: session.closed_at.is_none(),
            permissions: session.new.permissions,
        }
    }
}

/// The app's own object, to the letter.
fn meta(session: &Session) -> Option<Box<RawValue>> {
    session.new.meta.clone().and_then(|meta| RawValue::from_string(meta).ok())
}

#[derive(Serialize, ToSchema)]
struct SessionList {
    sessions: Vec<SessionState>,
    count: usize,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// False leaves the closed ones out.
    #[param(value_type = bool, required = false, default = true)]
    include_closed: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct SessionClosed {
    ok: bool,
    session_id: String,
    already_closed: bool,
}

/// Create a session
#[utoipa::path(post, path = "/sessions", operation_id = "create_session", tag = "sessions", security(("app" = [])), request_body = SessionRequest, responses(
    (status = OK, body = SessionCreated),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The session was not created"),
))]
async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    ValidJson(asked): ValidJson<SessionRequest>,
) -> Result<Json<SessionCreated>, ApiError> {
    let agent = asked.agent.unwrap_or_else(|| "claude".to_owned());
    if !app.agents.contains(&agent) {
        let detail = format!("the agent must be one of {}", app.agents.join(", "));
        return Err(ApiError::Invalid(vec![FieldError::new("/agent", detail)]));
    }
    let session_id = Uuid::now_v7().simple().to_string();
    let new = NewSession {
        cwd: app.sessions.cwd(&session_id).display().to_string(),
        session_id,
        app_name: caller.app,
        agent,
        model: asked.model,
        permissions: asked.permissions.unwrap_or_else(|| "approve-all".to_owned()),
        meta: asked.meta.map(|meta| meta.get().to_owned()),
    };
    let session = app.sessions.create(new).await?;
    let meta = meta(&session);
    let NewSession { session_id, agent, model, cwd, .. } = session.new;
    Ok(Json(SessionCreated { ok: true, session_id, agent, model, cwd, created_at: session.created_at, meta }))
}

/// Send a turn
#[utoipa::path(post, path = "/sessions/{id}/turn", operation_id = "take_turn", tag = "sessions", security(("app" = [])), params(("id" = String, Path)),
    request_body = TurnBody, responses(
    (status = OK, body = TurnReply),
    (status = BAD_GATEWAY, body = TurnFailure, description = "The agent failed or ran out of time; the session stays usable"),
    (status = GONE, body = Problem, content_type = "application/problem+json", description = "The session is closed"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The turn was refused"),
))]
async fn turn(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    ValidJson(asked): ValidJson<TurnBody>,
) -> Result<Response, ApiError> {
    let session = find(&app, &caller, id).await?;
    if session.closed_at.is_some() {
        return Err(ApiError::Gone);
    }
    let session_id = session.new.session_id.clone();
    let request = TurnRequest {
        row: TurnRow { session_id: session_id.clone(), client_ip: caller.address.to_string(), prompt: asked.prompt },
        files: attachments(&app, &caller, asked.files.unwrap_or_default()).await?,
        timeout: Duration::from_secs(asked.timeout_secs.unwrap_or(600).cast_unsigned()),
        limits: caller.limits,
    };
    Ok(answer(session_id, app.sessions.turn(session, request).await?))
}

fn answer(session_id: String, outcome: Outcome) -> Response {
    let Outcome { ending, turn_index, events, text, stderr, duration } = outcome;
    let duration_ms = clock::millis(duration);
    let (stop_reason, error) = match ending {
        Ending::Completed(stop_reason) => {
            return Json(TurnReply { ok: true, session_id, turn_index, events, text, stop_reason, duration_ms }).into_response();
        }
        Ending::Failed(error) => ("error", error),
        Ending::TimedOut(error) => ("timeout", error),
        Ending::Cancelled => ("error", "the session was closed before the turn ended".to_owned()),
        Ending::Interrupted => ("error", "the server stopped before the turn ended; send it again".to_owned()),
    };
    (StatusCode::BAD_GATEWAY, Json(TurnFailure { ok: false, session_id, events, error, stderr, stop_reason, duration_ms })).into_response()
}

/// See a session's state
#[utoipa::path(get, path = "/sessions/{id}", operation_id = "get_session", tag = "sessions", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = SessionState),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn state(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<SessionState>, ApiError> {
    Ok(Json(find(&app, &caller, id).await?.into()))
}

/// List one's sessions, newest first
#[utoipa::path(get, path = "/sessions", operation_id = "list_sessions", tag = "sessions", security(("app" = [])), params(ListQuery), responses(
    (status = OK, body = SessionList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<SessionList>, ApiError> {
    let wrong = || ApiError::BadRequest("Set include_closed once, to true or false.".to_owned());
    let Query(query) = query.map_err(|_| wrong())?;
    let include_closed = match query.include_closed.as_deref().map(str::to_ascii_lowercase).as_deref() {
        // Python clients write True and False.
        None | Some("true" | "1") => true,
        Some("false" | "0") => false,
        Some(_) => return Err(wrong()),
    };
    let sessions: Vec<_> = app.ledger.sessions(&caller.app, include_closed).await?.into_iter().map(SessionState::from).collect();
    Ok(Json(SessionList { count: sessions.len(), sessions }))
}

/// Close a session
#[utoipa::path(delete, path = "/sessions/{id}", operation_id = "close_session", tag = "sessions", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = SessionClosed),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn close(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<SessionClosed>, ApiError> {
    let session = find(&app, &caller, id).await?;
    let session_id = session.new.session_id.clone();
    let closed = app.sessions.close(session).await?;
    Ok(Json(SessionClosed { ok: true, session_id, already_closed: !closed }))
}

/// The caller's own session; another's does not exist.
async fn find(app: &App, caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<Session, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound)?;
    app.ledger.session(&caller.app, &id).await?.ok_or(ApiError::NotFound)
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(state, close)).routes(routes!(turn))
}
