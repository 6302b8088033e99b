//! Runs and turns: the table `runs`, and of `session_events` the rows whose `event` is `turn`. Each row is written before its agent
//! starts, and completed however that ends.

use rusqlite::{Connection, OptionalExtension, params};

use super::db::Ledger;
use super::error::Error;
use super::idempotency::claim;
use super::job::{COLUMNS, Finish, Finished, Inserted, JobId, JobRow, Machine, NewJob, Queued, job_row, names};
use crate::agent::contract::Facts;
use crate::clock;

impl Ledger {
    /// The number of the session's next turn.
    pub async fn next_turn(&self, session_id: &str) -> Result<i64, Error> {
        let session_id = session_id.to_owned();
        self.read(move |db| {
            db.prepare_cached("SELECT 1 + coalesce(max(turn), 0) FROM session_events WHERE session_id = ?1 AND turn IS NOT NULL")?
                .query_row([session_id], |row| row.get(0))
        })
        .await
    }

    /// Writes the row of a job that waits, or of one that is about to start.
    pub async fn insert_job(&self, job: NewJob, queued: Option<Queued>) -> Result<Inserted, Error> {
        self.write(move |db| {
            let (request, key) = queued.as_ref().map_or((None, None), |queued| (queued.request.as_deref(), queued.key.as_ref()));
            if let Some(key) = key
                && !claim(db, key, &job.id.to_string())?
            {
                return Ok(Inserted::KeyTaken);
            }
            let inserted = insert(db, &job, queued.is_some(), request)?;
            if inserted != Inserted::Written && key.is_some() {
                free_key(db, &job.id)?;
            }
            Ok(inserted)
        })
        .await
    }

    /// Notes that a job that waited starts, on another machine where one is named, with what has to be known to go on with it. From here on a
    /// crash ends it, unless it is elsewhere. False where it was cancelled meanwhile, or its session is closed.
    pub async fn start_job(&self, id: &JobId, elsewhere: Option<(Machine, String)>) -> Result<bool, Error> {
        let (id, now) = (id.clone(), clock::now());
        self.write(move |db| {
            let (table, it) = id.row();
            let (name, turn) = id.parameters();
            let (worker, instance, request) = columns(elsewhere.as_ref());
            let started = db
                .prepare_cached(&format!(
                    "UPDATE {table} SET queued = 0, request = ?4, started_at = ?3, worker = ?5, instance = ?6
                     WHERE {it} AND finished_at IS NULL"
                ))?
                .execute(params![name, turn, now, request, worker, instance])?;
            let JobId::Turn { session_id, .. } = &id else { return Ok(started == 1) };
            db.prepare_cached("SELECT 1 FROM sessions WHERE session_id = ?1 AND closed_at IS NULL")?.exists([session_id])
        })
        .await
    }

    /// Completes the row of a job, and counts a turn where it went well. A second time it does nothing.
    pub async fn finish_job(&self, id: &JobId, finish: Finish) -> Result<Finished, Error> {
        let (id, now) = (id.clone(), clock::now());
        self.write(move |db| {
            let (table, it) = id.row();
            let (name, turn) = id.parameters();
            let Finish { end, facts, frees_key, gives_back } = &finish;
            let session = session_before(db, &id, facts)?;
            let cost_usd = session.as_ref().map_or(end.cost_usd, |session| session.cost_of_turn);
            let written = db
                .prepare_cached(&format!(
                    "UPDATE {table} SET request = NULL, finished_at = ?3, duration_ms = ?4, ok = ?5, stop_reason = ?6, error = ?7,
                         result = ?8, input_tokens = ?9, output_tokens = ?10, cost_usd = ?11, first_text_ms = ?12, cached_tokens = ?13
                     WHERE {it} AND finished_at IS NULL"
                ))?
                .execute(params![
                    name,
                    turn,
                    now,
                    end.duration_ms,
                    end.ok,
                    end.stop_reason,
                    end.error,
                    end.result,
                    end.input_tokens,
                    end.output_tokens,
                    cost_usd,
                    end.first_text_ms,
                    end.cached_tokens,
                ])?;
            let turn_count = session.as_ref().map_or(0, |session| session.turn_count);
            if written == 0 {
                // It was written at an earlier try.
                return Ok(Finished { turn_count, ..Finished::default() });
            }
            if *frees_key {
                free_key(db, &id)?;
            }
            let Some(session) = session else { return Ok(Finished { turn_count, cost_usd, written: true }) };
            db.prepare_cached(
                "UPDATE sessions SET last_turn_at = ?2, turn_count = turn_count + ?3, acp_session_id = coalesce(?4, acp_session_id),
                     agent_cost_usd = coalesce(?5, ?6), attached_bytes = max(0, attached_bytes - ?7)
                 WHERE session_id = ?1",
            )?
            .execute(params![
                name,
                now,
                end.ok,
                facts.agent_session,
                facts.total_cost_usd,
                session.cost_before,
                gives_back.cast_signed()
            ])?;
            Ok(Finished { turn_count: turn_count + i64::from(end.ok), cost_usd, written: true })
        })
        .await
    }

    /// The app's job of that name, as long as its session is known.
    pub async fn job(&self, app: &str, id: &JobId) -> Result<Option<JobRow>, Error> {
        self.job_of(Some(app.to_owned()), id).await
    }

    /// Any app's job of that name, as long as its session is known.
    pub async fn any_job(&self, id: &JobId) -> Result<Option<JobRow>, Error> {
        self.job_of(None, id).await
    }

