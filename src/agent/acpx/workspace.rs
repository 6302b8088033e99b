//! A session's folder: where its agent works in, claude's configuration and transcripts, and acpx's home.
//!
//! claude keeps conversations under `CLAUDE_CONFIG_DIR`, acpx under `HOME`. Each session has both to itself, so that its
//! agent can be shut out of all others'. What acpx keeps is out of the agent's reach, because acpx runs what stands there, and
//! is less restricted than the agent.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;

use crate::agent::claude::files::{self, MEMORY, STATE};
use crate::agent::environment::Environment;
use crate::agent::folder::{Folder, TEMPORARY, clear, open_below, read_regular, remove_tree, replace};
use crate::blocking::blocking;
use crate::secret::sha256_hex;

/// A file that says that nobody has asked for the session yet.
const UNCLAIMED: &str = "unclaimed";
/// A file that says whose the session is, on a machine that works for others.
const OWNER: &str = "gateway";
/// Where claude has its own files of a session, below its folder.
pub const CONFIG: &str = "config";
const SETTINGS: &str = "settings.json";
/// With what the line of a transcript begins that says what the conversation had cost (seen in claude 2.1.332).
const COST_STATE: &[u8] = b"{\"type\":\"cost-state\"";
/// Bytes of a transcript, at most, that are looked through.
const MOST_OF_A_TRANSCRIPT: u64 = 64 << 20;
/// What earlier releases linked into it, of the user's own. It let tools run that the session's permissions deny.
const LINKED_BEFORE: &[&str] = &["settings.json", "CLAUDE.md", "agents", "commands", "output-styles", "plugins", "rules", "skills"];

/// Makes a folder that is this user's alone, or makes sure that it is: others may make some of any name beside it.
pub fn make_private(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => return made,
    }
    let found = folder.symlink_metadata()?;
    if found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other("it is not this user's own"))
}

/// claude's settings in such a folder. The mode that asks is named, because the adapter starts in another one where nothing is
/// (`auto`, since 0.76), in which tools run unasked, or not at all where Anthropic's servers can't be reached.
fn settings(memory: Option<&Path>) -> String {
    let mode = json!({"defaultMode": "default", "disableAutoMode": "disable", "disableBypassPermissionsMode": "disable"});
    match memory {
        None => json!({"permissions": mode}),
        Some(folder) => json!({"permissions": mode, MEMORY: folder}),
    }
    .to_string()
}

/// A session's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionDir(PathBuf);

impl SessionDir {
    /// The session in this folder, which need not be there yet.
    pub fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// The whole folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Where the agent works.
    pub fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// What the agent reaches of it.
    pub fn agents_own(&self) -> [PathBuf; 2] {
        [self.work(), self.config()]
    }

    fn config(&self) -> PathBuf {
        self.0.join(CONFIG)
    }

    /// Where claude is at home.
    pub fn agents_home(&self) -> PathBuf {
        files::home_in(&self.config())
    }

    /// Where it is at home: acpx, or an agent other than claude.
    pub fn home(&self) -> PathBuf {
        self.0.join("home")
    }

    /// Makes the folders, with settings of its own.
    pub fn make(&self, environment: &Environment) -> io::Result<()> {
        let make = |folder: &Path| DirBuilder::new().mode(0o700).create(folder);
        make(&self.0)?;
        Folder::create(&self.0, "work")?;
        for folder in [self.home(), self.home().join(".acpx"), self.temporary()] {
            make(&folder)?;
        }
        files::make_bare_config(&self.config())?;
        if !files::config_folder(environment).is_some_and(|folder| folder.is_absolute()) {
            return Err(io::Error::other("HOME is not set to a whole path, and sessions need one"));
        }
        Ok(())
    }

    /// Notes that nobody has asked for the session yet: a start takes such a folder away.
    pub fn set_unclaimed(&self) -> io::Result<()> {
        fs::write(self.0.join(UNCLAIMED), "")
    }

    /// Notes that the session belongs to somebody.
    pub fn claim(&self) -> io::Result<()> {
        fs::remove_file(self.0.join(UNCLAIMED))
    }

    /// Notes for whom the session is, on a machine that works for others.
    pub fn set_owner(&self, gateway: &str) -> io::Result<()> {
        fs::write(self.0.join(OWNER), gateway)
    }

    /// For whom the session is, if that was noted.
    pub fn owner(&self) -> Option<String> {
        fs::read_to_string(self.0.join(OWNER)).ok()
    }

    /// Whether nobody has asked for the session.
    pub fn is_unclaimed(&self) -> bool {
        self.0.join(UNCLAIMED).exists()
    }

