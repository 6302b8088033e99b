//! `/admin/tokens`: the operator mints, lists, changes, rotates and revokes the apps' tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Operator;
use super::body::{ValidJson, Validate, whole_number};
use super::error::{ApiError, FieldError, Problem};
use super::webhooks;
use crate::agent::contract::{Network, Rules};
use crate::app::App;
use crate::clock;
use crate::ledger::{Limits, TokenChange, TokenRow};
use crate::network::Networks;
use crate::secret::{self, TokenHash};

#[derive(Deserialize, ToSchema)]
pub(crate) struct NewToken {
    /// What the app's records are filed under.
    #[serde(default)]
    #[schema(required, pattern = "^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    pub(crate) name: String,
    /// Where the token may be used from; none means anywhere that the server answers.
    #[schema(example = json!(["172.24.0.0/16"]))]
    pub(crate) ip_cidrs: Option<Vec<String>>,
    /// Runs and turns that the app may have at once; further ones wait. No limit by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub(crate) max_concurrent: Option<i64>,
    /// US dollars a day (UTC) after which its runs and turns are refused with 429. No limit by default.
    #[schema(minimum = 0, example = 2.5)]
    pub(crate) daily_usd: Option<f64>,
    /// What its agents reach of the network: all that the server does (`open`), the web outside private networks (`web`: ports 80 and 443), or
    /// the models' APIs alone (`model`). Needs a machine that can keep to it; `open` by default.
    #[schema(example = "web")]
    pub(crate) network: Option<String>,
    /// What lasts from one run to the next: nothing (`fresh`), or the folder in which claude keeps memories (`kept`); `fresh` by default.
    #[schema(example = "fresh")]
    pub(crate) home: Option<String>,
    /// Who is told of the ends of its runs and turns in the background, of closed sessions, and of a spent budget. With it there is a
    /// `webhook_secret` in the answer.
    #[schema(example = "https://app.lan/hook")]
    pub(crate) webhook: Option<String>,
}

/// What is changed of a token: what is left out stays, and null is what a new token has that does not name it.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenPatch {
    /// Where the token may be used from; none means anywhere that the server answers.
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<Vec<String>>, example = json!(["172.24.0.0/16"]))]
    pub(crate) ip_cidrs: Option<Option<Vec<String>>>,
    /// Runs and turns that the app may have at once.
    #[serde(default, deserialize_with = "nullable_number")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 1_000_000)]
    pub(crate) max_concurrent: Option<Option<i64>>,
    /// US dollars a day (UTC).
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<f64>, minimum = 0, example = 2.5)]
    pub(crate) daily_usd: Option<Option<f64>>,
    /// `open`, `web` or `model`.
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<String>, example = "web")]
    pub(crate) network: Option<Option<String>>,
    /// `fresh` or `kept`.
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<String>, example = "fresh")]
    pub(crate) home: Option<Option<String>>,
    /// Who is told of what happens in the background. An app that has no secret yet gets one, which is in the answer.
    #[serde(default, deserialize_with = "nullable")]
    #[schema(value_type = Option<String>, example = "https://app.lan/hook")]
    pub(crate) webhook: Option<Option<String>>,
}

fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

fn nullable_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<i64>>, D::Error> {
    whole_number(deserializer).map(Some)
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Rotation {
    /// For how many seconds the old token is good, too; an hour by default.
    #[serde(default, deserialize_with = "whole_number")]
    #[schema(minimum = 0, maximum = 2_592_000)]
    grace_secs: Option<i64>,
}

/// How long the old token is good beside the new one, in seconds, where nothing else is said.
pub(crate) const GRACE: i64 = 3600;
const MOST_GRACE: i64 = 30 * clock::DAY;

fn network(name: Option<&str>) -> Option<Network> {
    name.map_or(Some(Network::Open), Network::named)
}

fn home(name: Option<&str>) -> Option<&'static str> {
    let name = name.unwrap_or(Rules::HOMES[0]);
    Rules::HOMES.into_iter().find(|home| *home == name)
}

fn at_most(max_concurrent: Option<i64>) -> Option<u32> {
    max_concurrent.and_then(|most| u32::try_from(most).ok())
}

