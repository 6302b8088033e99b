//! The folder that a run works in: made for it alone, and gone with it.

use std::ffi::{CString, OsStr};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, linkat, mkdirat, open, openat, renameat, statat, symlinkat, unlinkat};
use rustix::io::Errno;

use super::contract::{Attachment, Unprepared};

/// The folder for what is temporary in one where an agent works. An attached file can't have this name: theirs never begin with a dot.
pub const TEMPORARY: &str = ".tmp";
/// How long the removal of a folder may take: an agent may be filling it.
const REMOVAL: Duration = Duration::from_mins(1);

/// A folder on disk. [`Folder::remove`] takes it away; one that is only dropped is left for the sweeper.
#[derive(Debug)]
pub struct Folder(PathBuf);

/// What the name of a file begins with that is not there whole yet.
pub const ATTACHING: &str = ".attaching-";

/// Puts files into a folder for good, where an agent is at work and may have files of the same names: then they get a number. Gives
/// their names, in order. Where one fails, none stays.
pub fn attach_for_good(folder: &Path, uploads: &Path, files: &[Attachment]) -> io::Result<Vec<String>> {
    let folder = open_for_files(folder)?;
    let mut names: Vec<String> = Vec::new();
    for file in files {
        match attach_one(&folder, uploads, file, &names) {
            Ok(name) => names.push(name),
            Err(error) => {
                for name in names {
                    let _ = unlinkat(&folder, name, AtFlags::empty());
                }
                return Err(error);
            }
        }
    }
    Ok(names)
}

fn attach_one(folder: &OwnedFd, uploads: &Path, file: &Attachment, beside: &[String]) -> io::Result<String> {
    let partial = format!("{ATTACHING}{}", uuid::Uuid::new_v4().simple());
    let copied = copy_into(folder, &partial, &uploads.join(&file.file_token)).and_then(|()| {
        numbered(&file.name)
            .filter(|name| beside.iter().all(|other| other.to_lowercase() != name.to_lowercase()))
            // Unlike a rename, a link never takes another's place.
            .find_map(|name| match linkat(folder, &partial, folder, &name, AtFlags::empty()) {
                Err(Errno::EXIST) => None,
                linked => Some(linked.map(|()| name).map_err(io::Error::from)),
            })
            .expect("there are numbers enough")
    });
    let _ = unlinkat(folder, &partial, AtFlags::empty());
    copied
}

