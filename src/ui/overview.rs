//! What there is to see at a glance: is it well, who uses it, what goes on, what went wrong.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::Response;
use axum::routing::get;
use futures_util::stream;
use maud::{Markup, html};
use tokio::time::sleep;

use super::Ui;
use super::events::frame;
use super::format::{advice, bytes, count, line, made_by, or_none, path, status, usd, when};
use super::layout::{Oops, page};
use super::sign_in::Operator;
use crate::agent::claude::sign_in::is_about_sign_in;
use crate::agent::programs::Known;
use crate::api::stream::response;
use crate::api::workers;
use crate::app::App;
use crate::blocking::blocking;
use crate::clock;
use crate::job::queue::Places;
use crate::ledger::{JobRow, RunsWanted, UsageRow, WorkerRow};

/// How often a page that is live is looked at anew.
const LOOK: Duration = Duration::from_secs(1);
/// After how many looks without a change something is sent, so that a connection is not taken for dead.
const BEAT: u32 = 15;
/// Below so many bytes the disk is nearly full.
const LITTLE: u64 = 1 << 30;

/// A part of a page that is sent anew whenever it changes, for as long as that goes on.
pub(super) fn live<F: Future<Output = Result<Markup, Oops>> + Send>(
    render: impl Fn() -> F + Send + Sync + 'static,
    goes_on: impl Fn() -> bool + Send + Sync + 'static,
) -> Response {
    let pieces = stream::unfold((render, goes_on, String::new(), 0), async |(render, goes_on, last, mut beats)| {
        loop {
            if !goes_on() {
                return None;
            }
            let now = render().await.ok()?.into_string();
            if now != last {
                let frame = frame("html", None, &now);
                return Some((Ok::<_, Infallible>(Bytes::from(frame)), (render, goes_on, now, 0)));
            }
            sleep(LOOK).await;
            beats += 1;
            if beats >= BEAT {
                return Some((Ok(Bytes::from_static(b":\n\n")), (render, goes_on, last, 0)));
            }
        }
    });
    response(Body::from_stream(pieces))
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator) -> Result<Markup, Oops> {
    let main = html! {
        h1 { "Overview" }
        div data-live="/ui/live" { (body(&ui.app).await?) }
    };
    Ok(page(&operator, "/ui", "Overview", main))
}

async fn follow(State(ui): State<Arc<Ui>>, operator: Operator) -> Response {
    let (app, signed) = (ui.app.clone(), ui);
    live(
        move || {
            let app = app.clone();
            async move { body(&app).await }
        },
        move || signed.may_follow(&operator),
    )
}

/// Whether claude's sign-in works, by the runs that ended last.
enum SignInState {
    Works(i64),
    Fails(i64, String),
    Unknown,
}

async fn sign_in_state(app: &App) -> Result<SignInState, Oops> {
    let wanted = RunsWanted { limit: 50, ..RunsWanted::default() };
    for JobRow { agent, finished, .. } in app.ledger.runs(wanted).await? {
        let Some((at, end)) = finished.filter(|_| agent.as_deref() == Some("claude")) else { continue };
        match end.error {
            _ if end.ok => return Ok(SignInState::Works(at)),
            Some(error) if is_about_sign_in(&error) => return Ok(SignInState::Fails(at, error)),
            _ => {}
        }
    }
    Ok(SignInState::Unknown)
}

