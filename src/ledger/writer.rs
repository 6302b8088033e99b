//! The one thread that writes.
//!
//! A commit waits for the disk. So all that wait to be written are taken together into one transaction, each in a savepoint of its
//! own: one that fails does not fail the others, and each is answered when all are on disk.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, TransactionBehavior, ffi};
use tokio::sync::oneshot;

use super::error::Error;
use super::used::{self, Used};

/// How long a write waits for another program's lock.
pub(super) const BUSY: Duration = Duration::from_secs(2);
/// How long one try for the lock takes. Who comes meanwhile is taken along at the next.
const TRY: Duration = Duration::from_millis(20);
/// Writes in one transaction, at most.
const MOST: usize = 256;

/// Hands writes to the thread. Dropped, it waits until the thread has closed the database.
pub(super) struct Writer {
    waiting: Option<Sender<Box<dyn Write>>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(connection: Connection, used: Used) -> Self {
        let (sender, waiting) = channel();
        let thread = std::thread::spawn(move || write_all(connection, &waiting, &used));
        Self { waiting: Some(sender), thread: Some(thread) }
    }

    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (told, answer) = oneshot::channel();
        let write = Box::new(Waiting { since: Instant::now(), work, done: None, told });
        self.waiting.as_ref().and_then(|waiting| waiting.send(write).ok()).expect("the thread ends with the ledger");
        answer.await.expect("ledger calls don't panic")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.waiting.take();
        self.thread.take().map(JoinHandle::join);
    }
}

/// A write of whatever gives whatever.
trait Write: Send {
    fn since(&self) -> Instant;
    /// Whether it went well.
    fn run(&mut self, db: &Connection) -> bool;
    /// Tells what came of it, if it was written; why it was not, otherwise.
    fn tell(self: Box<Self>, failed: Option<Error>);
}

struct Waiting<T, F> {
    since: Instant,
    work: F,
    done: Option<rusqlite::Result<T>>,
    told: oneshot::Sender<Result<T, Error>>,
}

impl<T: Send, F: Fn(&Connection) -> rusqlite::Result<T> + Send> Write for Waiting<T, F> {
    fn since(&self) -> Instant {
        self.since
    }

    fn run(&mut self, db: &Connection) -> bool {
        self.done.insert((self.work)(db)).is_ok()
    }

    fn tell(self: Box<Self>, failed: Option<Error>) {
        let done = match (self.done, failed) {
            (Some(Err(error)), _) => Err(error.into()),
            (_, Some(error)) => Err(error),
            (Some(Ok(value)), None) => Ok(value),
            (None, None) => return,
        };
        let _ = self.told.send(done);
    }
}

fn write_all(mut db: Connection, waiting: &Receiver<Box<dyn Write>>, used: &Used) {
    let _ = db.busy_timeout(TRY);
    while let Ok(first) = waiting.recv() {
        let mut batch = vec![first];
        let mut shut_out: Option<Instant> = None;
        // Each for itself, because all together could not be written.
        let mut alone = false;
        while !batch.is_empty() {
            if !alone {
                batch.extend(waiting.try_iter().take(MOST.saturating_sub(batch.len())));
            }
            let count = if alone { 1 } else { batch.len() };
            match commit(&mut db, &mut batch[..count], used) {
                Ok(()) => batch.drain(..count).for_each(|write| write.tell(None)),
                Err(Error::Locked) => {
                    let since = *shut_out.get_or_insert_with(Instant::now);
                    // Each waits for the lock as long as every other, and behind other writes as long as they take.
                    let late = |write: &mut Box<dyn Write>| write.since().max(since).elapsed() >= BUSY;
                    batch.extract_if(.., late).for_each(|write| write.tell(Some(Error::Locked)));
                }
                Err(error) if count == 1 => batch.remove(0).tell(Some(error)),
                Err(_) => alone = true,
            }
        }
    }
}

