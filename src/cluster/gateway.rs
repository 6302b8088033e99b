//! What goes on at a gateway beside its jobs: streams that are there, machines that are heard of, their questions, and what they say.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::object_store;
use async_nats::jetstream::stream::{self, RetentionPolicy};
use futures_util::StreamExt;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};

use super::elsewhere::{Answered, Elsewhere, Shared};
use super::files;
use super::following::Following;
use super::hub::AT_ONCE;
use super::machines::AWAY;
use super::wire::{self, ANY, AT, Beat, FILES, HELLO, Held, Hello, NOBODY, Name, Order, Query, WORK, bytes};
use crate::clock;
use crate::job::queue::Queue;
use crate::ledger::{self, Ledger, Session, WorkerRow};
use crate::metrics::METRICS;
use crate::session::Sessions;

/// After how long work that a machine took and did not speak of goes to another one.
const SILENT: Duration = Duration::from_secs(6);
/// How long work stands there that nobody takes.
const OFFERED: Duration = Duration::from_mins(2);
/// How often it is looked after the machines.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is noted how they were heard of, and looked for those that are to be forgotten.
const NOTE: Duration = Duration::from_secs(2);
/// How long before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// So many words of its machine that don't name a job say that it is lost.
const UNNAMED: u32 = 2;
/// How old a job that is followed has to be for its machine to name it.
const NAMED_AFTER: Duration = Duration::from_secs(4);

/// What a gateway looks after its machines with. Clones share it.
#[derive(Clone)]
pub struct Gateway {
    /// The machines.
    pub elsewhere: Elsewhere,
    /// Who they are, and their sessions.
    pub ledger: Ledger,
    /// How many places there are.
    pub queue: Queue,
    /// Of those, this machine's own.
    pub places: usize,
    /// How often it is looked for files that are over.
    pub sweep_every: Duration,
    /// Those that a machine which is forgotten had.
    pub sessions: Sessions,
}

impl Gateway {
    /// Has all of it go on. What goes on elsewhere is followed by then: what nobody follows is thrown away.
    pub fn begin(self, tasks: &mut JoinSet<()>) {
        tasks.spawn(self.clone().keep_streams());
        tasks.spawn(self.clone().answer_questions());
        tasks.spawn(self.clone().hear_machines());
        tasks.spawn(self.clone().hear_jobs());
        tasks.spawn(self.clone().look_after());
        tasks.spawn(self.sweep());
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.elsewhere.0
    }

    /// Makes what is missing, at each connection, and says that this server is there.
    async fn keep_streams(self) {
        let hub = &self.shared().hub;
        let mut connections = hub.connections();
        loop {
            // Where nobody tells any more, it is over anyway.
            let _ = connections.wait_for(Option::is_some).await;
            while let Err(error) = self.make_streams().await {
                tracing::warn!(%error, "the streams can't be made; is JetStream on, and may this server make them?");
                sleep(AGAIN).await;
            }
            let hello = bytes(&Hello { gateway: self.shared().gateway.clone() });
            let _ = hub.client.publish(HELLO, hello).await;
            let _ = connections.changed().await;
        }
    }

    async fn make_streams(&self) -> anyhow::Result<()> {
        let Shared { hub, gateway, .. } = &**self.shared();
        let jetstream = &hub.jetstream;
        let work = jetstream
            .get_or_create_stream(stream::Config {
                name: WORK.to_owned(),
                subjects: vec![wire::work(None), wire::work(Some("*"))],
                retention: RetentionPolicy::WorkQueue,
                // Whoever still waits for a machine offers it again before.
                max_age: OFFERED,
                ..stream::Config::default()
            })
            .await?;
        work.get_or_create_consumer(ANY, consumer(ANY, wire::work(None))).await?;
        jetstream
            .get_or_create_stream(stream::Config {
                name: wire::events_stream(gateway),
                subjects: vec![wire::events(gateway, "*", "*")],
                ..stream::Config::default()
            })
            .await?;
        if jetstream.get_object_store(FILES).await.is_err() {
            jetstream.create_object_store(object_store::Config { bucket: FILES.to_owned(), ..object_store::Config::default() }).await?;
        }
        // What was lost with an earlier server, its machines need again.
        for worker in self.elsewhere.names() {
            self.make_consumer(&worker).await?;
        }
        Ok(())
    }

