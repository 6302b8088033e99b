//! `/v1/responses`: OpenAI's responses, kept for a day so that others can go on with them.
//!
//! What a response was asked is in the ledger; what came of it is in its run's feed, which is kept for as long.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response as HttpResponse};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::conversation::Conversation;
use super::messages_answer::message_of;
use super::refusal::{self, Refusal, Vendor};
use super::response_answer::{Response, response_id, run_of_item, run_of_response};
use super::response_input::{Input, ResponseRequest, add, referenced, text_item};
use super::{Asked, Envelope, Speech, complete, run_name, spec};
use crate::agent::completion::{Block, Role};
use crate::agent::contract::Outcome;
use crate::api::auth::Caller;
use crate::api::body::{MAX_JSON, SentJson};
use crate::api::error::ApiError;
use crate::app::App;
use crate::blocking::aside;
use crate::clock;
use crate::ledger::{JobId, KeptResponse};

/// Responses that one may go on with, one behind the other.
const MAX_CHAIN: usize = 1000;

/// Why a request is refused, by whichever part of the server.
enum Refused {
    Here(Refusal),
    Elsewhere(ApiError),
}

impl<E: Into<ApiError>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self::Elsewhere(error.into())
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self::Here(refusal)
    }
}

fn not_found(id: &str) -> Refusal {
    let message = format!("There is no response \"{id}\": it was never there, was not stored, or was not used for a day.");
    Refusal { code: Some("response_not_found"), ..Refusal::new(StatusCode::NOT_FOUND, message) }
}

fn previous_not_found(id: &str) -> Refusal {
    let param = Some("previous_response_id".to_owned());
    Refusal { param, code: Some("previous_response_not_found"), ..Refusal { status: StatusCode::BAD_REQUEST, ..not_found(id) } }
}

/// What the model answered in a run.
async fn answered(app: &App, run_id: &str) -> Result<Option<Outcome>, ApiError> {
    let id = JobId::Run(run_id.to_owned());
    let end = match app.feeds.live(&id) {
        Some(live) => live.answer().await,
        None => app.feeds.ended(&id).await?.map(Arc::new),
    };
    Ok(end.and_then(|end| Refusal::of(&end).ok().cloned()))
}

/// Adds what was said up to a response, by both sides. Gives the runs that it took.
async fn add_chain(app: &App, caller: &Caller, id: &str, conversation: &mut Conversation) -> Result<String, Refused> {
    let last = run_of_response(id).ok_or_else(|| previous_not_found(id))?.to_owned();
    let mut chain = Vec::new();
    let mut next = Some(last.clone());
    let mut bytes = 0;
    while let Some(run_id) = next.take() {
        let kept = app.ledger.response(&caller.app, &run_id).await?.filter(|_| chain.len() < MAX_CHAIN);
        let kept = kept.ok_or_else(|| previous_not_found(&response_id(&run_id)))?;
        bytes += kept.input.len();
        if bytes > MAX_JSON {
            let message = format!("the responses before it have more than {MAX_JSON} bytes; begin another conversation");
            return Err(Refusal { status: StatusCode::PAYLOAD_TOO_LARGE, ..Refusal::wrong("previous_response_id", message) }.into());
        }
        next.clone_from(&kept.previous);
        chain.push(kept);
    }
    let runs: Vec<_> = chain.iter().map(|kept| kept.run_id.clone()).collect();
    if !app.ledger.use_responses(runs).await? {
        return Err(previous_not_found(id).into());
    }
    for KeptResponse { run_id, input, .. } in chain.into_iter().rev() {
        let outcome = answered(app, &run_id).await?.ok_or_else(|| previous_not_found(&response_id(&run_id)))?;
        app.feeds.keep(&JobId::Run(run_id.clone())).await?;
        let items: Vec<Box<RawValue>> = serde_json::from_str(&input).unwrap_or_default();
        for item in &items {
            add(conversation, "previous_response_id", item)?;
        }
        conversation.say("previous_response_id", Role::Assistant, message_of(&outcome).content.iter().map(Block::to_raw).collect());
    }
    Ok(last)
}

