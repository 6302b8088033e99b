//! One agent process, from its start to the end of everything it started.
//!
//! [`start`] starts it, and it may wait for its input as long as one likes. [`converse_and`] owns it from then on: it writes
//! the input, reads the output line by line, drains the standard error, and ends it in one of the ways that [`End`] names.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process, setpriority_process};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::children::{self, Started};
use super::family;
use super::tag::Tag;
use crate::metrics::METRICS;

/// The longest line of output that is kept, in bytes.
pub const MAX_LINE: usize = 32 << 20;
/// How long an agent may take to end after SIGINT. `claude` needs 0.13 s, in which it ends its tools' commands too.
const INTERRUPT_GRACE: Duration = Duration::from_secs(2);
/// How long an agent that was given nothing to do may take to end when its input is closed. `claude` needs 0.03 s.
const CLOSED_GRACE: Duration = Duration::from_millis(500);
/// How long an agent may go on after its answer, or after it closed its output.
const LINGER: Duration = Duration::from_secs(3);
/// How long the pipes may stay open when nothing is left that could write to them.
const PIPE_GRACE: Duration = Duration::from_secs(1);
/// Characters of standard error that are kept.
const STDERR_CHARACTERS: usize = 4000;
/// Bytes of it, enough for characters of any width.
const STDERR_KEPT: usize = 4 * STDERR_CHARACTERS;

/// A line of an agent's standard output, without its end.
#[derive(Debug)]
pub enum Line<'a> {
    /// A line, or what stood after the last one.
    Whole(&'a [u8]),
    /// A line of more than [`MAX_LINE`] bytes, which is not kept. Said as soon as it is too long.
    TooLong,
}

/// What the reader of the lines wants next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Further lines.
    More,
    /// Further lines, when the agent has read these.
    Say(Vec<u8>),
    /// The answer is complete: close the agent's input and let it end.
    Answered,
    /// The output is of no use: end the agent.
    Stop,
}

/// How an agent process ended.
#[derive(Debug)]
pub enum End {
    /// By itself.
    Exited(ExitStatus),
    /// It was ended because it closed its output and went on, or went on after its answer.
    Lingered,
    /// It was ended because the reader wanted no more.
    Stopped,
    /// It was ended because its time was up.
    TimedOut,
    /// It was ended because nobody wants its answer any more.
    Cancelled,
    /// It was ended because it said nothing at all for as long as it had patience.
    Silent,
}

impl End {
    /// Why it had to be ended, if it did not end by itself.
    fn why_killed(&self) -> Option<&'static str> {
        Some(match self {
            Self::Exited(_) => return None,
            Self::Lingered => "lingered",
            Self::Stopped => "useless output",
            Self::TimedOut => "timeout",
            Self::Cancelled => "cancelled",
            Self::Silent => "silent",
        })
    }
}

/// An agent process that is over.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub end: End,
    /// The last 4,000 characters of its standard error.
    pub stderr: String,
    /// Whether it printed a line.
    pub spoke: bool,
}

impl Finished {
    /// Whether it ended without a word although somebody was still listening: then it can't have begun to work.
    pub fn never_spoke(&self) -> bool {
        !self.spoke && matches!(self.end, End::Exited(_) | End::Lingered | End::Silent)
    }
}

/// What is said to an agent, and for how long it is listened to.
pub struct ConverseOptions<'a> {
    /// What it reads first.
    pub input: Vec<u8>,
    /// Whether its input stays open until it has answered.
    pub hold_input: bool,
    /// Comes when its time is up.
    pub time_up: BoxFuture<'a, ()>,
    /// When nobody wants its answer any more.
    pub cancel: &'a CancellationToken,
    /// How long it may say nothing at all; `None` for as long as it likes.
    pub patience: Option<Duration>,
    /// What else it is to read, as it comes. At its end the input is closed, where that is held open.
    pub more: Option<mpsc::UnboundedReceiver<Vec<u8>>>,
}

/// An agent process that waits for its input.
#[derive(Debug)]
pub struct Waiting {
    agent: Started,
    stdin: ChildStdin,
    stdout: ChildStdout,
    stderr: ChildStderr,
}

/// Starts `command`. An error means that the program could not be started.
pub fn start(command: &mut Command, tag: &Tag) -> io::Result<Waiting> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut agent = children::start(command, tag)?;
    let stdin = agent.child.stdin.take().expect("stdin is piped");
    let stdout = agent.child.stdout.take().expect("stdout is piped");
    let stderr = agent.child.stderr.take().expect("stderr is piped");
    Ok(Waiting { agent, stdin, stdout, stderr })
}

impl Waiting {
    /// Notes that it has been given nothing to do yet, or that it is about to be.
    pub fn set_idle(&self, idle: bool) {
        self.agent.set_idle(idle);
    }

