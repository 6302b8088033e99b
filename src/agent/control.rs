//! What goes between an agent at work and whoever has it work.

use tokio::sync::oneshot;

use super::contract::{Event, Outcome};

/// Takes what an agent says, as it comes.
pub type Emit<'a> = &'a (dyn Fn(Event) + Send + Sync);

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