impl NewToken {
    fn rules(&self) -> Rules {
        Rules::new(network(self.network.as_deref()).unwrap_or_default(), self.home.as_deref().unwrap_or_default(), &self.name)
    }
}

impl TokenPatch {
    fn change(&self) -> Result<TokenChange, ApiError> {
        let networks = self.ip_cidrs.as_ref().map(|cidrs| Networks::parse(cidrs.iter().flatten())).transpose();
        Ok(TokenChange {
            networks: networks.map_err(|_| ApiError::Defect)?,
            max_concurrent: self.max_concurrent.map(at_most),
            daily_usd: self.daily_usd,
            network: self.network.as_ref().and_then(|name| network(name.as_deref())),
            home: self.home.as_ref().and_then(|name| home(name.as_deref())),
            webhook: self.webhook.clone(),
        })
    }
}

/// What a token's owner may set.
fn check(
    cidrs: Option<&Vec<String>>,
    max_concurrent: Option<i64>,
    daily_usd: Option<f64>,
    reaches: Option<&str>,
    keeps: Option<&str>,
    errors: &mut Vec<FieldError>,
) {
    for (index, cidr) in cidrs.into_iter().flatten().enumerate() {
        if let Err(error) = Networks::parse([cidr]) {
            errors.push(FieldError::new(format!("/ip_cidrs/{index}"), error.to_string()));
        }
    }
    if max_concurrent.is_some_and(|most| !(1..=1_000_000).contains(&most)) {
        errors.push(FieldError::new("/max_concurrent", "the runs and turns at once must be from 1 to 1000000"));
    }
    if daily_usd.is_some_and(|usd| usd < 0.0) {
        errors.push(FieldError::new("/daily_usd", "the dollars a day must not be negative"));
    }
    if network(reaches).is_none() {
        errors.push(FieldError::new("/network", "what its agents reach of the network is open, web or model"));
    }
    if home(keeps).is_none() {
        errors.push(FieldError::new("/home", "what lasts from run to run is said by fresh or kept"));
    }
}

impl Validate for NewToken {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if !secret::is_token_name(&self.name) {
            errors.push(FieldError::new("/name", secret::TOKEN_NAME_RULE));
        }
        let Self { ip_cidrs, max_concurrent, daily_usd, network, home, .. } = self;
        check(ip_cidrs.as_ref(), *max_concurrent, *daily_usd, network.as_deref(), home.as_deref(), &mut errors);
        errors
    }
}

impl Validate for TokenPatch {
    fn errors(&self) -> Vec<FieldError> {
        let mut errors = Vec::new();
        let Self { ip_cidrs, max_concurrent, daily_usd, network, home, .. } = self;
        let (network, home) = (network.as_ref().and_then(Option::as_deref), home.as_ref().and_then(Option::as_deref));
        check(ip_cidrs.as_ref().and_then(Option::as_ref), max_concurrent.flatten(), daily_usd.flatten(), network, home, &mut errors);
        errors
    }
}

impl Validate for Rotation {
    fn errors(&self) -> Vec<FieldError> {
        let wrong = self.grace_secs.is_some_and(|secs| !(0..=MOST_GRACE).contains(&secs));
        let error = || FieldError::new("/grace_secs", "the seconds that the old token is good, too, must be from 0 to 2592000");
        wrong.then(error).into_iter().collect()
    }
}

#[derive(Serialize, ToSchema)]
pub(crate) struct MintedToken {
    name: String,
    /// Shown this once.
    #[schema(pattern = "^cf_[0-9a-f]{64}$")]
    pub(crate) token: String,
    ip_cidrs: Vec<String>,
    /// Unix seconds.
    created_at: i64,
    /// What its webhooks are signed with, where it has one; shown this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false, example = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")]
    pub(crate) webhook_secret: Option<String>,
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
    /// Unix seconds until which the token that it replaced is good, too, where it replaced one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    old_until: Option<i64>,
    /// Who is told of what happens in the background, where somebody is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    webhook: Option<String>,
}

