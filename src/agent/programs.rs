//! The CLIs on this machine: where they are, and which versions they are.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::environment::Environment;
use super::launcher::{Grants, Launcher};
use super::process::{self, ConverseOptions, Line, Next};

/// How long `--version` may take.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a program is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// After how long a program that gave no version is asked again.
const ASK_AGAIN: Duration = Duration::from_mins(1);

/// The versions of a CLI that this release was tested with, the first and the last.
#[derive(Clone, Copy, Debug)]
pub struct Tested(pub(super) &'static str, pub(super) &'static str);

/// Of `claude`.
pub const CLAUDE_TESTED: Tested = Tested("2.1.197", "2.1.332");
/// Of `acpx`.
pub const ACPX_TESTED: Tested = Tested("0.19.1", "0.19.1");
/// Of the adapter between acpx and claude.
pub const ADAPTER_TESTED: Tested = Tested("0.49.0", "0.101.0");

impl Tested {
    /// Whether this version is one of them.
    pub fn includes(self, version: &str) -> bool {
        (numbers(self.0)..=numbers(self.1)).contains(&numbers(version))
    }
}

impl std::fmt::Display for Tested {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == self.1 { f.write_str(self.0) } else { write!(f, "{} to {}", self.0, self.1) }
    }
}

/// The numbers of a version, to be compared in order.
pub(crate) fn numbers(version: &str) -> Vec<u32> {
    version.split(['.', '-']).map_while(|part| part.parse().ok()).collect()
}

/// The adapter between acpx and claude, as acpx finds it: on PATH, or installed beside acpx itself.
pub fn adapter(acpx: &OsStr, environment: &Environment) -> OsString {
    const ADAPTER: &str = "claude-agent-acp";
    let beside = || Some(find(acpx, environment)?.parent()?.join(ADAPTER)).filter(|path| path.exists());
    find(OsStr::new(ADAPTER), environment).or_else(beside).map_or_else(|| ADAPTER.into(), PathBuf::into_os_string)
}

/// Finds a program: a path as it is, a name on the PATH of `environment`. `None` where there is no executable file.
pub fn find(program: &OsStr, environment: &Environment) -> Option<PathBuf> {
    let executable = |path: &Path| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    if program.as_encoded_bytes().contains(&b'/') {
        // Agents run in folders of their own, where a relative path would mean something else.
        return std::path::absolute(program).ok().filter(|path| executable(path));
    }
    std::env::split_paths(environment.get("PATH")?)
        .filter_map(|folder| std::path::absolute(folder.join(program)).ok())
        .find(|path| executable(path))
}

/// Where lies what a program reads when it runs: the packages that it is one of, or the folder that it really is in; and itself.
pub fn places(program: &Path) -> Vec<PathBuf> {
    let Ok(real) = program.canonicalize() else { return Vec::new() };
    let packages = real.ancestors().filter(|folder| folder.ends_with("node_modules")).last();
    packages.or(real.parent()).map(Path::to_owned).into_iter().chain([real.clone()]).collect()
}

/// Where the programs on PATH lie, and Node's own packages, npm among them.
pub fn places_on_path(environment: &Environment) -> Vec<PathBuf> {
    let folders = environment.get("PATH").map(std::env::split_paths).into_iter().flatten().filter(|folder| folder.is_absolute());
    folders.flat_map(|folder| [folder.with_file_name("lib/node_modules"), folder]).collect()
}

/// What `program --version` says, such as `2.1.197`; `None` where it does not answer within 10 s.
pub async fn version(program: &Path, launcher: &Launcher) -> Option<String> {
    let mut version = None;
    let mut command = launcher.command(program, &launcher.folder, Grants::default());
    // Of its own: the end of one family must not be that of another.
    let tag = launcher.tag.run(&format!("version of {}", program.display()));
    let time_up = Box::pin(sleep(VERSION_TIMEOUT));
    let read = |line: Line<'_>| {
        let Line::Whole(line) = line else { return Next::Stop };
        version = version.take().or_else(|| version_in(&String::from_utf8_lossy(line)));
        if version.is_some() { Next::Answered } else { Next::More }
    };
    let talk =
        ConverseOptions { input: Vec::new(), hold_input: false, time_up, cancel: &CancellationToken::new(), patience: None, more: None };
    process::converse(command.arg("--version"), &tag, talk, read).await.ok().and(version)
}

/// The first word that is digits with dots between.
pub(crate) fn version_in(line: &str) -> Option<String> {
    let is_version = |word: &&str| {
        word.contains('.') && word.split('.').next().is_some_and(|major| !major.is_empty() && major.bytes().all(|b| b.is_ascii_digit()))
    };
    line.split_whitespace().map(|word| word.trim_start_matches('v')).find(is_version).map(str::to_owned)
}