async fn free(app: &App) -> Result<u64, Oops> {
    let folder = app.data_dir.clone();
    let found = blocking(move || Ok(rustix::fs::statvfs(&folder)?)).await?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

async fn body(app: &App) -> Result<Markup, Oops> {
    let (places, sign_in, free) = (app.jobs.places(), sign_in_state(app).await?, free(app).await?);
    let (going_on, in_batches) = (app.ledger.going_on(120).await?, app.ledger.waiting_of_batches().await?);
    let wrong = app.ledger.gone_wrong(clock::now() - clock::DAY, 8, 0).await?;
    let week = app.ledger.usage(None, clock::midnight() - 6 * clock::DAY, clock::now() + 1).await?;
    Ok(html! {
        (troubles(app, &sign_in, free))
        (figures(app, &places, free, in_batches))
        div.columns {
            section { h2 { "Going on now" } (now(&going_on)) }
            section { h2 { "Apps at work" } (by_app(&places)) }
        }
        section { h2 { "Used" } (used(&week)) }
        section { h2 { "What went wrong in the last 24 hours" } (errors(&wrong)) }
        @if app.elsewhere.is_some() { section { h2 { "Machines" } (machines(&workers::known(app).await?)) } }
        section { h2 { "Programs" } (programs(app, &sign_in)) }
    })
}

/// What the operator should do something about.
fn troubles(app: &App, sign_in: &SignInState, free: u64) -> Markup {
    let mut troubles = Vec::new();
    let claude = app.claude.known();
    if let Some(elsewhere) = &app.elsewhere
        && !elsewhere.is_connected()
    {
        troubles.push("NATS can't be reached: no work goes to other machines until it is back.".to_owned());
    }
    // Where others make the runs, it may well be missing here.
    if !claude.present && app.elsewhere.is_none() {
        troubles.push("The claude CLI is not installed: no run can be made. clawdforge doctor says how to install it.".to_owned());
    }
    if let SignInState::Fails(_, error) = sign_in {
        troubles.push(format!("claude is not signed in (\"{}\"). {}", line(error, 120), advice(error, crate::ledger::Status::Failed)));
    }
    if free < LITTLE {
        troubles.push(format!("Only {} are left on the data folder's disk.", bytes(free)));
    }
    if app.sandbox == "off" {
        troubles.push("Agents are not shut out of the data folder and the home; clawdforge doctor says why.".to_owned());
    }
    if claude.version.is_some() && !claude.tested {
        troubles.push(
            "This release was not tested with the installed version of claude; clawdforge doctor names those that it was.".to_owned(),
        );
    }
    html! {
        @if troubles.is_empty() {
            p.notice.good { "All is well." }
        } @else {
            ul.notice.bad { @for trouble in troubles { li { (trouble) } } }
        }
    }
}

fn figures(app: &App, places: &Places, free: u64, in_batches: i64) -> Markup {
    let waiting: usize = places.apps.iter().map(|app| app.waiting).sum();
    let figure = |name: &str, value: String, hint: &str| html! { div { dt { (name) } dd { strong { (value) } " " span.hint { (hint) } } } };
    html! {
        dl.figures {
            (figure("Runs at once", format!("{} of {}", places.taken, places.all), "places taken"))
            (figure("Waiting", waiting.to_string(), "for a place"))
            @if in_batches > 0 { (figure("Batches", count(in_batches), "runs that wait")) }
            (figure("Sessions", app.sessions.open().to_string(), "open"))
            (figure("Standbys", app.jobs.standbys().to_string(), "started ahead of need"))
            (figure("Disk", bytes(free), "left"))
        }
    }
}

fn now(jobs: &[JobRow]) -> Markup {
    html! {
        @if jobs.is_empty() { p.hint { "Nothing." } } @else {
            ul.list {
                @for job in jobs.iter().take(20) {
                    li { (status(job.status)) " " a href=(path(&job.id)) { (line(&job.prompt, 60)) } span.hint { " " (job.app_name) " · " (made_by(job)) " · since " (when(job.started_at)) } }
                }
                @if jobs.len() > 20 { li.hint { "and " (jobs.len() - 20) " more" } }
            }
        }
    }
}

fn by_app(places: &Places) -> Markup {
    html! {
        @if places.apps.is_empty() { p.hint { "None." } } @else {
            table {
                thead { tr { th scope="col" { "App" } th.number scope="col" { "Runs" } th.number scope="col" { "Turns" } th.number scope="col" { "Waiting" } } }
                tbody {
                    @for app in &places.apps {
                        tr { th scope="row" { a href={ "/ui/apps/" (app.app) } { (app.app) } } td.number { (app.runs) } td.number { (app.turns) } td.number { (app.waiting) } }
                    }
                }
            }
        }
    }
}

fn used(week: &[UsageRow]) -> Markup {
    let today = super::format::day(clock::now());
    let row = |name: &str, rows: Vec<&UsageRow>| {
        let sum = |of: fn(&UsageRow) -> i64| count(rows.iter().copied().map(of).sum());
        html! {
            tr {
                th scope="row" { (name) }
                td.number { (sum(|row| row.runs)) } td.number { (sum(|row| row.turns)) }
                // Not by sum(): that of nothing is -0.0.
                td.number { (usd(rows.iter().fold(0.0, |sum, row| sum + row.cost_usd))) }
                td.number { (sum(|row| row.input_tokens)) } td.number { (sum(|row| row.output_tokens)) }
            }
        }
    };
    html! {
        div.scroll tabindex="0" role="group" aria-label="Used" {
            table {
                thead {
                    tr {
                        td {} th.number scope="col" { "Runs" } th.number scope="col" { "Turns" } th.number scope="col" { "Dollars" }
                        th.number scope="col" { "Tokens in" } th.number scope="col" { "Tokens out" }
                    }
                }
                tbody {
                    (row("Today", week.iter().filter(|row| row.day == today).collect()))
                    (row("Last 7 days", week.iter().collect()))
                }
            }
        }
        p { a href="/ui/usage" { "More of what was used" } }
    }
}

fn errors(wrong: &[JobRow]) -> Markup {
    html! {
        @if wrong.is_empty() { p.hint { "Nothing." } } @else {
            ul.list {
                @for job in wrong {
                    @let error = job.finished.as_ref().and_then(|(_, end)| end.error.clone()).unwrap_or_default();
                    li {
                        (status(job.status)) " " a href=(path(&job.id)) { (line(&error, 160)) } span.hint { " " (job.app_name) " · " (when(job.started_at)) }
                        p.advice { (advice(&error, job.status)) }
                    }
                }
            }
            p { a href="/ui/runs?status=failed" { "All runs that failed" } }
        }
    }
}

fn machines(known: &[(WorkerRow, bool)]) -> Markup {
    html! {
        @if known.is_empty() { p.hint { "None has been heard of. " code { "clawdforge worker" } " on another machine makes one." } } @else {
            div.scroll tabindex="0" role="group" aria-label="Machines" {
                table {
                    thead {
                        tr {
                            th scope="col" { "Machine" } th scope="col" { "Seen" } th.number scope="col" { "Places" } th.number scope="col" { "Runs" }
                            th.number scope="col" { "Turns" } th.number scope="col" { "Sessions" } th scope="col" { "Version" }
                        }
                    }
                    tbody {
                        @for (worker, here) in known {
                            tr {
                                th scope="row" { (worker.name) }
                                td { @if *here { "now" } @else { strong { "away" } " since " (when(worker.seen_at)) } }
                                td.number { (worker.places) } td.number { (worker.runs) } td.number { (worker.turns) } td.number { (worker.sessions) }
                                td { (worker.version) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn programs(app: &App, sign_in: &SignInState) -> Markup {
    let row = |name: &str, known: Known, sign_in: Markup| {
        html! {
            tr {
                th scope="row" { (name) }
                td { @if known.present { (or_none(known.version.clone())) } @else { "not installed" } }
                td { @if !known.present { "–" } @else if known.tested { "yes" } @else { "no" } }
                td { (sign_in) }
            }
        }
    };
    let claude = match sign_in {
        SignInState::Works(at) => html! { "worked at " (when(*at)) },
        SignInState::Fails(at, _) => html! { strong { "failed" } " at " (when(*at)) },
        SignInState::Unknown => html! { "no run has shown it yet" },
    };
    html! {
        div.scroll tabindex="0" role="group" aria-label="Programs" {
            table {
                thead { tr { th scope="col" { "Program" } th scope="col" { "Version" } th scope="col" { "Tested with it" } th scope="col" { "Sign-in" } } }
                tbody {
                    (row("claude", app.claude.known(), claude))
                    (row("claude-agent-acp", app.adapter.known(), html! { "–" }))
                    (row("acpx", app.acpx.known(), html! { "–" }))
                    @for other in &app.others {
                        (row(other.kind.name, other.cli.known(), html! { @if other.kind.is_signed_in(&other.environment) { "there is one" } @else { "none" } }))
                    }
                }
            }
        }
    }
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui", get(show)).route("/ui/live", get(follow))
}
