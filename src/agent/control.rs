//! What goes between an agent at work and whoever has it work.

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::contract::{Event, Outcome};
use super::questions::Questions;

/// Takes what an agent says, as it comes.
pub type Emit<'a> = &'a (dyn Fn(Event) + Send + Sync);

/// What goes on between an agent at work and whoever has it work.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    /// Takes what it says.
    pub emit: Emit<'a>,
    /// Comes when nobody wants the answer any more.
    pub cancel: &'a CancellationToken,
    /// What it asks before it acts.
    pub questions: &'a Questions,
}

/// Says how the work ended, as soon as that is known. What the agent does from then on changes it no more.
#[derive(Debug)]
pub struct Report(Option<oneshot::Sender<Outcome>>);

impl Report {
    /// A report, and where it comes out.
    pub fn new() -> (Self, oneshot::Receiver<Outcome>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)), receiver)
    }

    /// Says it, unless it was said.
    pub fn say(&mut self, outcome: Outcome) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(outcome);
        }
    }

    /// Whether it was said.
    pub fn is_said(&self) -> bool {
        self.0.is_none()
    }
}
