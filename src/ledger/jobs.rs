//! Runs and turns: the table `runs`, and of `session_events` the rows whose `event` is `turn`. Each row is written before its agent
//! starts, and completed however that ends.

use std::fmt;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::idempotency::{Key, claim};
use super::sessions::{Session, session_at};
use super::{Error, Ledger, Status};
use crate::agent::contract::Facts;
use crate::clock;

/// Which run, or which turn of which session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobId {
    /// 32 hex digits.
    Run(String),
    /// A turn.
    Turn {
        /// 32 hex digits.
        session_id: String,
        /// Its number in the session, from 1. Those that failed count too.
        turn: i64,
    },
}

impl JobId {
    /// The job that is called so.
    pub fn named(name: &str) -> Option<Self> {
        match name.rsplit_once('-') {
            None => Some(Self::Run(name.to_owned())),
            Some((session_id, turn)) => Some(Self::Turn { session_id: session_id.to_owned(), turn: turn.parse().ok()? }),
        }
    }

    /// The table, and what is true of the row alone, by the first two parameters.
    fn row(&self) -> (&'static str, &'static str) {
        match self {
            Self::Run(_) => ("runs", "run_id = ?1 AND ?2 IS NULL"),
            Self::Turn { .. } => ("session_events", "session_id = ?1 AND turn = ?2"),
        }
    }

    /// The first two parameters.
    fn parameters(&self) -> (&str, Option<i64>) {
        match self {
            Self::Run(run_id) => (run_id, None),
            Self::Turn { session_id, turn } => (session_id, Some(*turn)),
        }
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(run_id) => f.write_str(run_id),
            Self::Turn { session_id, turn } => write!(f, "{session_id}-{turn}"),
        }
    }
}

/// What is known of a job before it starts.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// What it is called.
    pub id: JobId,
    /// The caller's token name.
    pub app_name: String,
    /// The caller's address.
    pub client_ip: String,
    /// The model asked for.
    pub model: Option<String>,
    /// The prompt as the app sent it.
    pub prompt: String,
    /// Bytes of the files that come with a turn, and stay in its session.
    pub attached: u64,
    /// Bytes that a session's files may have together.
    pub most_attached: u64,
}

/// Of a job that waits.
#[derive(Clone, Debug, Default)]
pub struct Queued {
    /// What it needs to be started after a restart; without one it ends with the server.
    pub request: Option<String>,
    /// The key under which it was asked for.
    pub key: Option<Key>,
}

/// What came of the wish for a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is there.
    Written,
    /// The key was taken before.
    KeyTaken,
    /// The session is closed.
    SessionClosed,
    /// The session's files would have more bytes than they may.
    TooMuchAttached,
}

/// What is known of a job at its end.
#[derive(Clone, Debug)]
pub struct JobEnd {
    /// Milliseconds from the process's start; the time in the queue is not in it.
    pub duration_ms: i64,
    /// Whether the agent answered.
    pub ok: bool,
    /// `end_turn` and its like from the agent, or `error`, `timeout`, `cancelled`, `interrupted`.
    pub stop_reason: String,
    /// What went wrong, in words.
    pub error: Option<String>,
    /// The reply's text.
    pub result: Option<String>,
    /// Tokens read, those from the cache included.
    pub input_tokens: Option<i64>,
    /// Tokens written.
    pub output_tokens: Option<i64>,
    /// What the agent says it would have cost, in US dollars.
    pub cost_usd: Option<f64>,
}

impl JobEnd {
    /// Of what never began.
    pub fn failed(stop_reason: &str, error: String) -> Self {
        Self {
            duration_ms: 0,
            ok: false,
            stop_reason: stop_reason.to_owned(),
            error: Some(error),
            result: None,
            input_tokens: None,
            output_tokens: None,
            cost_usd: None,
        }
    }
}

/// What is to be written at a job's end.
#[derive(Clone, Debug)]
pub struct Finish {
    /// How it ended.
    pub end: JobEnd,
    /// What its agent told of the session.
    pub facts: Facts,
    /// Whether its key may be used again: no agent has begun with it.
    pub frees_key: bool,
    /// Bytes that count no more among the session's files.
    pub gives_back: u64,
}

/// What was written at a job's end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Finished {
    /// The session's completed turns.
    pub turn_count: i64,
    /// What the job cost, in US dollars.
    pub cost_usd: Option<f64>,
    /// False where it was complete before.
    pub written: bool,
}

