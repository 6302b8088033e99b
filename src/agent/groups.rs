//! Control groups (cgroup v2), where the server was given one in which it can make others: each run or session gets its own, so that what takes
//! all memory, forks without end or computes for ever hurts itself alone.
//!
//! The group is made by the process that is to become an agent, before it restricts itself, and joined by it; all that it starts is in it. It
//! is taken away when nothing is in it any more.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// What the names of agents' groups begin with.
const AGENT: &str = "agent-";
/// The server's own group: one that has groups in it has no processes of its own.
const SERVER: &str = "server";
/// What is bounded, as the kernel calls it.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// How much more of the processors the server gets than an agent, where all are taken.
const SERVER_WEIGHT: &str = "1000";

/// The group in which agents' groups are made.
#[derive(Clone, Debug)]
pub struct Groups(PathBuf);

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum Impossible {
    /// The kernel, or what mounts its file systems, is older.
    #[error("this machine has no cgroup v2")]
    NoSuchKernel,
    /// To divide it would move them.
    #[error(
        "other processes are in this one's control group; have it started with one of its own, under systemd with Delegate=cpu memory pids"
    )]
    Shared,
    /// It is somebody else's.
    #[error("the control group {0} is not this user's to divide ({1}); under systemd set Delegate=cpu memory pids")]
    NotDelegated(PathBuf, #[source] io::Error),
    /// What is above it does not hand that on.
    #[error("the control group {0} bounds no {1}; have it delegated, under systemd by Delegate=cpu memory pids")]
    Lacks(PathBuf, &'static str),
}

impl Groups {
    /// Finds the group of this process, and whether it can be divided.
    pub fn find() -> Result<Self, Impossible> {
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = folder_of(&membership, &mounts).ok_or(Impossible::NoSuchKernel)?;
        let read = |name: &str| fs::read_to_string(own.join(name)).map_err(|error| Impossible::NotDelegated(own.clone(), error));
        let controllers = read("cgroup.controllers")?;
        if let Some(lacking) = CONTROLLERS.into_iter().find(|name| !controllers.split_whitespace().any(|there| there == *name)) {
            return Err(Impossible::Lacks(own, lacking));
        }
        // A container's first process may be another's parent, and moves along.
        let is_known = |pid: &str| pid == "1" || pid == std::process::id().to_string();
        if !read("cgroup.procs")?.split_whitespace().all(is_known) {
            return Err(Impossible::Shared);
        }
        let writable = rustix::fs::access(own.join("cgroup.procs"), rustix::fs::Access::WRITE_OK);
        let writable = writable.and_then(|()| rustix::fs::access(&own, rustix::fs::Access::WRITE_OK));
        match writable {
            Ok(()) => Ok(Self(own)),
            Err(error) => Err(Impossible::NotDelegated(own, error.into())),
        }
    }

    /// Divides it: the server goes to a group of its own in it. Takes away what an earlier server left.
    pub fn take(self) -> Result<Self, Impossible> {
        let divide = || {
            let server = self.0.join(SERVER);
            match fs::create_dir(&server) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            for pid in fs::read_to_string(self.0.join("cgroup.procs"))?.split_whitespace() {
                fs::write(server.join("cgroup.procs"), pid)?;
            }
            fs::write(self.0.join("cgroup.subtree_control"), CONTROLLERS.map(|name| format!("+{name}")).join(" "))?;
            fs::write(server.join("cpu.weight"), SERVER_WEIGHT)
        };
        divide().map_err(|error| Impossible::NotDelegated(self.0.clone(), error))?;
        self.clear(|_| false);
        Ok(self)
    }

    /// The group of the run or session of this id.
    pub fn of(&self, id: &str) -> PathBuf {
        self.0.join(format!("{AGENT}{id}"))
    }

    /// Takes the groups away of which no run or session is left. One in which something is stays.
    pub fn clear(&self, is_left: impl Fn(&str) -> bool) {
        let names = self.0.read_dir().into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
        for id in names.filter_map(|name| name.strip_prefix(AGENT).map(str::to_owned)).filter(|id| !is_left(id)) {
            let _ = fs::remove_dir(self.of(&id));
        }
    }

    /// Whether something in the group of this id was ended because it had no memory left.
    pub fn lacked_memory(&self, id: &str) -> bool {
        let events = fs::read_to_string(self.of(id).join("memory.events")).unwrap_or_default();
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse::<u64>().ok());
        killed.is_some_and(|killed| killed > 0)
    }
}

/// What a group may take.
#[derive(Clone, Copy, Debug)]
pub struct Most {
    /// Bytes of memory; `None` for as much as there is.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub processes: u32,
}

/// Makes a group, or takes the one that is there, and has this process join it.
pub fn join(group: &Path, most: Most) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match try_join(group, most) {
            // It was empty, and another took it away at that moment.
            Err(error) if error.kind() == ErrorKind::NotFound && tries < 3 => tries += 1,
            joined => return joined,
        }
    }
}

fn try_join(group: &Path, Most { memory, processes }: Most) -> io::Result<()> {
    // An empty one has counted what became of others.
    let _ = fs::remove_dir(group);
    match fs::create_dir(group) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::write(group.join("pids.max"), processes.to_string())?;
    if let Some(memory) = memory {
        fs::write(group.join("memory.max"), memory.to_string())?;
        // Kernels without swap have no such file.
        let _ = fs::write(group.join("memory.swap.max"), "0");
        // All of it, so that nothing goes on half.
        fs::write(group.join("memory.oom.group"), "1")?;
    }
    fs::write(group.join("cgroup.procs"), "0")
}

/// The folder of this process's group, by `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn folder_of(membership: &str, mounts: &str) -> Option<PathBuf> {
    let path = membership.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mount = mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        kind.starts_with("cgroup2 ").then(|| Some((fields.next()?, fields.next()?)))?
    });
    let (root, at) = mount?;
    // Below what is mounted, which in a container may be a part.
    let below = path.strip_prefix(root.trim_end_matches('/')).unwrap_or(path);
    Some(Path::new(at).join(below.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_found_below_what_is_mounted() {
        let mounts = "30 23 0:26 / /sys rw - sysfs sysfs rw\n35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        let of = |membership, mounts| folder_of(membership, mounts).map(|folder| folder.display().to_string());
        let service = "1:name=systemd:/x\n0::/system.slice/clawdforge.service\n";
        assert_eq!(of(service, mounts).as_deref(), Some("/sys/fs/cgroup/system.slice/clawdforge.service"));
        assert_eq!(of("0::/\n", mounts).as_deref(), Some("/sys/fs/cgroup/"));
        let part = "35 24 0:30 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(of("0::/docker/x/y\n", part).as_deref(), Some("/sys/fs/cgroup/y"));
        assert_eq!(of("0::/\n", "30 23 0:26 / /sys rw - sysfs sysfs rw\n"), None);
        assert_eq!(of("4:memory:/x\n", mounts), None);
    }
}
