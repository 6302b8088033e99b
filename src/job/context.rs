//! What every job's life needs.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::batches::Batches;
use super::feed::{Feed, Feeds};
use super::joining::Joinable;
use super::lane::{InLane, Lanes};
use super::live::Live;
use super::queue::Queue;
use super::rejection::Rejection;
use super::spec::Job;
use crate::clock;
use crate::executor::Executors;
use crate::ledger::{Inserted, JobId, Ledger, Machine, NewJob, Queued};
use crate::schema::Schemas;

pub(super) struct Context {
    pub(super) queue: Queue,
    pub(super) lanes: Lanes,
    pub(super) executors: Executors,
    pub(super) ledger: Ledger,
    pub(super) feeds: Feeds,
    pub(super) schemas: Schemas,
    /// Bytes that a session's files may have together.
    pub(super) most_attached: u64,
    /// Who is told when claude's sign-in fails.
    pub(super) operator_webhook: Option<String>,
    pub(super) batches: Batches,
    pub(super) joinable: Joinable,
    pub(super) tasks: TaskTracker,
    /// Ends every job, at the end of the drain.
    pub(super) stop: CancellationToken,
}

/// A job's row, and what it says.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: JobId,
    pub(super) feed: Feed,
}

/// What came of the wish for a row.
pub(super) enum Written {
    Row(Row),
    KeyTaken,
}

impl Context {
    /// Refuses an app that has spent what it may today, in UTC. What is going on is not known yet, and goes on.
    pub(super) async fn check_budget(&self, job: &Job) -> Result<(), Rejection> {
        let Some(daily_usd) = job.limits.daily_usd else { return Ok(()) };
        if self.ledger.spent(&job.app, clock::midnight()).await? < daily_usd { Ok(()) } else { Err(Rejection::Spent) }
    }

    /// Writes the row of a job that waits, or of one that starts now, on another machine where one is named. Its feed is there before, so that who sees the one finds the
    /// other.
    pub(super) async fn write_row(
        &self,
        job: &Job,
        live: &Live,
        lane: Option<&InLane>,
        queued: Option<Queued>,
        elsewhere: Option<(Machine, String)>,
    ) -> Result<Written, Rejection> {
        // Nobody else takes the same number meanwhile.
        let mut numbering = None;
        let id = match lane {
            Some(lane) => {
                numbering = Some(lane.numbering().await);
                JobId::Turn { session_id: lane.session_id().to_owned(), turn: self.ledger.next_turn(lane.session_id()).await? }
            }
            None => JobId::Run(job.uuid.simple().to_string()),
        };
        let feed = self.feeds.begin(&id, live.clone()).await?;
        let inserted = self.ledger.insert_job(NewJob { elsewhere, ..job.row(id.clone(), self.most_attached) }, queued).await;
        drop(numbering);
        let row = match inserted {
            Ok(Inserted::Written) => return Ok(Written::Row(Row { id, feed })),
            Ok(Inserted::KeyTaken) => Ok(Written::KeyTaken),
            Ok(Inserted::SessionClosed) => Err(Rejection::SessionClosed),
            Ok(Inserted::TooMuchAttached) => Err(Rejection::TooMuchAttached(self.most_attached)),
            Err(error) => Err(error.into()),
        };
        drop(feed);
        self.feeds.forget(&id).await;
        row
    }
}
