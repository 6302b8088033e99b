//! Places for runs and turns: so many runs at once, so much of each app at once, and so many that wait.
//!
//! A place that becomes free goes to the app that has the fewest, of several the one that was served longest ago, and among
//! its own to whoever came first. So an app with a hundred waiting runs does not keep another's single run waiting behind all of
//! them; and where no more may wait, the last of those of the app with the most has to go.
//!
//! What waits only for its own app's limit stands in nobody's way and does not count among those who may wait: of that each app
//! may have half as many for itself. Nor can work that was promised a place keep another app from waiting: whatever was promised,
//! each app may have one that waits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The queue. Clones share it. Waiting ends when the future of [`Queue::enter`] is dropped.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    free: usize,
    most_waiting: usize,
    /// The apps that have something, or wait.
    apps: HashMap<String, InUse>,
    /// In the order that they came.
    waiting: Vec<Waiter>,
    /// Of those who came and of places that were given out.
    count: u64,
    closed: bool,
}

#[derive(Debug, Default)]
struct InUse {
    runs: usize,
    turns: usize,
    /// Grows with each place that is given out.
    served: u64,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    wanted: Wanted,
    told: oneshot::Sender<Result<Place, Refused>>,
    /// Was promised a place, so is not turned away.
    firm: bool,
}

/// Whether one that waits may be turned away for somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// It may.
    None,
    /// It may not. Of those an app can have half of all that wait.
    New,
    /// It may not, and finds room: it was promised before.
    Old,
}

/// What a place is wanted for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The app.
    pub app: String,
    /// Runs and turns that the app may have at once; `None` for as many as there are places.
    pub most: Option<usize>,
    /// Whether it is for a run. Turns are bounded only by their app's limit.
    pub run: bool,
}

/// A place, held until it is dropped.
#[derive(Debug)]
pub struct Place {
    queue: Queue,
    app: String,
    run: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        if let Some(in_use) = state.apps.get_mut(&self.app) {
            *(if self.run { &mut in_use.runs } else { &mut in_use.turns }) -= 1;
        }
        state.free += usize::from(self.run);
        self.queue.serve(state);
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// All places are taken, and as many wait as may.
    Full,
    /// The server is stopping.
    Closed,
}

