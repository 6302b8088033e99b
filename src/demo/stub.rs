//! A stub of the Messages API: the only thing in a demonstration or a test that is not real.
//!
//! It answers every prompt with a sentence about it, unless a line of the prompt is a directive:
//! `stub: {"text": "…"}`. So a test of an app decides by its prompts alone what "the model" does.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use hyper::body::Frame;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Bytes of a reply in one event.
const PIECE: usize = 4096;

/// What the stub does with a prompt.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a word of the directive")]
struct Directive {
    /// The reply.
    text: Option<String>,
    /// A reply of so many bytes.
    bytes: Option<usize>,
    /// Milliseconds before the answer.
    delay_ms: u64,
    /// An HTTP error, such as 529; final where `retry` is false.
    error: Option<u16>,
    retry: bool,
    /// Make the agent use a tool first; the reply is then what the tool gave.
    tool: Option<Tool>,
    /// The same, several times, with any number of calls each time.
    tools: Vec<Vec<Tool>>,
    /// Think this before the answer.
    thinking: Option<String>,
    /// Why the model stops: `max_tokens`, `refusal`, …
    stop_reason: Option<String>,
    /// Break the connection in the middle of the reply.
    cut: bool,
    /// Milliseconds between the pieces of the reply, of 16 characters then.
    pace_ms: u64,
    /// Reply with the whole request, as JSON text.
    echo: bool,
    /// Reply with the header by which the request is signed in.
    credential: bool,
}

#[derive(Debug, Deserialize)]
struct Tool {
    name: String,
    input: Value,
}

