//! The events in which the Messages API streams a message.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::completion::{Block, Tokens};

/// An event, as far as anything here needs it.
#[derive(Debug)]
pub enum StreamEvent {
    /// A message begins.
    Start {
        /// `msg_…`.
        id: String,
        /// The model's full name.
        model: String,
        /// What was read.
        usage: Counts,
    },
    /// A block begins, with nothing in it yet.
    BlockStart(Block),
    /// The block grows.
    Delta(Delta),
    /// The block is whole.
    BlockStop,
    /// The message is whole.
    Stop {
        /// Why the model stopped; `None` where the stream broke off.
        stop_reason: Option<String>,
        /// The text that it stopped at.
        stop_sequence: Option<String>,
        /// What was written.
        usage: Counts,
    },
}

/// A piece of a block.
#[derive(Debug)]
pub enum Delta {
    /// Of its text.
    Text(String),
    /// Of what the model thinks.
    Thinking(String),
    /// Of that one's signature.
    Signature(String),
    /// Of a call's arguments.
    InputJson(String),
}

/// Counts that replace those of before where they are there.
#[derive(Debug, Default, Deserialize)]
pub struct Counts {
    input_tokens: Option<i64>,
    cache_creation_input_tokens: Option<i64>,
    cache_read_input_tokens: Option<i64>,
    output_tokens: Option<i64>,
}

impl Counts {
    /// Replaces what is known here.
    pub fn apply(self, tokens: &mut Tokens) {
        let counts = [
            (&mut tokens.input_tokens, self.input_tokens),
            (&mut tokens.cache_creation_input_tokens, self.cache_creation_input_tokens),
            (&mut tokens.cache_read_input_tokens, self.cache_read_input_tokens),
            (&mut tokens.output_tokens, self.output_tokens),
        ];
        for (count, newer) in counts {
            *count = newer.unwrap_or(*count);
        }
    }
}

#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "type")]
    kind: String,
    message: Option<WireMessage>,
    content_block: Option<WireBlock>,
    delta: Option<WireDelta>,
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct WireMessage {
    id: String,
    model: String,
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct WireBlock {
    #[serde(rename = "type")]
    kind: String,
    id: Option<String>,
    name: Option<String>,
    data: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireDelta {
    text: Option<String>,
    thinking: Option<String>,
    signature: Option<String>,
    partial_json: Option<String>,
    stop_reason: Option<String>,
    stop_sequence: Option<String>,
}

impl StreamEvent {
    /// Reads an event. `None` for one that tells nothing here.
    pub fn read(event: &RawValue) -> Option<Self> {
        let Wire { kind, message, content_block, delta, usage } = serde_json::from_str(event.get()).ok()?;
        Some(match kind.as_str() {
            "message_start" => {
                let WireMessage { id, model, usage } = message?;
                Self::Start { id, model, usage: usage.unwrap_or_default() }
            }
            "content_block_start" => Self::BlockStart(match content_block? {
                WireBlock { kind, .. } if kind == "text" => Block::Text { text: String::new() },
                WireBlock { kind, .. } if kind == "thinking" => Block::Thinking { thinking: String::new(), signature: String::new() },
                WireBlock { kind, data: Some(data), .. } if kind == "redacted_thinking" => Block::RedactedThinking { data },
                WireBlock { kind, id: Some(id), name: Some(name), .. } if kind == "tool_use" => {
                    Block::ToolUse { id, name, input: RawValue::NULL.to_owned() }
                }
                // None that was asked for.
                _ => return None,
            }),
            "content_block_delta" => {
                let WireDelta { text, thinking, signature, partial_json, .. } = delta?;
                let said = text.map(Delta::Text).or(thinking.map(Delta::Thinking));
                Self::Delta(said.or(signature.map(Delta::Signature)).or(partial_json.map(Delta::InputJson))?)
            }
            "content_block_stop" => Self::BlockStop,
            "message_delta" => {
                let WireDelta { stop_reason, stop_sequence, .. } = delta?;
                Self::Stop { stop_reason, stop_sequence, usage: usage.unwrap_or_default() }
            }
            _ => return None,
        })
    }
}
