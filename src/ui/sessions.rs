//! The sessions, newest first, a page at a time.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::routing::get;
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::format::when;
use super::layout::{Oops, page};
use super::runs::choice;
use super::sign_in::{Operator, encoded};
use crate::ledger::{Session, SessionsWanted};

const AT_ONCE: u32 = 50;

/// What is asked for, as it stands in the address.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Filter {
    app: String,
    state: String,
    before: String,
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator, Query(filter): Query<Filter>) -> Result<Markup, Oops> {
    let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let open = match filter.state.as_str() {
        "open" => Some(true),
        "closed" => Some(false),
        _ => None,
    };
    let wanted = SessionsWanted { app_name: given(&filter.app), open, before: given(&filter.before), limit: AT_ONCE + 1 };
    let mut sessions = ui.app.ledger.any_sessions(wanted).await?;
    let older = (sessions.len() > AT_ONCE as usize).then(|| {
        sessions.truncate(AT_ONCE as usize);
        let last = &sessions[sessions.len() - 1].new.session_id;
        format!("/ui/sessions?before={last}&app={}&state={}", encoded(&filter.app), encoded(&filter.state))
    });
    let apps: Vec<_> = ui.app.ledger.tokens().await?.into_iter().map(|token| token.name).collect();
    let main = html! {
        h1 { "Sessions" }
        form.filter method="get" action="/ui/sessions" role="search" aria-label="Sessions" {
            (choice("app", "App", &filter.app, apps.iter().map(|app| (app.as_str(), app.as_str()))))
            (choice("state", "State", &filter.state, [("open", "open"), ("closed", "closed")].into_iter()))
            div.buttons { button.main { "Filter" } " " a href="/ui/sessions" { "All" } }
        }
        (table(&sessions))
        nav.pager aria-label="Older and newer sessions" {
            @if !filter.before.is_empty() { a href="/ui/sessions" { "Newest" } }
            @if let Some(older) = older { a href=(older) rel="next" { "Older" } }
        }
    };
    Ok(page(&operator, "/ui/sessions", "Sessions", main))
}

fn table(sessions: &[Session]) -> Markup {
    html! {
        @if sessions.is_empty() { p.hint { "There are no such sessions." } } @else {
            div.scroll tabindex="0" role="group" aria-label="Sessions" {
                table {
                    thead {
                        tr {
                            th scope="col" { "Created" } th scope="col" { "State" } th scope="col" { "App" } th scope="col" { "Agent" }
                            th scope="col" { "Permissions" } th.number scope="col" { "Turns" } th scope="col" { "Last turn" }
                        }
                    }
                    tbody {
                        @for session in sessions {
                            tr {
                                td.time { a href={ "/ui/sessions/" (session.new.session_id) } { (when(session.created_at)) } }
                                td { (state(session)) }
                                td { (session.new.app_name) } td { (agent(session)) } td { (session.new.setup.permissions) }
                                td.number { (session.turn_count) }
                                td.time { @match session.last_turn_at { Some(at) => (when(at)), None => "–" } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Whether it is open.
pub(super) fn state(session: &Session) -> Markup {
    html! { @if session.closed_at.is_none() { span.status.live { "open" } } @else { span.status.quiet { "closed" } } }
}

/// Its agent, and the model where one was named.
pub(super) fn agent(session: &Session) -> String {
    let setup = &session.new.setup;
    setup.model.as_ref().map_or_else(|| setup.agent.clone(), |model| format!("{} · {model}", setup.agent))
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui/sessions", get(show))
}
