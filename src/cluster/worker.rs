//! A machine that works for others. It has places, agents and the folders of sessions, and neither tokens nor a ledger: what it may start,
//! a gateway says.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, AckKind};
use async_nats::{Message, Subject};
use futures_util::StreamExt;
use serde::Serialize;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::files;
use super::hub::Hub;
use super::lines::Lines;
use super::wire::{self, ANY, Asked, Beat, HELLO, Held, Hello, Line, Name, Order, Query, Taken, WORK, Work, bytes};
use crate::agent::backend::{Executed, Ready};
use crate::agent::contract::{Ending, Event, Outcome, Spec};
use crate::agent::control::Control;
use crate::agent::environment::Environment;
use crate::agent::folder::unprepared;
use crate::agent::network::proxy::Proxy;
use crate::agent::questions::{Change, Pick, Questions, Settled};
use crate::agent::tag::Tag;
use crate::clock;
use crate::config;
use crate::data_dir;
use crate::executor::Unmade;
use crate::executor::here::{self, Here};
use crate::job::end_tasks;
use crate::ledger::Machine;
use crate::server::Stop;

/// How often it says that it is there.
const BEAT: Duration = Duration::from_secs(2);
/// How long it asks for work before it asks again. A stop waits as long.
const ASKING: Duration = Duration::from_secs(1);
/// How long a gateway may take to say whether a job may start: its row is written first.
const CLAIM: Duration = Duration::from_secs(10);
/// How often that is asked.
const CLAIMS: usize = 3;
/// How often it says that it still has what it did not start.
const PROGRESS: Duration = Duration::from_secs(2);
/// For how much longer than at its gateway a question stays open here.
const GRACE: Duration = Duration::from_mins(1);
/// How long a session that is to be is kept for whoever asked for it.
const TAKEN: Duration = Duration::from_mins(2);
/// How long before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A machine that is set up and holds its data folder.
pub struct Worker {
    shared: Arc<Shared>,
    proxy: Option<Proxy>,
    drain: Duration,
    /// Held as long as the worker is.
    _lock: File,
}

struct Shared {
    hub: Hub,
    machine: Machine,
    started_at: i64,
    here: Here,
    places: usize,
    sweep_every: Duration,
    /// How often it tried to start a job.
    tries: AtomicU64,
    jobs: Mutex<HashMap<Name, Going>>,
    taken: Mutex<HashMap<String, here::Taken>>,
    /// Ends the making of a session that nobody waits for any more.
    making: Mutex<HashMap<String, CancellationToken>>,
    /// Comes when there is something to say at once.
    speak: Notify,
    /// Comes when a gateway has said that it is there.
    met: watch::Sender<()>,
    tasks: TaskTracker,
    /// Ends every job.
    stop: CancellationToken,
    /// Comes when it takes no more.
    stopping: CancellationToken,
}

/// A job that goes on.
#[derive(Clone)]
struct Going {
    cancel: CancellationToken,
    questions: Questions,
}

