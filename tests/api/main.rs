//! The server over a real socket. Where claude must misbehave, a script stands in for it.

#![allow(unreachable_pub, missing_docs, reason = "a test binary has no public items")]

mod access;
mod batches;
mod direct;
mod errors;
mod files;
mod harness;
mod history;
mod job;
mod limits;
mod model_apis;
mod operator;
mod permissions;
mod receiver;
mod run;
mod schema;
mod sessions;
mod standby;
mod stop;
mod tokens;
mod ui;
mod webhooks;
mod work;