/// A token that was changed.
#[derive(Serialize, ToSchema)]
struct ChangedToken {
    #[serde(flatten)]
    token: ListedToken,
    /// What its webhooks are signed with, where it had nothing before; shown this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = false)]
    webhook_secret: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct WebhookSecret {
    name: String,
    /// What its webhooks are signed with, beside what was until then; shown this once.
    webhook_secret: String,
    /// Unix seconds until which they are signed with the old one, too.
    old_until: i64,
}

impl From<TokenRow> for ListedToken {
    fn from(row: TokenRow) -> Self {
        let TokenRow { name, ip_cidrs, created_at, last_used, enabled, limits, rules, old_until, webhook } = row;
        let Limits { max_concurrent, daily_usd } = limits;
        let (network, home) = (rules.network.as_str(), rules.home());
        Self { name, ip_cidrs, created_at, last_used, enabled, max_concurrent, daily_usd, network, home, old_until, webhook }
    }
}

#[derive(Serialize, ToSchema)]
struct RotatedToken {
    name: String,
    /// The new one, shown this once.
    #[schema(pattern = "^cf_[0-9a-f]{64}$")]
    token: String,
    /// Unix seconds until which the old one is good, too.
    old_until: i64,
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
    mint(&app, asked).await.map(Json)
}

/// Mints a token, if what is asked for is valid and can be kept here.
pub(crate) async fn mint(app: &App, asked: NewToken) -> Result<MintedToken, ApiError> {
    valid(&asked)?;
    let networks = Networks::parse(asked.ip_cidrs.iter().flatten()).map_err(|_| ApiError::Defect)?;
    let limits = Limits { max_concurrent: at_most(asked.max_concurrent), daily_usd: asked.daily_usd };
    let (token, rules) = (secret::app_token(), asked.rules());
    check_network(app, rules.network)?;
    check_webhook(app, asked.webhook.as_deref(), &networks)?;
    let created = app.ledger.create_token(&asked.name, &TokenHash::of(&token), &networks, limits, &rules).await?;
    let created_at = created.map_err(ApiError::NameTaken)?;
    let webhook_secret = match &asked.webhook {
        Some(webhook) => {
            let change = TokenChange { webhook: Some(Some(webhook.clone())), ..TokenChange::default() };
            app.ledger.change_token(&asked.name, change).await?;
            give_secret(app, &asked.name).await?
        }
        None => None,
    };
    tracing::info!(name = asked.name, "token minted");
    Ok(MintedToken { name: asked.name, token, ip_cidrs: networks.to_strings(), created_at, webhook_secret })
}

fn check_webhook(app: &App, webhook: Option<&str>, networks: &Networks) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    if let Some(url) = webhook {
        webhooks::check(app, url, networks, &mut errors);
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::Invalid(errors)) }
}

/// Gives an app something to sign its webhooks with, if it has nothing yet.
async fn give_secret(app: &App, name: &str) -> Result<Option<String>, ApiError> {
    let secret = secret::webhook_secret();
    Ok(app.ledger.give_webhook_secret(name, &secret, 0, false).await?.then_some(secret))
}

fn valid(asked: &impl Validate) -> Result<(), ApiError> {
    let errors = asked.errors();
    if errors.is_empty() { Ok(()) } else { Err(ApiError::Invalid(errors)) }
}

fn check_network(app: &App, network: Network) -> Result<(), ApiError> {
    match &app.network {
        Err(why) if network != Network::Open => Err(ApiError::Invalid(vec![FieldError::new("/network", why.to_string())])),
        _ => Ok(()),
    }
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
    take_back(&app, &name).await?;
    Ok(Json(Revoked { ok: true, name }))
}

/// Takes a token out of force.
pub(crate) async fn take_back(app: &App, name: &str) -> Result<(), ApiError> {
    if !app.ledger.revoke_token(name).await? {
        return Err(ApiError::NotFound);
    }
    tracing::info!(name, "token revoked");
    Ok(())
}

/// Change a token
///
/// What is left out stays. From the app's next request on; what waits or goes on keeps to what it was accepted with.
#[utoipa::path(patch, path = "/admin/tokens/{name}", operation_id = "change_token", tag = "admin", security(("operator" = [])), params(("name" = String, Path)), request_body = TokenPatch, responses(
    (status = OK, body = ChangedToken),
    (status = NOT_FOUND, body = Problem, content_type = "application/problem+json", description = "No token in force has that name"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn patch(
    State(app): State<Arc<App>>,
    _: Operator,
    name: Result<Path<String>, PathRejection>,
    ValidJson(asked): ValidJson<TokenPatch>,
) -> Result<Json<ChangedToken>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::NotFound)?;
    let (row, webhook_secret) = change(&app, &name, asked).await?;
    Ok(Json(ChangedToken { token: row.into(), webhook_secret }))
}

