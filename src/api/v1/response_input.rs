//! What `/v1/responses` takes: the request, and its items as a conversation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::conversation::{self, Conversation};
use super::fields::{NoEffect, TextOr, Unavailable, at_least_one, only, without_effect};
use super::parameters;
use super::refusal::Refusal;
use super::tools::{self, Choice, Function, tool};
use crate::agent::completion::{Parameters, Role};
use crate::api::body::{Validate, whole_number};
use crate::api::error::FieldError;
use crate::api::validate::check_model;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "what can't be had is refused where it is there")]
pub(super) struct ResponseRequest {
    /// `sonnet`, `opus`, `haiku`, a full name, or one of `CLAWDFORGE_MODEL_MAP`.
    pub(super) model: String,
    /// Text, or items.
    #[schema(value_type = serde_json::Value)]
    pub(super) input: Input,
    /// The system prompt, of this response alone.
    pub(super) instructions: Option<String>,
    /// A response that is kept, to go on with.
    pub(super) previous_response_id: Option<String>,
    /// Whether the response is kept for a day, which it is by default.
    pub(super) store: Option<bool>,
    pub(super) stream: Option<bool>,
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 1)]
    pub(super) max_output_tokens: Option<i64>,
    pub(super) tools: Option<Vec<ResponseTool>>,
    #[schema(value_type = Option<serde_json::Value>)]
    pub(super) tool_choice: Option<Choice>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) text: Option<TextOptions>,
    pub(super) reasoning: Option<Reasoning>,
    /// `reasoning.encrypted_content` comes in any case.
    pub(super) include: Option<Vec<String>>,
    /// Comes back with the response.
    #[schema(value_type = Option<BTreeMap<String, String>>)]
    pub(super) metadata: Option<BTreeMap<String, String>>,
    /// Only `disabled`.
    pub(super) truncation: Option<String>,
    /// Only false.
    pub(super) background: Option<bool>,
    /// Only 0.
    #[serde(default, deserialize_with = "whole_number")]
    pub(super) top_logprobs: Option<i64>,
    #[serde(default)]
    temperature: NoEffect,
    #[serde(default)]
    top_p: NoEffect,
    #[serde(default)]
    user: NoEffect,
    #[serde(default)]
    service_tier: NoEffect,
    #[serde(default)]
    prompt_cache_key: NoEffect,
    #[serde(default)]
    prompt_cache_retention: NoEffect,
    #[serde(default)]
    safety_identifier: NoEffect,
    #[serde(default)]
    stream_options: NoEffect,
    #[serde(default)]
    #[schema(ignore)]
    conversation: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    prompt: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    max_tool_calls: Unavailable,
    #[serde(default)]
    #[schema(ignore)]
    context_management: Unavailable,
}

/// Text, or items.
pub(super) type Input = TextOr<Vec<Box<RawValue>>>;

#[derive(Deserialize, ToSchema)]
pub(super) struct ResponseTool {
    /// `function`.
    r#type: String,
    #[serde(default)]
    name: String,
    description: Option<String>,
    #[schema(value_type = Option<serde_json::Value>)]
    parameters: Option<Box<RawValue>>,
    strict: Option<bool>,
}

#[derive(Deserialize, ToSchema)]
pub(super) struct TextOptions {
    format: Option<Format>,
    #[serde(default)]
    #[schema(ignore)]
    #[expect(dead_code, reason = "refused where it is there")]
    verbosity: Unavailable,
}

#[derive(Deserialize, ToSchema)]
struct Format {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    #[schema(value_type = Option<serde_json::Value>)]
    schema: Option<Box<RawValue>>,
}

#[derive(Deserialize, ToSchema)]
pub(super) struct Reasoning {
    /// `none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`; none by default.
    effort: Option<String>,
}

impl Validate for ResponseRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_model(Some(&self.model), &mut errors);
        at_least_one("/max_output_tokens", self.max_output_tokens, &mut errors);
        only("/background", self.background.as_ref(), &false, "\"false\"", &mut errors);
        only("/truncation", self.truncation.as_ref(), &"disabled".to_owned(), "\"disabled\"", &mut errors);
        only("/top_logprobs", self.top_logprobs.as_ref(), &0, "none", &mut errors);
        for wanted in self.include.iter().flatten().filter(|wanted| *wanted != "reasoning.encrypted_content") {
            errors.push(FieldError::new("/include", format!("\"{wanted}\" can't be had here; leave it out")));
        }
        errors
    }
}

