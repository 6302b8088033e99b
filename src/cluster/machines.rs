//! The machines that a gateway has heard of.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use super::wire::Beat;
use crate::clock;
use crate::ledger::WorkerRow;

/// After how long without a word a machine is away, and what it carries out is lost.
pub(super) const AWAY: Duration = Duration::from_secs(10);

/// The machines, by name.
#[derive(Debug, Default)]
pub(super) struct Machines(BTreeMap<String, Seen>);

#[derive(Debug)]
struct Seen {
    beat: Beat,
    /// How long it was not heard of, while it could have been.
    silent: Duration,
    /// Unix seconds.
    seen_at: i64,
    clock_ms: i64,
    /// What it carried out that nobody wants.
    strays: HashSet<String>,
}

impl Machines {
    /// Hears of a machine. `strays` are jobs that it carries out and nobody wants; gives those that were strays before.
    pub(super) fn hear(&mut self, beat: Beat, strays: HashSet<String>) -> Vec<String> {
        let clock_ms = beat.now_ms - clock::now_ms();
        let name = beat.machine.worker.clone();
        let before = self.0.remove(&name).map(|seen| seen.strays).unwrap_or_default();
        let twice = strays.intersection(&before).cloned().collect();
        self.0.insert(name, Seen { beat, silent: Duration::ZERO, seen_at: clock::now(), clock_ms, strays });
        twice
    }

    /// So much time has passed in which they could have been heard.
    pub(super) fn wait(&mut self, time: Duration) {
        self.0.values_mut().for_each(|seen| seen.silent += time);
        // What is away for so long comes back as if for the first time.
        self.0.retain(|_, seen| seen.silent < AWAY * 1000);
    }

    /// Forgets a machine that does not come back.
    pub(super) fn forget(&mut self, worker: &str) {
        self.0.remove(worker);
    }

    fn here(&self) -> impl Iterator<Item = &Seen> {
        self.0.values().filter(|seen| seen.silent < AWAY && !seen.beat.stopping)
    }

    /// Whether a machine is there, or any.
    pub(super) fn is_here(&self, worker: Option<&str>) -> bool {
        self.here().any(|seen| worker.is_none_or(|worker| seen.beat.machine.worker == worker))
    }

    /// The names of those that are there.
    pub(super) fn names(&self) -> Vec<String> {
        self.here().map(|seen| seen.beat.machine.worker.clone()).collect()
    }

    /// How many runs they may have at once, together.
    pub(super) fn places(&self) -> usize {
        self.here().map(|seen| seen.beat.places).sum()
    }

    /// What there is to note of those that were heard of lately.
    pub(super) fn rows(&self) -> Vec<WorkerRow> {
        let row = |seen: &Seen| {
            let Beat { machine, version, places, jobs, started_at, .. } = &seen.beat;
            let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let turns = jobs.iter().filter(|name| name.job.contains('-')).count();
            WorkerRow {
                name: machine.worker.clone(),
                version: version.clone(),
                places: count(*places),
                runs: count(jobs.len() - turns),
                turns: count(turns),
                sessions: 0,
                clock_ms: seen.clock_ms,
                started_at: *started_at,
                seen_at: seen.seen_at,
            }
        };
        self.0.values().filter(|seen| seen.silent < AWAY).map(row).collect()
    }
}
