//! The operator's commands, one file each.

pub mod backup;
pub mod confine;
pub mod demo;
pub mod doctor;
pub mod fit;
pub mod healthcheck;
pub mod history;
mod http;
pub mod serve;
pub mod token;
pub mod worker;

use anyhow::Context;
use tokio::runtime::Runtime;

fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no threads can be started")
}
