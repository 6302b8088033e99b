//! `/admin/workers`: the machines that carry out work, for the operator.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Operator;
use super::error::{ApiError, Problem};
use crate::app::App;
use crate::cluster::elsewhere::Elsewhere;
use crate::ledger::WorkerRow;

/// A machine that carries out work.
#[derive(Serialize, ToSchema)]
struct WorkerState {
    #[schema(example = "attic")]
    name: String,
    /// Whether it is there.
    here: bool,
    /// The release that it runs.
    version: String,
    /// Runs that it may have at once.
    places: u32,
    /// Runs that went on there when it was heard of last.
    runs: u32,
    /// Turns that did.
    turns: u32,
    /// Open sessions that live there.
    sessions: u32,
    /// By how many milliseconds its clock is ahead of the server's.
    clock_ms: i64,
    /// Unix seconds of its start.
    started_at: i64,
    /// Unix seconds at which it was heard of last.
    seen_at: i64,
}

#[derive(Serialize, ToSchema)]
struct WorkerList {
    workers: Vec<WorkerState>,
    count: usize,
    /// Whether NATS is connected; null where the server has no other machines.
    #[schema(required)]
    connected: Option<bool>,
}

#[derive(Serialize, ToSchema)]
struct WorkerForgotten {
    ok: bool,
    name: String,
    /// How many sessions were closed.
    sessions_closed: usize,
}

/// The machines, and whether each is there.
pub(crate) async fn known(app: &App) -> Result<Vec<(WorkerRow, bool)>, ApiError> {
    let there = app.elsewhere.as_ref().map(Elsewhere::names).unwrap_or_default();
    let known = app.ledger.workers().await?.into_iter();
    Ok(known.map(|worker| (worker.clone(), there.contains(&worker.name))).collect())
}

/// List the machines that carry out work
#[utoipa::path(get, path = "/admin/workers", operation_id = "list_workers", tag = "admin", security(("operator" = [])), responses(
    (status = OK, body = WorkerList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn list(State(app): State<Arc<App>>, _: Operator) -> Result<Json<WorkerList>, ApiError> {
    let state = |(worker, here): (WorkerRow, bool)| {
        let WorkerRow { name, version, places, runs, turns, sessions, clock_ms, started_at, seen_at } = worker;
        WorkerState { name, here, version, places, runs, turns, sessions, clock_ms, started_at, seen_at }
    };
    let workers: Vec<_> = known(&app).await?.into_iter().map(state).collect();
    let connected = app.elsewhere.as_ref().map(Elsewhere::is_connected);
    Ok(Json(WorkerList { count: workers.len(), workers, connected }))
}

/// Forget a machine that does not come back
///
/// Its sessions are closed. One that is there can't be forgotten.
#[utoipa::path(delete, path = "/admin/workers/{name}", operation_id = "forget_worker", tag = "admin", security(("operator" = [])), params(("name" = String, Path)), responses(
    (status = OK, body = WorkerForgotten),
    (status = NOT_FOUND, body = Problem, content_type = "application/problem+json", description = "No machine has that name"),
    (status = CONFLICT, body = Problem, content_type = "application/problem+json", description = "The machine is there"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn forget(
    State(app): State<Arc<App>>,
    _: Operator,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<WorkerForgotten>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::NotFound)?;
    if app.elsewhere.as_ref().is_some_and(|elsewhere| elsewhere.names().contains(&name)) {
        return Err(ApiError::WorkerThere);
    }
    let sessions_closed = app.ledger.forget_worker(&name).await?.ok_or(ApiError::NotFound)?;
    app.sessions.close_forgotten(&name).await?;
    tracing::info!(name, sessions_closed, "machine forgotten");
    Ok(Json(WorkerForgotten { ok: true, name, sessions_closed }))
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(forget))
}
