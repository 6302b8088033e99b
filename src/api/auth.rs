//! Who calls. A handler that names [`Caller`] or [`Operator`] can't be reached without one.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use crate::agent::contract::Rules;
use crate::app::App;
use crate::ledger::{self, Limits};
use crate::listener::Peer;
use crate::network::{Networks, caller_address};
use crate::secret::TokenHash;

/// An app with a token in force, at an address that the token may be used from.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The token's name.
    pub app: String,
    /// The caller's address.
    pub address: IpAddr,
    /// What the app may cost the others.
    pub limits: Limits,
    /// What binds its agents.
    pub rules: Rules,
    /// Where its token may be used from; none means anywhere that the server answers.
    pub networks: Networks,
    /// Who is told of what it has in the background, where a request names nobody.
    pub webhook: Option<String>,
    /// Whether it has a secret that webhooks are signed with.
    pub signs: bool,
}

/// Whoever holds the admin token.
#[derive(Clone, Copy, Debug)]
pub struct Operator;

/// The caller's address, once it is known to be an allowed one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address(pub(crate) IpAddr);

/// Lets in who calls from an allowed network; others get `403` whatever they ask for.
pub async fn admit(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let forwarded = request.headers().get_all("x-forwarded-for").iter().map(|value| value.to_str().unwrap_or("unreadable"));
    let address = request.extensions().get::<Peer>().and_then(|peer| caller_address(peer.0, forwarded, &app.access.trusted_proxies));
    match address.filter(|address| app.access.allow.contain(*address)) {
        Some(address) => {
            request.extensions_mut().insert(Address(address));
            next.run(request).await
        }
        None => {
            ApiError::Forbidden("Call from a network that this server answers; its operator sets CLAWDFORGE_ALLOW_CIDRS.").into_response()
        }
    }
}

/// The hash of the one bearer token that the request carries.
fn bearer(headers: &HeaderMap) -> Option<TokenHash> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| TokenHash::of(token.trim()))
}

/// The hash of an app's token: a bearer token, or what libraries of Anthropic's API send instead.
fn app_token(headers: &HeaderMap) -> Option<TokenHash> {
    bearer(headers).or_else(|| {
        let mut values = headers.get_all("x-api-key").iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        value.to_str().ok().map(|token| TokenHash::of(token.trim()))
    })
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let hash = app_token(&parts.headers).ok_or(ApiError::Unauthorized)?;
        if app.access.admin.as_ref() == Some(&hash) {
            return Err(ApiError::Forbidden("Use an app's token here; the admin token is for /admin alone."));
        }
        let Address(address) = *parts.extensions.get().ok_or(ApiError::Defect)?;
        let Some(known) = app.ledger.app(&hash).await? else {
            app.access.wrong.note(address).await;
            return Err(ApiError::Unauthorized);
        };
        if !known.networks.is_empty() && !known.networks.contain(address) {
            tracing::warn!(app = known.name, %address, "a token was used from outside its networks");
            return Err(ApiError::Forbidden("Call from an address that this token is bound to."));
        }
        app.ledger.touch_token(&known.name);
        let ledger::App { name, networks, limits, rules, webhook, signs } = known;
        Ok(Self { app: name, address, limits, rules, networks, webhook, signs })
    }
}

impl FromRequestParts<Arc<App>> for Operator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let Some(admin) = &app.access.admin else {
            return Err(ApiError::Forbidden(
                "No admin token is set: set CLAWDFORGE_ADMIN_TOKEN and start again, or use \"clawdforge token\" on the server.",
            ));
        };
        // Hashes are compared: how long that takes tells nothing of the token.
        match bearer(&parts.headers) {
            Some(hash) if hash == *admin => Ok(Self),
            Some(hash) if app.ledger.app(&hash).await?.is_some() => {
                Err(ApiError::Forbidden("Use the admin token here; an app's token does not open /admin."))
            }
            Some(_) => {
                let Address(address) = *parts.extensions.get().ok_or(ApiError::Defect)?;
                app.access.wrong.note(address).await;
                Err(ApiError::Unauthorized)
            }
            None => Err(ApiError::Unauthorized),
        }
    }
}
