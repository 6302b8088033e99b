//! `clawdforge worker`: a machine that works for others, and what the operator sees of those that do.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use super::serve::{allow_many_connections, until_signalled, warn_of_unknown_settings};
use super::token::open;
use crate::clock;
use crate::cluster::worker::Worker;
use crate::config::{self, DataFlags, WorkerFlags};
use crate::ledger::Ledger;
use crate::log;
use crate::server::Stop;

/// Carry out work for a server on another machine; or list the machines that do
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Example:\n  CLAWDFORGE_NATS_URL=nats://10.0.0.2:4222 clawdforge worker --data-dir /var/lib/clawdforge-worker\n  clawdforge worker list --data-dir /var/lib/clawdforge"
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: WorkerFlags,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the machines that carry out work, on the server's machine
    #[command(after_help = "Example:\n  clawdforge worker list --data-dir /var/lib/clawdforge")]
    List {
        #[command(flatten)]
        data: DataFlags,
    },
    /// Close the sessions of a machine that does not come back, on the server's machine
    #[command(after_help = "Example:\n  clawdforge worker forget attic --data-dir /var/lib/clawdforge")]
    Forget {
        /// The machine's name
        name: String,
        #[command(flatten)]
        data: DataFlags,
    },
}

/// Works until SIGTERM or Ctrl-C, after which it finishes what it has; a second one ends that at once.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        None => work(args.flags)?,
        Some(Command::List { data }) => super::runtime()?.block_on(async { list(&open(&data.read())?).await })?,
        Some(Command::Forget { name, data }) => super::runtime()?.block_on(async { forget(&open(&data.read())?, &name).await })?,
    }
    Ok(ExitCode::SUCCESS)
}

fn work(flags: WorkerFlags) -> anyhow::Result<()> {
    let settings = flags.read()?;
    let environment = config::agents_environment()?;
    let _log = log::begin(settings.settings.log);
    warn_of_unknown_settings();
    allow_many_connections();
    // Other processes of this user, agents first, can't read what lets one in at NATS.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("the process can't be shielded")?;
    super::runtime()?.block_on(async {
        let worker = Worker::set_up(settings, environment).await?;
        let (tag, stop) = (worker.tag(), Stop::default());
        Box::pin(until_signalled(tag, &stop, worker.work(stop.clone()))).await
    })
}

async fn list(ledger: &Ledger) -> anyhow::Result<()> {
    println!("{:<24} {:>6} {:>6} {:>6} {:>8} {:>9} {:>12}  VERSION", "NAME", "PLACES", "RUNS", "TURNS", "SESSIONS", "CLOCK MS", "SEEN");
    for worker in ledger.workers().await? {
        let seen = match clock::now() - worker.seen_at {
            ago if ago <= 15 => "now".to_owned(),
            ago => format!("{ago} s ago"),
        };
        println!(
            "{:<24} {:>6} {:>6} {:>6} {:>8} {:>9} {seen:>12}  {}",
            worker.name, worker.places, worker.runs, worker.turns, worker.sessions, worker.clock_ms, worker.version
        );
    }
    Ok(())
}

async fn forget(ledger: &Ledger, name: &str) -> anyhow::Result<()> {
    let seen_at = ledger.workers().await?.into_iter().find(|worker| worker.name == name).map(|worker| worker.seen_at);
    ensure!(seen_at.is_none_or(|at| clock::now() - at > 15), "the machine {name} is there; stop it first, if it is not to come back");
    let closed = ledger.forget_worker(name).await?;
    let closed = closed.with_context(|| format!("no machine is named \"{name}\"; \"clawdforge worker list\" shows those that are"))?;
    println!("{name} is forgotten. Sessions that were closed: {closed}.");
    Ok(())
}