    /// Any app's job of that name, whatever has become of its session.
    pub async fn job_at_all(&self, id: &JobId) -> Result<Option<JobRow>, Error> {
        self.job_where(None, id, false).await
    }

    async fn job_of(&self, app: Option<String>, id: &JobId) -> Result<Option<JobRow>, Error> {
        self.job_where(app, id, true).await
    }

    async fn job_where(&self, app: Option<String>, id: &JobId, of_session: bool) -> Result<Option<JobRow>, Error> {
        let id = id.clone();
        self.read(move |db| {
            let (table, it) = id.row();
            let (name, turn) = id.parameters();
            let (index, known) = match id {
                JobId::Turn { .. } if !of_session => ("0", "1"),
                JobId::Run(_) => ("0", "1"),
                JobId::Turn { .. } => (
                    "(SELECT count(*) FROM session_events AS other WHERE other.session_id = ?1 AND other.turn <= ?2 AND other.ok)",
                    "EXISTS (SELECT 1 FROM sessions WHERE session_id = ?1)",
                ),
            };
            db.prepare_cached(&format!(
                "SELECT {COLUMNS}, {index} FROM {table} WHERE {it} AND app_name = coalesce(?4, app_name) AND {known}"
            ))?
            .query_row(params![name, turn, i64::MAX, app], |row| job_row(row, id.clone()))
            .optional()
        })
        .await
    }

    /// Deletes the rows of jobs that ended more than `days` days ago, and other events of sessions of that age.
    pub async fn forget_jobs(&self, days: u32) -> Result<usize, Error> {
        let before = clock::now() - i64::from(days) * clock::DAY;
        self.write(move |db| {
            let forget = |table: &str| db.execute(&format!("DELETE FROM {table} WHERE started_at < ?1 AND finished_at < ?1"), [before]);
            Ok(forget("runs")? + forget("session_events")?)
        })
        .await
    }
}

/// The session of a turn before its end is written.
struct SessionBefore {
    turn_count: i64,
    /// What the agent said at the last turn that the session has cost since it was started.
    cost_before: f64,
    cost_of_turn: Option<f64>,
}

/// `None` for a run. A session may be deleted by now.
fn session_before(db: &Connection, id: &JobId, facts: &Facts) -> rusqlite::Result<Option<SessionBefore>> {
    let JobId::Turn { session_id, .. } = id else { return Ok(None) };
    let found = db
        .prepare_cached("SELECT turn_count, agent_cost_usd FROM sessions WHERE session_id = ?1")?
        .query_row([session_id], |row| Ok((row.get(0)?, row.get::<_, Option<f64>>(1)?)))
        .optional()?;
    let (turn_count, before) = found.unwrap_or_default();
    let cost_before = if facts.began { facts.began_at_usd } else { before.unwrap_or(0.0) };
    let cost_of_turn = facts.total_cost_usd.map(|cost| (cost - cost_before).max(0.0));
    Ok(Some(SessionBefore { turn_count, cost_before, cost_of_turn }))
}

fn free_key(db: &Connection, id: &JobId) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM idempotency WHERE id = ?1")?.execute([id.to_string()]).map(drop)
}

/// Where a job goes on elsewhere, and what is kept of it meanwhile.
fn columns(elsewhere: Option<&(Machine, String)>) -> (Option<&str>, Option<&str>, Option<&str>) {
    elsewhere.map_or((None, None, None), |(Machine { worker, instance }, request)| (Some(worker), Some(instance), Some(request)))
}

fn insert(db: &Connection, job: &NewJob, queued: bool, request: Option<&str>) -> rusqlite::Result<Inserted> {
    let NewJob { id, app_name, client_ip, agent, model, prompt, files, webhook, attached, most_attached, elsewhere } = job;
    let files = names(files);
    let (worker, instance, kept) = columns(elsewhere.as_ref());
    let request = request.or(kept);
    let JobId::Turn { session_id, turn } = id else {
        return db
            .prepare_cached(
                "INSERT INTO runs (run_id, app_name, client_ip, agent, model, prompt, queued_at, started_at, queued, request, files, webhook,
                     worker, instance)
                 VALUES (?1, ?2, ?3, coalesce(?4, 'claude'), coalesce(?5, ''), ?6, ?7, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            )?
            .execute(params![
                id.to_string(),
                app_name,
                client_ip,
                agent,
                model,
                prompt,
                clock::now(),
                queued,
                request,
                files,
                webhook,
                worker,
                instance
            ])
            .map(|_| Inserted::Written);
    };
    let counted = *attached == 0
        || db.execute(
            "UPDATE sessions SET attached_bytes = attached_bytes + ?2
             WHERE session_id = ?1 AND (closed_at IS NOT NULL OR attached_bytes + ?2 <= ?3)",
            params![session_id, attached.cast_signed(), (*most_attached).min(i64::MAX.cast_unsigned()).cast_signed()],
        )? == 1;
    if !counted {
        return Ok(Inserted::TooMuchAttached);
    }
    let inserted = db
        .prepare_cached(
            "INSERT INTO session_events
                 (session_id, app_name, event, started_at, queued_at, agent, model, client_ip, prompt, queued, request, turn, files, webhook,
                  worker, instance)
             SELECT session_id, app_name, 'turn', ?2, ?2, agent, model, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11 FROM sessions WHERE session_id = ?1 AND closed_at IS NULL",
        )?
        .execute(params![session_id, clock::now(), client_ip, prompt, queued, request, turn, files, webhook, worker, instance])?;
    Ok(if inserted == 1 { Inserted::Written } else { Inserted::SessionClosed })
}
