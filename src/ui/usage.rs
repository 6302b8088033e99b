//! What was used, over time: plots, their numbers, and the same as CSV.

use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use maud::{Markup, html};
use serde::Deserialize;

use super::Ui;
use super::format::{count, day, duration, hour, read_day, usd};
use super::layout::{Oops, page};
use super::plot::{COLOURS, Plot, Series};
use super::runs::choice;
use super::sign_in::{Operator, encoded};
use crate::clock::{self, DAY};
use crate::ledger::{Group, Percentiles, UsageSlice, UsageWanted};

const HOUR: i64 = 3600;
/// Days that are shown by the hour, at most, and days at all.
const BY_THE_HOUR: i64 = 7;
const MOST_DAYS: i64 = 400;
const RANGES: [(&str, &str, i64); 4] = [("1", "24 hours", 1), ("7", "7 days", 7), ("30", "30 days", 30), ("90", "90 days", 90)];

/// What is asked for, as it stands in the address.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Filter {
    /// Days back from now, instead of `from` and `to`.
    days: String,
    from: String,
    to: String,
    by: String,
    slice: String,
    app: String,
    /// Of CSV: `times` for how long they took.
    of: String,
}

impl Filter {
    fn days(&self) -> Option<i64> {
        RANGES.into_iter().find(|(word, ..)| *word == self.days).map(|(_, _, days)| days)
    }

    fn wanted(&self) -> UsageWanted {
        let now = clock::now();
        let (from, to) = match (self.days(), read_day(&self.from)) {
            (None, Some(from)) => (from, read_day(&self.to).map_or(now, |day| day + DAY)),
            (days, _) => (now + 1 - days.unwrap_or(7) * DAY, now + 1),
        };
        let from = from.clamp(0, now).max(to - MOST_DAYS * DAY).min(to);
        let hours = to - from <= BY_THE_HOUR * DAY && self.slice != "day" && (self.slice == "hour" || to - from <= 2 * DAY);
        let slice = if hours { HOUR } else { DAY };
        let by = if self.by == "model" { Group::Model } else { Group::App };
        UsageWanted { app_name: Some(self.app.clone()).filter(|app| !app.is_empty()), from: from / slice * slice, to, slice, by }
    }

    /// The address of the same as CSV.
    fn csv(&self, of: &str) -> String {
        let Self { days, from, to, by, slice, app, .. } = self;
        let of = of.to_owned();
        let values = [("of", &of), ("days", days), ("from", from), ("to", to), ("by", by), ("slice", slice), ("app", app)];
        let given: Vec<_> =
            values.iter().filter(|(_, value)| !value.is_empty()).map(|(name, value)| format!("{name}={}", encoded(value))).collect();
        format!("/ui/usage.csv?{}", given.join("&"))
    }
}

async fn show(State(ui): State<Arc<Ui>>, operator: Operator, Query(filter): Query<Filter>) -> Result<Markup, Oops> {
    let wanted = filter.wanted();
    let apps: Vec<_> = ui.app.ledger.tokens().await?.into_iter().map(|token| token.name).collect();
    let (used, took) = ui.app.ledger.usage_over_time(wanted.clone()).await?;
    let main = html! {
        h1 { "Usage" }
        (form(&filter, &apps))
        p {
            "As CSV: " a href=(filter.csv("numbers")) download="usage.csv" { "what was used" } ", "
            a href=(filter.csv("times")) download="times.csv" { "how long it took" }
        }
        div.plots { (plots(&wanted, &used, &took)) }
    };
    Ok(page(&operator, "/ui/usage", "Usage", main))
}

fn form(filter: &Filter, apps: &[String]) -> Markup {
    let days = if filter.days().is_none() && filter.from.is_empty() { "7" } else { &filter.days };
    html! {
        form.filter method="get" action="/ui/usage" role="search" aria-label="Usage" {
            div {
                label for="days" { "Time" }
                select #days name="days" {
                    option value="" { "from … to …" }
                    @for (word, name, _) in RANGES { option value=(word) selected[word == days] { "the last " (name) } }
                }
            }
            div { label for="from" { "From" } input #from name="from" type="date" value=(filter.from); }
            div { label for="to" { "To" } input #to name="to" type="date" value=(filter.to); }
            div {
                label for="slice" { "In steps of" }
                select #slice name="slice" {
                    option value="" { "what fits" }
                    @for slice in ["hour", "day"] { option value=(slice) selected[slice == filter.slice] { "a " (slice) } }
                }
            }
            div {
                label for="by" { "By" }
                select #by name="by" { @for by in ["app", "model"] { option value=(by) selected[by == filter.by] { (by) } } }
            }
            (choice("app", "App", &filter.app, apps.iter().map(|app| (app.as_str(), app.as_str()))))
            div.buttons { button.main { "Show" } }
        }
    }
}

