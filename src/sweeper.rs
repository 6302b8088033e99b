//! What time takes away: expired uploads, rows past their retention, and files that an end in the middle left.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use crate::agent::claude::workspace::RunDirs;
use crate::agent::folder::clear;
use crate::blocking::blocking;
use crate::job::feed::{self, Feeds};
use crate::ledger::{self, Ledger};
use crate::session::Sessions;
use crate::uploads::{self, Uploads};

/// What is swept.
pub struct Sweeper {
    /// Idle ones are closed, closed ones deleted.
    pub sessions: Sessions,
    /// Expired ones go.
    pub uploads: Uploads,
    /// Old rows go, and keys.
    pub ledger: Ledger,
    /// Old ones go, and those of no job.
    pub feeds: Feeds,
    /// Those that could not be removed at their run's end.
    pub run_dirs: RunDirs,
    /// The folder of memories.
    pub memories: PathBuf,
    /// Days that rows are kept.
    pub retention_days: u32,
}

impl Sweeper {
    /// Sweeps every `period`, for ever. What fails is logged, and tried again the next time.
    pub async fn sweep(&self, period: Duration) {
        loop {
            tokio::time::sleep(period).await;
            report("sessions", self.sessions.sweep().await);
            report("uploads", self.uploads.sweep(&self.ledger).await);
            report("last uses of tokens", self.ledger.flush_used().await.map(|()| 0));
            report("old runs and events of sessions", self.ledger.forget_jobs(self.retention_days).await);
            report("old batches", self.ledger.forget_batches(self.retention_days).await);
            report("requests for batches that broke off", self.ledger.forget_broken_batches(false).await);
            report("old webhooks", self.ledger.forget_deliveries(self.retention_days).await);
            report("folders of runs", self.run_dirs.sweep().await);
            report("memories", self.forgotten_memories().await);
            report("feeds", self.feeds.sweep().await);
            report("feeds without a row", self.orphaned_feeds().await);
            report("idempotency keys", self.ledger.forget_keys(feed::KEPT.as_secs()).await);
            report("kept responses", self.ledger.forget_responses(feed::KEPT.as_secs()).await);
        }
    }

    /// Memories of apps whose token keeps none, or is out of force.
    async fn forgotten_memories(&self) -> Result<usize, ledger::Error> {
        let tokens = self.ledger.tokens().await?;
        let kept: HashSet<String> = tokens.into_iter().filter(|token| token.enabled).filter_map(|token| token.rules.memory).collect();
        let folder = self.memories.clone();
        // There is none before the first.
        Ok(blocking(move || clear(&folder, |name| kept.contains(name))).await.unwrap_or(0))
    }

    /// What a crash left of a job that has no row, and what an earlier release left of deleted sessions.
    async fn orphaned_feeds(&self) -> Result<usize, uploads::Error> {
        let orphans = self.ledger.without_row(self.feeds.settled().await?).await?;
        Ok(self.feeds.remove(orphans).await?)
    }
}

fn report(what: &str, swept: Result<usize, impl std::error::Error>) {
    match swept {
        Ok(0) => {}
        Ok(count) => tracing::info!(what, count, "swept"),
        Err(error) => tracing::warn!(what, %error, "not swept"),
    }
}