/// The items of an input, each reference replaced by what it stands for.
async fn items(app: &App, caller: &Caller, input: Input) -> Result<Vec<Box<RawValue>>, Refused> {
    let mut items = match input {
        Input::Text(text) => return Ok(vec![text_item(&text)]),
        Input::Other(items) => items,
    };
    // What runs gave, for there are often several items of one.
    let mut outputs: HashMap<String, Value> = HashMap::new();
    for (at, item) in items.iter_mut().enumerate() {
        let Some(id) = referenced(item) else { continue };
        let not_found = || Refusal::wrong(format!("input.{at}.id"), format!("there is no item \"{id}\"; send it whole"));
        let (run_id, place) = run_of_item(&id).ok_or_else(not_found)?;
        if !outputs.contains_key(run_id) {
            let kept = app.ledger.response(&caller.app, run_id).await?.ok_or_else(not_found)?;
            let outcome = answered(app, run_id).await?.ok_or_else(not_found)?;
            outputs.insert(run_id.to_owned(), response(&kept).finished(&outcome)["output"].take());
        }
        let found = &outputs[run_id][place];
        if found["id"] != id.as_str() {
            return Err(not_found().into());
        }
        *item = to_raw_value(found).expect("an item is JSON");
    }
    Ok(items)
}

/// A response that is kept, ready to be told.
fn response(kept: &KeptResponse) -> Response {
    let mut request: Map<String, Value> = serde_json::from_str(&kept.request).unwrap_or_default();
    let is_object = request["text"]["format"]["type"] == "json_object";
    request.insert("created_at".to_owned(), kept.created_at.into());
    let mut told = Response::new(request, is_object);
    told.run(&kept.run_id);
    told
}

/// What comes back of a request.
fn echo(sent: &[u8], created_at: i64) -> Map<String, Value> {
    let defaults = json!({
        "instructions": null, "previous_response_id": null, "tools": [], "tool_choice": "auto", "parallel_tool_calls": true,
        "temperature": null, "top_p": null, "max_output_tokens": null, "truncation": "disabled", "metadata": {}, "store": true,
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": null, "summary": null}, "background": false, "user": null,
    });
    let Value::Object(mut request) = defaults else { return Map::new() };
    let sent: Map<String, Value> = serde_json::from_slice(sent).unwrap_or_default();
    request.extend(
        sent.into_iter()
            .filter(|(name, value)| !value.is_null() && !matches!(name.as_str(), "input" | "stream" | "include" | "stream_options")),
    );
    request.insert("created_at".to_owned(), created_at.into());
    request
}

async fn read(app: &App, caller: &Caller, uuid: Uuid, mut asked: ResponseRequest, sent: &[u8]) -> Result<Asked<Response>, Refused> {
    let (stream, no_effect, is_object) = (asked.stream.unwrap_or(false), asked.no_effect(), asked.is_object());
    let items = items(app, caller, std::mem::replace(&mut asked.input, Input::Other(Vec::new()))).await?;
    let mut conversation = Conversation::default();
    if let Some(instructions) = asked.instructions.take() {
        conversation.system(instructions);
    }
    let previous = match asked.previous_response_id.take() {
        None => None,
        Some(id) => Some(add_chain(app, caller, &id, &mut conversation).await?),
    };
    let created_at = clock::now();
    let (parameters, whole, request, input) = aside(sent.len(), || {
        for (at, item) in items.iter().enumerate() {
            add(&mut conversation, &format!("input.{at}"), item)?;
        }
        let parameters = asked.parameters(&mut conversation)?;
        let input = serde_json::to_string(&items).expect("items are JSON");
        Ok::<_, Refusal>((parameters, conversation.finish()?, echo(sent, created_at), input))
    })?;
    let kept = asked.store.unwrap_or(true).then(|| KeptResponse {
        run_id: run_name(uuid),
        app_name: caller.app.clone(),
        created_at,
        previous,
        request: Value::Object(request.clone()).to_string(),
        input,
    });
    let spec = spec(app, asked.model, whole, parameters);
    Ok(Asked { vendor: Vendor::OpenAi, uuid, spec, stream, no_effect, kept, speech: Response::new(request, is_object) })
}

