//! The `claude` CLI: one process a run, or a completion.

pub mod command;
mod completion;
pub mod files;
mod message;
pub mod models;
mod output;
pub mod run;
pub mod workspace;