    /// Makes the consumer of the work for one machine alone.
    async fn make_consumer(&self, worker: &str) -> anyhow::Result<()> {
        let work = self.shared().hub.jetstream.get_stream_no_info(WORK).await?;
        let name = wire::consumer_of(worker);
        work.get_or_create_consumer(&name, consumer(&name, wire::work(Some(worker)))).await?;
        Ok(())
    }

    async fn answer_questions(self) {
        let subject = wire::ask(&self.shared().gateway, "*");
        let Ok(mut questions) = self.shared().hub.client.subscribe(subject).await else { return };
        while let Some(question) = questions.next().await {
            self.answer(question);
        }
    }

    fn answer(&self, Message { subject, reply, payload, .. }: Message) {
        let Some(reply) = reply else { return };
        let worker = subject.rsplit('.').next().unwrap_or_default().to_owned();
        if *subject != wire::ask(&self.shared().gateway, &worker) {
            return;
        }
        match serde_json::from_slice(&payload) {
            // By its own name alone, which NATS vouches for.
            Ok(Query::Claim { job, machine }) if machine.worker == worker => {
                let answered = self.shared().state().claim(&job, machine, reply.clone());
                if let Answered::Now(answer) = answered {
                    self.shared().answer(reply, &answer);
                }
            }
            Ok(Query::Claim { .. }) => self.shared().answer(reply, &false),
            Ok(Query::Holds(sessions)) => {
                let gateway = self.clone();
                tokio::spawn(async move {
                    match gateway.held(&worker, sessions).await {
                        Ok(held) => gateway.shared().answer(reply, &held),
                        Err(error) => tracing::warn!(worker, %error, "its sessions are looked through later"),
                    }
                });
            }
            Err(error) => tracing::warn!(worker, %error, "it asks what can't be read; is it of another release?"),
        }
    }

    /// Which of these sessions a machine has nothing to do with any more.
    async fn held(&self, worker: &str, sessions: Vec<String>) -> Result<Held, ledger::Error> {
        let mut known = self.ledger.sessions_of_worker(worker).await?;
        let is_known = |session_id: &String| known.iter().any(|session| session.new.session_id == *session_id);
        let unknown = sessions.iter().filter(|session_id| !is_known(session_id)).cloned().collect();
        known.retain(|session| session.closed_at.is_some() && sessions.contains(&session.new.session_id));
        Ok(Held { closed: known.iter().map(Session::conversation).collect(), unknown })
    }

    async fn hear_machines(self) {
        let Ok(mut beats) = self.shared().hub.client.subscribe(wire::beat("*")).await else { return };
        while let Some(Message { subject, payload, .. }) = beats.next().await {
            match serde_json::from_slice::<Beat>(&payload) {
                Ok(beat) if *subject == wire::beat(&beat.machine.worker) => self.hear(beat).await,
                _ => tracing::warn!(%subject, "what a machine says of itself can't be read; is it of another release?"),
            }
        }
    }

