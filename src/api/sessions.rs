//! `/sessions`: conversations of many turns.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::time::sleep;
use tokio_util::sync::DropGuard;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Caller;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::run::{attachments, check_files, check_model, check_prompt};
use super::work::{self, Wish, Work};
use crate::agent::acpx::{APPROVE_ALL, CLAUDE_AGENT, PERMISSIONS};
use crate::agent::events::Event;
use crate::clock;
use crate::feed::Final;
use crate::ledger::{NewSession, RunEnd, Session, TurnRow, TurnState, turn_id};
use crate::server::App;
use crate::sessions::{Ending, Outcome, Refused, Submitted, TurnDetails, TurnRequest};

const TURN: HeaderName = HeaderName::from_static("x-turn");

#[derive(Debug, Deserialize, Serialize, ToSchema)]
struct SessionRequest {
    /// One of the server's agents; `claude` by default.
    agent: Option<String>,
    /// The model of every turn. Only claude can be told of one.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$")]
    model: Option<String>,
    /// The app's own object, kept as it is.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    meta: Option<Box<RawValue>>,
    /// What the agent may do without being asked: `approve-all` (the default), `approve-reads` or `deny-all`. Others than claude
    /// can only have the first.
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
    /// The names that the turn's files have in the session's folder, in the order of its `files`; only where it had some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    files: Vec<String>,
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
    /// As in the answer of a turn that went well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    files: Vec<String>,
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
#[utoipa::path(post, path = "/sessions", operation_id = "create_session", tag = "sessions", security(("app" = [])),
    params(("Idempotency-Key" = Option<String>, Header, description = "Up to 255 characters; the same key and body lead to one session, for 24 hours")),
    request_body = SessionRequest, responses(
    (status = OK, body = SessionCreated),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The session was not created"),
))]
async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    wish: Wish,
    ValidJson(asked): ValidJson<SessionRequest>,
) -> Result<Json<SessionCreated>, ApiError> {
    let key = wish.key(&caller.app, "/sessions", &asked);
    if let Some(session_id) = work::claimed(&app, key.as_ref()).await? {
        return created_before(&app, &caller, &session_id).await;
    }
    let agent = asked.agent.clone().unwrap_or_else(|| CLAUDE_AGENT.to_owned());
    check_agent(&app, &agent, &asked)?;
    let session_id = Uuid::now_v7().simple().to_string();
    let new = NewSession {
        cwd: app.sessions.cwd(&session_id).display().to_string(),
        session_id,
        app_name: caller.app.clone(),
        agent,
        model: asked.model,
        permissions: asked.permissions.unwrap_or_else(|| APPROVE_ALL.to_owned()),
        meta: asked.meta.map(|meta| meta.get().to_owned()),
    };
    let Some(session) = app.sessions.create(new, key.clone()).await? else {
        // The same request came twice at once.
        let first = work::claimed(&app, key.as_ref()).await?.ok_or(ApiError::Defect)?;
        return created_before(&app, &caller, &first).await;
    };
    Ok(Json(session.into()))
}

/// Refuses an agent that is not on the list, and what can't be promised of one. Of others than claude it is not known that they
/// ask before they act, and acpx tells them no model.
fn check_agent(app: &App, agent: &str, asked: &SessionRequest) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    if !app.agents.iter().any(|known| known == agent) {
        errors.push(FieldError::new("/agent", format!("the agent must be one of {}", app.agents.join(", "))));
    } else if agent != CLAUDE_AGENT {
        if asked.permissions.as_ref().is_some_and(|permissions| permissions != APPROVE_ALL) {
            let detail = format!("that {agent} asks before it acts can't be promised; it can only have {APPROVE_ALL}");
            errors.push(FieldError::new("/permissions", detail));
        }
        if asked.model.is_some() {
            let detail = format!("{agent} would not be told of the model; leave it out, and choose it in the agent's own settings");
            errors.push(FieldError::new("/model", detail));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::Invalid(errors)) }
}

