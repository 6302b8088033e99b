//! Signing in: the operator's token once, then a cookie. Every form carries a token of its own, and has to come from these pages.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Form, FromRequest, FromRequestParts, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use maud::{Markup, html};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::Ui;
use super::layout::{Oops, bare};
use crate::api::auth::Address;
use crate::api::error::ApiError;
use crate::listener::Peer;
use crate::secret::{self, TokenHash};

/// How long one stays signed in.
const LASTS: Duration = Duration::from_hours(12);
const COOKIE: &str = "clawdforge";
/// Sign-ins at once; the one that would end first makes room.
const MOST: usize = 100;

/// Who is signed in, by the hash of the cookie's value. A restart ends all.
#[derive(Default)]
pub(super) struct SignedIn(Mutex<HashMap<String, SignIn>>);

struct SignIn {
    until: Instant,
    form_token: String,
}

impl SignedIn {
    fn all(&self) -> MutexGuard<'_, HashMap<String, SignIn>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, sign_in| sign_in.until > Instant::now());
        all
    }

    /// Signs one in. Gives the cookie's value.
    fn begin(&self) -> String {
        let value = secret::random();
        let mut all = self.all();
        if all.len() >= MOST
            && let Some(first) = all.iter().min_by_key(|(_, sign_in)| sign_in.until).map(|(hash, _)| hash.clone())
        {
            all.remove(&first);
        }
        let sign_in = SignIn { until: Instant::now() + LASTS, form_token: secret::random() };
        all.insert(TokenHash::of(&value).as_str().to_owned(), sign_in);
        value
    }

    /// Whether an operator is still signed in.
    pub(super) fn is_in(&self, operator: &Operator) -> bool {
        self.all().contains_key(operator.hash.as_str())
    }

    fn find(&self, headers: &HeaderMap) -> Option<Operator> {
        let hash = cookie(headers)?;
        let form_token = self.all().get(hash.as_str())?.form_token.clone();
        Some(Operator { form_token, hash })
    }
}

fn cookie(headers: &HeaderMap) -> Option<TokenHash> {
    let values = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = values.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.filter(|(name, _)| *name == COOKIE).map(|(_, value)| TokenHash::of(value)).next()
}

/// Whoever is signed in.
pub(super) struct Operator {
    /// What this operator's forms carry.
    pub(super) form_token: String,
    hash: TokenHash,
}

impl Operator {
    /// What a form has to have.
    pub(super) fn seal(&self) -> Markup {
        html! { input type="hidden" name="form_token" value=(self.form_token); }
    }
}

impl FromRequestParts<Arc<Ui>> for Operator {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, ui: &Arc<Ui>) -> Result<Self, Response> {
        ui.operators.find(&parts.headers).ok_or_else(|| {
            // What a form wanted is not done after the sign-in.
            let wanted = if parts.method == Method::GET { parts.uri.path_and_query().map_or("/ui", |path| path.as_str()) } else { "/ui" };
            Redirect::to(&format!("/ui/sign-in?next={}", encoded(wanted))).into_response()
        })
    }
}

