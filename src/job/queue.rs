//! Places for runs and turns: so many runs at once, so much of each app at once, and so many that wait.
//!
//! A place that becomes free goes to the app that has the fewest, of several the one that was served longest ago, and among
//! its own to whoever came first. So an app with a hundred waiting runs does not keep another's single run waiting behind all of
//! them; and where no more may wait, the last of those of the app with the most has to go.
//!
//! What is to wait and was promised a place can't be turned away, and an app can have half of all that wait of such. What waits
//! only for its own app's limit stands in nobody's way and does not count among those who may wait: of that each app
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
    /// Of each app: what will join and is promised a place.
    reserved: HashMap<String, usize>,
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
    request: PermitRequest,
    told: oneshot::Sender<Result<Permit, Refused>>,
    /// Was promised a place, so is not turned away.
    firm: bool,
}

/// Whether one that waits may be turned away for somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Evictable,
    /// It may not. Of those an app can have half of all that wait.
    Guaranteed,
    /// It may not, and finds room: it was promised before.
    Readmitted,
}

/// What a place is wanted for.
#[derive(Clone, Debug)]
pub struct PermitRequest {
    /// The app.
    pub app: String,
    /// Runs and turns that the app may have at once; `None` for as many as there are places.
    pub most: Option<usize>,
    /// Whether it is for a run. Turns are bounded only by their app's limit.
    pub run: bool,
}

