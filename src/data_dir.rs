//! The data folder: made ready, and held by one server.

use std::ffi::OsStr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{Access as AccessMode, access};
use rustix::process::geteuid;

use crate::agent::claude::files::config_folder;
use crate::agent::environment::Environment;
use crate::config::Settings;

/// What the names of unfinished copies of the ledger begin with.
pub const PARTIAL: &str = ".partial-";

/// Makes the data folder, for this user alone. Gives its path with links resolved. A folder that holds things but no
/// ledger is left as it is: whoever named it has mistaken it, or the ledger is lost.
pub fn make(path: &Path) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut others = entries.filter(|entry| entry.file_name() != "lock" && !is_partial(&entry.file_name()));
    anyhow::ensure!(
        Settings::ledger_file(path).exists() || others.next().is_none(),
        "the folder {} holds things and no ledger; set CLAWDFORGE_DATA_DIR to one of its own, or put a backup of the ledger back with \"clawdforge restore\"",
        path.display()
    );
    own_folder(path)
}

/// The same for a machine that works for others, which has no ledger.
pub fn make_for_worker(path: &Path) -> anyhow::Result<PathBuf> {
    anyhow::ensure!(
        !Settings::ledger_file(path).exists(),
        "the folder {} is that of a server: it holds a ledger; set CLAWDFORGE_DATA_DIR to another one",
        path.display()
    );
    let mut others = std::fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.file_name() != "lock");
    anyhow::ensure!(
        path.join("runs").is_dir() || others.next().is_none(),
        "the folder {} holds other things; set CLAWDFORGE_DATA_DIR to one of its own",
        path.display()
    );
    own_folder(path)
}

/// What a backup or a restore that was cut short leaves.
fn is_partial(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PARTIAL.as_bytes())
}

/// Removes what a backup or a restore that was cut short left.
pub fn remove_partial(data_dir: &Path) {
    for entry in std::fs::read_dir(data_dir).into_iter().flatten().flatten().filter(|entry| is_partial(&entry.file_name())) {
        if let Err(error) = std::fs::remove_file(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "a copy of the ledger that was cut short is left");
        }
    }
}

/// Makes a folder that is this user's alone. Gives its path with links resolved.
pub fn own_folder(path: &Path) -> anyhow::Result<PathBuf> {
    check_writable(path).context("CLAWDFORGE_DATA_DIR")?;
    let make = || {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        path.canonicalize()
    };
    make().with_context(|| {
        format!("the data folder {} can't be used; set CLAWDFORGE_DATA_DIR to one that this user may write", path.display())
    })
}

/// Checks claude's folder: what is wrong with it would show in the first run.
pub fn check_home(environment: &Environment) -> anyhow::Result<()> {
    config_folder(environment).map_or(Ok(()), |folder| check_writable(&folder))
}

/// Makes sure that a folder that is there can be written. A mount often belongs to someone else.
fn check_writable(folder: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = folder.metadata() else { return Ok(()) };
    access(folder, AccessMode::READ_OK | AccessMode::WRITE_OK | AccessMode::EXEC_OK).map_err(|error| {
        let (folder, owner, user) = (folder.display(), metadata.uid(), geteuid().as_raw());
        anyhow::anyhow!("the folder {folder} belongs to user {owner} and can't be written by user {user}, as which the server runs ({error}); chown it, or name another one")
    })
}

/// Holds the data folder for as long as the file is open.
pub fn lock(data_dir: &Path) -> anyhow::Result<std::fs::File> {
    let file = data_dir.join("lock");
    let lock = std::fs::File::create(&file).with_context(|| format!("{} can't be written", file.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("{} can't be locked", file.display())),
        Err(std::fs::TryLockError::WouldBlock) => {
            anyhow::bail!(
                "another clawdforge serves the data folder {}; stop it, or set CLAWDFORGE_DATA_DIR to another one",
                data_dir.display()
            )
        }
    }
}
