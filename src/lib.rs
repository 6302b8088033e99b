//! clawdforge: an HTTP daemon that runs the real `claude` CLI for the apps on a LAN.
//!
//! The modules, in reading order:
//!
//! - [`config`]: settings, read once into types that can't be wrong
//! - [`server`]: [`server::App`], the layers, and [`server::Server::serve`]
//! - [`listener`]: connections, who gets one and how many
//! - [`api`]: HTTP and nothing else, one file per resource
//! - [`agent`]: what runs agents: processes, the `claude` CLI, the queue
//! - [`ledger`]: `SQLite` and nothing else, one file per table
//! - [`runs`]: a run, from its place in the queue to the end of its row
//! - [`sessions`]: conversations of many turns
//! - [`feed`]: what they say while they go on, for any number of readers
//! - [`schema`]: what a reply has to fit, checked apart from everything else
//! - [`uploads`]: files that apps sent, on disk
//! - [`sweeper`]: what time takes away
//! - [`log`]: what the operator reads
//! - [`metrics`]: what is counted, for Prometheus
//! - [`network`], [`secret`], [`clock`]: addresses, tokens, the time
//! - [`cli`]: the operator's commands
//! - [`demo`]: a model stub and an installer of the CLIs, for demonstrations and tests

pub mod agent;
pub mod api;
pub mod cli;
pub mod clock;
pub mod config;
pub mod demo;
pub mod feed;
pub mod ledger;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod network;
pub mod runs;
pub mod schema;
pub mod secret;
pub mod server;
pub mod sessions;
pub mod sweeper;
pub mod uploads;
