//! The apps and their tokens.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::format::{usd, when};
use super::layout::{Oops, page, refusal, refusals};
use super::sign_in::{Operator, Sent};
use crate::api::error::{ApiError, FieldError};
use crate::api::tokens::{self, NewToken};
use crate::app::App;
use crate::clock;
use crate::ledger::{Limits, TokenRow};

/// What a form says of a token.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Fields {
    name: String,
    ip_cidrs: String,
    max_concurrent: String,
    daily_usd: String,
    network: String,
    home: String,
    webhook: String,
}

impl From<&TokenRow> for Fields {
    fn from(row: &TokenRow) -> Self {
        let Limits { max_concurrent, daily_usd } = row.limits;
        let text = |number: Option<String>| number.unwrap_or_default();
        Self {
            name: row.name.clone(),
            ip_cidrs: row.ip_cidrs.replace(',', " "),
            max_concurrent: text(max_concurrent.map(|most| most.to_string())),
            daily_usd: text(daily_usd.map(|usd| usd.to_string())),
            network: row.rules.network.as_str().to_owned(),
            home: row.rules.home().to_owned(),
            webhook: text(row.webhook.clone()),
        }
    }
}

/// A number that a person wrote, or left out; what is none of it is an error.
fn number<T: std::str::FromStr>(text: &str, what: &str, errors: &mut Vec<FieldError>) -> Option<T> {
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let read = text.parse().ok();
    if read.is_none() {
        errors.push(FieldError::new("", format!("{what}: \"{text}\" is no number")));
    }
    read
}

impl Fields {
    /// What is asked for.
    pub(super) fn read(&self) -> Result<NewToken, ApiError> {
        let mut errors = Vec::new();
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let daily_usd = number::<f64>(&self.daily_usd, "Dollars a day", &mut errors).filter(|usd| usd.is_finite());
        let asked = NewToken {
            name: self.name.trim().to_owned(),
            ip_cidrs: Some(self.ip_cidrs.split([',', ' ', '\n', '\r', '\t']).filter(|part| !part.is_empty()).map(str::to_owned).collect()),
            max_concurrent: number(&self.max_concurrent, "Runs and turns at once", &mut errors),
            daily_usd,
            network: given(&self.network),
            home: given(&self.home),
            webhook: given(self.webhook.trim()),
        };
        if errors.is_empty() { Ok(asked) } else { Err(ApiError::Invalid(errors)) }
    }

    /// The inputs, but for the name's.
    pub(super) fn inputs(&self) -> Markup {
        let choice = |name: &str, label: &str, chosen: &str, words: &[(&str, &str)]| {
            html! {
                div {
                    label for=(name) { (label) }
                    select id=(name) name=(name) { @for (word, said) in words { option value=(word) selected[*word == chosen] { (said) } } }
                }
            }
        };
        html! {
            div.wide {
                label for="ip_cidrs" { "May be used from" }
                input #ip_cidrs name="ip_cidrs" value=(self.ip_cidrs) placeholder="172.24.0.0/16 10.0.0.5" aria-describedby="cidrs-hint";
                span.hint #cidrs-hint { "Networks and addresses; none means anywhere that the server answers." }
            }
            div {
                label for="max_concurrent" { "Runs and turns at once" }
                input #max_concurrent name="max_concurrent" inputmode="numeric" value=(self.max_concurrent) placeholder="no limit";
            }
            div {
                label for="daily_usd" { "Dollars a day" }
                input #daily_usd name="daily_usd" inputmode="decimal" value=(self.daily_usd) placeholder="no limit";
            }
            (choice("network", "Its agents reach", &self.network,
                &[("open", "what the server does"), ("web", "the web, no private networks"), ("model", "the model alone")]))
            (choice("home", "From run to run", &self.home, &[("fresh", "nothing lasts"), ("kept", "claude's memories last")]))
            div.wide {
                label for="webhook" { "Webhook" }
                input #webhook name="webhook" type="url" value=(self.webhook) placeholder="https://app.lan/hook" aria-describedby="webhook-hint";
                span.hint #webhook-hint { "Told of what ends in the background; none by default." }
            }
        }
    }
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator) -> Result<Markup, Oops> {
    list(&ui.app, &operator, &Fields::default(), &[]).await
}

async fn list(app: &App, operator: &Operator, fields: &Fields, whys: &[String]) -> Result<Markup, Oops> {
    let mut rows = Vec::new();
    for token in app.ledger.tokens().await? {
        let spent = app.ledger.spent(&token.name, clock::midnight()).await?;
        rows.push((token, spent));
    }
    // Those in force first.
    rows.sort_by_key(|(token, _)| !token.enabled);
    let main = html! {
        h1 { "Apps" }
        (refusals(whys))
        (table(app, &rows))
        h2 { "A token for another app" }
        form.card.fields method="post" action="/ui/apps" {
            (operator.seal())
            div {
                label for="name" { "Name" }
                input #name name="name" value=(fields.name) required maxlength="64" autocomplete="off" aria-describedby="name-hint";
                span.hint #name-hint { "Letters, digits and . _ @ -" }
            }
            (fields.inputs())
            div.buttons { button.main { "Mint a token" } }
        }
    };
    Ok(page(operator, "/ui/apps", "Apps", main))
}

