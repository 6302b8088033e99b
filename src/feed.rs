//! Feeds: what a run or a turn says while it goes on, and its answer, for any number of readers, then and later.
//!
//! A feed is a file of server-sent events, as they go over the wire. A reader follows the file at its own pace, so that the
//! server holds a piece of it for each and no more, and one that comes back goes on behind the event that it saw last.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::body::Bytes;
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::agent::folder::blocking;

/// How long a feed is kept after its last event, which is also how long an idempotency key is known.
pub const KEPT: Duration = Duration::from_hours(24);
/// How old a feed without a row must be before it counts as left over: its row may be about to be written.
const SETTLED_AFTER: Duration = Duration::from_mins(1);
/// Bytes that are read for a reader at once.
const PIECE: u64 = 16 << 10;
/// How often a reader hears something, so that no proxy takes its connection for dead.
const BEAT: Duration = Duration::from_secs(15);

/// The feeds of a server. Clones share them.
#[derive(Clone, Debug)]
pub struct Feeds(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    live: Mutex<HashMap<String, Live>>,
}

/// Work that waits or goes on.
#[derive(Clone, Debug)]
pub struct Live {
    told: watch::Receiver<Told>,
    answer: watch::Receiver<Option<Final>>,
    cancel: CancellationToken,
    over: CancellationToken,
}

/// How much of a feed there is.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    bytes: u64,
    events: u64,
    ended: bool,
    /// The disk did not take everything.
    broken: bool,
}

/// What the caller gets in the end.
#[derive(Clone, Debug)]
pub struct Final {
    /// The HTTP status.
    pub status: u16,
    /// Whether the body is a problem as RFC 9457 has it.
    pub problem: bool,
    /// JSON.
    pub body: Bytes,
}

/// A feed that is being written. Dropped, its work is over.
#[derive(Debug)]
pub struct Feed {
    id: String,
    feeds: Feeds,
    file: Mutex<File>,
    told: watch::Sender<Told>,
    answer: watch::Sender<Option<Final>>,
    over: CancellationToken,
}

