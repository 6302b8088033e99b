//! What refusals look like: one enum, mapped to HTTP in one place, as RFC 9457 problems.

use std::any::Any;
use std::io::{self, ErrorKind};

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::answer::Answer;
use crate::agent::kinds;
use crate::executor::Unmade;
use crate::job::rejection::Rejection;
use crate::ledger::{self, NameTaken};
use crate::schema::Wrong;
use crate::session;
use crate::uploads;

const DISK_FULL: &str = "The server's disk is full; ask its operator to free some space, then try again.";

/// An error, as RFC 9457 has it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`: the status says what kind of problem it is.
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: &'static str,
    /// The status in words.
    title: &'static str,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// One sentence that says what to do.
    detail: String,
    /// Where in the body the errors are; only with status 422.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    errors: Vec<FieldError>,
}

/// One error in a body.
#[derive(Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// A JSON pointer (RFC 6901).
    #[schema(example = "/timeout_secs")]
    pub pointer: String,
    /// What is wrong there.
    pub detail: String,
}

impl FieldError {
    /// An error at a place in the body.
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), detail: detail.into() }
    }
}

/// Everything that a request can be refused for.
#[derive(Debug)]
pub enum ApiError {
    /// No credential, an unknown one, or a revoked one.
    Unauthorized,
    /// A known credential of the wrong kind or from the wrong place.
    Forbidden(&'static str),
    /// Nothing there, or nothing that the caller may know of.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The request makes no sense.
    BadRequest(String),
    /// The body makes no sense as what it should be.
    Invalid(Vec<FieldError>),
    /// The body is of another type than this one.
    WrongType(&'static str),
    /// The body is larger than so many bytes.
    TooLarge(u64),
    /// The session's files would have more bytes than these.
    SessionTooLarge(u64),
    /// The body came too slowly.
    TooSlow,
    /// The session is closed.
    Gone,
    /// It was cancelled before it began.
    Cancelled,
    /// The agent's question has another answer already.
    AnsweredOtherwise,
    /// The agent's question is over.
    QuestionOver,
    /// As many sessions are open as may be.
    SessionsFull,
    /// acpx did not do its part.
    Acpx(String),
    /// The acpx CLI is not there.
    AcpxMissing(String),
    /// A token of that name is in use.
    NameTaken(NameTaken),
    /// The machine that the session lives on is away.
    Away(String),
    /// No machine is there that could do it.
    Nowhere,
    /// The machine is there, so it can't be forgotten.
    WorkerThere,
    /// Too much to do.
    Busy,
    /// The app has spent what it may today.
    Spent,
    /// What the app's token lets its agents reach of the network can't be kept to.
    Unbound(String),
    /// The key stands for another request.
    OtherRequest,
    /// The server is stopping.
    Stopping,
    /// The ledger failed.
    Ledger(ledger::Error),
    /// The disk failed.
    Disk(io::Error),
    /// The disk or the ledger failed, which was logged where it was seen.
    Rejected(Rejection),
    /// A defect; logged where it was seen.
    Defect,
}

impl From<ledger::Error> for ApiError {
    fn from(error: ledger::Error) -> Self {
        Self::Ledger(error)
    }
}

impl From<io::Error> for ApiError {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl From<uploads::Error> for ApiError {
    fn from(error: uploads::Error) -> Self {
        match error {
            uploads::Error::Disk(error) => Self::Disk(error),
            uploads::Error::Ledger(error) => Self::Ledger(error),
        }
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Full => Self::Busy,
            Rejection::Spent => Self::Spent,
            Rejection::Stopping => Self::Stopping,
            Rejection::Cancelled => Self::Cancelled,
            Rejection::SessionClosed => Self::Gone,
            Rejection::TooMuchAttached(most) => Self::SessionTooLarge(most),
            Rejection::Unreadable => Self::Acpx(rejection.to_string()),
            Rejection::Defect => Self::Defect,
            Rejection::Away(worker) => Self::Away(worker),
            Rejection::Nowhere => Self::Nowhere,
            Rejection::LedgerLocked | Rejection::LedgerFull | Rejection::DiskFull | Rejection::Disk => Self::Rejected(rejection),
        }
    }
}

impl From<Wrong> for ApiError {
    fn from(wrong: Wrong) -> Self {
        match wrong {
            Wrong::Unchecked(_) => Self::Busy,
            Wrong::Schema(why) | Wrong::Reply(why) => Self::Invalid(vec![FieldError::new("/schema", why)]),
        }
    }
}

impl From<session::Error> for ApiError {
    fn from(error: session::Error) -> Self {
        match error {
            session::Error::Full => Self::SessionsFull,
            session::Error::Stopping => Self::Stopping,
            session::Error::Unmade(Unmade::NotInstalled(program)) => Self::AcpxMissing(program),
            session::Error::Unmade(Unmade::Failed(error)) => Self::Acpx(error),
            session::Error::Unmade(Unmade::Away(worker)) => Self::Away(worker),
            session::Error::Unmade(Unmade::Nowhere) => Self::Nowhere,
            session::Error::Unmade(Unmade::DiskFull) => Self::Rejected(Rejection::DiskFull),
            session::Error::Unmade(Unmade::Disk(error)) => Self::Disk(io::Error::other(error)),
            session::Error::Ledger(error) => Self::Ledger(error),
            session::Error::Disk(error) => Self::Disk(error),
            session::Error::Defect => Self::Defect,
        }
    }
}

impl ApiError {
    pub(crate) fn status_and_detail(&self) -> (StatusCode, String) {
        let (status, detail) = match self {
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "Send a valid token as \"Authorization: Bearer …\"."),
            Self::Forbidden(detail) => (StatusCode::FORBIDDEN, *detail),
            Self::NotFound => (StatusCode::NOT_FOUND, "There is nothing here; check the path and the id."),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "Use one of the methods that the Allow header names."),
            Self::BadRequest(detail) => return (StatusCode::BAD_REQUEST, detail.clone()),
            Self::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "Correct what \"errors\" lists."),
            Self::WrongType(wanted) => return (StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("Send the body as {wanted}.")),
            Self::TooLarge(limit) => return (StatusCode::PAYLOAD_TOO_LARGE, format!("Send at most {limit} bytes.")),
            Self::SessionTooLarge(limit) => {
                let detail = format!("Attach less, or create another session: the files of one may have {limit} bytes together.");
                return (StatusCode::PAYLOAD_TOO_LARGE, detail);
            }
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, "Send the body faster; it stalled for too long."),
            Self::Cancelled => (StatusCode::CONFLICT, "The turn was cancelled before it began; send it again if it is still wanted."),
            Self::Gone => (StatusCode::GONE, "The session is closed; create another one."),
            Self::AnsweredOtherwise => (StatusCode::CONFLICT, "The question was answered otherwise before, and that answer holds."),
            Self::QuestionOver => {
                (StatusCode::GONE, "The question is over: nobody answered it in time, or the agent does not wait for it any more.")
            }
            Self::SessionsFull => (StatusCode::SERVICE_UNAVAILABLE, "As many sessions are open as may be; close one, or try again later."),
            Self::Acpx(error) => {
                return (
                    StatusCode::BAD_GATEWAY,
                    format!("The agent's client failed ({error}); try again, or ask the operator to run \"clawdforge doctor\"."),
                );
            }
            Self::AcpxMissing(program) => {
                let kind = kinds::with_program(program);
                let packages = kind.map_or("acpx @agentclientprotocol/claude-agent-acp", |kind| kind.package);
                let detail = format!(
                    "What speaks to the session's agent is not installed on the server (looked for \"{program}\"); install it with \"npm install -g {packages}\"."
                );
                return (StatusCode::SERVICE_UNAVAILABLE, detail);
            }
            Self::NameTaken(taken) => return (StatusCode::CONFLICT, sentence(taken)),
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "The server is busy and its queue is full; try again later."),
            Self::Away(worker) => {
                let detail = format!("The session lives on the machine {worker}, which is away; try again when it is back.");
                return (StatusCode::SERVICE_UNAVAILABLE, detail);
            }
            Self::Nowhere => {
                (StatusCode::SERVICE_UNAVAILABLE, "No machine is there that could do it; try again later, or ask the operator.")
            }
            Self::WorkerThere => (StatusCode::CONFLICT, "The machine is there; stop it first, if it is not to come back."),
            Self::OtherRequest => {
                (StatusCode::UNPROCESSABLE_ENTITY, "This Idempotency-Key was used for another request; take a new key for each.")
            }
            Self::Spent => (
                StatusCode::TOO_MANY_REQUESTS,
                "This app has spent what it may in a day; try again after midnight UTC, or ask the server's operator.",
            ),
            Self::Unbound(why) => {
                let detail = format!(
                    "This app's token bounds what its agents reach of the network, which can't be kept to here: {why}. Ask the server's operator."
                );
                return (StatusCode::SERVICE_UNAVAILABLE, detail);
            }
            Self::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "The server is stopping; try again when it is back."),
            Self::Ledger(error @ (ledger::Error::Locked | ledger::Error::Full(_))) => {
                return (StatusCode::SERVICE_UNAVAILABLE, sentence(error));
            }
            Self::Rejected(why @ (Rejection::LedgerLocked | Rejection::LedgerFull)) => {
                return (StatusCode::SERVICE_UNAVAILABLE, sentence(why));
            }
            Self::Rejected(Rejection::DiskFull) => (StatusCode::SERVICE_UNAVAILABLE, DISK_FULL),
            Self::Disk(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                (StatusCode::SERVICE_UNAVAILABLE, DISK_FULL)
            }
            Self::Ledger(_) | Self::Disk(_) | Self::Rejected(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "The server can't use its data folder; its operator finds the cause in its log.")
            }
            Self::Defect => (StatusCode::INTERNAL_SERVER_ERROR, "The server met a defect; its operator finds it in its log."),
        };
        (status, detail.to_owned())
    }
}

