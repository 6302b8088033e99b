//! `GET /healthz`: whether the server is well, for anyone on an allowed address.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::agent::programs::Known;
use crate::app::{App, OtherAgent};

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
    /// The other agents that sessions may name, where there are any that the server knows.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(required = false)]
    agents: BTreeMap<&'static str, AgentHealth>,
    /// Other machines, where work can go there.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    cluster: Option<ClusterHealth>,
}

#[derive(Serialize, ToSchema)]
struct ClusterHealth {
    /// Whether NATS is connected. Where it is not, the server carries out what it can itself.
    connected: bool,
    /// How many machines are there.
    workers: usize,
}

#[derive(Serialize, ToSchema)]
struct AgentHealth {
    present: bool,
    /// Null where the CLI is absent or does not answer.
    #[schema(required)]
    version: Option<String>,
    /// Whether this release was tested with that version.
    tested: bool,
    /// Whether there is a sign-in, as far as that can be seen.
    signed_in: bool,
}

/// Whether the server is well
#[utoipa::path(get, path = "/healthz", tag = "health", responses(
    (status = OK, body = Health),
    (status = FORBIDDEN, body = super::error::Problem, content_type = "application/problem+json", description = "The address is not allowed"),
))]
async fn healthz(State(app): State<Arc<App>>) -> Json<Health> {
    let (claude, acpx) = (app.claude.known(), app.acpx.known());
    let agents = app.others.iter().map(|OtherAgent { kind, cli, environment }| {
        let Known { present, version, tested } = cli.known();
        (kind.name, AgentHealth { present, version, tested, signed_in: kind.is_signed_in(environment) })
    });
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
        agents: agents.collect(),
        cluster: app
            .elsewhere
            .as_ref()
            .map(|elsewhere| ClusterHealth { connected: elsewhere.is_connected(), workers: elsewhere.names().len() }),
    })
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(healthz))
}
