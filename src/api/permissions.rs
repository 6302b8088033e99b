//! `/sessions/{id}/permissions` and `/runs/{id}/permissions`: what agents ask before they act.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Caller;
use super::body::{ValidJson, Validate};
use super::error::{ApiError, FieldError, Problem};
use super::{runs, sessions};
use crate::agent::questions::{self, Answer, By, Choice, NotTaken, Pick, Question, Questions};
use crate::agent::turn::CLAUDE_AGENT;
use crate::app::App;

#[derive(Serialize, ToSchema)]
struct PermissionList {
    permissions: Vec<OpenPermission>,
    count: usize,
}

/// A question that nobody has answered yet.
#[derive(Serialize, ToSchema)]
struct OpenPermission {
    #[schema(pattern = "^[0-9a-f]{32}$")]
    permission_id: String,
    /// Unix seconds.
    asked_at: i64,
    /// Unix seconds at which it is refused.
    expires_at: i64,
    options: Vec<PermissionOption>,
    /// The agent's message, whole, as it stands in the stream.
    #[schema(value_type = BTreeMap<String, Value>)]
    request: Box<RawValue>,
}

#[derive(Serialize, ToSchema)]
struct PermissionOption {
    option_id: String,
    /// `allow_once`, `allow_always`, `reject_once` or `reject_always`.
    kind: String,
    /// What it says to people.
    name: String,
}

impl From<Question> for OpenPermission {
    fn from(question: Question) -> Self {
        let Question { permission_id, asked_at, expires_at, options, message, .. } = question;
        let option = |Choice { option_id, kind, name }| PermissionOption { option_id, kind, name };
        Self { permission_id, asked_at, expires_at, options: options.into_iter().map(option).collect(), request: message }
    }
}

/// Either an option or a decision.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
struct PermissionAnswer {
    /// One of the question's options.
    option_id: Option<String>,
    /// `allow` or `deny`: once, never for always.
    #[schema(pattern = "^(allow|deny)$")]
    decision: Option<String>,
    /// Of a run: what the tool gets instead of what it was to get, where it is allowed.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    updated_input: Option<Value>,
    /// Of a run: what the agent is told, where it is refused.
    message: Option<String>,
    /// What the agent wants to know, by the texts of its questions (a run) or by the fields of its form (a session).
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    answers: Option<Value>,
}

impl Validate for PermissionAnswer {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if self.option_id.is_some() == self.decision.is_some() {
            errors.push(FieldError::new("/option_id", "one of option_id and decision is needed"));
        }
        if self.decision.as_ref().is_some_and(|decision| !matches!(decision.as_str(), "allow" | "deny")) {
            errors.push(FieldError::new("/decision", "the decision must be allow or deny"));
        }
        for (pointer, value) in [("/updated_input", &self.updated_input), ("/answers", &self.answers)] {
            if value.as_ref().is_some_and(|value| !value.is_object()) {
                errors.push(FieldError::new(pointer, format!("{} must be a JSON object", &pointer[1..])));
            }
        }
        errors
    }
}

#[derive(Serialize, ToSchema)]
struct PermissionAnswered {
    ok: bool,
    permission_id: String,
    #[schema(required)]
    option_id: Option<String>,
    /// `client` or `operator`.
    by: String,
}

fn list(of: &[Questions]) -> Json<PermissionList> {
    let permissions: Vec<_> = of.iter().flat_map(Questions::open).map(OpenPermission::from).collect();
    Json(PermissionList { count: permissions.len(), permissions })
}

/// Answers a question of the run or session `owner`, among those that are at work, or says what became of it before.
async fn answer(
    app: &App,
    caller: &Caller,
    owner: &str,
    permission_id: String,
    of: &[Questions],
    asked: PermissionAnswer,
) -> Result<Json<PermissionAnswered>, ApiError> {
    let PermissionAnswer { option_id, decision, updated_input, message, answers } = asked;
    let pick = match (option_id, decision.as_deref()) {
        (Some(id), _) => Pick::Option(id),
        (None, Some("allow")) => Pick::Allow,
        (None, _) => Pick::Deny,
    };
    let given = Answer { option_id: None, updated_input, message, answers };
    let answered = |option_id, by: By| {
        Json(PermissionAnswered { ok: true, permission_id: permission_id.clone(), option_id, by: by.as_str().to_owned() })
    };
    for questions in of {
        match questions.answer(&permission_id, &pick, given.clone(), By::Client) {
            Ok(settled) => return Ok(answered(settled.answer.option_id, settled.by)),
            Err(NotTaken::Unknown) => {}
            Err(why) => return Err(not_taken(why)),
        }
    }
    let row = app.ledger.permission(&caller.app, owner, &permission_id).await?.ok_or(ApiError::NotFound)?;
    let same = row.answer == Answer { option_id: pick.among(&row.options), ..given };
    questions::again(row.by, same).map_err(not_taken)?;
    Ok(answered(row.answer.option_id, row.by))
}

