//! A server and the machines that work for it, with a real NATS server between them, where something of it fails. What needs no failure is
//! tried by the other tests with `CLAWDFORGE_TEST_WORKERS=2`.

#![allow(unreachable_pub, missing_docs, reason = "a test binary has no public items")]

mod access;
mod chaos;
#[path = "../api/harness.rs"]
mod harness;
mod house;
mod operator;
mod sessions;

use house::{Proxy, background, ended, is_left_out};
