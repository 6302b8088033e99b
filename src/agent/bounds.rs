//! Bounds on what one run or session may take of memory, processes and the disk.
//!
//! Memory, processes and the processors by control groups, where the server can make them. Else memory, and the disk anywhere, by looking, twice a second at
//! most: that stops a leak or a mistake; what must never be passed is then for the container, or for systemd. In the sandbox no file grows past
//! the bound, however fast.

use std::collections::HashMap;
use std::future::pending;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::family::{self, Tree};
use super::folder;
use super::groups::{Groups, Most};
use super::tag::Tag;
use crate::metrics::METRICS;

const LOOK: Duration = Duration::from_millis(500);
/// Looking at the disk takes one part in so many of the time.
const SHARE: u32 = 20;

/// The bounds, and whom they ended. Clones share that.
#[derive(Clone, Debug, Default)]
pub struct Bounds {
    memory_mib: Option<u64>,
    disk_mib: Option<u64>,
    groups: Option<(Groups, u32)>,
    ended: Arc<Mutex<HashMap<String, Excess>>>,
}

/// Of what it took too much.
#[derive(Clone, Copy, Debug)]
enum Excess {
    Memory,
    Disk,
}

impl Bounds {
    /// So many MiB for a run, or a session: of memory for all that it started, and of the disk for its folder. In these groups, if there
    /// are such, so many processes.
    pub fn new(memory_mib: Option<u64>, disk_mib: Option<u64>, groups: Option<(Groups, u32)>) -> Self {
        Self { memory_mib, disk_mib, groups, ended: Arc::default() }
    }

    /// The group of a run or session, and what it may take.
    pub fn group(&self, id: &str) -> Option<(PathBuf, Most)> {
        let (groups, processes) = self.groups.as_ref()?;
        Some((groups.of(id), Most { memory: self.memory_mib.map(|mib| mib << 20), processes: *processes }))
    }

    /// Bytes that a file may have: as much as all of them together.
    pub fn file_size(&self) -> Option<u64> {
        self.disk_mib.map(|mib| mib << 20)
    }

    fn ended(&self) -> MutexGuard<'_, HashMap<String, Excess>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends whoever of this server takes too much, for ever. Their folders are in `folders`, by their ids.
    pub async fn watch(&self, server: &Tag, folders: &[PathBuf]) {
        tokio::join!(self.watch_memory(server), self.watch_disk(server, folders), self.clear_groups(folders));
    }

    async fn clear_groups(&self, folders: &[PathBuf]) {
        let Some((groups, _)) = &self.groups else { return pending().await };
        loop {
            sleep(LOOK).await;
            let (groups, folders) = (groups.clone(), folders.to_vec());
            let clear = move || groups.clear(|id| folders.iter().any(|folder| folder.join(id).exists()));
            let _ = tokio::task::spawn_blocking(clear).await;
        }
    }

    async fn watch_memory(&self, server: &Tag) {
        let Some(limit) = self.memory_mib.map(|mib| mib << 20).filter(|_| self.groups.is_none()) else { return pending().await };
        loop {
            sleep(LOOK).await;
            let server = server.clone();
            let look = move || family::trees(&server).into_iter().filter(|(_, tree)| tree.takes_more_than(limit)).collect();
            self.end(tokio::task::spawn_blocking(look).await.unwrap_or_default(), Excess::Memory);
        }
    }

    async fn watch_disk(&self, server: &Tag, folders: &[PathBuf]) {
        let Some(limit) = self.disk_mib.map(|mib| mib << 20) else { return pending().await };
        let mut pause = LOOK;
        loop {
            sleep(pause).await;
            let (begun, server, folders) = (Instant::now(), server.clone(), folders.to_vec());
            let is_too_large = move |id: &str| folders.iter().any(|folder| folder::holds_more_than(&folder.join(id), limit));
            let look = move || family::trees(&server).into_iter().filter(|(id, _)| is_too_large(id)).collect();
            self.end(tokio::task::spawn_blocking(look).await.unwrap_or_default(), Excess::Disk);
            pause = LOOK.max(begun.elapsed() * SHARE);
        }
    }

    fn end(&self, large: Vec<(String, Tree)>, excess: Excess) {
        for (id, tree) in large {
            tracing::warn!(id, ?excess, "it took too much; ending it");
            METRICS.killed(match excess {
                Excess::Memory => "memory",
                Excess::Disk => "disk",
            });
            self.ended().insert(id, excess);
            tree.end();
        }
    }

    /// Says, once, that this run or session was ended, if it was.
    pub fn why_ended(&self, id: &str) -> Option<String> {
        let lacked_memory = || self.groups.as_ref().is_some_and(|(groups, _)| groups.lacked_memory(id));
        let excess = self.ended().remove(id).or_else(|| lacked_memory().then_some(Excess::Memory))?;
        let (took, less, setting) = match excess {
            Excess::Memory => (self.memory_mib, "of memory; give it less to do at once", "CLAWDFORGE_AGENT_MEMORY_MB"),
            Excess::Disk => {
                (self.disk_mib, "of the disk; have it make less, in another session where this was one", "CLAWDFORGE_AGENT_DISK_MB")
            }
        };
        Some(format!("it was ended because it took more than {} MiB {less}, or ask the operator ({setting})", took.unwrap_or_default()))
    }
}
