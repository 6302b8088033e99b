//! How runs and turns are asked for: by headers that say how to answer, and under which key the request may be sent again.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio_util::sync::DropGuard;
use uuid::Uuid;

use super::answer::Answer;
use super::auth::Caller;
use super::error::ApiError;
use super::render::Of;
use super::stream;
use super::view::{self, RunState, TurnStatus};
use crate::agent::contract::{Driver, Network, Spec};
use crate::app::App;
use crate::blocking::aside;
use crate::job::Submitted;
use crate::job::feed_format::End;
use crate::job::spec::{Durability, Job};
use crate::ledger::{JobId, Key};
use crate::secret::sha256_hex;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const PREFER: HeaderName = HeaderName::from_static("prefer");
const RUN_ID: HeaderName = HeaderName::from_static("x-run-id");
const TURN: HeaderName = HeaderName::from_static("x-turn");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
/// The longest idempotency key, in characters.
const LONGEST_KEY: usize = 255;

/// What the headers of a request for a run or a turn say.
#[derive(Clone, Debug)]
pub(super) struct SubmitOptions {
    /// The events as they come (`Accept: text/event-stream`).
    pub(super) stream: bool,
    /// The answer at once, and the work in the background (`Prefer: respond-async`).
    pub(super) background: bool,
    /// The key under which it may be sent again.
    pub(super) key: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for SubmitOptions {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let listed = |name: HeaderName| {
            let values = parts.headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).map(|part| part.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
        };
        Ok(Self {
            stream: listed(header::ACCEPT).any(|kind| kind == "text/event-stream"),
            background: listed(PREFER).any(|preference| preference == "respond-async"),
            key: key(&parts.headers)?,
        })
    }
}

/// The one idempotency key. By the draft of the IETF it is a quoted string; many clients send it bare.
fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let key = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    if key.is_empty() || key.len() > LONGEST_KEY || values.next().is_some() {
        return Err(ApiError::BadRequest(format!("Send one Idempotency-Key, of 1 to {LONGEST_KEY} visible characters.")));
    }
    Ok(Some(key.to_owned()))
}

impl SubmitOptions {
    /// The key, for what the app asks for at this path.
    pub(super) fn key(&self, app: &str, path: &str, asked: &impl Serialize) -> Option<Key> {
        let key = self.key.clone()?;
        let asked = serde_json::to_vec(asked).expect("requests are JSON");
        Some(Key { app_name: app.to_owned(), key, fingerprint: fingerprint(path, &asked) })
    }

    fn durability(&self, key: Option<Key>) -> Durability {
        match key {
            None if self.background => Durability::Detached { key: None },
            None if self.stream => Durability::Watched,
            None => Durability::Plain,
            key => Durability::Detached { key },
        }
    }

    /// Whether the answer is not waited for.
    pub(super) fn is_early(&self) -> bool {
        self.background || self.stream
    }
}

/// The SHA-256 of what is asked for at a path.
pub(super) fn fingerprint(path: &str, asked: &[u8]) -> String {
    aside(asked.len(), || sha256_hex(&[path.as_bytes(), b"\n", asked].concat()))
}

/// What a key stands for, if it was used before, for the same request.
pub(super) async fn claimed_name(app: &App, key: Option<&Key>) -> Result<Option<String>, ApiError> {
    let Some(key) = key else { return Ok(None) };
    match app.ledger.claimed(key).await? {
        Some(claimed) if claimed.fingerprint != key.fingerprint => Err(ApiError::OtherRequest),
        claimed => Ok(claimed.map(|claimed| claimed.id)),
    }
}

/// The job that a key stands for.
pub(super) async fn claimed(app: &App, key: Option<&Key>) -> Result<Option<JobId>, ApiError> {
    Ok(claimed_name(app, key).await?.and_then(|name| JobId::named(&name)))
}

/// Refuses work whose agent can't be bound by the rules of the caller's token.
pub(super) fn check_rules(app: &App, caller: &Caller, driver: Driver) -> Result<(), ApiError> {
    match (&app.network, driver) {
        _ if caller.rules.network == Network::Open => Ok(()),
        (Err(why), _) => Err(ApiError::Unbound(why.to_string())),
        (Ok(()), Driver::Acpx) => {
            Err(ApiError::Unbound("acpx, which speaks to this session's agent, keeps one agent for all of its turns".to_owned()))
        }
        (Ok(()), Driver::Direct) => Ok(()),
    }
}