/// Runs these in one transaction. It is immediate, so that a lock is met at its start and not in its middle.
fn commit(db: &mut Connection, batch: &mut [Box<dyn Write>], used: &Used) -> Result<(), Error> {
    let mut transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let notes = used.take();
    let write = || {
        used::write(&transaction, &notes)?;
        for write in batch {
            let savepoint = transaction.savepoint()?;
            if write.run(&savepoint) {
                savepoint.commit()?;
                continue;
            }
            drop(savepoint);
            // A full disk may have undone the whole of it.
            if transaction.is_autocommit() {
                return Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_ABORT), None));
            }
        }
        transaction.commit()
    };
    let done = write();
    if done.is_err() {
        used.give_back(notes);
    }
    Ok(done?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;
    use crate::ledger::db::connect;

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&folder.path().join("ledger.db")).unwrap();
        (folder, ledger)
    }

    async fn count(ledger: &Ledger) -> i64 {
        ledger.read(|db| db.query_row("SELECT count(*) FROM files", [], |row| row.get(0))).await.unwrap()
    }

    #[tokio::test]
    async fn one_that_fails_does_not_fail_those_beside_it() {
        let (folder, ledger) = ledger();
        // While another program holds the lock, they gather.
        let mut other = connect(&folder.path().join("ledger.db")).unwrap();
        let lock = other.transaction_with_behavior(TransactionBehavior::Immediate).unwrap();
        let add = |name: &'static str| ledger.write(move |db| db.execute("INSERT INTO files VALUES (?1, '', '', 0, 0, 0)", [name]));
        let wrong = ledger.write(|db| {
            db.execute("INSERT INTO files VALUES ('undone', '', '', 0, 0, 0)", [])?;
            db.execute("INSERT INTO nowhere VALUES (1)", [])
        });
        let release = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            lock.rollback().unwrap();
        };
        let (a, wrong, twice, b, ()) = tokio::join!(add("a"), wrong, add("a"), add("b"), release);
        assert!(matches!((a, b), (Ok(1), Ok(1))));
        assert!(matches!((wrong, twice), (Err(Error::Sqlite(_)), Err(Error::Sqlite(_)))));
        assert_eq!(count(&ledger).await, 2);
    }

    #[tokio::test]
    async fn a_lock_is_waited_for_as_long_by_who_comes_later() {
        let (folder, ledger) = ledger();
        let mut other = connect(&folder.path().join("ledger.db")).unwrap();
        let _lock = other.transaction_with_behavior(TransactionBehavior::Immediate).unwrap();
        let timed = async |after: u64| {
            tokio::time::sleep(Duration::from_millis(after)).await;
            let begun = Instant::now();
            let failed = ledger.write(|db| db.execute("DELETE FROM files", [])).await;
            assert!(matches!(failed, Err(Error::Locked)));
            begun.elapsed()
        };
        let (first, later) = tokio::join!(timed(0), timed(1000));
        for waited in [first, later] {
            assert!(waited >= BUSY && waited < BUSY + Duration::from_secs(1), "{waited:?}");
        }
    }

    #[tokio::test]
    async fn what_is_too_large_for_the_disk_fails_alone() {
        let (_folder, ledger) = ledger();
        let limit = |db: &Connection| {
            let pages: i64 = db.query_row("PRAGMA page_count", [], |row| row.get(0))?;
            db.query_row(&format!("PRAGMA max_page_count = {}", pages + 20), [], |_| Ok(()))
        };
        ledger.write(limit).await.unwrap();
        let add = |name: &'static str, bytes: i64| {
            ledger.write(move |db| {
                db.execute("INSERT INTO files VALUES (?1, '', hex(zeroblob(?2)), 0, 0, 0)", rusqlite::params![name, bytes])
            })
        };
        let (small, large, other) = tokio::join!(add("small", 10), add("large", 1 << 20), add("other", 10));
        assert!(matches!((small, other), (Ok(1), Ok(1))));
        assert!(matches!(large, Err(Error::Full(_))));
        assert_eq!(count(&ledger).await, 2);
    }

    #[tokio::test]
    async fn a_write_that_fails_loses_nothing_of_when_tokens_were_used() {
        let (_folder, ledger) = ledger();
        ledger.touch_token("app");
        ledger.write(|db| db.execute("INSERT INTO nowhere VALUES (1)", [])).await.unwrap_err();
        ledger.flush_used().await.unwrap();
        assert!(ledger.used.is_empty());
    }
}
