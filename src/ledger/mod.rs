//! The ledger: `SQLite` and nothing else. One file per table; SQL stands nowhere but here.
//!
//! People query the file by hand, so columns have plain names. Writes go through one thread (`writer.rs`). Two more connections keep
//! who-may-call answers apart from the records, and both from the history: a ledger that another program has locked delays a
//! run's row, not the look-up of a token.

mod batches;
mod copy;
mod db;
mod deliveries;
mod error;
mod files;
mod history;
mod idempotency;
mod job;
mod jobs;
mod migrations;
mod past;
mod permissions;
mod recover;
mod responses;
mod sessions;
mod status;
mod tokens;
mod usage;
mod used;
mod workers;
mod writer;

pub use batches::{Batch, BatchLine, BatchResult};
pub use copy::{NoLedger, check, copy, settle};
pub use db::Ledger;
pub use deliveries::{Delivery, Due, OPERATOR, Tried};
pub use error::Error;
pub use files::File;
pub use history::{RunsWanted, SessionsWanted, Step};
pub use idempotency::{Claimed, Key};
pub use job::{Finish, Finished, Inserted, JobEnd, JobId, JobRow, Machine, NewJob, Queued};
pub use past::PastRun;
pub use permissions::AnsweredRow;
pub use recover::{GoingOnElsewhere, WaitingJob};
pub use responses::KeptResponse;
pub use sessions::{BeginSession, NewSession, Session};
pub use status::Status;
pub use tokens::{App, Limits, NameTaken, TokenChange, TokenRow};
pub use usage::{Group, Percentiles, UsageRow, UsageSlice, UsageWanted};
pub use workers::WorkerRow;