    /// Its process id; `None` where it is over.
    pub fn pid(&self) -> Option<u32> {
        self.agent.child.id()
    }

    /// Has it, and what it starts, take the processor only where nobody else wants it. It has one thread yet.
    pub fn yield_to_others(&self) {
        let pid = self.pid().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        if let Some(Err(error)) = pid.map(|pid| setpriority_process(Some(pid), 19)) {
            tracing::warn!(%error, "a run of a batch can't be made to yield");
        }
    }

    /// Whether it is alive and has printed nothing. Warnings on standard error don't count.
    pub fn is_ready(&mut self) -> bool {
        matches!(self.agent.child.try_wait(), Ok(None)) && rustix::io::ioctl_fionread(&self.stdout).is_ok_and(|unread| unread == 0)
    }

    /// Ends it, and nothing that it started. At the end of its input it ends by itself.
    pub async fn end(self) {
        let Self { mut agent, stdin, .. } = self;
        drop(stdin);
        if timeout(CLOSED_GRACE, agent.child.wait()).await.is_err() {
            let _ = agent.child.start_kill();
            let _ = timeout(INTERRUPT_GRACE, agent.child.wait()).await;
        }
    }
}

/// Starts `command` and talks to it as [`converse_with`] does.
pub async fn converse(
    command: &mut Command,
    tag: &Tag,
    talk: ConverseOptions<'_>,
    read: impl FnMut(Line<'_>) -> Next,
) -> io::Result<Finished> {
    Ok(converse_with(start(command, tag)?, tag, talk, read).await)
}

/// Talks to a process as [`converse_and`] does. When this returns, nothing of its family is alive.
pub async fn converse_with(waiting: Waiting, tag: &Tag, talk: ConverseOptions<'_>, read: impl FnMut(Line<'_>) -> Next) -> Finished {
    converse_and(waiting, talk, read, async |agent, how| {
        if !matches!(how.end, End::Exited(_)) {
            interrupt(agent).await;
        }
        let ended = family::end(tag).await;
        if ended > 0 {
            tracing::debug!(ended, "ended what the agent left running");
        }
    })
    .await
}

/// How a process came to its end.
#[derive(Debug)]
pub struct ExitCause {
    /// By itself, or why it is to be ended.
    pub end: End,
    /// Whether the reader had its answer by then.
    pub answered: bool,
}

