//! `acpx`, the headless client of the Agent Client Protocol.
//!
//! Behind a live session stand acpx's queue owner, the adapter and the agent. They belong to no command: a prompt that
//! is killed leaves the turn going on in the owner. So a turn is cancelled by acpx's own `cancel`, and only where that
//! does not help is the session's whole family ended. The conversation is on disk, and the next turn goes on from there.

pub mod command;
pub mod turn;
pub mod workspace;
