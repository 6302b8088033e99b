//! What was used: sums over the tables `runs` and `session_events`.

use rusqlite::{Row, params};

use super::db::Ledger;
use super::error::Error;

/// What an app used of a model on a day.
#[derive(Clone, Debug)]
pub struct UsageRow {
    /// `2026-11-21`, in UTC.
    pub day: String,
    /// The app's token name.
    pub app_name: String,
    /// The model; empty for turns of sessions that named none.
    pub model: String,
    /// Runs that ended.
    pub runs: i64,
    /// Turns that ended.
    pub turns: i64,
    /// Tokens read, those from the cache included.
    pub input_tokens: i64,
    /// Tokens written.
    pub output_tokens: i64,
    /// US dollars, as the CLIs report them.
    pub cost_usd: f64,
}

impl Ledger {
    /// What an app, or every app, used of what began from `from` and before `to`, in Unix seconds; newest day first.
    pub async fn usage(&self, app_name: Option<String>, from: i64, to: i64) -> Result<Vec<UsageRow>, Error> {
        self.look_through(move |db| {
            let of_app = if app_name.is_some() { "app_name = ?1" } else { "?1 IS NULL" };
            db.prepare_cached(&format!(
                "SELECT date(started_at, 'unixepoch') AS day, app_name, model, sum(run), sum(1 - run),
                     coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), total(cost_usd)
                 FROM (
                     SELECT started_at, app_name, model, 1 AS run, input_tokens, output_tokens, cost_usd FROM runs
                     WHERE {of_app} AND finished_at IS NOT NULL AND started_at >= ?2 AND started_at < ?3
                     UNION ALL
                     SELECT started_at, app_name, coalesce(model, ''), 0, input_tokens, output_tokens, cost_usd FROM session_events
                     WHERE {of_app} AND event = 'turn' AND finished_at IS NOT NULL AND started_at >= ?2 AND started_at < ?3
                 )
                 GROUP BY day, app_name, model ORDER BY day DESC, app_name, model"
            ))?
            .query_map(params![app_name, from, to], row)?
            .collect()
        })
        .await
    }
}

fn row(row: &Row<'_>) -> rusqlite::Result<UsageRow> {
    Ok(UsageRow {
        day: row.get(0)?,
        app_name: row.get(1)?,
        model: row.get(2)?,
        runs: row.get(3)?,
        turns: row.get(4)?,
        input_tokens: row.get(5)?,
        output_tokens: row.get(6)?,
        cost_usd: row.get(7)?,
    })
}
