//! `acpx`, the headless client of the Agent Client Protocol: how it is called for a session's steps.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::workspace::{SessionDir, make_private};
use crate::agent::acp::{Messages, TurnEnd};
use crate::agent::children::Started;
use crate::agent::claude::command::VARIABLES;
use crate::agent::claude::files;
use crate::agent::contract::{Attachment, Setup};
use crate::agent::family;
use crate::agent::folder::attach_for_good;
use crate::agent::kinds::Kind;
use crate::agent::launcher::{Grants, Launcher};
use crate::agent::process::{self, ConverseOptions, End, ExitCause, Line, Next, Waiting};
use crate::agent::programs;
use crate::agent::sandbox::{self, CLAUDE, Confinement};
use crate::agent::tag::Tag;
use crate::agent::turn::{APPROVE_ALL, CLAUDE_AGENT};
use crate::blocking::blocking;

/// How long `sessions new` may take: it may have to fetch the adapter.
const CREATE_TIMEOUT: Duration = Duration::from_mins(1);
/// How long `sessions close` may take. The session's family is ended after it anyway.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15);

/// acpx's flag for each permission.
const FLAGS: [(&str, &str); 3] = [(APPROVE_ALL, "--approve-all"), ("approve-reads", "--approve-reads"), ("deny-all", "--deny-all")];

/// A session, as acpx is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name, which is its id.
    pub name: String,
    /// Its folders.
    pub dir: SessionDir,
    /// What its agent is started with.
    pub setup: Setup,
}

/// Why a step did not come about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such program.
    #[error("{} is not installed", .0.display())]
    NotInstalled(OsString),
    /// It failed, in its own words.
    #[error("{0}")]
    Failed(String),
}

/// The program, and where and with what it works.
#[derive(Clone, Debug)]
pub struct Acpx {
    /// The acpx program: a path, or a name on PATH.
    pub program: OsString,
    /// Where the sessions' folders are.
    pub launcher: Launcher,
    /// The claude program: a path, or a name on PATH.
    pub claude_program: OsString,
    /// This program, under the name of [`CLAUDE`].
    pub claude: PathBuf,
}

impl Acpx {
    /// The session of that id.
    pub fn target(&self, session_id: &str, setup: &Setup) -> Target {
        Target { name: session_id.to_owned(), dir: self.dir(session_id), setup: setup.clone() }
    }

    /// The folder of a session of that id.
    pub fn dir(&self, session_id: &str) -> SessionDir {
        SessionDir::new(self.launcher.folder.join(session_id))
    }

    /// Why the session's processes were ended, if they took too much.
    pub fn why_ended(&self, session_id: &str) -> Option<String> {
        self.launcher.bounds.why_ended(session_id)
    }

    /// The tag of a session's family.
    pub fn tag(&self, name: &str) -> Tag {
        self.launcher.tag.run(name)
    }

    pub(super) fn command<A: AsRef<OsStr>>(&self, target: &Target, arguments: impl IntoIterator<Item = A>) -> Result<Command, Error> {
        let found = programs::find(&self.program, &self.launcher.environment);
        let program = found.ok_or_else(|| Error::NotInstalled(self.program.clone()))?;
        // Nothing is made in /tmp for a session that is gone: nobody would take it away.
        Self::check(target)?;
        let sockets = target.dir.sockets();
        make_private(&sockets).map_err(|error| Error::Failed(format!("{} can't be used ({error}); remove it", sockets.display())))?;
        let mut command = self.agents_command(target, &program, &[sockets])?;
        if target.setup.agent != CLAUDE_AGENT {
            // It works where acpx does, and reaches all of the session's folder anyway.
            command.current_dir(target.dir.work());
        }
        let permissions = FLAGS.iter().find(|(name, _)| *name == target.setup.permissions).map_or("--deny-all", |(_, flag)| flag);
        command.args(["--format", "json", "--json-strict", "--non-interactive-permissions", "deny", permissions, &target.setup.agent]);
        command.args(arguments);
        Ok(command)
    }

    /// Puts files into the session's folder, where they stay. Gives their names there.
    pub async fn attach(&self, target: &Target, files: &[Attachment]) -> io::Result<Vec<String>> {
        if files.is_empty() {
            return Ok(Vec::new());
        }
        let (folder, uploads, files) = (target.dir.work(), self.launcher.uploads.clone(), files.to_vec());
        blocking(move || attach_for_good(&folder, &uploads, &files)).await
    }

    /// Whether the session's folder is still there.
    pub fn check(target: &Target) -> Result<(), Error> {
        if target.dir.folder().is_dir() {
            return Ok(());
        }
        Err(Error::Failed(format!("the session's folder {} is gone; create another session", target.dir.folder().display())))
    }

