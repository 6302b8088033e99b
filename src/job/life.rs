//! A job's life: accepted → (its turn in the session's lane) → permit → budget → started → executed → settled.
//!
//! Each job is a task of its own, and the request that asked for it holds a guard. When a client leaves, its request is dropped and
//! nothing after its `.await` happens, so all that must happen lives here.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::future::{BoxFuture, pending};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::DropGuard;

use super::context::{Context, Row, Written};
use super::lane::{ComingTurn, InLane, Turn};
use super::live::Live;
use super::queue::{Admission, PendingPermit, Permit, PermitRequest, Reservation};
use super::rejection::Rejection;
use super::spec::Job;
use crate::agent::backend::Executed;
use crate::agent::contract::{Ending, Event, Outcome};
use crate::agent::control::{Control, Emit};
use crate::agent::questions::{Change, Question, Settled};
use crate::agent::warm_pool::Hold;
use crate::executor::{Came, Executor, Retold, Unmade};
use crate::ledger::{Machine, Queued};
use crate::metrics::{GoingOn, METRICS};

/// A job that is to live.
pub(super) struct Life {
    pub(super) context: Arc<Context>,
    pub(super) job: Arc<Job>,
    pub(super) live: Live,
    /// Whether it goes on without its client.
    pub(super) detached: bool,
    /// Of one that was accepted.
    pub(super) row: Option<Row>,
}

/// What a job waits for.
pub(super) enum Admitted {
    /// A run: its permit.
    Run { pending: PendingPermit, hold: Option<Hold> },
    /// A run of a batch, which has its permit.
    Batch { permit: Permit },
    /// A turn: those of its session that came before it, and then its permit.
    Turn { lane: InLane, coming: ComingTurn, reservation: Option<Reservation> },
    /// One that another machine carries out since before this start: nothing.
    Rejoined { permit: Permit, lane: Option<(InLane, ComingTurn)>, machine: Machine, retold: Retold },
}

/// What a job holds while it goes on.
struct Held {
    turn: Option<Turn>,
    permit: Permit,
    going_on: GoingOn,
}

impl Context {
    /// Has a job wait for its place, if there is room.
    pub(super) async fn admit(&self, job: &Job, admission: Admission, live: &Live) -> Result<Admitted, Rejection> {
        let request = request(job);
        let Some(session) = &job.spec.session else {
            let pending = self.queue.join(request, admission)?;
            // Nothing is started ahead while a run waits for a place, unless it waits only for its app's own limit.
            return Ok(Admitted::Run { pending, hold: (!self.queue.has_free()).then(|| self.executors.here().backends.warm.hold()) });
        };
        let reserves = admission == Admission::Guaranteed && request.most.is_some();
        let reservation = reserves.then(|| self.queue.reserve(&job.app)).transpose()?;
        let (lane, coming) = self.lanes.enter_turn(&session.session_id, live.clone()).await.ok_or(Rejection::Full)?;
        Ok(Admitted::Turn { lane, coming, reservation })
    }
}

/// What place it needs.
pub(super) fn request(job: &Job) -> PermitRequest {
    PermitRequest { app: job.app.clone(), most: job.limits.at_once(), run: job.spec.session.is_none() }
}

impl Admitted {
    pub(super) fn lane(&self) -> Option<&InLane> {
        match self {
            Self::Run { .. } | Self::Batch { .. } | Self::Rejoined { .. } => None,
            Self::Turn { lane, .. } => Some(lane),
        }
    }
}

impl Life {
    /// Lives it to its end.
    pub(super) async fn run(mut self, admitted: Admitted) {
        let over = self.live.going_on();
        let context = self.context.clone();
        let (lane, held) = match admitted {
            Admitted::Rejoined { permit, lane, machine, retold } => {
                let going_on = METRICS.begins(self.job.kind(), Duration::ZERO);
                let (lane, turn) = match lane {
                    Some((lane, coming)) => (Some(lane), Some(coming.await)),
                    None => (None, None),
                };
                let Some(executor) = context.executors.rejoin(&self.name(), machine, retold) else { return };
                return self.carry_out(lane, Held { turn, permit, going_on }, executor, true, over).await;
            }
            Admitted::Run { pending, hold } => {
                let held = self.unless_cancelled(None, self.wait_for_permit(pending, hold, Instant::now())).await;
                (None, held)
            }
            Admitted::Batch { permit } => {
                let going_on = METRICS.begins(self.job.kind(), Duration::ZERO);
                (None, Ok(Held { turn: None, permit, going_on }))
            }
            Admitted::Turn { lane, coming, reservation } => {
                let held = self.unless_cancelled(Some(&lane), self.wait_for_turn(&lane, coming, reservation)).await;
                (Some(lane), held)
            }
        };
        let found = match held {
            Ok(held) => self.find(&context, lane.as_ref()).await.map(|executor| (held, executor)),
            Err(rejection) => Err(rejection),
        };
        match found {
            // It starts after the restart.
            Err(Rejection::Stopping) if self.detached => {}
            Err(rejection) => self.reject(lane, rejection).await,
            Ok((held, executor)) => self.carry_out(lane, held, executor, false, over).await,
        }
    }

