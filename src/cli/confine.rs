//! `clawdforge confine`: restricts itself, and becomes an agent. For the server, which starts agents with it.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::agent::sandbox;

/// Run a program that can't reach the data folder, but for a folder of its own
#[derive(clap::Args)]
#[command(
    hide = true,
    after_help = "Example:\n  clawdforge confine --hidden /var/lib/clawdforge --own /var/lib/clawdforge/runs/1 -- claude -p"
)]
pub struct Args {
    /// The data folder, absolute and without links
    #[arg(long, value_name = "DIR")]
    hidden: PathBuf,
    /// The folder in it that is the program's own
    #[arg(long, value_name = "DIR")]
    own: PathBuf,
    /// Also keep it from sending signals to processes outside
    #[arg(long)]
    in_scope: bool,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Returns only where that failed.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    sandbox::restrict(&args.hidden, &args.own)?;
    if args.in_scope {
        sandbox::restrict_signals();
    }
    let (program, arguments) = args.command.split_first().context("no program is named")?;
    become_program(program, arguments)
}

/// What this program is when it is called [`sandbox::IN_SCOPE`]. Returns only where that failed.
pub fn run_in_scope() -> anyhow::Result<ExitCode> {
    let program = std::env::var_os(sandbox::IN_SCOPE_PROGRAM).context("no program is named")?;
    sandbox::restrict_signals();
    become_program(&program, &std::env::args_os().skip(1).collect::<Vec<_>>())
}

fn become_program(program: &OsStr, arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("{} can't be started", program.display()))
}
