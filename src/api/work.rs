//! What runs and turns share on the wire: how they are asked for by headers, and how they are followed.

use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tokio::time::sleep;
use tokio_util::sync::DropGuard;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::feed::{self, Final, GAP};
use crate::ledger::{Key, turn_id};
use crate::runs::Way;
use crate::secret::sha256_hex;
use crate::server::App;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
/// The longest idempotency key, in characters.
const LONGEST_KEY: usize = 255;

/// What the headers of a request for a run or a turn say.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    /// The events as they come (`Accept: text/event-stream`).
    pub(super) stream: bool,
    /// The answer at once, and the work in the background (`Prefer: respond-async`).
    pub(super) background: bool,
    /// The key under which it may be sent again.
    key: Option<String>,
}

impl<S: Sync> FromRequestParts<S> for Wish {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let listed = |name: HeaderName| {
            let values = parts.headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).map(|part| part.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
        };
        Ok(Self {
            stream: listed(header::ACCEPT).any(|kind| kind == "text/event-stream"),
            background: listed(PREFER).any(|preference| preference == "respond-async"),
            key: key(&parts.headers)?,
        })
    }
}

/// The one idempotency key. By the draft of the IETF it is a quoted string; many clients send it bare.
fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let key = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    if key.is_empty() || key.len() > LONGEST_KEY || values.next().is_some() {
        return Err(ApiError::BadRequest(format!("Send one Idempotency-Key, of 1 to {LONGEST_KEY} visible characters.")));
    }
    Ok(Some(key.to_owned()))
}

impl Wish {
    /// The key, for what the app asks for at this path.
    pub(super) fn key(&self, app: &str, path: &str, asked: &impl Serialize) -> Option<Key> {
        let key = self.key.clone()?;
        let asked = serde_json::to_vec(asked).expect("requests are JSON");
        let fingerprint = sha256_hex(&[path.as_bytes(), b"\n", &asked].concat());
        Some(Key { app_name: app.to_owned(), key, fingerprint })
    }

    /// How the work is to be done.
    pub(super) fn way(&self, key: Option<Key>) -> Way {
        let detached = self.background || key.is_some();
        Way { accepted: detached || self.stream, detached, key }
    }
}

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

/// An answer that is no problem.
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Final {
    Final { status: status.as_u16(), problem: false, body: serde_json::to_vec(body).expect("answers are JSON").into() }
}

/// The id of what a key stands for, if it was used before, for the same request.
pub(super) async fn claimed(app: &App, key: Option<&Key>) -> Result<Option<String>, ApiError> {
    let Some(key) = key else { return Ok(None) };
    match app.ledger.claimed(key).await? {
        Some(claimed) if claimed.fingerprint != key.fingerprint => Err(ApiError::OtherRequest),
        claimed => Ok(claimed.map(|claimed| claimed.id)),
    }
}

/// Says that work was taken on, and where it is to be seen.
pub(super) fn accepted(location: &str, state: &impl Serialize) -> Response {
    let mut response = (StatusCode::ACCEPTED, axum::Json(state)).into_response();
    let headers = response.headers_mut();
    headers.insert(PREFERENCE_APPLIED, HeaderValue::from_static("respond-async"));
    headers.insert(header::LOCATION, HeaderValue::from_str(location).expect("ids are ASCII"));
    response
}

/// The id of the event that a reader saw last; 0 for none.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<u64, ApiError> {
    let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(0) };
    let id = value.to_str().ok().filter(|id| !id.is_empty()).map_or(Some(0), |id| id.parse().ok());
    id.ok_or_else(|| ApiError::BadRequest("Send the id of an event as Last-Event-ID.".to_owned()))
}

/// A run or a turn of the caller's own.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work<'a> {
    /// The caller's name, and the run's id.
    Run(&'a str, &'a str),
    /// A session's id, and the turn's number.
    Turn(&'a str, i64),
}

impl Work<'_> {
    /// What its feed is called.
    fn id(self) -> String {
        match self {
            Self::Run(_, run_id) => run_id.to_owned(),
            Self::Turn(session_id, turn) => turn_id(session_id, turn),
        }
    }

    /// The answer, as far as the row tells. `None` while there is none.
    async fn answer(self, app: &App) -> Result<Option<Final>, ApiError> {
        match self {
            Self::Run(caller, run_id) => super::runs::answer_of(app, caller, run_id).await,
            Self::Turn(session_id, turn) => super::sessions::answer_of(app, session_id, turn).await,
        }
    }
}

/// What came, or comes, of work that was asked for before.
pub(super) async fn answer_of(app: &App, work: Work<'_>) -> Result<Final, ApiError> {
    let (feeds, id) = (&app.feeds, &work.id());
    // Between its row and its feed, and between its end and its row, there is nothing to see of it.
    for _ in 0..100 {
        if let Some(live) = feeds.live(id)
            && let Some(answer) = live.answer().await
        {
            return Ok(answer);
        }
        if let Some(answer) = feeds.answer(id).await? {
            return Ok(answer);
        }
        if let Some(answer) = work.answer(app).await? {
            return Ok(answer);
        }
        sleep(Duration::from_millis(20)).await;
    }
    Err(ApiError::Stopping)
}

/// The events behind `after`, to the end. Where they are not kept any more, or have no end although the work has, that is
/// said, and the answer that the row gives follows. A reader that leaves drops the guard.
pub(super) async fn follow(app: &App, work: Work<'_>, after: u64, guard: Option<DropGuard>) -> Result<Response, ApiError> {
    let (feeds, id) = (&app.feeds, &work.id());
    let reader = feeds.read(id, after).await?;
    let has_end = reader.is_some() && (feeds.live(id).is_some() || feeds.answer(id).await?.is_some());
    let rest = if has_end {
        Vec::new()
    } else {
        [GAP, &work.answer(app).await?.map(|answer| feed::frame("", &answer)).unwrap_or_default()].concat()
    };
    let body = if let Some(reader) = reader {
        // The guard is held as long as the body is, and is nothing to work that has ended.
        let bytes = stream::unfold((Box::pin(reader.bytes()), guard), async |(mut bytes, guard)| {
            if let Some(piece) = bytes.next().await {
                return Some((piece, (bytes, guard)));
            }
            guard.map(DropGuard::disarm);
            None
        });
        Body::from_stream(bytes.chain(stream::iter((!rest.is_empty()).then(|| Ok(rest.into())))))
    } else {
        Body::from(rest)
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that would collect them pass them on.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    Ok(response)
}
