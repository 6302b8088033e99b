//! `/v1/chat/completions`: OpenAI's chat completions.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::chat_answer::{Calls, Chat};
use super::chat_messages::{ChatMessage, add};
use super::conversation::Conversation;
use super::fields::{NoEffect, TextOr, Unavailable, at_least_one, only, without_effect};
use super::messages::thinking;
use super::parameters;
use super::refusal::{Refusal, Vendor};
use super::tools::{self, Choice, Function, tool};
use super::{Asked, Envelope, complete, spec};
use crate::agent::completion::{Parameters, Thinking};
use crate::agent::contract::Spec;
use crate::api::body::{SentJson, Validate, whole_number};
use crate::api::error::{ApiError, FieldError};
use crate::api::validate::check_model;
use crate::app::App;
use crate::blocking::aside;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "what can't be had is refused where it is there")]
struct ChatRequest {
    /// `sonnet`, `opus`, `haiku`, a full name, or one of `CLAWDFORGE_MODEL_MAP`.
    model: String,
    messages: Vec<ChatMessage>,
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 1)]
    max_completion_tokens: Option<i64>,
    /// As `max_completion_tokens`.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 1)]
    max_tokens: Option<i64>,
    /// A text or a list of texts.
    #[schema(value_type = Option<serde_json::Value>)]
    stop: Option<TextOr<Vec<String>>>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    tools: Option<Vec<ChatTool>>,
    #[schema(value_type = Option<serde_json::Value>)]
    tool_choice: Option<Choice>,
    parallel_tool_calls: Option<bool>,
    /// As `tools`, in the form of 2023.
    functions: Option<Vec<Function>>,
    #[schema(value_type = Option<serde_json::Value>)]
    function_call: Option<Choice>,
    response_format: Option<ResponseFormat>,
    /// `none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`; none by default.
    reasoning_effort: Option<String>,
    /// As Anthropic's own API has it.
    #[schema(value_type = Option<serde_json::Value>)]
    thinking: Option<Box<RawValue>>,
    /// Only 1.
    #[serde(default, deserialize_with = "whole_number")]
    n: Option<i64>,
    /// Only false.
    logprobs: Option<bool>,
    /// Only text.
    modalities: Option<Vec<String>>,
    /// Only an empty one.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>)]
    logit_bias: Option<BTreeMap<String, serde_json::Value>>,
    #[serde(default)]
    temperature: NoEffect,
    #[serde(default)]
    top_p: NoEffect,
    #[serde(default)]
    frequency_penalty: NoEffect,
    #[serde(default)]
    presence_penalty: NoEffect,
    #[serde(default)]
    user: NoEffect,
    #[serde(default)]
    metadata: NoEffect,
    #[serde(default)]
    store: NoEffect,
    #[serde(default)]
    service_tier: NoEffect,
    #[serde(default)]
    prompt_cache_key: NoEffect,
    #[serde(default)]
    prompt_cache_retention: NoEffect,
    #[serde(default)]
    safety_identifier: NoEffect,
    #[serde(default)]
    #[schema(ignore)]
    seed: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    top_logprobs: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    audio: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    prediction: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    verbosity: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    web_search_options: Unavailable,
}

#[derive(Default, Deserialize, ToSchema)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize, ToSchema)]
struct ChatTool {
    /// `function`.
    r#type: String,
    function: Option<Function>,
}

#[derive(Deserialize, ToSchema)]
struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    json_schema: Option<JsonSchema>,
}

#[derive(Deserialize, ToSchema)]
struct JsonSchema {
    #[schema(value_type = Option<serde_json::Value>)]
    schema: Option<Box<RawValue>>,
}

impl Validate for ChatRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_model(Some(&self.model), &mut errors);
        at_least_one("/max_tokens", self.max_tokens, &mut errors);
        at_least_one("/max_completion_tokens", self.max_completion_tokens, &mut errors);
        only("/n", self.n.as_ref(), &1, "one choice", &mut errors);
        only("/logprobs", self.logprobs.as_ref(), &false, "\"false\"", &mut errors);
        only("/modalities", self.modalities.as_ref(), &vec!["text".to_owned()], "text", &mut errors);
        only("/logit_bias", self.logit_bias.as_ref().map(BTreeMap::len).as_ref(), &0, "an empty one", &mut errors);
        errors
    }
}

