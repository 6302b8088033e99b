//! The log: lines on standard error, that nothing waits for.
//!
//! Whoever reads them may leave, as a terminal does that is closed, or stop reading. A line that can't be written is dropped
//! and counted.

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::Level;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Lines that wait to be written, at most.
const WAITING: usize = 10_000;
/// Lines that standard error did not take.
static REFUSED: AtomicU64 = AtomicU64::new(0);
/// Counts those that found no room to wait.
static TOO_MANY: OnceLock<ErrorCounter> = OnceLock::new();

/// Standard error, for whom a write never fails.
struct StandardError;

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if io::stderr().write_all(line).is_err() {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Begins the log, one line an event. A panic is one too. Dropped, the guard waits for the last lines, a second at most.
pub fn begin(format: LogFormat) -> WorkerGuard {
    let (lines, guard) = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(WAITING).finish(StandardError);
    let _ = TOO_MANY.set(lines.error_counter());
    let log = tracing_subscriber::fmt().with_writer(lines).with_target(false).with_max_level(Level::INFO);
    // What it says of its connection is said here, too.
    let own = Targets::new().with_default(Level::INFO).with_target("async_nats", LevelFilter::OFF);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).finish().with(own).init(),
        LogFormat::Json => log.json().flatten_event(true).finish().with(own).init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "panic: {}", panic.payload_as_str().unwrap_or("no message"));
    }));
    guard
}

/// How many lines were dropped.
pub fn dropped() -> u64 {
    let too_many = TOO_MANY.get().map_or(0, ErrorCounter::dropped_lines);
    REFUSED.load(Ordering::Relaxed).saturating_add(too_many.try_into().unwrap_or(u64::MAX))
}