    /// A command in the session's folder, at home there, that can start the session's claude.
    pub fn agents_command(&self, target: &Target, program: &Path, own: &[PathBuf]) -> Result<Command, Error> {
        Self::check(target)?;
        let memory = self.launcher.memory(&target.setup.rules).map_err(|error| Error::Failed(error.to_string()))?;
        let renewed = target.dir.renew_copies(&self.launcher.environment, memory.as_deref());
        renewed.map_err(|error| Error::Failed(format!("claude's state and sign-in can't be put into the session's folder ({error})")))?;
        // The adapter would else look for a copy of its own, which installations leave out.
        let environment = &self.launcher.environment;
        let named = environment.get("CLAUDE_CODE_EXECUTABLE").unwrap_or(&self.claude_program);
        let claude = programs::find(named, environment);
        let own = [own, memory.as_slice()].concat();
        // What acpx starts by its name alone, too.
        let started = claude.iter().cloned().chain(programs::find(OsStr::new(&target.setup.agent), environment));
        let confinement = self.launcher.confinement.as_ref();
        let read: Vec<_> = started.filter_map(|program| Some(confinement?.places(&program))).flatten().collect();
        let mut command =
            self.launcher.command(program, target.dir.folder(), Grants { own: &own, read: &read, network: target.setup.rules.network });
        target.dir.furnish(&mut command);
        command.envs(VARIABLES.iter().copied());
        if memory.is_some() {
            files::keep_memory(&mut command);
        }
        if let Some(model) = &target.setup.model {
            command.env("ANTHROPIC_MODEL", model);
        }
        match claude {
            Some(claude) => {
                command.env("CLAUDE_CODE_EXECUTABLE", &self.claude).env(CLAUDE.variable, self.how_to_start(&claude, target, memory)?);
            }
            // The adapter would start a copy of its own, outside the sandbox.
            None if target.setup.agent == CLAUDE_AGENT => {
                let named = named.display();
                return Err(Error::Failed(format!("the claude CLI is not installed (looked for \"{named}\")")));
            }
            None => {}
        }
        Ok(command)
    }

    /// A command by which an agent other than claude is started, at home in the session's folder and shut out of all others'.
    pub fn command_of(&self, target: &Target, kind: &Kind, program: &Path) -> Result<Command, Error> {
        Self::check(target)?;
        let confinement = self.launcher.confinement.clone().map(|confinement| Confinement { cut_off: true, ..confinement });
        let launcher = Launcher { confinement, ..self.launcher.clone() };
        let renewed = kind.sign_in.renewed_in_place(&launcher.environment);
        let grants = Grants { own: &renewed, network: target.setup.rules.network, ..Grants::default() };
        let mut command = launcher.command(program, target.dir.folder(), grants);
        target.dir.furnish(&mut command);
        let put = kind.sign_in.put(&mut command, &target.dir.home(), &launcher.environment);
        put.map_err(|error| Error::Failed(format!("the sign-in of {} can't be put into the session's folder ({error})", kind.name)))?;
        kind.furnish(&mut command, &target.setup.permissions, target.setup.model.as_deref());
        Ok(command)
    }

    /// How this program is to start a session's claude: with a home of its own, and shut out of acpx's.
    fn how_to_start(&self, claude: &Path, target: &Target, memory: Option<PathBuf>) -> Result<OsString, Error> {
        let mut how: Vec<OsString> = Vec::new();
        if let Some(confinement) = &self.launcher.confinement {
            // Listed here: what acpx starts can't see any more what is beside the hidden folders.
            let beside = sandbox::beside(&confinement.hidden).map_err(|error| Error::Failed(error.to_string()))?;
            let reachable = beside.into_iter().chain(target.dir.agents_own()).chain(memory);
            how.extend(reachable.flat_map(|path| ["--own".into(), path.into_os_string()]));
            how.extend(confinement.to_read(claude, &[]).into_iter().flat_map(|path| ["--read".into(), path.into_os_string()]));
            how.push("--cut-off".into());
        }
        how.extend(["--work".into(), target.dir.work().into_os_string()]);
        how.extend(["--home".into(), target.dir.agents_home().into_os_string(), "--".into(), claude.into()]);
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
        family::end(&self.tag(&target.name)).await;
    }

    /// Runs a command that answers at once. Its processes stay: they may be the session's own.
    pub(super) async fn control(
        &self,
        mut command: Command,
        target: &Target,
        within: Duration,
        cancel: &CancellationToken,
    ) -> Result<String, Error> {
        let mut printed = String::new();
        let talk =
            ConverseOptions { input: Vec::new(), hold_input: false, time_up: Box::pin(sleep(within)), cancel, patience: None, more: None };
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
        process::start(command, &self.tag(&target.name))
            .map_err(|error| Error::Failed(format!("{} could not be started ({error})", self.program.display())))
    }

    /// Starts an acpx that waits for the prompt of a turn.
    pub fn start_prompt(&self, target: &Target) -> Result<Waiting, Error> {
        let mut command = self.command(target, ["prompt", "-s", &target.name, "--file", "-"])?;
        self.start(&mut command, target)
    }
}

/// Ends the process, and nothing that it started.
pub(super) async fn end_alone(agent: &mut Started, how: &ExitCause) {
    if !matches!(how.end, End::Exited(_)) {
        let _ = agent.child.start_kill();
    }
}

/// The message of an error that acpx printed.
fn failure(printed: &str) -> Option<String> {
    let mut messages = Messages::default();
    printed.lines().find_map(|line| match messages.line(line.as_bytes())? {
        TurnEnd::Failed(message) => Some(message),
        TurnEnd::Stopped(_) => None,
    })
}
