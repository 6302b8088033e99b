//! `/runs`, `/usage` and the operator's views of them: what was run, and what it cost.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Caller, Operator};
use super::error::{ApiError, Problem};
use super::validate;
use super::view::ListedRun;
use crate::app::App;
use crate::clock;
use crate::ledger::{RunsWanted, Status, UsageRow};

/// Characters of prompts and results in a list.
const CHARACTERS: u32 = 200;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct RunsQuery {
    /// How many at most, from 1 to 200; 50 by default.
    #[param(value_type = Option<i64>, minimum = 1, maximum = 200)]
    limit: Option<String>,
    /// A run's id: only older ones.
    before: Option<String>,
    /// Only runs of this status.
    status: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct RunList {
    runs: Vec<ListedRun>,
    count: usize,
}

async fn list(app: &App, app_name: Option<String>, query: Result<Query<RunsQuery>, QueryRejection>) -> Result<Json<RunList>, ApiError> {
    let wrong = |what: &str| ApiError::BadRequest(format!("Set {what}, at most once."));
    let Query(RunsQuery { limit, before, status }) = query.map_err(|_| wrong("limit, before and status"))?;
    let limit = validate::limit(limit)?;
    let words = || Status::ALL.map(Status::as_str).join(", ");
    let status = status.map(|word| word.parse().map_err(|_| wrong(&format!("status to one of {}", words())))).transpose()?;
    let wanted = RunsWanted { app_name, before, status, limit, characters: CHARACTERS, ..RunsWanted::default() };
    let runs: Vec<_> = app.ledger.runs(wanted).await?.into_iter().map(ListedRun::from).collect();
    Ok(Json(RunList { count: runs.len(), runs }))
}

/// List one's runs, newest first
#[utoipa::path(get, path = "/runs", operation_id = "list_runs", tag = "runs", security(("app" = [])), params(RunsQuery), responses(
    (status = OK, body = RunList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn runs(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<RunsQuery>, QueryRejection>,
) -> Result<Json<RunList>, ApiError> {
    list(&app, Some(caller.app), query).await
}

/// List every app's runs, newest first
#[utoipa::path(get, path = "/admin/runs", operation_id = "list_all_runs", tag = "admin", security(("operator" = [])), params(RunsQuery), responses(
    (status = OK, body = RunList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn all_runs(
    State(app): State<Arc<App>>,
    _: Operator,
    query: Result<Query<RunsQuery>, QueryRejection>,
) -> Result<Json<RunList>, ApiError> {
    list(&app, None, query).await
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct UsageQuery {
    /// Unix seconds; 30 days ago by default.
    #[param(value_type = Option<i64>)]
    from: Option<String>,
    /// Unix seconds, not included; now by default.
    #[param(value_type = Option<i64>)]
    to: Option<String>,
}

/// What was used of a model on a day.
#[derive(Serialize, ToSchema)]
struct Usage {
    /// In UTC.
    #[schema(example = "2026-11-21")]
    day: String,
    app_name: String,
    /// Null for turns of sessions that named none.
    #[schema(required)]
    model: Option<String>,
    runs: i64,
    turns: i64,
    /// Those from the cache too.
    input_tokens: i64,
    output_tokens: i64,
    /// As the CLIs report them, at list price.
    cost_usd: f64,
}

impl From<UsageRow> for Usage {
    fn from(row: UsageRow) -> Self {
        let UsageRow { day, app_name, model, runs, turns, input_tokens, output_tokens, cost_usd } = row;
        Self { day, app_name, model: (!model.is_empty()).then_some(model), runs, turns, input_tokens, output_tokens, cost_usd }
    }
}

#[derive(Serialize, ToSchema)]
struct UsageList {
    /// Unix seconds.
    from: i64,
    /// Unix seconds.
    to: i64,
    usage: Vec<Usage>,
    cost_usd: f64,
}

async fn sum(app: &App, app_name: Option<String>, query: Result<Query<UsageQuery>, QueryRejection>) -> Result<Json<UsageList>, ApiError> {
    let wrong = || ApiError::BadRequest("Set from and to in Unix seconds, each at most once.".to_owned());
    let Query(query) = query.map_err(|_| wrong())?;
    let seconds = |value: Option<String>, default| value.map_or(Ok(default), |value| value.parse().map_err(|_| wrong()));
    let now = clock::now() + 1;
    let (from, to) = (seconds(query.from, now - 30 * clock::DAY)?, seconds(query.to, now)?);
    let usage: Vec<_> = app.ledger.usage(app_name, from, to).await?.into_iter().map(Usage::from).collect();
    // Not by sum(): that of nothing is -0.0.
    Ok(Json(UsageList { from, to, cost_usd: usage.iter().fold(0.0, |sum, usage| sum + usage.cost_usd), usage }))
}

/// See what one used, by day and model
#[utoipa::path(get, path = "/usage", operation_id = "usage", tag = "runs", security(("app" = [])), params(UsageQuery), responses(
    (status = OK, body = UsageList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn usage(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<UsageQuery>, QueryRejection>,
) -> Result<Json<UsageList>, ApiError> {
    sum(&app, Some(caller.app), query).await
}

/// See what every app used, by day and model
#[utoipa::path(get, path = "/admin/usage", operation_id = "all_usage", tag = "admin", security(("operator" = [])), params(UsageQuery), responses(
    (status = OK, body = UsageList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn all_usage(
    State(app): State<Arc<App>>,
    _: Operator,
    query: Result<Query<UsageQuery>, QueryRejection>,
) -> Result<Json<UsageList>, ApiError> {
    sum(&app, None, query).await
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(runs)).routes(routes!(all_runs)).routes(routes!(usage)).routes(routes!(all_usage))
}
