//! Numbers, times and statuses, as people read them.

use maud::{Markup, html};
use time::{Date, Month, OffsetDateTime};

use crate::agent::claude::sign_in::is_about_sign_in;
use crate::ledger::{JobId, JobRow, Status};

/// A time in Unix seconds. The script says it in the reader's own zone.
pub(super) fn when(at: i64) -> Markup {
    let Ok(time) = OffsetDateTime::from_unix_timestamp(at) else { return html! { "–" } };
    let (date, hour, minute, second) = (time.date(), time.hour(), time.minute(), time.second());
    html! {
        time datetime=(format!("{date}T{hour:02}:{minute:02}:{second:02}Z")) { (format!("{date} {hour:02}:{minute:02}:{second:02}")) }
    }
}

/// The day of a time in Unix seconds, `2026-11-27`.
pub(super) fn day(at: i64) -> String {
    OffsetDateTime::from_unix_timestamp(at).map_or_else(|_| "–".to_owned(), |time| time.date().to_string())
}

/// The day and hour of a time in Unix seconds, `2026-11-27 16:00`.
pub(super) fn hour(at: i64) -> String {
    OffsetDateTime::from_unix_timestamp(at).map_or_else(|_| "–".to_owned(), |time| format!("{} {:02}:00", time.date(), time.hour()))
}

/// The beginning in Unix seconds of a day in UTC that a person named, `2026-11-27`.
pub(super) fn read_day(text: &str) -> Option<i64> {
    let mut parts = text.splitn(3, '-');
    let year = parts.next()?.parse().ok()?;
    let month = Month::try_from(parts.next()?.parse::<u8>().ok()?).ok()?;
    let date = Date::from_calendar_date(year, month, parts.next()?.parse().ok()?).ok()?;
    Some(date.midnight().assume_utc().unix_timestamp())
}

/// Milliseconds as people say them.
pub(super) fn duration(ms: i64) -> String {
    match ms {
        ..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// US dollars.
pub(super) fn usd(usd: f64) -> String {
    let of_cents = (usd * 100.0 - (usd * 100.0).round()).abs() < 1e-6;
    if of_cents || usd >= 1.0 { format!("${usd:.2}") } else { format!("${usd:.4}") }
}

/// A whole number, with commas.
pub(super) fn count(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = if number < 0 { "-".to_owned() } else { String::new() };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes.
#[expect(clippy::cast_precision_loss, reason = "one digit behind the point is shown")]
pub(super) fn bytes(bytes: u64) -> String {
    match bytes {
        ..1_048_576 => format!("{} KiB", bytes >> 10),
        1_048_576..1_073_741_824 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// Or that there is none.
pub(super) fn or_none(text: Option<String>) -> String {
    text.unwrap_or_else(|| "–".to_owned())
}

/// A status, as a word with a colour.
pub(super) fn status(status: Status) -> Markup {
    let class = match status {
        Status::Queued => "waits",
        Status::Running => "live",
        Status::Succeeded => "good",
        Status::Failed | Status::TimedOut | Status::Interrupted => "bad",
        Status::Cancelled => "quiet",
    };
    html! { span class={ "status " (class) } { (status.as_str().replace('_', " ")) } }
}

/// Where a job is shown.
pub(super) fn path(id: &JobId) -> String {
    match id {
        JobId::Run(run_id) => format!("/ui/runs/{run_id}"),
        JobId::Turn { session_id, turn } => format!("/ui/sessions/{session_id}/turns/{turn}"),
    }
}

/// Who makes a job: its model, or else its agent, and on which machine, where that is not the server's own.
pub(super) fn made_by(job: &JobRow) -> String {
    let worker = job.worker.as_ref().map(|worker| format!(" on {worker}")).unwrap_or_default();
    let agent = job.agent.as_deref().filter(|agent| *agent != "claude");
    let by = match (agent, &job.model) {
        (Some(agent), Some(model)) => format!("{agent} · {model}"),
        (Some(agent), None) => agent.to_owned(),
        (None, Some(model)) => model.clone(),
        (None, None) => "claude".to_owned(),
    };
    by + &worker
}

/// A text in a line, as much of it as there is room for.
pub(super) fn line(text: &str, most: usize) -> String {
    let mut chars = text.chars().map(|c| if c.is_whitespace() || c.is_control() { ' ' } else { c });
    let line: String = chars.by_ref().take(most).collect();
    if chars.next().is_some() { line + "…" } else { line }
}

/// What to do about an error.
pub(super) fn advice(error: &str, status: Status) -> &'static str {
    let error = error.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| error.contains(word));
    if is_about_sign_in(&error) {
        "Sign in again: run claude where the server runs (docker compose exec clawdforge claude), then /login."
    } else if says(&["not installed"]) {
        "Install the program where the server runs; clawdforge doctor says how."
    } else if says(&["disk is full", "no space", "storage"]) {
        "Free some space on the data folder's disk."
    } else if says(&["rate limit", "429", "usage limit", "overloaded"]) {
        "The model's limit is reached: wait, or give the busiest app a budget."
    } else if says(&["memory"]) {
        "It took more memory than CLAWDFORGE_AGENT_MEMORY_MB allows."
    } else if status == Status::TimedOut {
        "Its time was up: let the app ask for more (timeout_secs), or look at what it was doing."
    } else if status == Status::Interrupted {
        "The server ended meanwhile; the app can send it again."
    } else {
        "Open it to see what it did."
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_said_as_people_read_them() {
        assert_eq!([count(0), count(999), count(1000), count(-1_234_567)], ["0", "999", "1,000", "-1,234,567"]);
        assert_eq!(
            [duration(830), duration(12_450), duration(185_000), duration(7_260_000)],
            ["830 ms", "12.4 s", "3 min 5 s", "2 h 1 min"]
        );
        assert_eq!([usd(0.0), usd(0.0123), usd(0.5), usd(12.345)], ["$0.00", "$0.0123", "$0.50", "$12.35"]);
        assert_eq!(line("a\nb\tc", 4), "a b …");
    }

    #[test]
    fn a_day_is_read_as_it_is_written() {
        assert_eq!(read_day("1970-01-02"), Some(86_400));
        assert_eq!(read_day(&day(1_795_795_203)), Some(1_795_795_203 / 86_400 * 86_400));
        assert_eq!(hour(1_795_795_203), "2026-11-27 16:00");
        for wrong in ["", "2026", "2026-13-01", "2026-02-30", "a-b-c"] {
            assert_eq!(read_day(wrong), None, "{wrong}");
        }
    }
}
