//! The table `sessions`, and the steps of sessions in `session_events` that are no turns.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::db::Ledger;
use super::error::Error;
use super::idempotency::{Key, claim};
use crate::agent::contract::{Conversation, Driver, Rules, Setup};
use crate::agent::questions::Ask;
use crate::clock;

/// What is known of a session before it exists.
#[derive(Clone, Debug)]
pub struct NewSession {
    /// 32 hex digits.
    pub session_id: String,
    /// The caller's token name.
    pub app_name: String,
    /// What its agent is started with.
    pub setup: Setup,
    /// The app's own JSON object.
    pub meta: Option<String>,
    /// The session's folder.
    pub cwd: String,
    /// What speaks to its agent.
    pub driver: Driver,
    /// The machine that it lives on; `None` for the server's own.
    pub worker: Option<String>,
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
    /// What the agent calls it, where it has said so.
    pub agent_session: Option<String>,
}

impl Session {
    /// The conversation that it is.
    pub fn conversation(&self) -> Conversation {
        let NewSession { session_id, setup, driver, worker, .. } = self.new.clone();
        Conversation { session_id, setup, driver, agent_session: self.agent_session.clone(), worker }
    }
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

pub(super) const COLUMNS: &str = "session_id, app_name, agent, model, permissions, meta, cwd, created_at, last_turn_at, turn_count,
    closed_at, driver, acp_session_id, system, permission_timeout_secs, allow_always, worker";

impl Ledger {
    /// Records a session that is about to be created, if fewer than `most` are open. Gives the time of its creation.
    pub async fn begin_session(&self, session: NewSession, key: Option<Key>, most: usize) -> Result<BeginSession, Error> {
        let now = clock::now();
        self.write(move |db| {
            if let Some(key) = &key
                && !claim(db, key, &session.session_id)?
            {
                return Ok(BeginSession::KeyTaken);
            }
            let open: usize = usize::try_from(count_open(db)?).unwrap_or(usize::MAX);
            if open >= most {
                db.execute("DELETE FROM idempotency WHERE id = ?1", [&session.session_id])?;
                return Ok(BeginSession::Full);
            }
            db.execute(
                "INSERT INTO sessions (session_id, app_name, agent, model, permissions, meta, cwd, created_at, driver, system,
                     permission_timeout_secs, allow_always, worker)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
                params![
                    session.session_id,
                    session.app_name,
                    session.setup.agent,
                    session.setup.model,
                    session.setup.permissions,
                    session.meta,
                    session.cwd,
                    now,
                    session.driver.as_str(),
                    session.setup.system,
                    session.setup.ask.map(|ask| ask.timeout.as_secs().cast_signed()),
                    session.setup.ask.is_some_and(|ask| ask.allow_always),
                    session.worker,
                ],
            )?;
            Ok(BeginSession::Begun(now))
        })
        .await
    }

    /// Notes that a session now exists, and what its driver calls it; where that is the agent's own name for it, that too.
    pub async fn finish_session_create(&self, session_id: &str, driver: Driver, name: String) -> Result<(), Error> {
        let session_id = session_id.to_owned();
        let agent_session = (driver == Driver::Direct).then(|| name.clone());
        self.write(move |db| {
            db.execute(
                "UPDATE sessions SET acpx_record_id = ?2, acp_session_id = ?3 WHERE session_id = ?1",
                params![session_id, name, agent_session],
            )?;
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
            db.execute("DELETE FROM sessions WHERE session_id = ?1", [&session_id])
        })
        .await
        .map(drop)
    }

    /// The app's session of that id.
    pub async fn session(&self, app: &str, session_id: &str) -> Result<Option<Session>, Error> {
        self.session_of(Some(app.to_owned()), session_id).await
    }

    /// Any app's session of that id.
    pub async fn any_session(&self, session_id: &str) -> Result<Option<Session>, Error> {
        self.session_of(None, session_id).await
    }

    async fn session_of(&self, app: Option<String>, session_id: &str) -> Result<Option<Session>, Error> {
        let session_id = session_id.to_owned();
        self.read(move |db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sessions WHERE session_id = ?1 AND app_name = coalesce(?2, app_name) AND acpx_record_id IS NOT NULL"
            ))?
            .query_row(params![session_id, app], session_at)
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
            .query_map(params![app, include_closed], session_at)?
            .collect()
        })
        .await
    }

    /// Every app's sessions that `condition` is true of.
    async fn sessions_where(&self, condition: &'static str, before: i64) -> Result<Vec<Session>, Error> {
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM sessions WHERE {condition}"))?.query_map([before], session_at)?.collect()
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

    /// All sessions that there are of, open or closed, by the machine that they live on.
    pub async fn sessions_of_worker(&self, worker: &str) -> Result<Vec<Session>, Error> {
        let worker = worker.to_owned();
        self.look_through(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM sessions WHERE worker = ?1"))?.query_map([worker], session_at)?.collect()
        })
        .await
    }

    /// How many sessions are open.
    pub async fn open_sessions(&self) -> Result<u32, Error> {
        self.read(count_open).await
    }

    /// Closes a session, with `close`, `sweep_close` or `worker_forgotten` as the event. False where it was closed already, or was used since
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
            db.execute("DELETE FROM sessions WHERE session_id = ?1", [&session_id])
        })
        .await
        .map(drop)
    }
}

fn count_open(db: &Connection) -> rusqlite::Result<u32> {
    db.prepare_cached("SELECT count(*) FROM sessions WHERE closed_at IS NULL")?.query_row([], |row| row.get(0))
}

/// A step that takes no time.
pub(super) fn event(db: &Connection, session_id: &str, event: &str, now: i64) -> rusqlite::Result<()> {
    db.execute(
        "INSERT INTO session_events (session_id, app_name, event, started_at, finished_at, model)
         SELECT session_id, app_name, ?2, ?3, ?3, model FROM sessions WHERE session_id = ?1",
        params![session_id, event, now],
    )
    .map(drop)
}

fn ask_at(row: &Row<'_>) -> rusqlite::Result<Option<Ask>> {
    let (secs, allow_always) = (row.get::<_, Option<i64>>("permission_timeout_secs")?, row.get("allow_always")?);
    Ok(secs.map(|secs| Ask { timeout: Duration::from_secs(secs.cast_unsigned()), allow_always }))
}

/// From a row that has the columns of `sessions`.
pub(super) fn session_at(row: &Row<'_>) -> rusqlite::Result<Session> {
    Ok(Session {
        new: NewSession {
            session_id: row.get("session_id")?,
            app_name: row.get("app_name")?,
            setup: Setup {
                agent: row.get("agent")?,
                model: row.get("model")?,
                system: row.get("system")?,
                permissions: row.get("permissions")?,
                ask: ask_at(row)?,
                rules: Rules::default(),
            },
            meta: row.get("meta")?,
            cwd: row.get("cwd")?,
            driver: if row.get::<_, String>("driver")? == Driver::Direct.as_str() { Driver::Direct } else { Driver::Acpx },
            worker: row.get("worker")?,
        },
        created_at: row.get("created_at")?,
        last_turn_at: row.get("last_turn_at")?,
        turn_count: row.get("turn_count")?,
        closed_at: row.get("closed_at")?,
        agent_session: row.get("acp_session_id")?,
    })
}
