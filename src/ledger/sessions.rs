//! The tables `sessions` and `session_events`: every session, and every step of one.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::idempotency::{Key, claim};
use super::runs::finished;
use super::{Error, Ledger, RunEnd};
use crate::clock;

/// What is known of a session before it exists.
#[derive(Clone, Debug)]
pub struct NewSession {
    /// 32 hex digits.
    pub session_id: String,
    /// The caller's token name.
    pub app_name: String,
    /// One of the configured agents.
    pub agent: String,
    /// The model that every turn is to use.
    pub model: Option<String>,
    /// `approve-all`, `approve-reads` or `deny-all`.
    pub permissions: String,
    /// The app's own JSON object.
    pub meta: Option<String>,
    /// The session's folder.
    pub cwd: String,
}

/// A session.
#[derive(Clone, Debug)]
pub struct Session {
    /// What was known at its creation.
    pub new: NewSession,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds of the end of the last turn.
    pub last_turn_at: Option<i64>,
    /// Completed turns.
    pub turn_count: i64,
    /// Unix seconds; `None` while it is open.
    pub closed_at: Option<i64>,
}

/// What came of the wish for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeginSession {
    /// It is to be created; Unix seconds.
    Begun(i64),
    /// As many are open as may be.
    Full,
    /// The key was taken before.
    KeyTaken,
}

/// A turn that is about to start.
#[derive(Clone, Debug)]
pub struct TurnRow {
    /// The session.
    pub session_id: String,
    /// The caller's address.
    pub client_ip: String,
    /// The prompt as the app sent it.
    pub prompt: String,
    /// Bytes of the files that come with it.
    pub attached: u64,
}

/// What came of the wish for a turn.
#[derive(Clone, Copy, Debug)]
pub enum BeginTurn {
    /// It has a row.
    Begun(TurnBegun),
    /// The session is closed.
    Closed,
    /// The key was taken before.
    KeyTaken,
    /// The session's files would have more bytes than they may.
    TooMuchAttached,
}

/// What a turn's agent said of itself.
#[derive(Clone, Debug, Default)]
pub struct AgentOfTurn {
    /// What it calls the session.
    pub acp_session_id: Option<String>,
    /// What it says the session has cost since it was started, in US dollars.
    pub cost_usd: Option<f64>,
    /// Whether it was started for this turn.
    pub began: bool,
}

/// The row of a turn that was begun.
#[derive(Clone, Copy, Debug)]
pub struct TurnBegun {
    /// The row's id in `session_events`.
    pub event_id: i64,
    /// The session's completed turns before this one.
    pub turn_count: i64,
    /// The turn's number in the session, from 1. Those that failed count too.
    pub turn: i64,
}

/// A turn's row.
#[derive(Clone, Debug)]
pub struct TurnState {
    /// `queued`, `running`, `succeeded`, `failed`, `timed_out`, `cancelled` or `interrupted`.
    pub status: String,
    /// Unix seconds; `None` for a turn of an older release.
    pub queued_at: Option<i64>,
    /// Unix seconds; of one that waits, when it was accepted.
    pub started_at: i64,
    /// The session's completed turns up to this one.
    pub turn_index: i64,
    /// Unix seconds, and what is known of its end.
    pub finished: Option<(i64, RunEnd)>,
}

/// A turn that waited when the server ended.
#[derive(Clone, Debug)]
pub struct WaitingTurn {
    /// Its session.
    pub session: Session,
    /// What is to be sent.
    pub row: TurnRow,
    /// Its row.
    pub begun: TurnBegun,
    /// What else was kept of the request.
    pub request: String,
}

const COLUMNS: &str = "session_id, app_name, agent, model, permissions, meta, cwd, created_at, last_turn_at, turn_count,
    closed_at";

