//! The model's message, put together from the events of its stream.

use serde_json::value::RawValue;

use crate::agent::completion::{Block, ModelMessage, Tokens};
use crate::agent::stream_event::{Delta, StreamEvent};

/// A message as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    message: Option<ModelMessage>,
    open: Option<Open>,
    stop_reason: Option<String>,
    /// Another message began behind this one, or what came makes no sense.
    broken: bool,
}

/// A block that still grows.
#[derive(Debug)]
struct Open {
    block: Block,
    /// What came of a tool's arguments.
    json: String,
}

impl Assembly {
    /// Takes an event of the stream.
    pub(super) fn take(&mut self, event: &RawValue) {
        match StreamEvent::read(event) {
            Some(StreamEvent::Start { id, model, usage: counts }) => {
                self.broken |= self.message.is_some();
                let mut usage = Tokens::default();
                counts.apply(&mut usage);
                self.message = Some(ModelMessage { id, model, content: Vec::new(), stop_sequence: None, usage });
            }
            Some(StreamEvent::BlockStart(block)) => self.open = Some(Open { block, json: String::new() }),
            Some(StreamEvent::Delta(delta)) => {
                let Some(Open { block, json }) = &mut self.open else { return };
                match (delta, block) {
                    (Delta::Text(more), Block::Text { text }) => text.push_str(&more),
                    (Delta::Thinking(more), Block::Thinking { thinking, .. }) => thinking.push_str(&more),
                    (Delta::Signature(more), Block::Thinking { signature, .. }) => signature.push_str(&more),
                    (Delta::InputJson(more), Block::ToolUse { .. }) => json.push_str(&more),
                    _ => {}
                }
            }
            Some(StreamEvent::BlockStop) => {
                let Some(Open { mut block, json }) = self.open.take() else { return };
                if let Block::ToolUse { input, .. } = &mut block {
                    let written = if json.trim().is_empty() { "{}".to_owned() } else { json };
                    // Cut short by the limit of tokens: what there is of it is no call.
                    let Ok(whole) = RawValue::from_string(written) else { return };
                    *input = whole;
                }
                if let Some(message) = &mut self.message {
                    message.content.push(block);
                }
            }
            Some(StreamEvent::Stop { stop_reason, stop_sequence, usage }) => {
                if let Some(message) = &mut self.message {
                    usage.apply(&mut message.usage);
                    message.stop_sequence = stop_sequence;
                }
                self.stop_reason = stop_reason;
            }
            None => {}
        }
    }

    /// Tokens as far as they were told.
    pub(super) fn tokens(&self) -> Option<Tokens> {
        self.message.as_ref().map(|message| message.usage)
    }

    /// The message and why the model stopped, if it came whole.
    pub(super) fn finish(&mut self) -> Option<(ModelMessage, String)> {
        if self.broken {
            return None;
        }
        Some((self.message.take()?, self.stop_reason.take()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(events: Value) -> Option<(Value, String)> {
        let mut assembly = Assembly::default();
        for event in events.as_array().unwrap() {
            assembly.take(&RawValue::from_string(event.to_string()).unwrap());
        }
        assembly.finish().map(|(message, stop_reason)| (serde_json::to_value(message).unwrap(), stop_reason))
    }

    fn start() -> Value {
        json!({"type": "message_start", "message": {"id": "msg_1", "model": "m", "usage": {"input_tokens": 1, "cache_read_input_tokens": 4, "output_tokens": 1}}})
    }

    fn delta(delta: Value) -> Value {
        json!({"type": "content_block_delta", "index": 0, "delta": delta})
    }

    fn block(block: Value) -> Value {
        json!({"type": "content_block_start", "index": 0, "content_block": block})
    }

    #[test]
    fn every_kind_of_block_comes_together() {
        let stop = json!({"type": "content_block_stop", "index": 0});
        let (message, stop_reason) = read(json!([
            start(),
            block(json!({"type": "thinking", "thinking": "", "signature": ""})),
            delta(json!({"type": "thinking_delta", "thinking": "h"})),
            delta(json!({"type": "thinking_delta", "thinking": "m"})),
            delta(json!({"type": "signature_delta", "signature": "S"})),
            stop,
            block(json!({"type": "text", "text": ""})),
            delta(json!({"type": "text_delta", "text": "Let "})),
            delta(json!({"type": "text_delta", "text": "me"})),
            stop,
            block(json!({"type": "tool_use", "id": "toolu_1", "name": "t", "input": {}})),
            delta(json!({"type": "input_json_delta", "partial_json": "{\"z\": 1,"})),
            delta(json!({"type": "input_json_delta", "partial_json": " \"a\": 2}"})),
            stop,
            block(json!({"type": "tool_use", "id": "toolu_2", "name": "u", "input": {}})),
            stop,
            {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null}, "usage": {"output_tokens": 7}},
            {"type": "message_stop"},
        ]))
        .unwrap();
        assert_eq!(stop_reason, "tool_use");
        assert_eq!(
            message["usage"],
            json!({"input_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 7})
        );
        assert_eq!(
            message["content"],
            json!([
                {"type": "thinking", "thinking": "hm", "signature": "S"},
                {"type": "text", "text": "Let me"},
                {"type": "tool_use", "id": "toolu_1", "name": "t", "input": {"z": 1, "a": 2}},
                {"type": "tool_use", "id": "toolu_2", "name": "u", "input": {}},
            ])
        );
    }

    #[test]
    fn what_broke_off_or_began_anew_is_no_message() {
        let end = |stop_reason: Value| json!({"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": {}});
        assert!(read(json!([start(), end(json!("end_turn"))])).is_some());
        assert!(read(json!([start(), end(json!(null))])).is_none());
        assert!(read(json!([start(), start(), end(json!("end_turn"))])).is_none());
        assert!(read(json!([start()])).is_none());
    }
}
