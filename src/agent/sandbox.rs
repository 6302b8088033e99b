//! The sandbox: an agent keeps everything that its user can reach, but for the server's data folder, of which only its own
//! folder is its own, and the user's home, of which it can read programs and settings.
//!
//! Landlock only allows, so all but these two is allowed by walking down to them and allowing every sibling on the way.
//! A process that restricted itself passes the restriction on to all that it starts. So the server starts an agent as
//! `clawdforge confine …`, which restricts itself and becomes the agent. Symbolic links are not followed on the way: what
//! one names is allowed where it really is, or not at all.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule};

use super::claude::files::config_folder;
use super::environment::Environment;
use super::programs;

/// The newest interface of which the rights to files are made use of.
const NEWEST: ABI = ABI::V5;

/// Why an agent could not be restricted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no Landlock, or it is switched off.
    #[error("this kernel can't restrict agents (Landlock: {0})")]
    Unsupported(#[from] RulesetError),
    /// The kernel has no filters of system calls, or this processor is not known.
    #[error("this kernel can't restrict agents (seccomp: {0})")]
    Unfiltered(#[from] seccompiler::Error),
    /// A folder on the way to what is hidden can't be read.
    #[error("{0} can't be read ({1})")]
    Unreadable(PathBuf, #[source] io::Error),
}

/// Why agents are not shut out of the data folder.
#[derive(Debug, thiserror::Error)]
pub enum Impossible {
    /// It is not wanted.
    #[error("CLAWDFORGE_SANDBOX is \"off\"")]
    Off,
    /// The kernel has no Landlock, or it is switched off.
    #[error("this kernel has no Landlock, or it is switched off; use Linux 5.13 or newer")]
    Unsupported,
    /// There are no filters of system calls, or something forbids them.
    #[error(
        "this kernel has no filters of system calls, or the service may not use them; allow the call \"seccomp\", as packaging/clawdforge.service does"
    )]
    Unfiltered,
    /// What is beside a hidden folder, and so to be allowed, is not known.
    #[error("{} can't be listed by this user, and agents are to be shut out of {}; move that, to /var/lib/clawdforge for instance", .0.display(), .1.display())]
    Unlisted(PathBuf, PathBuf),
}

/// Folders for what is temporary that all programs share.
const SHARED: [&str; 2] = ["/tmp", "/var/tmp"];

/// What agents are to be shut out of: the data folder, the home of the server's user, claude's configuration, which may lie elsewhere, and
/// come to be there later, and what all programs share for what is temporary.
pub fn hidden(data_dir: &Path, environment: &Environment) -> Vec<PathBuf> {
    let own = [environment.get("HOME").map(PathBuf::from), config_folder(environment)].into_iter().flatten();
    let own = own.chain(SHARED.map(PathBuf::from));
    // Some services have / for their home.
    let own = own.map(|folder| folder.canonicalize().unwrap_or(folder)).filter(|folder| folder.is_absolute() && folder.parent().is_some());
    own.chain([data_dir.to_owned()]).collect()
}

/// Whether agents can be shut out of these, on this kernel and where they lie.
pub fn check(hidden: &[PathBuf]) -> Result<(), Impossible> {
    ruleset(CompatLevel::HardRequirement, ABI::V1).map_err(|_| Impossible::Unsupported)?;
    for folder in hidden {
        // What is not there has nothing beside it.
        let above = folder.ancestors().skip(1).filter(|above| above.exists());
        if let Some(above) = above.into_iter().find(|above| above.read_dir().is_err()) {
            return Err(Impossible::Unlisted(above.to_owned(), folder.clone()));
        }
    }
    // A filter can't be taken off again, so another process tries it.
    let mut tries = Command::new("/proc/self/exe");
    tries.arg0("clawdforge").args(["confine", "--cut-off", "--", "/proc/self/exe", "--version"]);
    let tried = tries.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if tried.is_ok_and(|status| status.success()) { Ok(()) } else { Err(Impossible::Unfiltered) }
}

