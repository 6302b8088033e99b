//! Lanes: the turns of one session go one at a time, in the order that they came. A lane is there as long as somebody is in it.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::live::Live;
use futures_util::future::poll_immediate;
use tokio::sync::{OwnedMutexGuard, watch};

/// Turns of one session that wait or go on, at most.
const MOST: usize = 64;

/// The lanes of a server. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Lanes(Arc<Mutex<HashMap<String, Arc<Lane>>>>);

#[derive(Debug, Default)]
struct Lane {
    turn: Arc<tokio::sync::Mutex<()>>,
    numbering: Arc<tokio::sync::Mutex<()>>,
    /// Those who are in it.
    busy: AtomicUsize,
    turns: Mutex<Vec<Live>>,
    closing: watch::Sender<bool>,
    /// Whether the row of the turn that is over can't be written yet.
    stuck: watch::Sender<bool>,
}

impl Lane {
    fn turns(&self) -> MutexGuard<'_, Vec<Live>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a lane, waiting or going on. The last one takes the lane away.
#[derive(Debug)]
pub struct InLane {
    lanes: Lanes,
    session_id: String,
    lane: Arc<Lane>,
    turn: Option<Live>,
}

/// The right to go on, while it is held.
pub type Turn = OwnedMutexGuard<()>;
/// Comes when it is one's turn.
pub type ComingTurn = Pin<Box<dyn Future<Output = Turn> + Send>>;

impl Drop for InLane {
    fn drop(&mut self) {
        // Under the lock under which lanes are entered.
        let mut lanes = self.lanes.get();
        if let Some(turn) = &self.turn {
            self.lane.turns().retain(|other| !other.is(turn));
        }
        if self.lane.busy.fetch_sub(1, Ordering::Relaxed) == 1 {
            lanes.remove(&self.session_id);
        }
    }
}

/// While it is held, the lane's next turn would wait for the ledger.
#[derive(Debug)]
pub struct Stuck(Arc<Lane>);

impl Drop for Stuck {
    fn drop(&mut self) {
        self.0.stuck.send_replace(false);
    }
}

impl Lanes {
    fn get(&self) -> MutexGuard<'_, HashMap<String, Arc<Lane>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter_in(&self, lanes: &mut HashMap<String, Arc<Lane>>, session_id: &str, turn: Option<Live>) -> InLane {
        let lane = lanes.entry(session_id.to_owned()).or_default().clone();
        lane.busy.fetch_add(1, Ordering::Relaxed);
        lane.turns().extend(turn.clone());
        InLane { lanes: self.clone(), session_id: session_id.to_owned(), lane, turn }
    }

    /// Enters a session's lane for something else than a turn.
    pub fn enter(&self, session_id: &str) -> InLane {
        self.enter_in(&mut self.get(), session_id, None)
    }

    /// Enters a lane that nobody is in, and is the first in it. `None` where there is somebody.
    pub fn enter_idle(&self, session_id: &str) -> Option<(InLane, Turn)> {
        let mut lanes = self.get();
        if lanes.contains_key(session_id) {
            return None;
        }
        let place = self.enter_in(&mut lanes, session_id, None);
        // Before the lanes are let go: a turn that came between would be waited for.
        let turn = place.lane.turn.clone().try_lock_owned().ok()?;
        Some((place, turn))
    }

    /// Enters for a turn, behind those who are there. `None` where they are too many.
    pub async fn enter_turn(&self, session_id: &str, live: Live) -> Option<(InLane, ComingTurn)> {
        let place = self.enter_in(&mut self.get(), session_id, Some(live));
        if place.lane.busy.load(Ordering::Relaxed) > MOST {
            return None;
        }
        let mut turn: ComingTurn = Box::pin(place.lane.turn.clone().lock_owned());
        // Asked for here, so that the order is that of the requests and not that of the tasks.
        if let Some(held) = poll_immediate(&mut turn).await {
            turn = Box::pin(std::future::ready(held));
        }
        Some((place, turn))
    }

    /// The turns of a session that wait or go on.
    pub fn turns(&self, session_id: &str) -> Vec<Live> {
        self.get().get(session_id).map(|lane| lane.turns().clone()).unwrap_or_default()
    }
}

impl InLane {
    /// The session whose lane it is.
    pub fn session_id(&self) -> &str {
        &self.session_id
    }

    /// Waits until nobody else takes a turn.
    pub async fn turn(&self) -> Turn {
        self.lane.turn.clone().lock_owned().await
    }

    /// While it is held, nobody else gives a turn of the session a number.
    pub async fn numbering(&self) -> OwnedMutexGuard<()> {
        self.lane.numbering.clone().lock_owned().await
    }

    /// Cancels the turn that goes on, and refuses those that wait or come.
    pub fn close(&self) {
        // First, so that those who wait know why.
        self.lane.closing.send_replace(true);
        self.lane.turns().iter().for_each(|turn| turn.cancel.cancel());
    }

    /// Says that the session was not closed after all.
    pub fn reopen(&self) {
        self.lane.closing.send_replace(false);
    }

    /// Comes when the session is being closed.
    pub async fn closing(&self) {
        // The sender is here.
        let _ = self.lane.closing.subscribe().wait_for(|closing| *closing).await;
    }

    /// Says, while it is held, that the row of the turn that has just ended can't be written yet.
    pub fn stuck_while_held(&self) -> Stuck {
        self.lane.stuck.send_replace(true);
        Stuck(self.lane.clone())
    }

    /// Comes when who waits here would wait for the ledger.
    pub async fn stuck(&self) {
        // The sender is here.
        let _ = self.lane.stuck.subscribe().wait_for(|stuck| *stuck).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::sync::CancellationToken;

    fn live() -> Live {
        Live::new(CancellationToken::new())
    }

    #[tokio::test]
    async fn turns_come_in_the_order_that_they_entered_and_the_lane_goes_with_the_last() {
        let lanes = Lanes::default();
        let (first, second) = (lanes.enter_turn("s", live()).await.unwrap(), lanes.enter_turn("s", live()).await.unwrap());
        assert!(lanes.enter_idle("s").is_none());
        assert_eq!(lanes.turns("s").len(), 2);
        let mut coming = second.1;
        let turn = first.1.await;
        assert!(poll_immediate(&mut coming).await.is_none());
        drop((turn, first.0));
        coming.await;
        drop(second.0);
        assert!(lanes.get().is_empty());
    }

    #[tokio::test]
    async fn who_enters_an_idle_lane_waits_for_no_turn_that_comes_after() {
        let lanes = Lanes::default();
        let (idle, turn) = lanes.enter_idle("s").unwrap();
        let (place, mut coming) = lanes.enter_turn("s", live()).await.unwrap();
        assert!(poll_immediate(&mut coming).await.is_none(), "the sweeper would wait for a turn that slipped in");
        drop((idle, turn));
        coming.await;
        drop(place);
    }

    #[tokio::test]
    async fn a_close_cancels_turns_and_those_who_come_know_of_it() {
        let lanes = Lanes::default();
        let going_on = live();
        let (place, _coming) = lanes.enter_turn("s", going_on.clone()).await.unwrap();
        lanes.enter("s").close();
        assert!(going_on.cancel.is_cancelled());
        place.closing().await;
        let (late, _coming) = lanes.enter_turn("s", live()).await.unwrap();
        late.closing().await;
    }
}
