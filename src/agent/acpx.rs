//! `acpx`, the headless client of the Agent Client Protocol: how it is called for a session's steps.
//!
//! Behind a live session stand acpx's queue owner, the adapter and the agent. They belong to no command: a prompt that
//! is killed leaves the turn going on in the owner. So a turn is cancelled by acpx's own `cancel`, and only where that
//! does not help is the session's whole family ended. The conversation is on disk, and the next turn goes on from there.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::events::{Event, Events, TurnEnd};
use super::family::{self, Mark, Started};
use super::folder::blocking;
use super::process::{self, End, How, Line, Next, Talk, Waiting};
use super::room::Room;
use super::sandbox::{self, CLAUDE, Confinement};
use super::{Workshop, claude, programs, standby};

/// How long `sessions new` may take: it may have to fetch the adapter.
const CREATE_TIMEOUT: Duration = Duration::from_mins(1);
/// How long `sessions close` may take. The session's family is ended after it anyway.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long `cancel` may take: it only hands a message to the owner.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a turn may take to end when it was cancelled. acpx needs a second after its last line.
const CANCELLED_GRACE: Duration = Duration::from_secs(4);
/// Bytes of a turn's messages that are kept: they all stand in its answer.
const MAX_TURN: usize = 16 << 20;

/// The agent that is claude, as acpx calls it.
pub const CLAUDE_AGENT: &str = "claude";

/// The permission by which every tool runs.
pub const APPROVE_ALL: &str = "approve-all";
/// The permissions that a session may be created with, and acpx's flag for each.
pub const PERMISSIONS: &[(&str, &str)] =
    &[(APPROVE_ALL, "--approve-all"), ("approve-reads", "--approve-reads"), ("deny-all", "--deny-all")];

/// Whether what an agent does in one of its modes is up to the permissions. In others it asks for nothing.
fn keeps(permissions: &str, mode: &str) -> bool {
    matches!(mode, "default" | "plan") || (permissions == APPROVE_ALL && matches!(mode, "acceptEdits" | "bypassPermissions"))
}

/// A session, as acpx is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name, which is its id.
    pub name: String,
    /// Its folders.
    pub room: Room,
    /// One of the configured agents.
    pub agent: String,
    /// The model of every turn.
    pub model: Option<String>,
    /// One of [`PERMISSIONS`].
    pub permissions: String,
}

/// Why a step did not come about.
#[derive(Debug)]
pub enum Error {
    /// There is no such program.
    NotInstalled(OsString),
    /// It failed, in its own words.
    Failed(String),
}

/// A turn that is over.
#[derive(Debug)]
pub struct Turn {
    /// What was read.
    pub events: Events,
    /// How it ended, where acpx said so.
    pub end: Option<TurnEnd>,
}

/// What is told of a turn while it goes on.
pub struct Heard<B: FnOnce(), S: FnMut(&Event), O: FnOnce(Turn)> {
    /// Called when the agent has started.
    pub begun: B,
    /// Called with each message, as it comes.
    pub said: S,
    /// Gets the turn when acpx says that it ended, which is a second before its process does, or when there is nothing more
    /// to wait for.
    pub over: O,
}

/// The program, and where and with what it works.
#[derive(Clone, Debug)]
pub struct Acpx {
    /// The acpx program: a path, or a name on PATH.
    pub program: OsString,
    /// Where the sessions' folders are.
    pub workshop: Workshop,
    /// The claude program: a path, or a name on PATH.
    pub claude_program: OsString,
    /// This program, under the name of [`CLAUDE`].
    pub claude: PathBuf,
}

impl Acpx {
    /// The mark of a session's family.
    pub fn mark(&self, name: &str) -> Mark {
        self.workshop.mark.run(name)
    }

    fn command<A: AsRef<OsStr>>(&self, target: &Target, arguments: impl IntoIterator<Item = A>) -> Result<Command, Error> {
        let found = programs::find(&self.program, &self.workshop.environment);
        let program = found.ok_or_else(|| Error::NotInstalled(self.program.clone()))?;
        // Nothing is made in /tmp for a session that is gone: nobody would take it away.
        if !target.room.folder().is_dir() {
            return Err(Error::Failed(format!("the session's folder {} is gone; create another session", target.room.folder().display())));
        }
        let sockets = target.room.sockets();
        super::room::make_private(&sockets)
            .map_err(|error| Error::Failed(format!("{} can't be used ({error}); remove it", sockets.display())))?;
        let mut command = self.workshop.command(&program, target.room.folder(), &[sockets]);
        target.room.furnish(&mut command, &self.workshop.environment);
        if target.agent != CLAUDE_AGENT {
            // It works where acpx does, and reaches all of the room anyway.
            command.current_dir(target.room.work());
        }
        let permissions = PERMISSIONS.iter().find(|(name, _)| *name == target.permissions).map_or("--deny-all", |(_, flag)| flag);
        command.args(["--format", "json", "--json-strict", "--non-interactive-permissions", "deny", permissions, &target.agent]);
        command.args(arguments).envs(claude::VARIABLES.iter().copied());
        if let Some(model) = &target.model {
            command.env("ANTHROPIC_MODEL", model);
        }
        // The adapter would else look for a copy of its own, which installations leave out.
        let environment = &self.workshop.environment;
        let named = environment.get("CLAUDE_CODE_EXECUTABLE").unwrap_or(&self.claude_program);
        match programs::find(named, environment) {
            Some(claude) => {
                command.env("CLAUDE_CODE_EXECUTABLE", &self.claude).env(CLAUDE.variable, self.how_to_start(&claude, target)?);
            }
            // The adapter would start a copy of its own, outside the sandbox.
            None if target.agent == CLAUDE_AGENT => {
                let named = named.display();
                return Err(Error::Failed(format!("the claude CLI is not installed (looked for \"{named}\")")));
            }
            None => {}
        }
        Ok(command)
    }