impl Queue {
    /// A queue with places for `places` runs at once and for `most_waiting` runs and turns that wait.
    pub fn new(places: usize, most_waiting: usize) -> Self {
        let state = State { free: places, most_waiting, apps: HashMap::new(), waiting: Vec::new(), count: 0, closed: false };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    pub async fn enter(&self, wanted: Wanted) -> Result<Place, Refused> {
        self.join(wanted, Promise::None)?.place().await
    }

    /// Joins those who wait, if there is room. Waiting ends when the ticket is dropped.
    pub fn join(&self, wanted: Wanted, promise: Promise) -> Result<Ticket, Refused> {
        let (told, answer) = oneshot::channel();
        let mut state = self.state();
        if state.closed {
            return Err(Refused::Closed);
        }
        // Before it is looked for room, so that nobody makes room in vain.
        let share = state.most_waiting.div_ceil(2);
        let too_much = match promise {
            Promise::None => state.held_up_with(&wanted) > share,
            Promise::New => state.promised(&wanted.app) >= share.max(1),
            Promise::Old => false,
        };
        if too_much {
            return Err(Refused::Full);
        }
        state.count += 1;
        let id = state.count;
        state.waiting.push(Waiter { id, wanted, told, firm: promise == Promise::Old });
        self.serve(state);
        if promise == Promise::New {
            self.state().waiting.iter_mut().filter(|waiter| waiter.id == id).for_each(|waiter| waiter.firm = true);
        }
        let mut ticket = Ticket { answer, early: None, _leaves: Leaves { queue: self.clone(), id } };
        if let Ok(answered) = ticket.answer.try_recv() {
            ticket.early = Some(answered?);
        }
        Ok(ticket)
    }

    /// Gives out what is free, and turns away who is too many.
    fn serve(&self, mut state: MutexGuard<'_, State>) {
        let mut answers = Vec::new();
        while let Some(at) = state.next() {
            let Waiter { wanted: Wanted { app, run, .. }, told, .. } = state.waiting.remove(at);
            state.free -= usize::from(run);
            state.count += 1;
            let served = state.count;
            let in_use = state.apps.entry(app.clone()).or_default();
            in_use.served = served;
            *(if run { &mut in_use.runs } else { &mut in_use.turns }) += 1;
            answers.push((told, Ok(Place { queue: self.clone(), app, run })));
        }
        while state.crowd().values().sum::<usize>() > state.most_waiting {
            let Some(at) = state.one_too_many() else { break };
            answers.push((state.waiting.remove(at).told, Err(Refused::Full)));
        }
        let State { apps, waiting, .. } = &mut *state;
        apps.retain(|app, in_use| in_use.runs + in_use.turns > 0 || waiting.iter().any(|waiter| waiter.wanted.app == *app));
        // Whoever left meanwhile gives the place back, which needs the lock.
        drop(state);
        for (told, answer) in answers {
            let _ = told.send(answer);
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Whether there is a place that nobody can have now.
    pub fn has_free(&self) -> bool {
        self.state().free > 0
    }

    /// Refuses whoever waits, and whoever comes.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        // They are told by their ends of the channels.
        state.waiting.clear();
    }
}

impl State {
    /// Who is to have the next place, if there is one for somebody.
    fn next(&self) -> Option<usize> {
        let nothing = InUse::default();
        let in_use = |wanted: &Wanted| self.apps.get(&wanted.app).unwrap_or(&nothing);
        let can_have = |wanted: &Wanted| {
            let InUse { runs, turns, .. } = in_use(wanted);
            (!wanted.run || self.free > 0) && wanted.most.is_none_or(|most| runs + turns < most)
        };
        let served = self.waiting.iter().enumerate().filter(|(_, waiter)| can_have(&waiter.wanted));
        let turn_of = |waiter: &Waiter| (in_use(&waiter.wanted).runs, in_use(&waiter.wanted).served, waiter.id);
        served.min_by_key(|(_, waiter)| turn_of(waiter)).map(|(at, _)| at)
    }

    /// How many of an app wait for a place that was promised.
    fn promised(&self, app: &str) -> usize {
        self.waiting.iter().filter(|waiter| waiter.firm && waiter.wanted.app == app).count()
    }

    /// What the app may still have at once, beside what it has.
    fn allowance(&self, wanted: &Wanted) -> usize {
        let in_use = self.apps.get(&wanted.app).map_or(0, |in_use| in_use.runs + in_use.turns);
        wanted.most.map_or(usize::MAX, |most| most.saturating_sub(in_use))
    }

    /// How many of an app would wait only for its own limit, with this one.
    fn held_up_with(&self, wanted: &Wanted) -> usize {
        let waiting = self.waiting.iter().filter(|waiter| waiter.wanted.app == wanted.app).count();
        (waiting + 1).saturating_sub(self.allowance(wanted))
    }

    /// How many of each app wait for a place, and not only for its own limit.
    fn crowd(&self) -> HashMap<&str, usize> {
        let mut crowd: HashMap<&str, usize> = HashMap::new();
        for Waiter { wanted, .. } in &self.waiting {
            let count = crowd.entry(&wanted.app).or_default();
            *count = (*count + 1).min(self.allowance(wanted));
        }
        crowd
    }

    /// The last of those of the app with the most that wait.
    fn one_too_many(&self) -> Option<usize> {
        let crowd = self.crowd();
        let can_go = self.waiting.iter().enumerate().filter(|(_, waiter)| !waiter.firm);
        let (at, waiter) = can_go.max_by_key(|(_, waiter)| (crowd[waiter.wanted.app.as_str()], waiter.id))?;
        let alone = self.waiting.iter().filter(|other| other.wanted.app == waiter.wanted.app).count() == 1;
        (self.most_waiting == 0 || !alone || self.waiting.iter().all(|other| !other.firm)).then_some(at)
    }
}

/// One that waits, or has its place.
#[derive(Debug)]
pub struct Ticket {
    answer: oneshot::Receiver<Result<Place, Refused>>,
    early: Option<Place>,
    _leaves: Leaves,
}

impl Ticket {
    /// Waits for the place.
    pub async fn place(self) -> Result<Place, Refused> {
        match self.early {
            Some(place) => Ok(place),
            None => self.answer.await.unwrap_or(Err(Refused::Closed)),
        }
    }
}

/// Takes one that does not wait any more out of the queue.
#[derive(Debug)]
struct Leaves {
    queue: Queue,
    id: u64,
}

impl Drop for Leaves {
    fn drop(&mut self) {
        self.queue.state().waiting.retain(|waiter| waiter.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::{Pin, pin};
    use std::task::Poll;

    async fn is_pending(mut future: Pin<&mut impl Future>) -> bool {
        std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await
    }

    fn run(app: &str) -> Wanted {
        Wanted { app: app.to_owned(), most: None, run: true }
    }

    #[tokio::test]
    async fn places_go_round_in_order_and_the_rest_is_refused() {
        let queue = Queue::new(1, 2);
        let first = queue.enter(run("a")).await.unwrap();
        let (mut second, mut third) = (pin!(queue.enter(run("a"))), pin!(queue.enter(run("a"))));
        assert!(is_pending(second.as_mut()).await);
        assert!(is_pending(third.as_mut()).await);
        assert_eq!(queue.enter(run("a")).await.unwrap_err(), Refused::Full);
        drop(first);
        assert!(is_pending(third.as_mut()).await, "the second comes before the third");
        drop(second.await.unwrap());
        drop(third.await.unwrap());
    }

    #[tokio::test]
    async fn one_that_leaves_makes_room_and_closing_refuses_all() {
        let queue = Queue::new(1, 1);
        let _place = queue.enter(run("a")).await.unwrap();
        {
            let mut leaves = pin!(queue.enter(run("a")));
            assert!(is_pending(leaves.as_mut()).await);
        }
        let mut waits = pin!(queue.enter(run("a")));
        assert!(is_pending(waits.as_mut()).await);
        queue.close();
        assert_eq!(waits.await.unwrap_err(), Refused::Closed);
        assert_eq!(queue.enter(run("a")).await.unwrap_err(), Refused::Closed);
    }

    #[tokio::test]
    async fn one_that_leaves_as_its_place_comes_gives_it_back() {
        let queue = Queue::new(1, 2);
        let place = queue.enter(run("a")).await.unwrap();
        let mut leaves = Box::pin(queue.enter(run("a")));
        assert!(is_pending(leaves.as_mut()).await);
        drop(place);
        drop(leaves);
        queue.enter(run("a")).await.unwrap();
    }

    #[tokio::test]
    async fn a_busy_app_does_not_keep_another_waiting() {
        let queue = Queue::new(2, 4);
        let (first, second) = (queue.enter(run("busy")).await.unwrap(), queue.enter(run("busy")).await.unwrap());
        let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(queue.enter(run("busy")))).collect();
        for waits in &mut waiting {
            assert!(is_pending(waits.as_mut()).await);
        }
        // The queue is full, and room is made.
        let mut single = pin!(queue.enter(run("single")));
        assert!(is_pending(single.as_mut()).await);
        assert_eq!(waiting.pop().unwrap().await.unwrap_err(), Refused::Full);
        drop(first);
        let single = single.await.unwrap();
        assert!(is_pending(waiting[0].as_mut()).await, "the one with fewer places comes first");
        drop((single, second));
        drop((waiting.remove(0).await.unwrap(), waiting.remove(0).await.unwrap()));
    }

    #[tokio::test]
    async fn promised_work_that_waits_for_its_apps_own_limit_takes_nobodys_room() {
        let queue = Queue::new(3, 4);
        let limited = |app: &str| Wanted { app: app.to_owned(), most: Some(1), run: true };
        let mut promised = Vec::new();
        let (a, b) = (queue.enter(limited("a")).await.unwrap(), queue.enter(limited("b")).await.unwrap());
        for app in ["a", "b"] {
            for _ in 0..2 {
                promised.push(queue.join(limited(app), Promise::New).unwrap());
            }
            assert_eq!(queue.join(limited(app), Promise::New).unwrap_err(), Refused::Full, "half of the room for an app");
            promised.push(queue.join(limited(app), Promise::Old).unwrap());
        }
        let other = queue.enter(run("c")).await.unwrap();
        let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(queue.enter(run("c")))).collect();
        for waits in &mut waiting {
            assert!(is_pending(waits.as_mut()).await, "all of the room is there");
        }
        assert_eq!(queue.enter(run("c")).await.unwrap_err(), Refused::Full);
        assert_eq!(queue.enter(limited("a")).await.unwrap_err(), Refused::Full);
        drop((other, a, b));
    }

    #[tokio::test]
    async fn whatever_was_promised_each_app_may_have_one_that_waits() {
        let queue = Queue::new(1, 2);
        let place = queue.enter(run("a")).await.unwrap();
        let promised = [queue.join(run("a"), Promise::New).unwrap(), queue.join(run("b"), Promise::New).unwrap()];
        let (mut waits, mut too_many) = (pin!(queue.enter(run("c"))), pin!(queue.enter(run("c"))));
        assert!(is_pending(waits.as_mut()).await);
        assert!(!is_pending(too_many.as_mut()).await);
        drop((place, promised));
        waits.await.unwrap();
    }

    #[tokio::test]
    async fn an_app_has_at_most_what_it_may_of_runs_and_turns() {
        let queue = Queue::new(4, 4);
        let limited = |run: bool| Wanted { app: "a".to_owned(), most: Some(2), run };
        let (run, turn) = (queue.enter(limited(true)).await.unwrap(), queue.enter(limited(false)).await.unwrap());
        let mut third = pin!(queue.enter(limited(true)));
        assert!(is_pending(third.as_mut()).await);
        queue.enter(super::tests::run("b")).await.unwrap();
        drop(turn);
        drop((third.await.unwrap(), run));
    }
}
