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

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The queue. Clones share it.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Of runs, all.
    places: usize,
    /// Of them, those that are taken: more than all where some went away meanwhile.
    taken: usize,
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

/// The places of all apps.
#[derive(Clone, Debug)]
pub struct Places {
    /// Of runs, those that are taken.
    pub taken: usize,
    /// Of runs, all.
    pub all: usize,
    /// The apps that have something, or wait, by name.
    pub apps: Vec<AppPlaces>,
}

/// What an app has.
#[derive(Clone, Debug)]
pub struct AppPlaces {
    /// Its name.
    pub app: String,
    /// Runs that go on.
    pub runs: usize,
    /// Turns that go on.
    pub turns: usize,
    /// Runs and turns that wait.
    pub waiting: usize,
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
        state.taken -= usize::from(self.run);
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
            places,
            taken: 0,
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

    /// Joins those who wait, if there is room. Waiting ends when what this gives is dropped.
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

    /// Whether there is a place that nobody wants, and one more that stays free; or all are free, where there is but one.
    pub fn has_idle(&self) -> bool {
        self.state().has_idle()
    }

    /// Such a place, unless the app has as much at once as it may.
    pub fn take_idle(&self, request: PermitRequest) -> Option<Permit> {
        let mut state = self.state();
        if state.closed || !state.has_idle() || state.allowance(&request) == 0 {
            return None;
        }
        state.taken += 1;
        state.apps.entry(request.app.clone()).or_default().runs += 1;
        Some(Permit { queue: self.clone(), app: request.app, run: true })
    }

    /// Takes a place for what has one already, on a machine that went on without the server. There need not be one.
    pub fn take_back(&self, request: PermitRequest) -> Permit {
        let mut state = self.state();
        state.taken += usize::from(request.run);
        let in_use = state.apps.entry(request.app.clone()).or_default();
        *(if request.run { &mut in_use.runs } else { &mut in_use.turns }) += 1;
        Permit { queue: self.clone(), app: request.app, run: request.run }
    }

    /// Sets how many places there are. What has one keeps it.
    pub fn set_places(&self, places: usize) {
        let mut state = self.state();
        state.places = places;
        let answers = state.serve(self);
        drop(state);
        answers.tell();
    }

    /// Who has how much.
    pub fn places(&self) -> Places {
        let state = self.state();
        let nothing = |app: &String| AppPlaces { app: app.clone(), runs: 0, turns: 0, waiting: 0 };
        let mut apps: BTreeMap<String, AppPlaces> = BTreeMap::new();
        for (app, InUse { runs, turns, .. }) in &state.apps {
            apps.insert(app.clone(), AppPlaces { runs: *runs, turns: *turns, ..nothing(app) });
        }
        for Waiter { request: PermitRequest { app, .. }, .. } in &state.waiting {
            apps.entry(app.clone()).or_insert_with(|| nothing(app)).waiting += 1;
        }
        Places { taken: state.taken, all: state.places, apps: apps.into_values().collect() }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Whether there is a place that nobody can have now.
    pub fn has_free(&self) -> bool {
        self.state().free() > 0
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
            self.taken += usize::from(run);
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

    fn free(&self) -> usize {
        self.places.saturating_sub(self.taken)
    }

    fn has_idle(&self) -> bool {
        (self.free() > 1 || (self.free() == 1 && self.taken == 0)) && self.crowd().values().all(|count| *count == 0)
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
            (!request.run || self.free() > 0) && request.most.is_none_or(|most| runs + turns < most)
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
mod tests;
