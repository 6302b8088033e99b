//! `GET /healthz`: whether the server is well, for anyone on an allowed address.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

#[derive(Serialize, ToSchema)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the contract's")]
struct Health {
    ok: bool,
    /// Of the server.
    version: &'static str,
    claude_present: bool,
    /// Null where the CLI is absent or does not answer.
    #[schema(required)]
    claude_version: Option<String>,
    acpx_present: bool,
    /// Null where the CLI is absent or does not answer.
    #[schema(required)]
    acpx_version: Option<String>,
    open_sessions: u32,
    /// What shuts agents out of the data folder: `landlock`, or `off`.
    sandbox: &'static str,
    /// Whether this release was tested with that version of claude; `clawdforge doctor` names the versions.
    claude_tested: bool,
}

/// Whether the server is well
#[utoipa::path(get, path = "/healthz", tag = "health", responses(
    (status = OK, body = Health),
    (status = FORBIDDEN, body = super::error::Problem, content_type = "application/problem+json", description = "The address is not allowed"),
))]
async fn healthz(State(app): State<Arc<App>>) -> Json<Health> {
    let (claude, acpx) = (app.claude.known(), app.acpx.known());
    Json(Health {
        ok: true,
        version: env!("CARGO_PKG_VERSION"),
        claude_present: claude.present,
        claude_version: claude.version,
        acpx_present: acpx.present,
        acpx_version: acpx.version,
        open_sessions: app.sessions.open(),
        sandbox: app.sandbox,
        claude_tested: claude.tested,
    })
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(healthz))
}
