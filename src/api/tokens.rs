//! `/admin/tokens`: the operator mints, lists and revokes the apps' tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Operator;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use crate::agent::contract::{Network, Rules};
use crate::app::App;
use crate::ledger::{Limits, TokenRow};
use crate::network::Networks;
use crate::secret::{self, TokenHash};

#[derive(Deserialize, ToSchema)]
struct NewToken {
    /// What the app's records are filed under.
    #[serde(default)]
    #[schema(required, pattern = "^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    name: String,
    /// Where the token may be used from; none means anywhere that the server answers.
    #[schema(example = json!(["172.24.0.0/16"]))]
    ip_cidrs: Option<Vec<String>>,
    /// Runs and turns that the app may have at once; further ones wait. No limit by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 1, maximum = 1_000_000)]
    max_concurrent: Option<i64>,
    /// US dollars a day (UTC) after which its runs and turns are refused with 429. No limit by default.
    #[schema(minimum = 0, example = 2.5)]
    daily_usd: Option<f64>,
    /// What its agents reach of the network: all that the server does (`open`), the web outside private networks (`web`: ports 80 and 443), or
    /// the models' APIs alone (`model`). Needs a machine that can keep to it; `open` by default.
    #[schema(example = "web")]
    network: Option<String>,
    /// What lasts from one run to the next: nothing (`fresh`), or the folder in which claude keeps memories (`kept`); `fresh` by default.
    #[schema(example = "fresh")]
    home: Option<String>,
}

impl NewToken {
    fn network(&self) -> Option<Network> {
        self.network.as_deref().map_or(Some(Network::Open), Network::named)
    }

    fn rules(&self) -> Rules {
        Rules::new(self.network().unwrap_or_default(), self.home.as_deref().unwrap_or_default(), &self.name)
    }

    fn limits(&self) -> Limits {
        Limits { max_concurrent: self.max_concurrent.and_then(|most| u32::try_from(most).ok()), daily_usd: self.daily_usd }
    }
}

impl Validate for NewToken {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if !secret::is_token_name(&self.name) {
            errors.push(FieldError::new("/name", secret::TOKEN_NAME_RULE));
        }
        for (index, cidr) in self.ip_cidrs.iter().flatten().enumerate() {
            if let Err(error) = Networks::parse([cidr]) {
                errors.push(FieldError::new(format!("/ip_cidrs/{index}"), error.to_string()));
            }
        }
        if self.max_concurrent.is_some_and(|most| !(1..=1_000_000).contains(&most)) {
            errors.push(FieldError::new("/max_concurrent", "the runs and turns at once must be from 1 to 1000000"));
        }
        if self.daily_usd.is_some_and(|usd| usd < 0.0) {
            errors.push(FieldError::new("/daily_usd", "the dollars a day must not be negative"));
        }
        if self.network().is_none() {
            errors.push(FieldError::new("/network", "what its agents reach of the network is open, web or model"));
        }
        if self.home.as_deref().is_some_and(|home| !Rules::HOMES.contains(&home)) {
            errors.push(FieldError::new("/home", "what lasts from run to run is said by fresh or kept"));
        }
        errors
    }
}

#[derive(Serialize, ToSchema)]
struct MintedToken {
    name: String,
    /// Shown this once.
    #[schema(pattern = "^cf_[0-9a-f]{64}$")]
    token: String,
    ip_cidrs: Vec<String>,
    /// Unix seconds.
    created_at: i64,
}

#[derive(Serialize, ToSchema)]
struct TokenList {
    tokens: Vec<ListedToken>,
    count: usize,
}

#[derive(Serialize, ToSchema)]
struct ListedToken {
    name: String,
    /// Comma-joined.
    #[schema(example = "172.24.0.0/16,10.0.0.0/8")]
    ip_cidrs: String,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds.
    #[schema(required)]
    last_used: Option<i64>,
    /// False once it is revoked.
    enabled: bool,
    /// Runs and turns at once; null for no limit.
    #[schema(required)]
    max_concurrent: Option<u32>,
    /// US dollars a day (UTC); null for no limit.
    #[schema(required)]
    daily_usd: Option<f64>,
    /// `open`, `web` or `model`.
    network: &'static str,
    /// `fresh` or `kept`.
    home: &'static str,
}

impl From<TokenRow> for ListedToken {
    fn from(row: TokenRow) -> Self {
        let TokenRow { name, ip_cidrs, created_at, last_used, enabled, limits: Limits { max_concurrent, daily_usd }, rules } = row;
        let (network, home) = (rules.network.as_str(), rules.home());
        Self { name, ip_cidrs, created_at, last_used, enabled, max_concurrent, daily_usd, network, home }
    }
}

#[derive(Serialize, ToSchema)]
struct Revoked {
    ok: bool,
    name: String,
}

/// Mint a token
#[utoipa::path(post, path = "/admin/tokens", operation_id = "create_token", tag = "admin", security(("operator" = [])), request_body = NewToken, responses(
    (status = OK, body = MintedToken),
    (status = CONFLICT, body = Problem, content_type = "application/problem+json", description = "The name is in use"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn create(State(app): State<Arc<App>>, _: Operator, ValidJson(asked): ValidJson<NewToken>) -> Result<Json<MintedToken>, ApiError> {
    let networks = Networks::parse(asked.ip_cidrs.clone().unwrap_or_default()).map_err(|_| ApiError::Defect)?;
    let (token, limits, rules) = (secret::app_token(), asked.limits(), asked.rules());
    if let (Err(why), true) = (&app.network, rules.network != Network::Open) {
        return Err(ApiError::Invalid(vec![FieldError::new("/network", why.to_string())]));
    }
    let created = app.ledger.create_token(&asked.name, &TokenHash::of(&token), &networks, limits, &rules).await?;
    let created_at = created.map_err(ApiError::NameTaken)?;
    tracing::info!(name = asked.name, "token minted");
    Ok(Json(MintedToken { name: asked.name, token, ip_cidrs: networks.to_strings(), created_at }))
}

/// List the tokens
#[utoipa::path(get, path = "/admin/tokens", operation_id = "list_tokens", tag = "admin", security(("operator" = [])), responses(
    (status = OK, body = TokenList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn list(State(app): State<Arc<App>>, _: Operator) -> Result<Json<TokenList>, ApiError> {
    let tokens: Vec<_> = app.ledger.tokens().await?.into_iter().map(ListedToken::from).collect();
    Ok(Json(TokenList { count: tokens.len(), tokens }))
}

/// Revoke a token
#[utoipa::path(delete, path = "/admin/tokens/{name}", operation_id = "revoke_token", tag = "admin", security(("operator" = [])), params(("name" = String, Path)), responses(
    (status = OK, body = Revoked),
    (status = NOT_FOUND, body = Problem, content_type = "application/problem+json", description = "No token has that name"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn revoke(State(app): State<Arc<App>>, _: Operator, name: Result<Path<String>, PathRejection>) -> Result<Json<Revoked>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::NotFound)?;
    if !app.ledger.revoke_token(&name).await? {
        return Err(ApiError::NotFound);
    }
    tracing::info!(name, "token revoked");
    Ok(Json(Revoked { ok: true, name }))
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(revoke))
}