fn ruleset(level: CompatLevel, abi: ABI) -> Result<RulesetCreated, RulesetError> {
    Ruleset::default().set_compatibility(level).handle_access(AccessFs::from_all(abi))?.create()
}

/// A name by which this program is called to become an agent, and the variable that says how. Not by arguments: every process
/// of the machine can read those, other apps' agents among them.
#[derive(Clone, Copy, Debug)]
pub struct CalledAs {
    /// What the program is called.
    pub name: &'static str,
    /// The variable, whose value [`packed`] makes.
    pub variable: &'static str,
}

/// The agent of a run, and the acpx of a session.
pub const AGENT: CalledAs = CalledAs { name: "clawdforge-agent", variable: "AGENT_CONFINE" };
/// The claude of a session.
pub const CLAUDE: CalledAs = CalledAs { name: "claude-of-session", variable: "AGENT_CLAUDE_CONFINE" };

/// What stands between arguments that are one value. No path has it.
const BETWEEN: &str = "\u{1f}";

/// Arguments of `clawdforge confine` as the value of a variable.
pub fn packed(arguments: &[OsString]) -> OsString {
    arguments.join(OsStr::new(BETWEEN))
}

/// The arguments that [`packed`] made one.
pub fn unpacked(value: &OsStr) -> Vec<OsString> {
    value.as_bytes().split(|byte| *byte == BETWEEN.as_bytes()[0]).map(|part| OsStr::from_bytes(part).to_owned()).collect()
}

/// How agents are confined.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// What they are shut out of, but for the folder that each works in, as [`hidden`] finds it. Absolute, without links.
    pub hidden: Vec<PathBuf>,
    /// What they can read all the same.
    pub read: Vec<PathBuf>,
    /// Whether they are cut off from the processes outside.
    pub cut_off: bool,
}

impl Confinement {
    /// What an agent can read that is to be this program, and to read this too.
    pub fn to_read(&self, program: &Path, read: &[PathBuf]) -> Vec<PathBuf> {
        self.read.iter().chain(read).cloned().chain(self.places(program)).collect()
    }

    /// Where lies what a program reads. It opens nothing around what is hidden.
    pub fn places(&self, program: &Path) -> Vec<PathBuf> {
        programs::places(program).into_iter().filter(|place| !is_around(place, &self.hidden)).collect()
    }
}

/// Whether one of these folders is this, or in it.
pub fn is_around(path: &Path, folders: &[PathBuf]) -> bool {
    path.canonicalize().is_ok_and(|real| folders.iter().any(|folder| folder.starts_with(&real)))
}

/// Cuts this process, and all that it will start, off from the processes outside: it can't send them signals, where the
/// kernel can see to that (Linux 6.12), and it has no Unix sockets, by which it could have others do what it can't. acpx's
/// own processes have to reach each other, so only what they start as claude is cut off.
pub fn cut_off() -> Result<(), Error> {
    // Moving a file from one folder to another is denied by any rules that don't allow it.
    let scoped = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).scope(Scope::Signal);
    let rules = scoped.and_then(|rules| rules.handle_access(AccessFs::Refer)?.create());
    let _ = rules.and_then(|rules| allow_only(rules, Path::new("/"), AccessFs::Refer.into())?.restrict_self());
    Ok(seccompiler::apply_filter(&without_unix_sockets()?)?)
}

/// What root may do that has to do with files and ports. An agent of root's keeps it.
const KEPT_OF_ROOT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Keeps what this process will become, and all that it will start, from having the rest of what root may. By one of those, newer kernels
/// show every process's environment to it, whatever Landlock says.
pub fn give_up_powers() {
    for capability in (CapabilitySet::all() - KEPT_OF_ROOT).iter() {
        // Who may not do this has none of them.
        let _ = remove_capability_from_bounding_set(capability);
    }
}