impl Ledger {
    /// Records a session that is about to be created, if fewer than `most` are open. Gives the time of its creation.
    pub async fn begin_session(&self, session: NewSession, key: Option<Key>, most: usize) -> Result<BeginSession, Error> {
        let now = clock::now();
        self.write(move |db| {
            if let Some(key) = key
                && !claim(db, &key, &session.session_id)?
            {
                return Ok(BeginSession::KeyTaken);
            }
            let open: usize = usize::try_from(count_open(db)?).unwrap_or(usize::MAX);
            if open >= most {
                db.execute("DELETE FROM idempotency WHERE id = ?1", [&session.session_id])?;
                return Ok(BeginSession::Full);
            }
            db.execute(
                "INSERT INTO sessions (session_id, app_name, agent, model, permissions, meta, cwd, created_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    session.session_id,
                    session.app_name,
                    session.agent,
                    session.model,
                    session.permissions,
                    session.meta,
                    session.cwd,
                    now
                ],
            )?;
            Ok(BeginSession::Begun(now))
        })
        .await
    }

    /// Notes that a session now exists.
    pub async fn finish_session_create(&self, session_id: &str, acpx_record_id: String) -> Result<(), Error> {
        let session_id = session_id.to_owned();
        self.write(move |db| {
            db.execute("UPDATE sessions SET acpx_record_id = ?2 WHERE session_id = ?1", params![session_id, acpx_record_id])?;
            event(db, &session_id, "create", clock::now())
        })
        .await
    }

    /// Forgets a session that never came to exist.
    pub async fn forget_session(&self, session_id: &str) -> Result<(), Error> {
        let session_id = session_id.to_owned();
        self.write(move |db| {
            // The key may be used again: nothing came of it.
            db.execute("DELETE FROM idempotency WHERE id = ?1", [&session_id])?;
            db.execute("DELETE FROM sessions WHERE session_id = ?1", [session_id])
        })
        .await
        .map(drop)
    }

    /// The app's session of that id.
    pub async fn session(&self, app: &str, session_id: &str) -> Result<Option<Session>, Error> {
        let (app, session_id) = (app.to_owned(), session_id.to_owned());
        self.read(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sessions WHERE session_id = ?1 AND app_name = ?2 AND acpx_record_id IS NOT NULL"
            ))?
            .query_row([session_id, app], session)
            .optional()
        })
        .await
    }

    /// The app's sessions, newest first.
    pub async fn sessions(&self, app: &str, include_closed: bool) -> Result<Vec<Session>, Error> {
        let app = app.to_owned();
        self.read(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sessions
                 WHERE app_name = ?1 AND (?2 OR closed_at IS NULL) AND acpx_record_id IS NOT NULL ORDER BY created_at DESC, rowid DESC"
            ))?
            .query_map(params![app, include_closed], session)?
            .collect()
        })
        .await
    }

    /// Every app's sessions that `condition` is true of.
    async fn sessions_where(&self, condition: &'static str, before: i64) -> Result<Vec<Session>, Error> {
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM sessions WHERE {condition}"))?.query_map([before], session)?.collect()
        })
        .await
    }

    /// Open sessions without a turn since `before`.
    pub async fn idle_sessions(&self, before: i64) -> Result<Vec<Session>, Error> {
        self.sessions_where("closed_at IS NULL AND acpx_record_id IS NOT NULL AND coalesce(last_turn_at, created_at) <= ?1", before).await
    }

    /// Sessions that were closed before `before`.
    pub async fn old_sessions(&self, before: i64) -> Result<Vec<Session>, Error> {
        self.sessions_where("closed_at <= ?1", before).await
    }

    /// Sessions whose creation a crash cut short.
    pub async fn half_created_sessions(&self) -> Result<Vec<Session>, Error> {
        self.sessions_where("acpx_record_id IS NULL AND created_at <= ?1", i64::MAX).await
    }

    /// How many sessions are open.
    pub async fn open_sessions(&self) -> Result<u32, Error> {
        self.read(count_open).await
    }

    /// Writes the row of a turn that is about to start. The session's files may have `most` bytes with its own.
    pub async fn begin_turn(&self, turn: TurnRow, most: u64) -> Result<BeginTurn, Error> {
        self.write(move |db| insert_turn(db, &turn, false, None, most)).await
    }

    /// Writes the row of a turn that waits. `request` is what it needs to be started after a restart; without one it ends with
    /// the server.
    pub async fn accept_turn(&self, turn: TurnRow, request: Option<String>, key: Option<Key>, most: u64) -> Result<BeginTurn, Error> {
        self.write(move |db| {
            let begun = insert_turn(db, &turn, true, request.as_deref(), most)?;
            if let (BeginTurn::Begun(begun), Some(key)) = (begun, key)
                && !claim(db, &key, &turn_id(&turn.session_id, begun.turn))?
            {
                db.execute("DELETE FROM session_events WHERE id = ?1", [begun.event_id])?;
                give_back(db, &turn.session_id, turn.attached)?;
                return Ok(BeginTurn::KeyTaken);
            }
            Ok(begun)
        })
        .await
    }

    /// Takes files of a session back that did not come to be in its folder.
    pub async fn take_back_attached(&self, session_id: &str, bytes: u64) -> Result<(), Error> {
        let session_id = session_id.to_owned();
        self.write(move |db| give_back(db, &session_id, bytes)).await
    }

    /// Notes that a turn that waited starts. From here on a crash ends it. `None` where the session is closed.
    pub async fn start_turn(&self, turn: TurnBegun) -> Result<Option<TurnBegun>, Error> {
        let now = clock::now();
        self.write(move |db| {
            let count = db
                .query_row(
                    "SELECT turn_count FROM sessions JOIN session_events USING (session_id) WHERE id = ?1 AND closed_at IS NULL",
                    [turn.event_id],
                    |row| row.get(0),
                )
                .optional()?;
            db.execute("UPDATE session_events SET queued = 0, request = NULL, started_at = ?2 WHERE id = ?1", [turn.event_id, now])?;
            Ok(count.map(|turn_count| TurnBegun { turn_count, ..turn }))
        })
        .await
    }

    /// The turns that waited when the server ended and are to be started, in the order that they came.
    pub async fn waiting_turns(&self) -> Result<Vec<WaitingTurn>, Error> {
        self.read(|db| {
            let columns = COLUMNS.split(',').map(|column| format!("sessions.{}", column.trim())).collect::<Vec<_>>().join(", ");
            db.prepare(&format!(
                "SELECT {columns}, session_events.client_ip, prompt, session_events.id, turn, request
                 FROM session_events JOIN sessions USING (session_id)
                 WHERE finished_at IS NULL AND queued AND request IS NOT NULL ORDER BY session_events.id"
            ))?
            .query_map([], |row| {
                let session = session(row)?;
                let session_id = session.new.session_id.clone();
                Ok(WaitingTurn {
                    row: TurnRow { session_id, client_ip: row.get(11)?, prompt: row.get(12)?, attached: 0 },
                    begun: TurnBegun { event_id: row.get(13)?, turn_count: session.turn_count, turn: row.get(14)? },
                    request: row.get(15)?,
                    session,
                })
            })?
            .collect()
        })
        .await
    }

    /// The session's turn of that number.
    pub async fn turn(&self, session_id: &str, turn: i64) -> Result<Option<TurnState>, Error> {
        let session_id = session_id.to_owned();
        self.read(move |db| {
            db.prepare_cached(
                "SELECT status, queued_at, started_at, finished_at, duration_ms, ok, stop_reason, error, result, input_tokens,
                     output_tokens, cost_usd,
                     (SELECT count(*) FROM session_events AS other WHERE other.session_id = ?1 AND other.turn <= ?2 AND other.ok)
                 FROM session_events WHERE session_id = ?1 AND turn = ?2",
            )?
            .query_row(params![session_id, turn], turn_state)
            .optional()
        })
        .await
    }

    /// Completes the row of a turn, and counts it where it went well. Gives the session's turns so far, and the turn's cost.
    pub async fn finish_turn(
        &self,
        session_id: &str,
        turn: TurnBegun,
        end: RunEnd,
        agent: AgentOfTurn,
    ) -> Result<(i64, Option<f64>), Error> {
        let (session_id, now) = (session_id.to_owned(), clock::now());
        self.write(move |db| {
            let before: Option<f64> = db
                .query_row("SELECT agent_cost_usd FROM sessions WHERE session_id = ?1", [&session_id], |row| row.get(0))
                .optional()?
                .flatten();
            let so_far = before.filter(|_| !agent.began).unwrap_or(0.0);
            let cost = agent.cost_usd.map(|cost| (cost - so_far).max(0.0));
            let written = db.execute(
                "UPDATE session_events SET request = NULL, finished_at = ?2, duration_ms = ?3, ok = ?4, stop_reason = ?5, error = ?6, result = ?7,
                     input_tokens = ?8, output_tokens = ?9, cost_usd = ?10
                 WHERE id = ?1 AND finished_at IS NULL",
                params![
                    turn.event_id,
                    now,
                    end.duration_ms,
                    end.ok,
                    end.stop_reason,
                    end.error,
                    end.result,
                    end.input_tokens,
                    end.output_tokens,
                    cost,
                ],
            )?;
            if written == 0 {
                // It was written at an earlier try.
                let count = db.query_row("SELECT turn_count FROM sessions WHERE session_id = ?1", [session_id], |row| row.get(0));
                return Ok((count.optional()?.unwrap_or(turn.turn_count), None));
            }
            let count = db.query_row(
                "UPDATE sessions SET last_turn_at = ?2, turn_count = turn_count + ?3, acp_session_id = coalesce(?4, acp_session_id),
                     agent_cost_usd = coalesce(?5, ?6)
                 WHERE session_id = ?1 RETURNING turn_count",
                params![session_id, now, end.ok, agent.acp_session_id, agent.cost_usd, so_far],
                |row| row.get(0),
            );
            // The session may be deleted by now.
            Ok((count.optional()?.unwrap_or(turn.turn_count + i64::from(end.ok)), cost))
        })
        .await
    }

    /// Closes a session, with `close` or `sweep_close` as the event. False where it was closed already, or was used since
    /// `idle_since`.
    pub async fn close_session(&self, session_id: &str, how: &'static str, idle_since: Option<i64>) -> Result<bool, Error> {
        let (session_id, now) = (session_id.to_owned(), clock::now());
        self.write(move |db| {
            let closed = db.execute(
                "UPDATE sessions SET closed_at = ?2 WHERE session_id = ?1 AND closed_at IS NULL
                     AND coalesce(last_turn_at, created_at) <= coalesce(?3, coalesce(last_turn_at, created_at))",
                params![session_id, now, idle_since],
            )? == 1;
            if closed {
                event(db, &session_id, how, now)?;
            }
            Ok(closed)
        })
        .await
    }

    /// Deletes the row of a session whose files are gone.
    pub async fn delete_session(&self, session_id: &str) -> Result<(), Error> {
        let session_id = session_id.to_owned();
        self.write(move |db| {
            event(db, &session_id, "hard_delete", clock::now())?;
            // Its keys stand for nothing any more.
            db.execute("DELETE FROM idempotency WHERE id = ?1 OR id LIKE ?1 || '-%'", [&session_id])?;
            db.execute("DELETE FROM sessions WHERE session_id = ?1", [session_id])
        })
        .await
        .map(drop)
    }

    /// Settles the turns that a crash left open, but for those that are still to start. Gives their sessions and numbers.
    pub async fn settle_turns(&self) -> Result<Vec<(String, i64)>, Error> {
        let now = clock::now();
        self.write(move |db| {
            db.execute(
                "UPDATE sessions SET last_turn_at = ?1
                 WHERE session_id IN (SELECT session_id FROM session_events WHERE event = 'turn' AND finished_at IS NULL)",
                [now],
            )?;
            db.prepare(
                "UPDATE session_events SET finished_at = ?1, ok = 0, stop_reason = 'interrupted', request = NULL,
                     error = 'the server ended while this turn was going on'
                 WHERE event = 'turn' AND finished_at IS NULL
                     AND NOT (queued AND request IS NOT NULL AND session_id IN (SELECT session_id FROM sessions WHERE closed_at IS NULL))
                 RETURNING session_id, turn",
            )?
            .query_map([now], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
        })
        .await
    }

    /// Which of these runs and turns there are no rows of, those of sessions that are deleted among them.
    pub async fn without_row(&self, mut ids: Vec<String>) -> Result<Vec<String>, Error> {
        self.look_through(move |db| {
            let mut known = db.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM runs WHERE run_id = ?1)
                     OR EXISTS (SELECT 1 FROM session_events JOIN sessions USING (session_id) WHERE session_id = ?2 AND turn = ?3)",
            )?;
            let mut failed = Ok(());
            ids.retain(|id| {
                let (session_id, turn) = id.rsplit_once('-').unwrap_or_default();
                let known = known.query_row([id, session_id, turn], |row| row.get::<_, bool>(0));
                known.map_err(|error| failed = Err(error)).is_ok_and(|known| !known)
            });
            failed.map(|()| ids)
        })
        .await
    }

    /// Deletes the events of more than `days` days ago.
    pub async fn forget_session_events(&self, days: u32) -> Result<usize, Error> {
        let before = clock::now() - i64::from(days) * clock::DAY;
        self.write(move |db| db.execute("DELETE FROM session_events WHERE started_at < ?1 AND finished_at < ?1", [before])).await
    }
}

