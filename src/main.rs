//! The command line: parses it, dispatches, and decides the exit code.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use clawdforge::agent::sandbox::{AGENT, CLAUDE};
use clawdforge::cli::{backup, confine, demo, doctor, fit, healthcheck, history, serve, token, worker};

/// Runs the real claude CLI for the apps on your network.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Args),
    Worker(worker::Args),
    Token(token::Args),
    Runs(history::RunsArgs),
    Usage(history::UsageArgs),
    Backup(backup::BackupArgs),
    Restore(backup::RestoreArgs),
    Doctor(doctor::Args),
    Healthcheck(healthcheck::Args),
    Demo(demo::Args),
    Confine(confine::Args),
    Fit(fit::Args),
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    let called = Path::new(&name).file_name().and_then(|name| [AGENT, CLAUDE].into_iter().find(|agent| name == agent.name));
    if let Some(called) = called {
        return finish(confine::run_as(called));
    }
    finish(match Args::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Token(args) => token::run(args),
        Command::Runs(args) => history::runs(args),
        Command::Usage(args) => history::usage(args),
        Command::Backup(args) => backup::backup(args),
        Command::Restore(args) => backup::restore(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Healthcheck(args) => healthcheck::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Confine(args) => confine::run(args),
        Command::Fit(args) => fit::run(args),
    })
}

fn finish(done: anyhow::Result<ExitCode>) -> ExitCode {
    match done {
        Ok(code) => code,
        Err(error) => {
            // Nobody may be there to read it, which must not become another failure.
            let _ = writeln!(std::io::stderr(), "clawdforge: {error:#}");
            ExitCode::FAILURE
        }
    }
}
