//! The tables `workers`, the machines that carry work out, as they were heard of last, and `gateway`, what they know this ledger by.

use std::collections::HashMap;

use rusqlite::{Row, params};

use super::db::Ledger;
use super::error::Error;
use super::sessions::event;
use crate::clock;

/// A machine that carries work out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerRow {
    /// Its name.
    pub name: String,
    /// The release that it runs.
    pub version: String,
    /// Runs that it may have at once.
    pub places: u32,
    /// Runs that go on there.
    pub runs: u32,
    /// Turns that go on there.
    pub turns: u32,
    /// Of this server, open sessions that live there. What is seen of a machine does not tell it.
    pub sessions: u32,
    /// By how many milliseconds its clock is ahead of the server's, the way of its message included.
    pub clock_ms: i64,
    /// Unix seconds of its start.
    pub started_at: i64,
    /// Unix seconds at which it was heard of last.
    pub seen_at: i64,
}

impl Ledger {
    /// What workers know this ledger by.
    pub async fn gateway(&self) -> Result<String, Error> {
        self.read(|db| db.query_row("SELECT name FROM gateway", [], |row| row.get(0))).await
    }

    /// Notes how machines were heard of. One that was to be forgotten and is heard of later is one again.
    pub async fn see_workers(&self, workers: Vec<WorkerRow>) -> Result<(), Error> {
        self.write(move |db| {
            let mut see = db.prepare_cached(
                "INSERT INTO workers (name, version, places, runs, turns, clock_ms, started_at, seen_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                 ON CONFLICT (name) DO UPDATE SET version = ?2, places = ?3, runs = ?4, turns = ?5, clock_ms = ?6, started_at = ?7,
                     seen_at = ?8, forgotten_at = iif(?8 > forgotten_at, NULL, forgotten_at)",
            )?;
            for WorkerRow { name, version, places, runs, turns, clock_ms, started_at, seen_at, .. } in &workers {
                see.execute(params![name, version, places, runs, turns, clock_ms, started_at, seen_at])?;
            }
            Ok(())
        })
        .await
    }

    /// The machines, by name.
    pub async fn workers(&self) -> Result<Vec<WorkerRow>, Error> {
        self.look_through(|db| {
            db.prepare_cached(
                "SELECT *, (SELECT count(*) FROM sessions WHERE worker = name AND closed_at IS NULL) AS sessions
                 FROM workers WHERE forgotten_at IS NULL ORDER BY name",
            )?
            .query_map([], worker_at)?
            .collect()
        })
        .await
    }

    /// How many sessions are open on each machine; `None` is the server's own.
    pub async fn open_sessions_by_worker(&self) -> Result<HashMap<Option<String>, u32>, Error> {
        self.read(|db| {
            db.prepare_cached("SELECT worker, count(*) FROM sessions WHERE closed_at IS NULL GROUP BY worker")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect()
        })
        .await
    }

    /// Closes the sessions of a machine that does not come back. Gives how many there were; `None` where there is no such machine.
    pub async fn forget_worker(&self, name: &str) -> Result<Option<usize>, Error> {
        let (name, now) = (name.to_owned(), clock::now());
        self.write(move |db| {
            let known = db.execute("UPDATE workers SET forgotten_at = ?2 WHERE name = ?1", params![name, now])? == 1;
            let open: Vec<String> = db
                .prepare("SELECT session_id FROM sessions WHERE worker = ?1 AND closed_at IS NULL")?
                .query_map([&name], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            for session_id in &open {
                db.execute("UPDATE sessions SET closed_at = ?2 WHERE session_id = ?1", params![session_id, now])?;
                event(db, session_id, "worker_forgotten", now)?;
            }
            Ok((known || !open.is_empty()).then_some(open.len()))
        })
        .await
    }

    /// The names of machines that were to be forgotten since `since`, in Unix seconds.
    pub async fn forgotten_workers(&self, since: i64) -> Result<Vec<String>, Error> {
        self.look_through(move |db| {
            db.prepare_cached("SELECT name FROM workers WHERE forgotten_at >= ?1")?.query_map([since], |row| row.get(0))?.collect()
        })
        .await
    }
}

fn worker_at(row: &Row<'_>) -> rusqlite::Result<WorkerRow> {
    Ok(WorkerRow {
        name: row.get("name")?,
        version: row.get("version")?,
        places: row.get("places")?,
        runs: row.get("runs")?,
        turns: row.get("turns")?,
        sessions: row.get("sessions")?,
        clock_ms: row.get("clock_ms")?,
        started_at: row.get("started_at")?,
        seen_at: row.get("seen_at")?,
    })
}
