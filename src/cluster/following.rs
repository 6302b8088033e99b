//! What a gateway hears of a job that another machine carries out.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::wire::Line;
use crate::ledger::Machine;

/// A job that another machine carries out.
#[derive(Debug)]
pub(super) struct Following {
    /// Where.
    pub(super) machine: Machine,
    /// Takes what is said of it.
    pub(super) heard: UnboundedSender<Heard>,
    /// How long it was not heard of, while it could have been.
    pub(super) silent: Duration,
    /// How long it is followed.
    pub(super) age: Duration,
    /// Of the machine's last words, one after the other, so many did not name it.
    pub(super) unnamed: u32,
    /// Whether it was asked whether anything more is to come.
    pub(super) doubted: bool,
    /// The first message of it, by its number in the stream.
    pub(super) first: Option<u64>,
    /// Bytes of its lines so far.
    received: u64,
    /// Of them, those of a line that is not whole yet.
    part: Vec<u8>,
}

/// Something that is heard of it.
#[derive(Debug)]
pub(super) enum Heard {
    /// A line.
    Line(Box<Line>),
    /// Nothing more will be.
    Lost,
}

impl Following {
    pub(super) fn new(machine: Machine, heard: UnboundedSender<Heard>) -> Self {
        let (silent, age) = (Duration::ZERO, Duration::ZERO);
        Self { machine, heard, silent, age, unnamed: 0, doubted: false, first: None, received: 0, part: Vec::new() }
    }

    /// Takes a message, which begins behind so many bytes. What was heard before is left out.
    pub(super) fn receive(&mut self, at: u64, payload: &[u8]) {
        self.silent = Duration::ZERO;
        let Some(known) = self.received.checked_sub(at) else {
            tracing::error!(?self.machine, "a part of what was said of a job is lost");
            return self.lose();
        };
        let new = payload.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default();
        self.received += new.len() as u64;
        self.part.extend_from_slice(new);
        let whole = self.part.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let rest = self.part.split_off(whole);
        for line in std::mem::replace(&mut self.part, rest).split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(line) => drop(self.heard.send(Heard::Line(Box::new(line)))),
                Err(error) => {
                    tracing::error!(?self.machine, %error, "what is said of a job can't be read; is it of another release?");
                    return self.lose();
                }
            }
        }
    }

    /// Nothing more is to come.
    pub(super) fn lose(&self) {
        let _ = self.heard.send(Heard::Lost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::contract::Event;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    fn following() -> (Following, UnboundedReceiver<Heard>) {
        let (heard, hears) = unbounded_channel();
        (Following::new(Machine { worker: "b".into(), instance: "1".into() }, heard), hears)
    }

    fn texts(hears: &mut UnboundedReceiver<Heard>) -> Vec<String> {
        let text = |heard| match heard {
            Heard::Line(line) => match *line {
                Line::Event(Event::Text { content }) => content,
                line => format!("{line:?}"),
            },
            Heard::Lost => "lost".to_owned(),
        };
        std::iter::from_fn(|| hears.try_recv().ok()).map(text).collect()
    }

    #[test]
    fn lines_come_whole_and_once_however_they_are_cut_and_repeated() {
        let line = |text: &str| serde_json::to_string(&Line::Event(Event::Text { content: text.into() })).unwrap() + "\n";
        let all = line("a") + &line("b") + &line("c");
        let bytes = all.as_bytes();
        for cut in 1..bytes.len() {
            let (mut following, mut hears) = following();
            following.receive(0, &bytes[..cut]);
            following.receive(0, &bytes[..cut]);
            following.receive(cut as u64, &bytes[cut..]);
            following.receive(0, bytes);
            assert_eq!(texts(&mut hears), ["a", "b", "c"], "{cut}");
        }
        let (mut following, mut hears) = following();
        following.receive(5, &bytes[5..]);
        assert_eq!(texts(&mut hears), ["lost"]);
    }
}
