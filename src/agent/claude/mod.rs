//! The `claude` CLI: one process a run.

pub mod command;
pub mod files;
mod output;
pub mod run;
pub mod workspace;
