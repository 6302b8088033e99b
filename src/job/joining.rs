//! Jobs that the same request, sent again by a client's library, joins instead of beginning another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::DropGuard;

use super::Jobs;
use super::live::Live;
use crate::ledger::JobId;

/// How long a job goes on, and its answer is there, for a client that left and may come back. Libraries try again within a second.
const GRACE: Duration = Duration::from_secs(2);

/// What may be joined, by what was asked for.
#[derive(Debug, Default)]
pub(super) struct Joinable(Mutex<HashMap<String, Weak<Joined>>>);

/// A job that clients wait for.
#[derive(Debug)]
pub struct Joined {
    /// What it is called.
    pub id: JobId,
    /// What there is to see of it.
    pub live: Live,
    /// Dropped with the last client, it cancels the job.
    guard: Option<DropGuard>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        // What has ended is left to end its processes by itself.
        if let Some(guard) = self.guard.take().filter(|_| self.live.ended().is_some()) {
            guard.disarm();
        }
    }
}

/// A client's share in a job. When the last is dropped a job that goes on is cancelled, at once or after the grace.
pub struct Share {
    joined: Option<Arc<Joined>>,
    grace: Option<Jobs>,
}

impl Share {
    /// The job.
    pub fn job(&self) -> &Joined {
        self.joined.as_deref().expect("it is there until the share is dropped")
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let Some((joined, jobs)) = self.joined.take().zip(self.grace.take()) else { return };
        if joined.live.ended().is_some() {
            return;
        }
        let stop = jobs.0.stop.clone();
        jobs.0.tasks.spawn(async move {
            let _ = stop.run_until_cancelled(sleep(GRACE)).await;
            drop(joined);
        });
    }
}

impl Jobs {
    /// A share in a job that was just taken on. With a `key` whoever asks for the same joins it, as long as it goes on.
    pub fn share(&self, key: Option<String>, id: JobId, live: Live, guard: Option<DropGuard>) -> Share {
        let joined = Arc::new(Joined { id, live, guard });
        let grace = key.is_some().then(|| self.clone());
        if let Some(key) = key {
            let mut joinable = self.0.joinable.0.lock().unwrap_or_else(PoisonError::into_inner);
            joinable.retain(|_, joined| joined.strong_count() > 0);
            joinable.insert(key, Arc::downgrade(&joined));
        }
        Share { joined: Some(joined), grace }
    }

    /// A share in the job that goes on for this key.
    pub fn join(&self, key: &str) -> Option<Share> {
        let joined = self.0.joinable.0.lock().unwrap_or_else(PoisonError::into_inner).get(key)?.upgrade()?;
        Some(Share { joined: Some(joined), grace: Some(self.clone()) })
    }
}
