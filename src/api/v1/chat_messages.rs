//! Messages of OpenAI's chat completions as a conversation.

use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::conversation::{self, Conversation};
use super::fields::TextOr;
use super::refusal::Refusal;
use crate::agent::completion::Role;

#[derive(Deserialize, ToSchema)]
pub(super) struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant`, `tool` or `function`.
    role: String,
    /// Text, or parts.
    #[schema(value_type = Option<serde_json::Value>)]
    content: Option<TextOr<Vec<Part>>>,
    /// Who it is, of several users; of a `function` its name.
    name: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
    function_call: Option<Call>,
    /// Of a `tool`: which call it answers.
    tool_call_id: Option<String>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
    image_url: Option<TextOr<Url>>,
    file: Option<File>,
}

#[derive(Deserialize)]
struct Url {
    url: String,
}

#[derive(Deserialize)]
struct File {
    file_data: Option<String>,
}

#[derive(Deserialize, ToSchema)]
struct ToolCall {
    id: String,
    function: Option<Call>,
}

#[derive(Deserialize, ToSchema)]
struct Call {
    name: String,
    /// JSON.
    #[serde(default)]
    arguments: String,
}

/// Adds a message. `legacy_call` is the id of the last call in the form of 2023, which has none.
pub(super) fn add(conversation: &mut Conversation, place: &str, message: ChatMessage, legacy_call: &mut String) -> Result<(), Refusal> {
    let ChatMessage { role, content, name, tool_calls, function_call, tool_call_id } = message;
    let blocks = blocks(place, content)?;
    match role.as_str() {
        "system" | "developer" => conversation.system(texts(&blocks)),
        "user" => {
            let speaker = name.and_then(|name| conversation::text(&format!("{name}:")));
            conversation.say(place, Role::User, speaker.into_iter().chain(blocks).collect());
        }
        "assistant" => {
            let mut said = blocks;
            for (at, ToolCall { id, function }) in tool_calls.into_iter().flatten().enumerate() {
                let place = format!("{place}.tool_calls.{at}");
                let Some(Call { name, arguments }) = function else {
                    return Err(Refusal::wrong(place, "only calls of functions can be had here"));
                };
                said.push(conversation::tool_use(&place, &id, &name, &arguments)?);
            }
            if let Some(Call { name, arguments }) = function_call {
                *legacy_call = format!("call_{}", place.replace('.', "_"));
                said.push(conversation::tool_use(place, legacy_call, &name, &arguments)?);
            }
            conversation.say(place, Role::Assistant, said);
        }
        "tool" => {
            let id = tool_call_id.ok_or_else(|| Refusal::wrong(format!("{place}.tool_call_id"), "it is needed"))?;
            conversation.say(place, Role::User, vec![conversation::tool_result(&id, &blocks)]);
        }
        "function" => conversation.say(place, Role::User, vec![conversation::tool_result(legacy_call, &blocks)]),
        other => return Err(Refusal::wrong(format!("{place}.role"), format!("there is no role \"{other}\""))),
    }
    Ok(())
}

fn texts(blocks: &[Box<RawValue>]) -> String {
    #[derive(Deserialize)]
    struct Text {
        text: String,
    }
    let texts = blocks.iter().filter_map(|block| serde_json::from_str(block.get()).ok());
    texts.map(|Text { text }| text).collect::<Vec<_>>().join("\n")
}

fn blocks(place: &str, content: Option<TextOr<Vec<Part>>>) -> Result<Vec<Box<RawValue>>, Refusal> {
    let parts = match content {
        None => return Ok(Vec::new()),
        Some(TextOr::Text(text)) => return Ok(conversation::text(&text).into_iter().collect()),
        Some(TextOr::Other(parts)) => parts,
    };
    let mut blocks = Vec::new();
    for (at, Part { kind, text, refusal, image_url, file }) in parts.into_iter().enumerate() {
        let place = format!("{place}.content.{at}");
        match (kind.as_str(), text.or(refusal), image_url, file.and_then(|file| file.file_data)) {
            ("text" | "refusal", Some(text), ..) => blocks.extend(conversation::text(&text)),
            ("image_url", _, Some(TextOr::Text(url) | TextOr::Other(Url { url })), _) => {
                blocks.push(conversation::attachment(&place, &url)?);
            }
            ("file", _, _, Some(data)) if data.starts_with("data:") => blocks.push(conversation::attachment(&place, &data)?),
            ("file", _, _, Some(data)) => blocks.push(conversation::base64(&place, "application/pdf", &data)?),
            ("file", ..) => return Err(Refusal::wrong(place, conversation::NOT_FETCHED)),
            (kind, ..) => return Err(Refusal::wrong(place, format!("parts of type \"{kind}\" can't be had here"))),
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::super::conversation::Whole;
    use super::*;
    use serde_json::json;

    fn conversation(messages: serde_json::Value) -> Result<Whole, Refusal> {
        let messages: Vec<ChatMessage> = serde_json::from_value(messages).unwrap();
        let mut conversation = Conversation::default();
        let mut legacy = String::new();
        for (at, message) in messages.into_iter().enumerate() {
            add(&mut conversation, &format!("messages.{at}"), message, &mut legacy)?;
        }
        conversation.finish()
    }

    #[test]
    fn roles_parts_and_calls_become_blocks() {
        let Whole { system, messages, .. } = conversation(json!([
            {"role": "system", "content": "S"},
            {"role": "user", "name": "mio", "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "file", "file": {"file_data": "data:application/pdf;base64,BB==", "filename": "a.pdf"}},
            ]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "t", "arguments": ""}}]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
            {"role": "assistant", "content": "", "function_call": {"name": "u", "arguments": "{\"a\": 1}"}},
            {"role": "function", "name": "u", "content": "sun"},
            {"role": "developer", "content": "D"},
        ]))
        .unwrap();
        assert_eq!(system.as_deref(), Some("S\n\nD"));
        let all = serde_json::to_value(&messages).unwrap();
        assert_eq!(
            all[0]["content"],
            json!([
                {"type": "text", "text": "mio:"},
                {"type": "text", "text": "look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
                {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "BB=="}},
            ])
        );
        assert_eq!(all[1]["content"], json!([{"type": "tool_use", "id": "c1", "name": "t", "input": {}}]));
        assert_eq!(all[2]["content"], json!([{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]}]));
        assert_eq!(all[4]["content"][0]["tool_use_id"], all[3]["content"][0]["id"]);
        assert_eq!(messages.len(), 5);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (message, param) in [
            (json!({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}), "messages.0.content.0"),
            (json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}), "messages.0.content.0"),
            (json!({"role": "robot", "content": "x"}), "messages.0.role"),
            (json!({"role": "tool", "content": "x"}), "messages.0.tool_call_id"),
            (
                json!({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "t", "arguments": "no"}}]}),
                "messages.0.tool_calls.0",
            ),
        ] {
            assert_eq!(conversation(json!([message])).unwrap_err().param.as_deref(), Some(param));
        }
    }
}
