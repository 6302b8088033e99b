//! Every process that an agent started, wherever it went.
//!
//! A process group does not hold an agent together: a command that its Bash tool starts is in a session of its own, and
//! is re-parented when the agent dies. So each agent's environment carries a tag, which all that it starts inherits,
//! and its family is what `/proc` shows with that tag, and everything below. The daemon also takes the place of init
//! for its descendants ([`super::children::adopt`]): what wiped its environment and left its parent comes back to the daemon as a child
//! that it never started, and is ended as an orphan, with the last run that it may be of.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::children::{adopts, started};
use super::proc::{self, Process};
use super::tag::Tag;

/// How long processes may take to die of SIGKILL before they are reported as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// How long before it is tried again to end what was left.
const AGAIN: Duration = Duration::from_secs(1);
/// How long own children alone, or the newest processes alone, are looked at, at most.
const CHASE: Duration = Duration::from_millis(50);
/// How long they are looked at until none ends meanwhile, at most.
const LOOK: Duration = Duration::from_millis(20);

/// Families of which something could not be ended yet.
static UNFINISHED: Mutex<Vec<Tag>> = Mutex::new(Vec::new());

/// What this process's own children tell of a run: whatever of it lost its parent is one of them, or below one.
struct Children {
    /// Those with its tag, and orphans that can be nobody else's.
    of_it: Vec<Process>,
    /// Whether there are orphans that may be another's.
    orphans: bool,
    /// Whether none ended while they were looked at. What such a one had started may be missing.
    sure: bool,
}

fn children_of(tag: &Tag) -> io::Result<Children> {
    let begun = Instant::now();
    let mut dead = BTreeSet::new();
    loop {
        // Under the lock, so that none is waited for meanwhile: the kernel's list leaves out who stands behind one that goes.
        let (list, known) = {
            let known = started();
            (proc::own_children()?, known.clone())
        };
        let mut children = Children { of_it: Vec::new(), orphans: false, sure: true };
        let (mut orphans, mut others) = (Vec::new(), Vec::new());
        for pid in list {
            let Some(child) = Process::read(pid)? else {
                // One that was dead before this list was made has nothing that is not on it.
                children.sure &= !dead.insert(pid);
                continue;
            };
            let environ = child.environ()?;
            // It has no environment any more.
            let exiting = environ.is_empty() && Process::read(pid)?.is_none_or(|now| now.exiting);
            children.sure &= !exiting;
            if tag.is_in(&environ) {
                children.of_it.push(child);
            } else if let Some(idle) = known.get(&pid.cast_unsigned()) {
                others.extend((!idle).then_some(child));
            } else if !exiting && !tag.is_of_live_run(&environ) {
                // The idle processes of a session were adopted too, and carry its own tag.
                orphans.push(child);
            }
        }
        let (of_it, of_others) = orphans.into_iter().partition::<Vec<_>, _>(|orphan| began_before_all(orphan, &others));
        children.of_it.extend(of_it);
        children.orphans = !of_others.is_empty();
        if children.sure || !children.of_it.is_empty() || begun.elapsed() > LOOK {
            return Ok(children);
        }
    }
}

/// Whether it is certain, without a look at every process, that nothing of a run is left.
fn surely_gone(tag: &Tag) -> io::Result<bool> {
    if tag.run.is_none() || !adopts() {
        return Ok(false);
    }
    let Children { of_it, orphans, sure } = children_of(tag)?;
    Ok(of_it.is_empty() && !orphans && sure)
}

/// Ends with SIGKILL all that carries the tag, or descends from what does, and orphans. Returns when none is left, with
/// how many there were. Where that takes too long, what is left is said, and [`keep_ending`] goes on with it.
pub async fn end(tag: &Tag) -> usize {
    let (of, starts) = (tag.clone(), tag.starts());
    let ended = tokio::task::spawn_blocking(move || end_blocking(&of)).await;
    match ended {
        Ok(Ok(count)) => {
            tag.end(starts);
            count
        }
        Ok(Err(left)) => {
            tracing::error!(family = tag.value(), %left, "processes of an agent are left; trying again until they are gone");
            unfinished().push(tag.clone());
            left.ended
        }
        Err(_) => 0,
    }
}