/// Text as a parameter of an address.
pub(super) fn encoded(text: &str) -> String {
    let keep = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(byte);
    text.bytes().map(|byte| if keep(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// A form that one who is signed in sent from these pages.
pub(super) struct Sent<T> {
    /// What it says.
    pub(super) form: T,
    /// Who sent it.
    pub(super) operator: Operator,
}

#[derive(Deserialize)]
struct Sealed<T> {
    form_token: String,
    #[serde(flatten)]
    form: T,
}

impl<T: DeserializeOwned> FromRequest<Arc<Ui>> for Sent<T> {
    type Rejection = Response;

    async fn from_request(request: Request, ui: &Arc<Ui>) -> Result<Self, Response> {
        let (mut parts, body) = request.into_parts();
        let operator = Operator::from_request_parts(&mut parts, ui).await?;
        let refused = || Oops(ApiError::Forbidden("Send the form from the page itself; load it again if it is old.")).into_response();
        if !is_from_here(ui, &parts) {
            return Err(refused());
        }
        let wrong = |error: axum::extract::rejection::FormRejection| Oops(ApiError::BadRequest(error.body_text())).into_response();
        let Form(sent) = Form::<Sealed<T>>::from_request(Request::from_parts(parts, body), ui).await.map_err(wrong)?;
        // Hashes are compared: how long that takes tells nothing of the token.
        if TokenHash::of(&sent.form_token) != TokenHash::of(&operator.form_token) {
            return Err(refused());
        }
        Ok(Self { form: sent.form, operator })
    }
}

/// Where a form comes from, as the browser says.
fn origin(parts: &Parts) -> Option<(&str, &str)> {
    parts.headers.get(header::ORIGIN)?.to_str().ok()?.split_once("://")
}

/// Whether a form comes from these pages.
fn is_from_here(ui: &Ui, parts: &Parts) -> bool {
    let named = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let by_proxy = parts.extensions.get::<Peer>().is_some_and(|peer| ui.app.access.trusted_proxies.contain(peer.0));
    let hosts = [named("host"), named("x-forwarded-host").filter(|_| by_proxy)];
    origin(parts).is_some_and(|(_, host)| hosts.into_iter().flatten().any(|own| own.eq_ignore_ascii_case(host)))
}

#[derive(Deserialize)]
struct Wanted {
    #[serde(default)]
    next: String,
}

#[derive(Deserialize)]
struct SignInForm {
    #[serde(default)]
    token: String,
    #[serde(default)]
    next: String,
}

fn form(ui: &Ui, next: &str, wrong: Option<&str>) -> Markup {
    html! {
        h1 { "Sign in" }
        @if let Some(wrong) = wrong { p.notice.bad role="alert" { (wrong) } }
        @if ui.app.access.admin.is_none() {
            p.notice.bad { "This server has no operator's token: set " code { "CLAWDFORGE_ADMIN_TOKEN" } " and start it again." }
        } @else {
            form.card method="post" action="/ui/sign-in" {
                input type="hidden" name="next" value=(next);
                // So that a password manager can keep it.
                input type="text" name="user" value="operator" autocomplete="username" hidden;
                label for="token" { "The operator's token" }
                input #token type="password" name="token" autocomplete="current-password" required autofocus;
                p.hint { "What " code { "CLAWDFORGE_ADMIN_TOKEN" } " was set to. You stay signed in for twelve hours, or until the server starts again." }
                button.main { "Sign in" }
            }
        }
    }
}

async fn show(State(ui): State<Arc<Ui>>, Query(Wanted { next }): Query<Wanted>) -> Response {
    bare("Sign in", &form(&ui, &next, None)).into_response()
}

async fn sign_in(State(ui): State<Arc<Ui>>, Extension(Address(address)): Extension<Address>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    if !is_from_here(&ui, &parts) {
        return Oops(ApiError::Forbidden("Sign in from the page itself.")).into_response();
    }
    let secure = if origin(&parts).is_some_and(|(scheme, _)| scheme == "https") { "; Secure" } else { "" };
    let Ok(Form(SignInForm { token, next })) = Form::from_request(Request::from_parts(parts, body), &ui).await else {
        return Oops(ApiError::BadRequest("Send the form of the page.".to_owned())).into_response();
    };
    if ui.app.access.admin.as_ref() != Some(&TokenHash::of(token.trim())) {
        ui.app.access.wrong.note(address).await;
        tracing::warn!(%address, "a sign-in with a wrong token");
        let wrong = "That is not the operator's token.";
        return (StatusCode::UNAUTHORIZED, bare("Sign in", &form(&ui, &next, Some(wrong)))).into_response();
    }
    tracing::info!(%address, "the operator signed in");
    let cookie = format!("{COOKIE}={}; Path=/ui; HttpOnly; SameSite=Strict; Max-Age={}{secure}", ui.operators.begin(), LASTS.as_secs());
    // Nowhere but to these pages.
    let next = if next == "/ui" || next.starts_with("/ui/") || next.starts_with("/ui?") { next } else { "/ui".to_owned() };
    ([(header::SET_COOKIE, cookie)], Redirect::to(&next)).into_response()
}

/// A form that is a button alone.
#[derive(Deserialize)]
pub(super) struct Nothing {}

async fn sign_out(State(ui): State<Arc<Ui>>, Sent { operator, .. }: Sent<Nothing>) -> Response {
    ui.operators.all().remove(operator.hash.as_str());
    let cookie = format!("{COOKIE}=; Path=/ui; HttpOnly; SameSite=Strict; Max-Age=0");
    ([(header::SET_COOKIE, cookie)], Redirect::to("/ui/sign-in")).into_response()
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui/sign-in", get(show).post(sign_in)).route("/ui/sign-out", post(sign_out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_sign_in_ends_after_twelve_hours_or_makes_room() {
        let operators = SignedIn::default();
        let headers = |value: &str| HeaderMap::from_iter([(header::COOKIE, format!("other=1; {COOKIE}={value}").parse().unwrap())]);
        let first = operators.begin();
        let operator = operators.find(&headers(&first)).unwrap();
        assert!(operators.find(&headers("else")).is_none() && operators.find(&HeaderMap::new()).is_none());
        tokio::time::advance(Duration::from_hours(11)).await;
        assert!(operators.is_in(&operator));
        tokio::time::advance(Duration::from_secs(3601)).await;
        assert!(!operators.is_in(&operator) && operators.find(&headers(&first)).is_none());
        let values: Vec<_> = (0..=MOST).map(|_| operators.begin()).collect();
        let known = values.iter().filter(|value| operators.find(&headers(value)).is_some()).count();
        assert_eq!((known, operators.find(&headers(&values[MOST])).is_some()), (MOST, true));
    }
}
