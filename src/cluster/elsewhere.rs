//! Other machines, as a job and a session see them: work is offered, taken by one of them, and what becomes of it is heard.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::Subject;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::to_raw_value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::files;
use super::following::{Following, Heard};
use super::hub::{AT_ONCE, Hub};
use super::machines::{AWAY, Machines};
use super::wire::{self, Asked, Line, MOST, Name, Order, Taken, Work, bytes};
use crate::agent::contract::{Conversation, Ending, Outcome, Setup, Spec};
use crate::agent::control::Control;
use crate::agent::questions::Settled;
use crate::config::Nats;
use crate::executor::{Retold, Unmade};
use crate::ledger::Machine;

/// After how long what nobody has taken is offered again: what offered it may have lost it.
const OFFER_AGAIN: Duration = Duration::from_secs(30);
/// How long before what did not get through is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long it may take to make a session, which it gives a minute itself.
const CREATE: Duration = Duration::from_secs(90);

/// Other machines. Clones share them.
#[derive(Clone)]
pub struct Elsewhere(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) hub: Hub,
    /// What workers know this server's ledger by.
    pub(super) gateway: String,
    uploads: PathBuf,
    state: Mutex<State>,
    /// Comes when machines came or went.
    pub(super) changed: watch::Sender<()>,
    /// Comes when this server ends, and what goes on elsewhere goes on without it.
    pub(super) leaving: CancellationToken,
    began: Instant,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) machines: Machines,
    offers: HashMap<String, Offer>,
    pub(super) following: HashMap<String, Following>,
    /// The last message that was heard of a job, by its number in the stream.
    pub(super) heard: u64,
}

/// What waits for a machine.
#[derive(Default)]
struct Offer {
    /// Who wants it, and where the answer is to go.
    claim: Option<(Machine, Subject)>,
    claimed: Arc<Notify>,
}

/// What is answered to a machine that wants to start a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answered {
    Now(bool),
    /// When its row says so.
    Later,
}

impl State {
    /// Whether somebody waits for a job, or follows it.
    pub(super) fn knows(&self, job: &str) -> bool {
        self.offers.contains_key(job) || self.following.contains_key(job)
    }

    /// The first message in the stream that is still needed, if only to be told again after a restart.
    pub(super) fn needed(&self) -> u64 {
        self.following.values().filter_map(|following| following.first).min().unwrap_or(self.heard + 1)
    }

    /// A machine wants to start a job.
    pub(super) fn claim(&mut self, job: &str, machine: Machine, reply: Subject) -> Answered {
        if let Some(following) = self.following.get(job) {
            // It did not hear the answer.
            return Answered::Now(following.machine == machine);
        }
        match self.offers.get_mut(job) {
            Some(Offer { claim, claimed }) if claim.as_ref().is_none_or(|(by, _)| *by == machine) => {
                *claim = Some((machine, reply));
                claimed.notify_one();
                Answered::Later
            }
            _ => Answered::Now(false),
        }
    }
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answer(&self, reply: Subject, answer: &impl Serialize) {
        let (client, answer) = (self.hub.client.clone(), bytes(answer));
        tokio::spawn(async move { client.publish(reply, answer).await });
    }
}

impl Elsewhere {
    /// Other machines, by these servers, for the ledger that they know by this name. Files are in the folder `uploads`.
    pub async fn connect(nats: &Nats, gateway: String, uploads: PathBuf) -> anyhow::Result<Self> {
        let hub = Hub::connect(nats, &format!("gateway-{gateway}")).await?;
        let (state, changed, leaving) = (Mutex::default(), watch::Sender::default(), CancellationToken::new());
        Ok(Self(Arc::new(Shared { hub, gateway, uploads, state, changed, leaving, began: Instant::now() })))
    }

    /// Whether NATS is connected.
    pub fn is_connected(&self) -> bool {
        self.0.hub.connected_since().is_some()
    }

    /// The machines that are there.
    pub fn names(&self) -> Vec<String> {
        self.0.state().machines.names()
    }

    /// How many runs the machines have, or are offered, and may have at once.
    pub fn load(&self) -> (usize, usize) {
        let state = self.0.state();
        (state.offers.len() + state.following.len(), state.machines.places())
    }

    /// Whether a machine, or any, can't be waited for: it is away, and for as long as it may take to show.
    pub fn is_away(&self, worker: Option<&str>) -> bool {
        self.0.began.elapsed() > AWAY && !self.0.state().machines.is_here(worker)
    }

    /// Comes when a machine is there, or none can be waited for.
    pub async fn anyone(&self) {
        // A server that has just begun has heard of none yet.
        let grace = AWAY.saturating_sub(self.0.began.elapsed());
        let _ = timeout(grace, self.here(None)).await;
    }

