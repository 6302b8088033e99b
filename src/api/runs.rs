//! `/run` and `/runs/{id}`: one prompt, one answer, and what became of it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Caller;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::render::{RunFailure, RunReply};
use super::stream::{self, SentEvent};
use super::submission::{self, SubmitOptions};
use super::validate::{
    ask, attachments, check_agent, check_files, check_kept, check_model, check_permission_timeout, check_permissions, check_prompt,
    check_timeout,
};
use super::view::RunState;
use super::webhooks;
use crate::agent::contract::{Rules, Setup, Spec};
use crate::agent::kinds;
use crate::agent::turn::{ASK, CLAUDE_AGENT};
use crate::app::App;
use crate::ledger::{JobId, JobRow};

#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
pub(crate) struct RunRequest {
    /// Up to 10 MiB. Any text is safe.
    #[serde(default)]
    #[schema(required, min_length = 1, max_length = 10_485_760)]
    pub(crate) prompt: String,
    // Defaults stand in words: from `default`, generators take an optional property for one that is always there.
    /// `sonnet` by default; another agent's is its own.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$")]
    pub(crate) model: Option<String>,
    /// Added to the CLI's own system prompt.
    pub(crate) system: Option<String>,
    /// Tokens from `POST /files`.
    #[schema(max_items = 256)]
    pub(crate) files: Option<Vec<String>>,
    /// A JSON Schema of up to 64 KiB, which `result` then fits.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    pub(crate) schema: Option<Box<RawValue>>,
    /// How long the CLI may take, in seconds; 120 by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 5, maximum = 600)]
    pub(crate) timeout_secs: Option<i64>,
    /// `claude` by default, or another of the server's agents. Only claude takes `system` and `schema`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent: Option<String>,
    /// `ask`: what the agent may do is asked of the app (`/runs/{id}/permissions`), where the run is streamed or in the background. Without
    /// it, what isn't plainly safe is denied. Agents other than claude can have `approve-all`, `approve-reads` and `deny-all` too, as far
    /// as each keeps them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(approve-all|approve-reads|deny-all|ask)$")]
    pub(crate) permissions: Option<String>,
    /// After how many seconds a question is refused that nobody answered; 300 by default.
    #[serde(default, deserialize_with = "whole_number", skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 10, maximum = 3600)]
    pub(crate) permission_timeout_secs: Option<i64>,
    /// Who is told of its end (`run.finished`), where it goes on in the background; the app's own webhook by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "https://app.lan/hook")]
    pub(crate) webhook: Option<String>,
}

impl Validate for RunRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_prompt(&self.prompt, &mut errors);
        check_model(self.model.as_deref(), &mut errors);
        check_files(self.files.as_deref(), &mut errors);
        check_timeout(self.timeout_secs, 600, &mut errors);
        check_permissions(self.permissions.as_deref(), &mut errors);
        let by_claude = self.agent.as_deref().is_none_or(|agent| agent == CLAUDE_AGENT);
        if by_claude && self.permissions.as_ref().is_some_and(|permissions| permissions != ASK) {
            errors.push(FieldError::new(
                "/permissions",
                "the permissions of a run by claude can only be ask; leave them out to have its tools denied what isn't plainly safe",
            ));
        }
        check_permission_timeout(self.permission_timeout_secs, self.permissions.as_deref(), &mut errors);
        errors
    }
}

