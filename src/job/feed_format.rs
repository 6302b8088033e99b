//! How a feed stands in its file: a line of JSON for each event, the end as the last.
//!
//! Earlier releases wrote server-sent events, which none of these lines can be taken for; a feed that they began is gone on with in
//! this form.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::rejection::Rejection;
use crate::agent::contract::{Event, Outcome};

/// The first line: which form the others have.
pub(super) const VERSION: &[u8] = b"{\"feed\":1}\n";
/// Bytes of a line that tell what it is.
const BEGINNING: u64 = 32;

/// How a job ended, for whoever asks.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// An agent was asked.
    Settled {
        /// What came of it.
        outcome: Box<Outcome>,
        /// Of a turn: the session's completed turns.
        turn_index: i64,
    },
    /// None was.
    Rejected(Rejection),
    /// The answer as an earlier release sent it.
    #[serde(skip)]
    Sent {
        /// The HTTP status.
        status: u16,
        /// Whether the body is a problem as RFC 9457 has it.
        problem: bool,
        /// JSON.
        body: Vec<u8>,
    },
}

/// A line of a feed.
#[derive(Debug)]
pub enum Record {
    /// What the agent said, with its number.
    Event(u64, Event),
    /// The end.
    End(u64, End),
    /// A line of an earlier release's, with its end.
    Sent(Vec<u8>),
}

#[derive(Deserialize)]
struct Line {
    id: u64,
    event: Option<Event>,
    end: Option<End>,
}

/// The line of an event.
pub(super) fn event_line(id: u64, event: &Event) -> Vec<u8> {
    line(id, "event", event)
}

/// The line of the end.
pub(super) fn end_line(id: u64, end: &End) -> Vec<u8> {
    line(id, "end", end)
}

// By hand, so that the beginning tells the number and what it is.
fn line(id: u64, kind: &str, value: &impl Serialize) -> Vec<u8> {
    let mut line = format!("{{\"id\":{id},\"{kind}\":").into_bytes();
    serde_json::to_writer(&mut line, value).expect("what is kept is JSON");
    line.extend_from_slice(b"}\n");
    line
}

/// Reads a line. `None` for one that tells nothing.
pub(super) fn parse(line: &[u8]) -> Option<Record> {
    if !line.starts_with(b"{") {
        return Some(Record::Sent(line.to_vec()));
    }
    match serde_json::from_slice(line).ok()? {
        Line { id, event: Some(event), .. } => Some(Record::Event(id, event)),
        Line { id, end: Some(end), .. } => Some(Record::End(id, end)),
        Line { .. } => None,
    }
}

/// The lines that are whole of a feed's first `most` bytes.
pub(super) fn records(file: File, most: u64) -> io::Result<Vec<Record>> {
    let (mut records, mut lines, mut line) = (Vec::new(), BufReader::new(file.take(most)), Vec::new());
    while lines.read_until(b'\n', &mut line)? > 0 {
        records.extend(line.ends_with(b"\n").then(|| parse(&line)).flatten());
        line.clear();
    }
    Ok(records)
}

/// How much of a feed is whole.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Whole {
    pub(super) bytes: u64,
    pub(super) events: u64,
    /// Whether its lines are of this form to their end.
    pub(super) is_current: bool,
}

pub(super) fn whole(file: &mut File) -> io::Result<Whole> {
    let mut whole = Whole::default();
    each_event(file, |line| {
        whole = Whole { bytes: line.end, events: line.id, is_current: line.is_current };
        true
    })?;
    Ok(whole)
}

/// Where the event `id` ends; `0` is before the first.
pub(super) fn end_of_event(file: &mut File, id: u64) -> io::Result<Option<u64>> {
    let mut found = (id == 0).then_some(0);
    if found.is_none() {
        each_event(file, |line| {
            found = (line.id == id).then_some(line.end);
            found.is_none()
        })?;
    }
    Ok(found)
}

/// Where the end of a feed begins, if it has one.
pub(super) fn begin_of_end(file: &mut File) -> io::Result<Option<u64>> {
    let mut at = None;
    each_event(file, |line| {
        at = line.ends.then_some(line.begin);
        at.is_none()
    })?;
    Ok(at)
}

/// The end of a feed, if it has one.
pub(super) fn end(file: &mut File) -> io::Result<Option<End>> {
    let Some(at) = begin_of_end(file)? else { return Ok(None) };
    file.seek(SeekFrom::Start(at))?;
    let mut lines = BufReader::new(file);
    let mut line = Vec::new();
    lines.read_until(b'\n', &mut line)?;
    Ok(match parse(&line) {
        Some(Record::End(_, end)) => Some(end),
        // By an earlier release.
        Some(Record::Sent(_)) => sent(lines)?,
        _ => None,
    })
}

/// The answer, from behind its `event:` line.
fn sent(mut lines: impl BufRead) -> io::Result<Option<End>> {
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 && !line.starts_with(b": ") {
        line.clear();
    }
    let status = String::from_utf8_lossy(&line).into_owned();
    let mut body = Vec::new();
    loop {
        line.clear();
        lines.read_until(b'\n', &mut line)?;
        match line.strip_prefix(b"data: ") {
            Some(data) => body.extend_from_slice(data),
            None => break,
        }
    }
    body.pop();
    let code = status.trim_start_matches(": ").split_whitespace().next().and_then(|code| code.parse().ok());
    Ok(code.map(|status_code| End::Sent { status: status_code, problem: status.contains("problem"), body }))
}

/// An event, as far as it is looked at.
struct Seen {
    id: u64,
    begin: u64,
    end: u64,
    ends: bool,
    is_current: bool,
}

/// Calls `seen` with each whole event, until it says false.
fn each_event(file: &mut File, mut seen: impl FnMut(Seen) -> bool) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut lines = BufReader::with_capacity(1 << 16, file);
    let (mut at, mut id, mut begin) = (0, 0, 0);
    let (mut named_end, mut ends) = (false, false);
    loop {
        // The beginning of the line is enough: a line may be long.
        let mut line = Vec::new();
        let length = lines.by_ref().take(BEGINNING).read_until(b'\n', &mut line)?;
        let whole = line.ends_with(b"\n");
        let rest = if whole { 0 } else { lines.skip_until(b'\n')? };
        at += (length + rest) as u64;
        // Cut short by a crash where it has no end.
        let mut last = [0];
        if length == 0 || (!whole && (lines.get_ref().read_at(&mut last, at - 1)? == 0 || last != *b"\n")) {
            return Ok(());
        }
        let is_current = line.starts_with(b"{");
        if is_current {
            let text = String::from_utf8_lossy(&line);
            let number = text.strip_prefix("{\"id\":").and_then(|rest| rest.split_once(','));
            ends = number.is_some_and(|(_, kind)| kind.starts_with("\"end\":"));
            id = number.and_then(|(number, _)| number.parse().ok()).unwrap_or(id);
        } else if let Some(number) = line.strip_prefix(b"id: ") {
            id = String::from_utf8_lossy(number).trim().parse().unwrap_or(id);
        } else {
            // Events of the same name have no status behind it.
            ends |= named_end && line.starts_with(b": ");
            named_end = matches!(line.as_slice(), b"event: result\n" | b"event: error\n");
        }
        if is_current || line == b"\n" {
            if !seen(Seen { id, begin, end: at, ends, is_current }) {
                return Ok(());
            }
            (begin, ends) = (at, false);
        }
    }
}
