//! A job that waits or goes on, as others see it.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::feed_format::End;
use crate::agent::questions::Questions;

/// A job that waits or goes on. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Live {
    pub(super) told: watch::Sender<Told>,
    end: watch::Sender<Option<Arc<End>>>,
    /// Comes when nobody wants it any more.
    pub(super) cancel: CancellationToken,
    /// What its agent asks before it acts.
    pub(super) questions: Questions,
    over: CancellationToken,
}

/// How much of a job's feed there is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    pub(super) bytes: u64,
    pub(super) events: u64,
    pub(super) ended: bool,
    /// The disk did not take everything.
    pub(super) broken: bool,
}

impl Live {
    pub(super) fn new(cancel: CancellationToken) -> Self {
        Self {
            told: watch::Sender::default(),
            end: watch::Sender::default(),
            cancel,
            questions: Questions::default(),
            over: CancellationToken::new(),
        }
    }

    pub(super) fn end(&self, end: Arc<End>) {
        self.end.send_replace(Some(end));
    }

    /// Its end, if there is one already.
    pub fn ended(&self) -> Option<Arc<End>> {
        self.end.borrow().clone()
    }

    /// Waits for its end. `None` where it is over without one: it died of a defect, or starts again after the server has.
    pub async fn answer(&self) -> Option<Arc<End>> {
        let mut end = self.end.subscribe();
        tokio::select! {
            biased;
            ended = end.wait_for(Option::is_some) => ended.ok()?.clone(),
            () = self.over.cancelled() => self.ended(),
        }
    }

    /// Waits for the first event, or for the end. Gives the end where that came first.
    pub async fn begun(&self) -> Option<Arc<End>> {
        let mut told = self.told.subscribe();
        tokio::select! {
            biased;
            _ = told.wait_for(|told| told.events > 0 || told.ended) => {}
            () = self.over.cancelled() => {}
        }
        let has_begun = self.told.borrow().events > u64::from(self.told.borrow().ended);
        self.ended().filter(|_| !has_begun)
    }

    /// What its agent asks before it acts.
    pub fn questions(&self) -> &Questions {
        &self.questions
    }

    /// Cancels it. When this returns it is over, with its processes and its row.
    pub async fn cancel(&self) {
        self.cancel.cancel();
        self.over().await;
    }

    pub(super) async fn over(&self) {
        self.over.cancelled().await;
    }

    /// Dropped, it says that the job is over.
    pub(super) fn going_on(&self) -> DropGuard {
        self.over.clone().drop_guard()
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        self.told.same_channel(&other.told)
    }
}
