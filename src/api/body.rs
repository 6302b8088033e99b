//! How bodies are read: at a pace that no client can drag out, and JSON into types with a place for each error.

use std::error::Error as StdError;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Frame, SizeHint};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_path_to_error::{Path, Segment};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::error::{ApiError, FieldError};
use crate::blocking::aside;

/// The largest JSON body in bytes: a prompt of 10 MiB, each of whose bytes may take six when it is escaped.
pub const MAX_JSON: usize = 64 << 20;
/// A body has this long, and one second more for each [`PACE`] bytes that have come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes per second.
const PACE: u64 = 16 << 10;
/// How much of a refused body is still read, and for how long, so that its sender gets to see the refusal. A connection
/// that is closed with bytes unread is reset, and the answer lost with it.
const READ_OUT_BYTES: u64 = 256 << 20;
const READ_OUT_TIME: Duration = Duration::from_secs(5);

/// Keeps the pace of a body while the handler reads it, and reads the rest where the handler refused it.
pub async fn guard(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    // A client that asks first does not send what it was refused.
    let asks = request.headers().contains_key(header::EXPECT);
    let mut paced = Shared(Arc::default());
    let request = request.map(|body| {
        *paced.lock() = Some(Paced { body, received: 0, started: Instant::now(), late: Box::pin(sleep(PATIENCE)) });
        Body::new(paced.clone())
    });
    let response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let begun = paced.lock().as_ref().is_some_and(|paced| paced.received > 0);
        if begun || !asks {
            let most = paced.received() + READ_OUT_BYTES;
            let _ = timeout(READ_OUT_TIME, async { while paced.received() < most && matches!(paced.frame().await, Some(Ok(_))) {} }).await;
        }
    }
    response
}

/// The sender did not keep the pace.
#[derive(Debug, thiserror::Error)]
#[error("the body came too slowly")]
struct TooSlow;

struct Paced {
    body: Body,
    received: u64,
    started: Instant,
    late: Pin<Box<Sleep>>,
}

/// The body, held by the request and by [`guard`], which polls it only when the request's handler is done.
#[derive(Clone)]
struct Shared(Arc<Mutex<Option<Paced>>>);

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Paced>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn received(&self) -> u64 {
        self.lock().as_ref().map_or(0, |paced| paced.received)
    }
}

impl HttpBody for Shared {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let mut shared = self.lock();
        let Some(paced) = shared.as_mut() else { return Poll::Ready(None) };
        match Pin::new(&mut paced.body).poll_frame(context) {
            Poll::Pending => paced.late.as_mut().poll(context).map(|()| Some(Err(TooSlow.into()))),
            Poll::Ready(frame) => {
                if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
                    paced.received += data.len() as u64;
                    let deadline = paced.started + PATIENCE + Duration::from_secs(paced.received / PACE);
                    paced.late.as_mut().reset(deadline);
                }
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.lock().as_ref().is_none_or(|paced| paced.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().as_ref().map_or_else(SizeHint::default, |paced| paced.body.size_hint())
    }
}

/// What a failure to read a body means.
pub fn refusal(error: &(dyn StdError + 'static), limit: u64) -> ApiError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<TooSlow>() {
            return ApiError::TooSlow;
        }
        if error.is::<LengthLimitError>() {
            return ApiError::TooLarge(limit);
        }
        cause = error.source();
    }
    ApiError::BadRequest("The body ended too early; send it again, whole.".to_owned())
}

/// A body that knows what is wrong with it beyond its types.
pub trait Validate {
    /// The errors, none where it is valid.
    fn errors(&self) -> Vec<FieldError>;
}

/// A JSON body, read and valid.
pub struct ValidJson<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Validate> FromRequest<S> for ValidJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let bytes = json_bytes(request).await?;
        aside(bytes.len(), || valid(&bytes)).map(Self)
    }
}

/// A JSON body, read, valid, and as it was sent.
pub struct SentJson<T> {
    /// What it says.
    pub value: T,
    /// As it was sent.
    pub bytes: Bytes,
}

