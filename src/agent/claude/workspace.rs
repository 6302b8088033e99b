//! The folders that runs work in: each with the `claude` in it for exactly one run.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::json;
use uuid::Uuid;

use super::command::{self, Purpose};
use super::files::{self, MEMORY};
use super::sign_in;
use crate::agent::contract::{Attachment, Rules};
use crate::agent::family;
use crate::agent::folder::{Folder, TEMPORARY, clear};
use crate::agent::launcher::{Grants, Launcher};
use crate::agent::process::{self, Waiting};
use crate::agent::programs;
use crate::agent::tag::Tag;
use crate::blocking::blocking;

/// The runs' folders of a server.
#[derive(Clone, Debug)]
pub struct RunDirs {
    /// The folder of their folders.
    pub launcher: Launcher,
    /// The claude program: a path, or a name on PATH.
    pub claude: OsString,
    in_use: Arc<Mutex<HashSet<String>>>,
}

/// The folder of one run.
#[derive(Debug)]
pub struct RunDir {
    uuid: Uuid,
    folder: Folder,
    run_dirs: RunDirs,
    _in_use: InUse,
}

/// Keeps the sweeper from a folder.
#[derive(Debug)]
struct InUse {
    run_dirs: RunDirs,
    id: String,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.run_dirs.in_use().remove(&self.id);
    }
}

/// Why no agent was started.
#[derive(Debug)]
pub enum NotStarted {
    /// There is no such program.
    NotInstalled(OsString),
    /// The system would not start it.
    Failed(String),
}

/// Where claude has its own files of a run, below its folder.
pub const CONFIG_OF_RUN: [&str; 2] = [TEMPORARY, "config"];

fn config_of(folder: &Folder) -> PathBuf {
    CONFIG_OF_RUN.iter().fold(folder.path().to_owned(), |path, name| path.join(name))
}

impl RunDirs {
    /// Folders in that of the launcher.
    pub fn new(launcher: Launcher, claude: OsString) -> Self {
        Self { launcher, claude, in_use: Arc::default() }
    }

    /// Makes a folder, with the files in it. Gives the files' paths.
    pub async fn set_up(&self, uuid: Uuid, attached: Vec<Attachment>) -> io::Result<(RunDir, Vec<PathBuf>)> {
        let run_dirs = self.clone();
        blocking(move || {
            let id = uuid.simple().to_string();
            run_dirs.in_use().insert(id.clone());
            let in_use = InUse { run_dirs: run_dirs.clone(), id };
            let folder = Folder::create(&run_dirs.launcher.folder, &in_use.id)?;
            let made = files::make_config(&config_of(&folder), &run_dirs.launcher.environment);
            match made.and_then(|()| folder.attach(&run_dirs.launcher.uploads, &attached)) {
                Ok(files) => Ok((RunDir { uuid, folder, run_dirs, _in_use: in_use }, files)),
                Err(error) => folder.remove().and(Err(error)),
            }
        })
        .await
    }

    /// Removes the folders that are nobody's any more.
    pub async fn sweep(&self) -> io::Result<usize> {
        let run_dirs = self.clone();
        blocking(move || clear(&run_dirs.launcher.folder, |id| run_dirs.in_use().contains(id))).await
    }

    fn in_use(&self) -> MutexGuard<'_, HashSet<String>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunDir {
    /// What claude would wait for for ever when it starts, in words.
    pub async fn obstacle(&self) -> Option<String> {
        files::obstacle_for(&self.run_dirs.launcher.environment).await
    }

    /// Starts claude in the folder. It waits for its prompt.
    pub fn start(&self, purpose: Purpose, model: &str, rules: &Rules) -> Result<Waiting, NotStarted> {
        let RunDirs { launcher, claude, .. } = &self.run_dirs;
        let program = programs::find(claude, &launcher.environment).ok_or_else(|| NotStarted::NotInstalled(claude.clone()))?;
        let read = files::settings(&launcher.environment);
        let memory = launcher.memory(rules).map_err(|error| NotStarted::Failed(error.to_string()))?;
        let sign_in = (purpose == Purpose::Renewal).then(|| sign_in::folder(&launcher.environment));
        let own: Vec<_> = memory.iter().chain(&sign_in).cloned().collect();
        let grants = Grants { own: &own, read: &read, network: rules.network };
        let mut process = launcher.command(&program, self.folder.path(), grants);
        command::prepare(&mut process, purpose, self.uuid, model, &self.folder.temporary());
        files::use_config(&mut process, &config_of(&self.folder));
        // Not documented; seen in claude 2.1.197 and 2.1.332.
        process.envs(sign_in.map(|folder| ("CLAUDE_SECURESTORAGE_CONFIG_DIR", folder)));
        if let Some(memory) = memory {
            files::keep_memory(&mut process);
            // Not as an argument: it names the app.
            let settings = config_of(&self.folder).join("memory.json");
            let written = std::fs::write(&settings, json!({MEMORY: memory}).to_string());
            written.map_err(|error| NotStarted::Failed(format!("{} can't be written ({error})", settings.display())))?;
            process.arg("--settings").arg(settings);
        }
        process::start(&mut process, &self.tag()).map_err(|error| {
            NotStarted::Failed(format!("{} could not be started ({error}); check that it is a program of this machine", program.display()))
        })
    }

    /// Puts files into the folder. Gives their paths.
    pub async fn attach(self, files: Vec<Attachment>) -> (Self, io::Result<Vec<PathBuf>>) {
        if files.is_empty() {
            return (self, Ok(Vec::new()));
        }
        let attaching = tokio::task::spawn_blocking(move || {
            let attached = self.folder.attach(&self.run_dirs.launcher.uploads, &files);
            (self, attached)
        });
        attaching.await.expect("copying files neither panics nor is cancelled")
    }

    /// Ends what works in the folder, and removes it.
    pub async fn leave(self, waiting: Option<Waiting>) {
        if let Some(waiting) = waiting {
            waiting.end().await;
            family::end(&self.tag()).await;
        }
        self.clear_away().await;
    }

    /// The tag of the family of processes that works in the folder.
    pub fn tag(&self) -> Tag {
        self.run_dirs.launcher.tag.run(&self.uuid.simple().to_string())
    }

    /// Why what worked there was ended, if it took too much.
    pub fn why_ended(&self) -> Option<String> {
        self.run_dirs.launcher.bounds.why_ended(&self.uuid.simple().to_string())
    }

    /// Removes the folder. What can't be removed is left to the sweeper.
    pub async fn clear_away(self) {
        let folder = self.folder.path().to_owned();
        if let Err(error) = blocking(move || self.remove()).await {
            tracing::warn!(path = %folder.display(), %error, "a run's folder was not removed; the sweeper tries again");
        }
    }

    fn remove(self) -> io::Result<()> {
        self.folder.remove()
    }
}