impl ResponseRequest {
    pub(super) fn no_effect(&self) -> Vec<&'static str> {
        without_effect(&[
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("user", self.user),
            ("service_tier", self.service_tier),
            ("prompt_cache_key", self.prompt_cache_key),
            ("prompt_cache_retention", self.prompt_cache_retention),
            ("safety_identifier", self.safety_identifier),
            ("stream_options", self.stream_options),
        ])
    }

    /// Whether an object is asked for without a schema.
    pub(super) fn is_object(&self) -> bool {
        self.text.as_ref().and_then(|text| text.format.as_ref()).is_some_and(|format| format.r#type == "json_object")
    }

    /// How the model is to answer. What it has to be told of that goes into the system prompt.
    pub(super) fn parameters(&mut self, conversation: &mut Conversation) -> Result<Parameters, Refusal> {
        let format = match self.text.take().and_then(|text| text.format) {
            None => None,
            Some(Format { r#type, schema }) => {
                parameters::format(["text.format.type", "text.format.schema"], &r#type, schema, conversation)?
            }
        };
        let mut offered = Vec::new();
        for (at, ResponseTool { r#type, name, description, parameters, strict }) in self.tools.take().into_iter().flatten().enumerate() {
            if r#type != "function" {
                let message = format!("tools of type \"{type}\" can't be had here, only functions");
                return Err(Refusal::wrong(format!("tools.{at}.type"), message));
            }
            offered.push(tool(&format!("tools.{at}"), Function { name, description, parameters, strict })?);
        }
        let tool_choice = tools::choice("tool_choice", self.tool_choice.take(), self.parallel_tool_calls, !offered.is_empty())?;
        let asked = self.reasoning.take().and_then(|reasoning| reasoning.effort);
        let (effort, mut thinking) = parameters::effort("reasoning.effort", asked.as_deref())?;
        if tools::is_forced(tool_choice.as_deref()) {
            thinking = crate::agent::completion::Thinking::Off;
        }
        let max_tokens = self.max_output_tokens.map(i64::cast_unsigned);
        Ok(Parameters { tools: offered, tool_choice, stop_sequences: Vec::new(), max_tokens, thinking, effort, format })
    }
}

/// An item of the input, as far as it is looked at.
#[derive(Deserialize)]
struct Item<'a> {
    #[serde(rename = "type")]
    kind: Option<String>,
    role: Option<String>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    id: Option<String>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    #[serde(borrow)]
    output: Option<&'a RawValue>,
    summary: Option<Vec<Summary>>,
    encrypted_content: Option<String>,
}

#[derive(Deserialize)]
struct Summary {
    text: String,
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
    image_url: Option<String>,
    file_data: Option<String>,
}

/// The item that a reference stands for, if the input holds one.
pub(super) fn referenced(item: &RawValue) -> Option<String> {
    let item: Item<'_> = serde_json::from_str(item.get()).ok()?;
    item.id.filter(|_| item.kind.as_deref() == Some("item_reference"))
}

/// A text as the one item of an input.
pub(super) fn text_item(text: &str) -> Box<RawValue> {
    #[derive(Serialize)]
    struct Message<'a> {
        r#type: &'static str,
        role: &'static str,
        content: &'a str,
    }
    serde_json::value::to_raw_value(&Message { r#type: "message", role: "user", content: text }).expect("an item is JSON")
}

/// Adds an item to a conversation.
pub(super) fn add(conversation: &mut Conversation, place: &str, item: &RawValue) -> Result<(), Refusal> {
    let read = serde_json::from_str(item.get()).map_err(|error| Refusal::wrong(place, format!("the item can't be read ({error})")));
    let Item { kind, role, content, id: _, call_id, name, arguments, output, summary, encrypted_content } = read?;
    let needed = |what: &str| Refusal::wrong(format!("{place}.{what}"), "it is needed");
    match kind.as_deref() {
        None | Some("message") => {
            let blocks = blocks(place, content)?;
            match role.as_deref() {
                Some("user") => conversation.say(place, Role::User, blocks),
                Some("assistant") => conversation.say(place, Role::Assistant, blocks),
                Some("system" | "developer") => {
                    let text: Vec<_> =
                        blocks.iter().filter_map(|block| serde_json::from_str(block.get()).ok()).map(|Summary { text }| text).collect();
                    conversation.system(text.join("\n"));
                }
                other => {
                    let message = format!("there is no role \"{}\"", other.unwrap_or_default());
                    return Err(Refusal::wrong(format!("{place}.role"), message));
                }
            }
        }
        Some("function_call") => {
            let (id, name) = (call_id.ok_or_else(|| needed("call_id"))?, name.ok_or_else(|| needed("name"))?);
            let call = conversation::tool_use(place, &id, &name, arguments.as_deref().unwrap_or_default())?;
            conversation.say(place, Role::Assistant, vec![call]);
        }
        Some("function_call_output") => {
            let id = call_id.ok_or_else(|| needed("call_id"))?;
            let given = blocks(place, output)?;
            conversation.say(place, Role::User, vec![conversation::tool_result(&id, &given)]);
        }
        // Without its signature the model's API does not take it back.
        Some("reasoning") => {
            if let Some(signature) = encrypted_content.filter(|signature| !signature.is_empty()) {
                let text = summary.into_iter().flatten().map(|Summary { text }| text).collect::<String>();
                conversation.say(place, Role::Assistant, vec![conversation::thinking(&text, &signature)]);
            }
        }
        Some(other) => return Err(Refusal::wrong(place, format!("items of type \"{other}\" can't be had here"))),
    }
    Ok(())
}

fn blocks(place: &str, content: Option<&RawValue>) -> Result<Vec<Box<RawValue>>, Refusal> {
    let Some(content) = content else { return Ok(Vec::new()) };
    let parts: Vec<Part> = match serde_json::from_str(content.get()) {
        Ok(TextOr::Text(text)) => return Ok(conversation::text(&text).into_iter().collect()),
        Ok(TextOr::Other(parts)) => parts,
        Err(_) => return Err(Refusal::wrong(place, "text or a list of parts is needed")),
    };
    let mut blocks = Vec::new();
    for (at, Part { kind, text, refusal, image_url, file_data }) in parts.into_iter().enumerate() {
        let place = format!("{place}.content.{at}");
        match (kind.as_str(), text.or(refusal), image_url, file_data) {
            ("input_text" | "output_text" | "text" | "refusal", Some(text), ..) => blocks.extend(conversation::text(&text)),
            ("input_image", _, Some(url), _) => blocks.push(conversation::attachment(&place, &url)?),
            ("input_file", _, _, Some(data)) if data.starts_with("data:") => blocks.push(conversation::attachment(&place, &data)?),
            ("input_file", _, _, Some(data)) => blocks.push(conversation::base64(&place, "application/pdf", &data)?),
            ("input_image" | "input_file", ..) => return Err(Refusal::wrong(place, conversation::NOT_FETCHED)),
            (kind, ..) => return Err(Refusal::wrong(place, format!("parts of type \"{kind}\" can't be had here"))),
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn items_become_messages_by_turns() {
        let mut conversation = Conversation::default();
        for (at, item) in [
            json!({"role": "developer", "content": "D"}),
            json!({"role": "user", "content": [{"type": "input_text", "text": "both"}, {"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}),
            json!({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "SIG"}),
            json!({"type": "reasoning", "id": "rs_2", "summary": []}),
            json!({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me.", "annotations": []}]}),
            json!({"type": "function_call", "call_id": "c1", "name": "t", "arguments": "{\"b\": 1}", "parsed_arguments": {}}),
            json!({"type": "function_call", "call_id": "c2", "name": "t", "arguments": "{}"}),
            json!({"type": "function_call_output", "call_id": "c1", "output": "rain"}),
            json!({"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]}),
        ]
        .iter()
        .enumerate()
        {
            let item = RawValue::from_string(item.to_string()).unwrap();
            add(&mut conversation, &format!("input.{at}"), &item).unwrap();
        }
        let whole = conversation.finish().unwrap();
        assert_eq!(whole.system.as_deref(), Some("D"));
        let messages = serde_json::to_value(&whole.messages).unwrap();
        let kinds = |at: usize| {
            messages[at]["content"].as_array().unwrap().iter().map(|block| block["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(
            (kinds(0), kinds(1), kinds(2)),
            (
                vec!["text".to_owned(), "image".to_owned()],
                ["thinking", "text", "tool_use", "tool_use"].map(str::to_owned).to_vec(),
                vec!["tool_result".to_owned(); 2]
            )
        );
        assert_eq!(messages[1]["content"][0], json!({"type": "thinking", "thinking": "hm", "signature": "SIG"}));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (item, param) in [
            (json!({"type": "web_search_call", "id": "x"}), "input.0"),
            (json!({"type": "function_call", "name": "x"}), "input.0.call_id"),
            (json!({"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}), "input.0.content.0"),
        ] {
            let item = RawValue::from_string(item.to_string()).unwrap();
            let refusal = add(&mut Conversation::default(), "input.0", &item).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some(param));
        }
    }
}
