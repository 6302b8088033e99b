//! Runs and turns as server-sent events.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use futures_util::{Stream, StreamExt, stream};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio_util::sync::DropGuard;
use utoipa::ToSchema;

use super::answer::Answer;
use super::auth::Caller;
use super::error::ApiError;
use super::render::Of;
use super::view;
use crate::agent::contract::Event;
use crate::app::App;
use crate::job::feed_format::{End, Record};
use crate::job::feed_reader::{Dialect, Item};
use crate::ledger::JobId;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// What is said where events are missing.
const GAP: &[u8] = b"event: gap\ndata: {\"detail\":\"Events that came here are not kept any more; ask for the result.\"}\n\n";
/// A comment, so that a connection is not taken for dead.
const BEAT: &[u8] = b":\n\n";

/// An event as it is sent. Only described: the bytes are those of the feed.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only described")]
pub(super) struct SentEvent {
    /// Grows by one; for `Last-Event-ID`. `gap` has none.
    id: Option<String>,
    /// `text`, `tool_call` and the like; last `result` or `error`.
    event: String,
    /// JSON; of `result` and `error` what the plain call gives.
    data: String,
}

/// The id of the event that a reader saw last; 0 for none.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<u64, ApiError> {
    let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(0) };
    let id = value.to_str().ok().filter(|id| !id.is_empty()).map_or(Some(0), |id| id.parse().ok());
    id.ok_or_else(|| ApiError::BadRequest("Send the id of an event as Last-Event-ID.".to_owned()))
}

/// The events behind `after`, to the end. Where they are not kept any more, or have no end although the job has, that is
/// said, and the answer that the row gives follows. A reader that leaves drops the guard.
pub(super) async fn follow(app: &App, caller: &Caller, id: &JobId, after: u64, guard: Option<DropGuard>) -> Result<Response, ApiError> {
    let reader = app.feeds.read(id, after).await?;
    let has_end = reader.is_some() && app.feeds.has_end(id).await?;
    let rest = if has_end {
        Vec::new()
    } else {
        let row = app.ledger.job(&caller.app, id).await?.ok_or(ApiError::NotFound)?;
        [GAP, &view::end_of(&row).map(|end| end_frame("", &Of::from(id), &end)).unwrap_or_default()].concat()
    };
    let body = if let Some(reader) = reader {
        let of = Of::from(id);
        let dialect = Dialect { name: Some("clawdforge"), render: Arc::new(move |item| frame(&of, item)) };
        // A guard is nothing to a job that has ended.
        let bytes = held(reader.bytes(dialect), guard).chain(stream::iter((!rest.is_empty()).then(|| Ok(rest.into()))));
        Body::from_stream(bytes)
    } else {
        Body::from(rest)
    };
    Ok(response(body))
}

/// The bytes; what is held goes with them.
pub(super) fn held<T: Send>(bytes: impl Stream<Item = io::Result<Bytes>> + Send, held: T) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold((Box::pin(bytes), held), async |(mut bytes, held)| bytes.next().await.map(|piece| (piece, (bytes, held))))
}

/// A response of server-sent events.
pub(crate) fn response(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that would collect them pass them on.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

fn frame(of: &Of, item: Item) -> Vec<u8> {
    match item {
        Item::Record(Record::Event(id, event)) => event_frame(id, &event),
        Item::Record(Record::End(id, end)) => end_frame(&format!("id: {id}\n"), of, &end),
        // By an earlier release, which wrote them as they were sent.
        Item::Record(Record::Sent(line)) => line,
        Item::Gap => GAP.to_owned(),
        Item::End(end) => end_frame("", of, &end),
        Item::Beat => BEAT.to_owned(),
    }
}

fn event_frame(id: u64, event: &Event) -> Vec<u8> {
    let (name, data) = match event {
        Event::Model { kind, event } => match model_event(kind, event) {
            Some(event) => return event_frame(id, &event),
            None => return Vec::new(),
        },
        Event::Acp { kind, message } => (acp_name(kind), message.get().to_owned()),
        Event::PermissionRequest { message } => ("permission_request", message.get().to_owned()),
        Event::PermissionResolved { permission_id, option_id, by } => {
            ("permission_resolved", json!({"permission_id": permission_id, "option_id": option_id, "by": by}).to_string())
        }
        Event::Text { content } => ("text", json!({"content": content}).to_string()),
        Event::Thinking { content } => ("thinking", json!({"content": content}).to_string()),
        Event::ToolCall { args, id, name } => ("tool_call", json!({"args": args, "id": id, "name": name}).to_string()),
        Event::ToolCallUpdate { id, result, status } => {
            ("tool_call_update", json!({"id": id, "result": result, "status": status}).to_string())
        }
        Event::Retry { attempt, error, max_retries } => {
            ("retry", json!({"attempt": attempt, "error": error, "max_retries": max_retries}).to_string())
        }
    };
    named_frame(&format!("id: {id}\n"), name, "", data.as_bytes())
}

/// What an event of a completion's stream is among the others, if anything.
pub(crate) fn model_event(kind: &str, event: &RawValue) -> Option<Event> {
    let event: Value = serde_json::from_str(event.get()).ok()?;
    let piece = |name: &str| Some(event["delta"][name].as_str()?.to_owned());
    match kind {
        "content_block_delta.text_delta" => piece("text").map(|content| Event::Text { content }),
        "content_block_delta.thinking_delta" => piece("thinking").map(|content| Event::Thinking { content }),
        _ => None,
    }
}

/// What a message is called among the events. The last of those are called `result` and `error`.
fn acp_name(kind: &str) -> &str {
    match kind {
        "error" => "agent_error",
        "result" => "agent_result",
        kind if kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') => kind,
        _ => "other",
    }
}

/// An answer as the last event, with its status in a comment.
fn end_frame(id: &str, of: &Of, end: &End) -> Vec<u8> {
    let Answer { status, problem, body } = of.answer(end);
    let comment = format!(": {}{}\n", status.as_u16(), if problem { " problem" } else { "" });
    named_frame(id, if status == 200 { "result" } else { "error" }, &comment, &body)
}

fn named_frame(id: &str, event: &str, comment: &str, data: &[u8]) -> Vec<u8> {
    let mut frame = format!("{id}event: {event}\n{comment}").into_bytes();
    // Any line end would end the field.
    for line in data.split(|byte| matches!(byte, b'\n' | b'\r')) {
        frame.extend_from_slice(b"data: ");
        frame.extend_from_slice(line);
        frame.push(b'\n');
    }
    frame.push(b'\n');
    frame
}