    /// What it is called, by machines too.
    fn name(&self) -> String {
        self.row.as_ref().map_or_else(|| self.job.uuid.simple().to_string(), |row| row.id.to_string())
    }

    /// Finds what carries it out.
    async fn find<'a>(&mut self, context: &'a Context, lane: Option<&InLane>) -> Result<Executor<'a>, Rejection> {
        let is_elsewhere = self.job.spec.session.as_ref().is_some_and(|session| session.worker.is_some());
        // Its name is its number, which only its row has.
        if is_elsewhere && self.row.is_none() {
            match context.write_row(&self.job, &self.live, lane, Some(Queued::default()), None).await? {
                Written::Row(row) => self.row = Some(row),
                // It has none.
                Written::KeyTaken => return Err(Rejection::Defect),
            }
        }
        let name = self.name();
        self.unless_cancelled(lane, async { Ok(context.executors.find(&name, self.job.uuid, &self.job.spec).await) }).await
    }

    async fn unless_cancelled<T>(&self, lane: Option<&InLane>, wait: impl Future<Output = Result<T, Rejection>>) -> Result<T, Rejection> {
        let closing = async {
            match lane {
                Some(lane) => lane.closing().await,
                None => pending().await,
            }
        };
        // What is accepted for good waits for whoever is awaited.
        let nobody =
            async { if self.detached { pending().await } else { self.context.executors.nobody(self.job.spec.session.as_ref()).await } };
        tokio::select! {
            biased;
            () = closing => Err(Rejection::SessionClosed),
            why = nobody => Err(match why {
                Unmade::Away(worker) => Rejection::Away(worker),
                _ => Rejection::Nowhere,
            }),
            () = self.live.cancel.cancelled() => Err(if self.context.stop.is_cancelled() { Rejection::Stopping } else { Rejection::Cancelled }),
            held = wait => held,
        }
    }

    async fn wait_for_turn(&self, lane: &InLane, coming: ComingTurn, reservation: Option<Reservation>) -> Result<Held, Rejection> {
        let came = Instant::now();
        let turn = tokio::select! {
            biased;
            turn = coming => turn,
            // Who waits on the line is not to wait for the ledger.
            () = lane.stuck(), if !self.detached => return Err(Rejection::LedgerLocked),
        };
        let admission = if self.detached { Admission::Readmitted } else { Admission::Evictable };
        let pending = self.context.queue.join(request(&self.job), admission)?;
        drop(reservation);
        let held = Held { turn: Some(turn), ..self.wait_for_permit(pending, None, came).await? };
        // A stop may have begun meanwhile.
        if self.context.tasks.is_closed() { Err(Rejection::Stopping) } else { Ok(held) }
    }

    async fn wait_for_permit(&self, pending: PendingPermit, hold: Option<Hold>, came: Instant) -> Result<Held, Rejection> {
        let permit = pending.permit().await?;
        drop(hold);
        let going_on = METRICS.begins(self.job.kind(), came.elapsed());
        // Once more: what was going on while this one waited has cost something.
        self.context.check_budget(&self.job).await?;
        Ok(Held { turn: None, permit, going_on })
    }

    /// Ends a job that does not come about.
    async fn reject(&self, lane: Option<InLane>, why: Rejection) {
        let unwritten = self.context.settle(&self.job, self.row.as_ref(), &self.live, Err(why)).await;
        if let (Some(unwritten), Some(Row { id, .. })) = (unwritten, &self.row) {
            self.context.write_later(id, unwritten).await;
        }
        drop(lane);
    }

    async fn carry_out(mut self, lane: Option<InLane>, held: Held, executor: Executor<'_>, has_begun: bool, over: DropGuard) {
        let (context, job) = (self.context.clone(), self.job.clone());
        let machine = executor.machine().cloned();
        let beginning = async { if has_begun { Ok(()) } else { self.begin(lane.as_ref(), machine.clone()).await } };
        let (begun, ready) = tokio::join!(beginning, executor.prepare(job.uuid, &job.spec));
        if let Err(rejection) = begun {
            ready.abandon().await;
            drop(held);
            return self.reject(lane, rejection).await;
        }
        let Held { turn, permit, going_on } = held;
        let (started, first_text) = (Instant::now(), OnceLock::new());
        let emit = |event: Event| {
            if event.is_text() {
                first_text.get_or_init(|| {
                    let after = started.elapsed();
                    METRICS.first_text(job.kind(), after);
                    after
                });
            }
            if let Some(Row { feed, .. }) = &self.row {
                feed.tell(&event);
            }
        };
        let questions = &self.live.questions;
        let changes = questions.record();
        let control = Control { emit: &emit, cancel: &self.live.cancel, questions };
        let executing = async {
            let came = ready.execute(&job.spec, control).await;
            match came {
                Came::Over(_) => questions.end(),
                Came::GoesOn => questions.leave(),
            }
            came
        };
        let (came, ()) = tokio::join!(executing, self.record(changes, &emit));
        let Came::Over(executed) = came else { return };
        let Executed { outcome, cleanup, keeps_place } = *executed;
        let outcome = Outcome { first_text: outcome.first_text.or(first_text.get().copied()), ..outcome };
        let nothing = || Box::pin(std::future::ready(())) as BoxFuture<'_, ()>;
        let (before, beside) = if keeps_place { (cleanup, nothing()) } else { (nothing(), cleanup) };
        let settling = async {
            // The caller has its answer while the agent ends.
            let settle = async { context.settle(&job, self.row.as_ref(), &self.live, Ok(self.checked(outcome).await)).await };
            let ((), unwritten) = tokio::join!(before, settle);
            // Whether or not the ledger could take it; the session's next turn waits for that, whose cost is a difference to this one's.
            drop((permit, going_on));
            let mut written = true;
            if let (Some(unwritten), Some(Row { id, .. })) = (unwritten, &self.row) {
                let _stuck = lane.as_ref().map(InLane::stuck_while_held);
                written = context.write_later(id, unwritten).await;
            }
            drop((turn, lane, over));
            written
        };
        let (written, ()) = tokio::join!(settling, beside);
        if written {
            context.executors.forget(&self.name());
        }
    }

    /// Tells and writes what becomes of the agent's questions, until nothing more does.
    async fn record(&self, mut changes: mpsc::UnboundedReceiver<Change>, emit: Emit<'_>) {
        while let Some(change) = changes.recv().await {
            let Some(Row { id, .. }) = &self.row else { continue };
            let written = match change {
                Change::Asked(question) => self.context.ledger.ask_permission(id, &self.job.app, question).await,
                Change::Settled(settled) => {
                    let Settled { question: Question { permission_id, .. }, answer, by } = settled.clone();
                    emit(Event::PermissionResolved { permission_id, option_id: answer.option_id, by });
                    self.context.ledger.settle_permission(settled).await
                }
            };
            if let Err(error) = written {
                tracing::warn!(%id, %error, "a question of an agent, or its answer, was not written to the ledger");
            }
        }
    }

    /// Writes that it starts now.
    async fn begin(&mut self, lane: Option<&InLane>, machine: Option<Machine>) -> Result<(), Rejection> {
        // What goes on without this server has to be known after a restart.
        let elsewhere = machine.map(|machine| (machine, self.job.kept()));
        if let Some(Row { id, .. }) = &self.row {
            return if self.context.ledger.start_job(id, elsewhere).await? { Ok(()) } else { Err(Rejection::SessionClosed) };
        }
        match self.context.write_row(&self.job, &self.live, lane, None, elsewhere).await? {
            Written::Row(row) => self.row = Some(row),
            // It has none.
            Written::KeyTaken => return Err(Rejection::Defect),
        }
        Ok(())
    }

    /// The outcome, as far as the agent can't know it.
    async fn checked(&self, mut outcome: Outcome) -> Outcome {
        match (&outcome.ending, &self.job.spec.schema) {
            (Ending::Cancelled, _) if self.context.stop.is_cancelled() => outcome.ending = Ending::Interrupted,
            (Ending::Completed(_), Some(schema)) => {
                if let Err(wrong) = self.context.schemas.fit(&self.job.app, schema, &outcome.text).await {
                    outcome.ending = Ending::Failed(wrong.to_string());
                }
            }
            _ => {}
        }
        outcome
    }
}
