//! What agents asked before they acted: of `session_events` the rows whose `event` is `permission`, those of runs among them.

use rusqlite::{OptionalExtension, params};

use super::db::Ledger;
use super::error::Error;
use super::job::JobId;
use crate::agent::questions::{Answer, By, Choice, Question, Settled};
use crate::clock;

/// A question that is over.
#[derive(Clone, Debug)]
pub struct AnsweredRow {
    /// What it could be answered with.
    pub options: Vec<Choice>,
    /// Its answer.
    pub answer: Answer,
    /// Who gave it.
    pub by: By,
}

/// The run or the session that a question is of.
fn owner(id: &JobId) -> &str {
    match id {
        JobId::Run(run_id) => run_id,
        JobId::Turn { session_id, .. } => session_id,
    }
}

impl Ledger {
    /// Records a question of a job. A second time it does nothing: what another machine carries out is told again after a restart.
    pub async fn ask_permission(&self, id: &JobId, app: &str, question: Question) -> Result<(), Error> {
        let (owner, app) = (owner(id).to_owned(), app.to_owned());
        self.write(move |db| {
            db.prepare_cached(
                "INSERT OR IGNORE INTO session_events (session_id, app_name, event, started_at, prompt, permission_id)
                 VALUES (?1, ?2, 'permission', ?3, ?4, ?5)",
            )?
            .execute(params![owner, app, question.asked_at, question.message.get(), question.permission_id])
            .map(drop)
        })
        .await
    }

    /// Records its answer, and who gave it.
    pub async fn settle_permission(&self, settled: Settled) -> Result<(), Error> {
        let Settled { question, answer, by } = settled;
        let result = serde_json::to_string(&(&question.options, &answer)).expect("an answer is JSON");
        self.write(move |db| {
            db.prepare_cached(
                "UPDATE session_events SET finished_at = ?2, option_id = ?3, answered_by = ?4, result = ?5
                 WHERE permission_id = ?1 AND finished_at IS NULL",
            )?
            .execute(params![question.permission_id, clock::now(), answer.option_id, by.as_str(), result])
            .map(drop)
        })
        .await
    }

    /// The app's question of that id, of a run or a session, once it is over. An answer that can't be read is none.
    pub async fn permission(&self, app: &str, owner: &str, permission_id: &str) -> Result<Option<AnsweredRow>, Error> {
        let (app, owner, permission_id) = (app.to_owned(), owner.to_owned(), permission_id.to_owned());
        self.read(move |db| {
            db.prepare_cached(
                "SELECT result, answered_by FROM session_events WHERE permission_id = ?1 AND session_id = ?2 AND app_name = ?3",
            )?
            .query_row([permission_id, owner, app], |row| {
                let (result, by) = (row.get::<_, Option<String>>(0)?, row.get::<_, Option<String>>(1)?);
                let by = [By::Client, By::Operator, By::Timeout].into_iter().find(|who| by.as_deref() == Some(who.as_str()));
                let (options, answer) = result.and_then(|result| serde_json::from_str(&result).ok()).unwrap_or_default();
                Ok(AnsweredRow { options, answer, by: by.unwrap_or(By::Cancel) })
            })
            .optional()
        })
        .await
    }
}
