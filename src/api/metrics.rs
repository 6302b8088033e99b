//! `GET /metrics`: what is counted, for Prometheus.

use std::sync::Arc;

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Address, Operator};
use super::error::{ApiError, Problem};
use crate::app::App;
use crate::metrics::METRICS;

/// Counts each answer, by the route and not by the path, which may hold anything.
pub async fn count(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    // A client can name any method.
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
    let method = known.iter().find(|known| *known == request.method()).map_or("other", Method::as_str).to_owned();
    let response = next.run(request).await;
    METRICS.answered(&method, &route, response.status().as_u16());
    response
}

/// See what is counted, in Prometheus' text format
///
/// For the operator's token, and without one from the addresses of `CLAWDFORGE_METRICS_CIDRS`.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", tag = "admin", security(("operator" = [])), responses(
    (status = OK, content((String = "text/plain"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn metrics(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (mut parts, _) = request.into_parts();
    let Address(address) = *parts.extensions.get().ok_or(ApiError::Defect)?;
    if !app.access.metrics.contain(address) {
        Operator::from_request_parts(&mut parts, &app).await?;
    }
    let text = METRICS.text(app.jobs.waiting(), app.sessions.open());
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response())
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(metrics))
}
