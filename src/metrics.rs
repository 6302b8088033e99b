//! What is counted of the server, for Prometheus. Of the whole process, so a static.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::agent::contract::Usage;
use crate::ledger::WorkerRow;
use crate::log;

/// The one set of them.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Upper ends of the histograms, in seconds.
const SECONDS: [f64; 13] = [0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

type Seconds = Family<Kind, Histogram, fn() -> Histogram>;

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    first_text: Seconds,
    whole: Seconds,
    queue_wait: Seconds,
    going_on: Family<Kind, Gauge>,
    queue_length: Gauge,
    open_sessions: Gauge,
    standbys: Family<Found, Counter>,
    killed: Family<Why, Counter>,
    tokens: Family<Tokens, Counter>,
    dollars: Family<Use, Counter<f64, AtomicU64>>,
    log_dropped: Counter,
    workers: Family<OfWorker, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWorker {
    worker: String,
    what: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    method: String,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Found {
    kind: &'static str,
    found: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    why: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Use {
    app: String,
    model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tokens {
    app: String,
    model: String,
    direction: &'static str,
}

/// A run or a turn that goes on, until it is dropped.
#[derive(Debug)]
pub struct GoingOn(&'static str);

impl Drop for GoingOn {
    fn drop(&mut self) {
        METRICS.going_on.get_or_create(&Kind { kind: self.0 }).dec();
    }
}

impl Metrics {
    fn new() -> Self {
        let seconds = || Seconds::new_with_constructor(|| Histogram::new(SECONDS));
        let mut metrics = Self {
            registry: Registry::with_prefix("clawdforge"),
            requests: Family::default(),
            first_text: seconds(),
            whole: seconds(),
            queue_wait: seconds(),
            going_on: Family::default(),
            queue_length: Gauge::default(),
            open_sessions: Gauge::default(),
            standbys: Family::default(),
            killed: Family::default(),
            tokens: Family::default(),
            dollars: Family::default(),
            log_dropped: Counter::default(),
            workers: Family::default(),
        };
        let Self {
            registry,
            requests,
            first_text,
            whole,
            queue_wait,
            going_on,
            queue_length,
            open_sessions,
            standbys,
            killed,
            tokens,
            dollars,
            log_dropped,
            workers,
        } = &mut metrics;
        registry.register("requests", "Requests answered, by route and status", requests.clone());
        registry.register("first_text_seconds", "From the start of a run or turn to its first text", first_text.clone());
        registry.register("duration_seconds", "From the start of a run or turn to its end", whole.clone());
        registry.register("queue_wait_seconds", "How long runs and turns waited for their place", queue_wait.clone());
        registry.register("going_on", "Runs and turns that go on", going_on.clone());
        registry.register("queue_length", "Runs and turns that wait for a place", queue_length.clone());
        registry.register("open_sessions", "Sessions that are open", open_sessions.clone());
        registry.register("standbys", "Runs and turns that found a process waiting (hit), or none (miss)", standbys.clone());
        registry.register("processes_killed", "Agents that were ended, by why", killed.clone());
        registry.register("tokens", "Tokens, by app and model", tokens.clone());
        registry.register("cost_usd", "US dollars as the CLIs report them, by app and model", dollars.clone());
        registry.register("log_lines_dropped", "Lines of the log that could not be written", log_dropped.clone());
        registry.register(
            "workers",
            "Other machines that are there: their places, and the runs and turns that go on there",
            workers.clone(),
        );
        metrics
    }

    /// Notes which machines are there, and what goes on on them.
    pub fn set_workers(&self, workers: &[WorkerRow]) {
        // Those that are away are none of them.
        self.workers.clear();
        for WorkerRow { name, places, runs, turns, .. } in workers {
            for (what, count) in [("places", *places), ("runs", *runs), ("turns", *turns)] {
                self.workers.get_or_create(&OfWorker { worker: name.clone(), what }).set(count.into());
            }
        }
    }

    /// Notes an answer.
    pub fn answered(&self, method: &str, route: &str, status: u16) {
        self.requests.get_or_create(&Answered { method: method.to_owned(), route: route.to_owned(), status }).inc();
    }

    /// Notes the first text of a `run` or a `turn`.
    pub fn first_text(&self, kind: &'static str, after: Duration) {
        self.first_text.get_or_create(&Kind { kind }).observe(after.as_secs_f64());
    }

    /// Notes that a `run` or a `turn` has its place, after a while.
    pub fn begins(&self, kind: &'static str, waited: Duration) -> GoingOn {
        self.queue_wait.get_or_create(&Kind { kind }).observe(waited.as_secs_f64());
        self.going_on.get_or_create(&Kind { kind }).inc();
        GoingOn(kind)
    }

    /// Notes the end of a `run` or a `turn`.
    pub fn ended(&self, kind: &'static str, app: &str, model: &str, ok: bool, duration: Duration, usage: Usage) {
        if duration.is_zero() && !ok {
            // It never began.
            return;
        }
        self.whole.get_or_create(&Kind { kind }).observe(duration.as_secs_f64());
        // Only of models that there are: a client can name any.
        for (direction, count) in [("input", usage.input_tokens), ("output", usage.output_tokens)] {
            if let Some(count) = count.filter(|_| ok) {
                let labels = Tokens { app: app.to_owned(), model: model.to_owned(), direction };
                self.tokens.get_or_create(&labels).inc_by(count.unsigned_abs());
            }
        }
        if let Some(usd) = usage.cost_usd.filter(|_| ok) {
            self.dollars.get_or_create(&Use { app: app.to_owned(), model: model.to_owned() }).inc_by(usd.max(0.0));
        }
    }

    /// Notes whether a standby was there.
    pub fn standby(&self, kind: &'static str, hit: bool) {
        self.standbys.get_or_create(&Found { kind, found: if hit { "hit" } else { "miss" } }).inc();
    }

    /// Notes that an agent was ended.
    pub fn killed(&self, why: &'static str) {
        self.killed.get_or_create(&Why { why }).inc();
    }

    /// All of it, in Prometheus' text format.
    pub fn text(&self, waiting: usize, open_sessions: u32) -> String {
        self.queue_length.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.open_sessions.set(open_sessions.into());
        self.log_dropped.inner().store(log::dropped(), Ordering::Relaxed);
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string takes any text");
        text
    }
}