impl ChatRequest {
    fn no_effect(&self) -> Vec<&'static str> {
        without_effect(&[
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
            ("user", self.user),
            ("metadata", self.metadata),
            ("store", self.store),
            ("service_tier", self.service_tier),
            ("prompt_cache_key", self.prompt_cache_key),
            ("prompt_cache_retention", self.prompt_cache_retention),
            ("safety_identifier", self.safety_identifier),
        ])
    }

    fn read(self, app: &App) -> Result<Spec, Refusal> {
        let mut conversation = Conversation::default();
        let mut legacy_call = String::new();
        for (at, message) in self.messages.into_iter().enumerate() {
            add(&mut conversation, &format!("messages.{at}"), message, &mut legacy_call)?;
        }
        let format = match self.response_format {
            None => None,
            Some(ResponseFormat { r#type, json_schema }) => {
                let params = ["response_format.type", "response_format.json_schema.schema"];
                parameters::format(params, &r#type, json_schema.and_then(|format| format.schema), &mut conversation)?
            }
        };
        let whole = conversation.finish()?;
        let mut offered = Vec::new();
        for (at, ChatTool { r#type, function }) in self.tools.unwrap_or_default().into_iter().enumerate() {
            let function = function.filter(|_| r#type == "function");
            let wrong =
                || Refusal::wrong(format!("tools.{at}.type"), format!("tools of type \"{type}\" can't be had here, only functions"));
            offered.push(tool(&format!("tools.{at}"), function.ok_or_else(wrong)?)?);
        }
        for (at, function) in self.functions.unwrap_or_default().into_iter().enumerate() {
            offered.push(tool(&format!("functions.{at}"), function)?);
        }
        let choice = self.tool_choice.or(self.function_call);
        let tool_choice = tools::choice("tool_choice", choice, self.parallel_tool_calls, !offered.is_empty())?;
        let (effort, mut thinks) = parameters::effort("reasoning_effort", self.reasoning_effort.as_deref())?;
        if let Some(asked) = self.thinking {
            thinks = thinking(asked)?;
        }
        // What was thought before a call can't come back in this API, and without it the model's API refuses to go on thinking.
        let goes_on = whole.messages.last().is_some_and(|last| last.content.iter().any(|block| block.get().contains(r#""tool_result""#)));
        if goes_on || tools::is_forced(tool_choice.as_deref()) {
            thinks = Thinking::Off;
        }
        let parameters = Parameters {
            tools: offered,
            tool_choice,
            stop_sequences: match self.stop {
                None => Vec::new(),
                Some(TextOr::Text(text)) => vec![text],
                Some(TextOr::Other(texts)) => texts,
            },
            max_tokens: self.max_completion_tokens.or(self.max_tokens).map(i64::cast_unsigned),
            thinking: thinks,
            effort,
            format,
        };
        Ok(spec(app, self.model, whole, parameters))
    }
}

/// Ask the model (OpenAI's chat completions)
///
/// The model sees what is sent: no tools, settings or files of an agent's.
#[utoipa::path(post, path = "/v1/chat/completions", operation_id = "create_chat_completion", tag = "model APIs", security(("app" = []), ("key" = [])),
    request_body = ChatRequest, responses(
    (status = OK, description = "`chat.completion`, or `chat.completion.chunk`s",
        content((serde_json::Value = "application/json"), (String = "text/event-stream")), headers(("x-run-id" = String), ("x-request-id" = String))),
    (status = "default", description = "OpenAI's form of error", body = serde_json::Value),
))]
async fn create(
    State(app): State<Arc<App>>,
    envelope: Envelope,
    SentJson { value: asked, bytes }: SentJson<ChatRequest>,
) -> Result<Response, ApiError> {
    let uuid = Uuid::now_v7();
    let (stream, no_effect) = (asked.stream.unwrap_or(false), asked.no_effect());
    let calls = if asked.functions.is_some() { Calls::Legacy } else { Calls::Tools };
    let is_object = asked.response_format.as_ref().is_some_and(|format| format.r#type == "json_object");
    let usage = asked.stream_options.as_ref().is_some_and(|options| options.include_usage);
    match aside(bytes.len(), || asked.read(&app)) {
        Err(refusal) => Ok(refusal.into_response(Vendor::OpenAi, uuid.simple())),
        Ok(spec) => {
            let asked =
                Asked { vendor: Vendor::OpenAi, uuid, spec, stream, no_effect, kept: None, speech: Chat::new(calls, is_object, usage) };
            complete(&app, &envelope, "/v1/chat/completions", &bytes, asked).await
        }
    }
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create))
}
