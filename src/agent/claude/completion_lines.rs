//! The lines by which the `claude` CLI is told a completion.

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::agent::completion::{Parameters, Thinking, Tokens};

/// A block as far as it is looked at.
#[derive(Deserialize)]
struct Looked<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    text: Option<String>,
}

pub(super) fn push(lines: &mut Vec<u8>, line: &impl Serialize) {
    serde_json::to_writer(&mut *lines, line).expect("a line is JSON");
    lines.push(b'\n');
}

#[derive(Serialize)]
pub(super) struct User {
    r#type: &'static str,
    message: UserMessage,
    #[serde(rename = "shouldQuery", skip_serializing_if = "Option::is_none")]
    should_query: Option<bool>,
}

#[derive(Serialize)]
struct UserMessage {
    role: &'static str,
    content: Vec<Box<RawValue>>,
}

impl User {
    pub(super) fn new(content: &[Box<RawValue>], should_query: Option<bool>) -> Self {
        Self {
            r#type: "user",
            message: UserMessage { role: "user", content: content.iter().map(|block| no_command(block)).collect() },
            should_query,
        }
    }
}

#[derive(Serialize)]
pub(super) struct Assistant<'a> {
    r#type: &'static str,
    uuid: String,
    message: AssistantMessage<'a>,
    /// Of what the user said.
    #[serde(skip_serializing_if = "Option::is_none")]
    local_command_source: Option<String>,
}

#[derive(Serialize)]
struct AssistantMessage<'a> {
    id: String,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: &'a [Box<RawValue>],
    stop_reason: &'static str,
    stop_sequence: Option<()>,
    usage: Tokens,
}

impl<'a> Assistant<'a> {
    pub(super) fn new(model: &'a str, content: &'a [Box<RawValue>], said: Option<String>) -> Self {
        let uuid = Uuid::new_v4();
        let message = AssistantMessage {
            // Messages that share one are taken for parts of one.
            id: format!("msg_{}", uuid.simple()),
            r#type: "message",
            role: "assistant",
            model,
            content,
            stop_reason: "end_turn",
            stop_sequence: None,
            usage: Tokens::default(),
        };
        Self { r#type: "assistant", uuid: uuid.to_string(), message, local_command_source: said }
    }
}

/// The text of a message that is one block of text and nothing else.
pub(super) fn plain_text(content: &[Box<RawValue>]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Text {
        #[serde(rename = "type")]
        kind: String,
        text: String,
    }
    let [block] = content else { return None };
    serde_json::from_str::<Text>(block.get()).ok().filter(|block| block.kind == "text").map(|block| block.text)
}

/// A leading slash would make a text a command of the CLI's own, also in the history; behind a line's end it is text.
fn no_command(block: &RawValue) -> Box<RawValue> {
    match serde_json::from_str(block.get()) {
        Ok(Looked { kind: "text", text: Some(text) }) if text.starts_with('/') => {
            let mut all: Map<String, Value> = serde_json::from_str(block.get()).unwrap_or_default();
            all.insert("text".to_owned(), Value::String(format!("\n{text}")));
            to_raw_value(&all).unwrap_or_else(|_| block.to_owned())
        }
        _ => block.to_owned(),
    }
}

/// What the CLI is to put into its request.
pub(super) fn settings(parameters: &Parameters) -> Value {
    #[derive(Serialize)]
    struct ExtraBody<'a> {
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        tools: &'a [Box<RawValue>],
        #[serde(skip_serializing_if = "Option::is_none")]
        tool_choice: Option<&'a RawValue>,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        stop_sequences: &'a [String],
        #[serde(skip_serializing_if = "Option::is_none")]
        output_config: Option<OutputConfig<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        thinking: Option<&'a RawValue>,
    }
    #[derive(Serialize)]
    struct OutputConfig<'a> {
        format: &'a RawValue,
    }
    let Parameters { tools, tool_choice, stop_sequences, max_tokens, thinking, effort, format } = parameters;
    let extra = ExtraBody {
        tools,
        tool_choice: tool_choice.as_deref(),
        stop_sequences,
        output_config: format.as_deref().map(|format| OutputConfig { format }),
        thinking: if let Thinking::As(thinking) = thinking { Some(thinking) } else { None },
    };
    let mut variables = Map::new();
    let extra = serde_json::to_string(&extra).expect("parameters are JSON");
    variables.insert("CLAUDE_CODE_EXTRA_BODY".to_owned(), extra.into());
    if let Some(most) = max_tokens {
        variables.insert("CLAUDE_CODE_MAX_OUTPUT_TOKENS".to_owned(), most.to_string().into());
    }
    if matches!(thinking, Thinking::Off) {
        variables.insert("CLAUDE_CODE_DISABLE_THINKING".to_owned(), "1".into());
    }
    match effort {
        Some(effort) => json!({"effortLevel": effort, "env": variables}),
        None => json!({"env": variables}),
    }
}

/// The line that asks the CLI what it is, its models among it.
pub(super) fn ask() -> Vec<u8> {
    let mut line = Vec::new();
    push(&mut line, &json!({"type": "control_request", "request_id": "0", "request": {"subtype": "initialize"}}));
    line
}