/// Run a prompt
///
/// With `Accept: text/event-stream` the events come as they happen, last `result` with this body or `error` with the error's.
/// With `Prefer: respond-async` the run goes on in the background. With an `Idempotency-Key` the request can be sent again.
#[utoipa::path(post, path = "/run", tag = "runs", security(("app" = [])), request_body = RunRequest,
    params(
        ("Prefer" = Option<String>, Header, description = "`respond-async` for an answer at once (RFC 7240)"),
        ("Idempotency-Key" = Option<String>, Header, description = "Up to 255 characters; the same key and body lead to one run, for 24 hours"),
    ),
    responses(
    (status = OK, headers(("x-run-id" = String, description = "The run's row in the ledger")), body = RunReply),
    (status = ACCEPTED, description = "It goes on in the background; the body is as that of GET /runs/{id}", headers(("location" = String, description = "Where to see it"))),
    (status = BAD_GATEWAY, body = RunFailure, description = "The CLI failed or ran out of time"),
    (status = SERVICE_UNAVAILABLE, description = "The CLI is not installed (application/json), or the server is busy, stopping or out of disk (application/problem+json)",
        content((RunFailure = "application/json"), (Problem = "application/problem+json"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn run(
    State(app): State<Arc<App>>,
    caller: Caller,
    options: SubmitOptions,
    ValidJson(asked): ValidJson<RunRequest>,
) -> Result<Response, ApiError> {
    let key = options.key(&caller.app, "/run", &asked);
    if let Some(id) = submission::claimed(&app, key.as_ref()).await? {
        return submission::replay(&app, &caller, &options, &id).await;
    }
    if asked.permissions.as_deref() == Some(ASK) && !options.is_early() {
        let detail = "nobody could answer while the request waits; have the events come (Accept: text/event-stream), or the run go on in the background (Prefer: respond-async)";
        return Err(ApiError::Invalid(vec![FieldError::new("/permissions", detail)]));
    }
    let webhook = webhooks::told_of(&app, &caller, &options, asked.webhook.clone())?;
    let spec = spec(&app, &caller, asked).await?;
    submission::submit(&app, &caller, &options, key, Uuid::now_v7(), spec, webhook).await
}

/// What is asked of an agent, as far as it can be promised.
pub(super) async fn spec(app: &App, caller: &Caller, asked: RunRequest) -> Result<Spec, ApiError> {
    if let Some(schema) = &asked.schema {
        app.jobs.check_schema(&caller.app, schema).await?;
    }
    let agent = other_agent(app, &asked)?;
    Ok(Spec {
        prompt: asked.prompt,
        model: asked.model.or_else(|| agent.is_none().then(|| "sonnet".to_owned())),
        system: asked.system.filter(|system| !system.is_empty()),
        schema: asked.schema,
        files: attachments(app, caller, asked.files.unwrap_or_default()).await?,
        timeout: Duration::from_secs(asked.timeout_secs.unwrap_or(120).cast_unsigned()),
        session: None,
        completion: None,
        ask: asked.permissions.filter(|_| agent.is_none()).map(|_| ask(asked.permission_timeout_secs, false)),
        agent,
        rules: Rules::default(),
        yields: false,
    })
}

/// Begins a run of the caller's in the background. Gives its id.
pub(crate) async fn begin(app: &App, caller: &Caller, asked: RunRequest) -> Result<JobId, ApiError> {
    let errors = asked.errors();
    if !errors.is_empty() {
        return Err(ApiError::Invalid(errors));
    }
    let spec = spec(app, caller, asked).await?;
    submission::begin(app, caller, spec).await
}

/// The agent that is to make the run, where that is not claude. Refuses what can't be promised of it.
fn other_agent(app: &App, asked: &RunRequest) -> Result<Option<Setup>, ApiError> {
    let Some(agent) = asked.agent.clone().filter(|agent| agent != CLAUDE_AGENT) else { return Ok(None) };
    check_agent(app, &agent)?;
    let Some(kind) = kinds::of(&agent) else {
        let detail = format!("{agent} is known to acpx alone, and makes no runs; create a session");
        return Err(ApiError::Invalid(vec![FieldError::new("/agent", detail)]));
    };
    let mut errors = Vec::new();
    let permissions = asked.permissions.clone().unwrap_or_else(|| "deny-all".to_owned());
    check_kept(&agent, kind.permissions, &permissions, &mut errors);
    let has_system = asked.system.as_ref().is_some_and(|system| !system.is_empty());
    for (pointer, is_there) in [("/system", has_system), ("/schema", asked.schema.is_some())] {
        if is_there {
            errors.push(FieldError::new(pointer, format!("{agent} takes none; say it in the prompt")));
        }
    }
    if !errors.is_empty() {
        return Err(ApiError::Invalid(errors));
    }
    let ask = (permissions == ASK).then(|| ask(asked.permission_timeout_secs, false));
    Ok(Some(Setup { agent, model: asked.model.clone(), system: None, permissions, ask, rules: Rules::default() }))
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
    (status = OK, content((SentEvent = "text/event-stream")), description = "`result` has this body", headers(("x-run-id" = String))),
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
    stream::follow(&app, &caller, &row.id, stream::last_event_id(&headers)?, None).await
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
    let row = find(&app, &caller, id).await?;
    app.jobs.cancel(&row).await?;
    Ok(Json(RunCancelled { ok: true, run_id: row.id.to_string(), already_over: row.finished.is_some() }))
}

/// The caller's own run; another's does not exist.
pub(super) async fn find(app: &App, caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<JobRow, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound)?;
    app.ledger.job(&caller.app, &JobId::Run(id)).await?.ok_or(ApiError::NotFound)
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(run)).routes(routes!(state, cancel)).routes(routes!(events))
}
