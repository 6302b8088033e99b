//! `/v1/messages`: Anthropic's Messages API.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::conversation::{Conversation, text};
use super::fields::{NoEffect, TextOr, Unavailable, at_least_one, without_effect};
use super::messages_answer::Messages;
use super::refusal::{Refusal, Vendor};
use super::{Asked, Envelope, complete, spec};
use crate::agent::completion::{Completion, Parameters, Role, Thinking};
use crate::agent::contract::Spec;
use crate::api::auth::Caller;
use crate::api::body::{SentJson, Validate, whole_number};
use crate::api::error::{ApiError, FieldError};
use crate::api::validate::check_model;
use crate::app::App;
use crate::blocking::aside;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "what can't be had is refused where it is there")]
pub(super) struct MessagesRequest {
    /// `sonnet`, `opus`, `haiku`, a full name, or one of `CLAWDFORGE_MODEL_MAP`.
    model: String,
    messages: Vec<InputMessage>,
    /// Tokens that the answer may have.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(required, minimum = 1)]
    max_tokens: Option<i64>,
    /// Text, or blocks of text: the whole system prompt.
    #[schema(value_type = Option<serde_json::Value>)]
    system: Option<TextOr<Vec<TextBlock>>>,
    stream: Option<bool>,
    stop_sequences: Option<Vec<String>>,
    /// Of the caller's own (type `custom`).
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    tools: Option<Vec<Box<RawValue>>>,
    #[schema(value_type = Option<serde_json::Value>)]
    tool_choice: Option<Box<RawValue>>,
    /// None by default.
    #[schema(value_type = Option<serde_json::Value>)]
    thinking: Option<Box<RawValue>>,
    output_config: Option<OutputConfig>,
    /// As `output_config.format`.
    #[schema(value_type = Option<serde_json::Value>)]
    output_format: Option<Box<RawValue>>,
    #[serde(default)]
    temperature: NoEffect,
    #[serde(default)]
    top_p: NoEffect,
    #[serde(default)]
    metadata: NoEffect,
    #[serde(default)]
    service_tier: NoEffect,
    #[serde(default)]
    cache_control: NoEffect,
    #[schema(ignore)]
    thread: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    #[schema(ignore)]
    top_k: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    container: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    context_management: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    mcp_servers: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    inference_geo: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    speed: Unavailable,
}

#[derive(Deserialize, ToSchema)]
struct InputMessage {
    /// `user` or `assistant`; what `system` says joins the system prompt.
    role: String,
    /// Text, or blocks.
    #[schema(value_type = serde_json::Value)]
    content: TextOr<Vec<Box<RawValue>>>,
}

#[derive(Deserialize)]
struct TextBlock {
    text: String,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct OutputConfig {
    /// `low`, `medium`, `high`, …
    effort: Option<String>,
    #[schema(value_type = Option<serde_json::Value>)]
    format: Option<Box<RawValue>>,
}

impl Validate for MessagesRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_model(Some(&self.model), &mut errors);
        at_least_one("/max_tokens", self.max_tokens, &mut errors);
        errors
    }
}

impl MessagesRequest {
    /// The job that it asks for.
    fn read(self, app: &App) -> Result<Spec, Refusal> {
        if self.thread.is_some() {
            // Their tool runners then send the whole conversation each time.
            let details = json!({"error_code": "thread_unsupported_request", "unsupported": []});
            return Err(Refusal {
                details: Some(details),
                ..Refusal::new(StatusCode::BAD_REQUEST, "thread: send the whole conversation; threads can't be had here")
            });
        }
        let tools = self.tools.unwrap_or_default();
        for (at, tool) in tools.iter().enumerate() {
            check_tool(at, tool)?;
        }
        let mut conversation = Conversation::default();
        match self.system {
            None => {}
            Some(TextOr::Text(text)) => conversation.system(text),
            Some(TextOr::Other(blocks)) => blocks.into_iter().for_each(|block| conversation.system(block.text)),
        }
        for (at, InputMessage { role, content }) in self.messages.into_iter().enumerate() {
            let place = format!("messages.{at}");
            let blocks = match content {
                TextOr::Text(said) => text(&said).into_iter().collect(),
                TextOr::Other(blocks) => blocks,
            };
            match role.as_str() {
                "user" => conversation.say(place, Role::User, blocks),
                "assistant" => conversation.say(place, Role::Assistant, blocks),
                "system" => blocks.iter().for_each(|block| {
                    if let Ok(TextBlock { text }) = serde_json::from_str(block.get()) {
                        conversation.system(text);
                    }
                }),
                other => return Err(Refusal::wrong(place, format!("there is no role \"{other}\""))),
            }
        }
        let whole = conversation.finish()?;
        let OutputConfig { effort, format } = self.output_config.unwrap_or(OutputConfig { effort: None, format: None });
        let parameters = Parameters {
            tools,
            tool_choice: self.tool_choice,
            stop_sequences: self.stop_sequences.unwrap_or_default(),
            max_tokens: self.max_tokens.map(i64::cast_unsigned),
            thinking: self.thinking.map_or(Ok(Thinking::Off), thinking)?,
            effort,
            format: format.or(self.output_format),
        };
        Ok(spec(app, self.model, whole, parameters))
    }
}