/// Takes a job out of those that go on.
struct Gone<'a>(&'a Shared, &'a Name);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        lock(&self.0.jobs).remove(self.1);
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    /// Makes the data folder ready, and clears away what a crash left. An error says what to do.
    pub async fn set_up(config::Worker { name, nats, settings }: config::Worker, environment: Environment) -> anyhow::Result<Self> {
        let data_dir = data_dir::make_for_worker(&settings.data_dir)?;
        let lock = data_dir::lock(&data_dir)?;
        data_dir::check_home(&environment)?;
        let (here, proxy) = Here::set_up(&settings, &data_dir, environment)?;
        let (processes, folders) = here.clear_away().await.context("what an earlier end left can't be cleared away")?;
        if processes + folders > 0 {
            tracing::warn!(processes, folders, "cleared away what an earlier end left");
        }
        here.recover_sessions(true).await;
        let hub = Hub::connect(&nats, &format!("worker-{name}")).await?;
        let machine = Machine { worker: name, instance: Uuid::now_v7().simple().to_string() };
        let shared = Shared {
            hub,
            machine,
            started_at: clock::now(),
            here,
            places: settings.max_runs,
            sweep_every: settings.sweep_every,
            tries: AtomicU64::new(0),
            jobs: Mutex::default(),
            taken: Mutex::default(),
            making: Mutex::default(),
            speak: Notify::new(),
            met: watch::Sender::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            stopping: CancellationToken::new(),
        };
        Ok(Self { shared: Arc::new(shared), proxy, drain: settings.drain, _lock: lock })
    }

    /// The tag of all that its agents are.
    pub fn tag(&self) -> Tag {
        self.shared.here.launcher.tag.clone()
    }

    /// Works until `stop.begin`, then finishes what it has, for the drain time or until `stop.hurry`.
    pub async fn work(mut self, stop: Stop) -> anyhow::Result<()> {
        let shared = &self.shared;
        let mut background = JoinSet::new();
        shared.here.begin(&mut background);
        if let Some(proxy) = self.proxy.take() {
            background.spawn(proxy.serve());
        }
        background.spawn(shared.clone().speak());
        background.spawn(shared.clone().obey());
        background.spawn(shared.clone().meet());
        background.spawn(shared.clone().sweep());
        let mut taking = JoinSet::new();
        taking.spawn(shared.clone().take_from(ANY.to_owned(), Some(Arc::new(Semaphore::new(shared.places)))));
        taking.spawn(shared.clone().take_from(wire::consumer_of(shared.name()), None));
        tracing::info!(worker = shared.machine.worker, places = shared.places, version = env!("CARGO_PKG_VERSION"), "working");
        let worked = tokio::select! {
            () = stop.begin.cancelled() => Ok(()),
            died = background.join_next() => Err(anyhow::anyhow!("a background task ended ({died:?}); this is a defect of clawdforge")),
        };
        tracing::info!(drain_secs = self.drain.as_secs(), "stopping: what goes on may finish");
        shared.stopping.cancel();
        shared.speak.notify_one();
        // What they were asked for is answered, and given back.
        while taking.join_next().await.is_some() {}
        let drained = async { drop(timeout(self.drain, stop.hurry.cancelled()).await) };
        tokio::join!(end_tasks("jobs", &shared.tasks, &shared.stop, drained), shared.here.backends.warm.finish());
        shared.here.finish().await;
        background.shutdown().await;
        shared.here.end().await;
        // Where NATS is not there, it never comes to that.
        let _ = timeout(AGAIN, shared.hub.client.flush()).await;
        tracing::info!("stopped");
        worked
    }
}

impl Shared {
    fn name(&self) -> &str {
        &self.machine.worker
    }

    /// Says that it is there, for ever.
    async fn speak(self: Arc<Self>) {
        loop {
            let stopping = self.stopping.is_cancelled();
            let beat = Beat {
                machine: self.machine.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                places: if stopping { 0 } else { self.places },
                jobs: lock(&self.jobs).keys().cloned().collect(),
                now_ms: clock::now_ms(),
                started_at: self.started_at,
                stopping,
            };
            // What can't be said now would only be old later.
            if self.hub.connected_since().is_some() {
                let _ = self.hub.client.publish(wire::beat(self.name()), bytes(&beat)).await;
            }
            let mut connections = self.hub.connections();
            tokio::select! {
                () = sleep(BEAT) => {}
                () = self.speak.notified() => {}
                _ = connections.changed() => {}
            }
        }
    }

    /// Meets gateways, which say that they are there.
    async fn meet(self: Arc<Self>) {
        let Ok(mut hellos) = self.hub.client.subscribe(HELLO).await else { return };
        while let Some(hello) = hellos.next().await {
            if *hello.subject != *HELLO {
                continue;
            }
            self.speak.notify_one();
            self.met.send_replace(());
            if let Ok(Hello { gateway }) = serde_json::from_slice(&hello.payload) {
                let shared = self.clone();
                self.tasks.spawn(async move { shared.look_through(&gateway).await });
            }
        }
    }