fn plots(wanted: &UsageWanted, used: &[UsageSlice], took: &[Percentiles]) -> Markup {
    let starts: Vec<i64> =
        std::iter::successors(Some(wanted.from), |at| Some(at + wanted.slice)).take_while(|at| *at < wanted.to).collect();
    let names: Vec<_> = starts.iter().map(|at| if wanted.slice == DAY { day(*at) } else { hour(*at) }).collect();
    let plot = |id, title, series: &[Series], say, stacked| Plot { id, title, slices: &names, series, say, stacked }.draw();
    let groups = groups(used);
    #[expect(clippy::cast_precision_loss, reason = "a plot")]
    let number = |number: i64| number as f64;
    let by_group = |value: &dyn Fn(&UsageSlice) -> f64| -> Vec<Series> {
        let in_group = |group: Option<&str>, slice: &UsageSlice| {
            group.map_or_else(|| !groups.contains(&Some(&slice.group)), |group| slice.group == group)
        };
        let series = |group: Option<&str>| {
            let at = |start: &i64| {
                used.iter().filter(|slice| slice.at == *start && in_group(group, slice)).map(value).reduce(|sum, one| sum + one)
            };
            let name = group.map_or("others", |group| if group.is_empty() { "none named" } else { group });
            Series { name: name.to_owned(), values: starts.iter().map(at).collect() }
        };
        groups.iter().copied().map(series).collect()
    };
    let of_all = |name: &str, value: &dyn Fn(&UsageSlice) -> i64| {
        let at = |start: &i64| used.iter().filter(|slice| slice.at == *start).map(value).reduce(|sum, one| sum + one).map(number);
        Series { name: name.to_owned(), values: starts.iter().map(at).collect() }
    };
    let percentile = |name: &str, value: &dyn Fn(&Percentiles) -> Option<i64>| {
        let at = |start: &i64| took.iter().find(|slice| slice.at == *start).and_then(value).map(number);
        Series { name: name.to_owned(), values: starts.iter().map(at).collect() }
    };
    let pair = |of: fn(&Percentiles) -> Option<(i64, i64)>| {
        [percentile("median", &|slice| Some(of(slice)?.0)), percentile("95th percentile", &|slice| Some(of(slice)?.1))]
    };
    let [failed, all] = [of_all("failed", &|slice| slice.failed), of_all("all", &|slice| slice.jobs)];
    let rate = failed.values.iter().zip(all.values).map(|(failed, all)| Some(100.0 * (*failed)? / all?)).collect();
    html! {
        (plot("jobs", "Runs and turns", &by_group(&|slice| number(slice.jobs)), |value| count(whole(value)), true))
        (plot("dollars", "Dollars, as the CLIs report them", &by_group(&|slice| slice.cost_usd), usd, true))
        (plot("tokens", "Tokens", &[
            of_all("read, not cached", &|slice| slice.input_tokens - slice.cached_tokens),
            of_all("read from the cache", &|slice| slice.cached_tokens),
            of_all("written", &|slice| slice.output_tokens),
        ], |value| count(whole(value)), true))
        (plot("group-tokens", "Tokens, read and written", &by_group(&|slice| number(slice.input_tokens + slice.output_tokens)), |value| count(whole(value)), true))
        (plot("duration", "How long they took", &pair(|slice| slice.duration), |value| duration(whole(value)), false))
        (plot("first-text", "Time to the first text", &pair(|slice| slice.first_text), |value| duration(whole(value)), false))
        (plot("errors", "How many failed, in percent", &[Series { name: "failed".to_owned(), values: rate }], |value| format!("{value:.1} %"), false))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "it was a whole number")]
