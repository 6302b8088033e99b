//! `clawdforge runs` and `clawdforge usage`: what the ledger knows of them, as tables.

use std::process::ExitCode;

use super::token;
use crate::clock;
use crate::config::DataFlags;
use crate::ledger::{RunsWanted, Status};

/// List the newest runs of every app, or of one
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge runs --limit 20\n  clawdforge runs --app cauldron --status failed")]
pub struct RunsArgs {
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
    /// Only runs of this app
    #[arg(long, value_name = "NAME")]
    app: Option<String>,
    /// Only runs of this status
    #[arg(long, value_name = "STATUS")]
    status: Option<String>,
    #[command(flatten)]
    data: DataFlags,
}

/// Sum runs and turns by day, app and model
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge usage --days 7")]
pub struct UsageArgs {
    /// How many days back
    #[arg(long, value_name = "N", default_value_t = 30)]
    days: u32,
    /// Only this app
    #[arg(long, value_name = "NAME")]
    app: Option<String>,
    #[command(flatten)]
    data: DataFlags,
}

/// Prints a line for each run.
pub fn runs(args: RunsArgs) -> anyhow::Result<ExitCode> {
    let RunsArgs { limit, app: app_name, status, data } = args;
    let none_of = |_| anyhow::anyhow!("--status is none of {}", Status::ALL.map(Status::as_str).join(", "));
    let status = status.map(|word| word.parse().map_err(none_of)).transpose()?;
    let wanted = RunsWanted { app_name, status, limit, characters: 60, ..RunsWanted::default() };
    let ledger = token::open(&data.read())?;
    println!("{:<32} {:<16} {:<11} {:<12} {:>10} {:>9} {:>8}  PROMPT", "RUN", "APP", "STATUS", "MODEL", "STARTED", "MS", "USD");
    for run in super::runtime()?.block_on(ledger.runs(wanted))? {
        let end = run.finished.map(|(_, end)| end);
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let ms = text(end.as_ref().map(|end| end.duration_ms.to_string()));
        let usd = text(end.and_then(|end| end.cost_usd).map(|usd| format!("{usd:.4}")));
        let prompt: String = run.prompt.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let (run_id, app, model) = (run.id, run.app_name, run.model.or(run.agent).unwrap_or_default());
        println!(
            "{:<32} {app:<16} {:<11} {model:<12} {:>10} {ms:>9} {usd:>8}  {prompt}",
            run_id.to_string(),
            run.status.as_str(),
            run.started_at
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a line for each day, app and model.
pub fn usage(args: UsageArgs) -> anyhow::Result<ExitCode> {
    let UsageArgs { days, app, data } = args;
    let from = clock::midnight() - i64::from(days) * clock::DAY;
    let ledger = token::open(&data.read())?;
    println!(
        "{:<10} {:<16} {:<12} {:>6} {:>6} {:>12} {:>12} {:>9}",
        "DAY", "APP", "MODEL", "RUNS", "TURNS", "TOKENS IN", "TOKENS OUT", "USD"
    );
    for row in super::runtime()?.block_on(ledger.usage(app, from, i64::MAX))? {
        let model = if row.model.is_empty() { "-" } else { &row.model };
        println!(
            "{:<10} {:<16} {model:<12} {:>6} {:>6} {:>12} {:>12} {:>9.4}",
            row.day, row.app_name, row.runs, row.turns, row.input_tokens, row.output_tokens, row.cost_usd
        );
    }
    Ok(ExitCode::SUCCESS)
}
