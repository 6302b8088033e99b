//! Where and with what agents are started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::bounds::Bounds;
use super::environment::Environment;
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
}

impl Launcher {
    /// A command that works in `folder`, which is its own as the paths of `own` are, with the agents' environment and no other.
    pub fn command(&self, program: &Path, folder: &Path, own: &[PathBuf]) -> Command {
        let mut command = Command::new(self.confinement.as_ref().map_or(program, |_| Path::new("/proc/self/exe")));
        command.env_clear().envs(self.environment.iter()).current_dir(folder);
        if let Some(Confinement { hidden, home, kept, cut_off }) = &self.confinement {
            let mut how: Vec<OsString> = vec!["--hidden".into(), hidden.into(), "--own".into(), folder.into()];
            how.extend(home.iter().flat_map(|home| ["--home-to-read".into(), home.into()]));
            how.extend(own.iter().chain(kept).flat_map(|path| ["--own".into(), path.into()]));
            how.extend(cut_off.then(|| "--cut-off".into()));
            how.extend(self.bounds.file_size().into_iter().flat_map(|bytes| ["--file-size".into(), bytes.to_string().into()]));
            how.extend(["--".into(), program.into()]);
            command.arg0(sandbox::AGENT.name).env(sandbox::AGENT.variable, sandbox::packed(&how));
        }
        command
    }
}
