//! The real CLIs against the model stub.

#![allow(unreachable_pub, missing_docs, reason = "a test binary has no public items")]

mod completions;
mod demo;
mod direct;
mod forge;
#[path = "../api/harness.rs"]
mod harness;
mod memory;
mod network;
mod others;
mod permissions;
mod questions;
#[path = "../api/receiver.rs"]
mod receiver;
mod run;
mod sandbox;
mod sessions;
mod sign_in;
mod standby;
mod work;

use forge::{Forge, clis, say};
