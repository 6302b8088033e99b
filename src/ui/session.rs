//! A session: its turns and steps, as a conversation.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use maud::{Markup, html};
use serde_json::Value;

use super::Ui;
use super::events;
use super::format::{duration, or_none, path, status, usd, when};
use super::layout::{Oops, page};
use super::overview::live;
use super::sessions::{agent, state};
use super::sign_in::{Nothing, Operator, Sent};
use crate::api::error::ApiError;
use crate::app::App;
use crate::ledger::{JobRow, Session, Step};

/// Steps and characters of a text that are shown.
const MOST: (u32, u32) = (200, 20_000);

async fn find(app: &App, session_id: &str) -> Result<Session, Oops> {
    Ok(app.ledger.any_session(session_id).await?.ok_or(ApiError::NotFound)?)
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator, Path(session_id): Path<String>) -> Result<Markup, Oops> {
    let main = html! {
        h1 { "Session" }
        div data-live={ "/ui/sessions/" (session_id) "/live" } { (body(&ui.app, &operator.seal(), &session_id).await?) }
    };
    Ok(page(&operator, "/ui/sessions", "Session", main))
}

async fn follow(State(ui): State<Arc<Ui>>, operator: Operator, Path(session_id): Path<String>) -> Response {
    let (app, signed, seal) = (ui.app.clone(), ui, operator.seal());
    live(
        move || {
            let (app, session_id, seal) = (app.clone(), session_id.clone(), seal.clone());
            async move { body(&app, &seal, &session_id).await }
        },
        move || signed.may_follow(&operator),
    )
}

async fn body(app: &App, seal: &Markup, session_id: &str) -> Result<Markup, Oops> {
    let session = find(app, session_id).await?;
    let mut steps = Vec::new();
    for step in app.ledger.steps(session_id, MOST.0, MOST.1).await? {
        steps.push(match &step.turn {
            Some(turn) => self::turn(app, seal, turn).await?,
            None => other(&step),
        });
    }
    let fact = |name: &str, value: Markup| html! { div { dt { (name) } dd { (value) } } };
    Ok(html! {
        @if session.closed_at.is_none() {
            form method="post" action={ "/ui/sessions/" (session_id) "/close" } { (seal) button.danger { "Close the session" } }
        }
        dl.facts {
            (fact("State", state(&session)))
            (fact("App", html! { a href={ "/ui/apps/" (session.new.app_name) } { (session.new.app_name) } }))
            (fact("Agent", html! { (agent(&session)) }))
            (fact("Permissions", html! { (session.new.setup.permissions) }))
            (fact("Turns", html! { (session.turn_count) }))
            (fact("Created", when(session.created_at)))
            @if let Some(at) = session.closed_at { (fact("Closed", when(at))) }
            div.whole { dt { "Folder" } dd { code { (session.new.cwd) } } }
        }
        ol.conversation { @for step in steps { (step) } }
    })
}

async fn turn(app: &App, seal: &Markup, job: &JobRow) -> Result<Markup, Oops> {
    let end = job.finished.as_ref().map(|(_, end)| end);
    let said = if end.is_none() { events::so_far(app, &job.id).await? } else { None };
    let number = job.id.to_string();
    let number = number.rsplit('-').next().unwrap_or_default();
    Ok(html! {
        li.turn id={ "turn-" (number) } {
            h2 { a href=(path(&job.id)) { "Turn " (number) } " " (status(job.status)) }
            p.hint {
                (when(job.started_at))
                @if let Some(end) = end { " · took " (duration(end.duration_ms)) " · " (or_none(end.cost_usd.map(usd))) }
            }
            pre.prompt { (job.prompt) }
            @if !job.files.is_empty() { p.hint { "with " (job.files.join(", ")) } }
            @match end {
                Some(end) => {
                    @if let Some(error) = &end.error { p.notice.bad { (error) } }
                    @if let Some(answer) = end.result.as_deref().filter(|answer| !answer.is_empty()) { pre.answer { (answer) } }
                }
                None => {
                    div.events { @if let Some((said, _)) = said { (said) } }
                    form method="post" action={ (path(&job.id)) "/cancel" } { (seal) button.danger { "Cancel the turn" } }
                }
            }
        }
    })
}

/// A step that is no turn.
fn other(step: &Step) -> Markup {
    let asked: Value = step.asked.as_deref().and_then(|asked| serde_json::from_str(asked).ok()).unwrap_or_default();
    let what = match step.event.as_str() {
        "create" => "Created".to_owned(),
        "close" => "Closed".to_owned(),
        "sweep_close" => "Closed: nobody used it".to_owned(),
        "worker_forgotten" => "Closed: its machine does not come back".to_owned(),
        "permission" => {
            let tool = asked["params"]["toolCall"]["title"].as_str().unwrap_or("a question");
            match &step.answered {
                Some((option, by)) => format!("It asked for {tool}: {} by {by}", option.as_deref().unwrap_or("nothing chosen")),
                None => format!("It asks for {tool}"),
            }
        }
        other => other.to_owned(),
    };
    html! { li.step { (what) " " span.hint { (when(step.at)) } } }
}

async fn close(State(ui): State<Arc<Ui>>, Path(session_id): Path<String>, _: Sent<Nothing>) -> Result<Response, Oops> {
    ui.app.sessions.close(find(&ui.app, &session_id).await?).await?;
    tracing::info!(session_id, "closed by the operator");
    Ok(Redirect::to(&format!("/ui/sessions/{session_id}")).into_response())
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new()
        .route("/ui/sessions/{id}", get(show))
        .route("/ui/sessions/{id}/live", get(follow))
        .route("/ui/sessions/{id}/close", post(close))
}
