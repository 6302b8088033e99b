//! What refusals look like in the words of each vendor, so that its libraries raise the errors that their users catch.

use std::fmt::Display;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::agent::contract::{Ending, Outcome, Unprepared};
use crate::api::error::ApiError;
use crate::job::feed_format::End;
use crate::job::rejection::Rejection;

/// Whose API is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::api) enum Vendor {
    OpenAi,
    Anthropic,
}

const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Whether the vendors' libraries are to send the request again by themselves.
const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Bytes of a problem, at most.
const MAX_PROBLEM: usize = 1 << 20;

/// Why a request has no answer.
#[derive(Debug)]
pub(in crate::api) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The parameter that is wrong, as a path with dots.
    pub(super) param: Option<String>,
    pub(super) code: Option<&'static str>,
    /// Whether it was begun, so that it must not be sent again unasked.
    pub(super) begun: bool,
    /// What else an error of Anthropic's says.
    pub(super) details: Option<Value>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, begun: false, details: None }
    }

    /// A wrong parameter.
    pub(super) fn wrong(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// What came of a job, where that is no answer.
    pub(super) fn of(end: &End) -> Result<&Outcome, Self> {
        match end {
            End::Settled { outcome, .. } => match Self::of_outcome(outcome) {
                None => Ok(outcome),
                Some(refusal) => Err(refusal),
            },
            End::Rejected(Rejection::Cancelled) => {
                Err(Self { begun: true, ..Self::new(StatusCode::CONFLICT, "The request was cancelled.") })
            }
            End::Rejected(why) => Err(ApiError::from(why.clone()).into()),
            End::Sent { .. } => Err(Self::new(StatusCode::GONE, "The answer was kept by an earlier release.")),
        }
    }

    fn of_outcome(Outcome { ending, api_status, .. }: &Outcome) -> Option<Self> {
        let begun = |status, message: String| Some(Self { begun: true, ..Self::new(status, message) });
        match ending {
            Ending::Completed(_) => None,
            Ending::Failed(error) => match api_status.and_then(|status| StatusCode::from_u16(status).ok()) {
                // The caller's own token is good.
                Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => begun(
                    StatusCode::BAD_GATEWAY,
                    format!("The server's own sign-in was refused ({error}); ask its operator to sign in again."),
                ),
                Some(status) if status.is_client_error() || matches!(status.as_u16(), 503 | 529) => begun(status, error.clone()),
                _ => begun(StatusCode::BAD_GATEWAY, error.clone()),
            },
            Ending::TimedOut(error) => begun(StatusCode::GATEWAY_TIMEOUT, error.clone()),
            Ending::Cancelled => begun(StatusCode::CONFLICT, "The request was cancelled.".to_owned()),
            Ending::Interrupted => {
                begun(StatusCode::SERVICE_UNAVAILABLE, "The server stopped before the answer; send the request again.".to_owned())
            }
            Ending::Lost(worker) => {
                begun(StatusCode::SERVICE_UNAVAILABLE, format!("The machine {worker} was lost before the answer; send the request again."))
            }
            Ending::NotInstalled(program) => {
                let message =
                    format!("The claude CLI is not installed on the server (looked for \"{program}\"); ask its operator to install it.");
                begun(StatusCode::SERVICE_UNAVAILABLE, message)
            }
            Ending::Unprepared(Unprepared::DiskFull) => Some(ApiError::from(Rejection::DiskFull).into()),
            Ending::Unprepared(_) => Some(ApiError::from(Rejection::Disk).into()),
        }
    }

    /// The error as its vendor's libraries read it.
    pub(super) fn body(&self, vendor: Vendor, request_id: &str) -> Value {
        let Self { status, message, param, code, details, .. } = self;
        let kind = kind(vendor, *status);
        match vendor {
            Vendor::OpenAi => json!({"error": {"message": message, "type": kind, "param": param, "code": code}}),
            Vendor::Anthropic => {
                let message = param.as_ref().map_or_else(|| message.clone(), |param| format!("{param}: {message}"));
                let mut error = json!({"type": kind, "message": message});
                if let Some(details) = details {
                    error["details"] = details.clone();
                }
                json!({"type": "error", "error": error, "request_id": request_id})
            }
        }
    }

    /// As an answer to a request of that id.
    pub(super) fn into_response(self, vendor: Vendor, id: impl Display) -> Response {
        let request_id = &request_id(id);
        let status = match vendor {
            // No library of theirs knows it.
            Vendor::OpenAi if self.status.as_u16() == 529 => StatusCode::SERVICE_UNAVAILABLE,
            _ => self.status,
        };
        let mut response = (status, axum::Json(self.body(vendor, request_id))).into_response();
        if self.begun {
            response.headers_mut().insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        name(response.headers_mut(), request_id);
        response
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        let (status, message) = error.status_and_detail();
        Self::new(status, message)
    }
}

/// What kind of error a status is.
fn kind(vendor: Vendor, status: StatusCode) -> &'static str {
    match (status.as_u16(), vendor) {
        (401, _) => "authentication_error",
        (403, _) => "permission_error",
        (404, _) => "not_found_error",
        (413, Vendor::Anthropic) => "request_too_large",
        (429, _) => "rate_limit_error",
        (503 | 529, Vendor::Anthropic) => "overloaded_error",
        (504, Vendor::Anthropic) => "timeout_error",
        (500.., Vendor::Anthropic) => "api_error",
        (500.., Vendor::OpenAi) => "server_error",
        _ => "invalid_request_error",
    }
}

