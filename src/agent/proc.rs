//! What `/proc` tells of processes. That something could not be read, for want of descriptors for one, is not that there is
//! nobody.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};

use rustix::process::{Pid, PidfdFlags, Signal, getpgrp, kill_process_group, pidfd_open, pidfd_send_signal};

/// From the kernel's `sched.h`.
const PF_EXITING: u32 = 4;

/// A line of `/proc/<pid>/stat`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    /// The process group.
    pub(super) group: i32,
    /// Whether it is on its way to be gone, with its children still its own.
    pub(super) exiting: bool,
    /// Clock ticks since boot: with the pid, an identity that is not used again.
    pub(super) started: u64,
}

/// `None` where the process is gone, or closed to this user.
fn found<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Ok(value) => Ok(Some(value)),
        // A process that ends while it is read: ESRCH.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) || error.raw_os_error() == Some(3) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Process {
    /// `None` where it is gone, or a zombie.
    pub(super) fn read(pid: i32) -> io::Result<Option<Self>> {
        let Some(stat) = found(std::fs::read(format!("/proc/{pid}/stat")))? else { return Ok(None) };
        // The name, in parentheses, may hold anything, half a character too.
        let stat = String::from_utf8_lossy(&stat).into_owned();
        let read = || {
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let state = fields.next()?;
            let (parent, group) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let flags: u32 = fields.nth(3)?.parse().ok()?;
            let started = fields.nth(12)?.parse().ok()?;
            (!matches!(state, "Z" | "X")).then_some(Self { pid, parent, group, exiting: flags & PF_EXITING != 0, started })
        };
        Ok(read())
    }

    /// Every process that there is, by its id.
    pub(super) fn everyone() -> io::Result<BTreeMap<i32, Self>> {
        let mut everyone = BTreeMap::new();
        for entry in std::fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            everyone.extend(Self::read(pid)?.map(|process| (pid, process)));
        }
        Ok(everyone)
    }

    /// Empty where it is closed to this user.
    pub(super) fn environ(self) -> io::Result<Vec<u8>> {
        Ok(found(std::fs::read(format!("/proc/{}/environ", self.pid)))?.unwrap_or_default())
    }

    /// Bytes of `/proc/<pid>/<file>` on the lines with these names.
    fn bytes(self, file: &str, names: &[&str]) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/{file}", self.pid)).ok()?;
        let named = status.lines().filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            names.contains(&name).then(|| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())?
        });
        Some(named.sum::<u64>() << 10)
    }

    /// Bytes of memory that are not backed by files.
    pub(super) fn resident(self) -> u64 {
        self.bytes("status", &["RssAnon", "RssShmem", "VmSwap"]).unwrap_or_default()
    }

    /// Its share of what is not backed by files, in bytes.
    pub(super) fn own_memory(self) -> u64 {
        self.bytes("smaps_rollup", &["Pss_Anon", "Pss_Shmem", "SwapPss"]).unwrap_or_else(|| self.resident())
    }

    /// Whether it is not gone yet.
    pub(super) fn lives(self) -> bool {
        // What can't be read may be there.
        Self::read(self.pid).map_or(true, |now| now.is_some_and(|now| now.started == self.started))
    }

    /// Ends it with SIGKILL.
    pub(super) fn kill(self) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        // The id may have gone to another process between the look and the handle; the handle can't change any more.
        if self.lives() {
            let _ = pidfd_send_signal(handle, Signal::KILL);
        }
    }
}

/// Ends a whole process group with SIGKILL: none of its members can fork away from that. Never this process's own.
pub(super) fn kill_group(group: i32) {
    if let Some(group) = Pid::from_raw(group).filter(|group| *group != getpgrp()) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// The id that was given away last, of a process or a thread.
pub(super) fn newest() -> io::Result<i32> {
    let line = std::fs::read_to_string("/proc/loadavg")?;
    line.split_whitespace().last().and_then(|id| id.parse().ok()).ok_or_else(|| io::Error::other("/proc/loadavg does not tell it"))
}

/// This process's children, zombies included. An error too where the kernel has no list of them.
pub(super) fn own_children() -> io::Result<Vec<i32>> {
    let mut children = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        match std::fs::read_to_string(task.join("children")) {
            Ok(list) => children.extend(list.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok())),
            Err(error) if task.exists() => return Err(error),
            // A thread that has ended since has none.
            Err(_) => {}
        }
    }
    Ok(children)
}
