//! OpenAI's Chat Completions API, which qwen speaks, and opencode where it is told to.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::conversation::{Message, joined, list, texts};
use super::delivery::pieces;
use super::directive::{Part, Reply};
use super::{Api, unique};

pub(super) const API: Api = Api { conversation, whole, events, error };

fn conversation(request: &Value) -> Vec<Message> {
    let said = list(&request["messages"]).iter().filter_map(|message| match message["role"].as_str()? {
        "user" => Some(Message { texts: texts(&message["content"]), ..Message::of_user() }),
        "assistant" => {
            let calls = !list(&message["tool_calls"]).is_empty();
            Some(Message { texts: texts(&message["content"]), calls, ..Message::of_model() })
        }
        "tool" => Some(Message { results: vec![texts(&message["content"]).concat()], ..Message::of_user() }),
        _ => None,
    });
    joined(said)
}

pub(super) fn error(status: StatusCode, message: &str) -> Value {
    let kind = match status.as_u16() {
        401 => "authentication_error",
        429 => "rate_limit_exceeded",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    };
    json!({"error": {"type": kind, "code": kind, "message": message, "param": null}})
}

fn finish_reason<'a>(reply: &'a Reply<'_>) -> &'a str {
    match reply.stop_reason.as_str() {
        "end_turn" => "stop",
        "max_tokens" => "length",
        "refusal" => "content_filter",
        "tool_use" => "tool_calls",
        other => other,
    }
}

fn usage(reply: &Reply) -> Value {
    let (input, output) = (reply.input_tokens, reply.output_tokens);
    json!({"prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output})
}

fn whole(reply: &Reply) -> Value {
    let mut message = json!({"role": "assistant", "content": null});
    let mut calls = Vec::new();
    for part in &reply.parts {
        match part {
            Part::Thinking(text) => message["reasoning_content"] = json!(text),
            Part::Text(text) => message["content"] = json!(text),
            Part::Call { id, name, input } => {
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input.to_string()}}));
            }
        }
    }
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
    }
    json!({
        "id": unique("chatcmpl"), "object": "chat.completion", "created": 0, "model": reply.model, "usage": usage(reply),
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason(reply)}],
    })
}

fn events(reply: &Reply, piece: usize) -> Vec<String> {
    let mut deltas = vec![json!({"role": "assistant", "content": ""})];
    let mut calls = 0;
    for part in &reply.parts {
        match part {
            Part::Thinking(text) => deltas.extend(pieces(text, piece).map(|piece| json!({"reasoning_content": piece}))),
            Part::Text(text) => deltas.extend(pieces(text, piece).map(|piece| json!({"content": piece}))),
            Part::Call { id, name, input } => {
                let call = |call: Value| json!({"tool_calls": [call]});
                deltas.push(call(json!({"index": calls, "id": id, "type": "function", "function": {"name": name, "arguments": ""}})));
                let arguments = input.to_string();
                deltas.extend(pieces(&arguments, piece).map(|piece| call(json!({"index": calls, "function": {"arguments": piece}}))));
                calls += 1;
            }
        }
    }
    let id = unique("chatcmpl");
    let chunk = |choices: Value| {
        let (object, model) = ("chat.completion.chunk", &reply.model);
        json!({"id": id, "object": object, "created": 0, "model": model, "choices": choices})
    };
    let mut chunks: Vec<_> = deltas.into_iter().map(|delta| chunk(json!([{"index": 0, "delta": delta, "finish_reason": null}]))).collect();
    chunks.push(chunk(json!([{"index": 0, "delta": {}, "finish_reason": finish_reason(reply)}])));
    if reply.request["stream_options"]["include_usage"] == json!(true) {
        let mut last = chunk(json!([]));
        last["usage"] = usage(reply);
        chunks.push(last);
    }
    chunks.iter().map(Value::to_string).chain(["[DONE]".to_owned()]).map(|chunk| format!("data: {chunk}\n\n")).collect()
}
