//! What the caller gets in the end.

use axum::body::Bytes;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::clock;

/// Seconds after which a caller that was turned away may try again.
const RETRY_AFTER: &str = "5";

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: StatusCode,
    /// Whether the body is a problem as RFC 9457 has it.
    pub problem: bool,
    /// JSON.
    pub body: Bytes,
}

impl Answer {
    /// One that is no problem.
    pub fn json(status: StatusCode, body: &impl Serialize) -> Self {
        Self { status, problem: false, body: serde_json::to_vec(body).expect("answers are JSON").into() }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let status = self.status;
        let content_type = if self.problem { "application/problem+json" } else { "application/json" };
        let mut response = (status, [(header::CONTENT_TYPE, content_type)], self.body).into_response();
        let headers = response.headers_mut();
        match status {
            StatusCode::UNAUTHORIZED => drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            StatusCode::TOO_MANY_REQUESTS => drop(headers.insert(header::RETRY_AFTER, clock::until_midnight().into())),
            StatusCode::SERVICE_UNAVAILABLE if self.problem => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
            }
            _ => {}
        }
        response
    }
}
