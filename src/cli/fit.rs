//! `clawdforge fit`: checks a schema, or a reply against one, in a process that can be ended. For the server.

use std::process::ExitCode;

use crate::schema;

/// Say whether a reply fits a JSON Schema, both on standard input
#[derive(clap::Args)]
#[command(hide = true, after_help = "Example:\n  echo '{\"schema\": {\"type\": \"object\"}, \"reply\": \"{}\"}' | clawdforge fit")]
pub struct Args {}

/// Prints a line of JSON.
pub fn run(Args {}: Args) -> anyhow::Result<ExitCode> {
    println!("{}", schema::answer(&std::io::read_to_string(std::io::stdin())?)?);
    Ok(ExitCode::SUCCESS)
}