    /// Does what it is told.
    async fn obey(self: Arc<Self>) {
        let own = wire::order(self.name());
        let Ok(mut orders) = self.hub.client.subscribe(own.clone()).await else { return };
        while let Some(Message { subject, payload, reply, .. }) = orders.next().await {
            if *subject != own {
                // A consumer of a stream may have anything that stands there delivered here.
                tracing::warn!(%subject, "what was delivered as an order is none");
                continue;
            }
            match serde_json::from_slice(&payload) {
                Ok(order) => {
                    let shared = self.clone();
                    self.tasks.spawn(async move { shared.carry_out_order(order, reply).await });
                }
                Err(error) => tracing::warn!(%error, "what it is told to do can't be read; is the server of another release?"),
            }
        }
    }

    async fn answer(&self, reply: Option<Subject>, answer: &impl Serialize) {
        if let Some(reply) = reply {
            let _ = self.hub.client.publish(reply, bytes(answer)).await;
        }
    }

    async fn carry_out_order(&self, order: Order, reply: Option<Subject>) {
        match order {
            Order::Cancel(name) => {
                let going = lock(&self.jobs).get(&name).cloned();
                if let Some(going) = going {
                    going.cancel.cancel();
                }
                self.answer(reply, &true).await;
            }
            Order::Answer { name, permission_id, answer, by } => {
                let going = lock(&self.jobs).get(&name).cloned();
                if let Some(Going { questions, .. }) = going {
                    match answer.option_id.clone() {
                        Some(option_id) => drop(questions.answer(&permission_id, &Pick::Option(option_id), answer, by)),
                        None => questions.settle(&permission_id, answer, by),
                    }
                }
                self.answer(reply, &true).await;
            }
            Order::Take { setup, ahead } => {
                let taken = self.here.take_session(&setup, ahead).await;
                let (session_id, cwd, driver) = (taken.session_id.clone(), taken.cwd.clone(), taken.driver);
                lock(&self.taken).insert(session_id.clone(), taken);
                self.answer(reply, &Taken { session_id: session_id.clone(), cwd, driver }).await;
                self.stopping.run_until_cancelled(sleep(TAKEN)).await;
                self.give_back(&session_id).await;
            }
            Order::GiveBack(session_id) => {
                self.give_back(&session_id).await;
                self.answer(reply, &true).await;
            }
            Order::Create { gateway, conversation } => {
                let id = conversation.session_id.clone();
                let cancel = self.stop.child_token();
                lock(&self.making).insert(id.clone(), cancel.clone());
                let taken = lock(&self.taken).remove(&id);
                let made = match taken {
                    Some(taken) => self.here.create_session(taken, &conversation, &cancel).await,
                    None => Err(Unmade::Failed("it was not waited for".to_owned())),
                };
                let made = match made {
                    Ok(name) => self.here.set_owner(&id, gateway).await.map(|()| name).map_err(Unmade::from),
                    Err(error) => Err(error),
                };
                lock(&self.making).remove(&id);
                self.answer(reply, &made).await;
            }
            Order::Close(conversation) => {
                self.here.close_session(&conversation).await;
                self.answer(reply, &true).await;
            }
            Order::Remove(session_id) => {
                if let Some(cancel) = lock(&self.making).get(&session_id) {
                    cancel.cancel();
                }
                let removed = self.here.remove_session(&session_id).await.map_err(Unmade::from);
                self.answer(reply, &removed).await;
            }
        }
    }

    async fn give_back(&self, session_id: &str) {
        let taken = lock(&self.taken).remove(session_id);
        if let Some(taken) = taken {
            taken.give_back().await;
        }
    }

    /// Asks which sessions of a gateway are over, and ends them.
    async fn look_through(&self, gateway: &str) {
        let Some(sessions) = self.here.owned().await.ok().and_then(|mut owned| owned.remove(gateway)) else { return };
        let held: Option<Held> = self.hub.ask(wire::ask(gateway, self.name()), &Query::Holds(sessions), CLAIM).await;
        let Some(Held { closed, unknown }) = held else { return };
        for conversation in closed {
            self.here.close_session(&conversation).await;
        }
        for session_id in unknown {
            tracing::info!(session_id, "a session that was deleted meanwhile");
            if let Err(error) = self.here.remove_session(&session_id).await {
                tracing::warn!(session_id, %error, "the folder of a session that was deleted is left");
            }
        }
    }