/// A job's row.
#[derive(Clone, Debug)]
pub struct JobRow {
    /// What it is called.
    pub id: JobId,
    /// The app.
    pub app_name: String,
    /// The model asked for.
    pub model: Option<String>,
    /// The prompt, or its beginning.
    pub prompt: String,
    /// What has become of it.
    pub status: Status,
    /// Unix seconds; `None` for a job of an older release.
    pub queued_at: Option<i64>,
    /// Unix seconds; of one that waits, when it was accepted.
    pub started_at: i64,
    /// The session's completed turns up to this one.
    pub turn_index: i64,
    /// Unix seconds, and what is known of its end.
    pub finished: Option<(i64, JobEnd)>,
}

/// A job that waited when the server ended.
#[derive(Clone, Debug)]
pub struct WaitingJob {
    /// Its row.
    pub job: NewJob,
    /// A turn's session.
    pub session: Option<Session>,
    /// What else was kept of the request.
    pub request: String,
}

impl Ledger {
    /// The number of the session's next turn.
    pub async fn next_turn(&self, session_id: &str) -> Result<i64, Error> {
        let session_id = session_id.to_owned();
        self.read(move |db| {
            db.prepare_cached("SELECT 1 + coalesce(max(turn), 0) FROM session_events WHERE session_id = ?1")?
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

    /// Notes that a job that waited starts. From here on a crash ends it. False where its session is closed.
    pub async fn start_job(&self, id: &JobId) -> Result<bool, Error> {
        let (id, now) = (id.clone(), clock::now());
        self.write(move |db| {
            let (table, it) = id.row();
            let (name, turn) = id.parameters();
            db.prepare_cached(&format!("UPDATE {table} SET queued = 0, request = NULL, started_at = ?3 WHERE {it}"))?
                .execute(params![name, turn, now])?;
            let JobId::Turn { session_id, .. } = &id else { return Ok(true) };
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
                         result = ?8, input_tokens = ?9, output_tokens = ?10, cost_usd = ?11
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

    /// The jobs that waited when the server ended and are to be started, in the order that they came, runs first.
    pub async fn waiting_jobs(&self) -> Result<Vec<WaitingJob>, Error> {
        const WAITS: &str = "finished_at IS NULL AND queued AND request IS NOT NULL";
        self.read(|db| {
            let mut runs =
                db.prepare(&format!("SELECT app_name, client_ip, model, prompt, request, run_id FROM runs WHERE {WAITS} ORDER BY run_id"))?;
            let runs = runs
                .query_map([], |row| Ok(WaitingJob { job: waiting(row, JobId::Run(row.get(5)?))?, session: None, request: row.get(4)? }))?;
            let mut turns = db.prepare(&format!(
                "SELECT event.app_name, event.client_ip, event.model, prompt, request, turn, sessions.*
                 FROM (SELECT * FROM session_events WHERE {WAITS}) AS event JOIN sessions USING (session_id) ORDER BY id"
            ))?;
            let turns = turns.query_map([], |row| {
                let session = session_at(row)?;
                let id = JobId::Turn { session_id: session.new.session_id.clone(), turn: row.get(5)? };
                Ok(WaitingJob { job: waiting(row, id)?, session: Some(session), request: row.get(4)? })
            })?;
            runs.chain(turns).collect()
        })
        .await
    }

    /// The app's job of that name, as long as its session is known.
    pub async fn job(&self, app: &str, id: &JobId) -> Result<Option<JobRow>, Error> {
        let (app, id) = (app.to_owned(), id.clone());
        self.read(move |db| {
            let (table, it) = id.row();
            let (name, turn) = id.parameters();
            let (index, known) = match id {
                JobId::Run(_) => ("0", "1"),
                JobId::Turn { .. } => (
                    "(SELECT count(*) FROM session_events AS other WHERE other.session_id = ?1 AND other.turn <= ?2 AND other.ok)",
                    "EXISTS (SELECT 1 FROM sessions WHERE session_id = ?1)",
                ),
            };
            db.prepare_cached(&format!("SELECT {COLUMNS}, {index} FROM {table} WHERE {it} AND app_name = ?4 AND {known}"))?
                .query_row(params![name, turn, i64::MAX, app], |row| job_row(row, id.clone()))
                .optional()
        })
        .await
    }

    /// Settles the rows that a crash left open, but for those of jobs that are still to start. Gives what they are called.
    pub async fn settle_jobs(&self) -> Result<Vec<JobId>, Error> {
        let now = clock::now();
        self.write(move |db| {
            db.execute(
                "UPDATE sessions SET last_turn_at = ?1
                 WHERE session_id IN (SELECT session_id FROM session_events WHERE event = 'turn' AND finished_at IS NULL)",
                [now],
            )?;
            let settle = |table: &str, what: &str, starts: &str, id: &str| {
                format!(
                    "UPDATE {table} SET finished_at = ?1, ok = 0, stop_reason = 'interrupted', request = NULL,
                         error = 'the server ended while this {what} was going on'
                     WHERE finished_at IS NULL AND NOT (queued AND request IS NOT NULL {starts}) RETURNING {id}"
                )
            };
            let mut runs = db.prepare(&settle("runs", "run", "", "run_id"))?;
            let runs = runs.query_map([now], |row| Ok(JobId::Run(row.get(0)?)))?;
            let open = "AND session_id IN (SELECT session_id FROM sessions WHERE closed_at IS NULL)";
            let mut turns = db.prepare(&settle("session_events", "turn", open, "session_id, turn"))?;
            let turns = turns.query_map([now], |row| Ok(JobId::Turn { session_id: row.get(0)?, turn: row.get(1)? }))?;
            runs.chain(turns).collect()
        })
        .await
    }

    /// Which of these jobs there are no rows of, those of sessions that are deleted among them.
    pub async fn without_row(&self, mut names: Vec<String>) -> Result<Vec<String>, Error> {
        self.look_through(move |db| {
            let mut known = db.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM runs WHERE run_id = ?1)
                     OR EXISTS (SELECT 1 FROM session_events JOIN sessions USING (session_id) WHERE session_id = ?2 AND turn = ?3)",
            )?;
            let mut failed = Ok(());
            names.retain(|name| {
                let (session_id, turn) = name.rsplit_once('-').unwrap_or_default();
                let known = known.query_row([name, session_id, turn], |row| row.get::<_, bool>(0));
                known.map_err(|error| failed = Err(error)).is_ok_and(|known| !known)
            });
            failed.map(|()| names)
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

fn waiting(row: &Row<'_>, id: JobId) -> rusqlite::Result<NewJob> {
    let (app_name, client_ip, model) = (row.get(0)?, row.get(1)?, row.get(2)?);
    Ok(NewJob { id, app_name, client_ip, model, prompt: row.get(3)?, attached: 0, most_attached: 0 })
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
    let cost_before = before.filter(|_| !facts.began).unwrap_or(0.0);
    let cost_of_turn = facts.total_cost_usd.map(|cost| (cost - cost_before).max(0.0));
    Ok(Some(SessionBefore { turn_count, cost_before, cost_of_turn }))
}

fn free_key(db: &Connection, id: &JobId) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM idempotency WHERE id = ?1")?.execute([id.to_string()]).map(drop)
}

fn insert(db: &Connection, job: &NewJob, queued: bool, request: Option<&str>) -> rusqlite::Result<Inserted> {
    let NewJob { id, app_name, client_ip, model, prompt, attached, most_attached } = job;
    let JobId::Turn { session_id, turn } = id else {
        return db
            .prepare_cached(
                "INSERT INTO runs (run_id, app_name, client_ip, model, prompt, queued_at, started_at, queued, request)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?7, ?8)",
            )?
            .execute(params![id.to_string(), app_name, client_ip, model, prompt, clock::now(), queued, request])
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
            "INSERT INTO session_events (session_id, app_name, event, started_at, queued_at, model, client_ip, prompt, queued, request, turn)
             SELECT session_id, app_name, 'turn', ?2, ?2, model, ?3, ?4, ?5, ?6, ?7 FROM sessions WHERE session_id = ?1 AND closed_at IS NULL",
        )?
        .execute(params![session_id, clock::now(), client_ip, prompt, queued, request, turn])?;
    Ok(if inserted == 1 { Inserted::Written } else { Inserted::SessionClosed })
}

/// Of a job, with so many characters of its texts as the third parameter says.
pub(super) const COLUMNS: &str = "app_name, model, substr(prompt, 1, ?3), status, queued_at, started_at, finished_at, duration_ms, ok,
    stop_reason, error, substr(result, 1, ?3), input_tokens, output_tokens, cost_usd";

/// From [`COLUMNS`] and the turn's index.
pub(super) fn job_row(row: &Row<'_>, id: JobId) -> rusqlite::Result<JobRow> {
    let finished = match row.get(6)? {
        None => None,
        Some(finished_at) => Some((
            finished_at,
            JobEnd {
                duration_ms: row.get::<_, Option<i64>>(7)?.unwrap_or_default(),
                ok: row.get(8)?,
                stop_reason: row.get(9)?,
                error: row.get(10)?,
                result: row.get(11)?,
                input_tokens: row.get(12)?,
                output_tokens: row.get(13)?,
                cost_usd: row.get(14)?,
            },
        )),
    };
    Ok(JobRow {
        id,
        app_name: row.get(0)?,
        model: row.get(1)?,
        prompt: row.get(2)?,
        status: row.get(3)?,
        queued_at: row.get(4)?,
        started_at: row.get(5)?,
        turn_index: row.get(15)?,
        finished,
    })
}