impl Feeds {
    /// The feeds in this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self(Arc::new(Shared { folder, live: Mutex::default() }))
    }

    fn live_ones(&self) -> MutexGuard<'_, HashMap<String, Live>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.0.folder.join(id)
    }

    /// Begins the feed of work that `cancel` cancels, or goes on with it.
    pub async fn begin(&self, id: &str, cancel: CancellationToken) -> io::Result<Feed> {
        let path = self.path(id);
        let (file, told) = blocking(move || {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
            let told = whole_events(&mut file)?;
            file.set_len(told.bytes)?;
            Ok((file, told))
        })
        .await?;
        let (told, answer, over) = (watch::Sender::new(told), watch::Sender::new(None), CancellationToken::new());
        let live = Live { told: told.subscribe(), answer: answer.subscribe(), cancel, over: over.clone() };
        self.live_ones().insert(id.to_owned(), live);
        Ok(Feed { id: id.to_owned(), feeds: self.clone(), file: Mutex::new(file), told, answer, over })
    }

    /// The work of that id, while it waits or goes on.
    pub fn live(&self, id: &str) -> Option<Live> {
        self.live_ones().get(id).cloned()
    }

    /// Cancels the work of that id, if it waits or goes on. When this returns it is over, with its processes.
    pub async fn cancel(&self, id: &str) {
        if let Some(live) = self.live(id) {
            live.cancel.cancel();
            live.over.cancelled().await;
        }
    }

    /// What there is to read behind the event `after`. `None` where the feed is not kept any more, or there is no such event.
    pub async fn read(&self, id: &str, after: u64) -> io::Result<Option<Reader>> {
        let (path, live) = (self.path(id), self.live(id));
        blocking(move || {
            let mut file = match File::open(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                opened => opened?,
            };
            let Some(at) = end_of_event(&mut file, after)? else { return Ok(None) };
            let (told, answer) = match live {
                Some(live) => (live.told, Some(live.answer)),
                None => (watch::Sender::new(Told { ended: true, ..whole_events(&mut file)? }).subscribe(), None),
            };
            Ok(Some(Reader { file: Arc::new(file), at, told, answer }))
        })
        .await
    }

    /// Ends the feed of work that a crash cut short, unless it has its end.
    pub async fn end(&self, id: &str, answer: &Final) -> io::Result<()> {
        if self.answer(id).await?.is_none() {
            self.begin(id, CancellationToken::new()).await?.end(answer);
        }
        Ok(())
    }

    /// The answer of work that is over, as far as its feed is kept.
    pub async fn answer(&self, id: &str) -> io::Result<Option<Final>> {
        let path = self.path(id);
        blocking(move || match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            opened => last_answer(BufReader::new(opened?)),
        })
        .await
    }

    /// Removes the feed of work that did not come about.
    pub async fn forget(&self, id: &str) {
        let path = self.path(id);
        if let Err(error) = blocking(move || std::fs::remove_file(path)).await {
            tracing::warn!(id, %error, "a feed is left until it is swept");
        }
    }

    /// Removes the feeds of all turns of a session.
    pub async fn forget_session(&self, session_id: &str) -> io::Result<()> {
        let (folder, turns) = (self.0.folder.clone(), format!("{session_id}-"));
        blocking(move || {
            for entry in folder.read_dir()? {
                let entry = entry?;
                if entry.file_name().as_encoded_bytes().starts_with(turns.as_bytes()) {
                    std::fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Removes what is older than it is kept.
    pub async fn sweep(&self) -> io::Result<usize> {
        self.remove(self.older_than(KEPT).await?).await
    }

    /// Feeds of work that is over, or was never begun, and that are old enough to have a row if ever they get one.
    pub async fn settled(&self) -> io::Result<Vec<String>> {
        self.older_than(SETTLED_AFTER).await
    }

    /// Removes feeds. Gives how many.
    pub async fn remove(&self, ids: Vec<String>) -> io::Result<usize> {
        let folder = self.0.folder.clone();
        blocking(move || ids.iter().try_for_each(|id| std::fs::remove_file(folder.join(id))).map(|()| ids.len())).await
    }

    /// The feeds of that age since their last event, those of work that goes on left out.
    async fn older_than(&self, most: Duration) -> io::Result<Vec<String>> {
        let feeds = self.clone();
        blocking(move || {
            let mut older = Vec::new();
            for entry in feeds.0.folder.read_dir()? {
                let entry = entry?;
                let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
                let id = entry.file_name().to_string_lossy().into_owned();
                if age > most && feeds.live(&id).is_none() {
                    older.push(id);
                }
            }
            Ok(older)
        })
        .await
    }
}

impl Live {
    /// Waits for the answer. `None` where the work ends without one.
    pub async fn answer(mut self) -> Option<Final> {
        self.answer.wait_for(Option::is_some).await.ok()?.clone()
    }
}

impl Feed {
    /// Tells an event.
    pub fn tell(&self, event: &str, data: &impl Serialize) {
        let data = serde_json::to_vec(data).expect("events are JSON");
        self.write(|id| event_frame(&format!("id: {id}\n"), event, "", &data), false);
    }

    /// Tells the answer: nothing comes behind it.
    pub fn end(&self, answer: &Final) {
        // First for those who wait for it alone: a reader that hears of the end may need it too.
        self.answer.send_replace(Some(answer.clone()));
        self.write(|id| frame(&format!("id: {id}\n"), answer), true);
    }

    fn write(&self, frame: impl FnOnce(u64) -> Vec<u8>, ends: bool) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *self.told.borrow();
        let id = before.events + 1;
        let frame = frame(id);
        // A few bytes for the page cache. One that was not written whole is cut off when the file is opened again.
        let written = if before.broken { Err(ErrorKind::StorageFull.into()) } else { file.write_all(&frame) };
        let told = match written {
            Ok(()) => Told { bytes: before.bytes + frame.len() as u64, events: id, ..before },
            Err(error) => {
                if !before.broken {
                    tracing::error!(id = self.id, %error, "what it says can't be kept for readers");
                    let _ = file.set_len(before.bytes);
                }
                Told { broken: true, ..before }
            }
        };
        self.told.send_replace(Told { ended: ends, ..told });
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.feeds.live_ones().remove(&self.id);
        self.over.cancel();
    }
}

/// Follows a feed.
#[derive(Debug)]
pub struct Reader {
    file: Arc<File>,
    at: u64,
    told: watch::Receiver<Told>,
    /// Of work that goes on.
    answer: Option<watch::Receiver<Option<Final>>>,
}

impl Reader {
    /// The bytes of the events, to the end of the feed. Where something was not kept, that is said.
    pub fn bytes(self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        stream::unfold(Some(self), async |reader| {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(reader))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let told = *self.told.borrow_and_update();
            if self.at < told.bytes {
                let (file, at, length) = (self.file.clone(), self.at, PIECE.min(told.bytes - self.at));
                let mut piece = vec![0; usize::try_from(length).unwrap_or_default()];
                let piece = blocking(move || file.read_exact_at(&mut piece, at).map(|()| piece)).await?;
                self.at += length;
                return Ok(Some(piece.into()));
            }
            if told.broken && told.ended {
                // Not reached again: the end is at hand.
                self.told = watch::Sender::new(Told { broken: false, ..told }).subscribe();
                let answer = self.answer.as_ref().and_then(|answer| answer.borrow().clone());
                return Ok(Some([GAP, &answer.map(|answer| frame("", &answer)).unwrap_or_default()].concat().into()));
            }
            if told.ended {
                return Ok(None);
            }
            match timeout(BEAT, self.told.changed()).await {
                Err(_) => return Ok(Some(Bytes::from_static(b":\n\n"))),
                Ok(Ok(())) => {}
                // It ended without an answer, which is a defect.
                Ok(Err(_)) => return Ok(None),
            }
        }
    }
}

/// An answer as the last event, with its status in a comment.
pub fn frame(id: &str, answer: &Final) -> Vec<u8> {
    let status = format!(": {}{}\n", answer.status, if answer.problem { " problem" } else { "" });
    event_frame(id, if answer.status == 200 { "result" } else { "error" }, &status, &answer.body)
}

fn event_frame(id: &str, event: &str, comment: &str, data: &[u8]) -> Vec<u8> {
    let mut frame = format!("{id}event: {event}\n{comment}").into_bytes();
    // Any line end would end the field.
    for line in data.split(|byte| matches!(byte, b'\n' | b'\r')) {
        frame.extend_from_slice(&[b"data: ", line, b"\n"].concat());
    }
    frame.push(b'\n');
    frame
}

/// What is said where events are missing.
pub const GAP: &[u8] = b"event: gap\ndata: {\"detail\":\"Events that came here are not kept any more; ask for the result.\"}\n\n";

/// How much of a feed's file is whole events.
fn whole_events(file: &mut File) -> io::Result<Told> {
    let mut told = Told::default();
    each_event(file, |id, end| {
        told = Told { bytes: end, events: id, ..told };
        true
    })?;
    Ok(told)
}

/// Where the event `id` ends; `0` is before the first.
fn end_of_event(file: &mut File, id: u64) -> io::Result<Option<u64>> {
    let mut found = (id == 0).then_some(0);
    if found.is_none() {
        each_event(file, |seen, end| {
            found = (seen == id).then_some(end);
            found.is_none()
        })?;
    }
    Ok(found)
}

/// Calls `seen` with the id and the end of each whole event, until it says false.
fn each_event(file: &mut File, mut seen: impl FnMut(u64, u64) -> bool) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut lines = BufReader::with_capacity(1 << 16, file);
    let (mut at, mut id) = (0, 0);
    loop {
        // The beginning of the line is enough: a line may be long.
        let mut begin = Vec::new();
        let length = lines.by_ref().take(32).read_until(b'\n', &mut begin)?;
        let ends = begin.ends_with(b"\n");
        let rest = if ends || length < 32 { 0 } else { lines.skip_until(b'\n')? };
        if length == 0 || (!ends && rest == 0) {
            return Ok(());
        }
        at += (length + rest) as u64;
        if let Some(number) = begin.strip_prefix(b"id: ") {
            id = String::from_utf8_lossy(number).trim().parse().unwrap_or(id);
        }
        if begin == b"\n" && !seen(id, at) {
            return Ok(());
        }
    }
}

fn last_answer(mut lines: impl BufRead) -> io::Result<Option<Final>> {
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let ends = matches!(line.as_slice(), b"event: result\n" | b"event: error\n");
        line.clear();
        // Events of the same name have no status.
        if !ends || lines.read_until(b'\n', &mut line)? == 0 || !line.starts_with(b": ") {
            continue;
        }
        let status = String::from_utf8_lossy(&line).into_owned();
        let mut body = Vec::new();
        loop {
            line.clear();
            lines.read_until(b'\n', &mut line)?;
            match line.strip_prefix(b"data: ") {
                Some(data) => body.extend_from_slice(data),
                None => break,
            }
        }
        body.pop();
        let code = status.trim_start_matches(": ").split_whitespace().next().and_then(|code| code.parse().ok());
        // Cut short by a crash where it has no end.
        let whole = line == b"\n";
        return Ok(code.filter(|_| whole).map(|code| Final { status: code, problem: status.contains("problem"), body: body.into() }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use serde_json::json;

    async fn text(feeds: &Feeds, id: &str, after: u64) -> String {
        let pieces: Vec<_> = feeds.read(id, after).await.unwrap().unwrap().bytes().map(Result::unwrap).collect().await;
        String::from_utf8(pieces.concat()).unwrap()
    }

    fn answer(body: &'static str) -> Final {
        Final { status: 503, problem: true, body: Bytes::from_static(body.as_bytes()) }
    }

    #[tokio::test]
    async fn what_a_crash_cut_short_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let feeds = Feeds::new(folder.path().to_owned());
        let feed = feeds.begin("a", CancellationToken::new()).await.unwrap();
        feed.tell("text", &json!({"content": "one"}));
        drop(feed);
        let mut file = OpenOptions::new().append(true).open(folder.path().join("a")).unwrap();
        file.write_all(b"id: 2\nevent: text\ndata: {\"content\": \"cut").unwrap();
        assert_eq!(text(&feeds, "a", 0).await, "id: 1\nevent: text\ndata: {\"content\":\"one\"}\n\n");
        assert!(feeds.answer("a").await.unwrap().is_none());

        let feed = feeds.begin("a", CancellationToken::new()).await.unwrap();
        feed.end(&answer("{\n\"a\": 1}"));
        drop(feed);
        let last = "id: 2\nevent: error\n: 503 problem\ndata: {\ndata: \"a\": 1}\n\n";
        assert_eq!(text(&feeds, "a", 1).await, last);
        assert!(feeds.read("a", 3).await.unwrap().is_none());
        let kept = feeds.answer("a").await.unwrap().unwrap();
        assert_eq!((kept.status, kept.problem, kept.body), (503, true, Bytes::from_static(b"{\n\"a\": 1}")));
    }

    #[tokio::test]
    async fn readers_hear_a_beat_and_then_what_comes() {
        let folder = tempfile::tempdir().unwrap();
        let feeds = Feeds::new(folder.path().to_owned());
        let feed = feeds.begin("a", CancellationToken::new()).await.unwrap();
        let mut bytes = Box::pin(feeds.read("a", 0).await.unwrap().unwrap().bytes());
        tokio::time::pause();
        assert_eq!(bytes.next().await.unwrap().unwrap(), Bytes::from_static(b":\n\n"));
        tokio::time::resume();
        feed.end(&answer("{}"));
        drop(feed);
        assert!(bytes.next().await.unwrap().unwrap().starts_with(b"id: 1\nevent: error\n"));
        assert!(bytes.next().await.is_none());
    }

    #[tokio::test]
    async fn a_full_disk_is_a_gap_and_the_answer_comes_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let feeds = Feeds::new(folder.path().to_owned());
        let feed = feeds.begin("a", CancellationToken::new()).await.unwrap();
        feed.tell("text", &json!({"content": "kept"}));
        let (reader, live) = (feeds.read("a", 0).await.unwrap().unwrap(), feeds.live("a").unwrap());
        // Takes nothing, as a full disk does.
        *feed.file.lock().unwrap() = File::open(folder.path().join("a")).unwrap();
        feed.tell("text", &json!({"content": "lost"}));
        feed.end(&answer("{}"));
        drop(feed);
        let told: Vec<_> = reader.bytes().map(Result::unwrap).collect().await;
        let expected = "id: 1\nevent: text\ndata: {\"content\":\"kept\"}\n\nevent: gap\n";
        let told = String::from_utf8(told.concat()).unwrap();
        assert!(told.starts_with(expected) && told.ends_with("event: error\n: 503 problem\ndata: {}\n\n"), "{told}");
        assert_eq!(live.answer().await.unwrap().status, 503);
    }
}
