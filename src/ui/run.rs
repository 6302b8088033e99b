//! A run, or a turn of a session: what was asked, what the agent does, and what came of it.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::events;
use super::format::{advice, count, duration, made_by, or_none, path, status, usd, when};
use super::layout::{Oops, page};
use super::sign_in::{Nothing, Operator, Sent};
use crate::api::error::ApiError;
use crate::app::App;
use crate::ledger::{JobId, JobRow};

async fn find(app: &App, id: JobId) -> Result<JobRow, Oops> {
    Ok(app.ledger.any_job(&id).await?.ok_or(ApiError::NotFound)?)
}

async fn show_run(State(ui): State<Arc<Ui>>, operator: Operator, Path(run_id): Path<String>) -> Result<Markup, Oops> {
    show(&ui, &operator, JobId::Run(run_id)).await
}

async fn show_turn(State(ui): State<Arc<Ui>>, operator: Operator, Path((session_id, turn)): Path<(String, i64)>) -> Result<Markup, Oops> {
    show(&ui, &operator, JobId::Turn { session_id, turn }).await
}

async fn show(ui: &Ui, operator: &Operator, id: JobId) -> Result<Markup, Oops> {
    let job = find(&ui.app, id).await?;
    let said = events::so_far(&ui.app, &job.id).await?;
    let address = path(&job.id);
    let (part, title) = match &job.id {
        JobId::Run(_) => ("/ui/runs", "Run".to_owned()),
        JobId::Turn { turn, .. } => ("/ui/sessions", format!("Turn {turn}")),
    };
    let goes_on = job.finished.is_none();
    let main = html! {
        h1 { (title) " " (status(job.status)) }
        @if let JobId::Turn { session_id, .. } = &job.id { p { a href={ "/ui/sessions/" (session_id) } { "Its session" } } }
        @if goes_on {
            form method="post" action={ (address) "/cancel" } { (operator.seal()) button.danger { "Cancel" } }
        }
        (failure(&job))
        (facts(&job))
        h2 { "Prompt" }
        pre.prompt { (job.prompt) }
        @if !job.files.is_empty() {
            h2 { "Files" }
            ul { @for file in &job.files { li { code { (file) } } } }
        }
        @if goes_on {
            h2 { "What it does" }
            @let last = said.as_ref().map_or(0, |(_, last)| *last);
            div.events data-events={ (address) "/events?after=" (last) } aria-live="polite" aria-busy="true" { @if let Some((said, _)) = said { (said) } }
            p.hint { "The answer is here when it is over." }
        } @else {
            h2 { "Answer" }
            @match job.finished.as_ref().and_then(|(_, end)| end.result.as_deref()).filter(|answer| !answer.is_empty()) {
                Some(answer) => { pre.answer { (answer) } }
                None => { p.hint { "None." } }
            }
            h2 { "What it did" }
            @match said {
                Some((said, _)) => { details { summary { "As it came" } div.events { (said) } } }
                None => { p.hint { "That is kept for a day." } }
            }
        }
    };
    Ok(page(operator, part, &title, main))
}

fn failure(job: &JobRow) -> Markup {
    let error = job.finished.as_ref().and_then(|(_, end)| end.error.as_deref());
    html! {
        @if let Some(error) = error {
            div.notice.bad { p { (error) } p.advice { (advice(error, job.status)) } }
        }
    }
}

fn facts(job: &JobRow) -> Markup {
    let end = job.finished.as_ref().map(|(_, end)| end);
    let fact = |name: &str, value: Markup| html! { div { dt { (name) } dd { (value) } } };
    let number = |value: Option<i64>| html! { (or_none(value.map(count))) };
    html! {
        dl.facts {
            (fact("App", html! { a href={ "/ui/apps/" (job.app_name) } { (job.app_name) } }))
            (fact("Model", html! { (made_by(job)) }))
            (fact(if job.status == crate::ledger::Status::Queued { "Accepted" } else { "Started" }, when(job.started_at)))
            @if let Some((at, _)) = &job.finished { (fact("Ended", when(*at))) }
            @if let Some(end) = end {
                (fact("Took", html! { (duration(end.duration_ms)) }))
                (fact("First text after", html! { (or_none(end.first_text_ms.map(duration))) }))
                (fact("Stop reason", html! { (end.stop_reason) }))
                (fact("Tokens in", number(end.input_tokens)))
                (fact("of them cached", number(end.cached_tokens)))
                (fact("Tokens out", number(end.output_tokens)))
                (fact("Cost", html! { (or_none(end.cost_usd.map(usd))) }))
            }
            div.whole { dt { "Id" } dd { code { (job.id) } } }
        }
    }
}

#[derive(Deserialize)]
struct Behind {
    #[serde(default)]
    after: u64,
}

async fn follow_run(
    State(ui): State<Arc<Ui>>,
    _: Operator,
    Path(run_id): Path<String>,
    Query(behind): Query<Behind>,
) -> Result<Response, Oops> {
    events::follow(&ui.app, &find(&ui.app, JobId::Run(run_id)).await?.id, behind.after).await
}

async fn follow_turn(
    State(ui): State<Arc<Ui>>,
    _: Operator,
    Path((session_id, turn)): Path<(String, i64)>,
    Query(behind): Query<Behind>,
) -> Result<Response, Oops> {
    events::follow(&ui.app, &find(&ui.app, JobId::Turn { session_id, turn }).await?.id, behind.after).await
}

async fn cancel_run(State(ui): State<Arc<Ui>>, Path(run_id): Path<String>, _: Sent<Nothing>) -> Result<Response, Oops> {
    cancel(&ui.app, JobId::Run(run_id)).await
}

async fn cancel_turn(State(ui): State<Arc<Ui>>, Path((session_id, turn)): Path<(String, i64)>, _: Sent<Nothing>) -> Result<Response, Oops> {
    cancel(&ui.app, JobId::Turn { session_id, turn }).await
}

async fn cancel(app: &App, id: JobId) -> Result<Response, Oops> {
    let job = find(app, id).await?;
    app.jobs.cancel(&job).await?;
    tracing::info!(id = %job.id, "cancelled by the operator");
    Ok(Redirect::to(&path(&job.id)).into_response())
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new()
        .route("/ui/runs/{id}", get(show_run))
        .route("/ui/runs/{id}/events", get(follow_run))
        .route("/ui/runs/{id}/cancel", post(cancel_run))
        .route("/ui/sessions/{id}/turns/{turn}", get(show_turn))
        .route("/ui/sessions/{id}/turns/{turn}/events", get(follow_turn))
        .route("/ui/sessions/{id}/turns/{turn}/cancel", post(cancel_turn))
}
