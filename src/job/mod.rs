//! Jobs: runs and turns, lived once. [`Jobs`] takes them on, cancels them, and ends them; `life.rs` is what happens between.

pub mod batches;
mod context;
pub mod feed;
pub mod feed_format;
pub mod feed_reader;
pub mod joining;
pub mod lane;
mod life;
pub mod live;
pub mod queue;
mod recover;
pub mod rejection;
mod settle;
pub mod spec;

use std::sync::Arc;
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::agent::questions::Questions;
use crate::executor::Executors;
use crate::ledger::{JobId, JobRow, Ledger, Queued};
use crate::schema::{Schemas, Wrong};
use batches::Batches;
use context::{Context, Written};
use feed::Feeds;
use feed_format::End;
use joining::Joinable;
use lane::Lanes;
use life::{Admitted, Life};
use live::Live;
use queue::{Admission, Places, Queue};
use rejection::Rejection;
use spec::{Durability, Job};

/// How long the end of a job may take beyond its stop: a turn's cancel, its grace, and the last look for processes.
const END_GRACE: Duration = Duration::from_secs(30);

/// All jobs of a server. Clones share them.
#[derive(Clone)]
pub struct Jobs(Arc<Context>);

/// What came of a job that was submitted.
#[derive(Debug)]
pub enum Submitted {
    /// It waits or goes on.
    Accepted {
        /// What it is called, where that is known before it starts.
        id: Option<JobId>,
        /// What there is to see of it.
        live: Live,
        /// Dropped, it cancels the job; `None` for one that goes on without its client.
        guard: Option<DropGuard>,
    },
    /// Its key was taken meanwhile.
    KeyTaken,
}