/// A place, held until it is dropped.
#[derive(Debug)]
pub struct Permit {
    queue: Queue,
    app: String,
    run: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        if let Some(in_use) = state.apps.get_mut(&self.app) {
            *(if self.run { &mut in_use.runs } else { &mut in_use.turns }) -= 1;
        }
        state.free += usize::from(self.run);
        let answers = state.serve(&self.queue);
        drop(state);
        answers.tell();
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
        let state = State {
            free: places,
            most_waiting,
            apps: HashMap::new(),
            waiting: Vec::new(),
            reserved: HashMap::new(),
            count: 0,
            closed: false,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    pub async fn enter(&self, request: PermitRequest) -> Result<Permit, Refused> {
        self.join(request, Admission::Evictable)?.permit().await
    }

    /// Joins those who wait, if there is room. Waiting ends when the ticket is dropped.
    pub fn join(&self, request: PermitRequest, admission: Admission) -> Result<PendingPermit, Refused> {
        let (told, answer) = oneshot::channel();
        let mut state = self.state();
        if state.closed {
            return Err(Refused::Closed);
        }
        // Whoever is refused here makes nobody else's room.
        let too_much = match admission {
            Admission::Evictable => state.held_up_with(&request) > state.share(),
            Admission::Guaranteed => state.promised(&request.app) >= state.share().max(1),
            Admission::Readmitted => false,
        };
        if too_much {
            return Err(Refused::Full);
        }
        state.count += 1;
        let id = state.count;
        state.waiting.push(Waiter { id, request, told, firm: admission == Admission::Readmitted });
        let answers = state.serve(self);
        // It found room. From here on, in the same breath, nobody takes it away.
        if admission == Admission::Guaranteed {
            state.waiting.iter_mut().filter(|waiter| waiter.id == id).for_each(|waiter| waiter.firm = true);
        }
        drop(state);
        answers.tell();
        let mut pending = PendingPermit { answer, early: None, _leaves: Leaves { queue: self.clone(), id } };
        if let Ok(answered) = pending.answer.try_recv() {
            pending.early = Some(answered?);
        }
        Ok(pending)
    }

    /// Promises a place to what can't join yet, if the app has room for that. Given back when the reservation is dropped, which is
    /// when it has joined as [`Admission::Readmitted`].
    pub fn reserve(&self, app: &str) -> Result<Reservation, Refused> {
        let mut state = self.state();
        if state.promised(app) >= state.share().max(1) {
            return Err(Refused::Full);
        }
        *state.reserved.entry(app.to_owned()).or_default() += 1;
        Ok(Reservation { queue: self.clone(), app: app.to_owned() })
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

/// What those who waited are told, once the lock is free: whoever left meanwhile gives the place back, which needs it.
#[must_use]
struct Answers(Vec<(oneshot::Sender<Granted>, Granted)>);

type Granted = Result<Permit, Refused>;

impl Answers {
    fn tell(self) {
        for (told, answer) in self.0 {
            let _ = told.send(answer);
        }
    }
}

impl State {
    /// Gives out what is free, and turns away who is too many.
    fn serve(&mut self, queue: &Queue) -> Answers {
        let mut answers = Vec::new();
        while let Some(at) = self.next() {
            let Waiter { request: PermitRequest { app, run, .. }, told, .. } = self.waiting.remove(at);
            self.free -= usize::from(run);
            self.count += 1;
            let served = self.count;
            let in_use = self.apps.entry(app.clone()).or_default();
            in_use.served = served;
            *(if run { &mut in_use.runs } else { &mut in_use.turns }) += 1;
            answers.push((told, Ok(Permit { queue: queue.clone(), app, run })));
        }
        while self.crowd().values().sum::<usize>() > self.most_waiting {
            let Some(at) = self.one_too_many() else { break };
            answers.push((self.waiting.remove(at).told, Err(Refused::Full)));
        }
        let Self { apps, waiting, .. } = self;
        apps.retain(|app, in_use| in_use.runs + in_use.turns > 0 || waiting.iter().any(|waiter| waiter.request.app == *app));
        Answers(answers)
    }

    /// What an app may have of all that wait: half.
    fn share(&self) -> usize {
        self.most_waiting.div_ceil(2)
    }

    /// Who is to have the next place, if there is one for somebody.
    fn next(&self) -> Option<usize> {
        let nothing = InUse::default();
        let in_use = |request: &PermitRequest| self.apps.get(&request.app).unwrap_or(&nothing);
        let can_have = |request: &PermitRequest| {
            let InUse { runs, turns, .. } = in_use(request);
            (!request.run || self.free > 0) && request.most.is_none_or(|most| runs + turns < most)
        };
        let served = self.waiting.iter().enumerate().filter(|(_, waiter)| can_have(&waiter.request));
        let turn_of = |waiter: &Waiter| (in_use(&waiter.request).runs, in_use(&waiter.request).served, waiter.id);
        served.min_by_key(|(_, waiter)| turn_of(waiter)).map(|(at, _)| at)
    }

    /// How many of an app wait for a place that was promised, or will.
    fn promised(&self, app: &str) -> usize {
        let reserved = self.reserved.get(app).copied().unwrap_or_default();
        reserved + self.waiting.iter().filter(|waiter| waiter.firm && waiter.request.app == app).count()
    }

    /// What the app may still have at once, beside what it has.
    fn allowance(&self, request: &PermitRequest) -> usize {
        let in_use = self.apps.get(&request.app).map_or(0, |in_use| in_use.runs + in_use.turns);
        request.most.map_or(usize::MAX, |most| most.saturating_sub(in_use))
    }

    /// How many of an app would wait only for its own limit, with this one.
    fn held_up_with(&self, request: &PermitRequest) -> usize {
        let waiting = self.waiting.iter().filter(|waiter| waiter.request.app == request.app).count();
        (waiting + 1).saturating_sub(self.allowance(request))
    }

    /// How many of each app wait for a place, and not only for its own limit.
    fn crowd(&self) -> HashMap<&str, usize> {
        let mut crowd: HashMap<&str, usize> = HashMap::new();
        for Waiter { request, .. } in &self.waiting {
            let count = crowd.entry(&request.app).or_default();
            *count = (*count + 1).min(self.allowance(request));
        }
        crowd
    }

    /// The last of those of the app with the most that wait.
    fn one_too_many(&self) -> Option<usize> {
        let crowd = self.crowd();
        let can_go = self.waiting.iter().enumerate().filter(|(_, waiter)| !waiter.firm);
        let (at, waiter) = can_go.max_by_key(|(_, waiter)| (crowd[waiter.request.app.as_str()], waiter.id))?;
        let alone = self.waiting.iter().filter(|other| other.request.app == waiter.request.app).count() == 1;
        (self.most_waiting == 0 || !alone || self.waiting.iter().all(|other| !other.firm)).then_some(at)
    }
}

/// One that waits, or has its place.
#[derive(Debug)]
pub struct PendingPermit {
    answer: oneshot::Receiver<Result<Permit, Refused>>,
    early: Option<Permit>,
    _leaves: Leaves,
}

impl PendingPermit {
    /// Waits for the place.
    pub async fn permit(self) -> Result<Permit, Refused> {
        match self.early {
            Some(place) => Ok(place),
            None => self.answer.await.unwrap_or(Err(Refused::Closed)),
        }
    }
}

/// A place that is promised to what can't join the queue yet.
#[derive(Debug)]
pub struct Reservation {
    queue: Queue,
    app: String,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        let left = state.reserved.get_mut(&self.app).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            state.reserved.remove(&self.app);
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

    fn run(app: &str) -> PermitRequest {
        PermitRequest { app: app.to_owned(), most: None, run: true }
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
        let limited = |app: &str| PermitRequest { app: app.to_owned(), most: Some(1), run: true };
        let mut promised = Vec::new();
        let (a, b) = (queue.enter(limited("a")).await.unwrap(), queue.enter(limited("b")).await.unwrap());
        for app in ["a", "b"] {
            for _ in 0..2 {
                promised.push(queue.join(limited(app), Admission::Guaranteed).unwrap());
            }
            assert_eq!(queue.join(limited(app), Admission::Guaranteed).unwrap_err(), Refused::Full, "half of the room for an app");
            promised.push(queue.join(limited(app), Admission::Readmitted).unwrap());
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
        let promised = [queue.join(run("a"), Admission::Guaranteed).unwrap(), queue.join(run("b"), Admission::Guaranteed).unwrap()];
        let (mut waits, mut too_many) = (pin!(queue.enter(run("c"))), pin!(queue.enter(run("c"))));
        assert!(is_pending(waits.as_mut()).await);
        assert!(!is_pending(too_many.as_mut()).await);
        drop((place, promised));
        waits.await.unwrap();
    }

    #[tokio::test]
    async fn what_will_join_counts_among_what_is_promised() {
        let queue = Queue::new(1, 4);
        let _place = queue.enter(run("a")).await.unwrap();
        let reserved = [queue.reserve("a").unwrap(), queue.reserve("a").unwrap()];
        assert_eq!(queue.reserve("a").unwrap_err(), Refused::Full);
        assert_eq!(queue.join(run("a"), Admission::Guaranteed).unwrap_err(), Refused::Full);
        let _other = queue.reserve("b").unwrap();
        let joined = queue.join(run("a"), Admission::Readmitted).unwrap();
        drop(reserved);
        let _second = queue.reserve("a").unwrap();
        assert_eq!(queue.reserve("a").unwrap_err(), Refused::Full);
        drop(joined);
    }

    #[test]
    fn what_was_promised_a_place_is_never_turned_away() {
        let queue = Queue::new(1, 2);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _place = runtime.block_on(queue.enter(run("a"))).unwrap();
        // Others come and go all the time, and make room for themselves.
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for app in ["b", "c", "d"] {
                let (queue, stop) = (&queue, &stop);
                scope.spawn(move || {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        drop(queue.join(run(app), Admission::Evictable));
                    }
                });
            }
            let evicted = (0..200_000).find(|_| {
                let Ok(mut promised) = queue.join(run("a"), Admission::Guaranteed) else { return false };
                promised.answer.try_recv().is_ok()
            });
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(evicted, None);
        });
    }

    #[tokio::test]
    async fn an_app_has_at_most_what_it_may_of_runs_and_turns() {
        let queue = Queue::new(4, 4);
        let limited = |run: bool| PermitRequest { app: "a".to_owned(), most: Some(2), run };
        let (run, turn) = (queue.enter(limited(true)).await.unwrap(), queue.enter(limited(false)).await.unwrap());
        let mut third = pin!(queue.enter(limited(true)));
        assert!(is_pending(third.as_mut()).await);
        queue.enter(super::tests::run("b")).await.unwrap();
        drop(turn);
        drop((third.await.unwrap(), run));
    }
}