/// An agent may be at work in it. Whatever it puts in the way, nothing is written but new files in this folder.
fn open_for_files(folder: &Path) -> io::Result<OwnedFd> {
    Ok(open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

/// Not a link: what an agent writes must not change the upload. Where the file system can, it shares the blocks.
fn copy_into(folder: &OwnedFd, name: &str, upload: &Path) -> io::Result<()> {
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut from = File::open(upload).map_err(|error| match error.kind() {
        ErrorKind::NotFound => io::Error::other(Expired),
        _ => error,
    })?;
    let mut to = File::from(openat(folder, name, new, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut from, &mut to).map(drop)
}

/// An upload that expired while it was waited for.
#[derive(Debug, thiserror::Error)]
#[error("the upload has expired")]
struct Expired;

/// Why something was not put in place, for the caller. What is the disk's fault is logged here.
pub fn unprepared(error: &io::Error) -> Unprepared {
    if matches!(error.get_ref(), Some(cause) if cause.is::<Expired>()) {
        return Unprepared::FileExpired;
    }
    tracing::error!(%error, "the disk failed");
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Unprepared::DiskFull,
        _ => Unprepared::Disk(error.to_string()),
    }
}

/// A name, and what it becomes where that is taken.
fn numbered(name: &str) -> impl Iterator<Item = String> {
    let (stem, extension) = name.rfind('.').filter(|dot| *dot > 0).map_or((name, ""), |dot| name.split_at(dot));
    std::iter::once(name.to_owned()).chain((2_u64..).map(move |number| format!("{stem}-{number}{extension}")))
}

impl Folder {
    /// Makes the folder `id` in `parent`, readable by this user only.
    pub fn create(parent: &Path, id: &str) -> io::Result<Self> {
        let folder = Self::create_bare(parent, id)?;
        DirBuilder::new().mode(0o700).create(folder.temporary())?;
        Ok(folder)
    }

    /// Makes the folder `id` in `parent`, where an agent is at work already.
    pub fn create_bare(parent: &Path, id: &str) -> io::Result<Self> {
        let folder = Self(parent.join(id));
        DirBuilder::new().mode(0o700).create(&folder.0)?;
        Ok(folder)
    }

    /// A folder for what is temporary.
    pub fn temporary(&self) -> PathBuf {
        self.0.join(TEMPORARY)
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Puts the attached files into the folder under names that do not clash, and gives their paths in order.
    pub fn attach(&self, uploads: &Path, files: &[Attachment]) -> io::Result<Vec<PathBuf>> {
        let folder = open_for_files(&self.0)?;
        distinct(files.iter().map(|file| file.name.as_str()))
            .into_iter()
            .zip(files)
            .map(|(name, file)| copy_into(&folder, &name, &uploads.join(&file.file_token)).map(|()| self.0.join(name)))
            .collect()
    }

    /// Takes the folder away with all that is in it.
    pub fn remove(self) -> io::Result<()> {
        remove_tree(&self.0)
    }
}

/// Opens the folder that lies below another by these names, on whose way an agent may have put links: none is followed.
pub fn open_below(folder: &Path, names: &[&str]) -> io::Result<OwnedFd> {
    let top = openat(CWD, folder, FOLDER | OFlags::RDONLY, Mode::empty())?;
    names.iter().try_fold(top, |folder, name| Ok(openat(&folder, *name, FOLDER | OFlags::RDONLY, Mode::empty())?))
}

/// The same, with those made that are missing.
pub fn make_below(folder: &Path, names: &[&str]) -> io::Result<OwnedFd> {
    names.iter().try_fold(open_below(folder, &[])?, |folder, name| match mkdirat(&folder, *name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(openat(&folder, *name, FOLDER | OFlags::RDONLY, Mode::empty())?),
        Err(error) => Err(error.into()),
    })
}

/// Puts a file in the place of whatever file is there, or link, in a folder in which an agent may be at work, or another of these. Nothing
/// else is written.
pub fn replace(folder: &OwnedFd, name: &str, content: &[u8]) -> io::Result<()> {
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    put_in_place(folder, name, |partial| File::from(openat(folder, partial, new, Mode::RUSR | Mode::WUSR)?).write_all(content))
}

/// The same with a link to a file.
pub fn replace_by_link(folder: &OwnedFd, name: &str, to: &Path) -> io::Result<()> {
    put_in_place(folder, name, |partial| Ok(symlinkat(to, folder, partial)?))
}

fn put_in_place(folder: &OwnedFd, name: &str, make: impl FnOnce(&str) -> io::Result<()>) -> io::Result<()> {
    let partial = format!(".new-{}", uuid::Uuid::new_v4().simple());
    let put = make(&partial).and_then(|()| Ok(renameat(folder, &partial, folder, name)?));
    if put.is_err() {
        let _ = unlinkat(folder, &partial, AtFlags::empty());
    }
    put
}

/// Reads a file that an agent may have put there: a regular one of at most `most` bytes, or it is an error. Nothing else is waited
/// for, as a pipe would be.
pub fn read_regular(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = File::from(open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?);
    is_regular(&file.metadata()?, most)?;
    let mut content = Vec::new();
    // It may grow while it is read.
    file.take(most).read_to_end(&mut content)?;
    Ok(content)
}

/// Whether it is a regular file of at most `most` bytes; why not, if it isn't.
pub fn is_regular(file: &fs::Metadata, most: u64) -> io::Result<()> {
    match (file.is_file(), file.len() <= most) {
        (true, true) => Ok(()),
        (true, false) => Err(io::Error::other(format!("it is larger than {} MiB", most >> 20))),
        (false, _) => Err(io::Error::other("it is no regular file")),
    }
}

/// Removes a folder and all below it, whatever modes an agent gave to the folders in it and however deep they go; or a file.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.is_dir() => return fs::remove_file(path),
        Ok(_) => {}
    }
    let begun = Instant::now();
    let top = open_own(CWD, path.as_os_str())?;
    let mut moved = 0;
    loop {
        let names = some_names(&top)?;
        if names.is_empty() {
            return fs::remove_dir(path);
        }
        for name in names.iter().filter(|name| unlinkat(&top, name.as_c_str(), AtFlags::empty()).is_err()) {
            let folder = open_own(&top, OsStr::from_bytes(name.to_bytes()))?;
            for inner in some_names(&folder)? {
                if unlinkat(&folder, inner.as_c_str(), AtFlags::empty()).is_ok() {
                    continue;
                }
                // A folder comes up here, so that depth takes neither stack nor descriptors.
                drop(open_own(&folder, OsStr::from_bytes(inner.to_bytes()))?);
                while let Err(error) = renameat(&folder, inner.as_c_str(), &top, format!(".{moved}")) {
                    if !matches!(error, Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) {
                        return Err(error.into());
                    }
                    moved += 1;
                }
                moved += 1;
            }
            // Where there is more in it, the next round comes to that.
            let _ = unlinkat(&top, name.as_c_str(), AtFlags::REMOVEDIR);
        }
        if begun.elapsed() > REMOVAL {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}

/// How deep a folder is looked into.
const DEPTH: usize = 200;
/// What a file takes at least, in bytes; so its number is bounded too.
const LEAST: u64 = 4096;

/// Whether a folder holds more than `limit` bytes on the disk, or is deeper than 200 folders. What can't be read holds nothing. An agent
/// may be at work in it.
pub fn holds_more_than(path: &Path, limit: u64) -> bool {
    fn add(folder: &OwnedFd, depth: usize, sum: &mut u64, limit: u64) -> io::Result<()> {
        for name in names(folder)? {
            let name = name?;
            // It may be gone by now.
            let Ok(found) = statat(folder, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW) else { continue };
            *sum += LEAST.max(512 * u64::try_from(found.st_blocks).unwrap_or(0));
            if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
                if depth == DEPTH {
                    *sum = u64::MAX;
                } else if let Ok(inner) = open_folder(folder, OsStr::from_bytes(name.to_bytes())) {
                    let _ = add(&inner, depth + 1, sum, limit);
                }
            }
            if *sum > limit {
                break;
            }
        }
        Ok(())
    }
    let mut sum = 0;
    if let Ok(top) = open_folder(CWD, path.as_os_str()) {
        let _ = add(&top, 0, &mut sum, limit);
    }
    sum > limit
}

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a folder that may be locked for its owner. Never follows a link.
fn open_own(at: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let handle = openat(&at, name, FOLDER | OFlags::PATH, Mode::empty())?;
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let _ = fs::set_permissions(&path, Permissions::from_mode(0o700));
    Ok(openat(at, name, FOLDER | OFlags::RDONLY, Mode::empty())?)
}

/// The same, and leaves its mode alone where it is not locked.
fn open_folder(at: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    match openat(&at, name, FOLDER | OFlags::RDONLY, Mode::empty()) {
        Ok(folder) => Ok(folder),
        Err(_) => open_own(at, name),
    }
}

/// Names of what is in a folder.
fn names(folder: &OwnedFd) -> io::Result<impl Iterator<Item = Result<CString, Errno>>> {
    let entries = Dir::read_from(folder)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    Ok(entries.filter(|name| !name.as_ref().is_ok_and(|name| matches!(name.to_bytes(), b"." | b".."))))
}

/// All of them, or a good many.
fn some_names(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    Ok(names(folder)?.take(10_000).collect::<Result<_, _>>()?)
}

/// Removes what `folder` holds, but for what is to be kept. What can't be removed is logged, and left.
pub fn clear(folder: &Path, keep: impl Fn(&str) -> bool) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if keep(&entry.file_name().to_string_lossy()) {
            continue;
        }
        match remove_tree(&entry.path()) {
            Ok(()) => removed += 1,
            Err(error) => tracing::warn!(path = %entry.path().display(), %error, "not removed"),
        }
    }
    Ok(removed)
}

