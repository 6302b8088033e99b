//! Readers of feeds: each follows the file at its own pace, to the end.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::sync::{Semaphore, watch};
use tokio::time::sleep;
use tokio_util::bytes::Bytes;

use super::feed_format::{self, End, Record};
use super::live::{Live, Told};
use crate::blocking::blocking;

/// Bytes that are read for a reader at once, and held for it.
const PIECE: usize = 16 << 10;
/// How often a reader hears something, so that no proxy takes its connection for dead.
const BEAT: Duration = Duration::from_secs(15);
/// Large lines that are rendered at once.
const RENDERED_AT_ONCE: usize = 2;

/// What there is to tell a reader.
#[derive(Debug)]
pub enum Item {
    /// A line of the feed.
    Record(Record),
    /// Something was not kept.
    Gap,
    /// The end of a feed that was not kept whole.
    End(Arc<End>),
    /// Nothing, for a while.
    Beat,
}

/// How items go over the wire.
#[derive(Clone)]
pub struct Dialect {
    /// What it is called, where each line looks the same to all readers; `None` where it hangs on what came before.
    pub name: Option<&'static str>,
    /// Makes the bytes.
    pub render: Arc<dyn Fn(Item) -> Vec<u8> + Send + Sync>,
}

/// Follows a feed.
#[derive(Debug)]
pub struct FeedReader {
    name: String,
    file: Arc<File>,
    at: u64,
    told: watch::Receiver<Told>,
    /// Of a job that goes on.
    live: Option<Live>,
    frames: LargeFrames,
    /// One that is being sent, and how far.
    large: Option<(Arc<LargeFrame>, u64)>,
}

impl FeedReader {
    pub(super) fn new(name: String, file: File, at: u64, told: watch::Receiver<Told>, live: Option<Live>, frames: LargeFrames) -> Self {
        Self { name, file: Arc::new(file), at, told, live, frames, large: None }
    }

    /// The bytes of all there is to tell, to the end of the feed.
    pub fn bytes(self, dialect: Dialect) -> impl Stream<Item = io::Result<Bytes>> + Send {
        stream::unfold(Some((self, dialect)), async |reading| {
            let (mut reader, dialect) = reading?;
            match reader.next(&dialect).await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some((reader, dialect)))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self, dialect: &Dialect) -> io::Result<Option<Bytes>> {
        loop {
            if let Some((frame, at)) = &mut self.large {
                let (frame, from) = (frame.clone(), *at);
                let piece = blocking(move || frame.piece(from)).await?;
                *at += piece.len() as u64;
                if piece.is_empty() {
                    self.large = None;
                    continue;
                }
                return Ok(Some(piece.into()));
            }
            let told = *self.told.borrow_and_update();
            if self.at < told.bytes {
                let (file, at, render) = (self.file.clone(), self.at, dialect.render.clone());
                let read = blocking(move || {
                    let piece = read_piece(&file, at, told.bytes)?;
                    let whole = piece.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
                    let lines = piece[..whole].split_inclusive(|byte| *byte == b'\n');
                    let bytes: Vec<u8> = lines.filter_map(feed_format::parse).flat_map(|record| render(Item::Record(record))).collect();
                    Ok((whole, bytes))
                });
                let (whole, bytes) = read.await?;
                if whole == 0 {
                    let (frame, end) = self.frames.get(&self.name, self.file.clone(), at, told.bytes, dialect).await?;
                    self.at = end;
                    self.large = Some((frame, 0));
                    continue;
                }
                self.at += whole as u64;
                if !bytes.is_empty() {
                    return Ok(Some(bytes.into()));
                }
                continue;
            }
            if told.broken && told.ended {
                // Not reached again: the end is at hand.
                self.told = watch::Sender::new(Told { broken: false, ..told }).subscribe();
                let end = self.live.as_ref().and_then(Live::ended).map(|end| (dialect.render)(Item::End(end)));
                return Ok(Some([(dialect.render)(Item::Gap), end.unwrap_or_default()].concat().into()));
            }
            if told.ended {
                return Ok(None);
            }
            tokio::select! {
                biased;
                Ok(()) = self.told.changed() => {}
                // It is over without an end: it died of a defect, or starts again after the server has.
                () = over(self.live.as_ref()) => if !self.told.borrow().ended { return Ok(None) },
                () = sleep(BEAT) => return Ok(Some((dialect.render)(Item::Beat).into())),
            }
        }
    }
}

async fn over(live: Option<&Live>) {
    if let Some(live) = live {
        live.over().await;
    }
}

fn read_piece(file: &File, at: u64, end: u64) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; usize::try_from(end - at).unwrap_or(PIECE).min(PIECE)];
    file.read_exact_at(&mut piece, at)?;
    Ok(piece)
}

