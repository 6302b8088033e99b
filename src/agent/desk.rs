//! Desks: each a folder, and the `claude` that works in it, for exactly one run.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::family::{self, Mark};
use super::folder::{Attachment, Folder, blocking, clear};
use super::process::{self, Waiting};
use super::{Workshop, claude, programs};

/// Where the desks of a server stand.
#[derive(Clone, Debug)]
pub struct Desks {
    /// The folder of their folders.
    pub workshop: Workshop,
    /// The claude program: a path, or a name on PATH.
    pub claude: OsString,
    in_use: Arc<Mutex<HashSet<String>>>,
}

/// One run's place to work.
#[derive(Debug)]
pub struct Desk {
    uuid: Uuid,
    folder: Folder,
    desks: Desks,
    _in_use: InUse,
}

/// What keeps the sweeper from a folder.
#[derive(Debug)]
struct InUse {
    desks: Desks,
    id: String,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.desks.in_use().remove(&self.id);
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

impl Desks {
    /// Desks in the workshop's folder.
    pub fn new(workshop: Workshop, claude: OsString) -> Self {
        Self { workshop, claude, in_use: Arc::default() }
    }

    /// Makes the folder of a desk, with the files in it. Gives the files' paths.
    pub async fn set_up(&self, uuid: Uuid, files: Vec<Attachment>) -> io::Result<(Desk, Vec<PathBuf>)> {
        let desks = self.clone();
        blocking(move || {
            let id = uuid.simple().to_string();
            desks.in_use().insert(id.clone());
            let in_use = InUse { desks: desks.clone(), id };
            let folder = Folder::create(&desks.workshop.folder, &in_use.id)?;
            match folder.attach(&files) {
                Ok(files) => Ok((Desk { uuid, folder, desks, _in_use: in_use }, files)),
                Err(error) => folder.remove().and(Err(error)),
            }
        })
        .await
    }

    /// Removes the folders that are nobody's any more.
    pub async fn sweep(&self) -> io::Result<usize> {
        let desks = self.clone();
        blocking(move || clear(&desks.workshop.folder, |id| desks.in_use().contains(id))).await
    }

    fn in_use(&self) -> MutexGuard<'_, HashSet<String>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// What claude would wait for for ever when it starts, in words.
    pub async fn obstacle(&self) -> Option<String> {
        self.desks.workshop.obstacle().await
    }

    /// Starts claude at the desk. It waits for its prompt.
    pub fn start(&self, model: &str) -> Result<Waiting, NotStarted> {
        let Desks { workshop, claude, .. } = &self.desks;
        let program = programs::find(claude, &workshop.environment).ok_or_else(|| NotStarted::NotInstalled(claude.clone()))?;
        let mut command = workshop.command(&program, self.folder.path(), &[]);
        claude::prepare(&mut command, self.uuid, model, &self.folder.temporary());
        process::start(&mut command, &self.mark()).map_err(|error| {
            NotStarted::Failed(format!("{} could not be started ({error}); check that it is a program of this machine", program.display()))
        })
    }

    /// Puts files onto the desk. Gives their paths.
    pub async fn attach(self, files: Vec<Attachment>) -> (Self, io::Result<Vec<PathBuf>>) {
        if files.is_empty() {
            return (self, Ok(Vec::new()));
        }
        let attaching = tokio::task::spawn_blocking(move || {
            let attached = self.folder.attach(&files);
            (self, attached)
        });
        attaching.await.expect("copying files neither panics nor is cancelled")
    }

    /// Ends what works at the desk, and clears it away.
    pub async fn leave(self, waiting: Option<Waiting>) {
        if let Some(waiting) = waiting {
            waiting.end().await;
            family::end(&self.mark()).await;
        }
        self.clear_away().await;
    }

    /// The mark of the family of processes that works at the desk.
    pub fn mark(&self) -> Mark {
        self.desks.workshop.mark.run(&self.uuid.simple().to_string())
    }

    /// Why what worked at the desk was ended, if that was for its memory.
    pub fn why_ended(&self) -> Option<String> {
        self.desks.workshop.memory.as_ref()?.why_ended(&self.uuid.simple().to_string())
    }

    /// Removes the folder, and what claude keeps of the run elsewhere. What can't be removed is left to the sweeper.
    pub async fn clear_away(self) {
        let folder = self.folder.path().to_owned();
        if let Err(error) = blocking(move || self.remove()).await {
            tracing::warn!(path = %folder.display(), %error, "a run's folder was not removed; the sweeper tries again");
        }
    }

    fn remove(self) -> io::Result<()> {
        self.folder.remove().and(claude::clean_up(&self.uuid.to_string(), &self.desks.workshop.environment))
    }
}
