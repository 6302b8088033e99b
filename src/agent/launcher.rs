//! Where and with what agents are started.

use std::ffi::{OsStr, OsString};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::bounds::Bounds;
use super::contract::{Network, Rules};
use super::environment::Environment;
use super::groups::Most;
use super::network::WayOut;
use super::sandbox::{self, Confinement};
use super::tag::Tag;

/// Where and with what agents work.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The folder of the runs' or the sessions' folders: absolute, links resolved.
    pub folder: PathBuf,
    /// The folder of the uploads.
    pub uploads: PathBuf,
    /// The tag of this server's processes.
    pub tag: Tag,
    /// What agents get of the environment.
    pub environment: Environment,
    /// How agents are confined, if they are.
    pub confinement: Option<Confinement>,
    /// What a run or a session may take of memory and of the disk.
    pub bounds: Bounds,
    /// How bound agents reach what they may; none where they can't be let out at all.
    pub way_out: Option<WayOut>,
    /// The folder of the memories that are kept.
    pub memories: PathBuf,
}

/// What a process reaches beside its folder.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grants<'a> {
    /// As its own.
    pub own: &'a [PathBuf],
    /// To read.
    pub read: &'a [PathBuf],
    /// Of the network.
    pub network: Network,
}

impl Launcher {
    /// The folder in which claude's memories are kept by these rules, if they are.
    pub fn memory(&self, rules: &Rules) -> io::Result<Option<PathBuf>> {
        let Some(folder) = rules.memory.as_ref().map(|name| self.memories.join(name)) else { return Ok(None) };
        match DirBuilder::new().recursive(true).mode(0o700).create(&folder) {
            Err(error) => Err(io::Error::new(error.kind(), format!("{} can't be made: {error}", folder.display()))),
            Ok(()) => Ok(Some(folder)),
        }
    }

    /// A command that works in `folder`, which is its own, with the agents' environment and no other.
    pub fn command(&self, program: &Path, folder: &Path, Grants { own, read, network }: Grants<'_>) -> Command {
        let mut how: Vec<OsString> = Vec::new();
        let named = |option: &str, path: &Path| [option.into(), path.into()];
        if network != Network::Open {
            how.extend(["--network".into(), network.as_str().into()]);
            if let Some(WayOut { socket, here }) = &self.way_out {
                how.extend(named("--proxy", socket));
                how.extend(here.iter().flat_map(|port| ["--model-here".into(), port.to_string().into()]));
            }
        }
        // What works in no room of its own is the server's own affair.
        let id = folder.file_name().filter(|_| folder.parent() == Some(&self.folder)).and_then(OsStr::to_str);
        if let Some((group, Most { memory, processes })) = id.and_then(|id| self.bounds.group(id)) {
            how.extend(named("--group", &group));
            how.extend(["--group-processes".into(), processes.to_string().into()]);
            how.extend(memory.into_iter().flat_map(|bytes| ["--group-memory".into(), bytes.to_string().into()]));
        }
        if let Some(confinement) = &self.confinement {
            how.extend(named("--own", folder));
            how.extend(confinement.hidden.iter().flat_map(|path| named("--hidden", path)));
            how.extend(own.iter().flat_map(|path| named("--own", path)));
            how.extend(confinement.to_read(program, read).iter().flat_map(|path| named("--read", path)));
            how.extend(confinement.cut_off.then(|| "--cut-off".into()));
            how.extend(self.bounds.file_size().into_iter().flat_map(|bytes| ["--file-size".into(), bytes.to_string().into()]));
        }
        let mut command = Command::new(if how.is_empty() { program } else { Path::new("/proc/self/exe") });
        command.env_clear().envs(self.environment.iter()).current_dir(folder);
        if !how.is_empty() {
            how.extend(["--".into(), program.into()]);
            command.arg0(sandbox::AGENT.name).env(sandbox::AGENT.variable, sandbox::packed(&how));
        }
        command
    }
}