    async fn hear(&self, beat: Beat) {
        let Shared { gateway, changed, .. } = &**self.shared();
        let worker = beat.machine.worker.clone();
        let own = || beat.jobs.iter().filter(|name| name.gateway == *gateway).map(|name| name.job.clone());
        // One that is stopping is none of those that are there.
        let is_new = !beat.stopping && !self.elsewhere.names().contains(&worker);
        if is_new && let Err(error) = self.make_consumer(&worker).await {
            tracing::warn!(worker, %error, "it can't be given sessions yet");
            return;
        }
        let strays = {
            let mut state = self.shared().state();
            for (job, following) in state.following.iter_mut().filter(|(_, following)| following.machine.worker == worker) {
                let is_named = following.machine.is_of(&beat.machine) && own().any(|name| name == *job);
                if is_named {
                    (following.silent, following.unnamed) = (Duration::ZERO, 0);
                } else if !following.machine.is_of(&beat.machine) {
                    // It has started anew.
                    following.unnamed = UNNAMED;
                } else if following.age > NAMED_AFTER {
                    following.unnamed += 1;
                }
            }
            let strays = own().filter(|job| !state.knows(job)).collect();
            state.machines.hear(beat.clone(), strays)
        };
        if is_new {
            tracing::info!(worker, places = beat.places, "a machine is there");
            changed.send_replace(());
        }
        self.set_places();
        for job in strays {
            // Whoever wanted it was told that it is lost, or is gone.
            let (elsewhere, worker, name) = (self.elsewhere.clone(), worker.clone(), Name { gateway: gateway.clone(), job });
            tracing::info!(worker, job = name.job, "nobody wants what it carries out");
            tokio::spawn(async move { elsewhere.order::<bool>(&worker, &Order::Cancel(name), AT_ONCE).await });
        }
    }

    fn set_places(&self) {
        let places = self.shared().state().machines.places();
        self.queue.set_places(self.places + places);
    }

    /// Hears what machines say of jobs, in order, from the first word that is kept.
    async fn hear_jobs(self) {
        let mut after = 0;
        loop {
            self.shared().hub.connected().await;
            if let Err(error) = self.hear_jobs_after(&mut after).await {
                tracing::debug!(%error, "what machines say is listened to again");
            }
            sleep(AGAIN / 5).await;
        }
    }

