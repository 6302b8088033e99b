//! `clawdforge confine`: restricts itself, and becomes an agent. For the server, which starts agents with it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Parser;

use crate::agent::folder::TEMPORARY;
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

/// Returns only where that failed.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
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
        sandbox::leave_others_alone()?;
    }
    let (program, arguments) = args.command.split_first().context("no program is named")?;
    let mut command = Command::new(program);
    command.args(arguments).envs(args.home.map(|home| ("HOME", home)));
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