/// Keeps this process, and all that it will start, from changing other processes by the calls that take the id of one. Each may
/// still be made on the caller itself, by the id 0, where that is of use. `docs/security.md` goes through all such calls.
pub fn leave_others_alone() -> Result<(), Error> {
    let not_itself = |argument| Ok::<_, seccompiler::Error>(vec![SeccompRule::new(vec![is_not(argument, 0)?])?]);
    // Nor all of its group or user at once: it may have joined the server's group, and is the server's user.
    let not_itself_of_kind = |process| {
        let other_kind = SeccompRule::new(vec![is_not(0, process)?])?;
        Ok::<_, seccompiler::Error>([not_itself(1)?, vec![other_kind]].concat())
    };
    // What is typed for others to read, a shell at the server's terminal for one.
    let types = || {
        let is_request = |request| SeccompRule::new(vec![is(1, ALL, request)?]);
        Ok::<_, seccompiler::Error>(vec![is_request(TIOCSTI)?, is_request(TIOCLINUX)?])
    };
    let always = Vec::new;
    // By a namespace of its own it would have powers there, and more of the kernel to attack. The bits of a flag that clone has for another
    // purpose are unshare's alone.
    let in_new_namespace = |flags: &[libc::c_int]| {
        let asks_for = |flag: &libc::c_int| Ok(SeccompRule::new(vec![is(0, u64::from(flag.cast_unsigned()), *flag)?])?);
        flags.iter().map(asks_for).collect::<Result<Vec<_>, seccompiler::Error>>()
    };
    let rules = [
        (libc::SYS_unshare, in_new_namespace(&[NAMESPACES, &[CLONE_NEWTIME]].concat())?),
        (libc::SYS_clone, in_new_namespace(NAMESPACES)?),
        (libc::SYS_setns, always()),
        (libc::SYS_prlimit64, not_itself(0)?),
        (libc::SYS_sched_setaffinity, not_itself(0)?),
        (libc::SYS_sched_setattr, not_itself(0)?),
        (libc::SYS_sched_setparam, not_itself(0)?),
        (libc::SYS_sched_setscheduler, not_itself(0)?),
        (libc::SYS_move_pages, not_itself(0)?),
        (libc::SYS_migrate_pages, not_itself(0)?),
        (libc::SYS_setpriority, not_itself_of_kind(PRIO_PROCESS)?),
        (libc::SYS_ioprio_set, not_itself_of_kind(IOPRIO_WHO_PROCESS)?),
        (libc::SYS_ioctl, types()?),
        (libc::SYS_ptrace, always()),
        (libc::SYS_process_vm_readv, always()),
        (libc::SYS_process_vm_writev, always()),
        (libc::SYS_process_madvise, always()),
        (libc::SYS_process_mrelease, always()),
        (libc::SYS_pidfd_getfd, always()),
        (libc::SYS_kcmp, always()),
        (libc::SYS_perf_event_open, always()),
    ];
    // Those of the third set that have numbers of their own there: ioctl, ptrace, move_pages, process_vm_readv and process_vm_writev.
    let x32 = [(514, types()?), (521, always()), (533, always()), (539, always()), (540, always())];
    let x32 = x32.map(|(call, rules)| (X32 | call, rules));
    seccompiler::apply_filter(&filter(rules.into_iter().chain(x32), libc::EPERM)?)?;
    // Its flags are in memory, which a filter can't read. C libraries go on with clone where it is not there.
    Ok(seccompiler::apply_filter(&filter([(libc::SYS_clone3, always())].into_iter(), libc::ENOSYS)?)?)
}

/// The flags of `clone` that make a namespace.
const NAMESPACES: &[libc::c_int] = &[
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// From the kernel's `sched.h`.
const CLONE_NEWTIME: libc::c_int = 0x80;

/// Marks the numbers of x86-64's third set of system calls; elsewhere no number has it.
const X32: libc::c_long = 0x4000_0000;
/// All bits of an argument.
const ALL: u64 = u32::MAX as u64;
/// From the kernel's `resource.h`, `ioprio.h` and `ioctls.h`.
const PRIO_PROCESS: u64 = 0;
const IOPRIO_WHO_PROCESS: u64 = 1;
const TIOCSTI: libc::c_int = 0x5412;
const TIOCLINUX: libc::c_int = 0x541c;

fn is(argument: u8, mask: u64, value: libc::c_int) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), u64::from(value.cast_unsigned()))
}