/// A running stub. It ends when this is dropped.
#[derive(Debug)]
pub struct Stub {
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Stub {
    /// Starts a stub on a free port of the loopback interface.
    pub async fn start() -> std::io::Result<Self> {
        Self::start_on(([127, 0, 0, 1], 0).into()).await
    }

    /// Starts a stub that listens on `address`.
    pub async fn start_on(address: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let routes = Router::new()
            .route("/", get(|| async {}))
            .route("/v1/messages", post(messages))
            .route("/v1/messages/count_tokens", post(|| async { Json(json!({"input_tokens": 1})) }))
            .layer(axum::extract::DefaultBodyLimit::disable());
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "the model stub ended");
            }
        });
        Ok(Self { address, serving })
    }

    /// What `ANTHROPIC_BASE_URL` names.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn messages(headers: HeaderMap, body: Bytes) -> Response {
    let Ok(request) = serde_json::from_slice::<Value>(&body) else { return api_error(400, "the request is not JSON", false) };
    let prompt = prompt(&request);
    let directive = match directive(&prompt) {
        // A request beside the conversation, with what was said in it.
        _ if prompt.starts_with("<session>") => {
            Directive { text: Some(r#"{"title": "A talk with the stub"}"#.to_owned()), ..Directive::default() }
        }
        Ok(directive) => directive,
        Err(error) => return api_error(400, &format!("the stub's directive is wrong: {error}"), false),
    };
    tokio::time::sleep(Duration::from_millis(directive.delay_ms)).await;
    if let Some(status) = directive.error {
        return api_error(status, "the stub was told to fail", directive.retry);
    }
    let tool_result = tool_result(&request);
    let calls = match (directive.tool, &tool_result) {
        (Some(tool), None) => vec![tool],
        _ => directive.tools.into_iter().nth(rounds(&request)).unwrap_or_default(),
    };
    let mut blocks: Vec<_> =
        directive.thinking.iter().map(|thinking| json!({"type": "thinking", "thinking": thinking, "signature": unique("sig")})).collect();
    let stop_reason = if calls.is_empty() {
        let text = match (tool_result, directive.text, directive.bytes) {
            (_, None, None) if directive.echo => String::from_utf8_lossy(&body).into_owned(),
            (Some(result), ..) => result,
            (None, Some(text), _) => text,
            (None, None, Some(bytes)) => "0123456789abcdef".chars().cycle().take(bytes).collect(),
            (None, None, None) if directive.credential => credential(&headers),
            (None, None, None) => format!("The model stub read a prompt of {} characters.", prompt.chars().count()),
        };
        blocks.push(json!({"type": "text", "text": text}));
        directive.stop_reason.as_deref().unwrap_or("end_turn")
    } else {
        let call = |tool: &Tool| json!({"type": "tool_use", "id": unique("toolu"), "name": tool.name, "input": tool.input});
        blocks.extend(calls.iter().map(call));
        "tool_use"
    };
    let written: usize = blocks.iter().map(|block| block.to_string().len()).sum();
    let usage = json!({"input_tokens": prompt.len().div_ceil(4), "output_tokens": written.div_ceil(4)});
    if request["stream"] == json!(true) {
        let piece = if directive.pace_ms > 0 { 16 } else { PIECE };
        let events = events(&request["model"], &blocks, stop_reason, &usage, piece);
        if directive.pace_ms > 0 {
            let pace = Duration::from_millis(directive.pace_ms);
            let half = if directive.cut { events.len() / 2 } else { events.len() };
            let broken = directive.cut.then(|| Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
            let paced = futures_util::stream::iter(events.into_iter().take(half).map(Ok).chain(broken)).then(move |event| async move {
                tokio::time::sleep(pace).await;
                event
            });
            return ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(paced)).into_response();
        }
        return reply("text/event-stream", events.concat(), directive.cut);
    }
    reply("application/json", message(&request["model"], &blocks, Some(stop_reason), &usage).to_string(), directive.cut)
}

fn credential(headers: &HeaderMap) -> String {
    let shown = |name: &str| Some(format!("{name}: {}", headers.get(name)?.to_str().ok()?));
    ["x-api-key", "authorization"].into_iter().filter_map(shown).collect::<Vec<_>>().join("; ")
}

/// An id for the wire. Messages that share one are taken for parts of one message.
fn unique(kind: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{kind}_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn reply(content_type: &'static str, text: String, cut: bool) -> Response {
    let body = if cut {
        let half = text.len() / 2;
        Body::new(CutShort(Some(Bytes::from(text).slice(..half))))
    } else {
        Body::from(text)
    };
    ([(header::CONTENT_TYPE, content_type)], body).into_response()
}

fn api_error(status: u16, message: &str, retry: bool) -> Response {
    let kind = match status {
        401 => "authentication_error",
        429 => "rate_limit_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    let body = Json(json!({"type": "error", "error": {"type": kind, "message": message}}));
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, [("x-should-retry", if retry { "true" } else { "false" })], body).into_response()
}

/// The text of the user's own block: the last after the last `assistant` message that is not a reminder. Where only a
/// tool's result came since, the one before.
fn prompt(request: &Value) -> String {
    let messages = request["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let texts = messages.iter().rev().filter(|message| message["role"] == "user").flat_map(|message| match &message["content"] {
        Value::String(text) => vec![text.as_str()],
        Value::Array(blocks) => blocks.iter().rev().filter_map(|block| block["text"].as_str()).collect(),
        _ => Vec::new(),
    });
    texts.into_iter().find(|text| !text.trim_start().starts_with("<system-reminder>")).unwrap_or_default().to_owned()
}

fn directive(prompt: &str) -> serde_json::Result<Directive> {
    let line = prompt.lines().find_map(|line| line.trim().strip_prefix("stub:"));
    line.map_or_else(|| Ok(Directive::default()), serde_json::from_str)
}

/// How often tools were called since the prompt.
fn rounds(request: &Value) -> usize {
    let has =
        |message: &Value, kind: &str| message["content"].as_array().is_some_and(|blocks| blocks.iter().any(|block| block["type"] == kind));
    let messages = request["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let since = messages.iter().rposition(|message| message["role"] == "user" && !has(message, "tool_result")).unwrap_or_default();
    messages[since..].iter().filter(|message| has(message, "tool_use")).count()
}

/// What a tool gave, where the conversation ends with that.
fn tool_result(request: &Value) -> Option<String> {
    let last = request["messages"].as_array()?.iter().rfind(|message| message["role"] == "user")?;
    let result = last["content"].as_array()?.iter().find(|block| block["type"] == "tool_result")?;
    Some(match &result["content"] {
        Value::String(text) => text.clone(),
        other => other[0]["text"].as_str().unwrap_or_default().to_owned(),
    })
}

fn message(model: &Value, content: &[Value], stop_reason: Option<&str>, usage: &Value) -> Value {
    json!({
        "id": unique("msg"), "type": "message", "role": "assistant", "model": model, "content": content,
        "stop_reason": stop_reason, "stop_sequence": null, "usage": usage,
    })
}

fn events(model: &Value, blocks: &[Value], stop_reason: &str, usage: &Value, piece: usize) -> Vec<String> {
    let mut events = vec![json!({"type": "message_start", "message": message(model, &[], None, usage)})];
    for (index, block) in blocks.iter().enumerate() {
        let text = |key: &str| block[key].as_str().unwrap_or_default();
        let (start, deltas): (Value, Vec<Value>) = match text("type") {
            "text" => (
                json!({"type": "text", "text": ""}),
                pieces(text("text"), piece).map(|piece| json!({"type": "text_delta", "text": piece})).collect(),
            ),
            "thinking" => (
                json!({"type": "thinking", "thinking": "", "signature": ""}),
                pieces(text("thinking"), piece)
                    .map(|piece| json!({"type": "thinking_delta", "thinking": piece}))
                    .chain([json!({"type": "signature_delta", "signature": block["signature"]})])
                    .collect(),
            ),
            _ => (
                json!({"type": "tool_use", "id": block["id"], "name": block["name"], "input": {}}),
                pieces(&block["input"].to_string(), piece)
                    .map(|piece| json!({"type": "input_json_delta", "partial_json": piece}))
                    .collect(),
            ),
        };
        events.push(json!({"type": "content_block_start", "index": index, "content_block": start}));
        events.extend(deltas.into_iter().map(|delta| json!({"type": "content_block_delta", "index": index, "delta": delta})));
        events.push(json!({"type": "content_block_stop", "index": index}));
    }
    events.push(json!({"type": "message_delta", "delta": {"stop_reason": stop_reason, "stop_sequence": null}, "usage": usage}));
    events.push(json!({"type": "message_stop"}));
    events.iter().map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default())).collect()
}

fn pieces(mut text: &str, size: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (piece, rest) = text.split_at(text.floor_char_boundary(size.min(text.len())));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Some bytes, and then a broken connection.
struct CutShort(Option<Bytes>);

impl HttpBody for CutShort {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(Some(self.0.take().map(Frame::data).ok_or_else(|| std::io::ErrorKind::ConnectionReset.into())))
    }
}
