//! An app: its token is changed, rotated and revoked.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::apps::{Fields, Secrets, shown_once};
use super::format::{usd, when};
use super::layout::{Oops, page, refusal, refusals};
use super::sign_in::{Nothing, Operator, Sent, encoded};
use crate::api::error::ApiError;
use crate::api::tokens::{self, GRACE, NewToken, TokenPatch};
use crate::app::App;
use crate::clock::{self, DAY};

/// For how long an old token may be good beside the new one, in seconds.
const GRACES: [(i64, &str); 4] = [(0, "not at all"), (GRACE, "for an hour"), (DAY, "for a day"), (7 * DAY, "for a week")];

async fn show(State(ui): State<Arc<Ui>>, operator: Operator, Path(name): Path<String>) -> Result<Markup, Oops> {
    view(&ui.app, &operator, &name, None, &[]).await
}

/// The page; with what a form said that was refused, and why.
async fn view(app: &App, operator: &Operator, name: &str, refused: Option<&Fields>, whys: &[String]) -> Result<Markup, Oops> {
    let known = app.ledger.tokens().await?.into_iter().find(|token| token.name == name).ok_or(ApiError::NotFound)?;
    let spent = app.ledger.spent(name, clock::midnight()).await?;
    let fields = refused.map_or_else(|| Fields::from(&known), Clone::clone);
    let address = format!("/ui/apps/{name}");
    let main = html! {
        h1 { (name) @if !known.enabled { " " span.status.quiet { "revoked" } } }
        (refusals(whys))
        dl.facts {
            div { dt { "Spent today" } dd { (usd(spent)) @if let Some(budget) = known.limits.daily_usd { " of " (usd(budget)) } } }
            div { dt { "Minted" } dd { (when(known.created_at)) } }
            div { dt { "Last used" } dd { @match known.last_used { Some(at) => (when(at)), None => "never" } } }
            @if let Some(at) = known.old_until { div { dt { "Its old token is good until" } dd { (when(at)) } } }
        }
        p {
            a href={ "/ui/runs?app=" (encoded(name)) } { "Its runs" } " · " a href={ "/ui/sessions?app=" (encoded(name)) } { "Its sessions" } " · "
            a href={ "/ui/usage?app=" (encoded(name)) "&by=model" } { "What it used" }
        }
        @if known.enabled {
            h2 { "Change it" }
            form.card.fields method="post" action=(address) {
                (operator.seal()) (fields.inputs())
                div.buttons { button.main { "Change" } }
            }
            h2 { "Rotate its token" }
            form.card.fields method="post" action={ (address) "/rotate" } {
                (operator.seal())
                div {
                    label for="grace" { "The old one is good" }
                    select #grace name="grace" { @for (secs, said) in GRACES { option value=(secs) selected[secs == GRACE] { (said) } } }
                }
                div.buttons { button.main { "Give it a new token" } }
            }
            @if known.webhook.is_some() {
                h2 { "A new secret for its webhooks" }
                form.card method="post" action={ (address) "/webhook-secret" } {
                    (operator.seal())
                    p.hint { "For a day they are signed with the old one, too." }
                    button.main { "Give it a new secret" }
                }
            }
            h2 { "Revoke its token" }
            p { "From its next request on it is refused. What goes on is finished; what it has written stays in the ledger." }
            p { a.button.danger href={ (address) "/revoke" } { "Revoke …" } }
        }
    };
    Ok(page(operator, "/ui/apps", name, main))
}

async fn change(
    State(ui): State<Arc<Ui>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    Sent { form: fields, operator }: Sent<Fields>,
) -> Result<Response, Oops> {
    let changed = async {
        let NewToken { ip_cidrs, max_concurrent, daily_usd, network, home, webhook, .. } = fields.read()?;
        let patch = TokenPatch {
            ip_cidrs: Some(ip_cidrs),
            max_concurrent: Some(max_concurrent),
            daily_usd: Some(daily_usd),
            network: Some(network),
            home: Some(home),
            webhook: Some(webhook),
        };
        tokens::change(&ui.app, &name, patch).await
    };
    match changed.await {
        Ok((_, Some(secret))) => {
            let secrets = Secrets { webhook: Some(&secret), ..Secrets::default() };
            Ok(shown_once(&operator, &headers, &name, &secrets).into_response())
        }
        Ok((_, None)) => Ok(Redirect::to(&format!("/ui/apps/{name}")).into_response()),
        Err(error) => {
            let (status, whys) = refusal(error)?;
            Ok((status, view(&ui.app, &operator, &name, Some(&fields), &whys).await?).into_response())
        }
    }
}

#[derive(Deserialize)]
struct Grace {
    #[serde(default)]
    grace: String,
}

async fn rotate(
    State(ui): State<Arc<Ui>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    Sent { form, operator }: Sent<Grace>,
) -> Result<Markup, Oops> {
    let (secret, old_until) = tokens::replace(&ui.app, &name, form.grace.parse().unwrap_or(GRACE)).await?;
    let secrets = Secrets { token: Some(&secret), old_until: (old_until > clock::now()).then_some(old_until), webhook: None };
    Ok(shown_once(&operator, &headers, &name, &secrets))
}

async fn rotate_secret(
    State(ui): State<Arc<Ui>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    Sent { operator, .. }: Sent<Nothing>,
) -> Result<Markup, Oops> {
    let (secret, old_until) = tokens::replace_secret(&ui.app, &name).await?;
    let secrets = Secrets { token: None, old_until: Some(old_until), webhook: Some(&secret) };
    Ok(shown_once(&operator, &headers, &name, &secrets))
}

/// Asks first.
async fn ask(State(ui): State<Arc<Ui>>, operator: Operator, Path(name): Path<String>) -> Result<Markup, Oops> {
    ui.app.ledger.token(&name).await?.ok_or(ApiError::NotFound)?;
    let main = html! {
        h1 { "Revoke the token of " (name) "?" }
        p { "From its next request on the app is refused, and the memories that are kept for it are removed. This can't be taken back; another token of that name can be minted." }
        form method="post" action={ "/ui/apps/" (name) "/revoke" } {
            (operator.seal())
            button.danger { "Revoke it" } " " a href={ "/ui/apps/" (name) } { "Keep it" }
        }
    };
    Ok(page(&operator, "/ui/apps", "Revoke", main))
}

async fn revoke(State(ui): State<Arc<Ui>>, Path(name): Path<String>, _: Sent<Nothing>) -> Result<Redirect, Oops> {
    tokens::take_back(&ui.app, &name).await?;
    Ok(Redirect::to("/ui/apps"))
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new()
        .route("/ui/apps/{name}", get(show).post(change))
        .route("/ui/apps/{name}/rotate", post(rotate))
        .route("/ui/apps/{name}/webhook-secret", post(rotate_secret))
        .route("/ui/apps/{name}/revoke", get(ask).post(revoke))
}