fn is_not(argument: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
}

/// Has these calls fail where one of their rules is true, or always where they have none. The same calls by their other numbers
/// too, where the kernel has those.
fn filter(rules: impl Iterator<Item = (libc::c_long, Vec<SeccompRule>)>, error: libc::c_int) -> Result<BpfProgram, seccompiler::Error> {
    let rules = rules.flat_map(|(call, rules)| [(X32 | call, rules.clone()), (call, rules)]).collect();
    let denied = SeccompAction::Errno(error.cast_unsigned());
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, denied, std::env::consts::ARCH.try_into()?)?.try_into()?)
}

/// A filter of system calls. Pairs of sockets, which programs use for pipes, stay.
fn without_unix_sockets() -> Result<BpfProgram, seccompiler::Error> {
    let unix = || is(0, ALL, libc::AF_UNIX);
    // One of a pair of datagram sockets can be turned on somebody else.
    let datagram = is(1, 0xf, libc::SOCK_DGRAM)?;
    let rules = [
        (libc::SYS_socket, vec![SeccompRule::new(vec![unix()?])?]),
        (libc::SYS_socketpair, vec![SeccompRule::new(vec![unix()?, datagram])?]),
        // It can make sockets too.
        (libc::SYS_io_uring_setup, Vec::new()),
    ];
    filter(rules.into_iter(), libc::EACCES)
}

/// Keeps this process, and all that it will start, from writing the memory of one that died to the disk, and files of more bytes than
/// these. It has to take that with it: a limit can't be raised again.
pub fn bound(file_size: Option<u64>) -> io::Result<()> {
    let bound = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    bound(Resource::Core, 0)?;
    Ok(file_size.map_or(Ok(()), |most| bound(Resource::Fsize, most))?)
}

/// What agents can't reach or do on this machine, and what they can, each in words.
pub fn fences(shut: Result<(), &Impossible>) -> Vec<(&'static str, Result<&'static str, String>)> {
    let by = |how: &'static str| shut.map(|()| how).map_err(ToString::to_string);
    let scoped = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).scope(Scope::Signal);
    let signals = scoped.and_then(Ruleset::create).map(drop).map_err(|_| "this kernel can't; use Linux 6.12 or newer".to_owned());
    vec![
        ("the ledger, uploads, other apps' runs and sessions", by("Landlock")),
        ("signals to processes outside", by("Landlock").and_then(|how| signals.map(|()| how))),
        ("memory, limits and priorities of other processes", by("seccomp")),
        ("Unix sockets (Docker, systemd, tmux, ssh-agent), abstract ones too", by("seccomp")),
        ("/tmp and /var/tmp", by("Landlock")),
        ("the home folder of the server's user, but for programs and settings", by("Landlock")),
        ("writing claude's settings and sign-in", by("Landlock")),
    ]
}

/// What an agent reaches outside its own folder.
#[derive(Debug, Default)]
pub struct Reach {
    /// As its user does.
    pub all: Vec<PathBuf>,
    /// To read, and to run what is there.
    pub read: Vec<PathBuf>,
}

/// All that is in none of these folders, by listing what is beside the ways to them. The folders are absolute, without links.
pub fn beside(hidden: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let is_hidden = |folder: &Path| hidden.iter().any(|hidden| folder.starts_with(hidden));
    let is_on_the_way = |folder: &Path| hidden.iter().any(|hidden| hidden.starts_with(folder));
    let ways = hidden.iter().flat_map(|hidden| hidden.ancestors().skip(1));
    let folders: BTreeSet<_> = ways.filter(|folder| !is_hidden(folder) && folder.exists()).collect();
    let mut beside = Vec::new();
    for folder in folders {
        beside.extend(listed(folder)?.into_iter().filter(|path| !is_on_the_way(path)));
    }
    Ok(beside)
}