    /// From now on, what goes on elsewhere goes on without this server.
    pub fn leave(&self) {
        self.0.leaving.cancel();
    }

    /// Comes when a machine, or any, is there.
    async fn here(&self, worker: Option<&str>) {
        let mut changed = self.0.changed.subscribe();
        while !self.0.state().machines.is_here(worker) {
            // The sender is here.
            let _ = changed.changed().await;
        }
    }

    /// Offers a job to a machine, or to any, until one takes it.
    pub async fn offer(&self, job: &str, uuid: Uuid, spec: &Spec, worker: Option<&str>) -> Claimed {
        let claimed = Arc::<Notify>::default();
        self.0.state().offers.insert(job.to_owned(), Offer { claim: None, claimed: claimed.clone() });
        let offered = Offered { elsewhere: self.clone(), job: job.to_owned() };
        let offering = async {
            loop {
                self.here(worker).await;
                let again = match self.put(job, uuid, spec, worker).await {
                    Ok(()) => OFFER_AGAIN,
                    Err(error) => {
                        tracing::warn!(job, %error, "it can't be handed to another machine; trying again");
                        AGAIN
                    }
                };
                tokio::select! {
                    () = sleep(again) => {}
                    // It may have been lost with what kept it.
                    () = self.0.hub.disconnected() => self.0.hub.connected().await,
                }
            }
        };
        let claiming = async {
            loop {
                claimed.notified().await;
                if let Some(Offer { claim: Some((machine, _)), .. }) = self.0.state().offers.get(job) {
                    return machine.clone();
                }
            }
        };
        let machine = tokio::select! {
            machine = claiming => machine,
            never = offering => never,
        };
        Claimed { offered, machine, retold: Retold::default() }
    }

    async fn put(&self, job: &str, uuid: Uuid, spec: &Spec, worker: Option<&str>) -> anyhow::Result<()> {
        let Shared { hub, gateway, uploads, .. } = &*self.0;
        files::put(hub, gateway, uploads, &spec.files).await?;
        let spec = to_raw_value(spec)?;
        let spec = if spec.get().len() <= MOST {
            Asked::Inline(spec)
        } else {
            let name = files::request(gateway, job);
            files::put_request(hub, &name, spec.get()).await?;
            Asked::Stored(name)
        };
        let work = Work { name: Name { gateway: gateway.clone(), job: job.to_owned() }, uuid, spec };
        hub.jetstream.publish(wire::work(worker), bytes(&work)).await?.await?;
        Ok(())
    }

    /// A job that a machine has started, in an earlier life of this server, which was told `retold` of it.
    pub fn rejoin(&self, job: &str, machine: Machine, retold: Retold) -> Claimed {
        Claimed { offered: Offered { elsewhere: self.clone(), job: job.to_owned() }, machine, retold }
    }

    /// Nothing of a job is needed any more: its row is written.
    pub fn forget(&self, job: &str) {
        self.0.state().following.remove(job);
    }

    /// Has a machine do something at once. `None` where it does not answer.
    pub(super) async fn order<T: DeserializeOwned>(&self, worker: &str, order: &Order, within: Duration) -> Option<T> {
        self.0.hub.connected_since()?;
        self.0.hub.ask(wire::order(worker), order, within).await
    }

    /// The same, again and again until it has.
    async fn insist(&self, worker: &str, order: &Order) {
        while self.order::<bool>(worker, order, AT_ONCE).await.is_none() {
            sleep(AGAIN).await;
        }
    }

    /// Has a machine name a session that is to be.
    pub async fn take_session(&self, worker: &str, setup: &Setup, ahead: bool) -> Result<Taken, Unmade> {
        let order = Order::Take { setup: setup.clone(), ahead };
        self.order(worker, &order, AT_ONCE * 2).await.ok_or_else(|| Unmade::Away(worker.to_owned()))
    }

    /// Has it take that back.
    pub async fn give_back(&self, worker: &str, session_id: String) {
        self.order::<bool>(worker, &Order::GiveBack(session_id), AT_ONCE).await;
    }

    /// Has it make the session. Gives what its driver calls it.
    pub async fn create_session(&self, worker: &str, conversation: &Conversation, cancel: &CancellationToken) -> Result<String, Unmade> {
        let order = Order::Create { gateway: self.0.gateway.clone(), conversation: conversation.clone() };
        tokio::select! {
            biased;
            created = self.order(worker, &order, CREATE) => created.unwrap_or_else(|| Err(Unmade::Away(worker.to_owned()))),
            () = cancel.cancelled() => Err(Unmade::Failed("it was not waited for".to_owned())),
        }
    }