fn table(app: &App, rows: &[(TokenRow, f64)]) -> Markup {
    let places = app.jobs.places();
    let busy = |name: &str| places.apps.iter().find(|app| app.app == name).map_or(0, |app| app.runs + app.turns);
    html! {
        @if rows.is_empty() { p.hint { "There is none yet." } } @else {
            div.scroll tabindex="0" role="group" aria-label="Apps" {
                table {
                    thead {
                        tr {
                            th scope="col" { "App" } th scope="col" { "From" } th.number scope="col" { "At once" } th.number scope="col" { "Spent today" }
                            th scope="col" { "Reaches" } th scope="col" { "Last used" } th scope="col" { "" span.unseen { "What to do" } }
                        }
                    }
                    tbody {
                        @for (token, spent) in rows {
                            tr class=[(!token.enabled).then_some("quiet")] {
                                th scope="row" { a href={ "/ui/apps/" (token.name) } { (token.name) } @if !token.enabled { " " span.status.quiet { "revoked" } } }
                                td { @if token.ip_cidrs.is_empty() { "anywhere" } @else { (token.ip_cidrs.replace(',', ", ")) } }
                                td.number { (busy(&token.name)) @if let Some(most) = token.limits.max_concurrent { " of " (most) } }
                                td.number { (usd(*spent)) @if let Some(budget) = token.limits.daily_usd { " of " (usd(budget)) } }
                                td { (token.rules.network.as_str()) @if token.rules.memory.is_some() { ", memories kept" } }
                                td.time { @match token.last_used { Some(at) => (when(at)), None => "never" } }
                                td { @if token.enabled { a href={ "/ui/apps/" (token.name) "/revoke" } { "Revoke" span.unseen { " " (token.name) } } } }
                            }
                        }
                    }
                }
            }
        }
    }
}

async fn mint(State(ui): State<Arc<Ui>>, headers: HeaderMap, Sent { form: fields, operator }: Sent<Fields>) -> Result<Response, Oops> {
    let minted = async { tokens::mint(&ui.app, fields.read()?).await };
    match minted.await {
        Ok(minted) => {
            let secrets = Secrets { token: Some(&minted.token), old_until: None, webhook: minted.webhook_secret.as_deref() };
            Ok(shown_once(&operator, &headers, &fields.name, &secrets).into_response())
        }
        Err(error) => {
            let (status, whys) = refusal(error)?;
            Ok((status, list(&ui.app, &operator, &fields, &whys).await?).into_response())
        }
    }
}

/// What is shown once.
#[derive(Default)]
pub(super) struct Secrets<'a> {
    /// A new token.
    pub(super) token: Option<&'a str>,
    /// Unix seconds until which the old one is good, too.
    pub(super) old_until: Option<i64>,
    /// What webhooks are signed with.
    pub(super) webhook: Option<&'a str>,
}

/// A new token, or a new secret, shown this once.
pub(super) fn shown_once(operator: &Operator, headers: &HeaderMap, name: &str, secrets: &Secrets<'_>) -> Markup {
    let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or("127.0.0.1:8800");
    // The browser says by which scheme it came.
    let origin = headers.get("origin").and_then(|origin| origin.to_str().ok()).map_or_else(|| format!("http://{host}"), str::to_owned);
    let curl = |token: &str| {
        format!(
            "curl -s {origin}/run -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' -d '{{\"prompt\": \"Say hello.\"}}'"
        )
    };
    let shown = |id: &str, label: &str, text: &str| {
        html! {
            div.copied {
                h2 { label for=(id) { (label) } }
                textarea id=(id) readonly rows=(text.len() / 90 + 1) { (text) }
                button type="button" data-copy=(id) hidden { "Copy" }
            }
        }
    };
    let main = html! {
        h1 { (name) ", shown once" }
        p.notice.good {
            "This is the only time that it is shown."
            @if let Some(at) = secrets.old_until { " The old one is good until " (when(at)) ", too." }
        }
        @if let Some(token) = secrets.token { (shown("token", "Token", token)) (shown("curl", "A line to paste", &curl(token))) }
        @if let Some(secret) = secrets.webhook { (shown("secret", "Webhook secret", secret)) }
        p { a href="/ui/apps" { "To the apps" } }
    };
    page(operator, "/ui/apps", "Shown once", main)
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui/apps", get(show).post(mint))
}