    /// Takes away what is over: sessions, files, and folders of runs.
    async fn sweep(self: Arc<Self>) {
        loop {
            sleep(self.sweep_every).await;
            let gateways = self.here.owned().await.unwrap_or_default().into_keys();
            for gateway in gateways {
                self.look_through(&gateway).await;
            }
            if let Err(error) = files::sweep_folder(&self.hub, &self.here.launcher.uploads).await {
                tracing::debug!(%error, "files are looked through later");
            }
            if let Err(error) = self.here.run_dirs.sweep().await {
                tracing::warn!(%error, "the folders of runs were not swept");
            }
        }
    }

    /// The consumer of that name, as soon as a gateway has made it. `None` where the worker stops first.
    async fn consumer(&self, name: &str) -> Option<PullConsumer> {
        let mut met = self.met.subscribe();
        loop {
            let found = async {
                self.hub.connected().await;
                self.hub.jetstream.get_consumer_from_stream(name, WORK).await
            };
            match self.stopping.run_until_cancelled(found).await? {
                Ok(consumer) => return Some(consumer),
                Err(error) => tracing::debug!(name, %error, "no gateway has made it yet"),
            }
            // The one for this machine alone comes when it was heard.
            let soon = async {
                tokio::select! {
                    () = sleep(AGAIN / 5) => {}
                    _ = met.changed() => {}
                }
            };
            self.stopping.run_until_cancelled(soon).await?;
        }
    }