/// Tools that the model's API would carry out itself, or has its own ideas of, are not the caller's.
fn check_tool(at: usize, tool: &RawValue) -> Result<(), Refusal> {
    #[derive(Deserialize)]
    struct Tool {
        #[serde(rename = "type")]
        kind: Option<String>,
        name: Option<String>,
        input_schema: Option<serde_json::Map<String, serde_json::Value>>,
    }
    let place = |of: &str| format!("tools.{at}{of}");
    let Tool { kind, name, input_schema } =
        serde_json::from_str(tool.get()).map_err(|error| Refusal::wrong(place(""), format!("it can't be read ({error})")))?;
    match kind {
        Some(kind) if kind != "custom" => {
            Err(Refusal::wrong(place(".type"), format!("tools of type \"{kind}\" can't be had here, only your own (\"custom\")")))
        }
        _ if name.as_ref().is_none_or(String::is_empty) => Err(Refusal::wrong(place(".name"), "a name is needed")),
        _ if input_schema.is_none() => Err(Refusal::wrong(place(".input_schema"), "a JSON Schema of an object is needed")),
        _ => Ok(()),
    }
}

/// Whether the model is to think first, as the Messages API says it.
pub(super) fn thinking(thinking: Box<RawValue>) -> Result<Thinking, Refusal> {
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "type")]
        kind: String,
    }
    let Kind { kind } =
        serde_json::from_str(thinking.get()).map_err(|_| Refusal::wrong("thinking", "an object with a \"type\" is needed"))?;
    Ok(if kind == "disabled" { Thinking::Off } else { Thinking::As(thinking) })
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "only described")]
struct Message {
    id: String,
    #[schema(example = "message")]
    r#type: String,
    #[schema(example = "assistant")]
    role: String,
    model: String,
    content: Vec<serde_json::Value>,
    #[schema(example = "end_turn")]
    stop_reason: String,
    stop_sequence: Option<String>,
    usage: serde_json::Value,
}

/// Ask the model (Anthropic's Messages API)
///
/// The model sees what is sent: no tools, settings or files of an agent's. `stream` gives the API's own events.
#[utoipa::path(post, path = "/v1/messages", operation_id = "create_message", tag = "model APIs", security(("app" = []), ("key" = [])),
    request_body = MessagesRequest, responses(
    (status = OK, content((Message = "application/json"), (String = "text/event-stream")), headers(("x-run-id" = String), ("request-id" = String))),
    (status = "default", description = "Anthropic's form of error", body = serde_json::Value),
))]
async fn create(
    State(app): State<Arc<App>>,
    envelope: Envelope,
    SentJson { value: asked, bytes }: SentJson<MessagesRequest>,
) -> Result<Response, ApiError> {
    let uuid = Uuid::now_v7();
    let stream = asked.stream.unwrap_or(false);
    let no_effect = without_effect(&[
        ("temperature", asked.temperature),
        ("top_p", asked.top_p),
        ("metadata", asked.metadata),
        ("service_tier", asked.service_tier),
        ("cache_control", asked.cache_control),
    ]);
    let spec = match asked.max_tokens {
        None => Err(Refusal::wrong("max_tokens", "it is needed")),
        Some(_) => aside(bytes.len(), || asked.read(&app)),
    };
    match spec {
        Err(refusal) => Ok(refusal.into_response(Vendor::Anthropic, uuid.simple())),
        Ok(spec) => {
            let asked = Asked { vendor: Vendor::Anthropic, uuid, spec, stream, no_effect, kept: None, speech: Messages::default() };
            complete(&app, &envelope, "/v1/messages", &bytes, asked).await
        }
    }
}

#[derive(serde::Serialize, ToSchema)]
struct TokenCount {
    input_tokens: usize,
    /// Always true: nothing here can count them.
    estimated: bool,
}

/// Estimate tokens
///
/// From the lengths alone: the CLI has no way to count a request with tools.
#[utoipa::path(post, path = "/v1/messages/count_tokens", operation_id = "count_tokens", tag = "model APIs", security(("app" = []), ("key" = [])),
    request_body = MessagesRequest, responses(
    (status = OK, body = TokenCount),
    (status = "default", description = "Anthropic's form of error", body = serde_json::Value),
))]
async fn count_tokens(
    State(app): State<Arc<App>>,
    _caller: Caller,
    SentJson { value: asked, bytes }: SentJson<MessagesRequest>,
) -> Result<Response, ApiError> {
    match aside(bytes.len(), || asked.read(&app)) {
        Err(refusal) => Ok(refusal.into_response(Vendor::Anthropic, Uuid::now_v7().simple())),
        Ok(spec) => Ok(Json(TokenCount { input_tokens: estimate(&spec), estimated: true }).into_response()),
    }
}

/// A token is some four bytes of JSON; an image some 1,600, a page of a PDF some 2,000 for each 50 kB.
fn estimate(spec: &Spec) -> usize {
    let Some(Completion { messages, parameters }) = &spec.completion else { return 0 };
    let block = |block: &RawValue| {
        let text = block.get();
        match text.find(r#""base64""#) {
            None => text.len().div_ceil(4),
            Some(_) if text.contains("application/pdf") => 2_000 * text.len().div_ceil(66_000),
            Some(_) => 1_600,
        }
    };
    let said: usize = messages.iter().flat_map(|message| &message.content).map(|said| block(said)).sum();
    let tools: usize = parameters.tools.iter().map(|tool| tool.get().len().div_ceil(4)).sum();
    said + tools + spec.system.as_ref().map_or(0, |system| system.len().div_ceil(4))
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create)).routes(routes!(count_tokens))
}
