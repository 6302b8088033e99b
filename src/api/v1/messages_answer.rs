//! What the model did, in the words of Anthropic's Messages API: its own, so they go through as they came.

use serde::Serialize;
use serde_json::value::RawValue;

use super::Speech;
use super::refusal::{self, Refusal, Vendor};
use crate::agent::completion::{Block, ModelMessage, Tokens};
use crate::agent::contract::{Ending, Outcome};

/// The model's message, where its own is not kept any more.
pub(super) fn message_of(outcome: &Outcome) -> ModelMessage {
    outcome.message.as_deref().cloned().unwrap_or_else(|| ModelMessage {
        id: "msg_not_kept".to_owned(),
        model: String::new(),
        content: vec![Block::Text { text: outcome.text.clone() }],
        stop_sequence: None,
        usage: Tokens::default(),
    })
}

/// Why the model stopped.
pub(super) fn stop_reason(outcome: &Outcome) -> &str {
    match &outcome.ending {
        Ending::Completed(reason) => reason,
        _ => "end_turn",
    }
}

#[derive(Default)]
pub(super) struct Messages {
    run_id: String,
}

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: &'a [Block],
    stop_reason: &'a str,
    stop_sequence: &'a Option<String>,
    usage: Tokens,
}

fn frame(event: &str, data: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("event: {event}\ndata: {data}\n\n").as_bytes());
}

impl Speech for Messages {
    fn run(&mut self, run_id: &str) {
        run_id.clone_into(&mut self.run_id);
    }

    fn whole(&mut self, outcome: &Outcome) -> Vec<u8> {
        let ModelMessage { id, model, content, stop_sequence, usage } = &message_of(outcome);
        let stop_reason = stop_reason(outcome);
        let body = Body { id, r#type: "message", role: "assistant", model, content, stop_reason, stop_sequence, usage: *usage };
        serde_json::to_vec(&body).expect("a message is JSON")
    }

    fn event(&mut self, kind: &str, event: &RawValue, out: &mut Vec<u8>) {
        let kind = kind.split('.').next().unwrap_or_default();
        // Older releases of the CLI leave it out; it is said when all is settled.
        if kind != "message_stop" {
            frame(kind, event.get(), out);
        }
    }

    fn end(&mut self, _: &Outcome, out: &mut Vec<u8>) {
        frame("message_stop", r#"{"type":"message_stop"}"#, out);
    }

    fn fail(&mut self, refusal: &Refusal, out: &mut Vec<u8>) {
        let body = refusal.body(Vendor::Anthropic, &refusal::request_id(&self.run_id));
        frame("error", &body.to_string(), out);
    }

    fn beat(&self) -> &'static [u8] {
        b"event: ping\ndata: {\"type\": \"ping\"}\n\n"
    }
}
