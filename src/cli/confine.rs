//! `clawdforge confine`: restricts itself, and becomes an agent. For the server, which starts agents with it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Parser;

use crate::agent::contract::Network;
use crate::agent::folder::TEMPORARY;
use crate::agent::groups::{self, Most};
use crate::agent::network::{self, Door, namespace};
use crate::agent::sandbox::{self, CalledAs, Reach};

/// Run a program that can't reach the data folder, but for folders of its own
#[derive(clap::Args)]
#[command(
    hide = true,
    after_help = "Example:\n  clawdforge confine --hidden /var/lib/clawdforge --own /var/lib/clawdforge/runs/1 -- claude -p"
)]
pub struct Args {
    /// A folder, absolute and without links: what is outside all of them can be reached
    #[arg(long, value_name = "DIR")]
    hidden: Vec<PathBuf>,
    /// What else can be reached; without this and a hidden folder, everything
    #[arg(long, value_name = "PATH")]
    own: Vec<PathBuf>,
    /// What else can be read
    #[arg(long, value_name = "PATH")]
    read: Vec<PathBuf>,
    /// A control group for it to join
    #[arg(long, value_name = "DIR", requires = "group_processes")]
    group: Option<PathBuf>,
    /// Processes and threads that may be in that
    #[arg(long, value_name = "N", requires = "group")]
    group_processes: Option<u32>,
    /// Bytes of memory that it may have
    #[arg(long, value_name = "BYTES", requires = "group")]
    group_memory: Option<u64>,
    /// Put it into a network of its own, from which the server's proxy leads on by this rule: web or model
    #[arg(long, value_name = "RULE", value_parser = network)]
    network: Option<Network>,
    /// That proxy's socket; without it nothing leads on
    #[arg(long, value_name = "PATH", requires = "network")]
    proxy: Option<PathBuf>,
    /// A port of this machine's loopback at which a model's API is, to be on its own
    #[arg(long, value_name = "PORT", requires = "proxy")]
    model_here: Vec<u16>,
    /// Also cut it off from the processes outside
    #[arg(long)]
    cut_off: bool,
    /// Bytes that a file may have which it writes
    #[arg(long, value_name = "BYTES")]
    file_size: Option<u64>,
    /// Where it works, if that is not here
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Its home folder, where that is another than this process's
    #[arg(long, value_name = "DIR")]
    home: Option<PathBuf>,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

fn network(rule: &str) -> Result<Network, String> {
    Network::named(rule).filter(|rule| *rule != Network::Open).ok_or_else(|| "it is web or model".to_owned())
}

/// Returns only where that failed.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let (Some(group), Some(processes)) = (&args.group, args.group_processes) {
        let joined = groups::join(group, Most { memory: args.group_memory, processes });
        joined.with_context(|| format!("the control group {} can't be joined", group.display()))?;
    }
    let mut port = None;
    if let Some(rule) = args.network {
        // Before all else: what comes then forbids it.
        namespace::enter().context("no network namespace can be made")?;
        let hand_over = |socket: &PathBuf| {
            for port in args.model_here {
                namespace::hand_over(Door::Here(port), socket)?;
            }
            namespace::hand_over(Door::Proxy(rule), socket)
        };
        let handed = args.proxy.as_ref().map(hand_over).transpose();
        port = handed.context("the way out of the network namespace can't be handed over")?;
    }
    let beside = if args.hidden.is_empty() { Vec::new() } else { sandbox::beside(&args.hidden)? };
    let reach = Reach { all: [beside, args.own].concat(), read: args.read };
    let restricted = !reach.all.is_empty();
    if restricted {
        sandbox::restrict(&reach)?;
    }
    sandbox::bound(args.file_size)?;
    if args.cut_off {
        sandbox::cut_off()?;
    }
    if args.cut_off || restricted {
        sandbox::give_up_powers();
        sandbox::leave_others_alone()?;
    }
    let (program, arguments) = args.command.split_first().context("no program is named")?;
    let mut command = Command::new(program);
    command.args(arguments).envs(args.home.map(|home| ("HOME", home)));
    if let Some(port) = port {
        network::tell(&mut command, port);
    }
    if let Some(work) = args.work {
        command.env("TMPDIR", work.join(TEMPORARY)).current_dir(work);
    }
    Err(command.exec()).with_context(|| format!("{} can't be started", program.display()))
}

/// What this program is when it is called by one of an agent's names: that agent, started as a variable says. Returns only
/// where that failed.
pub fn run_as(CalledAs { name, variable }: CalledAs) -> anyhow::Result<ExitCode> {
    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        args: Args,
    }
    let how = std::env::var_os(variable).with_context(|| format!("{name} is for the server, which sets {variable}"))?;
    let arguments = std::iter::once(name.into()).chain(sandbox::unpacked(&how)).chain(std::env::args_os().skip(1));
    run(Alone::parse_from(arguments).args)
}
