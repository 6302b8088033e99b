//! What a prompt tells the stub to do, and the reply that comes of it.

use axum::http::HeaderMap;
use serde::Deserialize;
use serde_json::Value;

use super::conversation::{self, Message};
use super::unique;

/// What the stub does with a prompt.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a word of the directive")]
pub(super) struct Directive {
    /// The reply.
    text: Option<String>,
    /// A reply of so many bytes.
    bytes: Option<usize>,
    /// Milliseconds before the answer.
    pub(super) delay_ms: u64,
    /// An HTTP error, such as 529; final where `retry` is false.
    pub(super) error: Option<u16>,
    pub(super) retry: bool,
    /// Make the agent use a tool first; the reply is then what the tool gave.
    tool: Option<Tool>,
    /// The same, several times, with any number of calls each time.
    tools: Vec<Vec<Tool>>,
    /// Think this before the answer.
    thinking: Option<String>,
    /// Why the model stops, in the words of the Messages API: `max_tokens`, `refusal`, …
    stop_reason: Option<String>,
    /// Break the connection in the middle of the reply.
    pub(super) cut: bool,
    /// Milliseconds between the pieces of the reply, of 16 characters then.
    pub(super) pace_ms: u64,
    /// Reply with the whole request, as JSON text.
    echo: bool,
    /// Reply with the header by which the request is signed in.
    credential: bool,
}

#[derive(Debug, Deserialize)]
struct Tool {
    name: String,
    input: Value,
}

/// What the model says, in no API's words.
pub(super) struct Reply<'a> {
    pub(super) request: &'a Value,
    pub(super) model: String,
    pub(super) parts: Vec<Part>,
    /// As the Messages API has it; `tool_use` where tools are called.
    pub(super) stop_reason: String,
    pub(super) input_tokens: usize,
    pub(super) output_tokens: usize,
}

/// A piece of a reply.
pub(super) enum Part {
    Thinking(String),
    Text(String),
    Call { id: String, name: String, input: Value },
}

impl Directive {
    /// What the prompt says, or what to do with one that says nothing.
    pub(super) fn of(conversation: &[Message]) -> serde_json::Result<Self> {
        if conversation::wants_title(conversation) {
            return Ok(Self { text: Some(r#"{"title": "A talk with the stub"}"#.to_owned()), ..Self::default() });
        }
        let prompt = conversation::prompt(conversation);
        let line = prompt.lines().find_map(|line| line.trim().strip_prefix("stub:"));
        line.map_or_else(|| Ok(Self::default()), serde_json::from_str)
    }

    /// The reply to a request in which so much was said.
    pub(super) fn reply<'a>(
        self,
        request: &'a Value,
        model: String,
        conversation: &[Message],
        headers: &HeaderMap,
        body: &[u8],
    ) -> Reply<'a> {
        let prompt = conversation::prompt(conversation);
        let result = conversation::tool_result(conversation);
        let calls = match (self.tool, &result) {
            (Some(tool), None) => vec![tool],
            _ => self.tools.into_iter().nth(conversation::rounds(conversation)).unwrap_or_default(),
        };
        let mut parts: Vec<_> = self.thinking.into_iter().map(Part::Thinking).collect();
        let stop_reason = if calls.is_empty() {
            parts.push(Part::Text(match (result, self.text, self.bytes) {
                (_, None, None) if self.echo => String::from_utf8_lossy(body).into_owned(),
                (Some(result), ..) => result,
                (None, Some(text), _) => text,
                (None, None, Some(bytes)) => "0123456789abcdef".chars().cycle().take(bytes).collect(),
                (None, None, None) if self.credential => credential(headers),
                (None, None, None) => format!("The model stub read a prompt of {} characters.", prompt.chars().count()),
            }));
            self.stop_reason.unwrap_or_else(|| "end_turn".to_owned())
        } else {
            parts.extend(calls.into_iter().map(|Tool { name, input }| Part::Call { id: unique("toolu"), name, input }));
            "tool_use".to_owned()
        };
        let written: usize = parts.iter().map(Part::size).sum();
        Reply { request, model, parts, stop_reason, input_tokens: prompt.len().div_ceil(4), output_tokens: written.div_ceil(4) }
    }
}

impl Part {
    fn size(&self) -> usize {
        match self {
            Self::Thinking(text) | Self::Text(text) => text.len(),
            Self::Call { name, input, .. } => name.len() + input.to_string().len(),
        }
    }
}

fn credential(headers: &HeaderMap) -> String {
    let shown = |name: &str| Some(format!("{name}: {}", headers.get(name)?.to_str().ok()?));
    ["x-api-key", "x-goog-api-key", "authorization"].into_iter().filter_map(shown).collect::<Vec<_>>().join("; ")
}