/// The session that the first request with a key led to, when it is there.
async fn created_before(app: &App, caller: &Caller, session_id: &str) -> Result<Json<SessionCreated>, ApiError> {
    // Twice as long as a creation may take.
    for _ in 0..2400 {
        let creates = app.ledger.half_created_sessions().await?.iter().any(|session| session.new.session_id == session_id);
        if let Some(session) = app.ledger.session(&caller.app, session_id).await? {
            return Ok(Json(session.into()));
        }
        if !creates {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    Err(ApiError::Acpx("the first request with this key failed".to_owned()))
}

impl From<Session> for SessionCreated {
    fn from(session: Session) -> Self {
        let meta = meta(&session);
        let NewSession { session_id, agent, model, cwd, .. } = session.new;
        Self { ok: true, session_id, agent, model, cwd, created_at: session.created_at, meta }
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
    wish: Wish,
    ValidJson(asked): ValidJson<TurnBody>,
) -> Result<Response, ApiError> {
    let session = find(&app, &caller, id).await?;
    let session_id = session.new.session_id.clone();
    let key = wish.key(&caller.app, &format!("/sessions/{session_id}/turn"), &asked);
    if let Some(id) = work::claimed(&app, key.as_ref()).await? {
        return again(&app, &wish, &session_id, &id).await;
    }
    if session.closed_at.is_some() {
        return Err(ApiError::Gone);
    }
    let files = attachments(&app, &caller, asked.files.unwrap_or_default()).await?;
    let request = TurnRequest {
        row: TurnRow {
            session_id: session_id.clone(),
            client_ip: caller.address.to_string(),
            prompt: asked.prompt,
            attached: files.iter().map(|file| file.size).sum(),
        },
        details: TurnDetails {
            files,
            timeout: Duration::from_secs(asked.timeout_secs.unwrap_or(600).cast_unsigned()),
            limits: caller.limits,
        },
    };
    let Some(Submitted { turn, answered, guard }) = app.sessions.submit(session, request, wish.way(key.clone())).await? else {
        // The same request came twice at once.
        let first = work::claimed(&app, key.as_ref()).await?.ok_or(ApiError::Defect)?;
        return again(&app, &wish, &session_id, &first).await;
    };
    if let Some(turn) = turn.filter(|_| wish.background || wish.stream) {
        return present(&app, &wish, &session_id, turn, guard).await;
    }
    let answer = answered.await.map_err(|_| ApiError::Stopping)?;
    guard.map(DropGuard::disarm);
    Ok(answer.into_response())
}

/// What came, or comes, of a request that was sent before.
async fn again(app: &App, wish: &Wish, session_id: &str, id: &str) -> Result<Response, ApiError> {
    let turn = id.rsplit_once('-').and_then(|(_, turn)| turn.parse().ok()).ok_or(ApiError::Defect)?;
    if wish.background || wish.stream {
        return present(app, wish, session_id, turn, None).await;
    }
    Ok(work::answer_of(app, Work::Turn(session_id, turn)).await?.into_response())
}

/// The turn in the background, or its events.
async fn present(app: &App, wish: &Wish, session_id: &str, turn: i64, guard: Option<DropGuard>) -> Result<Response, ApiError> {
    let row = app.ledger.turn(session_id, turn).await?.ok_or(ApiError::NotFound)?;
    let response = if wish.background {
        work::accepted(&format!("/sessions/{session_id}/turns/{turn}"), &TurnStatus::new(session_id, turn, row))
    } else {
        work::follow(app, Work::Turn(session_id, turn), 0, guard).await?
    };
    Ok(([(TURN, turn.to_string())], response).into_response())
}

/// What the caller gets of what came of a turn.
pub fn render(session_id: &str, came: Result<Outcome, Refused>) -> Final {
    let Outcome { ending, turn_index, events, text, stderr, duration, files } = match came {
        Ok(outcome) => outcome,
        Err(refused) => return ApiError::from(refused).into_final(),
    };
    let (duration_ms, session_id) = (clock::millis(duration), session_id.to_owned());
    let (stop_reason, error) = match ending {
        Ending::Completed(stop_reason) => {
            return work::json(
                StatusCode::OK,
                &TurnReply { ok: true, session_id, turn_index, events, text, stop_reason, duration_ms, files },
            );
        }
        Ending::Failed(error) => ("error", error),
        Ending::TimedOut(error) => ("timeout", error),
        Ending::Cancelled => ("cancelled", "the turn was cancelled, or its session closed, before it ended".to_owned()),
        Ending::Interrupted => ("error", "the server stopped before the turn ended; send it again".to_owned()),
    };
    work::json(StatusCode::BAD_GATEWAY, &TurnFailure { ok: false, session_id, events, error, stderr, stop_reason, duration_ms, files })
}

/// The answer of a turn, as far as its row tells: without its events. `None` while there is none.
pub(super) async fn answer_of(app: &App, session_id: &str, turn: i64) -> Result<Option<Final>, ApiError> {
    let TurnState { status, turn_index, finished, .. } = app.ledger.turn(session_id, turn).await?.ok_or(ApiError::NotFound)?;
    let Some((_, RunEnd { duration_ms, ok, stop_reason, error, result, .. })) = finished else { return Ok(None) };
    let ending = match (status.as_str(), error.unwrap_or_default()) {
        _ if ok => Ending::Completed(stop_reason),
        ("cancelled", _) => Ending::Cancelled,
        ("interrupted", _) => Ending::Interrupted,
        ("timed_out", error) => Ending::TimedOut(error),
        (_, error) => Ending::Failed(error),
    };
    let duration = Duration::from_millis(duration_ms.unsigned_abs());
    let (text, stderr) = (result.unwrap_or_default(), String::new());
    Ok(Some(render(session_id, Ok(Outcome { ending, turn_index, events: Vec::new(), text, stderr, duration, files: Vec::new() }))))
}

/// A turn, as far as it has come.
#[derive(Serialize, ToSchema)]
struct TurnStatus {
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
    fn new(session_id: &str, turn: i64, row: TurnState) -> Self {
        let TurnState { status, queued_at, started_at, finished, .. } = row;
        let (finished_at, end) = finished.unzip();
        let end = end.as_ref();
        Self {
            session_id: session_id.to_owned(),
            turn,
            started_at: (status != "queued").then_some(started_at),
            status,
            queued_at,
            finished_at,
            duration_ms: end.map(|end| end.duration_ms),
            text: end.and_then(|end| end.result.clone()),
            error: end.and_then(|end| end.error.clone()),
            stop_reason: end.map(|end| end.stop_reason.clone()),
            input_tokens: end.and_then(|end| end.input_tokens),
            output_tokens: end.and_then(|end| end.output_tokens),
            cost_usd: end.and_then(|end| end.cost_usd),
        }
    }
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
    (status = OK, content((work::SentEvent = "text/event-stream"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn turn_events(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: Result<Path<(String, i64)>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (session_id, turn, _) = find_turn(&app, &caller, path).await?;
    let after = work::last_event_id(&headers)?;
    work::follow(&app, Work::Turn(&session_id, turn), after, None).await
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
    app.feeds.cancel(&turn_id(&session_id, turn)).await;
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
    let session_id = find(&app, &caller, id).await?.new.session_id;
    let cancelled = app.sessions.cancel(&session_id).await;
    Ok(Json(TurnsCancelled { ok: true, session_id, cancelled }))
}

/// A turn of the caller's own session.
async fn find_turn(
    app: &App,
    caller: &Caller,
    path: Result<Path<(String, i64)>, PathRejection>,
) -> Result<(String, i64, TurnState), ApiError> {
    let Path((id, turn)) = path.map_err(|_| ApiError::NotFound)?;
    let session = app.ledger.session(&caller.app, &id).await?.ok_or(ApiError::NotFound)?;
    let row = app.ledger.turn(&id, turn).await?.ok_or(ApiError::NotFound)?;
    Ok((session.new.session_id, turn, row))
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
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(state, close))
        .routes(routes!(turn))
        .routes(routes!(turn_status, cancel_turn))
        .routes(routes!(turn_events))
        .routes(routes!(cancel))
}