    /// Has it end the agent of a session. Where it is away, it does so when it is back.
    pub async fn close_session(&self, worker: &str, conversation: &Conversation) {
        let within = AT_ONCE * 4;
        if self.0.state().machines.is_here(Some(worker)) {
            self.order::<bool>(worker, &Order::Close(conversation.clone()), within).await;
        }
    }

    /// Has it take away all that there is of a session. Where it is away, it does so when it is back.
    pub async fn remove_session(&self, worker: &str, session_id: &str) -> Result<(), Unmade> {
        if !self.0.state().machines.is_here(Some(worker)) {
            return Ok(());
        }
        self.order(worker, &Order::Remove(session_id.to_owned()), AT_ONCE * 4).await.unwrap_or(Ok(()))
    }
}

/// A job that is offered. Dropped, it is not any more, and whoever wants to start it may not.
struct Offered {
    elsewhere: Elsewhere,
    job: String,
}

impl Drop for Offered {
    fn drop(&mut self) {
        let offer = self.elsewhere.0.state().offers.remove(&self.job);
        if let Some((_, reply)) = offer.and_then(|offer| offer.claim) {
            self.elsewhere.0.answer(reply, &false);
        }
    }
}

/// A job that a machine wants to start, or has.
pub struct Claimed {
    offered: Offered,
    machine: Machine,
    /// Of one that it has started, what an earlier life of this server was told.
    retold: Retold,
}

/// How it goes on with a job.
pub enum Carried {
    /// It is over for its caller; its machine may still have to clear away.
    Over(Box<Outcome>, Rest),
    /// It goes on without this server.
    GoesOn,
}

/// What a machine still does for a job that is over for its caller.
pub struct Rest(UnboundedReceiver<Heard>, CancellationToken);

impl Rest {
    /// Comes when nothing of the job is left, or its machine is lost.
    pub async fn over(mut self) {
        let over = async { while matches!(self.0.recv().await, Some(Heard::Line(line)) if !matches!(*line, Line::Gone)) {} };
        tokio::select! {
            () = over => {}
            () = self.1.cancelled() => {}
        }
    }
}

impl Claimed {
    /// Which machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Has the machine start, and hears what becomes of it.
    pub async fn execute(self, control: Control<'_>) -> Carried {
        let Self { offered, machine, mut retold } = self;
        let Offered { elsewhere, job } = &offered;
        let (worker, (heard, mut hears)) = (machine.worker.as_str(), unbounded_channel());
        {
            let mut state = elsewhere.0.state();
            state.following.insert(job.clone(), Following::new(machine.clone(), heard));
            if let Some((_, reply)) = state.offers.remove(job).and_then(|offer| offer.claim) {
                elsewhere.0.answer(reply, &true);
            }
        }
        let name = Name { gateway: elsewhere.0.gateway.clone(), job: job.clone() };
        // Until it is over.
        let cancelling = async {
            control.cancel.cancelled().await;
            loop {
                elsewhere.insist(worker, &Order::Cancel(name.clone())).await;
                sleep(AGAIN).await;
            }
        };
        let answering = async {
            loop {
                let Settled { question, answer, by } = control.questions.next().await;
                elsewhere.insist(worker, &Order::Answer { name: name.clone(), permission_id: question.permission_id, answer, by }).await;
            }
        };
        let hearing = async {
            loop {
                match hears.recv().await {
                    Some(Heard::Line(line)) => {
                        if let Some(outcome) = hear(*line, control, &mut retold) {
                            return outcome;
                        }
                    }
                    Some(Heard::Lost) | None => {
                        // Nothing more is to come, of what it clears away either.
                        hears.close();
                        return Box::new(Outcome::of(Ending::Lost(worker.to_owned())));
                    }
                }
            }
        };
        let outcome = tokio::select! {
            biased;
            () = elsewhere.0.leaving.cancelled() => return Carried::GoesOn,
            outcome = hearing => outcome,
            () = cancelling => return Carried::GoesOn,
            () = answering => return Carried::GoesOn,
        };
        Carried::Over(outcome, Rest(hears, elsewhere.0.leaving.clone()))
    }
}

/// Passes a line on, unless that was done before. Gives how it ended.
fn hear(line: Line, control: Control<'_>, retold: &mut Retold) -> Option<Box<Outcome>> {
    match line {
        Line::Event(_) if retold.events > 0 => retold.events -= 1,
        Line::Event(event) => (control.emit)(event),
        Line::Asked(question) if !retold.resolved.contains(&question.permission_id) => control.questions.ask(*question),
        Line::Settled { permission_id, answer, by } => control.questions.settle(&permission_id, answer, by),
        Line::Asked(_) | Line::Gone => {}
        Line::Outcome(outcome) => return Some(outcome),
    }
    None
}