/// Changes a token that is in force, if what is asked for is valid and can be kept here. Gives what it is now, and what its webhooks are signed
/// with, where it had nothing before.
pub(crate) async fn change(app: &App, name: &str, asked: TokenPatch) -> Result<(TokenRow, Option<String>), ApiError> {
    valid(&asked)?;
    let change = asked.change()?;
    check_network(app, change.network.unwrap_or_default())?;
    let known = app.ledger.token(name).await?.ok_or(ApiError::NotFound)?;
    let networks = change.networks.clone().map_or_else(|| known.ip_cidrs.parse().map_err(|_| ApiError::Defect), Ok)?;
    let webhook = change.webhook.clone().flatten();
    check_webhook(app, webhook.as_deref(), &networks)?;
    if !app.ledger.change_token(name, change).await? {
        return Err(ApiError::NotFound);
    }
    let secret = if webhook.is_some() { give_secret(app, name).await? } else { None };
    tracing::info!(name, "token changed");
    Ok((app.ledger.token(name).await?.ok_or(ApiError::NotFound)?, secret))
}

/// Give an app a new secret for its webhooks
///
/// For a day they are signed with the old one, too.
#[utoipa::path(post, path = "/admin/tokens/{name}/webhook-secret", operation_id = "rotate_webhook_secret", tag = "admin", security(("operator" = [])), params(("name" = String, Path)), responses(
    (status = OK, body = WebhookSecret),
    (status = NOT_FOUND, body = Problem, content_type = "application/problem+json", description = "No token in force has that name"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn rotate_secret(
    State(app): State<Arc<App>>,
    _: Operator,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<WebhookSecret>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::NotFound)?;
    let (webhook_secret, old_until) = replace_secret(&app, &name).await?;
    Ok(Json(WebhookSecret { name, webhook_secret, old_until }))
}

/// Gives an app a new secret for its webhooks, and says until when they are signed with the old one, too.
pub(crate) async fn replace_secret(app: &App, name: &str) -> Result<(String, i64), ApiError> {
    let (secret, old_until) = (secret::webhook_secret(), clock::now() + clock::DAY);
    if !app.ledger.give_webhook_secret(name, &secret, old_until, true).await? {
        return Err(ApiError::NotFound);
    }
    tracing::info!(name, "webhook secret rotated");
    Ok((secret, old_until))
}

/// Rotate a token
///
/// The app has a new one from now on, and the old one for as long as is said. A second rotation ends the first one's old token.
#[utoipa::path(post, path = "/admin/tokens/{name}/rotate", operation_id = "rotate_token", tag = "admin", security(("operator" = [])), params(("name" = String, Path)), request_body = Rotation, responses(
    (status = OK, body = RotatedToken),
    (status = NOT_FOUND, body = Problem, content_type = "application/problem+json", description = "No token in force has that name"),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn rotate(
    State(app): State<Arc<App>>,
    _: Operator,
    name: Result<Path<String>, PathRejection>,
    ValidJson(asked): ValidJson<Rotation>,
) -> Result<Json<RotatedToken>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::NotFound)?;
    let (token, old_until) = replace(&app, &name, asked.grace_secs.unwrap_or(GRACE)).await?;
    Ok(Json(RotatedToken { name, token, old_until }))
}

/// Gives an app a new token, and says until when its old one is good, too: for so many seconds.
pub(crate) async fn replace(app: &App, name: &str, grace: i64) -> Result<(String, i64), ApiError> {
    valid(&Rotation { grace_secs: Some(grace) })?;
    let (token, old_until) = (secret::app_token(), clock::now() + grace);
    if !app.ledger.rotate_token(name, &TokenHash::of(&token), old_until).await? {
        return Err(ApiError::NotFound);
    }
    tracing::info!(name, old_until, "token rotated");
    Ok((token, old_until))
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(revoke, patch)).routes(routes!(rotate)).routes(routes!(rotate_secret))
}