/// Takes a job on, and answers as it was asked to. `uuid` is a run's.
pub(super) async fn submit(
    app: &App,
    caller: &Caller,
    options: &SubmitOptions,
    key: Option<Key>,
    uuid: Uuid,
    spec: Spec,
    webhook: Option<String>,
) -> Result<Response, ApiError> {
    let (of, run_id) = match &spec.session {
        None => (Of::Run, Some(JobId::Run(uuid.simple().to_string()))),
        Some(session) => (Of::Turn(session.session_id.clone()), None),
    };
    let job = Job { webhook, ..job(app, caller, uuid, spec)? };
    match app.jobs.submit(job, options.durability(key.clone())).await? {
        Submitted::Accepted { id: Some(id), guard, .. } if options.is_early() => respond(app, caller, options, &id, guard).await,
        Submitted::Accepted { live, guard, .. } => {
            let end = live.answer().await.ok_or(ApiError::Stopping)?;
            guard.map(DropGuard::disarm);
            Ok(named(run_id.as_ref(), of.answer(&end)))
        }
        Submitted::KeyTaken => {
            // The same request came twice at once.
            let first = claimed(app, key.as_ref()).await?.ok_or(ApiError::Defect)?;
            replay(app, caller, options, &first).await
        }
    }
}

/// Takes a run on that goes on in the background. Gives its id.
pub(super) async fn begin(app: &App, caller: &Caller, spec: Spec) -> Result<JobId, ApiError> {
    let job = job(app, caller, Uuid::now_v7(), spec)?;
    match app.jobs.submit(job, Durability::Detached { key: None }).await? {
        Submitted::Accepted { id: Some(id), .. } => Ok(id),
        Submitted::Accepted { id: None, .. } | Submitted::KeyTaken => Err(ApiError::Defect),
    }
}

/// The job of a caller, bound by the rules of its token.
pub(super) fn job(app: &App, caller: &Caller, uuid: Uuid, spec: Spec) -> Result<Job, ApiError> {
    check_rules(app, caller, spec.session.as_ref().map_or(Driver::Direct, |conversation| conversation.driver))?;
    let spec = spec.bound_by(&caller.rules);
    Ok(Job { uuid, app: caller.app.clone(), client_ip: caller.address.to_string(), spec, limits: caller.limits, webhook: None })
}

/// What came, or comes, of a request that was sent before.
pub(super) async fn replay(app: &App, caller: &Caller, options: &SubmitOptions, id: &JobId) -> Result<Response, ApiError> {
    if options.is_early() {
        return respond(app, caller, options, id, None).await;
    }
    Ok(named(Some(id).filter(|id| matches!(id, JobId::Run(_))), answer_of(app, caller, id).await?))
}

async fn answer_of(app: &App, caller: &Caller, id: &JobId) -> Result<Answer, ApiError> {
    Ok(Of::from(id).answer(&*end_of(app, caller, id).await?))
}

/// How a job ended, or will.
pub(super) async fn end_of(app: &App, caller: &Caller, id: &JobId) -> Result<Arc<End>, ApiError> {
    if let Some(live) = app.feeds.live(id)
        && let Some(end) = live.answer().await
    {
        return Ok(end);
    }
    if let Some(end) = app.feeds.ended(id).await? {
        return Ok(Arc::new(end));
    }
    let row = app.ledger.job(&caller.app, id).await?.ok_or(ApiError::NotFound)?;
    // One without an end starts again after the server has.
    view::end_of(&row).map(Arc::new).ok_or(ApiError::Stopping)
}

/// The job in the background, or its events.
async fn respond(app: &App, caller: &Caller, options: &SubmitOptions, id: &JobId, guard: Option<DropGuard>) -> Result<Response, ApiError> {
    let response = if options.background {
        let row = app.ledger.job(&caller.app, id).await?.ok_or(ApiError::NotFound)?;
        match id {
            JobId::Run(run_id) => accepted(&format!("/runs/{run_id}"), &RunState::from(row)),
            JobId::Turn { session_id, turn } => {
                accepted(&format!("/sessions/{session_id}/turns/{turn}"), &TurnStatus::new(session_id, *turn, row))
            }
        }
    } else {
        stream::follow(app, caller, id, 0, guard).await?
    };
    Ok(named(Some(id), response))
}

/// Says that a job was taken on, and where it is to be seen.
fn accepted(location: &str, state: &impl Serialize) -> Response {
    let mut response = (StatusCode::ACCEPTED, axum::Json(state)).into_response();
    let headers = response.headers_mut();
    headers.insert(PREFERENCE_APPLIED, HeaderValue::from_static("respond-async"));
    headers.insert(header::LOCATION, HeaderValue::from_str(location).expect("ids are ASCII"));
    response
}

/// The response, with the header that names the job.
fn named(id: Option<&JobId>, response: impl IntoResponse) -> Response {
    match id {
        None => response.into_response(),
        Some(JobId::Run(run_id)) => ([(RUN_ID, run_id.clone())], response).into_response(),
        Some(JobId::Turn { turn, .. }) => ([(TURN, turn.to_string())], response).into_response(),
    }
}
