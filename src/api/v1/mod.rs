//! The APIs of other vendors, under `/v1`: one file for what each endpoint takes, one for what it answers.
//!
//! Each request becomes a [`Spec`] with a completion, which lives as every job does. What the model did is said in the vendor's words by
//! a `Speech`; refusals are by [`refusal`].

mod chat;
mod chat_answer;
mod chat_messages;
mod conversation;
mod fence;
mod fields;
mod messages;
mod messages_answer;
mod models;
mod parameters;
pub mod refusal;
mod response_answer;
mod response_input;
mod responses;
mod tools;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::value::RawValue;
use utoipa_axum::router::OpenApiRouter;
use uuid::Uuid;

use super::auth::Caller;
use super::error::ApiError;
use super::submission::{self, SubmitOptions};
use crate::agent::completion::{Completion, Parameters};
use crate::agent::contract::{Event, Outcome, Rules, Spec};
use crate::app::App;
use crate::blocking::aside;
use crate::job::Submitted;
use crate::job::feed_format::{End, Record};
use crate::job::feed_reader::{Dialect, Item};
use crate::job::joining::Share;
use crate::job::spec::{Durability, Job};
use crate::ledger::{JobId, KeptResponse, Key};
use conversation::Whole;
use refusal::{Refusal, Vendor};

const RUN_ID: HeaderName = HeaderName::from_static("x-run-id");
/// Names what was sent and has no effect.
const NO_EFFECT: HeaderName = HeaderName::from_static("x-clawdforge-no-effect");
/// By which the libraries that one generator made count their attempts.
const RETRY_COUNT: HeaderName = HeaderName::from_static("x-stainless-retry-count");
/// How long the model may take: as long as the vendors' libraries wait.
const TIMEOUT: Duration = Duration::from_mins(10);

/// How one endpoint says what the model did.
pub(super) trait Speech: Send + 'static {
    /// Takes the id of the run that it is about, by which it names what it says.
    fn run(&mut self, run_id: &str);
    /// The body of a plain answer.
    fn whole(&mut self, outcome: &Outcome) -> Vec<u8>;
    /// What stands at the beginning of a stream; nothing, where the model's own events begin it.
    fn begin(&mut self, _: &mut Vec<u8>) {}
    /// An event of the model's stream, with its kind.
    fn event(&mut self, kind: &str, event: &RawValue, out: &mut Vec<u8>);
    /// The end of a stream.
    fn end(&mut self, outcome: &Outcome, out: &mut Vec<u8>);
    /// The end of a stream that broke off.
    fn fail(&mut self, refusal: &Refusal, out: &mut Vec<u8>);
    /// What says that the connection is alive.
    fn beat(&self) -> &'static [u8];
}

/// A request, read.
struct Asked<S> {
    vendor: Vendor,
    /// Its run.
    uuid: Uuid,
    spec: Spec,
    stream: bool,
    /// Parameters that have none.
    no_effect: Vec<&'static str>,
    /// What is kept of it, so that others can go on with it.
    kept: Option<KeptResponse>,
    speech: S,
}

/// What all requests for completions come with.
struct Envelope {
    caller: Caller,
    options: SubmitOptions,
    /// How often a client's library has sent the request before, where it tells.
    attempt: Option<u32>,
}

impl FromRequestParts<Arc<App>> for Envelope {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        Ok(Self {
            caller: Caller::from_request_parts(parts, app).await?,
            options: SubmitOptions::from_request_parts(parts, app).await?,
            attempt: parts.headers.get(RETRY_COUNT).and_then(|count| count.to_str().ok()?.parse().ok()),
        })
    }
}

/// The job of a conversation that makes sense.
fn spec(app: &App, model: String, whole: Whole, parameters: Parameters) -> Spec {
    let Whole { system, messages, prompt } = whole;
    Spec {
        prompt,
        model: Some(app.models.mapped(model)),
        system,
        schema: None,
        files: Vec::new(),
        timeout: TIMEOUT,
        session: None,
        completion: Some(Completion { messages, parameters }),
        ask: None,
        agent: None,
        rules: Rules::default(),
        yields: false,
    }
}

/// A run's id, as responses name it.
fn run_name(uuid: Uuid) -> String {
    uuid.simple().to_string()
}