/// What a turn is called where it needs one name.
pub fn turn_id(session_id: &str, turn: i64) -> String {
    format!("{session_id}-{turn}")
}

fn give_back(db: &Connection, session_id: &str, bytes: u64) -> rusqlite::Result<()> {
    db.execute(
        "UPDATE sessions SET attached_bytes = max(0, attached_bytes - ?2) WHERE session_id = ?1",
        params![session_id, bytes.cast_signed()],
    )
    .map(drop)
}

fn insert_turn(db: &Connection, turn: &TurnRow, queued: bool, request: Option<&str>, most: u64) -> rusqlite::Result<BeginTurn> {
    let counted = turn.attached == 0
        || db.execute(
            "UPDATE sessions SET attached_bytes = attached_bytes + ?2
             WHERE session_id = ?1 AND (closed_at IS NOT NULL OR attached_bytes + ?2 <= ?3)",
            params![turn.session_id, turn.attached.cast_signed(), most.min(i64::MAX.cast_unsigned()).cast_signed()],
        )? == 1;
    if !counted {
        return Ok(BeginTurn::TooMuchAttached);
    }
    let inserted = db.execute(
        "INSERT INTO session_events (session_id, app_name, event, started_at, queued_at, model, client_ip, prompt, queued, request, turn)
         SELECT session_id, app_name, 'turn', ?2, ?2, model, ?3, ?4, ?5, ?6,
             1 + (SELECT coalesce(max(turn), 0) FROM session_events WHERE session_id = ?1)
         FROM sessions WHERE session_id = ?1 AND closed_at IS NULL",
        params![turn.session_id, clock::now(), turn.client_ip, turn.prompt, queued, request],
    )?;
    if inserted == 0 {
        return Ok(BeginTurn::Closed);
    }
    let event_id = db.last_insert_rowid();
    db.query_row("SELECT turn_count, turn FROM sessions JOIN session_events USING (session_id) WHERE id = ?1", [event_id], |row| {
        Ok(BeginTurn::Begun(TurnBegun { event_id, turn_count: row.get(0)?, turn: row.get(1)? }))
    })
}

