//! This process's children: those that it started, and those that it adopted.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::proc;
use super::tag::{Tag, VARIABLE};

/// Whether a child was given nothing to do yet, and so started nothing on an app's behalf.
type Idle = bool;
/// Children that tokio waits for; any other child of this process was adopted. A fact of the whole process, so a static.
static STARTED: Mutex<BTreeMap<u32, Idle>> = Mutex::new(BTreeMap::new());
static ADOPTS: AtomicBool = AtomicBool::new(false);
/// A child that is tagged, and known as one that this process started.
#[derive(Debug)]
pub struct Started {
    /// The child.
    pub child: Child,
    pid: u32,
}

impl Started {
    /// Notes whether it was given nothing to do yet.
    pub fn set_idle(&self, idle: bool) {
        started().insert(self.pid, idle);
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        started().remove(&self.pid);
    }
}

/// Starts `command` as the first of a family, in a process group of its own: a Ctrl-C at the terminal is for the server.
pub fn start(command: &mut Command, tag: &Tag) -> io::Result<Started> {
    tag.begin();
    command.env(VARIABLE, tag.value()).process_group(0).kill_on_drop(true);
    // Under the lock, so that the child is never seen as one that was adopted.
    let mut known = started();
    let child = command.spawn()?;
    let pid = child.id().expect("a child that was not waited for has an id");
    known.insert(pid, false);
    Ok(Started { child, pid })
}

pub(super) fn started() -> MutexGuard<'static, BTreeMap<u32, Idle>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this process is the parent of every orphan below it.
pub(super) fn adopts() -> bool {
    ADOPTS.load(Ordering::Relaxed)
}

/// Makes this process the parent of every orphan below it. Only for a process whose children are all agents.
pub fn adopt() -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    ADOPTS.store(true, Ordering::Relaxed);
    Ok(())
}

/// Waits for adopted children as they die, for ever. Nobody else would, and they would stay as zombies.
pub async fn reap() -> io::Result<()> {
    let mut deaths = signal(SignalKind::child())?;
    loop {
        reap_adopted();
        deaths.recv().await;
    }
}

fn reap_adopted() {
    let known = started();
    for pid in proc::own_children().unwrap_or_default() {
        if !known.contains_key(&pid.cast_unsigned()) {
            // Waits only for one that is dead already.
            let _ = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG);
        }
    }
}
