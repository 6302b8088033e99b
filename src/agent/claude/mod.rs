//! The `claude` CLI: one process a run, or a completion.

pub mod command;
mod completion;
mod completion_lines;
pub mod files;
mod message;
pub mod models;
mod output;
mod result;
pub mod run;
pub mod sign_in;
pub mod workspace;