    /// How this program is to start a session's claude: with its user's home, and shut out of acpx's.
    fn how_to_start(&self, claude: &Path, target: &Target) -> Result<OsString, Error> {
        let mut how: Vec<OsString> = Vec::new();
        if let Some(Confinement { hidden, .. }) = &self.workshop.confinement {
            // Listed here: what acpx starts can't see any more what is beside the data folder.
            let beside = sandbox::beside(hidden).map_err(|error| Error::Failed(error.to_string()))?;
            let reachable = beside.into_iter().chain(target.room.agents_own());
            how.extend(reachable.flat_map(|path| ["--own".into(), path.into_os_string()]));
            how.push("--cut-off".into());
        }
        how.extend(["--work".into(), target.room.work().into_os_string()]);
        how.extend(self.workshop.environment.get("HOME").into_iter().flat_map(|home| ["--home".into(), home.into()]));
        how.extend(["--".into(), claude.into()]);
        Ok(sandbox::packed(&how))
    }

    /// Creates the session. Gives what acpx calls it.
    pub async fn create(&self, target: &Target, cancel: &CancellationToken) -> Result<String, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Created {
            acpx_record_id: String,
        }
        let command = self.command(target, ["sessions", "new", "--name", &target.name])?;
        let printed = self.control(command, target, CREATE_TIMEOUT, cancel).await?;
        let created = printed.lines().find_map(|line| serde_json::from_str::<Created>(line).ok());
        // A name of a file to come.
        let id = created.map(|created| created.acpx_record_id).filter(|id| !id.is_empty() && !id.contains(['/', '.']));
        id.ok_or_else(|| Error::Failed("acpx did not say what it created".to_owned()))
    }

    /// Closes the session, and ends its family.
    pub async fn close(&self, target: &Target) {
        let closed = match self.command(target, ["sessions", "close", &target.name]) {
            Ok(command) => self.control(command, target, CLOSE_TIMEOUT, &CancellationToken::new()).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = closed {
            tracing::warn!(session_id = target.name, ?error, "acpx did not close the session");
        }
        family::end(&self.mark(&target.name)).await;
    }

    /// Runs a command that answers at once. Its processes stay: they may be the session's own.
    async fn control(&self, mut command: Command, target: &Target, within: Duration, cancel: &CancellationToken) -> Result<String, Error> {
        let mut printed = String::new();
        let talk = Talk { input: Vec::new(), hold_input: false, deadline: Instant::now() + within, cancel, patience: None };
        let read = |line: Line<'_>| {
            let Line::Whole(line) = line else { return Next::Stop };
            printed.push_str(&String::from_utf8_lossy(line));
            printed.push('\n');
            if printed.len() > 1 << 20 { Next::Stop } else { Next::More }
        };
        let waiting = self.start(&mut command, target)?;
        let finished = process::converse_and(waiting, talk, read, end_alone).await;
        match finished.end {
            End::Exited(status) if status.success() => Ok(printed),
            End::Exited(status) => {
                Err(Error::Failed(failure(&printed).unwrap_or_else(|| format!("acpx ended ({status}) {}", finished.stderr))))
            }
            End::TimedOut => Err(Error::Failed(format!("acpx did not answer within {} s", within.as_secs()))),
            End::Cancelled => Err(Error::Failed("it was not waited for".to_owned())),
            End::Lingered | End::Stopped | End::Silent => Err(Error::Failed("acpx gave no answer".to_owned())),
        }
    }

    fn start(&self, command: &mut Command, target: &Target) -> Result<Waiting, Error> {
        process::start(command, &self.mark(&target.name))
            .map_err(|error| Error::Failed(format!("{} could not be started ({error})", self.program.display())))
    }

    /// Starts an acpx that waits for the prompt of a turn.
    pub fn start_prompt(&self, target: &Target) -> Result<Waiting, Error> {
        let mut command = self.command(target, ["prompt", "-s", &target.name, "--file", "-"])?;
        self.start(&mut command, target)
    }

    /// Sends a prompt, by `standby` if there is one. Gives how the process ended, with its standard error.
    pub async fn turn(
        &self,
        target: &Target,
        prompt: &str,
        standby: Option<Waiting>,
        deadline: Instant,
        cancel: &CancellationToken,
        heard: Heard<impl FnOnce(), impl FnMut(&Event), impl FnOnce(Turn)>,
    ) -> Result<process::Finished, Error> {
        let (mut begun, mut said, mut over) = (Some(heard.begun), heard.said, Some(heard.over));
        // As content blocks: acpx trims a bare text, and takes one that looks like blocks for blocks.
        let input = json!([{"type": "text", "text": prompt}]).to_string().into_bytes();
        // The prompt comes back among the messages.
        let most = MAX_TURN + input.len();
        let mut standby = standby;
        self.end_lost_owner(target).await;
        loop {
            let is_standby = standby.is_some();
            let waiting = standby.take().map_or_else(|| self.start_prompt(target), Ok)?;
            let mut events = Some(Events::default());
            let mut bytes = 0;
            let mut breach = None;
            let read = |line: Line<'_>| {
                let Some(turn) = events.as_mut().filter(|_| breach.is_none()) else { return Next::More };
                let Line::Whole(line) = line else { return Next::Stop };
                // Said when the agent has started, and the prompt goes to it.
                if let Some(begun) = begun.take_if(|_| line.windows(16).any(|part| part == b"\"session/prompt\"")) {
                    begun();
                }
                bytes += line.len();
                if bytes > most {
                    return Next::Stop;
                }
                let count = turn.count();
                let end = turn.line(line);
                if let Some(event) = turn.last().filter(|_| turn.count() > count) {
                    said(event);
                }
                if let Some(mode) = turn.mode_at_work().filter(|mode| target.agent == CLAUDE_AGENT && !keeps(&target.permissions, mode)) {
                    breach = Some(format!(
                        "the agent worked in its mode \"{mode}\", where the session's permissions ({}) do not hold, and was ended; ask the operator to look for \"defaultMode\" in claude's managed settings",
                        target.permissions
                    ));
                    return Next::Stop;
                }
                let Some(end) = end else { return Next::More };
                if let (Some(over), Some(events)) = (over.take(), events.take()) {
                    over(Turn { events, end: Some(end) });
                }
                Next::Answered
            };
            let patience = is_standby.then(|| standby::patience_with_acpx(deadline - Instant::now()));
            let talk = Talk { input: input.clone(), hold_input: false, deadline, cancel, patience };
            let wind_down = async |agent: &mut Started, how: &How| {
                match how {
                    How { answered: true, .. } => end_alone(agent, how).await,
                    // Its turn may go on in the owner, where nothing tells any more when it ends, or must not.
                    How { end: End::Exited(_) | End::Silent | End::Stopped, .. } => drop(family::end(&self.mark(&target.name)).await),
                    _ => self.stop_turn(target, agent).await,
                }
            };
            let finished = process::converse_and(waiting, talk, read, wind_down).await;
            if is_standby && finished.never_spoke() {
                tracing::info!(session_id = target.name, end = ?finished.end, "a standby was of no use; starting cold");
                continue;
            }
            if let (Some(over), Some(events)) = (over, events) {
                over(Turn { events, end: breach.map(TurnEnd::Failed) });
            }
            return Ok(finished);
        }
    }

    /// Ends the session's processes where its owner can't be reached any more. The turn starts others.
    async fn end_lost_owner(&self, target: &Target) {
        let room = target.room.clone();
        if blocking(move || Ok(room.has_lost_socket())).await.unwrap_or(false) {
            tracing::warn!(session_id = target.name, "acpx's socket was taken away; starting the session's processes again");
            family::end(&self.mark(&target.name)).await;
            let room = target.room.clone();
            if let Err(error) = blocking(move || room.forget_owner()).await {
                tracing::warn!(session_id = target.name, %error, "a lock of acpx is left");
            }
        }
    }

    /// Cancels the turn that goes on, and sees that it ended; else ends the session's family.
    async fn stop_turn(&self, target: &Target, agent: &mut Started) {
        let cancelled = match self.command(target, ["cancel", "-s", &target.name]) {
            // A cancel that hangs is not waited for: it may hang for the reason that the turn does.
            Ok(command) => Box::pin(self.control(command, target, CANCEL_TIMEOUT, &CancellationToken::new())).await.is_ok(),
            Err(_) => false,
        };
        if !cancelled || timeout(CANCELLED_GRACE, agent.child.wait()).await.is_err() {
            tracing::warn!(session_id = target.name, "the turn did not let itself be cancelled; ending the session's processes");
            family::end(&self.mark(&target.name)).await;
        }
    }
}

/// Ends the process, and nothing that it started.
async fn end_alone(agent: &mut Started, how: &How) {
    if !matches!(how.end, End::Exited(_)) {
        let _ = agent.child.start_kill();
    }
}

/// The message of an error that acpx printed.
fn failure(printed: &str) -> Option<String> {
    let mut events = Events::default();
    printed.lines().find_map(|line| match events.line(line.as_bytes())? {
        TurnEnd::Failed(message) => Some(message),
        TurnEnd::Stopped(_) => None,
    })
}