/// Ask the model (OpenAI's responses)
///
/// The model sees what is sent: no tools, settings or files of an agent's.
#[utoipa::path(post, path = "/v1/responses", operation_id = "create_response", tag = "model APIs", security(("app" = []), ("key" = [])),
    request_body = ResponseRequest, responses(
    (status = OK, description = "`response`, or its events",
        content((serde_json::Value = "application/json"), (String = "text/event-stream")), headers(("x-run-id" = String), ("x-request-id" = String))),
    (status = "default", description = "OpenAI's form of error", body = serde_json::Value),
))]
async fn create(
    State(app): State<Arc<App>>,
    envelope: Envelope,
    SentJson { value: asked, bytes }: SentJson<ResponseRequest>,
) -> Result<HttpResponse, ApiError> {
    let uuid = Uuid::now_v7();
    match read(&app, &envelope.caller, uuid, asked, &bytes).await {
        Ok(asked) => complete(&app, &envelope, "/v1/responses", &bytes, asked).await,
        Err(Refused::Here(refusal)) => Ok(refusal.into_response(Vendor::OpenAi, uuid.simple())),
        Err(Refused::Elsewhere(error)) => Err(error),
    }
}

/// The caller's own response that is kept.
async fn find(app: &App, caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<KeptResponse, Refused> {
    let id = id.map(|Path(id)| id).unwrap_or_default();
    let run_id = run_of_response(&id).ok_or_else(|| not_found(&id))?;
    Ok(app.ledger.response(&caller.app, run_id).await?.ok_or_else(|| not_found(&id))?)
}

fn refuse(refused: Refused) -> Result<HttpResponse, ApiError> {
    match refused {
        Refused::Here(refusal) => Ok(refusal.into_response(Vendor::OpenAi, Uuid::now_v7().simple())),
        Refused::Elsewhere(error) => Err(error),
    }
}

/// See a response
///
/// Kept for a day after its last use, unless it was asked for with `"store": false`.
#[utoipa::path(get, path = "/v1/responses/{id}", operation_id = "get_response", tag = "model APIs", security(("app" = []), ("key" = [])),
    params(("id" = String, Path)), responses(
    (status = OK, body = Value),
    (status = "default", description = "OpenAI's form of error", body = Value),
))]
async fn see(State(app): State<Arc<App>>, caller: Caller, id: Result<Path<String>, PathRejection>) -> Result<HttpResponse, ApiError> {
    let kept = match find(&app, &caller, id).await {
        Ok(kept) => kept,
        Err(refused) => return refuse(refused),
    };
    let id = JobId::Run(kept.run_id.clone());
    let mut told = response(&kept);
    let ended = match app.feeds.live(&id) {
        Some(live) => live.ended(),
        None => app.feeds.ended(&id).await?.map(Arc::new),
    };
    let body = match ended.as_deref().map(Refusal::of) {
        None if app.feeds.live(&id).is_some() => told.body("in_progress", &[], json!({})),
        None => return refuse(not_found(&response_id(&kept.run_id)).into()),
        Some(Ok(outcome)) => told.finished(outcome),
        Some(Err(refusal)) => told.failed(&refusal),
    };
    let mut answer = Json(body).into_response();
    refusal::name(answer.headers_mut(), &refusal::request_id(Uuid::now_v7().simple()));
    Ok(answer)
}

/// Delete a response
///
/// What goes on with it can't go on any more. The run's row in the ledger stays.
#[utoipa::path(delete, path = "/v1/responses/{id}", operation_id = "delete_response", tag = "model APIs", security(("app" = []), ("key" = [])),
    params(("id" = String, Path)), responses(
    (status = OK, body = Value),
    (status = "default", description = "OpenAI's form of error", body = Value),
))]
async fn delete(State(app): State<Arc<App>>, caller: Caller, id: Result<Path<String>, PathRejection>) -> Result<HttpResponse, ApiError> {
    let kept = match find(&app, &caller, id).await {
        Ok(kept) => kept,
        Err(refused) => return refuse(refused),
    };
    app.ledger.forget_response(&caller.app, &kept.run_id).await?;
    Ok(Json(json!({"id": response_id(&kept.run_id), "object": "response", "deleted": true})).into_response())
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create)).routes(routes!(see, delete))
}
