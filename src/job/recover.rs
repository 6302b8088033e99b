//! What a start does about what an earlier end left.

use std::sync::Arc;

use anyhow::Context as _;

use super::Jobs;
use super::context::Row;
use super::feed_format::End;
use super::life::{self, Admitted, Life};
use super::live::Live;
use super::queue::Admission;
use super::rejection::Rejection;
use super::settle;
use super::spec::Job;
use crate::agent::contract::{Ending, Outcome};
use crate::ledger::{GoingOnElsewhere, JobId};

impl Jobs {
    /// Settles the rows of jobs that went on when the server ended. Gives which they were.
    pub async fn settle_interrupted(&self) -> anyhow::Result<Vec<JobId>> {
        self.0.ledger.forget_broken_batches(true).await?;
        let settled = self.0.ledger.settle_jobs(self.0.executors.elsewhere().is_some()).await?;
        for id in &settled {
            // Its readers get an end too.
            let outcome = Box::new(Outcome::of(Ending::Interrupted));
            self.0.feeds.end(id, End::Settled { outcome, turn_index: 0 }).await?;
        }
        Ok(settled)
    }

    /// Goes on with what other machines carry out, and starts what waited when the server ended.
    pub async fn resume(&self) -> anyhow::Result<()> {
        let context = &self.0;
        if context.executors.elsewhere().is_some() {
            for going_on in context.ledger.jobs_elsewhere().await? {
                self.rejoin(going_on).await?;
            }
        }
        for waiting in context.ledger.waiting_jobs().await? {
            let id = waiting.job.id.clone();
            let rejected_before = context.feeds.ended(&id).await?.is_some();
            let Some(job) = Job::read(waiting).filter(|_| !rejected_before) else {
                // It was rejected, and only its row could not be told; or another release kept it in a form of its own.
                let rejection = Rejection::Unreadable;
                context.ledger.finish_job(&id, settle::rejected(&rejection, 0)).await?;
                context.feeds.end(&id, End::Rejected(rejection)).await?;
                continue;
            };
            tracing::info!(%id, "a job that waited when the server ended");
            let live = Live::new(context.stop.child_token());
            let feed = context.feeds.begin(&id, live.clone()).await?;
            let admitted = context.admit(&job, Admission::Readmitted, &live).await.context("a job that waited can't be taken on again")?;
            let row = Some(Row { id, feed });
            let life = Life { context: context.clone(), job: Arc::new(job), live, detached: true, row };
            context.tasks.spawn(life.run(admitted));
        }
        Ok(())
    }

    /// Goes on with what another machine carries out.
    async fn rejoin(&self, GoingOnElsewhere { job: waiting, machine }: GoingOnElsewhere) -> anyhow::Result<()> {
        let context = &self.0;
        let id = waiting.job.id.clone();
        let Some(job) = Job::read(waiting) else {
            let outcome = Outcome::of(Ending::Interrupted);
            context.feeds.end(&id, End::Settled { outcome: Box::new(outcome), turn_index: 0 }).await?;
            context.ledger.finish_job(&id, settle::rejected(&Rejection::Unreadable, 0)).await?;
            return Ok(());
        };
        if let Some(End::Settled { outcome, .. }) = context.feeds.ended(&id).await? {
            // Only its row could not be told.
            context.ledger.finish_job(&id, settle::finish(&job, &Ok(*outcome))).await?;
            return Ok(());
        }
        tracing::info!(%id, worker = machine.worker, "a job that another machine carries out");
        let live = Live::new(context.stop.child_token());
        let retold = context.feeds.retold(&id).await?;
        let feed = context.feeds.begin(&id, live.clone()).await?;
        let lane = match &job.spec.session {
            Some(session) => context.lanes.enter_turn(&session.session_id, live.clone()).await,
            None => None,
        };
        let permit = context.queue.take_back(life::request(&job));
        let row = Some(Row { id, feed });
        let life = Life { context: context.clone(), job: Arc::new(job), live, detached: true, row };
        context.tasks.spawn(life.run(Admitted::Rejoined { permit, lane, machine, retold }));
        Ok(())
    }
}