/// Writes the input to a process and hands each line of its output to `read`, until it ends, its time is up or it is
/// cancelled. Then `wind_down` ends what is to be ended.
pub async fn converse_and(
    waiting: Waiting,
    talk: ConverseOptions<'_>,
    mut read: impl FnMut(Line<'_>) -> Next,
    wind_down: impl AsyncFnOnce(&mut Started, &ExitCause),
) -> Finished {
    let ConverseOptions { input, hold_input, mut time_up, cancel, patience, mut more } = talk;
    let Waiting { mut agent, mut stdin, stdout, stderr } = waiting;
    agent.set_idle(false);
    let [spoke, given_up, answered, stop, closed, over] = std::array::from_fn(|_| CancellationToken::new());
    let (say, mut to_say) = mpsc::unbounded_channel::<Vec<u8>>();

    let feed = async {
        // A prompt that nobody waits for any more would cost something all the same.
        if !cancel.is_cancelled() {
            // An agent that closes its input early says why in its output.
            let _ = stdin.write_all(&input).await;
        }
        drop(input);
        if hold_input {
            loop {
                tokio::select! {
                    biased;
                    () = answered.cancelled() => break,
                    () = closed.cancelled() => break,
                    Some(more) = to_say.recv() => drop(stdin.write_all(&more).await),
                    next = next_of(&mut more) => match next {
                        Some(more) => drop(stdin.write_all(&more).await),
                        None => break,
                    },
                }
            }
        }
        drop(stdin);
    };
    let listen = async {
        each_line(stdout, |line| {
            // What it says while it is ended for its silence is heard by nobody: it is to count as one that never spoke.
            if given_up.is_cancelled() {
                return;
            }
            spoke.cancel();
            match read(line) {
                Next::More => {}
                Next::Say(more) => drop(say.send(more)),
                Next::Answered => answered.cancel(),
                Next::Stop => stop.cancel(),
            }
        })
        .await;
        closed.cancel();
    };
    let mut tail = Vec::new();
    let streams = async { tokio::join!(feed, listen, keep_tail(stderr, &mut tail)) };
    let silence = async {
        match patience {
            Some(patience) if timeout(patience, spoke.cancelled()).await.is_err() => given_up.cancel(),
            _ => std::future::pending().await,
        }
    };
    let supervise = async {
        let end = tokio::select! {
            biased;
            status = agent.child.wait() => status.map_or(End::Lingered, End::Exited),
            () = stop.cancelled() => End::Stopped,
            () = async { answered.cancelled().await; sleep(LINGER).await } => End::Lingered,
            () = async { closed.cancelled().await; sleep(LINGER).await } => End::Lingered,
            () = cancel.cancelled() => End::Cancelled,
            () = &mut time_up => End::TimedOut,
            () = silence => End::Silent,
        };
        // What it wrote last may still be on its way through the pipe.
        if matches!(end, End::Exited(_)) && !answered.is_cancelled() {
            let _ = timeout(PIPE_GRACE, closed.cancelled()).await;
        }
        if let Some(why) = end.why_killed() {
            METRICS.killed(why);
        }
        let how = ExitCause { end, answered: answered.is_cancelled() };
        wind_down(&mut agent, &how).await;
        let _ = timeout(INTERRUPT_GRACE, agent.child.wait()).await;
        over.cancel();
        how.end
    };
    let (end, ()) = tokio::join!(supervise, async {
        tokio::select! {
            _ = streams => {}
            () = async { over.cancelled().await; sleep(PIPE_GRACE).await } => {}
        }
    });
    Finished { end, stderr: last_characters(&String::from_utf8_lossy(&tail), STDERR_CHARACTERS).to_owned(), spoke: spoke.is_cancelled() }
}

async fn next_of(more: &mut Option<mpsc::UnboundedReceiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match more {
        Some(more) => more.recv().await,
        None => std::future::pending().await,
    }
}

/// The last characters, at most so many.
pub fn last_characters(text: &str, most: usize) -> &str {
    let start = text.char_indices().rev().nth(most - 1).map_or(0, |(at, _)| at);
    &text[start..]
}

async fn interrupt(agent: &mut Started) {
    // No id: it has been waited for.
    let Some(pid) = agent.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
    let _ = kill_process(pid, Signal::INT);
    let _ = timeout(INTERRUPT_GRACE, agent.child.wait()).await;
}

/// Splits a stream into lines, in bounded memory, to its end.
async fn each_line(mut from: impl AsyncRead + Unpin, mut line: impl FnMut(Line<'_>)) {
    let mut pending = Vec::new();
    // Inside a line that was too long, and said to be.
    let mut skipping = false;
    let mut chunk = vec![0; 64 << 10];
    // A read that fails ends the stream as its end does.
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        for part in chunk[..count].split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = part.strip_suffix(b"\n").map_or((part, false), |text| (text, true));
            if !skipping && pending.len() + text.len() > MAX_LINE {
                line(Line::TooLong);
                skipping = true;
                pending = Vec::new();
            }
            if !skipping {
                pending.extend_from_slice(text);
            }
            if ends {
                if !std::mem::take(&mut skipping) {
                    line(Line::Whole(&pending));
                }
                pending.clear();
            }
        }
    }
    if !pending.is_empty() {
        line(Line::Whole(&pending));
    }
}

async fn keep_tail(mut from: impl AsyncRead + Unpin, tail: &mut Vec<u8>) {
    let mut chunk = vec![0; 8 << 10];
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        tail.extend_from_slice(&chunk[..count]);
        let excess = tail.len().saturating_sub(STDERR_KEPT);
        tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines_of(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let mut lines = Vec::new();
        let reading = each_line(bytes, |line| {
            lines.push(match line {
                Line::Whole(line) => Some(line.to_vec()),
                Line::TooLong => None,
            });
        });
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(reading);
        lines
    }

    proptest! {
        #[test]
        fn lines_are_whole_whatever_the_chunks(lengths in prop::collection::vec(0..150_000_usize, 0..6)) {
            let lines: Vec<_> = lengths.iter().zip(b'a'..).map(|(length, letter)| vec![letter; *length]).collect();
            let text = lines.iter().flat_map(|line| [line.as_slice(), b"\n"].concat()).collect::<Vec<u8>>();
            let expected: Vec<_> = lines.into_iter().map(Some).collect();
            prop_assert_eq!(lines_of(&text), expected);
        }
    }

    #[test]
    fn standard_error_is_cut_by_characters() {
        let long = "ü".repeat(5000);
        assert_eq!(last_characters(&long, 4000), "ü".repeat(4000));
        assert_eq!(last_characters("aüb", 4000), "aüb");
        assert_eq!(last_characters("", 4000), "");
    }

    #[test]
    fn an_endless_line_is_drained_and_not_kept() {
        let mut bytes = vec![b'x'; MAX_LINE + 1];
        assert_eq!(lines_of(&bytes), [None]);
        bytes.extend_from_slice(b"\nnext");
        assert_eq!(lines_of(&bytes), [None, Some(b"next".to_vec())]);
    }
}
