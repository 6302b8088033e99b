//! What the model did, in the words of OpenAI's chat completions.

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::Speech;
use super::fence::Unfenced;
use super::messages_answer::{message_of, stop_reason};
use super::refusal::{Refusal, Vendor};
use crate::agent::completion::{Block, ModelMessage, Tokens};
use crate::agent::contract::Outcome;
use crate::agent::stream_event::{Delta, StreamEvent};
use crate::clock;

/// In which form calls are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    Tools,
    /// That of 2023: one, without an id.
    Legacy,
}

pub(super) struct Chat {
    calls: Calls,
    /// Takes a Markdown fence away, where an object was asked for.
    unfenced: Option<Unfenced>,
    /// Whether the stream is to end with the tokens.
    usage: bool,
    id: String,
    created: i64,
    model: String,
    /// Calls that began.
    called: usize,
}

impl Chat {
    pub(super) fn new(calls: Calls, is_object: bool, usage: bool) -> Self {
        let unfenced = is_object.then(Unfenced::default);
        Self { calls, unfenced, usage, id: String::new(), created: clock::now(), model: String::new(), called: 0 }
    }

    fn chunk(&self, delta: Value, finish_reason: Option<&str>, out: &mut Vec<u8>) {
        let mut chunk = json!({
            "id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
            "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason}],
        });
        if self.usage {
            chunk["usage"] = Value::Null;
        }
        data(&chunk, out);
    }

    fn text(&mut self, text: &str, out: &mut Vec<u8>) {
        if !text.is_empty() {
            self.chunk(json!({"content": text}), None, out);
        }
    }
}

fn data(value: &Value, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("data: {value}\n\n").as_bytes());
}

fn finish_reason(stop_reason: &str, calls: Calls) -> &'static str {
    match stop_reason {
        "tool_use" if calls == Calls::Legacy => "function_call",
        "tool_use" => "tool_calls",
        "max_tokens" | "model_context_window_exceeded" => "length",
        "refusal" => "content_filter",
        _ => "stop",
    }
}

fn usage(tokens: Tokens) -> Value {
    json!({
        "prompt_tokens": tokens.read(), "completion_tokens": tokens.output_tokens, "total_tokens": tokens.read() + tokens.output_tokens,
        "prompt_tokens_details": {"cached_tokens": tokens.cache_read_input_tokens},
    })
}

impl Speech for Chat {
    fn run(&mut self, run_id: &str) {
        self.id = format!("chatcmpl-{run_id}");
    }

    fn whole(&mut self, outcome: &Outcome) -> Vec<u8> {
        let ModelMessage { model, content, usage: tokens, .. } = message_of(outcome);
        let (mut text, mut thinking, mut calls) = (String::new(), String::new(), Vec::new());
        for block in &content {
            match block {
                Block::Text { text: more } => text.push_str(more),
                Block::Thinking { thinking: more, .. } => thinking.push_str(more),
                Block::ToolUse { id, name, input } => {
                    calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input.get()}}));
                }
                Block::RedactedThinking { .. } => {}
            }
        }
        if let Some(unfenced) = &mut self.unfenced {
            text = unfenced.piece(&text) + &unfenced.rest();
        }
        let has_text = !text.is_empty() || calls.is_empty();
        let mut message = json!({"role": "assistant", "content": has_text.then_some(text), "refusal": null});
        if !thinking.is_empty() {
            message["reasoning_content"] = thinking.into();
        }
        match (self.calls, calls.first_mut()) {
            (_, None) => {}
            (Calls::Legacy, Some(call)) => message["function_call"] = call["function"].take(),
            (Calls::Tools, Some(_)) => message["tool_calls"] = calls.into(),
        }
        let body = json!({
            "id": self.id, "object": "chat.completion", "created": self.created, "model": model,
            "choices": [{"index": 0, "message": message, "logprobs": null, "finish_reason": finish_reason(stop_reason(outcome), self.calls)}],
            "usage": usage(tokens),
        });
        body.to_string().into_bytes()
    }

    fn event(&mut self, _: &str, event: &RawValue, out: &mut Vec<u8>) {
        let Some(event) = StreamEvent::read(event) else { return };
        match event {
            StreamEvent::Start { model, .. } => {
                self.model = model;
                self.chunk(json!({"role": "assistant", "content": "", "refusal": null}), None, out);
            }
            StreamEvent::BlockStart(Block::ToolUse { id, name, .. }) => {
                let function = json!({"name": name, "arguments": ""});
                let delta = match self.calls {
                    Calls::Legacy => json!({"function_call": function}),
                    Calls::Tools => json!({"tool_calls": [{"index": self.called, "id": id, "type": "function", "function": function}]}),
                };
                self.called += 1;
                if self.calls == Calls::Tools || self.called == 1 {
                    self.chunk(delta, None, out);
                }
            }
            StreamEvent::Delta(Delta::Text(text)) => {
                let text = match &mut self.unfenced {
                    Some(unfenced) => unfenced.piece(&text),
                    None => text,
                };
                self.text(&text, out);
            }
            StreamEvent::Delta(Delta::Thinking(thinking)) => self.chunk(json!({"reasoning_content": thinking}), None, out),
            StreamEvent::Delta(Delta::InputJson(json)) if !json.is_empty() => match self.calls {
                Calls::Legacy if self.called > 1 => {}
                Calls::Legacy => self.chunk(json!({"function_call": {"arguments": json}}), None, out),
                Calls::Tools => {
                    let index = self.called.saturating_sub(1);
                    self.chunk(json!({"tool_calls": [{"index": index, "function": {"arguments": json}}]}), None, out);
                }
            },
            StreamEvent::Delta(_) | StreamEvent::BlockStart(_) | StreamEvent::BlockStop | StreamEvent::Stop { .. } => {}
        }
    }

    fn end(&mut self, outcome: &Outcome, out: &mut Vec<u8>) {
        if let Some(unfenced) = &mut self.unfenced {
            let rest = unfenced.rest();
            self.text(&rest, out);
        }
        self.chunk(json!({}), Some(finish_reason(stop_reason(outcome), self.calls)), out);
        if self.usage {
            let tokens = outcome.message.as_ref().map(|message| message.usage).unwrap_or_default();
            let last = json!({
                "id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
                "choices": [], "usage": usage(tokens),
            });
            data(&last, out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn fail(&mut self, refusal: &Refusal, out: &mut Vec<u8>) {
        data(&refusal.body(Vendor::OpenAi, ""), out);
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn beat(&self) -> &'static [u8] {
        b": ping\n\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_from_the_cache_are_among_those_that_were_read() {
        let tokens = Tokens { input_tokens: 1, cache_creation_input_tokens: 2, cache_read_input_tokens: 4, output_tokens: 8 };
        let told = json!({"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}});
        assert_eq!(usage(tokens), told);
    }

    #[test]
    fn every_reason_to_stop_has_a_word() {
        let reasons =
            ["end_turn", "stop_sequence", "pause_turn", "tool_use", "max_tokens", "model_context_window_exceeded", "refusal", "new"];
        let words = ["stop", "stop", "stop", "tool_calls", "length", "length", "content_filter", "stop"];
        assert_eq!(reasons.map(|reason| finish_reason(reason, Calls::Tools)), words);
        assert_eq!(finish_reason("tool_use", Calls::Legacy), "function_call");
    }
}
