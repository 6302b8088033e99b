//! What was used: sums over the tables `runs` and `session_events`.

use rusqlite::{Connection, Row, params};

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

/// What usage is grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The app.
    App,
    /// The model.
    Model,
}

/// Of which time usage is wanted, and how it is divided.
#[derive(Clone, Debug)]
pub struct UsageWanted {
    /// Of this app; of all where there is none.
    pub app_name: Option<String>,
    /// Unix seconds.
    pub from: i64,
    /// Unix seconds, not included.
    pub to: i64,
    /// Seconds of a slice; slices begin at multiples of it.
    pub slice: i64,
    /// What each slice is grouped by.
    pub by: Group,
}

/// What a group used in a slice of time.
#[derive(Clone, Debug, PartialEq)]
pub struct UsageSlice {
    /// Unix seconds of its beginning.
    pub at: i64,
    /// The app, or the model; that is empty where none was named.
    pub group: String,
    /// Runs and turns that ended.
    pub jobs: i64,
    /// Of them, those that failed or whose time was up.
    pub failed: i64,
    /// Tokens read, those from the cache included.
    pub input_tokens: i64,
    /// Of them, those from the cache.
    pub cached_tokens: i64,
    /// Tokens written.
    pub output_tokens: i64,
    /// US dollars, as the CLIs report them.
    pub cost_usd: f64,
}

/// How long runs and turns took in a slice of time, in milliseconds: the median and the 95th percentile, each by the nearest rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentiles {
    /// Unix seconds of its beginning.
    pub at: i64,
    /// From start to end, of those that succeeded.
    pub duration: Option<(i64, i64)>,
    /// From start to the first text.
    pub first_text: Option<(i64, i64)>,
}

/// Runs and turns that ended, of one app or of all, which began from one time to another.
const ENDED: &str = "
    SELECT started_at, app_name, model, 1 AS run, ok, status, duration_ms, first_text_ms, input_tokens, cached_tokens, output_tokens, cost_usd
    FROM runs WHERE (?1 IS NULL OR app_name = ?1) AND finished_at IS NOT NULL AND started_at >= ?2 AND started_at < ?3
    UNION ALL
    SELECT started_at, app_name, coalesce(model, ''), 0, ok, status, duration_ms, first_text_ms, input_tokens, cached_tokens, output_tokens, cost_usd
    FROM session_events
    WHERE (?1 IS NULL OR app_name = ?1) AND event = 'turn' AND finished_at IS NOT NULL AND started_at >= ?2 AND started_at < ?3";

impl Ledger {
    /// What an app, or every app, used of what began from `from` and before `to`, in Unix seconds; newest day first.
    pub async fn usage(&self, app_name: Option<String>, from: i64, to: i64) -> Result<Vec<UsageRow>, Error> {
        self.look_through(move |db| {
            // One plan for each: an index is used.
            let ended = ENDED.replace("(?1 IS NULL OR app_name = ?1)", if app_name.is_some() { "app_name = ?1" } else { "?1 IS NULL" });
            db.prepare_cached(&format!(
                "SELECT date(started_at, 'unixepoch') AS day, app_name, model, sum(run), sum(1 - run),
                     coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), total(cost_usd)
                 FROM ({ended}) GROUP BY day, app_name, model ORDER BY day DESC, app_name, model"
            ))?
            .query_map(params![app_name, from, to], row)?
            .collect()
        })
        .await
    }

    /// What was used, in slices of time: by group, and how long it took; each oldest first. A slice in which nothing ended is left out.
    pub async fn usage_over_time(&self, wanted: UsageWanted) -> Result<(Vec<UsageSlice>, Vec<Percentiles>), Error> {
        self.look_through(move |db| {
            let UsageWanted { app_name, from, to, slice, by } = wanted;
            let group = match by {
                Group::App => "app_name",
                Group::Model => "model",
            };
            let slices = db
                .prepare_cached(&format!(
                    "SELECT started_at / ?4 * ?4 AS at, {group} AS by, count(*), sum(status IN ('failed', 'timed_out')),
                         coalesce(sum(input_tokens), 0), coalesce(sum(cached_tokens), 0), coalesce(sum(output_tokens), 0), total(cost_usd)
                     FROM ({ENDED}) GROUP BY at, by ORDER BY at, by"
                ))?
                .query_map(params![app_name, from, to, slice], slice_at)?
                .collect::<Result<Vec<_>, _>>()?;
            let mut percentiles: Vec<Percentiles> = Vec::new();
            for (column, is_first_text) in [("duration_ms", false), ("first_text_ms", true)] {
                for found in ranked(db, column, params![app_name, from, to, slice])? {
                    let (at, both) = found;
                    let known = match percentiles.binary_search_by_key(&at, |one| one.at) {
                        Ok(known) => &mut percentiles[known],
                        Err(place) => {
                            percentiles.insert(place, Percentiles { at, duration: None, first_text: None });
                            &mut percentiles[place]
                        }
                    };
                    *(if is_first_text { &mut known.first_text } else { &mut known.duration }) = Some(both);
                }
            }
            Ok((slices, percentiles))
        })
        .await
    }
}

/// The median and the 95th percentile of a column in each slice of time.
fn ranked(db: &Connection, column: &str, parameters: &[&dyn rusqlite::ToSql]) -> rusqlite::Result<Vec<(i64, (i64, i64))>> {
    db.prepare_cached(&format!(
        "SELECT at, min(ms) FILTER (WHERE place = (count * 50 + 99) / 100), min(ms) FILTER (WHERE place = (count * 95 + 99) / 100)
         FROM (
             SELECT at, ms, row_number() OVER (PARTITION BY at ORDER BY ms) AS place, count(*) OVER (PARTITION BY at) AS count
             FROM (SELECT started_at / ?4 * ?4 AS at, {column} AS ms FROM ({ENDED}) WHERE ok AND {column} IS NOT NULL)
         )
         GROUP BY at ORDER BY at"
    ))?
    .query_map(parameters, |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?
    .collect()
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

fn slice_at(row: &Row<'_>) -> rusqlite::Result<UsageSlice> {
    Ok(UsageSlice {
        at: row.get(0)?,
        group: row.get(1)?,
        jobs: row.get(2)?,
        failed: row.get(3)?,
        input_tokens: row.get(4)?,
        cached_tokens: row.get(5)?,
        output_tokens: row.get(6)?,
        cost_usd: row.get(7)?,
    })
}
