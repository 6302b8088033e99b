//! A stub of the models' APIs: the only thing in a demonstration or a test that is not real.
//!
//! It answers every prompt with a sentence about it, unless a line of the prompt is a directive:
//! `stub: {"text": "…"}`. So a test of an app decides by its prompts alone what "the model" does, whichever agent asks it.
//! What a directive says is decided once; each API has a file that reads its requests and writes its replies.

mod chat;
mod conversation;
mod delivery;
mod directive;
mod gemini;
mod messages;
mod responses;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use conversation::Message;
use directive::{Directive, Reply};

/// What differs between the APIs, and nothing else.
struct Api {
    /// The messages of a request.
    conversation: fn(&Value) -> Vec<Message>,
    /// A reply in one piece.
    whole: fn(&Reply) -> Value,
    /// The same as server-sent events; long ones in pieces of so many bytes.
    events: fn(&Reply, usize) -> Vec<String>,
    /// An error's body.
    error: fn(StatusCode, &str) -> Value,
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
        let routes = routes();
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "the model stub ended");
            }
        });
        Ok(Self { address, serving })
    }

    /// What `ANTHROPIC_BASE_URL` and `GOOGLE_GEMINI_BASE_URL` name; OpenAI's clients want `/v1` behind it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn routes() -> Router {
    let streamed = |request: &Value| request["stream"] == json!(true);
    let named = move |api: &'static Api| {
        post(move |headers: HeaderMap, body: Bytes| answer(api, headers, body, move |request| (name(&request["model"]), streamed(request))))
    };
    Router::new()
        .route("/", get(|| async {}))
        .route("/v1/messages", named(&messages::API))
        .route("/v1/messages/count_tokens", post(|| async { Json(json!({"input_tokens": 1})) }))
        .route("/v1/responses", named(&responses::API))
        .route("/v1/chat/completions", named(&chat::API))
        .route("/v1/models", get(|| async { Json(json!({"object": "list", "data": [{"id": "stub", "object": "model"}]})) }))
        .route("/v1beta/models/{call}", post(of_gemini))
        .layer(DefaultBodyLimit::disable())
}

/// The model and the method are the last segment of the path: `gemini-2.5-pro:streamGenerateContent`.
async fn of_gemini(Path(call): Path<String>, headers: HeaderMap, body: Bytes) -> Response {
    let (model, method) = call.split_once(':').unwrap_or((&call, ""));
    let streamed = match method {
        "countTokens" => return Json(json!({"totalTokens": 1})).into_response(),
        "generateContent" => false,
        "streamGenerateContent" => true,
        _ => return refusal(&gemini::API, 404, "the stub does not know this method", false),
    };
    answer(&gemini::API, headers, body, move |_| (model.to_owned(), streamed)).await
}

/// Does what the prompt's directive says. `asked` gives the model that a request names, and whether its reply is a stream.
async fn answer(api: &Api, headers: HeaderMap, body: Bytes, asked: impl FnOnce(&Value) -> (String, bool)) -> Response {
    let Ok(request) = serde_json::from_slice::<Value>(&body) else { return refusal(api, 400, "the request is not JSON", false) };
    let conversation = (api.conversation)(&request);
    let directive = match Directive::of(&conversation) {
        Ok(directive) => directive,
        Err(error) => return refusal(api, 400, &format!("the stub's directive is wrong: {error}"), false),
    };
    tokio::time::sleep(Duration::from_millis(directive.delay_ms)).await;
    if let Some(status) = directive.error {
        return refusal(api, status, "the stub was told to fail", directive.retry);
    }
    let (pace, cut) = (directive.pace_ms, directive.cut);
    let (model, streamed) = asked(&request);
    let reply = directive.reply(&request, model, &conversation, &headers, &body);
    if streamed {
        let piece = if pace > 0 { delivery::PACED_PIECE } else { delivery::PIECE };
        delivery::stream((api.events)(&reply, piece), Duration::from_millis(pace), cut)
    } else {
        delivery::whole("application/json", (api.whole)(&reply).to_string(), cut)
    }
}

fn refusal(api: &Api, status: u16, message: &str, retry: bool) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, [("x-should-retry", if retry { "true" } else { "false" })], Json((api.error)(status, message))).into_response()
}

fn name(model: &Value) -> String {
    model.as_str().unwrap_or_default().to_owned()
}

/// An id for the wire. Messages that share one are taken for parts of one message.
fn unique(kind: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{kind}_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
