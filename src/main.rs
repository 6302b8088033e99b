//! The command line: parses it, dispatches, and decides the exit code.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use clawdforge::cli::{backup, demo, doctor, healthcheck, serve, token};

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
    Token(token::Args),
    Backup(backup::BackupArgs),
    Restore(backup::RestoreArgs),
    Doctor(doctor::Args),
    Healthcheck(healthcheck::Args),
    Demo(demo::Args),
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Token(args) => token::run(args),
        Command::Backup(args) => backup::backup(args),
        Command::Restore(args) => backup::restore(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Healthcheck(args) => healthcheck::run(args),
        Command::Demo(args) => demo::run(args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("clawdforge: {error:#}");
            ExitCode::FAILURE
        }
    }
}
