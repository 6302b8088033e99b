//! More than one machine: a gateway, which has the tokens, the ledger and the feeds, hands work out over NATS `JetStream`, and workers carry it out.
//!
//! What goes between them is [`wire`]. The gateway's side is [`elsewhere`], what a job or a session is told through, and [`gateway`], what goes
//! on beside; a worker's is [`worker`]. [`hub`] is the connection of both.

pub mod elsewhere;
mod files;
mod following;
pub mod gateway;
pub mod hub;
mod lines;
mod machines;
pub mod wire;
pub mod worker;
