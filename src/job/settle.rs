//! The end of a job, whichever it is: its row, its key, what is counted of it, and its feed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::context::{Context, Row};
use super::feed_format::End;
use super::live::Live;
use super::rejection::Rejection;
use super::spec::Job;
use crate::agent::claude::sign_in::is_about_sign_in;
use crate::agent::contract::{Ending, Facts, Outcome, Usage};
use crate::clock;
use crate::ledger::{self, Finish, JobEnd, JobId, OPERATOR};
use crate::metrics::METRICS;

/// How long before it is tried again to complete a row.
const AGAIN: Duration = Duration::from_secs(1);

/// A row that could not be completed yet.
#[must_use]
pub(super) struct Unwritten(Finish);

impl Context {
    /// Completes the row, and answers. The answer is paid for: the caller gets it also while the ledger can't take it, and what
    /// is still to be written is given back.
    pub(super) async fn settle(&self, job: &Job, row: Option<&Row>, live: &Live, came: Result<Outcome, Rejection>) -> Option<Unwritten> {
        let Some(Row { id, feed }) = row else {
            live.end(Arc::new(End::from_came(came, 0)));
            return None;
        };
        let finish = finish(job, &came);
        let written = self.ledger.finish_job(id, finish.clone()).await;
        note(job, id, &finish.end);
        let cost_usd = written.as_ref().map_or(None, |finished| finished.cost_usd);
        if let Ok(Outcome { ending, usage, duration, .. }) = &came {
            let usage = Usage { cost_usd: cost_usd.or(usage.cost_usd), ..*usage };
            let ok = matches!(ending, Ending::Completed(_));
            METRICS.ended(job.kind(), &job.app, job.spec.model.as_deref().unwrap_or_default(), ok, *duration, usage);
        }
        let (turn_count, unwritten) = match written {
            Ok(finished) => (finished.turn_count, None),
            Err(error) => {
                tracing::error!(%id, %error, "the row was not completed; trying again until it is, or the server stops");
                (self.turn_count(job, finish.end.ok).await, Some(Unwritten(finish)))
            }
        };
        let end = Arc::new(End::from_came(came, turn_count));
        // Whoever waits for the answer does not wait for what others are told.
        feed.end(end.clone());
        self.tell(job, &end).await;
        unwritten
    }

    /// Has the app told that its budget is spent, and the operator that claude's sign-in fails. Each a while apart: one cause, one message.
    async fn tell(&self, job: &Job, end: &End) {
        const APART: i64 = 3600;
        let End::Settled { outcome, .. } = end else { return };
        let spent = async {
            let Some(daily_usd) = job.limits.daily_usd else { return Ok(()) };
            let Some(url) = self.ledger.webhook_of(&job.app).await? else { return Ok(()) };
            let midnight = clock::midnight();
            if self.ledger.spent(&job.app, midnight).await? < daily_usd {
                return Ok(());
            }
            self.ledger.add_delivery_once(&job.app, "budget.spent", &url, midnight).await
        };
        let signed_out = async {
            match (&outcome.ending, &self.operator_webhook) {
                (Ending::Failed(error), Some(url)) if outcome.api_status == Some(401) || is_about_sign_in(error) => {
                    self.ledger.add_delivery_once(OPERATOR, "signin.failed", url, clock::now() - APART).await
                }
                _ => Ok(()),
            }
        };
        let (spent, signed_out): (Result<(), ledger::Error>, _) = tokio::join!(spent, signed_out);
        if let Err(error) = spent.and(signed_out) {
            tracing::warn!(%error, "a webhook was not written to the ledger, and won't be sent");
        }
    }

    /// The session's completed turns with one that is not written yet.
    async fn turn_count(&self, job: &Job, ok: bool) -> i64 {
        let Some(session) = &job.spec.session else { return 0 };
        let known = self.ledger.session(&job.app, &session.session_id).await.ok().flatten();
        known.map_or(0, |session| session.turn_count) + i64::from(ok)
    }

