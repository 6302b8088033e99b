//! Feeds: what a job says while it goes on, and its end, for any number of readers, then and later.
//!
//! A feed is a file ([`super::feed_format`]). A reader ([`super::feed_reader`]) follows it at its own pace, so that nothing is held
//! for a slow one, and one that comes back goes on behind the event that it saw last.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::feed_format::{self, End, Record, VERSION};
use super::feed_reader::{FeedReader, LargeFrames};
use super::live::{Live, Told};
use crate::agent::contract::Event;
use crate::blocking::{aside, blocking};
use crate::executor::Retold;
use crate::ledger::JobId;

/// How long a feed is kept after its last event, which is also how long an idempotency key is known.
pub const KEPT: Duration = Duration::from_hours(24);
/// How old a feed without a row must be before it counts as left over: its row may be about to be written.
const SETTLED_AFTER: Duration = Duration::from_mins(1);

/// The feeds of a server. Clones share them.
#[derive(Clone, Debug)]
pub struct Feeds(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    live: Mutex<HashMap<String, Live>>,
    large: LargeFrames,
}

/// A feed that is being written. Dropped, it is found by name no more as that of a job that goes on.
#[derive(Debug)]
pub struct Feed {
    name: String,
    feeds: Feeds,
    file: Mutex<File>,
    live: Live,
}

