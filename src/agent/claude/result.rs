//! What the `claude` CLI says in its last line.

use serde::Deserialize;

use crate::agent::completion::{Block, ModelMessage};
use crate::agent::contract::Usage;

/// What the CLI answered.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// The model's reply, whole.
    Reply {
        /// Its text.
        text: String,
        /// Why the model stopped: `end_turn`, `max_tokens`, …
        stop_reason: String,
        /// The message, of a completion.
        message: Option<Box<ModelMessage>>,
    },
    /// The CLI's own account of what went wrong.
    Failure {
        /// In words.
        error: String,
        /// The status by which the model's API refused.
        api_status: Option<u16>,
    },
}

impl Answer {
    pub(super) fn failure(error: String) -> Self {
        Self::Failure { error, api_status: None }
    }
}

/// The last line.
#[derive(Deserialize)]
pub(super) struct ResultLine {
    subtype: Option<String>,
    #[serde(default)]
    is_error: bool,
    result: Option<String>,
    #[serde(default)]
    errors: Vec<String>,
    stop_reason: Option<String>,
    total_cost_usd: Option<f64>,
    usage: Option<TokenCounts>,
    api_error_status: Option<u16>,
}

/// What a message says, for the ledger: its text, or the tools that it calls.
fn text_of(message: &ModelMessage) -> String {
    let texts = message.content.iter().filter_map(|block| if let Block::Text { text } = block { Some(text.as_str()) } else { None });
    let text: String = texts.collect();
    if !text.is_empty() {
        return text;
    }
    let calls: Vec<_> = message.content.iter().filter(|block| matches!(block, Block::ToolUse { .. })).collect();
    if calls.is_empty() { text } else { serde_json::to_string(&calls).expect("calls are JSON") }
}

#[derive(Deserialize)]
struct TokenCounts {
    input_tokens: Option<i64>,
    cache_creation_input_tokens: Option<i64>,
    cache_read_input_tokens: Option<i64>,
    output_tokens: Option<i64>,
}

impl ResultLine {
    pub(super) fn answer(self) -> Answer {
        match self.result {
            Some(text) if !self.is_error => {
                Answer::Reply { text, stop_reason: self.stop_reason.unwrap_or_else(|| "end_turn".to_owned()), message: None }
            }
            Some(error) if !error.is_empty() => Answer::Failure { error, api_status: self.api_error_status },
            _ if !self.errors.is_empty() => Answer::failure(self.errors.join("; ")),
            _ => Answer::failure(format!("claude gave no reply ({})", self.subtype.as_deref().unwrap_or("no reason given"))),
        }
    }

    /// Of a completion, whose answer is the message that was streamed.
    pub(super) fn completion(self, message: Option<(ModelMessage, String)>) -> Answer {
        match message.filter(|_| self.api_error_status.is_none()) {
            Some((message, stop_reason)) => Answer::Reply { text: text_of(&message), stop_reason, message: Some(Box::new(message)) },
            // By design: the budget ends the CLI after the model's first message.
            None if self.subtype.as_deref() == Some("error_max_budget_usd") => {
                Answer::failure("the model's answer broke off; send the request again".to_owned())
            }
            None => match self.answer() {
                Answer::Reply { .. } => Answer::failure("claude ended without having asked the model".to_owned()),
                failure @ Answer::Failure { .. } => failure,
            },
        }
    }

    pub(super) fn usage(&self) -> Usage {
        let counts = self.usage.as_ref();
        Usage {
            input_tokens: counts.and_then(|counts| {
                let read = [counts.input_tokens, counts.cache_creation_input_tokens, counts.cache_read_input_tokens];
                counts.input_tokens.map(|_| read.into_iter().flatten().fold(0, i64::saturating_add))
            }),
            cached_tokens: counts.and_then(|counts| counts.cache_read_input_tokens),
            output_tokens: counts.and_then(|counts| counts.output_tokens),
            cost_usd: self.total_cost_usd,
        }
    }
}