impl Jobs {
    /// Jobs that have their places from `queue`. A session's files may have `most_attached` bytes together. `operator_webhook` is told when claude's
    /// sign-in fails.
    #[expect(clippy::too_many_arguments, reason = "its parts")]
    pub fn new(
        queue: Queue,
        lanes: Lanes,
        executors: Executors,
        ledger: Ledger,
        feeds: Feeds,
        schemas: Schemas,
        most_attached: u64,
        operator_webhook: Option<String>,
    ) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        Self(Arc::new(Context {
            queue,
            lanes,
            executors,
            ledger,
            feeds,
            schemas,
            most_attached,
            operator_webhook,
            batches: Batches::default(),
            joinable: Joinable::default(),
            tasks,
            stop,
        }))
    }

    /// Whether this is a schema that replies to an app can be checked against.
    pub async fn check_schema(&self, app: &str, schema: &RawValue) -> Result<(), Wrong> {
        self.0.schemas.check(app, schema).await
    }

    /// Takes a job on.
    pub async fn submit(&self, job: Job, durability: Durability) -> Result<Submitted, Rejection> {
        let context = &self.0;
        if context.tasks.is_closed() {
            return Err(Rejection::Stopping);
        }
        match &job.spec.session {
            Some(session) => context.executors.awaited(session).map_or(Ok(()), |worker| Err(Rejection::Away(worker)))?,
            // What is accepted for good waits for one.
            None if context.executors.is_nowhere() && !durability.is_detached() => return Err(Rejection::Nowhere),
            None => {}
        }
        context.check_budget(&job).await?;
        let cancel = context.stop.child_token();
        let guard = (!durability.is_detached()).then(|| cancel.clone().drop_guard());
        let live = Live::new(cancel);
        let admission = if durability.is_detached() { Admission::Guaranteed } else { Admission::Evictable };
        let admitted = context.admit(&job, admission, &live).await?;
        // Of its own: a client that leaves in the middle must not leave a row behind that nobody ends.
        let accepting = context.tasks.spawn(accept(context.clone(), job, durability, live, admitted, guard));
        accepting.await.unwrap_or(Err(Rejection::Defect))
    }

    /// What the agent asks that is at work for this job, if one is.
    pub fn questions_of(&self, id: &JobId) -> Vec<Questions> {
        self.0.feeds.live(id).map(|live| live.questions().clone()).into_iter().collect()
    }

    /// What the agents ask of the turns of a session that wait or go on.
    pub fn questions_of_session(&self, session_id: &str) -> Vec<Questions> {
        self.0.lanes.turns(session_id).iter().map(|live| live.questions().clone()).collect()
    }

    /// Cancels a job, unless it is over. When this returns it is, with its processes; one that waits for the next start of the
    /// server will not start.
    pub async fn cancel(&self, JobRow { id, finished, .. }: &JobRow) -> Result<(), Rejection> {
        let has_only_its_row = match self.0.feeds.live(id) {
            Some(live) => {
                live.cancel().await;
                live.ended().is_none()
            }
            None => finished.is_none(),
        };
        let rejection = Rejection::Cancelled;
        if has_only_its_row && self.0.ledger.finish_job(id, settle::rejected(&rejection, 0)).await?.written {
            self.0.feeds.end(id, End::Rejected(rejection)).await?;
        }
        Ok(())
    }

    /// Cancels the turns of a session that wait or go on. Gives how many there were. When it returns they are over.
    pub async fn cancel_turns(&self, session_id: &str) -> usize {
        let turns = self.0.lanes.turns(session_id);
        for turn in &turns {
            turn.cancel.cancel();
        }
        for turn in &turns {
            turn.cancel().await;
        }
        turns.len()
    }

    /// Lets jobs finish until `drained`, then ends them. Whoever waits for a place is refused at once, or starts after the restart.
    /// When this returns, no process of a run is alive.
    pub async fn finish(&self, drained: impl Future<Output = ()>) {
        let Context { queue, tasks, stop, executors, .. } = &*self.0;
        queue.close();
        let drained = async {
            drained.await;
            executors.leave();
        };
        end_tasks("jobs", tasks, stop, drained).await;
    }

    /// Who has how much of the places.
    pub fn places(&self) -> Places {
        self.0.queue.places()
    }

    /// How many processes wait that were started ahead.
    pub fn standbys(&self) -> usize {
        self.0.executors.here().backends.warm.ready()
    }

    /// Whether no more are taken on.
    pub fn is_stopping(&self) -> bool {
        self.0.tasks.is_closed()
    }

    /// How many wait for a place.
    pub fn waiting(&self) -> usize {
        self.0.queue.waiting()
    }
}

/// Takes on no more tasks, lets those that go on finish until `drained`, then has `stop` end them, for which they have a grace.
pub(crate) async fn end_tasks(what: &str, tasks: &TaskTracker, stop: &CancellationToken, drained: impl Future<Output = ()>) {
    tasks.close();
    tokio::select! {
        () = tasks.wait() => {}
        () = drained => tracing::info!(what, count = tasks.len(), "ending what still goes on"),
    }
    stop.cancel();
    if timeout(END_GRACE, tasks.wait()).await.is_err() {
        tracing::error!(what, count = tasks.len(), "did not end in time");
    }
}

async fn accept(
    context: Arc<Context>,
    job: Job,
    durability: Durability,
    live: Live,
    admitted: Admitted,
    guard: Option<DropGuard>,
) -> Result<Submitted, Rejection> {
    let detached = durability.is_detached();
    let queued = match durability {
        Durability::Plain => None,
        Durability::Watched => Some(Queued::default()),
        Durability::Detached { key } => Some(Queued { request: Some(job.kept()), key }),
    };
    let row = match queued {
        None => None,
        Some(queued) => match context.write_row(&job, &live, admitted.lane(), Some(queued), None).await? {
            Written::Row(row) => Some(row),
            Written::KeyTaken => return Ok(Submitted::KeyTaken),
        },
    };
    let id = row.as_ref().map(|row| row.id.clone());
    let life = Life { context: context.clone(), job: Arc::new(job), live: live.clone(), detached, row };
    context.tasks.spawn(life.run(admitted));
    Ok(Submitted::Accepted { id, live, guard })
}
