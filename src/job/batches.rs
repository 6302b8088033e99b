//! Runs of batches: they take places that nobody else wants, and yield to whoever comes. Their rows are written when their batch is
//! accepted, so a restart goes on where it was.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::Jobs;
use super::context::Row;
use super::feed_format::End;
use super::life::{Admitted, Life};
use super::live::Live;
use super::queue::PermitRequest;
use super::rejection::Rejection;
use super::settle;
use super::spec::Job;
use crate::ledger::{self, Batch, WaitingJob};

/// How often it is looked for a place, and for what waits, where nothing tells.
const LOOK: Duration = Duration::from_millis(100);
/// How long an app is left alone whose budget is spent, or which has as much at once as it may; and how often it is looked where nothing waits.
const LATER: Duration = Duration::from_secs(5);

/// Those that were taken up and go on. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Batches {
    /// By their names, the app of each.
    taken: Arc<Mutex<HashMap<String, String>>>,
    /// Held while one is taken up, or a batch is cancelled.
    gate: Arc<tokio::sync::Mutex<()>>,
    /// Comes when there may be something to do.
    wake: Arc<Notify>,
}

impl Batches {
    fn taken(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of those that are taken up.
    fn names(&self) -> Vec<String> {
        self.taken().keys().cloned().collect()
    }
}

impl Jobs {
    /// Has it looked for what waits now.
    pub fn wake_batches(&self) {
        self.0.batches.wake.notify_one();
    }

    /// Makes the runs of batches, for ever.
    pub async fn make_batches(self) {
        let mut later: HashMap<String, Instant> = HashMap::new();
        loop {
            match self.begin_one(&mut later).await {
                Ok(Looked::Begun) => {}
                // Whoever made a batch may have left before it was said.
                Ok(Looked::Nothing) => drop(timeout(LATER, self.0.batches.wake.notified()).await),
                Ok(Looked::NotNow) => drop(timeout(LOOK, self.0.batches.wake.notified()).await),
                Err(error) => {
                    tracing::warn!(%error, "batches wait: the ledger can't be used");
                    sleep(LATER).await;
                }
            }
        }
    }

    /// Takes up one, if there is a place that nobody else wants.
    async fn begin_one(&self, later: &mut HashMap<String, Instant>) -> Result<Looked, ledger::Error> {
        let context = &self.0;
        if context.tasks.is_closed() || !context.queue.has_idle() {
            return Ok(Looked::NotNow);
        }
        later.retain(|_, until| *until > Instant::now());
        let mut apps = context.ledger.apps_with_batches().await?;
        if apps.is_empty() {
            return Ok(Looked::Nothing);
        }
        apps.retain(|app| !later.contains_key(app));
        // Whoever has the fewest comes first.
        let taken: Vec<String> = context.batches.taken().values().cloned().collect();
        apps.sort_by_key(|app| taken.iter().filter(|other| *other == app).count());
        for app in apps {
            let _gate = context.batches.gate.lock().await;
            let Some(waiting) = context.ledger.next_of_batches(&app, context.batches.names()).await? else { continue };
            match self.take_up(waiting).await? {
                TakenUp::Begun => return Ok(Looked::Begun),
                TakenUp::NoPlace => return Ok(Looked::NotNow),
                TakenUp::Later => drop(later.insert(app, Instant::now() + LATER)),
            }
        }
        Ok(Looked::NotNow)
    }

    async fn take_up(&self, waiting: WaitingJob) -> Result<TakenUp, ledger::Error> {
        let context = self.0.clone();
        let id = waiting.job.id.clone();
        let Some(job) = Job::read(waiting) else {
            let rejection = Rejection::Unreadable;
            context.ledger.finish_job(&id, settle::rejected(&rejection, 0)).await?;
            let _ = context.feeds.end(&id, End::Rejected(rejection)).await;
            return Ok(TakenUp::Begun);
        };
        match context.check_budget(&job).await {
            Ok(()) => {}
            Err(Rejection::Spent) => return Ok(TakenUp::Later),
            Err(_) => return Ok(TakenUp::NoPlace),
        }
        let most = job.limits.at_once();
        let request = PermitRequest { app: job.app.clone(), most, run: true };
        let Some(permit) = context.queue.take_idle(request) else {
            return Ok(if context.queue.has_idle() { TakenUp::Later } else { TakenUp::NoPlace });
        };
        let live = Live::new(context.stop.child_token());
        let Ok(feed) = context.feeds.begin(&id, live.clone()).await else {
            tracing::warn!(%id, "a run of a batch waits: its feed can't be written");
            return Ok(TakenUp::Later);
        };
        let (name, app) = (id.to_string(), job.app.clone());
        context.batches.taken().insert(name.clone(), app);
        let life = Life { context: context.clone(), job: Arc::new(job), live, detached: true, row: Some(Row { id, feed }) };
        let batches = context.batches.clone();
        context.tasks.spawn(async move {
            // A defect must not leave it taken for ever.
            let _given_back = GivenBack(batches, name);
            life.run(Admitted::Batch { permit }).await;
        });
        Ok(TakenUp::Begun)
    }

    /// Cancels what waits and what goes on of a batch. When this returns it is over.
    pub async fn cancel_batch(&self, batch: &Batch) -> Result<(), Rejection> {
        let context = &self.0;
        let gate = context.batches.gate.lock().await;
        context.ledger.cancel_waiting_of_batch(&batch.batch_id, context.batches.names()).await?;
        drop(gate);
        // What is left was taken up. All of it is told before any is waited for: a client may leave meanwhile.
        let open = context.ledger.open_of_batch(&batch.batch_id).await?;
        for live in open.iter().filter_map(|run| context.feeds.live(&run.id)) {
            live.cancel.cancel();
        }
        for run in &open {
            self.cancel(run).await?;
        }
        Ok(())
    }
}

enum Looked {
    Begun,
    /// Nothing waits.
    Nothing,
    NotNow,
}

enum TakenUp {
    Begun,
    /// There is no place for anybody.
    NoPlace,
    /// Not of this app for now.
    Later,
}

struct GivenBack(Batches, String);

impl Drop for GivenBack {
    fn drop(&mut self) {
        self.0.taken().remove(&self.1);
        self.0.wake.notify_one();
    }
}