/// An error's text as a sentence.
fn sentence(error: &impl std::error::Error) -> String {
    let text = error.to_string();
    let mut rest = text.chars();
    let first: String = rest.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", rest.as_str())
}

impl ApiError {
    /// The cause goes to the log, once, and never to the caller.
    pub(crate) fn log_cause(&self) {
        match self {
            Self::Ledger(error) => tracing::error!(error = ?error, "the ledger failed"),
            Self::Disk(error) => tracing::error!(%error, "the disk failed"),
            _ => {}
        }
    }

    /// The problem, as it is sent and kept.
    pub fn into_answer(self) -> Answer {
        let (status, detail) = self.status_and_detail();
        self.log_cause();
        let errors = if let Self::Invalid(errors) = self { errors } else { Vec::new() };
        let title = status.canonical_reason().unwrap_or("Error");
        let problem = Problem { kind: "about:blank", title, status: status.as_u16(), detail, errors };
        let body = serde_json::to_vec(&problem).expect("a problem is JSON").into();
        Answer { status, problem: true, body }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.into_answer().into_response()
    }
}

/// The answer where a handler panicked.
pub fn panicked(panic: Box<dyn Any + Send>) -> Response {
    drop(panic); // The panic hook has logged it, with its place.
    ApiError::Defect.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::header;
    use axum::routing::get;
    use tower::ServiceExt;
    use tower_http::catch_panic::CatchPanicLayer;

    async fn defect() {
        panic!("the cause");
    }

    #[tokio::test]
    async fn a_panic_is_a_500_that_tells_nothing_of_it() {
        let app: axum::Router = axum::Router::new().route("/", get(defect)).layer(CatchPanicLayer::custom(panicked));
        let answer = app.oneshot(axum::http::Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(answer.headers()[header::CONTENT_TYPE], "application/problem+json");
        let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
        assert!(!String::from_utf8_lossy(&body).contains("the cause"));
    }
}
