//! Gemini's `generateContent` and `streamGenerateContent`.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::conversation::{Message, list, texts};
use super::delivery::pieces;
use super::directive::{Part, Reply};
use super::{Api, unique};

pub(super) const API: Api = Api { conversation, whole, events, error };

fn conversation(request: &Value) -> Vec<Message> {
    list(&request["contents"])
        .iter()
        .map(|content| {
            let parts = list(&content["parts"]);
            Message {
                of_model: content["role"] == "model",
                texts: texts(&content["parts"]),
                calls: parts.iter().any(|part| part["functionCall"].is_object()),
                results: parts.iter().filter(|part| part["functionResponse"].is_object()).map(result).collect(),
            }
        })
        .collect()
}

/// What a tool gave, where it says so in a text; the response as JSON otherwise.
fn result(part: &Value) -> String {
    let response = &part["functionResponse"]["response"];
    let text = ["output", "error"].iter().find_map(|key| response[key].as_str());
    text.map_or_else(|| response.to_string(), str::to_owned)
}

fn error(status: StatusCode, message: &str) -> Value {
    let kind = match status.as_u16() {
        400 => "INVALID_ARGUMENT",
        401 => "UNAUTHENTICATED",
        403 => "PERMISSION_DENIED",
        404 => "NOT_FOUND",
        429 => "RESOURCE_EXHAUSTED",
        503 => "UNAVAILABLE",
        _ => "INTERNAL",
    };
    json!({"error": {"code": status.as_u16(), "message": message, "status": kind}})
}

fn finish_reason(reply: &Reply) -> String {
    match reply.stop_reason.as_str() {
        "end_turn" | "tool_use" => "STOP".to_owned(),
        "refusal" => "SAFETY".to_owned(),
        other => other.to_uppercase(),
    }
}

fn response(reply: &Reply, id: &str, parts: &[Value], finish_reason: Option<&str>) -> Value {
    let mut candidate = json!({"index": 0, "content": {"role": "model", "parts": parts}});
    if let Some(reason) = finish_reason {
        candidate["finishReason"] = json!(reason);
    }
    let (input, output) = (reply.input_tokens, reply.output_tokens);
    json!({
        "candidates": [candidate], "modelVersion": reply.model, "responseId": id,
        "usageMetadata": {"promptTokenCount": input, "candidatesTokenCount": output, "totalTokenCount": input + output},
    })
}

fn written(part: &Part, piece: usize) -> Vec<Value> {
    match part {
        Part::Thinking(text) => pieces(text, piece).map(|piece| json!({"text": piece, "thought": true})).collect(),
        Part::Text(text) => pieces(text, piece).map(|piece| json!({"text": piece})).collect(),
        // Never in pieces.
        Part::Call { id, name, input } => vec![json!({"functionCall": {"id": id, "name": name, "args": input}})],
    }
}

fn whole(reply: &Reply) -> Value {
    let parts: Vec<_> = reply.parts.iter().flat_map(|part| written(part, usize::MAX)).collect();
    response(reply, &unique("response"), &parts, Some(&finish_reason(reply)))
}

fn events(reply: &Reply, piece: usize) -> Vec<String> {
    let id = unique("response");
    let mut parts: Vec<_> = reply.parts.iter().flat_map(|part| written(part, piece)).collect();
    let last = parts.pop();
    let reason = finish_reason(reply);
    let chunks = parts.into_iter().map(|part| response(reply, &id, &[part], None));
    let end = response(reply, &id, &last.into_iter().collect::<Vec<_>>(), Some(&reason));
    chunks.chain([end]).map(|chunk| format!("data: {chunk}\r\n\r\n")).collect()
}
