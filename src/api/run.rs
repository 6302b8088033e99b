//! `POST /run`: one prompt, one answer.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio_util::sync::DropGuard;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Caller;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::work::{self, Wish, Work};
use crate::agent::folder::{Attachment, is_expired};
use crate::agent::reply::Reply;
use crate::clock;
use crate::feed::Final;
use crate::ledger::NewRun;
use crate::runs::{Details, Ending, NoRun, Outcome, Request, Submitted};
use crate::server::App;

/// The longest prompt in bytes.
const MAX_PROMPT: usize = 10 << 20;
/// More files than a folder should be searched for.
const MAX_FILES: usize = 256;
pub(super) const RUN_ID: HeaderName = HeaderName::from_static("x-run-id");

#[derive(Debug, Deserialize, Serialize, ToSchema)]
struct RunRequest {
    /// Up to 10 MiB. Any text is safe.
    #[serde(default)]
    #[schema(required, min_length = 1, max_length = 10_485_760)]
    prompt: String,
    // Defaults stand in words: from `default`, generators take an optional property for one that is always there.
    /// `sonnet` by default.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$")]
    model: Option<String>,
    /// Added to the CLI's own system prompt.
    system: Option<String>,
    /// Tokens from `POST /files`.
    #[schema(max_items = 256)]
    files: Option<Vec<String>>,
    /// A JSON Schema of up to 64 KiB, which `result` then fits.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    schema: Option<Box<RawValue>>,
    /// How long the CLI may take, in seconds; 120 by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 5, maximum = 600)]
    timeout_secs: Option<i64>,
}

impl Validate for RunRequest {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        check_prompt(&self.prompt, &mut errors);
        check_model(self.model.as_deref(), &mut errors);
        check_files(self.files.as_deref(), &mut errors);
        if self.timeout_secs.is_some_and(|secs| !(5..=600).contains(&secs)) {
            errors.push(FieldError::new("/timeout_secs", "the timeout must be from 5 to 600 seconds"));
        }
        errors
    }
}

pub(super) fn check_prompt(prompt: &str, errors: &mut Vec<FieldError>) {
    match prompt.len() {
        0 => errors.push(FieldError::new("/prompt", "a prompt is needed")),
        length if length > MAX_PROMPT => errors.push(FieldError::new("/prompt", "the prompt is longer than 10 MiB")),
        _ => {}
    }
}

pub(super) fn check_model(model: Option<&str>, errors: &mut Vec<FieldError>) {
    if model.is_some_and(|model| !is_model(model)) {
        errors.push(FieldError::new("/model", r"the model must match ^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$"));
    }
}

pub(super) fn check_files(files: Option<&[String]>, errors: &mut Vec<FieldError>) {
    if files.is_some_and(|files| files.len() > MAX_FILES) {
        errors.push(FieldError::new("/files", format!("at most {MAX_FILES} files can be attached")));
    }
}

fn is_model(model: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/@[]-".contains(&byte);
    model.len() <= 128 && model.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && model.bytes().all(allowed)
}

