//! What a worker says of a job: lines, in order and without loss, for as long as it takes. All that came meanwhile goes in one message.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use hyper::body::Bytes;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::hub::Hub;
use super::wire::{AT, Line, MOST};

/// How long it is waited for a message to be kept.
const KEPT: Duration = Duration::from_secs(5);
/// How long before one that was not is sent again.
const AGAIN: Duration = Duration::from_millis(200);

/// Lines on their way.
#[derive(Debug, Default)]
pub(super) struct Lines {
    said: Mutex<Said>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Said {
    bytes: Vec<u8>,
    ended: bool,
}

impl Lines {
    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says a line.
    pub(super) fn say(&self, line: &Line) {
        let mut said = self.said();
        serde_json::to_writer(&mut said.bytes, line).expect("a line is JSON");
        said.bytes.push(b'\n');
        drop(said);
        self.more.notify_one();
    }

    /// Says that there are no more.
    pub(super) fn end(&self) {
        self.said().ended = true;
        self.more.notify_one();
    }

    /// Sends them, until there are no more and all are kept.
    pub(super) async fn send(&self, hub: &Hub, subject: &str) {
        let mut at = 0;
        loop {
            let said = std::mem::take(&mut self.said().bytes);
            if said.is_empty() {
                if self.said().ended {
                    return;
                }
                self.more.notified().await;
                continue;
            }
            let said = Bytes::from(said);
            for from in (0..said.len()).step_by(MOST) {
                let part = said.slice(from..said.len().min(from + MOST));
                send(hub, subject, at, &part).await;
                at += part.len();
            }
        }
    }
}

/// Sends a message until it is kept. A second one of the same place is known by that.
async fn send(hub: &Hub, subject: &str, at: usize, part: &Bytes) {
    let mut is_late = false;
    loop {
        let mut headers = HeaderMap::new();
        headers.insert(AT, at.to_string());
        let sent = async { hub.jetstream.publish_with_headers(subject.to_owned(), headers, part.clone()).await?.await };
        let why = match timeout(KEPT, sent).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if !std::mem::replace(&mut is_late, true) {
            tracing::warn!(subject, why, "what is said of a job is not kept by NATS yet; sending it until it is");
        }
        sleep(AGAIN).await;
    }
}
