//! A bound on what one run or session may take of memory.
//!
//! By looking, twice a second: a control group would be exact, but few places let a server without privileges make one. So it
//! stops a leak or a mistake; what must never be passed is for the container, or for systemd.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::family::{self, Large};
use super::tag::Tag;
use crate::metrics::METRICS;

const LOOK: Duration = Duration::from_millis(500);

/// The bound, and whom it ended. Clones share it.
#[derive(Clone, Debug)]
pub struct Memory {
    mib: u64,
    ended: Arc<Mutex<HashSet<String>>>,
}

impl Memory {
    /// So many MiB for a run, or a session, with all that it started.
    pub fn new(mib: u64) -> Self {
        Self { mib, ended: Arc::default() }
    }

    fn ended(&self) -> MutexGuard<'_, HashSet<String>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends whoever of this server takes too much, for ever.
    pub async fn watch(&self, server: &Tag) {
        loop {
            tokio::time::sleep(LOOK).await;
            let (of, limit) = (server.clone(), self.mib << 20);
            let too_large = tokio::task::spawn_blocking(move || family::larger_than(&of, limit)).await.unwrap_or_default();
            for Large { id, bytes, tree } in too_large {
                tracing::warn!(id, mib = bytes >> 20, most = self.mib, "it took too much memory; ending it");
                METRICS.killed("memory");
                self.ended().insert(id);
                tree.end();
            }
        }
    }

    /// Says, once, that this run or session was ended, if it was.
    pub fn why_ended(&self, id: &str) -> Option<String> {
        let ended = self.ended().remove(id);
        ended.then(|| format!("it was ended because it took more than {} MiB of memory; give it less to do at once, or ask the operator (CLAWDFORGE_AGENT_MEMORY_MB)", self.mib))
    }
}
