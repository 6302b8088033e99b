//! What an agent said and did, so far and as it comes.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use maud::{Markup, html};
use serde_json::{Value, json};

use super::layout::Oops;
use crate::agent::contract::Event;
use crate::api::stream::{model_event, response};
use crate::app::App;
use crate::job::feed_format::Record;
use crate::job::feed_reader::{Dialect, Item};
use crate::ledger::JobId;

/// Bytes of a feed that a page shows by itself.
const MOST: u64 = 1 << 20;
/// Characters of a tool's arguments and results.
const CHARACTERS: usize = 4000;

/// An event, as it is shown.
enum Shown {
    /// A piece of text.
    Text(String),
    /// A piece of what it thinks.
    Thinking(String),
    /// Something that stands for itself.
    Block(Markup),
}

/// What is shown of an event; by the protocol's own messages nothing is.
fn shown(event: &Event) -> Option<Shown> {
    Some(match event {
        Event::Text { content } => Shown::Text(content.clone()),
        Event::Thinking { content } => Shown::Thinking(content.clone()),
        Event::ToolCall { args, name, .. } => block("tool", &named(name), Some(args)),
        Event::ToolCallUpdate { result, status, .. } => block("result", &format!("The tool {status}"), Some(result)),
        Event::Retry { attempt, error, max_retries } => {
            block("retry", &format!("The model is asked again ({} of {})", plain(attempt), plain(max_retries)), Some(error))
        }
        Event::PermissionRequest { message } => {
            let message: Value = serde_json::from_str(message.get()).unwrap_or_default();
            block(
                "asks",
                &format!("It asks: {}", plain(&message["params"]["toolCall"]["title"])),
                Some(&message["params"]["toolCall"]["rawInput"]),
            )
        }
        Event::PermissionResolved { option_id, by, .. } => {
            block("asks", &format!("Answered by {}: {}", by.as_str(), option_id.as_deref().unwrap_or("nothing chosen")), None)
        }
        Event::Model { kind, event } => return shown(&model_event(kind, event)?),
        Event::Acp { kind, message } => {
            let message: Value = serde_json::from_str(message.get()).ok()?;
            let update = &message["params"]["update"];
            match kind.as_str() {
                "text" => Shown::Text(plain(&message["content"])),
                "thinking" => Shown::Thinking(plain(&message["content"])),
                "tool_call" => block("tool", &named(&update["title"]), Some(&update["rawInput"])),
                "tool_call_update" if matches!(update["status"].as_str(), Some("completed" | "failed")) => {
                    let result = if update["rawOutput"].is_null() { &update["content"] } else { &update["rawOutput"] };
                    block("result", &format!("The tool {}", plain(&update["status"])), Some(result))
                }
                "error" => block("retry", &plain(&message["content"]), None),
                _ => return None,
            }
        }
    })
}

fn named(name: &Value) -> String {
    format!("It calls {}", plain(name))
}

/// A string as it is, anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn block(class: &str, title: &str, detail: Option<&Value>) -> Shown {
    let text = |value: &Value| if value.is_string() { plain(value) } else { serde_json::to_string_pretty(value).unwrap_or_default() };
    let detail = detail.filter(|value| !value.is_null()).map(text).map(|text| match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    });
    Shown::Block(html! {
        div class={ "event " (class) } {
            @match detail {
                Some(detail) => details { summary { (title) } pre { (detail) } },
                None => p { (title) },
            }
        }
    })
}

/// What a job said so far, with the number of the last event; `None` where that is not kept any more.
pub(super) async fn so_far(app: &App, id: &JobId) -> Result<Option<(Markup, u64)>, Oops> {
    let Some(records) = app.feeds.so_far(id, MOST).await? else { return Ok(None) };
    let (mut pieces, mut last): (Vec<Shown>, u64) = (Vec::new(), 0);
    for record in records {
        let Record::Event(number, event) = record else { continue };
        last = number;
        match (pieces.last_mut(), shown(&event)) {
            (Some(Shown::Text(text)), Some(Shown::Text(more))) | (Some(Shown::Thinking(text)), Some(Shown::Thinking(more))) => {
                text.push_str(&more);
            }
            (_, new) => pieces.extend(new),
        }
    }
    let markup = html! {
        @for piece in pieces {
            @match piece {
                Shown::Text(text) => pre.text { (text) },
                Shown::Thinking(text) => pre.thinking { (text) },
                Shown::Block(block) => (block),
            }
        }
    };
    Ok(Some((markup, last)))
}

/// What a job says behind the event `after`, as it comes, to its end.
pub(super) async fn follow(app: &App, id: &JobId, after: u64) -> Result<Response, Oops> {
    let Some(reader) = app.feeds.read(id, after).await? else { return Ok(response(Body::from(frame("end", None, "")))) };
    Ok(response(Body::from_stream(reader.bytes(Dialect { name: Some("page"), render: Arc::new(render) }))))
}

fn render(item: Item) -> Vec<u8> {
    match item {
        Item::Record(Record::Event(id, event)) => match shown(&event) {
            Some(Shown::Text(text)) => frame("text", Some(id), &text),
            Some(Shown::Thinking(text)) => frame("thinking", Some(id), &text),
            Some(Shown::Block(block)) => frame("block", Some(id), &block.into_string()),
            None => Vec::new(),
        },
        Item::Record(Record::End(..) | Record::Sent(_)) | Item::End(_) => frame("end", None, ""),
        Item::Gap => frame("text", None, "\n[events that came here are not kept]\n"),
        Item::Beat => b":\n\n".to_vec(),
    }
}

/// An event of a stream: a text as JSON, which stands in one line.
pub(super) fn frame(event: &str, id: Option<u64>, text: &str) -> Vec<u8> {
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    format!("{id}event: {event}\ndata: {}\n\n", json!(text)).into_bytes()
}