    /// Completes a row each second until that succeeds, or a last time when the server stops.
    /// Says whether it did.
    pub(super) async fn write_later(&self, id: &JobId, Unwritten(finish): Unwritten) -> bool {
        loop {
            let stopping = self.stop.run_until_cancelled(sleep(AGAIN)).await.is_none();
            match self.ledger.finish_job(id, finish.clone()).await {
                Ok(_) => {
                    tracing::info!(%id, "the row is completed");
                    return true;
                }
                Err(error) if stopping => {
                    tracing::error!(%id, %error, "the row stays open");
                    return false;
                }
                Err(_) => {}
            }
        }
    }
}

fn note(job: &Job, id: &JobId, end: &JobEnd) {
    let JobEnd { ok, stop_reason, duration_ms, .. } = end;
    let (app, model) = (&job.app, &job.spec.model);
    match id {
        JobId::Run(run_id) => tracing::info!(run_id, app, model, ok, stop_reason, duration_ms, "run"),
        JobId::Turn { session_id, turn } => tracing::info!(session_id, turn, app, ok, stop_reason, duration_ms, "turn"),
    }
}

impl End {
    fn from_came(came: Result<Outcome, Rejection>, turn_index: i64) -> Self {
        match came {
            Ok(outcome) => Self::Settled { outcome: Box::new(outcome), turn_index },
            Err(rejection) => Self::Rejected(rejection),
        }
    }
}

/// What is written of a job's end.
pub(super) fn finish(job: &Job, came: &Result<Outcome, Rejection>) -> Finish {
    match came {
        Ok(outcome) => Finish {
            end: end(job, outcome),
            facts: outcome.facts.clone(),
            frees_key: matches!(outcome.ending, Ending::NotInstalled(_) | Ending::Unprepared(_)),
            gives_back: if matches!(outcome.ending, Ending::Unprepared(_)) { job.attached() } else { 0 },
        },
        Err(rejection) => rejected(rejection, job.attached()),
    }
}

/// What is written of a job that did not come about.
pub(super) fn rejected(rejection: &Rejection, gives_back: u64) -> Finish {
    let stop_reason = match rejection {
        Rejection::Cancelled | Rejection::SessionClosed => "cancelled",
        Rejection::Stopping => "interrupted",
        _ => "error",
    };
    Finish {
        end: JobEnd::failed(stop_reason, rejection.to_string()),
        facts: Facts::default(),
        // Nobody wants what was cancelled to begin after all.
        frees_key: *rejection != Rejection::Cancelled,
        gives_back,
    }
}

fn end(job: &Job, outcome: &Outcome) -> JobEnd {
    let (ok, stop_reason, error) = match &outcome.ending {
        Ending::Completed(stop_reason) => (true, stop_reason.as_str(), None),
        Ending::Failed(error) => (false, "error", Some(error.clone())),
        Ending::TimedOut(error) => (false, "timeout", Some(error.clone())),
        Ending::Cancelled => (false, "cancelled", Some("it was cancelled, or the client left, before the answer".to_owned())),
        Ending::Interrupted => (false, "interrupted", Some("the server stopped before the answer".to_owned())),
        Ending::Lost(worker) => (false, "interrupted", Some(format!("the machine {worker} was lost before the answer"))),
        Ending::NotInstalled(program) => (false, "error", Some(format!("{program} is not installed"))),
        Ending::Unprepared(why) => (false, "error", Some(why.to_string())),
    };
    JobEnd {
        duration_ms: clock::millis(outcome.duration),
        ok,
        stop_reason: stop_reason.to_owned(),
        error,
        // What a turn said is said, however it ended.
        result: (ok || job.spec.session.is_some()).then(|| outcome.text.clone()),
        first_text_ms: outcome.first_text.map(clock::millis),
        input_tokens: outcome.usage.input_tokens,
        cached_tokens: outcome.usage.cached_tokens,
        output_tokens: outcome.usage.output_tokens,
        cost_usd: outcome.usage.cost_usd,
    }
}
