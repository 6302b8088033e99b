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
    /// A command that works in `folder`, which is its own as the paths of `own` are, and reads those of `read`, with the agents' environment
    /// and no other.
    pub fn command(&self, program: &Path, folder: &Path, own: &[PathBuf], read: &[PathBuf]) -> Command {
        let mut command = Command::new(self.confinement.as_ref().map_or(program, |_| Path::new("/proc/self/exe")));
        command.env_clear().envs(self.environment.iter()).current_dir(folder);
        if let Some(confinement) = &self.confinement {
            let named = |option: &str, path: &Path| [option.into(), path.into()];
            let mut how: Vec<OsString> = named("--own", folder).to_vec();
            how.extend(confinement.hidden.iter().flat_map(|path| named("--hidden", path)));
            how.extend(own.iter().flat_map(|path| named("--own", path)));
            how.extend(confinement.to_read(program, read).iter().flat_map(|path| named("--read", path)));
            how.extend(confinement.cut_off.then(|| "--cut-off".into()));
            how.extend(self.bounds.file_size().into_iter().flat_map(|bytes| ["--file-size".into(), bytes.to_string().into()]));
            how.extend(["--".into(), program.into()]);
            command.arg0(sandbox::AGENT.name).env(sandbox::AGENT.variable, sandbox::packed(&how));
        }
        command
    }
}
