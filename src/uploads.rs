//! Files that apps sent, on disk until their time is over.
//!
//! An upload is streamed to a partial file, which takes its token for a name when it is whole. What is not in the
//! ledger does not exist for anyone, and the sweeper removes it.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::io::AsyncWriteExt;

use crate::ledger::{self, Ledger};
use crate::secret;

/// The longest name that is kept, in bytes. A number may be added to it, and file systems take 255.
const MAX_NAME: usize = 200;
/// How old a file without a row must be before it counts as left over: its row may be about to be written.
const SETTLED_AFTER: Duration = Duration::from_mins(10);
const PARTIAL: &str = ".partial";

/// The folder of uploads.
#[derive(Clone, Debug)]
pub struct Uploads {
    folder: PathBuf,
    max_bytes: u64,
}

impl Uploads {
    /// Uses `folder`, which exists, and removes the partial files that a crash left in it.
    pub fn open(folder: PathBuf, max_bytes: u64) -> io::Result<Self> {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(PARTIAL) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(Self { folder, max_bytes })
    }

    /// The largest upload in bytes.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Where an upload's content is.
    pub fn path(&self, file_token: &str) -> PathBuf {
        self.folder.join(file_token)
    }

    /// Begins an upload.
    pub fn begin(&self) -> io::Result<Incoming> {
        let file_token = secret::file_token();
        let partial = self.folder.join(format!("{file_token}{PARTIAL}"));
        // Without an await between the file and its guard, so that a client which leaves here leaves no file.
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        Ok(Incoming { file: file.into(), size: 0, whole: self.path(&file_token), file_token, path: Some(partial) })
    }

    /// Removes the uploads whose time is over, and what no row of the ledger names. Gives how many files there were.
    pub async fn sweep(&self, ledger: &Ledger) -> Result<usize, Error> {
        let expired = ledger.expire_files().await?;
        for file_token in &expired {
            remove(&self.path(file_token)).await?;
        }
        let mut removed = expired.len();
        let mut entries = tokio::fs::read_dir(&self.folder).await?;
        while let Some(entry) = entries.next_entry().await? {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Partial files belong to uploads that are under way.
            if name.ends_with(PARTIAL) || ledger.knows_file(name).await? {
                continue;
            }
            let modified = entry.metadata().await.and_then(|file| file.modified());
            let age = modified.map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
            if age.is_ok_and(|age| age > SETTLED_AFTER) {
                remove(&entry.path()).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

async fn remove(file: &Path) -> io::Result<()> {
    match tokio::fs::remove_file(file).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Why uploads could not be kept or swept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] io::Error),
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
}

/// An upload that is being written. Dropped before it is whole, it leaves nothing.
#[derive(Debug)]
pub struct Incoming {
    file: tokio::fs::File,
    size: u64,
    file_token: String,
    whole: PathBuf,
    /// The file to remove on drop.
    path: Option<PathBuf>,
}

impl Incoming {
    /// Adds content.
    pub async fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.file.write_all(chunk).await?;
        self.size += chunk.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Completes the upload and records it.
    pub async fn finish(mut self, app: &str, name: String, ttl_secs: u32, ledger: &Ledger) -> Result<ledger::File, Error> {
        self.file.flush().await?;
        if let Some(partial) = &self.path {
            tokio::fs::rename(partial, &self.whole).await?;
        }
        self.path = Some(self.whole.clone());
        let file = ledger::File { file_token: self.file_token.clone(), name, size: self.size };
        ledger.add_file(app, &file, ttl_secs).await?;
        self.path = None;
        Ok(file)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes a client's name for a file safe to stand in a folder and in a prompt: no separators, no control or
/// text-direction characters, no leading dot, 200 bytes at most with the extension kept, never empty.
pub fn safe_name(given: &str) -> String {
    let last = given.rsplit(['/', '\\']).next().unwrap_or_default();
    let visible: String = last.chars().filter(|c| !is_unsafe(*c)).collect();
    let at_an_end = |c: char| c == '.' || c.is_whitespace();
    let name = visible.trim_matches(at_an_end);
    if name.is_empty() {
        return "file".to_owned();
    }
    // claude would take them for instructions of its owner.
    if ["CLAUDE.md", "CLAUDE.local.md"].iter().any(|special| special.eq_ignore_ascii_case(name)) {
        return format!("attached-{name}");
    }
    if name.len() <= MAX_NAME {
        return name.to_owned();
    }
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).filter(|e| e.len() <= 16);
    let extension = extension.map(|e| format!(".{e}")).unwrap_or_default();
    let stem = &name[..name.floor_char_boundary(MAX_NAME - extension.len())];
    format!("{}{extension}", stem.trim_end_matches(at_an_end))
}

fn is_unsafe(c: char) -> bool {
    // Beside the control characters: tags and overrides of direction, joiners, line and paragraph separators.
    c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{61c}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_keep_what_is_harmless() {
        for (given, safe) in [
            ("report 2026.pdf", "report 2026.pdf"),
            ("Übersicht (1).xlsx", "Übersicht (1).xlsx"),
            ("../../etc/passwd", "passwd"),
            ("C:\\Users\\me\\a.txt", "a.txt"),
            (".bashrc", "bashrc"),
            ("..", "file"),
            ("", "file"),
            ("a/", "file"),
            ("nul\0byte.txt", "nulbyte.txt"),
            ("line\nend.txt", "lineend.txt"),
            ("\u{202e}gpj.exe", "gpj.exe"),
            (" . . x .", "x"),
            ("Claude.MD", "attached-Claude.MD"),
        ] {
            assert_eq!(safe_name(given), safe, "{given:?}");
        }
        let long = safe_name(&format!("{}.jpeg", "ü".repeat(300)));
        assert!(long.len() <= MAX_NAME && long.ends_with("ü.jpeg"), "{long}");
    }

    proptest! {
        #[test]
        fn any_name_is_made_safe(given in prop::collection::vec(any::<char>(), 0..300)) {
            let given: String = given.into_iter().collect();
            let safe = safe_name(&given);
            prop_assert!(!safe.is_empty() && safe.len() <= MAX_NAME);
            prop_assert!(!safe.starts_with('.') && !safe.contains(['/', '\\', '\0', '\n']));
            prop_assert!(!safe.chars().any(char::is_control));
            prop_assert_eq!(safe_name(&safe), safe.clone(), "safe names stay as they are");
            let folder = Path::new("/folder");
            let path = folder.join(&safe);
            prop_assert_eq!(path.parent(), Some(folder));
        }
    }
}