fn turn_state(row: &Row<'_>) -> rusqlite::Result<TurnState> {
    let (status, queued_at, started_at, turn_index) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(12)?);
    Ok(TurnState { status, queued_at, started_at, turn_index, finished: finished(row, 3)? })
}

fn count_open(db: &Connection) -> rusqlite::Result<u32> {
    db.prepare_cached("SELECT count(*) FROM sessions WHERE closed_at IS NULL")?.query_row([], |row| row.get(0))
}

/// A step that takes no time.
fn event(db: &Connection, session_id: &str, event: &str, now: i64) -> rusqlite::Result<()> {
    db.execute(
        "INSERT INTO session_events (session_id, app_name, event, started_at, finished_at, model)
         SELECT session_id, app_name, ?2, ?3, ?3, model FROM sessions WHERE session_id = ?1",
        params![session_id, event, now],
    )
    .map(drop)
}

fn session(row: &Row<'_>) -> rusqlite::Result<Session> {
    Ok(Session {
        new: NewSession {
            session_id: row.get(0)?,
            app_name: row.get(1)?,
            agent: row.get(2)?,
            model: row.get(3)?,
            permissions: row.get(4)?,
            meta: row.get(5)?,
            cwd: row.get(6)?,
        },
        created_at: row.get(7)?,
        last_turn_at: row.get(8)?,
        turn_count: row.get(9)?,
        closed_at: row.get(10)?,
    })
}
