//! `POST /files`: uploads, streamed to disk.

use std::sync::Arc;

use axum::Json;
use axum::extract::multipart::{Field, Multipart, MultipartError, MultipartRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Caller;
use super::body;
use super::error::{ApiError, FieldError, Problem};
use crate::server::App;
use crate::uploads::{Incoming, safe_name};

const DEFAULT_TTL_SECS: u32 = 3600;
/// Parts in one upload, of which two are read.
const MAX_PARTS: usize = 16;
/// Bytes of a part that is not the file.
const MAX_PART: usize = 1024;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct UploadQuery {
    /// Seconds that the file is kept.
    #[param(value_type = Option<u32>, default = 3600, minimum = 60, maximum = 86_400)]
    ttl_secs: Option<String>,
}

/// The parts of an upload, in any order.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes the parts, which are streamed")]
struct Upload {
    /// The file; its name is kept for the agent to see, made safe.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// Seconds that the file is kept.
    #[schema(default = 3600, minimum = 60, maximum = 86_400)]
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
#[utoipa::path(post, path = "/files", tag = "files", security(("app" = [])), params(UploadQuery),
    request_body(content = Upload, content_type = "multipart/form-data"), responses(
    (status = OK, body = Uploaded),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The upload was refused"),
))]
async fn upload(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(query): Query<UploadQuery>,
    parts: Result<Multipart, MultipartRejection>,
) -> Result<Json<Uploaded>, ApiError> {
    let mut parts = parts.map_err(|rejection| match rejection.into_response().status() {
        StatusCode::BAD_REQUEST => ApiError::WrongType("multipart/form-data with a boundary"),
        _ => ApiError::Defect,
    })?;
    let limit = app.uploads.max_bytes();
    let refused = |error: MultipartError| refusal(&error, limit);
    let mut ttl_secs = query.ttl_secs.as_deref().map(read_ttl).transpose()?;
    let mut file = None;
    let mut count = 0;
    while let Some(part) = parts.next_field().await.map_err(refused)? {
        count += 1;
        if count > MAX_PARTS {
            return Err(ApiError::BadRequest(format!("Send at most {MAX_PARTS} parts.")));
        }
        match part.name() {
            Some("file") if file.is_some() => return Err(ApiError::BadRequest("Send one part named \"file\", not two.".to_owned())),
            Some("file") => {
                let name = safe_name(part.file_name().unwrap_or_default());
                file = Some((name, store(&app, part, limit).await?));
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

async fn store(app: &App, mut part: Field<'_>, limit: u64) -> Result<Incoming, ApiError> {
    let mut incoming = app.uploads.begin().await?;
    while let Some(chunk) = part.chunk().await.map_err(|error| refusal(&error, limit))? {
        if incoming.size() + chunk.len() as u64 > limit {
            return Err(ApiError::TooLarge(limit));
        }
        incoming.write(&chunk).await?;
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

fn read_ttl(text: &str) -> Result<u32, ApiError> {
    let wrong = || ApiError::BadRequest("Set ttl_secs to a whole number from 60 to 86400.".to_owned());
    text.trim().parse().ok().filter(|secs| (60..=86_400).contains(secs)).ok_or_else(wrong)
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