impl<S: Send + Sync, T: DeserializeOwned + Validate> FromRequest<S> for SentJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let bytes = json_bytes(request).await?;
        let value = aside(bytes.len(), || valid(&bytes))?;
        Ok(Self { value, bytes })
    }
}

async fn json_bytes(request: Request) -> Result<Bytes, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::WrongType("application/json"));
    }
    let limit = MAX_JSON as u64;
    if request.body().size_hint().lower() > limit {
        return Err(ApiError::TooLarge(limit));
    }
    let body = Limited::new(request.into_body(), MAX_JSON).collect().await;
    Ok(body.map_err(|error| refusal(error.as_ref(), limit))?.to_bytes())
}

fn valid<T: DeserializeOwned + Validate>(bytes: &[u8]) -> Result<T, ApiError> {
    let value: T = parse(bytes)?;
    match value.errors() {
        errors if errors.is_empty() => Ok(value),
        errors => Err(ApiError::Invalid(errors)),
    }
}

/// A number without a fraction, `60.0` too: JSON knows no other difference.
pub fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let Some(number) = Option::<serde_json::Number>::deserialize(deserializer)? else { return Ok(None) };
    #[expect(clippy::cast_possible_truncation, reason = "out of range it saturates, and stays out of range")]
    let from_float = || number.as_f64().filter(|float| float.fract() == 0.0).map(|float| float as i64);
    number.as_i64().or_else(from_float).map(Some).ok_or_else(|| D::Error::custom("a whole number is needed"))
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let malformed = |error: &dyn std::fmt::Display| ApiError::BadRequest(format!("The body is not JSON ({error})."));
    // An array would fill a struct's fields in their order.
    let object = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    if !object {
        serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| malformed(&error))?;
        return Err(ApiError::Invalid(vec![FieldError::new("", "the body must be a JSON object")]));
    }
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let (path, error) = (pointer(error.path()), error.into_inner());
        if error.is_data() { ApiError::Invalid(vec![FieldError::new(path, without_position(&error))]) } else { malformed(&error) }
    })?;
    deserializer.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    if text.starts_with("unknown field ") {
        return "it is not known here; leave it out".to_owned();
    }
    text.strip_suffix(&position).unwrap_or(&text).to_owned()
}

fn pointer(path: &Path) -> String {
    path.iter().fold(String::new(), |pointer, segment| match segment {
        Segment::Seq { index } => format!("{pointer}/{index}"),
        Segment::Map { key } => format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1")),
        Segment::Enum { .. } | Segment::Unknown => pointer,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::post;
    use axum::{Router, middleware};
    use tower::ServiceExt;

    #[derive(Deserialize)]
    struct Anything {}

    impl Validate for Anything {
        fn errors(&self) -> Vec<FieldError> {
            Vec::new()
        }
    }

    /// A body that gives one byte, and the next when the pause is over.
    struct Drip {
        pause: Duration,
        next: Pin<Box<Sleep>>,
    }

    impl HttpBody for Drip {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            std::task::ready!(self.next.as_mut().poll(context));
            let pause = self.pause;
            self.next.as_mut().reset(Instant::now() + pause);
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b" ")))))
        }
    }

    async fn send(body: Body) -> (StatusCode, Duration) {
        let handler = |json: Result<ValidJson<Anything>, ApiError>| async move { json.map(|_| ()).into_response() };
        let app: Router = Router::new().route("/", post(handler)).layer(middleware::from_fn(guard));
        let request = Request::post("/").header(header::CONTENT_TYPE, "application/json").body(body).unwrap();
        let begun = Instant::now();
        (app.oneshot(request).await.unwrap().status(), begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_or_drips_is_408() {
        for pause in [Duration::from_hours(1), Duration::from_secs(1)] {
            let (status, took) = send(Body::new(Drip { pause, next: Box::pin(sleep(pause)) })).await;
            assert_eq!(status, StatusCode::REQUEST_TIMEOUT);
            assert!(took < PATIENCE + READ_OUT_TIME + Duration::from_secs(1), "{took:?}");
        }
    }

    #[tokio::test]
    async fn a_body_at_once_is_read() {
        assert_eq!(send(Body::from("{}")).await.0, StatusCode::OK);
    }
}
