//! `/sessions`: conversations of many turns.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::time::sleep;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Caller;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::submission::{self, SubmitOptions};
use super::validate::{ask, check_agent, check_kept, check_model, check_permission_timeout, check_permissions};
use crate::agent::contract::{Driver, Setup};
use crate::agent::kinds;
use crate::agent::turn::{APPROVE_ALL, ASK, CLAUDE_AGENT};
use crate::app::App;
use crate::ledger::{NewSession, Session};
use crate::session::Created;

/// The longest system prompt in bytes.
const MAX_SYSTEM: usize = 64 << 10;

#[derive(Debug, Deserialize, Serialize, ToSchema)]
struct SessionRequest {
    /// One of the server's agents; `claude` by default.
    agent: Option<String>,
    /// The model of every turn, by the agent's own name for it.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$")]
    model: Option<String>,
    /// Added to the agent's own system prompt, at each of its starts; up to 64 KiB. Not where acpx speaks to the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 65_536)]
    system: Option<String>,
    /// The app's own object, kept as it is.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    meta: Option<Box<RawValue>>,
    /// What the agent may do: `approve-all` (the default), `approve-reads`, `deny-all`, or `ask`: then what it wants to do is asked of the
    /// app (`/sessions/{id}/permissions`). Not every agent can have each.
    #[schema(pattern = "^(approve-all|approve-reads|deny-all|ask)$")]
    permissions: Option<String>,
    /// After how many seconds a question is refused that nobody answered; 300 by default.
    #[serde(default, deserialize_with = "whole_number", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 10, maximum = 3600)]
    permission_timeout_secs: Option<i64>,
    /// Whether a question may be answered for always, which allows more than its label says.
    #[serde(skip_serializing_if = "Option::is_none")]
    allow_always: Option<bool>,
}

impl Validate for SessionRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_model(self.model.as_deref(), &mut errors);
        if self.meta.as_ref().is_some_and(|meta| !meta.get().starts_with('{')) {
            errors.push(FieldError::new("/meta", "meta must be a JSON object"));
        }
        if self.system.as_ref().is_some_and(|system| system.len() > MAX_SYSTEM) {
            errors.push(FieldError::new("/system", "the system prompt is longer than 64 KiB"));
        }
        check_permissions(self.permissions.as_deref(), &mut errors);
        check_permission_timeout(self.permission_timeout_secs, self.permissions.as_deref(), &mut errors);
        if self.allow_always.is_some() && self.permissions.as_deref() != Some(ASK) {
            errors.push(FieldError::new("/allow_always", "nothing is asked; set permissions to ask"));
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

#[derive(Serialize, ToSchema)]
pub(super) struct SessionState {
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
            agent: session.new.setup.agent,
            model: session.new.setup.model,
            cwd: session.new.cwd,
            created_at: session.created_at,
            last_turn_at: session.last_turn_at,
            turn_count: session.turn_count,
            closed_at: session.closed_at,
            live: session.closed_at.is_none(),
            permissions: session.new.setup.permissions,
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
    options: SubmitOptions,
    ValidJson(asked): ValidJson<SessionRequest>,
) -> Result<Json<SessionCreated>, ApiError> {
    let key = options.key(&caller.app, "/sessions", &asked);
    if let Some(session_id) = submission::claimed_name(&app, key.as_ref()).await? {
        return created_before(&app, &caller, &session_id).await;
    }
    let agent = asked.agent.clone().unwrap_or_else(|| CLAUDE_AGENT.to_owned());
    check_agent(&app, &agent)?;
    check_promised(&app, &agent, &asked)?;
    submission::check_rules(&app, &caller, app.sessions.driver_of(&agent))?;
    let setup = Setup {
        agent,
        model: asked.model,
        system: asked.system.filter(|system| !system.is_empty()),
        ask: asked
            .permissions
            .as_ref()
            .filter(|permissions| *permissions == ASK)
            .map(|_| ask(asked.permission_timeout_secs, asked.allow_always.unwrap_or(false))),
        permissions: asked.permissions.unwrap_or_else(|| APPROVE_ALL.to_owned()),
        rules: caller.rules.clone(),
    };
    let meta = asked.meta.map(|meta| meta.get().to_owned());
    match app.sessions.create(caller.app.clone(), setup, meta, key.clone()).await? {
        Created::Session(session) => Ok(Json((*session).into())),
        Created::KeyTaken => {
            // The same request came twice at once.
            let first = submission::claimed_name(&app, key.as_ref()).await?.ok_or(ApiError::Defect)?;
            created_before(&app, &caller, &first).await
        }
    }
}

/// Refuses what can't be promised of an agent: acpx tells others than claude no model, and of none of those it is known that it asks
/// before it acts.
fn check_promised(app: &App, agent: &str, asked: &SessionRequest) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    let by_acpx = app.sessions.driver_of(agent) == Driver::Acpx;
    let kind = kinds::of(agent).filter(|_| !by_acpx || agent == CLAUDE_AGENT);
    let kept = kind.map_or(&[APPROVE_ALL][..], |kind| kind.permissions);
    let permissions = asked.permissions.as_deref().unwrap_or(APPROVE_ALL);
    if by_acpx && permissions == ASK {
        let detail = format!(
            "acpx, which speaks to {agent} here, can ask nobody; choose other permissions, or have the operator set CLAWDFORGE_ACP to direct"
        );
        errors.push(FieldError::new("/permissions", detail));
    } else {
        check_kept(agent, kept, permissions, &mut errors);
    }
    if asked.model.is_some() && kind.is_none() {
        let detail = format!("{agent} would not be told of the model; leave it out, and choose it in the agent's own settings");
        errors.push(FieldError::new("/model", detail));
    }
    if asked.system.is_some() && by_acpx {
        let detail = format!("acpx, which speaks to {agent} here, would forget it; say it in the first turn's prompt");
        errors.push(FieldError::new("/system", detail));
    } else if asked.system.is_some() && !kind.is_some_and(|kind| kind.takes_system) {
        errors.push(FieldError::new("/system", format!("{agent} takes none; say it in the first turn's prompt")));
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
        let NewSession { session_id, setup: Setup { agent, model, .. }, cwd, .. } = session.new;
        Self { ok: true, session_id, agent, model, cwd, created_at: session.created_at, meta }
    }
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
pub(super) async fn find(app: &App, caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<Session, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound)?;
    app.ledger.session(&caller.app, &id).await?.ok_or(ApiError::NotFound)
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(state, close))
}
