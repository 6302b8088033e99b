//! The runs: filtered, newest first, a page at a time.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::routing::get;
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::format::{duration, line, made_by, or_none, path, read_day, status, usd, when};
use super::layout::{Oops, page};
use super::sign_in::{Operator, encoded};
use crate::clock;
use crate::ledger::{JobRow, RunsWanted, Status};

const AT_ONCE: u32 = 50;

/// What is asked for, as it stands in the address; what is empty or makes no sense is not asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Filter {
    app: String,
    status: String,
    model: String,
    text: String,
    from: String,
    to: String,
    seconds: String,
    usd: String,
    before: String,
}

impl Filter {
    fn wanted(&self) -> RunsWanted {
        let given = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        #[expect(clippy::cast_possible_truncation, reason = "out of range it saturates")]
        let ms = |secs: f64| (secs * 1000.0) as i64;
        RunsWanted {
            app_name: given(&self.app),
            before: given(&self.before),
            status: self.status.parse().ok(),
            model: given(&self.model),
            text: given(&self.text),
            from: read_day(&self.from),
            to: read_day(&self.to).map(|day| day + clock::DAY),
            at_least_ms: self.seconds.parse().ok().map(ms),
            at_least_usd: self.usd.parse().ok(),
            limit: AT_ONCE + 1,
            characters: 120,
        }
    }

    /// The address of the runs that are older than this one.
    fn older_than(&self, id: &str) -> String {
        let Self { app, status, model, text, from, to, seconds, usd, .. } = self;
        let values = [
            ("app", app),
            ("status", status),
            ("model", model),
            ("text", text),
            ("from", from),
            ("to", to),
            ("seconds", seconds),
            ("usd", usd),
        ];
        let given = values.iter().filter(|(_, value)| !value.is_empty());
        given.fold(format!("/ui/runs?before={id}"), |address, (name, value)| format!("{address}&{name}={}", encoded(value)))
    }
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator, Query(filter): Query<Filter>) -> Result<Markup, Oops> {
    let mut runs = ui.app.ledger.runs(filter.wanted()).await?;
    let older = (runs.len() > AT_ONCE as usize).then(|| {
        runs.truncate(AT_ONCE as usize);
        filter.older_than(&runs[runs.len() - 1].id.to_string())
    });
    let apps = ui.app.ledger.tokens().await?.into_iter().map(|token| token.name);
    let main = html! {
        h1 { "Runs" }
        (form(&filter, apps.collect()))
        (table(&runs))
        nav.pager aria-label="Older and newer runs" {
            @if !filter.before.is_empty() { a href="/ui/runs" { "Newest" } }
            @if let Some(older) = older { a href=(older) rel="next" { "Older" } }
        }
    };
    Ok(page(&operator, "/ui/runs", "Runs", main))
}

fn form(filter: &Filter, apps: Vec<String>) -> Markup {
    let field = |name: &str, label: &str, kind: &str, value: &str| {
        html! { div { label for=(name) { (label) } input id=(name) name=(name) type=(kind) value=(value); } }
    };
    html! {
        form.filter method="get" action="/ui/runs" role="search" aria-label="Runs" {
            (choice("app", "App", &filter.app, apps.iter().map(|app| (app.as_str(), app.as_str()))))
            (choice("status", "Status", &filter.status, Status::ALL.iter().map(|status| (status.as_str(), status.as_str()))))
            (field("model", "Model", "text", &filter.model))
            (field("text", "Text of the prompt", "search", &filter.text))
            (field("from", "From", "date", &filter.from))
            (field("to", "To", "date", &filter.to))
            (field("seconds", "Took at least, seconds", "text", &filter.seconds))
            (field("usd", "Cost at least, dollars", "text", &filter.usd))
            div.buttons { button.main { "Filter" } " " a href="/ui/runs" { "All" } }
        }
    }
}

/// A choice among words, or none.
pub(super) fn choice<'a>(name: &str, label: &str, chosen: &str, words: impl Iterator<Item = (&'a str, &'a str)>) -> Markup {
    html! {
        div {
            label for=(name) { (label) }
            select id=(name) name=(name) {
                option value="" { "any" }
                @for (word, said) in words { option value=(word) selected[word == chosen] { (said) } }
            }
        }
    }
}

fn table(runs: &[JobRow]) -> Markup {
    html! {
        @if runs.is_empty() { p.hint { "There are no such runs." } } @else {
            div.scroll tabindex="0" role="group" aria-label="Runs" {
                table {
                    thead {
                        tr {
                            th scope="col" { "Started" } th scope="col" { "Status" } th scope="col" { "App" } th scope="col" { "Model" }
                            th scope="col" { "Prompt" } th.number scope="col" { "Took" } th.number scope="col" { "Cost" }
                        }
                    }
                    tbody {
                        @for run in runs {
                            @let end = run.finished.as_ref().map(|(_, end)| end);
                            tr {
                                td.time { (when(run.started_at)) } td { (status(run.status)) } td { (run.app_name) } td { (made_by(run)) }
                                td.wide { a href=(path(&run.id)) { @if run.prompt.trim().is_empty() { "(nothing)" } @else { (line(&run.prompt, 100)) } } }
                                td.number { (or_none(end.map(|end| duration(end.duration_ms)))) }
                                td.number { (or_none(end.and_then(|end| end.cost_usd).map(usd))) }
                            }
                        }
                    }
                }
            }
        }
    }
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui/runs", get(show))
}