    /// Brings what an earlier release made up to date.
    pub fn renew(&self) -> io::Result<()> {
        make_private(&self.temporary())?;
        for path in LINKED_BEFORE.iter().map(|name| self.config().join(name)) {
            if path.is_symlink() {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Brings claude's settings, with its memories in this folder if they are kept, and its copies of the user's sign-in and state up to date.
    /// Earlier releases had a link in the place of that, and no home.
    pub fn renew_copies(&self, environment: &Environment, memory: Option<&Path>) -> io::Result<()> {
        // Its agent may have put a folder in the place of either, or be at work.
        for name in [SETTINGS, STATE] {
            let path = self.config().join(name);
            if path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
                remove_tree(&path)?;
            }
        }
        replace(&open_below(&self.config(), &[])?, SETTINGS, settings(memory).as_bytes())?;
        files::write_copies(&self.config(), environment)?;
        match files::make_home(&self.config()) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    /// Has `command`, which works in the folder, be at home there. Not in the agent's part of it: acpx takes settings from where it
    /// works, and could be told to start something else.
    pub fn furnish(&self, command: &mut Command) {
        files::use_config(command, &self.config());
        command.env("HOME", self.home());
        command.env("CLAUDE_CODE_TMPDIR", self.work().join(TEMPORARY));
        // acpx's own, which its agent does not reach: Node keeps compiled code there. The agent's is in its folder.
        command.env("TMPDIR", self.temporary());
    }

    /// Takes away what an agent that is at home here left as temporary.
    pub fn clear_temporary(&self) -> io::Result<()> {
        clear(&self.temporary(), |_| false).map(drop)
    }

    fn temporary(&self) -> PathBuf {
        self.home().join("tmp")
    }

    /// Where acpx's owner has its socket: in `/tmp`, whatever TMPDIR says.
    pub fn sockets(&self) -> PathBuf {
        let hash = sha256_hex(self.home().as_os_str().as_encoded_bytes());
        Path::new("/tmp").join(format!("acpx-{}", &hash[..10]))
    }

    /// Whether acpx's owner, if there is one, can't be reached any more: its lock stands, and its socket, which bears the same name,
    /// was taken away. It would live on for minutes, and no turn be taken.
    pub fn has_lost_socket(&self) -> bool {
        let queues = self.home().join(".acpx/queues").read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
        let mut locks = queues.filter(|path| path.extension().is_some_and(|extension| extension == "lock"));
        locks.any(|lock| {
            let socket = self.sockets().join(lock.with_extension("sock").file_name().unwrap_or_default());
            !socket.symlink_metadata().is_ok_and(|found| found.file_type().is_socket())
        })
    }

    /// Removes what acpx's owner leaves when it is killed: its socket and its lock.
    pub fn forget_owner(&self) -> io::Result<()> {
        remove_tree(&self.sockets())?;
        remove_tree(&self.home().join(".acpx/queues"))
    }

    /// What claude kept at its last end of what the conversation had cost, in US dollars. It goes on with that. 0 where it was killed.
    pub fn kept_cost(&self, agent_session: &str) -> f64 {
        #[derive(Deserialize)]
        struct CostState {
            #[serde(rename = "totalCostUSD")]
            total_cost_usd: f64,
        }
        let folders = self.config().join("projects").read_dir().into_iter().flatten().flatten();
        let files = folders.map(|folder| folder.path().join(format!("{agent_session}.jsonl")));
        let last = |file: PathBuf| {
            let transcript = read_regular(&file, MOST_OF_A_TRANSCRIPT).ok()?;
            let mut lines = transcript.rsplit(|byte| *byte == b'\n');
            let kept = lines.find(|line| line.starts_with(COST_STATE))?;
            serde_json::from_slice(kept).ok().map(|CostState { total_cost_usd }| total_cost_usd)
        };
        // It becomes part of a path.
        let is_id = agent_session.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        files.filter(|_| is_id).find_map(last).filter(|cost| cost.is_finite()).unwrap_or(0.0)
    }

    /// The same, on a thread that may wait for the disk.
    pub async fn kept_cost_of(&self, agent_session: String) -> f64 {
        let dir = self.clone();
        blocking(move || Ok(dir.kept_cost(&agent_session))).await.unwrap_or(0.0)
    }

    /// Takes the folder away with all that is in it.
    pub fn remove(&self) -> io::Result<()> {
        self.forget_owner().and(remove_tree(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_conversation_had_cost_is_what_was_kept_last() {
        let room = tempfile::tempdir().unwrap();
        let dir = SessionDir::new(room.path().to_owned());
        let project = dir.config().join("projects/-work");
        fs::create_dir_all(&project).unwrap();
        assert!(dir.kept_cost("s-1").abs() < f64::EPSILON);
        let lines = [
            r#"{"type":"cost-state","sessionId":"s-1","totalCostUSD":0.25}"#,
            r#"{"type":"cost-state","sessionId":"s-1","totalCostUSD":0.5,"new":1}"#,
            r#"{"type":"user","text":"{\"type\":\"cost-state\",\"totalCostUSD\":9}"}"#,
            r#"{"type":"cost-st"#,
        ];
        fs::write(project.join("s-1.jsonl"), lines.join("\n")).unwrap();
        fs::write(room.path().join("elsewhere.jsonl"), lines[0]).unwrap();
        assert!((dir.kept_cost("s-1") - 0.5).abs() < f64::EPSILON);
        for other in ["s-2", "../../../elsewhere"] {
            assert!(dir.kept_cost(other).abs() < f64::EPSILON);
        }
    }
}
