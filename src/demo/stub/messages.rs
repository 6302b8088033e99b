//! Anthropic's Messages API, which claude speaks.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::conversation::{Message, list, texts};
use super::delivery::pieces;
use super::directive::{Part, Reply};
use super::{Api, unique};

pub(super) const API: Api = Api { conversation, whole, events, error };

fn conversation(request: &Value) -> Vec<Message> {
    list(&request["messages"])
        .iter()
        // What the agent says of itself in between.
        .filter(|message| message["role"] != "system")
        .map(|message| {
            let blocks = list(&message["content"]);
            Message {
                of_model: message["role"] == "assistant",
                texts: texts(&message["content"]),
                calls: blocks.iter().any(|block| block["type"] == "tool_use"),
                results: blocks.iter().filter(|block| block["type"] == "tool_result").map(result).collect(),
            }
        })
        .collect()
}

fn result(block: &Value) -> String {
    texts(&block["content"]).into_iter().next().unwrap_or_default()
}

fn error(status: StatusCode, message: &str) -> Value {
    let kind = match status.as_u16() {
        401 => "authentication_error",
        429 => "rate_limit_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}})
}

fn usage(reply: &Reply) -> Value {
    json!({"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens})
}

fn message(reply: &Reply, content: &[Value], stop_reason: Option<&str>) -> Value {
    json!({
        "id": unique("msg"), "type": "message", "role": "assistant", "model": reply.model, "content": content,
        "stop_reason": stop_reason, "stop_sequence": null, "usage": usage(reply),
    })
}

fn whole(reply: &Reply) -> Value {
    let block = |part: &Part| match part {
        Part::Thinking(text) => json!({"type": "thinking", "thinking": text, "signature": unique("sig")}),
        Part::Text(text) => json!({"type": "text", "text": text}),
        Part::Call { id, name, input } => json!({"type": "tool_use", "id": id, "name": name, "input": input}),
    };
    message(reply, &reply.parts.iter().map(block).collect::<Vec<_>>(), Some(&reply.stop_reason))
}

fn events(reply: &Reply, piece: usize) -> Vec<String> {
    let mut events = vec![json!({"type": "message_start", "message": message(reply, &[], None)})];
    for (index, part) in reply.parts.iter().enumerate() {
        let (start, deltas): (Value, Vec<Value>) = match part {
            Part::Text(text) => (
                json!({"type": "text", "text": ""}),
                pieces(text, piece).map(|piece| json!({"type": "text_delta", "text": piece})).collect(),
            ),
            Part::Thinking(text) => (
                json!({"type": "thinking", "thinking": "", "signature": ""}),
                pieces(text, piece)
                    .map(|piece| json!({"type": "thinking_delta", "thinking": piece}))
                    .chain([json!({"type": "signature_delta", "signature": unique("sig")})])
                    .collect(),
            ),
            Part::Call { id, name, input } => (
                json!({"type": "tool_use", "id": id, "name": name, "input": {}}),
                pieces(&input.to_string(), piece).map(|piece| json!({"type": "input_json_delta", "partial_json": piece})).collect(),
            ),
        };
        events.push(json!({"type": "content_block_start", "index": index, "content_block": start}));
        events.extend(deltas.into_iter().map(|delta| json!({"type": "content_block_delta", "index": index, "delta": delta})));
        events.push(json!({"type": "content_block_stop", "index": index}));
    }
    let stop = json!({"stop_reason": reply.stop_reason, "stop_sequence": null});
    events.push(json!({"type": "message_delta", "delta": stop, "usage": usage(reply)}));
    events.push(json!({"type": "message_stop"}));
    events.iter().map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())).collect()
}
