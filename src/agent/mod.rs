//! What runs agents: one child process and all that it started ([`process`], [`family`]), the `claude` CLI ([`claude`]) and
//! acpx ([`acpx`]), behind one door ([`backend`]) with one contract ([`contract`]). Knows neither HTTP nor the ledger.

pub mod acp;
pub mod acpx;
pub mod backend;
pub mod bounds;
pub mod children;
pub mod claude;
pub mod completion;
pub mod contract;
pub mod control;
pub mod direct;
pub mod environment;
pub mod family;
pub mod folder;
pub mod groups;
pub mod kinds;
pub mod launcher;
pub mod network;
mod proc;
pub mod process;
pub mod programs;
pub mod questions;
pub mod sandbox;
pub mod stream_event;
pub mod tag;
pub mod turn;
pub mod warm_pool;