/// The names, each made different from those before it, also on a file system that ignores case.
fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut taken = std::collections::HashSet::new();
    names.map(|name| numbered(name).find(|candidate| taken.insert(candidate.to_lowercase())).expect("there are numbers enough")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(name: &str) -> Attachment {
        Attachment { file_token: "upload".into(), name: name.into(), size: 7 }
    }

    #[test]
    fn names_that_clash_are_numbered() {
        let names = ["a.txt", "A.TXT", "a.txt", "a-2.txt", "b", "b"];
        assert_eq!(distinct(names.into_iter()), ["a.txt", "A-2.TXT", "a-3.txt", "a-2-2.txt", "b", "b-2"]);
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let [pipe, sparse, file] = ["pipe", "sparse", "file"].map(|name| folder.path().join(name));
        rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
        fs::write(&file, "text").unwrap();
        for not in [&pipe, &sparse, Path::new("/dev/zero"), folder.path()] {
            read_regular(not, 1 << 20).unwrap_err();
        }
        assert_eq!(read_regular(&file, 1 << 20).unwrap(), b"text");
    }

    #[test]
    fn a_folder_goes_even_where_an_agent_locked_it() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::create(parent.path(), "x").unwrap();
        let locked = folder.path().join("a/b");
        fs::create_dir_all(&locked).unwrap();
        fs::write(locked.join("file"), "text").unwrap();
        fs::set_permissions(&locked, Permissions::from_mode(0o000)).unwrap();
        fs::set_permissions(folder.path().join("a"), Permissions::from_mode(0o500)).unwrap();
        folder.remove().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_folder_holds_is_counted_without_following_or_changing_anything() {
        let parent = tempfile::tempdir().unwrap();
        let top = parent.path().join("top");
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::write(top.join("a/b/large"), vec![b'x'; 1 << 20]).unwrap();
        fs::write(parent.path().join("elsewhere"), vec![b'x'; 4 << 20]).unwrap();
        std::os::unix::fs::symlink(parent.path(), top.join("link")).unwrap();
        fs::set_permissions(top.join("a"), Permissions::from_mode(0o755)).unwrap();
        assert!(holds_more_than(&top, 1 << 20) && !holds_more_than(&top, 2 << 20));
        assert_eq!(fs::metadata(top.join("a")).unwrap().permissions().mode() & 0o777, 0o755);
        fs::set_permissions(top.join("a/b"), Permissions::from_mode(0o000)).unwrap();
        assert!(holds_more_than(&top, 1 << 20));
        for at in 0..100 {
            fs::write(top.join(format!("a/{at}")), "").unwrap();
        }
        assert!(holds_more_than(&top.join("a"), 100 * LEAST + (1 << 20)) && !holds_more_than(&top.join("nowhere"), 0));
        fs::create_dir_all(parent.path().join("deep").join("d/".repeat(DEPTH + 1))).unwrap();
        assert!(holds_more_than(&parent.path().join("deep"), 1 << 30));
    }

    #[test]
    fn a_folder_goes_however_deep_it_is() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::create(parent.path(), "x").unwrap();
        let top = open_own(CWD, folder.path().as_os_str()).unwrap();
        let mut deepest = top;
        for _ in 0..4_000 {
            rustix::fs::mkdirat(&deepest, "d", Mode::RWXU).unwrap();
            deepest = open_own(&deepest, OsStr::new("d")).unwrap();
        }
        std::thread::Builder::new().stack_size(64 << 10).spawn(|| folder.remove()).unwrap().join().unwrap().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_written_through_a_link_in_the_way() {
        let parent = tempfile::tempdir().unwrap();
        let [source, precious] = ["upload", "precious"].map(|name| parent.path().join(name));
        fs::write(source, "content").unwrap();
        fs::write(&precious, "precious").unwrap();
        let files = [upload("a")];
        let folder = Folder::create(parent.path(), "x").unwrap();
        std::os::unix::fs::symlink(&precious, folder.path().join("a")).unwrap();
        folder.attach(parent.path(), &files).unwrap_err();
        let elsewhere = Folder::create(parent.path(), "y").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), parent.path().join("z")).unwrap();
        Folder(parent.path().join("z")).attach(parent.path(), &files).unwrap_err();
        assert_eq!(fs::read_to_string(precious).unwrap(), "precious");
        assert!(!elsewhere.path().join("a").exists());
    }

    #[test]
    fn files_that_stay_take_nobodys_name_and_leave_nothing_where_one_fails() {
        let parent = tempfile::tempdir().unwrap();
        let (source, work) = (parent.path().join("upload"), parent.path().join("work"));
        fs::write(&source, "content").unwrap();
        fs::create_dir(&work).unwrap();
        fs::write(work.join("a.txt"), "the agent's").unwrap();
        std::os::unix::fs::symlink(&source, work.join("a-2.txt")).unwrap();
        let attached = attach_for_good(&work, parent.path(), &[upload("a.txt"), upload("A.txt"), upload("b")]).unwrap();
        assert_eq!(attached, ["a-3.txt", "A.txt", "b"]);
        assert_eq!(
            (fs::read_to_string(work.join("a.txt")).unwrap(), fs::read_to_string(work.join("a-3.txt")).unwrap()),
            ("the agent's".into(), "content".into())
        );
        let gone = Attachment { file_token: "gone".into(), ..upload("d") };
        attach_for_good(&work, parent.path(), &[upload("c"), gone]).unwrap_err();
        assert_eq!(fs::read_dir(&work).unwrap().count(), 5);
    }

    #[test]
    fn attachments_are_copies_of_their_own() {
        let parent = tempfile::tempdir().unwrap();
        let source = parent.path().join("upload");
        fs::write(&source, "content").unwrap();
        let folder = Folder::create(parent.path(), "x").unwrap();
        let paths = folder.attach(parent.path(), &[upload("report.pdf"), upload("report.pdf")]).unwrap();
        fs::write(&paths[1], "changed").unwrap();
        assert_eq!(fs::read_to_string(&source).unwrap(), "content");
        fs::remove_file(source).unwrap();
        assert_eq!(paths, [folder.path().join("report.pdf"), folder.path().join("report-2.pdf")]);
        assert_eq!(fs::read_to_string(&paths[0]).unwrap(), "content");
    }
}