    async fn hear_jobs_after(&self, after: &mut u64) -> anyhow::Result<()> {
        let Shared { hub, gateway, .. } = &**self.shared();
        let stream = hub.jetstream.get_stream(wire::events_stream(gateway)).await?;
        if stream.cached_info().state.last_sequence < *after {
            // It was lost, and is another one.
            *after = 0;
            let mut state = self.shared().state();
            state.heard = 0;
            state.following.values_mut().for_each(|following| following.first = None);
        }
        let deliver_policy = DeliverPolicy::ByStartSequence { start_sequence: *after + 1 };
        let consumer = stream.create_consumer(pull::OrderedConfig { deliver_policy, ..pull::OrderedConfig::default() }).await?;
        let mut messages = consumer.messages().await?;
        let mut connections = hub.connections();
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                // It may come back with less than it had.
                _ = connections.changed() => return Ok(()),
            };
            let Some(message) = message else { return Ok(()) };
            let message = message?;
            let sequence = message.info().map_err(anyhow::Error::msg)?.stream_sequence;
            *after = sequence;
            let mut subject = message.subject.rsplit('.');
            let (job, worker) = (subject.next().unwrap_or_default(), subject.next().unwrap_or_default());
            let at = message.headers.as_ref().and_then(|headers| headers.get(AT)?.as_str().parse().ok()).unwrap_or_default();
            self.hear_of(job, worker, sequence, at, &message.payload);
        }
    }

    /// Hears of a job. Of one that nobody follows, nobody wants to.
    fn hear_of(&self, job: &str, worker: &str, sequence: u64, at: u64, payload: &[u8]) {
        let mut state = self.shared().state();
        state.heard = sequence;
        let Some(following) = state.following.get_mut(job) else { return };
        following.first.get_or_insert(sequence);
        if worker == NOBODY {
            // Nothing that was said before is still to come.
            following.lose();
        } else if following.machine.worker == worker {
            following.receive(at, payload);
        }
    }

    /// Throws away what nobody needs any more, from its beginning on. Not job by job: a consumer that lags behind such a purge goes on behind all
    /// that there is (NATS 2.9.10).
    async fn purge(&self, purged: &mut u64) {
        let Shared { hub, gateway, .. } = &**self.shared();
        let needed = self.shared().state().needed();
        if needed == *purged {
            return;
        }
        let stream = hub.jetstream.get_stream_no_info(wire::events_stream(gateway)).await;
        if let Ok(stream) = stream
            && stream.purge().sequence(needed).await.is_ok()
        {
            *purged = needed;
        }
    }

    /// Finds what is away, and what is lost with it.
    async fn look_after(self) {
        let (mut ticks, mut noted, mut forgotten, mut purged) = (interval(LOOK), 0_u32, clock::now(), 0);
        loop {
            ticks.tick().await;
            let Shared { hub, changed, .. } = &**self.shared();
            // What can't be heard is not silent; but what can't be reached for as long is not there.
            if hub.connected_since().is_some() {
                self.shared().state().following.values_mut().for_each(|following| {
                    following.silent += LOOK;
                    following.age += LOOK;
                });
            }
            let before = self.elsewhere.names();
            self.shared().state().machines.wait(LOOK);
            let after = self.elsewhere.names();
            let gone: Vec<_> = before.into_iter().filter(|worker| !after.contains(worker)).collect();
            if !gone.is_empty() {
                tracing::warn!(?gone, "a machine is away");
                changed.send_replace(());
            }
            self.set_places();
            if hub.connected_since().is_some() {
                self.doubt().await;
            }
            noted += 1;
            if LOOK * noted >= NOTE {
                noted = 0;
                if hub.connected_since().is_some() {
                    self.purge(&mut purged).await;
                }
                if let Err(error) = self.note(&mut forgotten).await {
                    tracing::warn!(%error, "how machines were heard of is not noted");
                }
            }
        }
    }

    /// Asks of jobs whose machines do not name them any more whether anything is still to come.
    async fn doubt(&self) {
        let Shared { hub, gateway, .. } = &**self.shared();
        let lost = |following: &Following| !following.doubted && (following.silent > AWAY || following.unnamed >= UNNAMED);
        let doubted: Vec<String> = {
            let mut state = self.shared().state();
            let doubted = state.following.iter_mut().filter(|(_, following)| lost(following));
            doubted
                .map(|(job, following)| {
                    following.doubted = true;
                    job.clone()
                })
                .collect()
        };
        for job in doubted {
            tracing::warn!(job, "its machine does not speak of it any more");
            let subject = wire::events(gateway, NOBODY, &job);
            let asked = async { anyhow::Ok(hub.jetstream.publish(subject, bytes(&())).await?.await?) };
            if asked.await.is_err()
                && let Some(following) = self.shared().state().following.get_mut(&job)
            {
                following.doubted = false;
            }
        }
    }

    /// Notes how machines were heard of, and lets go those that the operator has forgotten.
    async fn note(&self, since: &mut i64) -> Result<(), ledger::Error> {
        let rows: Vec<WorkerRow> = self.shared().state().machines.rows();
        METRICS.set_workers(&rows);
        let now = clock::now();
        for worker in self.ledger.forgotten_workers(*since).await? {
            // One that is heard of is there.
            if !rows.iter().any(|row| row.name == worker) {
                self.shared().state().machines.forget(&worker);
                // It gets another one if it comes back after all.
                let _ = self.shared().hub.jetstream.delete_consumer_from_stream(wire::consumer_of(&worker), WORK).await;
                self.sessions.close_forgotten(&worker).await?;
            }
        }
        *since = now;
        if rows.is_empty() { Ok(()) } else { self.ledger.see_workers(rows).await }
    }

    async fn sweep(self) {
        let Shared { hub, gateway, .. } = &**self.shared();
        loop {
            sleep(self.sweep_every).await;
            hub.connected().await;
            let is_open = |job: &str| self.shared().state().knows(job);
            match files::sweep_bucket(hub, gateway, &self.ledger, is_open).await {
                Ok(0) => {}
                Ok(count) => tracing::info!(count, "files that were handed to other machines are over"),
                Err(error) => tracing::warn!(%error, "files that were handed to other machines are looked through later"),
            }
        }
    }
}

/// The consumer of work that stands there, under this name.
fn consumer(name: &str, filter_subject: String) -> pull::Config {
    pull::Config {
        durable_name: Some(name.to_owned()),
        filter_subject,
        ack_policy: AckPolicy::Explicit,
        ack_wait: SILENT,
        ..pull::Config::default()
    }
}
