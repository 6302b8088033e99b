//! Runs, turns and sessions in lists.

use rusqlite::types::Value;
use rusqlite::{Connection, params};

use super::db::Ledger;
use super::error::Error;
use super::job::{COLUMNS, JobId, JobRow, job_row};
use super::sessions::{self, Session, session_at};
use super::status::Status;

/// Which runs are wanted.
#[derive(Clone, Debug, Default)]
pub struct RunsWanted {
    /// Of this app; of all where there is none.
    pub app_name: Option<String>,
    /// Older than the run of this id.
    pub before: Option<String>,
    /// Of this status.
    pub status: Option<Status>,
    /// That asked for this model.
    pub model: Option<String>,
    /// With this in the prompt, whatever the case of ASCII's letters.
    pub text: Option<String>,
    /// That began at this time or later, in Unix seconds.
    pub from: Option<i64>,
    /// That began before this time, in Unix seconds.
    pub to: Option<i64>,
    /// That took so many milliseconds or more.
    pub at_least_ms: Option<i64>,
    /// That cost so many US dollars or more.
    pub at_least_usd: Option<f64>,
    /// At most so many.
    pub limit: u32,
    /// Characters of prompts and results.
    pub characters: u32,
}

/// Which sessions are wanted.
#[derive(Clone, Debug, Default)]
pub struct SessionsWanted {
    /// Of this app; of all where there is none.
    pub app_name: Option<String>,
    /// Whether they are open.
    pub open: Option<bool>,
    /// Older than the session of this id.
    pub before: Option<String>,
    /// At most so many.
    pub limit: u32,
}

/// What happened in a session.
#[derive(Clone, Debug)]
pub struct Step {
    /// `create`, `turn`, `permission`, `close` and the like.
    pub event: String,
    /// Unix seconds.
    pub at: i64,
    /// The turn, of one.
    pub turn: Option<JobRow>,
    /// What was asked, of a permission: the message.
    pub asked: Option<String>,
    /// What it was answered with, and by whom.
    pub answered: Option<(Option<String>, String)>,
}

impl Ledger {
    /// Runs, newest first.
    pub async fn runs(&self, wanted: RunsWanted) -> Result<Vec<JobRow>, Error> {
        self.look_through(move |db| {
            let RunsWanted { app_name, before, status, model, text, from, to, at_least_ms, at_least_usd, limit, characters } = wanted;
            let mut conditions = vec!["true"];
            let mut values: Vec<(&str, Value)> = vec![(":characters", i64::from(characters).into()), (":limit", i64::from(limit).into())];
            // Only what is asked for, so that the right index is used.
            let mut only = |name, condition, value: Option<Value>| {
                if let Some(value) = value {
                    conditions.push(condition);
                    values.push((name, value));
                }
            };
            only(":app", "app_name = :app", app_name.map(Value::from));
            only(":before", "run_id < :before", before.map(Value::from));
            only(":status", "status = :status", status.map(|status| status.as_str().to_owned().into()));
            only(":model", "model = :model", model.map(Value::from));
            only(":text", "instr(lower(prompt), lower(:text))", text.map(Value::from));
            only(":from", "started_at >= :from", from.map(Value::from));
            only(":to", "started_at < :to", to.map(Value::from));
            only(":ms", "duration_ms >= :ms", at_least_ms.map(Value::from));
            only(":usd", "cost_usd >= :usd", at_least_usd.map(Value::from));
            let (columns, conditions) = (COLUMNS.replace("?3", ":characters"), conditions.join(" AND "));
            let values: Vec<_> = values.iter().map(|(name, value)| (*name, value as &dyn rusqlite::ToSql)).collect();
            db.prepare_cached(&format!("SELECT {columns}, 0, run_id FROM runs WHERE {conditions} ORDER BY run_id DESC LIMIT :limit"))?
                .query_map(&*values, |row| job_row(row, JobId::Run(row.get(21)?)))?
                .collect()
        })
        .await
    }