    /// Takes work from a consumer until it stops: runs, a piece for each place, or the turns of the sessions that live here, of which their gateway
    /// bounds how many go on.
    async fn take_from(self: Arc<Self>, name: String, places: Option<Arc<Semaphore>>) {
        while let Some(consumer) = self.consumer(&name).await {
            loop {
                let place = async {
                    match &places {
                        // It is never closed.
                        Some(places) => places.clone().acquire_owned().await.ok(),
                        None => None,
                    }
                };
                let Some(slot) = self.stopping.run_until_cancelled(place).await else { return };
                match self.take(&consumer).await {
                    Ok(Some(message)) => self.begin(message, slot),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::debug!(name, %error, "no work can be taken");
                        break;
                    }
                }
            }
            sleep(AGAIN / 5).await;
        }
    }

    /// Takes one piece of work, if there is one in time.
    async fn take(&self, consumer: &PullConsumer) -> anyhow::Result<Option<jetstream::Message>> {
        let taking = async { anyhow::Ok(consumer.batch().max_messages(1).expires(ASKING).messages().await?.next().await) };
        // A connection that is lost tells nothing.
        match timeout(ASKING * 2, taking).await {
            Err(_) => anyhow::bail!("NATS does not answer"),
            Ok(taken) => taken?.transpose().map_err(anyhow::Error::msg),
        }
    }

    fn begin(self: &Arc<Self>, message: jetstream::Message, slot: Option<OwnedSemaphorePermit>) {
        let shared = self.clone();
        self.tasks.spawn(async move {
            Box::pin(shared.carry_out(message)).await;
            drop(slot);
        });
    }

    async fn carry_out(&self, message: jetstream::Message) {
        let work: Work = match serde_json::from_slice(&message.payload) {
            Ok(work) => work,
            Err(error) => return self.refuse(&message, &error).await,
        };
        if self.stopping.is_cancelled() {
            return drop(message.ack_with(AckKind::Nak(None)).await);
        }
        let name = work.name.clone();
        let going = Going { cancel: self.stop.child_token(), questions: Questions::of_another(GRACE) };
        let is_new = match lock(&self.jobs).entry(name.clone()) {
            Entry::Vacant(place) => {
                place.insert(going.clone());
                true
            }
            Entry::Occupied(_) => false,
        };
        if !is_new {
            // It came twice.
            return drop(message.ack().await);
        }
        let gone = Gone(self, &name);
        let request = match work.spec {
            Asked::Inline(spec) => Ok(String::from(Box::<str>::from(spec))),
            Asked::Stored(stored) => files::request_of(&self.hub, &stored).await,
        };
        let request = match request {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!(job = name.job, %error, "what is to be done can't be fetched");
                return drop(message.ack_with(AckKind::Nak(Some(AGAIN))).await);
            }
        };
        let spec: Spec = match serde_json::from_str(&request) {
            Ok(spec) => spec,
            Err(error) => return self.refuse(&message, &error).await,
        };
        let keeping = async {
            loop {
                sleep(PROGRESS).await;
                let _ = message.ack_with(AckKind::Progress).await;
            }
        };
        let preparing = async {
            files::fetch(&self.hub, &name.gateway, &self.here.launcher.uploads, &spec.files).await?;
            std::io::Result::Ok(self.here.backends.prepare(work.uuid, &spec).await)
        };
        let beginning = async { tokio::join!(self.claim(&name), preparing) };
        let (claimed, ready) = tokio::select! {
            begun = beginning => begun,
            () = keeping => return,
        };
        if claimed != Some(true) {
            if let Ok(ready) = ready {
                ready.abandon().await;
            }
            // Somebody else has it, or nobody wants it any more; or its gateway is away.
            let answer = if claimed.is_some() { AckKind::Ack } else { AckKind::Nak(Some(AGAIN)) };
            return drop(message.ack_with(answer).await);
        }
        // From here on it is never another's.
        let _ = message.ack().await;
        let lines = Lines::default();
        let subject = wire::events(&name.gateway, self.name(), &name.job);
        let executing = async {
            match ready {
                Ok(ready) => self.execute(ready, &spec, &going, &lines).await,
                Err(error) => lines.say(&Line::Outcome(Box::new(Outcome::of(Ending::Unprepared(unprepared(&error)))))),
            }
            lines.say(&Line::Gone);
            lines.end();
        };
        tokio::join!(executing, lines.send(&self.hub, &subject));
        drop(gone);
    }

    /// Leaves work that can't be read.
    async fn refuse(&self, message: &jetstream::Message, error: &serde_json::Error) {
        tracing::error!(%error, "work can't be read; is the server of another release?");
        let _ = message.ack_with(AckKind::Term).await;
    }

    /// Asks whether a job may start. `None` where there is no answer.
    async fn claim(&self, name: &Name) -> Option<bool> {
        let machine = self.machine.tries(self.tries.fetch_add(1, Ordering::Relaxed));
        let question = Query::Claim { job: name.job.clone(), machine };
        for _ in 0..CLAIMS {
            if let Some(answer) = self.hub.ask(wire::ask(&name.gateway, self.name()), &question, CLAIM).await {
                return Some(answer);
            }
            self.hub.connected().await;
        }
        None
    }

    async fn execute(&self, ready: Ready<'_>, spec: &Spec, Going { cancel, questions }: &Going, lines: &Lines) {
        let started = Instant::now();
        let first_text = OnceLock::new();
        let emit = |event: Event| {
            if event.is_text() {
                first_text.get_or_init(|| started.elapsed());
            }
            lines.say(&Line::Event(event));
        };
        let mut changes = questions.record();
        let telling = async {
            while let Some(change) = changes.recv().await {
                lines.say(&match change {
                    Change::Asked(question) => Line::Asked(Box::new(question)),
                    Change::Settled(Settled { question, answer, by }) => {
                        Line::Settled { permission_id: question.permission_id, answer, by }
                    }
                });
            }
        };
        let executing = async {
            let executed = ready.execute(spec, Control { emit: &emit, cancel, questions }).await;
            questions.end();
            executed
        };
        let (Executed { mut outcome, cleanup, .. }, ()) = tokio::join!(executing, telling);
        if matches!(outcome.ending, Ending::Cancelled) && self.stop.is_cancelled() {
            outcome.ending = Ending::Interrupted;
        }
        outcome.first_text = first_text.get().copied();
        lines.say(&Line::Outcome(Box::new(outcome)));
        cleanup.await;
    }
}
