//! A prompt of the operator's, as an app of his own choosing.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use axum::{Extension, Router};
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::format::path;
use super::layout::{Oops, page, refusal, refusals};
use super::sign_in::{Operator, Sent};
use crate::api::auth::{Address, Caller};
use crate::api::error::ApiError;
use crate::api::runs::{RunRequest, begin};
use crate::app::App;
use crate::network::Networks;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fields {
    app: String,
    model: String,
    system: String,
    prompt: String,
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator) -> Result<Markup, Oops> {
    view(&ui.app, &operator, &Fields::default(), &[]).await
}

async fn view(app: &App, operator: &Operator, fields: &Fields, whys: &[String]) -> Result<Markup, Oops> {
    let apps: Vec<_> = app.ledger.tokens().await?.into_iter().filter(|token| token.enabled).map(|token| token.name).collect();
    let main = html! {
        h1 { "Try it" }
        (refusals(whys))
        @if apps.is_empty() {
            p.hint { "There is no app yet. " a href="/ui/apps" { "Mint a token" } " first." }
        } @else {
            form.card.fields method="post" action="/ui/try" {
                (operator.seal())
                div {
                    label for="app" { "As" }
                    select #app name="app" { @for app in &apps { option value=(app) selected[*app == fields.app] { (app) } } }
                }
                div {
                    label for="model" { "Model" }
                    input #model name="model" value=(fields.model) list="models" placeholder="sonnet";
                    datalist #models { @for model in ["sonnet", "opus", "haiku"] { option value=(model) {} } }
                }
                div.wide { label for="system" { "Added to the system prompt" } textarea #system name="system" rows="2" { (fields.system) } }
                div.wide { label for="prompt" { "Prompt" } textarea #prompt name="prompt" rows="6" required { (fields.prompt) } }
                div.buttons { button.main { "Run" } span.hint { " It counts among the app's runs, and in its budget." } }
            }
        }
    };
    Ok(page(operator, "/ui/try", "Try it", main))
}

async fn send(
    State(ui): State<Arc<Ui>>,
    Extension(Address(address)): Extension<Address>,
    Sent { form: fields, operator }: Sent<Fields>,
) -> Result<Response, Oops> {
    let token = ui.app.ledger.token(&fields.app).await?.ok_or(ApiError::NotFound)?;
    let caller = Caller {
        app: token.name,
        address,
        limits: token.limits,
        rules: token.rules,
        networks: Networks::default(),
        webhook: None,
        signs: false,
    };
    let given = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
    // Browsers end lines as HTTP does.
    let prompt = fields.prompt.replace("\r\n", "\n");
    let asked =
        RunRequest { prompt, model: given(&fields.model), system: given(&fields.system), timeout_secs: Some(600), ..RunRequest::default() };
    match begin(&ui.app, &caller, asked).await {
        Ok(id) => Ok(Redirect::to(&path(&id)).into_response()),
        Err(error) => {
            let (status, whys) = refusal(error)?;
            Ok((status, view(&ui.app, &operator, &fields, &whys).await?).into_response())
        }
    }
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui/try", get(show).post(send))
}