    /// Runs and turns that wait or go on, oldest first, with so many characters of their texts. What waits of batches is left out.
    pub async fn going_on(&self, characters: u32) -> Result<Vec<JobRow>, Error> {
        self.look_through(move |db| {
            let open = "finished_at IS NULL";
            let runs = format!("{open} AND NOT (queued AND batch_id IS NOT NULL)");
            let mut jobs = both(db, [&runs, open], "ORDER BY started_at", i64::MAX, characters)?;
            jobs.sort_by_key(|job| job.started_at);
            Ok(jobs)
        })
        .await
    }

    /// The newest `limit` runs and turns that went wrong since `since`, in Unix seconds, newest first, with so many characters of their texts.
    pub async fn gone_wrong(&self, since: i64, limit: u32, characters: u32) -> Result<Vec<JobRow>, Error> {
        self.look_through(move |db| {
            let wrong = format!("started_at >= {since} AND status IN ('failed', 'timed_out', 'interrupted')");
            let mut jobs = both(db, [&wrong, &wrong], "ORDER BY started_at DESC", i64::from(limit), characters)?;
            jobs.sort_by_key(|job| std::cmp::Reverse(job.started_at));
            jobs.truncate(limit as usize);
            Ok(jobs)
        })
        .await
    }

    /// Any app's sessions, newest first.
    pub async fn any_sessions(&self, wanted: SessionsWanted) -> Result<Vec<Session>, Error> {
        self.look_through(move |db| {
            let SessionsWanted { app_name, open, before, limit } = wanted;
            db.prepare_cached(&format!(
                "SELECT {} FROM sessions
                 WHERE app_name = coalesce(?1, app_name) AND (closed_at IS NULL) = coalesce(?2, closed_at IS NULL)
                     AND (?3 IS NULL OR session_id < ?3) AND acpx_record_id IS NOT NULL
                 ORDER BY session_id DESC LIMIT ?4",
                sessions::COLUMNS
            ))?
            .query_map(params![app_name, open, before, limit], session_at)?
            .collect()
        })
        .await
    }

    /// The newest `limit` steps of a session, oldest first, with so many characters of their texts.
    pub async fn steps(&self, session_id: &str, limit: u32, characters: u32) -> Result<Vec<Step>, Error> {
        let session_id = session_id.to_owned();
        self.look_through(move |db| {
            let mut steps: Vec<Step> = db
                .prepare_cached(&format!(
                    "SELECT {COLUMNS}, 0, turn, event, option_id, answered_by FROM session_events WHERE session_id = ?1
                     ORDER BY id DESC LIMIT ?2"
                ))?
                .query_map(params![session_id, limit, characters], |row| {
                    let turn: Option<i64> = row.get(21)?;
                    let event: String = row.get(22)?;
                    let by: Option<String> = row.get(24)?;
                    let (turn, at, asked) = match turn {
                        Some(turn) => {
                            let id = JobId::Turn { session_id: session_id.clone(), turn };
                            let job = job_row(row, id)?;
                            (Some(job.clone()), job.started_at, None)
                        }
                        None => (None, row.get(5)?, row.get(2)?),
                    };
                    Ok(Step { event, at, turn, asked, answered: by.map(|by| Ok::<_, rusqlite::Error>((row.get(23)?, by))).transpose()? })
                })?
                .collect::<Result<_, _>>()?;
            steps.reverse();
            Ok(steps)
        })
        .await
    }
}

/// Runs and turns of which something is true, at most `limit` of each.
fn both(db: &Connection, [runs, turns]: [&str; 2], order: &str, limit: i64, characters: u32) -> rusqlite::Result<Vec<JobRow>> {
    let values = params![limit, 0, characters];
    let mut runs = db.prepare_cached(&format!("SELECT {COLUMNS}, 0, run_id FROM runs WHERE {runs} {order} LIMIT ?1"))?;
    let runs = runs.query_map(values, |row| job_row(row, JobId::Run(row.get(21)?)))?;
    let mut turns = db.prepare_cached(&format!(
        "SELECT {COLUMNS}, 0, session_id, turn FROM session_events WHERE {turns} AND event = 'turn' {order} LIMIT ?1"
    ))?;
    let turns = turns.query_map(values, |row| job_row(row, JobId::Turn { session_id: row.get(21)?, turn: row.get(22)? }))?;
    runs.chain(turns).collect()
}
