//! OpenAI's Responses API, which codex speaks.

use serde_json::{Value, json};

use super::conversation::{Message, joined, list, texts};
use super::delivery::pieces;
use super::directive::{Part, Reply};
use super::{Api, chat, unique};

pub(super) const API: Api = Api { conversation, whole, events, error: chat::error };

fn conversation(request: &Value) -> Vec<Message> {
    let input = match &request["input"] {
        Value::String(text) => return vec![Message { texts: vec![text.clone()], ..Message::of_user() }],
        input => list(input),
    };
    joined(input.iter().filter_map(|item| match (item["type"].as_str().unwrap_or("message"), item["role"].as_str()) {
        ("message", Some("user")) => Some(Message { texts: texts(&item["content"]), ..Message::of_user() }),
        ("message", Some("assistant")) => Some(Message { texts: texts(&item["content"]), ..Message::of_model() }),
        // `function_call`, `custom_tool_call`, `local_shell_call`, …, and what came of them.
        (kind, _) if kind.ends_with("_call") => Some(Message { calls: true, ..Message::of_model() }),
        (kind, _) if kind.ends_with("_output") => Some(Message { results: vec![texts(&item["output"]).concat()], ..Message::of_user() }),
        _ => None,
    }))
}

/// The items of a reply, each whole.
fn items(reply: &Reply) -> Vec<Value> {
    let item = |part: &Part| match part {
        Part::Thinking(text) => {
            json!({"type": "reasoning", "id": unique("rs"), "summary": [{"type": "summary_text", "text": text}], "encrypted_content": null})
        }
        Part::Text(text) => json!({
            "type": "message", "id": unique("msg"), "role": "assistant", "status": "completed", "content": [output_text(text)],
        }),
        Part::Call { id, name, input } => call(reply.request, id, name, input),
    };
    reply.parts.iter().map(item).collect()
}

fn output_text(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}

/// What kind of tool a request declares under a name: beside the conversation or in it, alone or in a namespace.
fn kind<'a>(declaring: &'a Value, name: &str) -> Option<&'a str> {
    let told = list(&declaring["input"]).iter().filter_map(|item| kind(item, name)).next_back();
    told.or_else(|| {
        list(&declaring["tools"]).iter().find_map(|tool| match tool["type"].as_str()? {
            "namespace" => kind(tool, name),
            kind => (tool["name"] == name).then_some(kind),
        })
    })
}

/// A call in the form that the request's own declaration of the tool asks for.
fn call(request: &Value, id: &str, name: &str, input: &Value) -> Value {
    match kind(request, name) {
        Some("custom") => {
            let input = input.as_str().map_or_else(|| input.to_string(), str::to_owned);
            json!({"type": "custom_tool_call", "id": unique("ctc"), "call_id": id, "name": name, "input": input, "status": "completed"})
        }
        _ if name == "local_shell" => {
            json!({"type": "local_shell_call", "id": unique("lsh"), "call_id": id, "action": input, "status": "completed"})
        }
        _ => {
            let arguments = input.to_string();
            json!({"type": "function_call", "id": unique("fc"), "call_id": id, "name": name, "arguments": arguments, "status": "completed"})
        }
    }
}

fn response(reply: &Reply, id: &str, status: &str, output: &[Value]) -> Value {
    let mut response = json!({
        "id": id, "object": "response", "created_at": 0, "status": status, "model": reply.model, "output": output,
        "error": null, "incomplete_details": null,
    });
    if status != "in_progress" {
        let (input, output) = (reply.input_tokens, reply.output_tokens);
        response["usage"] = json!({
            "input_tokens": input, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": input + output,
        });
    }
    if status == "incomplete" {
        let reason = match reply.stop_reason.as_str() {
            "max_tokens" => "max_output_tokens",
            "refusal" => "content_filter",
            other => other,
        };
        response["incomplete_details"] = json!({"reason": reason});
    }
    response
}

fn status(reply: &Reply) -> &'static str {
    if matches!(reply.stop_reason.as_str(), "end_turn" | "tool_use") { "completed" } else { "incomplete" }
}

fn whole(reply: &Reply) -> Value {
    response(reply, &unique("resp"), status(reply), &items(reply))
}

fn events(reply: &Reply, piece: usize) -> Vec<String> {
    let id = unique("resp");
    let items = items(reply);
    let mut events = vec![json!({"type": "response.created", "response": response(reply, &id, "in_progress", &[])})];
    for (index, (item, part)) in items.iter().zip(&reply.parts).enumerate() {
        let (begun, between) = progress(item, part, piece);
        events.push(json!({"type": "response.output_item.added", "output_index": index, "item": begun}));
        events.extend(between.into_iter().map(|mut event| {
            event["item_id"] = item["id"].clone();
            event["output_index"] = json!(index);
            event
        }));
        events.push(json!({"type": "response.output_item.done", "output_index": index, "item": item}));
    }
    events.push(json!({"type": format!("response.{}", status(reply)), "response": response(reply, &id, status(reply), &items)}));
    let numbered = events.into_iter().enumerate().map(|(number, mut event)| {
        event["sequence_number"] = json!(number);
        format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())
    });
    numbered.collect()
}

/// An item as it is when it begins, and the events until it is done.
fn progress(item: &Value, part: &Part, piece: usize) -> (Value, Vec<Value>) {
    let mut begun = item.clone();
    if begun["status"].is_string() {
        begun["status"] = json!("in_progress");
    }
    let mut events = Vec::new();
    match part {
        Part::Text(text) => {
            begun["content"] = json!([]);
            events.push(json!({"type": "response.content_part.added", "content_index": 0, "part": output_text("")}));
            let delta = |piece| json!({"type": "response.output_text.delta", "content_index": 0, "delta": piece});
            events.extend(pieces(text, piece).map(delta));
            events.push(json!({"type": "response.output_text.done", "content_index": 0, "text": text}));
            events.push(json!({"type": "response.content_part.done", "content_index": 0, "part": output_text(text)}));
        }
        Part::Thinking(text) => {
            begun["summary"] = json!([]);
            let part = |text: &str| json!({"type": "summary_text", "text": text});
            events.push(json!({"type": "response.reasoning_summary_part.added", "summary_index": 0, "part": part("")}));
            let delta = |piece| json!({"type": "response.reasoning_summary_text.delta", "summary_index": 0, "delta": piece});
            events.extend(pieces(text, piece).map(delta));
            events.push(json!({"type": "response.reasoning_summary_text.done", "summary_index": 0, "text": text}));
            events.push(json!({"type": "response.reasoning_summary_part.done", "summary_index": 0, "part": part(text)}));
        }
        Part::Call { .. } => {
            // A shell's call has its command from the start.
            for (key, kind) in [("arguments", "function_call_arguments"), ("input", "custom_tool_call_input")] {
                let Some(text) = item[key].as_str() else { continue };
                begun[key] = json!("");
                events.extend(pieces(text, piece).map(|piece| json!({"type": format!("response.{kind}.delta"), "delta": piece})));
                let mut done = json!({"type": format!("response.{kind}.done")});
                done[key] = json!(text);
                events.push(done);
            }
        }
    }
    (begun, events)
}