/// What is known of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Whether it is on this machine.
    pub present: bool,
    /// Its version; `None` too where it does not answer.
    pub version: Option<String>,
    /// Whether this release was tested with that version.
    pub tested: bool,
}

/// Which file a program was, so that an upgrade is noticed.
type Identity = (PathBuf, u64, u64, u64, i64);

fn identity(path: PathBuf) -> Option<Identity> {
    let file = path.metadata().ok()?;
    Some((path, file.dev(), file.ino(), file.size(), file.mtime()))
}

/// A program of this machine, watched so that to know about it starts no process and waits for none.
#[derive(Debug)]
pub struct Cli {
    program: OsString,
    tested: Tested,
    known: RwLock<Known>,
}

impl Cli {
    /// Looks for the program; its version is known later.
    pub fn new(program: OsString, tested: Tested, environment: &Environment) -> Self {
        let present = find(&program, environment).is_some();
        Self { program, tested, known: RwLock::new(Known { present, version: None, tested: false }) }
    }

    /// What is known now.
    pub fn known(&self) -> Known {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, present: bool, version: Option<String>) {
        let tested = version.as_deref().is_some_and(|version| self.tested.includes(version));
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Known { present, version, tested };
    }

    /// Keeps what is known true, for ever.
    pub async fn watch(&self, launcher: &Launcher) {
        let mut asked: Option<(Option<Identity>, Instant)> = None;
        loop {
            let found = find(&self.program, &launcher.environment).and_then(identity);
            let silent = found.is_some() && self.known().version.is_none();
            if asked.as_ref().is_none_or(|(before, at)| *before != found || (silent && at.elapsed() > ASK_AGAIN)) {
                self.note(found.is_some(), None);
                let version = match &found {
                    Some((path, ..)) => version(path, launcher).await,
                    None => None,
                };
                let program = self.program.display();
                match (&found, &version) {
                    (None, _) => tracing::warn!(%program, "not installed"),
                    (Some((path, ..)), None) => tracing::warn!(path = %path.display(), "found, but it does not tell its version"),
                    (Some((path, ..)), Some(version)) if self.tested.includes(version) => {
                        tracing::info!(path = %path.display(), version, "found");
                    }
                    (Some((path, ..)), Some(version)) => {
                        tracing::warn!(path = %path.display(), version, tested = %self.tested, "found, of a version that this release was not tested with; it is used all the same");
                    }
                }
                self.note(found.is_some(), version);
                asked = Some((found, Instant::now()));
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_clis_print() {
        assert_eq!(version_in("2.1.197 (Claude Code)").as_deref(), Some("2.1.197"));
        assert_eq!(version_in("0.19.1").as_deref(), Some("0.19.1"));
        assert_eq!(version_in("acpx v1.0.0-beta.1").as_deref(), Some("1.0.0-beta.1"));
        assert_eq!(version_in("Error: nothing here."), None);
    }

    #[test]
    fn what_is_pinned_was_tested() {
        let pins = [include_str!("../../npm/claude/package.json"), include_str!("../../npm/acpx/package.json")].concat();
        for (name, tested) in
            [("@anthropic-ai/claude-code", CLAUDE_TESTED), ("acpx", ACPX_TESTED), ("@agentclientprotocol/claude-agent-acp", ADAPTER_TESTED)]
        {
            assert!(pins.contains(&format!("\"{name}\": \"{}\"", tested.1)), "{name} {tested}");
        }
        assert!(CLAUDE_TESTED.includes("2.1.200") && !CLAUDE_TESTED.includes("2.1.96") && !CLAUDE_TESTED.includes("2.2.0"));
    }

    #[test]
    fn versions_are_compared_by_number() {
        assert!(numbers("22.23.3") >= vec![22, 13]);
        assert!(numbers("20.20.2") < vec![22, 13]);
        assert!(numbers("2.1.197") >= numbers("2.1.97"));
    }

    #[test]
    fn a_name_is_looked_up_on_the_path_of_the_agents() {
        let environment = Environment::of([("PATH", "/nowhere:/bin")]);
        assert_eq!(find(OsStr::new("sh"), &environment), Some("/bin/sh".into()));
        assert_eq!(find(OsStr::new("sh"), &Environment::of([("PATH", "/nowhere")])), None);
        assert_eq!(find(OsStr::new("/bin/sh"), &environment), Some("/bin/sh".into()));
        assert_eq!(find(OsStr::new("/etc/passwd"), &environment), None);
    }
}