/// Goes on with what [`end`] could not end, for ever.
pub async fn keep_ending() {
    loop {
        tokio::time::sleep(AGAIN).await;
        let left = std::mem::take(&mut *unfinished());
        for tag in left {
            let (of, starts) = (tag.clone(), tag.starts());
            match tokio::task::spawn_blocking(move || end_blocking(&of)).await {
                Ok(Ok(count)) => {
                    tag.end(starts);
                    tracing::info!(family = tag.value(), count, "what was left of an agent is gone");
                }
                _ => unfinished().push(tag),
            }
        }
    }
}

fn unfinished() -> MutexGuard<'static, Vec<Tag>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What could not be ended in time.
#[derive(Debug, thiserror::Error)]
#[error("{why}; {pids:?}")]
struct Left {
    why: String,
    pids: Vec<i32>,
    ended: usize,
}

fn end_blocking(tag: &Tag) -> Result<usize, Left> {
    let begun = Instant::now();
    let mut ended: BTreeMap<i32, Process> = BTreeMap::new();
    let mut pause = Duration::from_millis(1);
    // What can't be read is looked at again.
    if surely_gone(tag).unwrap_or(false) {
        return Ok(0);
    }
    loop {
        // Again until none is found: one that forks while it is being looked for escapes a single look.
        let found = members(tag);
        let (pids, why) = match &found {
            // One that is dying has no environment to be known by any more, and is not gone yet.
            Ok(family) if family.of.is_empty() && !ended.values().any(|process| process.lives()) && none_escaped(tag) => {
                return Ok(ended.len());
            }
            Ok(family) => {
                (family.of.iter().map(|process| process.pid).collect(), "they do not die of SIGKILL, or start others faster".to_owned())
            }
            Err(error) => (Vec::new(), format!("/proc can't be read ({error})")),
        };
        if let Ok(Family { of, groups }) = found {
            groups.into_iter().for_each(proc::kill_group);
            for process in of {
                process.kill();
                ended.insert(process.pid, process);
            }
            chase(tag);
        }
        if begun.elapsed() > STUCK_AFTER {
            return Err(Left { why, pids, ended: ended.len() });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Whether nothing is left of a chain of processes that each start the next and end: such a one is there for less time than a look
/// at everyone takes, but is adopted.
fn none_escaped(tag: &Tag) -> bool {
    if adopts() {
        return children_of(tag).is_ok_and(|children| children.of_it.is_empty() && children.sure);
    }
    end_newest(tag).is_ok_and(|met| met == 0)
}

/// Ends for a while nothing but own children, over and over: one of such a chain has to be met before it starts the next.
fn chase(tag: &Tag) {
    let begun = Instant::now();
    while begun.elapsed() < CHASE {
        match children_of(tag) {
            Ok(Children { of_it, sure, .. }) if !of_it.is_empty() || !sure => of_it.into_iter().for_each(Process::kill),
            _ => return,
        }
    }
}

/// The same of processes that begin just now, whoever adopted them: what a crash left is not this process's. Gives how many were
/// met.
fn end_newest(tag: &Tag) -> io::Result<usize> {
    let (begun, mut met) = (Instant::now(), 0);
    let mut seen = proc::newest()?;
    while begun.elapsed() < CHASE {
        let newest = proc::newest()?;
        // Ids begin anew when they are used up.
        for pid in seen.min(newest)..=newest {
            if let Some(process) = Process::read(pid)?
                && tag.is_in(&process.environ()?)
            {
                process.kill();
                met += 1;
            }
        }
        seen = newest;
    }
    Ok(met)
}

/// Who is to be ended.
struct Family {
    of: Vec<Process>,
    /// The process groups that nobody else is in.
    groups: BTreeSet<i32>,
}

fn members(tag: &Tag) -> io::Result<Family> {
    let own_pid = rustix::process::getpid().as_raw_nonzero().get();
    let mut family = BTreeSet::new();
    let mut adopted = Vec::new();
    let everyone = Process::everyone()?;
    for process in everyone.values() {
        let environ = process.environ()?;
        if tag.is_in(&environ) {
            family.insert(process.pid);
        } else if process.parent == own_pid && !tag.is_of_live_run(&environ) {
            adopted.push(*process);
        }
    }
    if adopts() {
        // Looked up after the list was made: a child that was being started then is known by now.
        let known = started();
        let others = known.iter().filter(|(_, idle)| !**idle).map(|(pid, _)| pid.cast_signed()).filter(|pid| !family.contains(pid));
        let others: Vec<_> = others.filter_map(|pid| everyone.get(&pid)).copied().collect();
        let orphans = adopted.iter().filter(|orphan| !known.contains_key(&orphan.pid.cast_unsigned()));
        family.extend(orphans.filter(|orphan| began_before_all(orphan, &others)).map(|orphan| orphan.pid));
    }
    family.remove(&own_pid);
    let (of, others): (Vec<_>, Vec<_>) = everyone.values().copied().partition(|process| descends(process.pid, &family, &everyone));
    // An agent may have joined another's group.
    let groups = of.iter().map(|process| process.group).filter(|group| others.iter().all(|other| other.group != *group)).collect();
    Ok(Family { of, groups })
}

/// Whether a family is down to its first process and that one's own children: nothing goes on that a tool started.
pub async fn has_no_tools(tag: &Tag, first: u32) -> bool {
    let (tag, first) = (tag.clone(), first.cast_signed());
    let look = move || members(&tag).is_ok_and(|family| family.of.iter().all(|process| process.pid == first || process.parent == first));
    tokio::task::spawn_blocking(look).await.unwrap_or(false)
}

/// A child of this process, and all below it.
#[derive(Debug)]
pub struct Tree(Vec<Process>);

impl Tree {
    /// Ends all of it with SIGKILL.
    pub fn end(&self) {
        self.0.iter().for_each(|process| process.kill());
    }

    /// Whether it takes more than `limit` bytes, swapped out or not.
    pub fn takes_more_than(&self, limit: u64) -> bool {
        let sum = |memory: fn(Process) -> u64| self.0.iter().copied().map(memory).sum::<u64>();
        // Pages that a process shares with its children count once in the second look, which takes longer.
        sum(Process::resident) > limit && sum(Process::own_memory) > limit
    }
}

/// The tagged children of this process, by the ids of their runs, each with all below it. By descent and not by the tags of what they
/// started: those an agent can forge.
pub fn trees(server: &Tag) -> Vec<(String, Tree)> {
    let own_pid = rustix::process::getpid().as_raw_nonzero().get();
    let everyone = Process::everyone().unwrap_or_default();
    let children = everyone.values().filter(|process| process.parent == own_pid);
    let trees = children.filter_map(|child| {
        let root = BTreeSet::from([child.pid]);
        let members = everyone.values().filter(|process| descends(process.pid, &root, &everyone)).copied().collect();
        Some((server.run_of(&child.environ().ok()?)?, Tree(members)))
    });
    trees.collect()
}

/// Whether an orphan can't be of one of these other runs: then they all began later. Else it is left to the end of the last of them.
fn began_before_all(orphan: &Process, others: &[Process]) -> bool {
    others.iter().all(|other| orphan.started < other.started)
}

fn descends(mut pid: i32, from: &BTreeSet<i32>, everyone: &BTreeMap<i32, Process>) -> bool {
    // Bounded, because a list that was read while it changed may hold a loop.
    for _ in 0..everyone.len() {
        if from.contains(&pid) {
            return true;
        }
        let Some(process) = everyone.get(&pid) else { return false };
        pid = process.parent;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::children::start;
    use tokio::process::Command;

    #[tokio::test]
    async fn a_family_ends_with_what_left_its_session_and_wiped_its_environment() {
        let folder = tempfile::tempdir().unwrap();
        let tag = Tag::server(folder.path()).unwrap().run("x");
        let pids = folder.path().join("pids");
        let script =
            format!("setsid sleep 600 & echo $! > {0}; env -i /bin/sleep 600 & echo $! >> {0}; echo $$ >> {0}; wait", pids.display());
        let mut family = start(Command::new("/bin/sh").args(["-c", &script]), &tag).unwrap();
        let begun = Instant::now();
        let read = || std::fs::read_to_string(&pids).unwrap_or_default().lines().map(|line| line.parse().unwrap()).collect::<Vec<i32>>();
        while read().len() < 3 {
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(end(&tag).await >= 3);
        family.child.wait().await.unwrap();
        assert_eq!(read().into_iter().filter_map(|pid| Process::read(pid).unwrap()).count(), 0);
    }
}
