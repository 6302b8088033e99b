//! What the model did, in the words of OpenAI's responses.

use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::Speech;
use super::fence::Unfenced;
use super::messages_answer::{message_of, stop_reason};
use super::refusal::{Refusal, Vendor};
use crate::agent::completion::{Block, ModelMessage, Tokens};
use crate::agent::contract::Outcome;
use crate::agent::stream_event::{Delta, StreamEvent};

/// A response that is told.
pub(super) struct Response {
    /// What comes back of the request, `created_at` and `model` with it.
    request: Map<String, Value>,
    /// Takes a Markdown fence away, where an object was asked for.
    unfenced: Option<Unfenced>,
    run_id: String,
    /// Of the stream's next event.
    sequence: u64,
    /// The item that grows: its place, kind and text.
    open: Option<Open>,
    /// Items that began.
    begun: usize,
}

struct Open {
    at: usize,
    kind: Kind,
    text: String,
    signature: String,
}

enum Kind {
    Text,
    Reasoning,
    Call { id: String, name: String },
}

/// The id of the response that a run gave.
pub(super) fn response_id(run_id: &str) -> String {
    format!("resp_{run_id}")
}

/// The run of a response.
pub(super) fn run_of_response(id: &str) -> Option<&str> {
    id.strip_prefix("resp_").filter(|run_id| run_id.len() == 32 && run_id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The run of an item, and its place in the response.
pub(super) fn run_of_item(id: &str) -> Option<(&str, usize)> {
    let (kind, rest) = id.split_once('_')?;
    let (run_id, at) = rest.split_once('_')?;
    matches!(kind, "msg" | "fc" | "rs").then_some((run_id, at.parse().ok()?))
}

impl Kind {
    fn of(block: &Block) -> Option<Self> {
        Some(match block {
            Block::Text { .. } => Self::Text,
            Block::Thinking { .. } => Self::Reasoning,
            Block::ToolUse { id, name, .. } => Self::Call { id: id.clone(), name: name.clone() },
            Block::RedactedThinking { .. } => return None,
        })
    }

    fn id(&self, run_id: &str, at: usize) -> String {
        let kind = match self {
            Self::Text => "msg",
            Self::Reasoning => "rs",
            Self::Call { .. } => "fc",
        };
        format!("{kind}_{run_id}_{at}")
    }

    /// The item; with less in it while it grows.
    fn item(&self, id: &str, text: Option<&str>, signature: &str) -> Value {
        let status = if text.is_some() { "completed" } else { "in_progress" };
        match self {
            Self::Text => {
                let content: Vec<_> = text.map(part).into_iter().collect();
                json!({"type": "message", "id": id, "status": status, "role": "assistant", "content": content})
            }
            Self::Reasoning => {
                let summary: Vec<_> = text.filter(|text| !text.is_empty()).map(summary).into_iter().collect();
                json!({"type": "reasoning", "id": id, "summary": summary, "encrypted_content": signature})
            }
            Self::Call { id: call_id, name } => {
                json!({"type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": text.unwrap_or_default(), "status": status})
            }
        }
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn summary(text: &str) -> Value {
    json!({"type": "summary_text", "text": text})
}

fn usage(tokens: Tokens) -> Value {
    json!({
        "input_tokens": tokens.read(), "input_tokens_details": {"cached_tokens": tokens.cache_read_input_tokens},
        "output_tokens": tokens.output_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens.read() + tokens.output_tokens,
    })
}

impl Response {
    pub(super) fn new(request: Map<String, Value>, is_object: bool) -> Self {
        let unfenced = is_object.then(Unfenced::default);
        Self { request, unfenced, run_id: String::new(), sequence: 0, open: None, begun: 0 }
    }

    /// The response, as far as it has come.
    pub(super) fn body(&self, status: &str, output: &[Value], rest: Value) -> Value {
        let mut body = self.request.clone();
        let own = json!({
            "id": response_id(&self.run_id), "object": "response", "status": status, "output": output,
            "error": null, "incomplete_details": null, "usage": null,
        });
        for value in [own, rest] {
            if let Value::Object(fields) = value {
                body.extend(fields);
            }
        }
        Value::Object(body)
    }

    /// The response at its end.
    pub(super) fn finished(&mut self, outcome: &Outcome) -> Value {
        let ModelMessage { model, content, usage: tokens, .. } = message_of(outcome);
        let items = content.iter().filter_map(|block| Some((Kind::of(block)?, block))).enumerate();
        let mut output = Vec::new();
        for (at, (kind, block)) in items {
            let id = kind.id(&self.run_id, at);
            let (text, signature) = match block {
                Block::Text { text } => (self.unfenced(text), ""),
                Block::Thinking { thinking, signature } => (thinking.clone(), signature.as_str()),
                Block::ToolUse { input, .. } => (input.get().to_owned(), ""),
                Block::RedactedThinking { .. } => continue,
            };
            output.push(kind.item(&id, Some(&text), signature));
        }
        let incomplete = match stop_reason(outcome) {
            "max_tokens" | "model_context_window_exceeded" => Some("max_output_tokens"),
            "refusal" => Some("content_filter"),
            _ => None,
        };
        let mut rest = json!({"usage": usage(tokens), "incomplete_details": incomplete.map(|reason| json!({"reason": reason}))});
        if !model.is_empty() {
            rest["model"] = model.into();
        }
        self.body(if incomplete.is_some() { "incomplete" } else { "completed" }, &output, rest)
    }

    /// A response that failed.
    pub(super) fn failed(&self, refusal: &Refusal) -> Value {
        self.body("failed", &[], json!({"error": {"code": "server_error", "message": refusal.message}}))
    }

    fn unfenced(&self, text: &str) -> String {
        if self.unfenced.is_none() {
            return text.to_owned();
        }
        let mut unfenced = Unfenced::default();
        unfenced.piece(text) + &unfenced.rest()
    }

    fn tell(&mut self, kind: &str, mut event: Value, out: &mut Vec<u8>) {
        event["type"] = kind.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        out.extend_from_slice(format!("event: {kind}\ndata: {event}\n\n").as_bytes());
    }

    fn open(&mut self, kind: Kind, out: &mut Vec<u8>) {
        let at = self.begun;
        self.begun += 1;
        let id = kind.id(&self.run_id, at);
        self.tell("response.output_item.added", json!({"output_index": at, "item": kind.item(&id, None, "")}), out);
        match kind {
            Kind::Text => self.tell(
                "response.content_part.added",
                json!({"item_id": id, "output_index": at, "content_index": 0, "part": part("")}),
                out,
            ),
            Kind::Reasoning => self.tell(
                "response.reasoning_summary_part.added",
                json!({"item_id": id, "output_index": at, "summary_index": 0, "part": summary("")}),
                out,
            ),
            Kind::Call { .. } => {}
        }
        self.open = Some(Open { at, kind, text: String::new(), signature: String::new() });
    }

    fn grow(&mut self, piece: &str, out: &mut Vec<u8>) {
        let Some(Open { at, kind, text, .. }) = &mut self.open else { return };
        if piece.is_empty() {
            return;
        }
        text.push_str(piece);
        let (at, id) = (*at, kind.id(&self.run_id, *at));
        let (name, index) = match kind {
            Kind::Text => ("response.output_text.delta", Some("content_index")),
            Kind::Reasoning => ("response.reasoning_summary_text.delta", Some("summary_index")),
            Kind::Call { .. } => ("response.function_call_arguments.delta", None),
        };
        let mut event = json!({"item_id": id, "output_index": at, "delta": piece});
        if let Some(index) = index {
            event[index] = 0.into();
        }
        if matches!(kind, Kind::Text) {
            event["logprobs"] = json!([]);
        }
        self.tell(name, event, out);
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if let Some(unfenced) = self.unfenced.as_mut().filter(|_| matches!(self.open, Some(Open { kind: Kind::Text, .. }))) {
            let rest = unfenced.rest();
            self.grow(&rest, out);
        }
        let Some(Open { at, kind, mut text, signature }) = self.open.take() else { return };
        let id = kind.id(&self.run_id, at);
        match &kind {
            Kind::Text => {
                let done = json!({"item_id": id, "output_index": at, "content_index": 0, "text": text, "logprobs": []});
                self.tell("response.output_text.done", done, out);
                let done = json!({"item_id": id, "output_index": at, "content_index": 0, "part": part(&text)});
                self.tell("response.content_part.done", done, out);
            }
            Kind::Reasoning => {
                let done = json!({"item_id": id, "output_index": at, "summary_index": 0, "text": text});
                self.tell("response.reasoning_summary_text.done", done, out);
                let done = json!({"item_id": id, "output_index": at, "summary_index": 0, "part": summary(&text)});
                self.tell("response.reasoning_summary_part.done", done, out);
            }
            Kind::Call { name, .. } => {
                if text.is_empty() {
                    text.push_str("{}");
                }
                let done = json!({"item_id": id, "output_index": at, "name": name, "arguments": text});
                self.tell("response.function_call_arguments.done", done, out);
            }
        }
        self.tell("response.output_item.done", json!({"output_index": at, "item": kind.item(&id, Some(&text), &signature)}), out);
    }
}

impl Speech for Response {
    fn run(&mut self, run_id: &str) {
        run_id.clone_into(&mut self.run_id);
    }

    fn whole(&mut self, outcome: &Outcome) -> Vec<u8> {
        self.finished(outcome).to_string().into_bytes()
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        let body = self.body("in_progress", &[], json!({}));
        self.tell("response.created", json!({"response": body}), out);
        self.tell("response.in_progress", json!({"response": body}), out);
    }

    fn event(&mut self, _: &str, event: &RawValue, out: &mut Vec<u8>) {
        let Some(event) = StreamEvent::read(event) else { return };
        match event {
            StreamEvent::Start { .. } | StreamEvent::Stop { .. } => {}
            StreamEvent::BlockStart(block) => {
                if let Some(kind) = Kind::of(&block) {
                    self.open(kind, out);
                }
            }
            StreamEvent::Delta(Delta::Text(text)) => {
                let text = match &mut self.unfenced {
                    Some(unfenced) => unfenced.piece(&text),
                    None => text,
                };
                self.grow(&text, out);
            }
            StreamEvent::Delta(Delta::Thinking(piece) | Delta::InputJson(piece)) => self.grow(&piece, out),
            StreamEvent::Delta(Delta::Signature(piece)) => {
                if let Some(Open { signature, .. }) = &mut self.open {
                    signature.push_str(&piece);
                }
            }
            StreamEvent::BlockStop => self.close(out),
        }
    }

    fn end(&mut self, outcome: &Outcome, out: &mut Vec<u8>) {
        let body = self.finished(outcome);
        let kind = if body["status"] == "incomplete" { "response.incomplete" } else { "response.completed" };
        self.tell(kind, json!({"response": body}), out);
    }

    fn fail(&mut self, refusal: &Refusal, out: &mut Vec<u8>) {
        let error = refusal.body(Vendor::OpenAi, "")["error"].take();
        self.tell("error", json!({"code": error["type"], "message": refusal.message, "param": refusal.param}), out);
        let body = self.failed(refusal);
        self.tell("response.failed", json!({"response": body}), out);
    }

    fn beat(&self) -> &'static [u8] {
        b": ping\n\n"
    }
}