fn not_taken(why: NotTaken) -> ApiError {
    match why {
        NotTaken::Unknown => ApiError::NotFound,
        NotTaken::NotOffered => ApiError::Invalid(vec![FieldError::new(
            "/option_id",
            "the question does not offer that; its options stand in the list of open permissions",
        )]),
        NotTaken::AnsweredOtherwise => ApiError::AnsweredOtherwise,
        NotTaken::Over => ApiError::QuestionOver,
    }
}

/// List what a session's agent asks
#[utoipa::path(get, path = "/sessions/{id}/permissions", operation_id = "list_session_permissions", tag = "permissions", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = PermissionList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn of_session(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<PermissionList>, ApiError> {
    let session = sessions::find(&app, &caller, id).await?;
    Ok(list(&app.jobs.questions_of_session(&session.new.session_id)))
}

/// Answer what a session's agent asks
///
/// The same answer can be sent again; another is a conflict.
#[utoipa::path(post, path = "/sessions/{id}/permissions/{permission_id}", operation_id = "answer_session_permission", tag = "permissions", security(("app" = [])),
    params(("id" = String, Path), ("permission_id" = String, Path)), request_body = PermissionAnswer, responses(
    (status = OK, body = PermissionAnswered),
    (status = CONFLICT, body = Problem, content_type = "application/problem+json", description = "It was answered otherwise"),
    (status = GONE, body = Problem, content_type = "application/problem+json", description = "It is over"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn answer_of_session(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: Result<Path<(String, String)>, PathRejection>,
    ValidJson(asked): ValidJson<PermissionAnswer>,
) -> Result<Json<PermissionAnswered>, ApiError> {
    let Path((id, permission_id)) = path.map_err(|_| ApiError::NotFound)?;
    let session = sessions::find(&app, &caller, Ok(Path(id))).await?;
    check_protocol(&asked)?;
    let session_id = &session.new.session_id;
    answer(&app, &caller, session_id, permission_id, &app.jobs.questions_of_session(session_id), asked).await
}

/// Refuses what the protocol of agents can't say: only claude can be told it, in a run.
fn check_protocol(asked: &PermissionAnswer) -> Result<(), ApiError> {
    let errors: Vec<_> = [("/updated_input", asked.updated_input.is_some()), ("/message", asked.message.is_some())]
        .into_iter()
        .filter(|(_, is_there)| *is_there)
        .map(|(pointer, _)| FieldError::new(pointer, "only the tools of a run by claude can be given it; leave it out"))
        .collect();
    if errors.is_empty() { Ok(()) } else { Err(ApiError::Invalid(errors)) }
}

/// List what a run's agent asks
#[utoipa::path(get, path = "/runs/{id}/permissions", operation_id = "list_run_permissions", tag = "permissions", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = PermissionList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn of_run(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<PermissionList>, ApiError> {
    let run = runs::find(&app, &caller, id).await?;
    Ok(list(&app.jobs.questions_of(&run.id)))
}

/// Answer what a run's agent asks
///
/// The same answer can be sent again; another is a conflict.
#[utoipa::path(post, path = "/runs/{id}/permissions/{permission_id}", operation_id = "answer_run_permission", tag = "permissions", security(("app" = [])),
    params(("id" = String, Path), ("permission_id" = String, Path)), request_body = PermissionAnswer, responses(
    (status = OK, body = PermissionAnswered),
    (status = CONFLICT, body = Problem, content_type = "application/problem+json", description = "It was answered otherwise"),
    (status = GONE, body = Problem, content_type = "application/problem+json", description = "It is over"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn answer_of_run(
    State(app): State<Arc<App>>,
    caller: Caller,
    path: Result<Path<(String, String)>, PathRejection>,
    ValidJson(asked): ValidJson<PermissionAnswer>,
) -> Result<Json<PermissionAnswered>, ApiError> {
    let Path((id, permission_id)) = path.map_err(|_| ApiError::NotFound)?;
    let run = runs::find(&app, &caller, Ok(Path(id))).await?;
    if run.agent.as_deref() != Some(CLAUDE_AGENT) {
        check_protocol(&asked)?;
    }
    answer(&app, &caller, &run.id.to_string(), permission_id, &app.jobs.questions_of(&run.id), asked).await
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(of_session))
        .routes(routes!(answer_of_session))
        .routes(routes!(of_run))
        .routes(routes!(answer_of_run))
}
