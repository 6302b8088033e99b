//! `POST /files`: uploads, streamed to disk.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use axum::Json;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Query, Request, State};
use hyper::body::Frame;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Caller;
use super::body;
use super::error::{ApiError, FieldError, Problem};
use crate::app::App;
use crate::uploads::{Incoming, safe_name};

const DEFAULT_TTL_SECS: u32 = 3600;
/// Parts in one upload, of which two are read.
const MAX_PARTS: usize = 16;
/// Bytes of a part that is not the file.
const MAX_PART: usize = 1024;
/// Bytes that the parser may hold: a few of the frames that hyper reads.
const MAX_UNREAD: usize = 2 << 20;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct UploadQuery {
    /// Seconds that the file is kept.
    #[param(value_type = u32, required = false, default = 3600, minimum = 60, maximum = 86_400)]
    ttl_secs: Option<String>,
}

/// The parts of an upload, in any order.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes the parts, which are streamed")]
struct Upload {
    /// The file; its name is kept for the agent to see, made safe.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// Seconds that the file is kept; 3600 by default.
    #[schema(value_type = u32, required = false, minimum = 60, maximum = 86_400)]
    ttl_secs: Option<u32>,
}

#[derive(Serialize, ToSchema)]
struct Uploaded {
    ok: bool,
    /// What `files` of a run takes.
    #[schema(pattern = "^ff_[0-9a-f]{32}$")]
    file_token: String,
    /// Seconds that the file is kept.
    ttl_secs: u32,
    /// Bytes.
    size: u64,
}

/// Upload a file
#[utoipa::path(post, path = "/files", operation_id = "upload_file", tag = "files", security(("app" = [])), params(UploadQuery),
    request_body(content = Upload, content_type = "multipart/form-data"), responses(
    (status = OK, body = Uploaded),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The upload was refused"),
))]
async fn upload(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<UploadQuery>, QueryRejection>,
    request: Request,
) -> Result<Json<Uploaded>, ApiError> {
    let Query(query) = query.map_err(|_| wrong_ttl())?;
    let limit = app.uploads.max_bytes();
    let unread = Unread::default();
    let watched = request.map(|body| Body::new(Watched { body, unread: unread.clone(), pause: false }));
    let mut parts = Multipart::from_request(watched, &()).await.map_err(|_| ApiError::WrongType("multipart/form-data with a boundary"))?;
    let refused = |error: MultipartError| refusal(&error, limit);
    let mut ttl_secs = query.ttl_secs.as_deref().map(read_ttl).transpose()?;
    let mut file = None;
    let mut count = 0;
    while let Some(part) = parts.next_field().await.map_err(refused)? {
        unread.clear();
        count += 1;
        if count > MAX_PARTS {
            return Err(ApiError::BadRequest(format!("Send at most {MAX_PARTS} parts.")));
        }
        match part.name() {
            Some("file") if file.is_some() => return Err(ApiError::BadRequest("Send one part named \"file\", not two.".to_owned())),
            Some("file") => {
                let name = safe_name(part.file_name().unwrap_or_default());
                file = Some((name, store(&app, part, &unread).await?));
            }
            Some("ttl_secs") => ttl_secs = Some(read_ttl(&small(part, limit).await?)?),
            _ => drop(small(part, limit).await?),
        }
    }
    let Some((name, incoming)) = file else {
        return Err(ApiError::Invalid(vec![FieldError::new("/file", "a part named \"file\" is needed")]));
    };
    let ttl_secs = ttl_secs.unwrap_or(DEFAULT_TTL_SECS);
    let file = incoming.finish(&caller.app, name, ttl_secs, &app.ledger).await?;
    tracing::info!(app = caller.app, size = file.size, ttl_secs, "upload");
    Ok(Json(Uploaded { ok: true, file_token: file.file_token, ttl_secs, size: file.size }))
}

async fn store(app: &App, mut part: Field<'_>, unread: &Unread) -> Result<Incoming, ApiError> {
    let limit = app.uploads.max_bytes();
    let mut incoming = app.uploads.begin()?;
    while let Some(chunk) = part.chunk().await.map_err(|error| refusal(&error, limit))? {
        if incoming.size() + chunk.len() as u64 > limit {
            return Err(ApiError::TooLarge(limit));
        }
        incoming.write(&chunk).await?;
        unread.clear();
    }
    Ok(incoming)
}

async fn small(mut part: Field<'_>, limit: u64) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = part.chunk().await.map_err(|error| refusal(&error, limit))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_PART {
            return Err(ApiError::BadRequest(format!("Send at most {MAX_PART} bytes in a part other than \"file\".")));
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Bytes that came since the last that were of use. The parser keeps what it can't make sense of yet, without a limit of
/// its own: before the first boundary, and in the head of a part.
#[derive(Clone, Default)]
struct Unread(Arc<AtomicUsize>);

impl Unread {
    fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// A body that ends where too much of it is of no use. It gives one frame at a time, with a pause between: the parser
/// would read ahead as far as bytes are there, and a client on this machine is fast.
struct Watched {
    body: Body,
    unread: Unread,
    pause: bool,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if std::mem::take(&mut self.pause) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.pause = true;
        let length = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, Bytes::len);
        if self.unread.0.fetch_add(length, Ordering::Relaxed) > MAX_UNREAD {
            return Poll::Ready(Some(Err("the parts have no end".into())));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }
}

fn read_ttl(text: &str) -> Result<u32, ApiError> {
    text.trim().parse().ok().filter(|secs| (60..=86_400).contains(secs)).ok_or_else(wrong_ttl)
}

fn wrong_ttl() -> ApiError {
    ApiError::BadRequest("Set ttl_secs once, to a whole number from 60 to 86400.".to_owned())
}

fn refusal(error: &MultipartError, limit: u64) -> ApiError {
    match body::refusal(error, limit) {
        ApiError::BadRequest(_) => ApiError::BadRequest(format!("Send a whole multipart/form-data body ({}).", error.body_text())),
        other => other,
    }
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    // The file is counted as it comes, with a limit of its own.
    OpenApiRouter::new().routes(routes!(upload)).layer(DefaultBodyLimit::disable())
}