/// Takes a completion on, and answers in the words of its endpoint. The same request, sent again under a key or by a library that tries
/// again, leads to the same run.
async fn complete<S: Speech>(app: &App, envelope: &Envelope, path: &str, sent: &Bytes, asked: Asked<S>) -> Result<Response, ApiError> {
    let Asked { vendor, uuid, spec, stream, no_effect, kept, speech } = asked;
    let Envelope { caller, options, attempt } = envelope;
    let fingerprint = (options.key.is_some() || attempt.is_some()).then(|| submission::fingerprint(path, sent));
    let keyed = |key: String| Key { app_name: caller.app.clone(), key, fingerprint: fingerprint.clone().unwrap_or_default() };
    let key = options.key.clone().map(keyed);
    let joining = attempt.and(fingerprint.as_ref()).map(|fingerprint| format!("{}\n{fingerprint}", caller.app));

    let mut answer = if let Some(id) = submission::claimed(app, key.as_ref()).await? {
        replay(app, caller, vendor, &id, stream, speech).await?
    } else if let Some(share) = joining.as_ref().filter(|_| *attempt > Some(0)).and_then(|key| app.jobs.join(key)) {
        respond(app, vendor, share, stream, speech).await?
    } else {
        if let Some(kept) = kept {
            app.ledger.keep_response(kept).await?;
        }
        let job = Job { uuid, app: caller.app.clone(), client_ip: caller.address.to_string(), spec, limits: caller.limits, webhook: None };
        let durability = match &key {
            None if stream => Durability::Watched,
            None => Durability::Plain,
            key => Durability::Detached { key: key.clone() },
        };
        match app.jobs.submit(job, durability).await? {
            Submitted::Accepted { live, guard, .. } => {
                let share = app.jobs.share(joining, JobId::Run(run_name(uuid)), live, guard);
                respond(app, vendor, share, stream, speech).await?
            }
            Submitted::KeyTaken => {
                let first = submission::claimed(app, key.as_ref()).await?.ok_or(ApiError::Defect)?;
                replay(app, caller, vendor, &first, stream, speech).await?
            }
        }
    };
    if !no_effect.is_empty()
        && let Ok(names) = HeaderValue::from_str(&no_effect.join(", "))
    {
        answer.headers_mut().insert(NO_EFFECT, names);
    }
    Ok(answer)
}

/// The answer of a job that goes on.
async fn respond<S: Speech>(app: &App, vendor: Vendor, share: Share, stream: bool, speech: S) -> Result<Response, ApiError> {
    let id = share.job().id.clone();
    if !stream {
        let end = share.job().live.answer().await.ok_or(ApiError::Stopping)?;
        return Ok(plain(vendor, &id, &end, speech));
    }
    // Until the model has begun, a failure is an answer of its own, which libraries know how to take.
    if let Some(end) = share.job().live.begun().await
        && let Err(refusal) = Refusal::of(&end)
    {
        return Ok(named(&id, refusal.into_response(vendor, &id)));
    }
    streamed(app, &id, speech, Some(share)).await?.ok_or(ApiError::Stopping)
}

/// The answer of a request that was sent before.
async fn replay<S: Speech>(app: &App, caller: &Caller, vendor: Vendor, id: &JobId, stream: bool, speech: S) -> Result<Response, ApiError> {
    if let Some(live) = app.feeds.live(id) {
        return respond(app, vendor, app.jobs.share(None, id.clone(), live, None), stream, speech).await;
    }
    let end = submission::end_of(app, caller, id).await?;
    if !stream || Refusal::of(&end).is_err() {
        return Ok(plain(vendor, id, &end, speech));
    }
    streamed(app, id, speech, None).await?.ok_or(ApiError::NotFound)
}

/// What came of a job, as a plain answer.
fn plain(vendor: Vendor, id: &JobId, end: &End, mut speech: impl Speech) -> Response {
    let response = match Refusal::of(end) {
        Err(refusal) => return named(id, refusal.into_response(vendor, id)),
        Ok(outcome) => {
            speech.run(&id.to_string());
            let body = aside(outcome.text.len(), || speech.whole(outcome));
            ([(header::CONTENT_TYPE, "application/json")], body).into_response()
        }
    };
    named(id, response)
}

/// What the model does, as it happens. `None` where it is not kept any more.
async fn streamed<S: Speech>(app: &App, id: &JobId, mut speech: S, share: Option<Share>) -> Result<Option<Response>, ApiError> {
    let Some(reader) = app.feeds.read(id, 0).await? else { return Ok(None) };
    let mut begin = Vec::new();
    speech.run(&id.to_string());
    speech.begin(&mut begin);
    // Until it has ended; then nothing is said any more.
    let state = Mutex::new((begin, Some(speech)));
    let render = move |item| {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = std::mem::take(&mut state.0);
        if let Some(mut speech) = state.1.take() {
            let goes_on = say(&mut speech, item, &mut out);
            state.1 = goes_on.then_some(speech);
        }
        out
    };
    let bytes = reader.bytes(Dialect { name: None, render: Arc::new(render) });
    Ok(Some(named(id, super::stream::response(Body::from_stream(super::stream::held(bytes, share))))))
}

/// Says an item. Gives whether there can be more.
fn say(speech: &mut impl Speech, item: Item, out: &mut Vec<u8>) -> bool {
    let ended = match item {
        Item::Record(Record::End(_, end)) => Arc::new(end),
        Item::End(end) => end,
        Item::Record(Record::Event(_, Event::Model { kind, event })) => {
            speech.event(&kind, &event, out);
            return true;
        }
        Item::Record(_) => return true,
        Item::Beat => {
            out.extend_from_slice(speech.beat());
            return true;
        }
        // Without what is missing the rest is another answer.
        Item::Gap => {
            let lost = "A part of the answer was lost: the server's disk is full.";
            speech.fail(&Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, lost), out);
            return false;
        }
    };
    match Refusal::of(&ended) {
        Ok(outcome) => speech.end(outcome, out),
        Err(refusal) => speech.fail(&refusal, out),
    }
    false
}

fn named(id: &JobId, mut response: Response) -> Response {
    refusal::name(response.headers_mut(), &refusal::request_id(id));
    if let Ok(run_id) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().insert(RUN_ID, run_id);
    }
    response
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    let routes = [chat::routes(), responses::routes(), messages::routes(), models::routes()];
    routes.into_iter().fold(OpenApiRouter::new(), OpenApiRouter::merge)
}