/// What a request is called, in the form of either vendor's.
pub(super) fn request_id(id: impl Display) -> String {
    format!("req_{id}")
}

/// Names a request by the headers that libraries look for.
pub(super) fn name(headers: &mut HeaderMap, request_id: &str) {
    if let Ok(id) = HeaderValue::from_str(request_id) {
        headers.insert(REQUEST_ID, id.clone());
        headers.insert(X_REQUEST_ID, id);
    }
}

/// Says problems under `/v1` in the vendor's words, whatever part of the server they come from.
pub async fn translate(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !path.starts_with("/v1/") {
        return next.run(request).await;
    }
    let either = path.starts_with("/v1/models");
    let of_anthropic = path.starts_with("/v1/messages") || (either && request.headers().contains_key("anthropic-version"));
    let vendor = if of_anthropic { Vendor::Anthropic } else { Vendor::OpenAi };
    let response = next.run(request).await;
    if response.headers().get(header::CONTENT_TYPE).is_none_or(|kind| kind != "application/problem+json") {
        return response;
    }
    let (parts, body) = response.into_parts();
    let problem = to_bytes(body, MAX_PROBLEM).await.unwrap_or_default();
    let refusal = problem_of(parts.status, &problem);
    let spent = refusal.status == StatusCode::TOO_MANY_REQUESTS;
    let mut translated = refusal.into_response(vendor, Uuid::now_v7().simple());
    let headers = translated.headers_mut();
    for (name, value) in &parts.headers {
        if !matches!(*name, header::CONTENT_TYPE | header::CONTENT_LENGTH) {
            headers.insert(name, value.clone());
        }
    }
    if spent {
        // Libraries wait as long as they are told, here until midnight.
        headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    translated.map(Body::new)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Problem {
    detail: String,
    errors: Vec<ProblemField>,
}

#[derive(Deserialize)]
struct ProblemField {
    pointer: String,
    detail: String,
}

fn problem_of(status: StatusCode, problem: &[u8]) -> Refusal {
    let Problem { detail, errors } = serde_json::from_slice(problem).unwrap_or_default();
    // Neither vendor knows 422.
    let status = if status == StatusCode::UNPROCESSABLE_ENTITY { StatusCode::BAD_REQUEST } else { status };
    let code = (status == StatusCode::TOO_MANY_REQUESTS).then_some("insufficient_quota");
    match errors.into_iter().next() {
        Some(ProblemField { pointer, detail }) => {
            let param = pointer.trim_start_matches('/').replace('/', ".");
            Refusal { param: Some(param).filter(|param| !param.is_empty()), code, ..Refusal::new(status, detail) }
        }
        None => Refusal { code, ..Refusal::new(status, detail) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ending_is_the_status_that_libraries_act_upon() {
        let failed = |api_status| Outcome { api_status, ..Outcome::of(Ending::Failed("no".to_owned())) };
        for (outcome, status, for_openai) in [
            // The server's own sign-in, not the caller's.
            (failed(Some(401)), 502, 502),
            (failed(Some(403)), 502, 502),
            (failed(Some(429)), 429, 429),
            (failed(Some(529)), 529, 503),
            (failed(Some(400)), 400, 400),
            (failed(Some(500)), 502, 502),
            (failed(None), 502, 502),
            (Outcome::of(Ending::TimedOut("late".to_owned())), 504, 504),
            (Outcome::of(Ending::Cancelled), 409, 409),
            (Outcome::of(Ending::Interrupted), 503, 503),
            (Outcome::of(Ending::NotInstalled("claude".to_owned())), 503, 503),
            (Outcome::of(Ending::Unprepared(Unprepared::DiskFull)), 503, 503),
        ] {
            let refusal = || Refusal::of_outcome(&outcome).unwrap();
            assert_eq!(refusal().into_response(Vendor::Anthropic, 1).status().as_u16(), status, "{outcome:?}");
            let response = refusal().into_response(Vendor::OpenAi, 1);
            assert_eq!(response.status().as_u16(), for_openai, "{outcome:?}");
            // What the model may have begun costs again.
            let began = !matches!(outcome.ending, Ending::Unprepared(_));
            assert_eq!(response.headers().get(X_SHOULD_RETRY).is_some_and(|retry| retry == "false"), began, "{outcome:?}");
        }
        assert!(Refusal::of_outcome(&Outcome::of(Ending::Completed("end_turn".to_owned()))).is_none());
    }
}
