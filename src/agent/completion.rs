//! A completion: the model's one answer to a conversation that the caller holds, without tools of an agent's own.
//!
//! Messages and their blocks are those of the Messages API, which is what the model is asked in. Blocks are kept to the letter.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// What the model is asked.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Completion {
    /// The conversation; the last message is the user's.
    pub messages: Vec<Message>,
    /// How it is to answer.
    pub parameters: Parameters,
}

/// Who said something.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The caller's side, tools included.
    User,
    /// The model.
    Assistant,
}

/// One message.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Message {
    /// Whose it is.
    pub role: Role,
    /// Its blocks.
    pub content: Vec<Box<RawValue>>,
}

/// How the model is to answer.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Parameters {
    /// The caller's tools, as the Messages API has them.
    pub tools: Vec<Box<RawValue>>,
    /// Which of them it has to use.
    pub tool_choice: Option<Box<RawValue>>,
    /// Texts at which it stops.
    pub stop_sequences: Vec<String>,
    /// At most so many tokens; the CLI's own limit by default.
    pub max_tokens: Option<u64>,
    /// Whether it thinks first.
    pub thinking: Thinking,
    /// How much it puts into it: `low`, `medium`, `high`, …
    pub effort: Option<String>,
    /// What the answer has to fit, as `output_config.format` of the Messages API.
    pub format: Option<Box<RawValue>>,
}

/// Whether the model thinks before it answers.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Thinking {
    /// It does not: a small limit of tokens would be used up by it.
    #[default]
    Off,
    /// As the CLI has it think.
    On,
    /// As this `thinking` of the Messages API says.
    As(Box<RawValue>),
}

/// The model's message.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ModelMessage {
    /// `msg_…`.
    pub id: String,
    /// The model's full name.
    pub model: String,
    /// Its blocks, in order.
    pub content: Vec<Block>,
    /// The text that it stopped at.
    pub stop_sequence: Option<String>,
    /// The tokens, as the Messages API counts them.
    pub usage: Tokens,
}

/// A block of the model's message.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "snake_case", try_from = "AnyBlock")]
pub enum Block {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// What the model thought.
    Thinking {
        /// In words, as far as it tells.
        thinking: String,
        /// By which the API knows it again.
        signature: String,
    },
    /// The same, kept secret.
    RedactedThinking {
        /// By which the API knows it again.
        data: String,
    },
    /// A call of one of the caller's tools.
    ToolUse {
        /// `toolu_…`.
        id: String,
        /// The tool.
        name: String,
        /// The arguments, as the model wrote them.
        input: Box<RawValue>,
    },
}

/// A block as it is read: what is kept to the letter can't be read behind a tag.
#[derive(Deserialize)]
struct AnyBlock {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    thinking: Option<String>,
    signature: Option<String>,
    data: Option<String>,
    id: Option<String>,
    name: Option<String>,
    input: Option<Box<RawValue>>,
}

impl TryFrom<AnyBlock> for Block {
    type Error = String;

    fn try_from(any: AnyBlock) -> Result<Self, String> {
        Ok(match any {
            AnyBlock { kind, text: Some(text), .. } if kind == "text" => Self::Text { text },
            AnyBlock { kind, thinking: Some(thinking), signature: Some(signature), .. } if kind == "thinking" => {
                Self::Thinking { thinking, signature }
            }
            AnyBlock { kind, data: Some(data), .. } if kind == "redacted_thinking" => Self::RedactedThinking { data },
            AnyBlock { kind, id: Some(id), name: Some(name), input: Some(input), .. } if kind == "tool_use" => {
                Self::ToolUse { id, name, input }
            }
            AnyBlock { kind, .. } => return Err(format!("there is no such block of type \"{kind}\"")),
        })
    }
}

impl Block {
    /// As the Messages API has it.
    pub fn to_raw(&self) -> Box<RawValue> {
        serde_json::value::to_raw_value(self).expect("a block is JSON")
    }
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub struct Tokens {
    /// Read, and not from the cache.
    pub input_tokens: i64,
    /// Written to the cache.
    pub cache_creation_input_tokens: i64,
    /// Read from the cache.
    pub cache_read_input_tokens: i64,
    /// Generated.
    pub output_tokens: i64,
}

impl Tokens {
    /// All that were read.
    pub fn read(self) -> i64 {
        [self.cache_creation_input_tokens, self.cache_read_input_tokens].into_iter().fold(self.input_tokens, i64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_can_be_read_again() {
        let kept = r#"{"id":"msg_1","model":"m","content":[{"type":"text","text":"a"},{"type":"thinking","thinking":"h","signature":"S"},{"type":"redacted_thinking","data":"d"},{"type":"tool_use","id":"t","name":"n","input":{"z": 1, "a": 2.50}}],"stop_sequence":null,"usage":{"input_tokens":1,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":2}}"#;
        let message: ModelMessage = serde_json::from_str(kept).unwrap();
        assert_eq!(serde_json::to_string(&message).unwrap(), kept);
    }
}