/// What is in a folder. Symbolic links are left out: what one names is reached where it really is, or not at all.
fn listed(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = folder.read_dir().map_err(|error| Error::Unreadable(folder.to_owned(), error))?.flatten();
    Ok(entries.filter(|entry| !entry.file_type().is_ok_and(|kind| kind.is_symlink())).map(|entry| entry.path()).collect())
}

/// Restricts this process, and all that it will start, to what is at these paths and below them.
pub fn restrict(to: &Reach) -> Result<(), Error> {
    ruleset(CompatLevel::HardRequirement, ABI::V1)?;
    let rules = ruleset(CompatLevel::BestEffort, NEWEST)?;
    // What is written there changes processes, others of the same user too (oom_score_adj, timerslack_ns, cgroup.kill).
    let is_read_only = |path: &Path| ["/proc", "/sys"].map(Path::new).contains(&path);
    let rules = to.all.iter().try_fold(rules, |rules, path| allow(rules, path, is_read_only(path)))?;
    to.read.iter().try_fold(rules, |rules, path| allow(rules, path, true))?.restrict_self()?;
    Ok(())
}

fn allow(rules: RulesetCreated, path: &Path, read_only: bool) -> Result<RulesetCreated, RulesetError> {
    let all = if read_only { AccessFs::from_read(NEWEST) } else { AccessFs::from_all(NEWEST) };
    allow_only(rules, path, if path.is_dir() { all } else { all & AccessFs::from_file(NEWEST) })
}

/// What can't be opened is gone, or closed to this user anyway.
fn allow_only(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    let Ok(opened) = PathFd::new(path) else { return Ok(rules) };
    rules.add_rule(PathBeneath::new(opened, access))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_come_back_from_a_variable_as_they_were() {
        let arguments = ["--own", "/a b/\n\"c\"", "", "--"].map(OsString::from);
        assert_eq!(unpacked(&packed(&arguments)), arguments);
    }

    #[test]
    fn agents_are_shut_out_of_the_data_the_home_and_claudes_configuration() {
        let all = |home: &str, config: &str| hidden(Path::new("/data"), &Environment::of([("HOME", home), ("CLAUDE_CONFIG_DIR", config)]));
        assert_eq!(all("/usr", "/usr/share"), ["/usr", "/usr/share", "/tmp", "/var/tmp", "/data"].map(PathBuf::from));
        assert_eq!(all("/", ""), ["/tmp", "/var/tmp", "/data"].map(PathBuf::from));
        // Programs are read wherever they lie, but for what is around something hidden.
        let sh = Path::new("/bin/sh").canonicalize().unwrap();
        let read = |home: &Path| Confinement { hidden: vec![home.to_owned()], read: vec!["/opt".into()], cut_off: true }.to_read(&sh, &[]);
        assert_eq!(read(Path::new("/usr")), [Path::new("/opt"), sh.parent().unwrap(), &sh]);
        assert_eq!(read(sh.parent().unwrap()), [Path::new("/opt"), &sh]);
    }

    #[test]
    fn what_is_beside_is_neither_hidden_nor_around_what_is() {
        let way = tempfile::tempdir().unwrap();
        let way = way.path().canonicalize().unwrap();
        for folder in ["home/data", "home/other", "beside/in"] {
            std::fs::create_dir_all(way.join(folder)).unwrap();
        }
        std::os::unix::fs::symlink(way.join("home/other"), way.join("link")).unwrap();
        let hidden = [way.join("home/data"), way.join("home"), way.join("never/there")];
        let beside: Vec<_> = beside(&hidden).unwrap().into_iter().filter(|path| path.starts_with(&way)).collect();
        assert_eq!(beside, [way.join("beside")]);
    }
}