#[derive(Serialize, ToSchema)]
pub(super) struct RunReply {
    ok: bool,
    /// The parsed value where the whole reply is a JSON object or array, the reply's text otherwise.
    #[schema(value_type = serde_json::Value)]
    result: Reply,
    /// Milliseconds; the time in the queue is not in it.
    duration_ms: i64,
    /// Why the model stopped.
    #[schema(example = "end_turn")]
    stop_reason: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct RunFailure {
    ok: bool,
    /// The cause in words.
    error: String,
    /// The last 4,000 characters of the CLI's standard error.
    stderr: String,
    /// Milliseconds; the time in the queue is not in it.
    duration_ms: i64,
    /// `timeout` where the time was up.
    #[schema(example = "error")]
    stop_reason: &'static str,
}

/// Run a prompt
///
/// With `Accept: text/event-stream` the events come as they happen, last `result` with this body or `error` with the error's.
/// With `Prefer: respond-async` the run goes on in the background. With an `Idempotency-Key` the request can be sent again.
#[utoipa::path(post, path = "/run", tag = "runs", security(("app" = [])), request_body = RunRequest,
    params(
        ("Prefer" = Option<String>, Header, description = "`respond-async` for an answer at once (RFC 7240)"),
        ("Idempotency-Key" = Option<String>, Header, description = "Up to 255 characters; the same key and body lead to one run, for 24 hours"),
    ),
    responses(
    (status = OK, headers(("x-run-id" = String, description = "The run's row in the ledger")), body = RunReply),
    (status = ACCEPTED, description = "It goes on in the background; the body is as that of GET /runs/{id}", headers(("location" = String, description = "Where to see it"))),
    (status = BAD_GATEWAY, body = RunFailure, description = "The CLI failed or ran out of time"),
    (status = SERVICE_UNAVAILABLE, description = "The CLI is not installed (application/json), or the server is busy, stopping or out of disk (application/problem+json)",
        content((RunFailure = "application/json"), (Problem = "application/problem+json"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn run(
    State(app): State<Arc<App>>,
    caller: Caller,
    wish: Wish,
    ValidJson(asked): ValidJson<RunRequest>,
) -> Result<Response, ApiError> {
    let key = wish.key(&caller.app, "/run", &asked);
    if let Some(run_id) = work::claimed(&app, key.as_ref()).await? {
        return again(&app, &caller, &wish, &run_id).await;
    }
    if let Some(schema) = &asked.schema {
        app.runs.check_schema(&caller.app, schema).await?;
    }
    let uuid = Uuid::now_v7();
    let run_id = uuid.simple().to_string();
    let request = Request {
        uuid,
        row: NewRun {
            run_id: run_id.clone(),
            app_name: caller.app.clone(),
            client_ip: caller.address.to_string(),
            model: asked.model.unwrap_or_else(|| "sonnet".to_owned()),
            prompt: asked.prompt,
        },
        details: Details {
            system: asked.system.filter(|system| !system.is_empty()),
            files: attachments(&app, &caller, asked.files.unwrap_or_default()).await?,
            schema: asked.schema,
            timeout: Duration::from_secs(asked.timeout_secs.unwrap_or(120).cast_unsigned()),
            limits: caller.limits,
        },
    };
    let Some(Submitted { live, guard }) = app.runs.submit(request, wish.way(key.clone())).await? else {
        // The same request came twice at once.
        let first = work::claimed(&app, key.as_ref()).await?.ok_or(ApiError::Defect)?;
        return again(&app, &caller, &wish, &first).await;
    };
    if wish.background || wish.stream {
        return present(&app, &caller, &wish, &run_id, guard).await;
    }
    let answer = live.answer().await.ok_or(ApiError::Stopping)?;
    guard.map(DropGuard::disarm);
    Ok(([(RUN_ID, run_id)], answer).into_response())
}

/// What came, or comes, of a request that was sent before.
async fn again(app: &App, caller: &Caller, wish: &Wish, run_id: &str) -> Result<Response, ApiError> {
    if wish.background || wish.stream {
        return present(app, caller, wish, run_id, None).await;
    }
    let answer = work::answer_of(app, Work::Run(&caller.app, run_id)).await?;
    Ok(([(RUN_ID, run_id)], answer).into_response())
}

/// The run in the background, or its events.
async fn present(app: &App, caller: &Caller, wish: &Wish, run_id: &str, guard: Option<DropGuard>) -> Result<Response, ApiError> {
    let row = app.ledger.run(&caller.app, run_id).await?.ok_or(ApiError::NotFound)?;
    let response = if wish.background {
        work::accepted(&format!("/runs/{run_id}"), &super::runs::RunState::from(row))
    } else {
        work::follow(app, Work::Run(&caller.app, run_id), 0, guard).await?
    };
    Ok(([(RUN_ID, run_id)], response).into_response())
}

/// The caller's files behind `tokens`. One that is not the caller's own, or not any more, is a `400` that names it.
pub(super) async fn attachments(app: &App, caller: &Caller, mut tokens: Vec<String>) -> Result<Vec<Attachment>, ApiError> {
    let mut seen = std::collections::HashSet::new();
    tokens.retain(|token| seen.insert(token.clone()));
    let files = app
        .ledger
        .files(&caller.app, tokens)
        .await?
        .map_err(|unknown| ApiError::BadRequest(format!("Upload the file again: \"{unknown}\" is unknown or expired.")))?;
    Ok(files.into_iter().map(|file| Attachment { source: app.uploads.path(&file.file_token), name: file.name, size: file.size }).collect())
}

/// What the caller gets of what came of a run.
pub fn render(came: Result<Outcome, NoRun>) -> Final {
    let Outcome { ending, stderr, duration } = match came {
        Ok(outcome) => outcome,
        Err(error) => return ApiError::from(error).into_final(),
    };
    let duration_ms = clock::millis(duration);
    let failed =
        |status: StatusCode, stop_reason, error| work::json(status, &RunFailure { ok: false, error, stderr, duration_ms, stop_reason });
    match ending {
        Ending::Replied { text, stop_reason } => {
            work::json(StatusCode::OK, &RunReply { ok: true, result: Reply::read(text), duration_ms, stop_reason })
        }
        Ending::Failed(error) => failed(StatusCode::BAD_GATEWAY, "error", error),
        Ending::TimedOut(error) => failed(StatusCode::BAD_GATEWAY, "timeout", error),
        Ending::Cancelled => failed(StatusCode::BAD_GATEWAY, "cancelled", "the run was cancelled".to_owned()),
        Ending::Interrupted => {
            failed(StatusCode::BAD_GATEWAY, "error", "the server stopped before the answer; send the prompt again".to_owned())
        }
        Ending::NotInstalled(program) => {
            let error = format!(
                "the claude CLI is not installed on the server (looked for \"{}\"); install it with \"npm install -g @anthropic-ai/claude-code\", or set CLAWDFORGE_CLAUDE_BIN",
                program.display()
            );
            failed(StatusCode::SERVICE_UNAVAILABLE, "error", error)
        }
        Ending::Unprepared(error) if is_expired(&error) => {
            ApiError::BadRequest("Upload the files again: one of them expired while the run waited.".to_owned()).into_final()
        }
        Ending::Unprepared(error) => ApiError::Disk(error).into_final(),
    }
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(run))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn models_match_the_documented_pattern() {
        for good in ["sonnet", "opus[1m]", "claude-3.5@20240620", "us.anthropic/x:1", "A", &"a".repeat(128)] {
            assert!(is_model(good), "{good}");
        }
        for bad in ["", "-p", "--model", "a b", "[x", ".a", "ü", "a\n", &"a".repeat(129)] {
            assert!(!is_model(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_model_is_never_an_option(model in "[-a-z.\\[\\]/ ]{0,6}") {
            prop_assert!(!is_model(&model) || !model.starts_with('-') && !model.contains(' '));
        }
    }
}