fn whole(number: f64) -> i64 {
    number.round() as i64
}

/// The groups that have a colour of their own, those with the most first; `None` for all others together.
fn groups(used: &[UsageSlice]) -> Vec<Option<&str>> {
    let mut names: Vec<&str> = used.iter().map(|slice| slice.group.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let jobs = |name: &str| used.iter().filter(|slice| slice.group == name).map(|slice| slice.jobs).sum::<i64>();
    names.sort_by_key(|name| std::cmp::Reverse(jobs(name)));
    if names.len() <= COLOURS {
        return names.into_iter().map(Some).collect();
    }
    names.into_iter().take(COLOURS - 1).map(Some).chain([None]).collect()
}

async fn csv(State(ui): State<Arc<Ui>>, _: Operator, Query(filter): Query<Filter>) -> Result<Response, Oops> {
    let wanted = filter.wanted();
    let by = if wanted.by == Group::App { "app" } else { "model" };
    let (used, took) = ui.app.ledger.usage_over_time(wanted).await?;
    let mut text = String::new();
    if filter.of == "times" {
        text += "start_utc,median_ms,p95_ms,first_text_median_ms,first_text_p95_ms\r\n";
        for Percentiles { at, duration, first_text } in took {
            let both = |of: Option<(i64, i64)>| of.map_or_else(|| ",".to_owned(), |(median, high)| format!("{median},{high}"));
            let _ = write!(text, "{},{},{}\r\n", hour(at), both(duration), both(first_text));
        }
    } else {
        let _ = write!(text, "start_utc,{by},jobs,failed,input_tokens,cached_tokens,output_tokens,cost_usd\r\n");
        for UsageSlice { at, group, jobs, failed, input_tokens, cached_tokens, output_tokens, cost_usd } in used {
            let (at, group) = (hour(at), field(&group));
            let _ = write!(text, "{at},{group},{jobs},{failed},{input_tokens},{cached_tokens},{output_tokens},{cost_usd}\r\n");
        }
    }
    let headers = [(header::CONTENT_TYPE, "text/csv; charset=utf-8"), (header::CONTENT_DISPOSITION, "attachment; filename=\"usage.csv\"")];
    Ok((headers, text).into_response())
}

/// A text as RFC 4180 has it. A client names its model, and a sheet takes what begins so for a formula.
fn field(text: &str) -> String {
    let text = if text.starts_with(['=', '+', '-', '@']) { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\r', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

pub(super) fn routes() -> Router<Arc<Ui>> {
    Router::new().route("/ui/usage", get(show)).route("/ui/usage.csv", get(csv))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_by_the_hour_where_that_can_be_read() {
        let slice = |days: &str, slice: &str| Filter { days: days.to_owned(), slice: slice.to_owned(), ..Filter::default() }.wanted().slice;
        assert_eq!(
            [slice("1", ""), slice("7", ""), slice("7", "hour"), slice("30", "hour"), slice("1", "day")],
            [HOUR, DAY, HOUR, DAY, DAY]
        );
        let named = Filter { from: "2026-11-01".to_owned(), to: "2026-11-02".to_owned(), ..Filter::default() }.wanted();
        assert_eq!((named.to - named.from, named.slice), (2 * DAY, HOUR));
        let backwards = Filter { from: "2026-11-02".to_owned(), to: "2026-10-01".to_owned(), ..Filter::default() }.wanted();
        assert!(backwards.from <= backwards.to);
    }

    #[test]
    fn the_smallest_groups_share_a_colour() {
        let slice = |group: i64| UsageSlice {
            at: 0,
            group: group.to_string(),
            jobs: group,
            failed: 0,
            input_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            cost_usd: 0.0,
        };
        let used: Vec<_> = (1..=9).map(slice).collect();
        assert_eq!(groups(&used), [Some("9"), Some("8"), Some("7"), Some("6"), Some("5"), Some("4"), Some("3"), None]);
        assert_eq!(groups(&used[..8]).len(), 8);
    }

    #[test]
    fn a_field_is_no_formula_and_no_two_fields() {
        assert_eq!([field("sonnet"), field("=1+1"), field("a,\"b\"")], ["sonnet", "'=1+1", "\"a,\"\"b\"\"\""]);
    }
}
