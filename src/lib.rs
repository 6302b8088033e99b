//! clawdforge: an HTTP daemon that runs the real `claude` CLI for the apps on a LAN.
//!
//! The modules, in reading order:
//!
//! - [`config`]: settings, read once into types that can't be wrong
//! - [`boot`]: from settings to a server; [`data_dir`]: its folder
//! - [`server`]: the layers, and [`server::Server::serve`]
//! - [`listener`]: connections, who gets one and how many
//! - [`api`]: HTTP and nothing else, one file per resource
//! - [`app`]: what the handlers share
//! - [`session`]: conversations of many turns, from their creation to their end
//! - [`job`]: runs and turns, from their acceptance to the end of their rows
//! - [`executor`]: where they are carried out, here or by way of [`cluster`]
//! - [`agent`]: what executes them: processes, the `claude` CLI, acpx
//! - [`ledger`]: `SQLite` and nothing else, one file per table
//! - [`schema`]: what a reply has to fit, checked apart from everything else
//! - [`models`]: which models there are, and what other names they go by
//! - [`uploads`]: files that apps sent, on disk
//! - [`sweeper`]: what time takes away
//! - [`log`]: what the operator reads
//! - [`metrics`]: what is counted, for Prometheus
//! - [`network`], [`secret`], [`clock`], [`blocking`]: addresses, tokens, the time, work that takes long
//! - [`cli`]: the operator's commands
//! - [`demo`]: a model stub and an installer of the CLIs, for demonstrations and tests

pub mod agent;
pub mod api;
pub mod app;
pub mod blocking;
pub mod boot;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod data_dir;
pub mod demo;
pub mod executor;
pub mod job;
pub mod ledger;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod models;
pub mod network;
pub mod schema;
pub mod secret;
pub mod server;
pub mod session;
pub mod sweeper;

pub mod ui;
pub mod uploads;
pub mod webhook_target;
pub(crate) mod webhooks;
pub mod wrong_tokens;