impl Feeds {
    /// The feeds in this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self(Arc::new(Shared { large: LargeFrames::new(folder.clone()), folder, live: Mutex::default() }))
    }

    fn live_ones(&self) -> MutexGuard<'_, HashMap<String, Live>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &JobId) -> PathBuf {
        self.0.folder.join(id.to_string())
    }

    /// Begins the feed of a job, or goes on with it.
    pub async fn begin(&self, id: &JobId, live: Live) -> io::Result<Feed> {
        let path = self.path(id);
        let (file, told) = blocking(move || {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
            let whole = feed_format::whole(&mut file)?;
            file.set_len(whole.bytes)?;
            let mut told = Told { bytes: whole.bytes, events: whole.events, ..Told::default() };
            if !whole.is_current {
                file.write_all(VERSION)?;
                told.bytes += VERSION.len() as u64;
            }
            Ok((file, told))
        })
        .await?;
        live.told.send_replace(told);
        let name = id.to_string();
        self.live_ones().insert(name.clone(), live.clone());
        Ok(Feed { name, feeds: self.clone(), file: Mutex::new(file), live })
    }

    /// The job of that name, while it waits or goes on.
    pub fn live(&self, id: &JobId) -> Option<Live> {
        self.live_ones().get(&id.to_string()).cloned()
    }

    /// What there is to read behind the event `after`. `None` where the feed is not kept any more, or there is no such event.
    pub async fn read(&self, id: &JobId, after: u64) -> io::Result<Option<FeedReader>> {
        let (path, live, name, large) = (self.path(id), self.live(id), id.to_string(), self.0.large.clone());
        blocking(move || {
            let mut file = match File::open(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                opened => opened?,
            };
            let Some(at) = feed_format::end_of_event(&mut file, after)? else { return Ok(None) };
            let told = if let Some(live) = &live {
                live.told.subscribe()
            } else {
                let bytes = feed_format::whole(&mut file)?.bytes;
                watch::Sender::new(Told { bytes, ended: true, ..Told::default() }).subscribe()
            };
            Ok(Some(FeedReader::new(name, file, at, told, live, large)))
        })
        .await
    }

    /// Ends the feed of a job that a crash cut short, unless it has its end.
    pub async fn end(&self, id: &JobId, end: End) -> io::Result<()> {
        if self.ended(id).await?.is_none() {
            self.begin(id, Live::new(CancellationToken::new())).await?.end(Arc::new(end));
        }
        Ok(())
    }

    /// What a job has said so far, of its first `most` bytes. `None` where the feed is not kept any more.
    pub async fn so_far(&self, id: &JobId, most: u64) -> io::Result<Option<Vec<Record>>> {
        let path = self.path(id);
        blocking(move || match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            opened => feed_format::records(opened?, most).map(Some),
        })
        .await
    }

    /// What stands there already of a job that another machine carries out, which is told all of it again.
    pub async fn retold(&self, id: &JobId) -> io::Result<Retold> {
        let mut retold = Retold::default();
        for record in self.so_far(id, u64::MAX).await?.unwrap_or_default() {
            match record {
                Record::Event(_, Event::PermissionResolved { permission_id, .. }) => drop(retold.resolved.insert(permission_id)),
                Record::Event(..) => retold.events += 1,
                Record::End(..) | Record::Sent(_) => {}
            }
        }
        Ok(retold)
    }

    /// The end of a job that is over, as far as its feed is kept.
    pub async fn ended(&self, id: &JobId) -> io::Result<Option<End>> {
        self.look(id, feed_format::end).await
    }

    /// Whether there is more to come of a feed, or its end is kept.
    pub async fn has_end(&self, id: &JobId) -> io::Result<bool> {
        Ok(self.live(id).is_some() || self.look(id, feed_format::begin_of_end).await?.is_some())
    }

    async fn look<T: Send + 'static>(&self, id: &JobId, at: fn(&mut File) -> io::Result<Option<T>>) -> io::Result<Option<T>> {
        let path = self.path(id);
        blocking(move || match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            opened => at(&mut opened?),
        })
        .await
    }

    /// Has the feed of a job that is over kept for as long as if its last event was now.
    pub async fn keep(&self, id: &JobId) -> io::Result<()> {
        let path = self.path(id);
        blocking(move || File::open(path)?.set_modified(SystemTime::now())).await
    }

    /// Removes the feed of a job that did not come about.
    pub async fn forget(&self, id: &JobId) {
        let path = self.path(id);
        if let Err(error) = blocking(move || std::fs::remove_file(path)).await {
            tracing::warn!(%id, %error, "a feed is left until it is swept");
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

    /// The names of jobs that are over, or were never begun, and whose feeds are old enough to have a row if ever they get one.
    pub async fn settled(&self) -> io::Result<Vec<String>> {
        self.older_than(SETTLED_AFTER).await
    }

    /// Removes feeds. Gives how many.
    pub async fn remove(&self, names: Vec<String>) -> io::Result<usize> {
        let folder = self.0.folder.clone();
        blocking(move || names.iter().try_for_each(|name| std::fs::remove_file(folder.join(name))).map(|()| names.len())).await
    }

    /// The feeds of that age since their last event, those of jobs that go on left out.
    async fn older_than(&self, most: Duration) -> io::Result<Vec<String>> {
        let feeds = self.clone();
        blocking(move || {
            let mut older = Vec::new();
            for entry in feeds.0.folder.read_dir()? {
                let entry = entry?;
                let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
                let name = entry.file_name().to_string_lossy().into_owned();
                if age > most && !feeds.live_ones().contains_key(&name) {
                    older.push(name);
                }
            }
            Ok(older)
        })
        .await
    }
}

impl Feed {
    /// Tells an event.
    pub fn tell(&self, event: &Event) {
        self.write(|id| feed_format::event_line(id, event), false);
    }

    /// Tells the end: nothing comes behind it.
    pub fn end(&self, end: Arc<End>) {
        // First for those who wait for it alone: a reader that hears of the end may need it too.
        self.live.end(end.clone());
        self.write(|id| feed_format::end_line(id, &end), true);
    }

    fn write(&self, line: impl FnOnce(u64) -> Vec<u8>, ends: bool) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *self.live.told.borrow();
        let id = before.events + 1;
        let line = line(id);
        // Mostly a few bytes for the page cache. A line that was not written whole is cut off when the file is opened again.
        let write = || if before.broken { Err(ErrorKind::StorageFull.into()) } else { file.write_all(&line) };
        let told = match aside(line.len(), write) {
            Ok(()) => Told { bytes: before.bytes + line.len() as u64, events: id, ..before },
            Err(error) => {
                if !before.broken {
                    tracing::error!(name = self.name, %error, "what a job says can't be kept for readers");
                    let _ = file.set_len(before.bytes);
                }
                Told { broken: true, ..before }
            }
        };
        self.live.told.send_replace(Told { ended: ends, ..told });
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.feeds.live_ones().remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::agent::contract::{Ending, Outcome};
    use crate::job::feed_format::Record;
    use crate::job::feed_reader::{Dialect, Item};
    use crate::job::rejection::Rejection;
    use futures_util::StreamExt;

    fn id() -> JobId {
        JobId::Run("a".to_owned())
    }

    fn live() -> Live {
        Live::new(CancellationToken::new())
    }

    fn event(content: &str) -> Event {
        Event::Text { content: content.to_owned() }
    }

    fn end() -> Arc<End> {
        Arc::new(End::Rejected(Rejection::Spent))
    }

    /// Events by their text, the end by its reason.
    fn dialect() -> Dialect {
        let render = |item| {
            match item {
                Item::Record(Record::Event(id, Event::Text { content })) => format!("{id} {content}\n"),
                Item::Record(Record::Event(id, _)) => format!("{id}\n"),
                Item::Record(Record::End(id, End::Rejected(why))) => format!("{id} {why:?}\n"),
                Item::Record(Record::End(id, End::Settled { outcome, .. })) => format!("{id} {}\n", outcome.text),
                Item::Record(Record::End(..)) => "sent\n".to_owned(),
                Item::Record(Record::Sent(line)) => String::from_utf8(line).unwrap(),
                Item::Gap => "gap\n".to_owned(),
                Item::End(end) => format!("{end:?}\n"),
                Item::Beat => "beat\n".to_owned(),
            }
            .into_bytes()
        };
        Dialect { name: Some("test"), render: Arc::new(render) }
    }

    async fn text(feeds: &Feeds, after: u64) -> String {
        let pieces: Vec<_> = feeds.read(&id(), after).await.unwrap().unwrap().bytes(dialect()).map(Result::unwrap).collect().await;
        String::from_utf8(pieces.concat()).unwrap()
    }

    fn feeds() -> (tempfile::TempDir, Feeds) {
        let folder = tempfile::tempdir().unwrap();
        let feeds = Feeds::new(folder.path().to_owned());
        (folder, feeds)
    }

    #[tokio::test]
    async fn what_a_crash_cut_short_is_gone_on_with() {
        let (folder, feeds) = feeds();
        let feed = feeds.begin(&id(), live()).await.unwrap();
        feed.tell(&event("one"));
        drop(feed);
        let mut file = OpenOptions::new().append(true).open(folder.path().join("a")).unwrap();
        file.write_all(b"{\"id\":2,\"event\":{\"name\":\"text\",\"data\":{\"content\":\"cut").unwrap();
        assert_eq!(text(&feeds, 0).await, "1 one\n");
        assert!(feeds.ended(&id()).await.unwrap().is_none());

        feeds.begin(&id(), live()).await.unwrap().end(end());
        assert_eq!(text(&feeds, 1).await, "2 Spent\n");
        assert!(feeds.read(&id(), 3).await.unwrap().is_none());
        assert!(matches!(feeds.ended(&id()).await.unwrap(), Some(End::Rejected(Rejection::Spent))));
    }

    #[tokio::test]
    async fn what_an_earlier_release_wrote_is_read_and_gone_on_with() {
        let (folder, feeds) = feeds();
        let begun = "id: 1\nevent: result\ndata: {\"no\":\"answer\"}\n\n";
        std::fs::write(folder.path().join("a"), begun).unwrap();
        assert!(feeds.ended(&id()).await.unwrap().is_none());
        feeds.begin(&id(), live()).await.unwrap().end(end());
        assert_eq!(text(&feeds, 0).await, format!("{begun}2 Spent\n"));
        assert_eq!(text(&feeds, 1).await, "2 Spent\n");

        let answer = "id: 2\nevent: error\n: 503 problem\ndata: {\ndata: \"a\": 1}\n\n";
        std::fs::write(folder.path().join("a"), format!("{begun}{answer}")).unwrap();
        assert_eq!(text(&feeds, 1).await, answer);
        let Some(End::Sent { status: 503, problem: true, body }) = feeds.ended(&id()).await.unwrap() else { panic!("no answer") };
        assert_eq!(body, b"{\n\"a\": 1}");
    }

    #[tokio::test]
    async fn readers_hear_a_beat_and_then_what_comes() {
        let (_folder, feeds) = feeds();
        let feed = feeds.begin(&id(), live()).await.unwrap();
        let mut bytes = Box::pin(feeds.read(&id(), 0).await.unwrap().unwrap().bytes(dialect()));
        tokio::time::pause();
        assert_eq!(bytes.next().await.unwrap().unwrap(), "beat\n");
        tokio::time::resume();
        feed.end(end());
        drop(feed);
        assert_eq!(bytes.next().await.unwrap().unwrap(), "1 Spent\n");
        assert!(bytes.next().await.is_none());
    }

    #[tokio::test]
    async fn a_job_that_is_over_without_an_end_keeps_no_reader() {
        let (_folder, feeds) = feeds();
        let live = live();
        let (feed, going_on) = (feeds.begin(&id(), live.clone()).await.unwrap(), live.going_on());
        let reader = feeds.read(&id(), 0).await.unwrap().unwrap();
        drop((feed, going_on));
        assert_eq!(reader.bytes(dialect()).count().await, 0);
        assert!(live.answer().await.is_none());
    }

    #[tokio::test]
    async fn a_full_disk_is_a_gap_and_the_end_comes_all_the_same() {
        let (folder, feeds) = feeds();
        let live = live();
        let feed = feeds.begin(&id(), live.clone()).await.unwrap();
        feed.tell(&event("kept"));
        let reader = feeds.read(&id(), 0).await.unwrap().unwrap();
        // Takes nothing, as a full disk does.
        *feed.file.lock().unwrap() = File::open(folder.path().join("a")).unwrap();
        feed.tell(&event("lost"));
        feed.end(end());
        drop(feed);
        let told: Vec<_> = reader.bytes(dialect()).map(Result::unwrap).collect().await;
        assert_eq!(String::from_utf8(told.concat()).unwrap(), "1 kept\ngap\nRejected(Spent)\n");
        assert!(matches!(*live.answer().await.unwrap(), End::Rejected(Rejection::Spent)));
    }

    #[tokio::test]
    async fn a_large_line_is_whole_also_where_the_disk_takes_no_more_files() {
        let (folder, feeds) = feeds();
        let large = "x".repeat(1 << 20);
        feeds.begin(&id(), live()).await.unwrap().tell(&event(&large));
        let reader = feeds.read(&id(), 0).await.unwrap().unwrap();
        folder.close().unwrap();
        let pieces: Vec<_> = reader.bytes(dialect()).map(Result::unwrap).collect().await;
        assert!(pieces.iter().all(|piece| piece.len() <= 16 << 10));
        assert_eq!(String::from_utf8(pieces.concat()).unwrap(), format!("1 {large}\n"));
    }

    #[tokio::test]
    async fn a_large_line_is_whole_and_leaves_no_file() {
        let (folder, feeds) = feeds();
        let feed = feeds.begin(&id(), live()).await.unwrap();
        let large = "x".repeat(3 << 20);
        feed.tell(&event(&large));
        feed.tell(&event("small"));
        let outcome = Box::new(Outcome { text: large.clone(), ..Outcome::of(Ending::Completed("end_turn".to_owned())) });
        feed.end(Arc::new(End::Settled { outcome, turn_index: 0 }));
        drop(feed);
        let expected = format!("1 {large}\n2 small\n3 {large}\n");
        let (one, other) = tokio::join!(text(&feeds, 0), text(&feeds, 0));
        assert!(one == expected && other == expected);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let mut begin = [0; 11];
        File::open(folder.path().join("a")).unwrap().read_exact(&mut begin).unwrap();
        assert_eq!(begin, VERSION);
    }
}
