//! Jobs that an end of the server left open.

use rusqlite::Row;

use super::db::Ledger;
use super::error::Error;
use super::job::{JobId, Machine, NewJob};
use super::sessions::{Session, session_at};
use crate::clock;

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

/// A job that went on on another machine when the server ended.
#[derive(Clone, Debug)]
pub struct GoingOnElsewhere {
    /// What there is to know of it.
    pub job: WaitingJob,
    /// Where it goes on.
    pub machine: Machine,
}

/// What is true of a row whose job another machine carries out.
const ELSEWHERE: &str = "finished_at IS NULL AND NOT queued AND worker IS NOT NULL AND request IS NOT NULL";

impl Ledger {
    /// The jobs that go on on other machines, in the order that they came, runs first.
    pub async fn jobs_elsewhere(&self) -> Result<Vec<GoingOnElsewhere>, Error> {
        self.read(|db| {
            let machine = |row: &Row<'_>| Ok::<_, rusqlite::Error>(Machine { worker: row.get(6)?, instance: row.get(7)? });
            let mut runs = db.prepare(&format!(
                "SELECT app_name, client_ip, model, prompt, request, run_id, worker, instance FROM runs WHERE {ELSEWHERE} ORDER BY run_id"
            ))?;
            let runs = runs.query_map([], |row| Ok(GoingOnElsewhere { job: waiting_run(row)?, machine: machine(row)? }))?;
            let mut turns = db.prepare(&format!(
                "SELECT event.app_name, event.client_ip, event.model, prompt, request, turn, event.worker, event.instance, sessions.*
                 FROM (SELECT * FROM session_events WHERE {ELSEWHERE}) AS event JOIN sessions USING (session_id) ORDER BY id"
            ))?;
            let turns = turns.query_map([], |row| Ok(GoingOnElsewhere { job: waiting_turn(row)?, machine: machine(row)? }))?;
            runs.chain(turns).collect()
        })
        .await
    }

    /// The jobs that waited when the server ended and are to be started, in the order that they came, runs first.
    pub async fn waiting_jobs(&self) -> Result<Vec<WaitingJob>, Error> {
        const WAITS: &str = "finished_at IS NULL AND queued AND request IS NOT NULL";
        self.read(|db| {
            let mut runs = db.prepare(&format!(
                "SELECT app_name, client_ip, model, prompt, request, run_id FROM runs WHERE {WAITS} AND batch_id IS NULL ORDER BY run_id"
            ))?;
            let runs = runs.query_map([], waiting_run)?;
            let mut turns = db.prepare(&format!(
                "SELECT event.app_name, event.client_ip, event.model, prompt, request, turn, sessions.*
                 FROM (SELECT * FROM session_events WHERE {WAITS}) AS event JOIN sessions USING (session_id) ORDER BY id"
            ))?;
            let turns = turns.query_map([], waiting_turn)?;
            runs.chain(turns).collect()
        })
        .await
    }

    /// Settles the rows that a crash left open, but for those of jobs that are still to start, and where `elsewhere` is true of those that go on
    /// on other machines. Gives what they are called.
    pub async fn settle_jobs(&self, elsewhere: bool) -> Result<Vec<JobId>, Error> {
        let now = clock::now();
        self.write(move |db| {
            db.execute(
                "UPDATE sessions SET last_turn_at = ?1
                 WHERE session_id IN (SELECT session_id FROM session_events WHERE event = 'turn' AND finished_at IS NULL)",
                [now],
            )?;
            let elsewhere = if elsewhere { ELSEWHERE } else { "false" };
            db.execute(
                &format!(
                    "UPDATE session_events SET finished_at = ?1, answered_by = 'cancel' WHERE event = 'permission' AND finished_at IS NULL
                         AND session_id NOT IN (SELECT run_id FROM runs WHERE {elsewhere})
                         AND session_id NOT IN (SELECT session_id FROM session_events WHERE {elsewhere})"
                ),
                [now],
            )?;
            let settle = |table: &str, what: &str, is_job: &str, starts: &str, id: &str| {
                format!(
                    "UPDATE {table} SET finished_at = ?1, ok = 0, stop_reason = 'interrupted', request = NULL,
                         error = 'the server ended while this {what} was going on'
                     WHERE finished_at IS NULL AND {is_job} AND NOT (queued AND request IS NOT NULL {starts}) AND NOT ({elsewhere})
                     RETURNING {id}"
                )
            };
            let mut runs = db.prepare(&settle("runs", "run", "true", "", "run_id"))?;
            let runs = runs.query_map([now], |row| Ok(JobId::Run(row.get(0)?)))?;
            let open = "AND session_id IN (SELECT session_id FROM sessions WHERE closed_at IS NULL)";
            let mut turns = db.prepare(&settle("session_events", "turn", "turn IS NOT NULL", open, "session_id, turn"))?;
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
}

/// From the app, the client's address, the model, the prompt, the request and the run's id.
pub(super) fn waiting_run(row: &Row<'_>) -> rusqlite::Result<WaitingJob> {
    Ok(WaitingJob { job: waiting(row, JobId::Run(row.get(5)?))?, session: None, request: row.get(4)? })
}

fn waiting_turn(row: &Row<'_>) -> rusqlite::Result<WaitingJob> {
    let session = session_at(row)?;
    let id = JobId::Turn { session_id: session.new.session_id.clone(), turn: row.get(5)? };
    Ok(WaitingJob { job: waiting(row, id)?, session: Some(session), request: row.get(4)? })
}

fn waiting(row: &Row<'_>, id: JobId) -> rusqlite::Result<NewJob> {
    let (app_name, client_ip, model) = (row.get(0)?, row.get(1)?, row.get(2)?);
    // What else is to be known of its agent is in its request.
    Ok(NewJob {
        id,
        app_name,
        client_ip,
        agent: None,
        model,
        prompt: row.get(3)?,
        files: Vec::new(),
        webhook: None,
        attached: 0,
        most_attached: 0,
        elsewhere: None,
    })
}