/// Lines that are too large to be held for each reader, rendered once for all that read them at the same time.
#[derive(Clone, Debug)]
pub(super) struct LargeFrames(Arc<Frames>);

#[derive(Debug)]
struct Frames {
    folder: PathBuf,
    at_once: Semaphore,
    known: Mutex<HashMap<FrameKey, (Weak<LargeFrame>, u64)>>,
}

/// A feed's name, the place of the line, and the dialect.
type FrameKey = (String, u64, &'static str);

/// A line as it is sent.
#[derive(Debug)]
enum LargeFrame {
    /// In a file of so many bytes that has no name and goes with its last reader.
    File(File, u64),
    /// Where the disk takes no such file: what is kept is not to be lost to its readers.
    Memory(Vec<u8>),
}

impl LargeFrame {
    fn new(folder: &Path, bytes: Vec<u8>) -> Self {
        let file = tempfile::tempfile_in(folder).and_then(|mut file| file.write_all(&bytes).map(|()| file));
        match file {
            Ok(file) => Self::File(file, bytes.len() as u64),
            Err(error) => {
                tracing::warn!(%error, "a large event is held in memory for its readers");
                Self::Memory(bytes)
            }
        }
    }

    /// What stands behind `at`, or a piece of it.
    fn piece(&self, at: u64) -> io::Result<Vec<u8>> {
        match self {
            Self::File(file, length) => read_piece(file, at, *length),
            Self::Memory(bytes) => {
                let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
                Ok(rest[..rest.len().min(PIECE)].to_vec())
            }
        }
    }
}

impl LargeFrames {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self(Arc::new(Frames { folder, at_once: Semaphore::new(RENDERED_AT_ONCE), known: Mutex::default() }))
    }

    /// The line that begins at `at`, and where it ends.
    async fn get(&self, name: &str, file: Arc<File>, at: u64, end: u64, dialect: &Dialect) -> io::Result<(Arc<LargeFrame>, u64)> {
        let key = dialect.name.map(|dialect| (name.to_owned(), at, dialect));
        let (frames, render) = (self.0.clone(), dialect.render.clone());
        let _permit = self.0.at_once.acquire().await.map_err(io::Error::other)?;
        blocking(move || {
            let known = || frames.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((frame, end)) =
                key.as_ref().and_then(|key| known().get(key).cloned()).and_then(|(frame, end)| Some((frame.upgrade()?, end)))
            {
                return Ok((frame, end));
            }
            let line = read_line(&file, at, end)?;
            let bytes = feed_format::parse(&line).map(|record| render(Item::Record(record))).unwrap_or_default();
            let (frame, end) = (Arc::new(LargeFrame::new(&frames.folder, bytes)), at + line.len() as u64);
            let mut known = known();
            known.retain(|_, (frame, _)| frame.strong_count() > 0);
            key.map(|key| known.insert(key, (Arc::downgrade(&frame), end)));
            Ok((frame, end))
        })
        .await
    }
}

fn read_line(file: &File, at: u64, end: u64) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while at + (line.len() as u64) < end {
        let piece = read_piece(file, at + line.len() as u64, end)?;
        match piece.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                line.extend_from_slice(&piece[..=end]);
                return Ok(line);
            }
            None => line.extend_from_slice(&piece),
        }
    }
    Ok(line)
}
