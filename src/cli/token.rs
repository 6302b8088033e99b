//! `clawdforge token`: mints, lists, changes, rotates and revokes tokens on the ledger itself, with the server running or not.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};

use crate::agent::contract::{Network, Rules};
use crate::agent::network;
use crate::clock;
use crate::config::{self, DataFlags, Settings};
use crate::ledger::{Ledger, Limits, TokenChange};
use crate::network::Networks;
use crate::secret::{self, TokenHash};

/// Create, list, change, rotate and revoke the apps' tokens
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  clawdforge token create cauldron --cidr 172.24.0.0/16\n  clawdforge token list\n  clawdforge token revoke cauldron"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Mint a token and print it, once
    #[command(
        after_help = "Example:\n  clawdforge token create cauldron --cidr 172.24.0.0/16 --cidr 10.0.0.5 --max-concurrent 2 --daily-usd 5"
    )]
    Create {
        /// What the app's records are filed under
        name: String,
        /// A network that the token may be used from; none means anywhere that the server answers
        #[arg(long = "cidr", value_name = "CIDR")]
        cidrs: Vec<String>,
        /// Runs and turns that the app may have at once; further ones wait
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        max_concurrent: Option<u32>,
        /// US dollars a day (UTC) after which its runs and turns are refused
        #[arg(long, value_name = "USD", value_parser = dollars)]
        daily_usd: Option<f64>,
        /// What its agents reach of the network: open, web (ports 80 and 443 outside private networks) or model (the models' APIs) [default: open]
        #[arg(long, value_name = "RULE", value_parser = network)]
        network: Option<Network>,
        /// Keep claude's memories from run to run
        #[arg(long)]
        keep_home: bool,
        #[command(flatten)]
        data: DataFlags,
    },
    /// List the tokens
    #[command(after_help = "Example:\n  clawdforge token list --data-dir /var/lib/clawdforge")]
    List {
        #[command(flatten)]
        data: DataFlags,
    },
    /// Change a token that is in force, from its next request on; what is not named stays
    #[command(after_help = "Example:\n  clawdforge token change cauldron --daily-usd 5 --max-concurrent any")]
    Change {
        /// The token's name
        name: String,
        /// The networks that it may be used from instead, or any
        #[arg(long = "cidr", value_name = "CIDR|any")]
        cidrs: Vec<String>,
        /// Runs and turns that the app may have at once, or any
        #[arg(long, value_name = "N|any", value_parser = at_once)]
        max_concurrent: Option<Limit<u32>>,
        /// US dollars a day (UTC), or any
        #[arg(long, value_name = "USD|any", value_parser = daily)]
        daily_usd: Option<Limit<f64>>,
        /// What its agents reach of the network: open, web or model
        #[arg(long, value_name = "RULE", value_parser = network)]
        network: Option<Network>,
        /// What lasts from run to run: nothing (fresh), or claude's memories (kept)
        #[arg(long, value_name = "HOME", value_parser = Rules::HOMES)]
        home: Option<String>,
        #[command(flatten)]
        data: DataFlags,
    },
    /// Give an app a new token, and print it, once
    #[command(after_help = "Example:\n  clawdforge token rotate cauldron --grace-secs 86400")]
    Rotate {
        /// The token's name
        name: String,
        /// For how many seconds the old one is good, too
        #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(i64).range(0..=2_592_000))]
        grace_secs: i64,
        #[command(flatten)]
        data: DataFlags,
    },
    /// Take a token out of force from its next request on
    #[command(after_help = "Example:\n  clawdforge token revoke cauldron")]
    Revoke {
        /// The token's name
        name: String,
        #[command(flatten)]
        data: DataFlags,
    },
}

/// Does what the subcommand says.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(async {
        match args.command {
            Command::Create { name, cidrs, max_concurrent, daily_usd, network, keep_home, data } => {
                let rules = Rules { network: network.unwrap_or_default(), memory: keep_home.then(|| name.clone()) };
                create(&open(&data.read())?, &name, cidrs, Limits { max_concurrent, daily_usd }, &rules).await
            }
            Command::List { data } => list(&open(&data.read())?).await,
            Command::Change { name, cidrs, max_concurrent, daily_usd, network, home, data } => {
                let change = TokenChange {
                    networks: (!cidrs.is_empty())
                        .then(|| Networks::parse(cidrs.iter().filter(|cidr| *cidr != ANY)))
                        .transpose()
                        .context("--cidr")?,
                    max_concurrent: max_concurrent.map(|Limit(most)| most),
                    daily_usd: daily_usd.map(|Limit(usd)| usd),
                    network,
                    home: home.and_then(|home| Rules::HOMES.into_iter().find(|known| *known == home)),
                    webhook: None,
                };
                change_token(&open(&data.read())?, &name, change).await
            }
            Command::Rotate { name, grace_secs, data } => rotate(&open(&data.read())?, &name, grace_secs).await,
            Command::Revoke { name, data } => revoke(&open(&data.read())?, &name).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A limit, or none.
#[derive(Clone, Copy, Debug)]
struct Limit<T>(Option<T>);

/// How it is said that there is none.
const ANY: &str = "any";

fn at_once(text: &str) -> Result<Limit<u32>, &'static str> {
    let most = || text.parse().ok().filter(|most| *most > 0).ok_or("not a number from 1 on, nor \"any\"");
    Ok(Limit((text != ANY).then(most).transpose()?))
}

fn daily(text: &str) -> Result<Limit<f64>, &'static str> {
    Ok(Limit((text != ANY).then(|| dollars(text)).transpose()?))
}

fn network(rule: &str) -> Result<Network, &'static str> {
    Network::named(rule).ok_or("it is open, web or model")
}

fn dollars(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|usd: &f64| usd.is_finite() && *usd >= 0.0).ok_or("not an amount of dollars such as 2.50")
}

/// The ledger of a data folder that a server has served.
pub(super) fn open(data_dir: &Path) -> anyhow::Result<Ledger> {
    let file = Settings::ledger_file(data_dir);
    ensure!(file.is_file(), "there is no ledger at {}; start the server once, or name its folder with --data-dir", file.display());
    Ledger::open(&file).with_context(|| file.display().to_string())
}

async fn create(ledger: &Ledger, name: &str, cidrs: Vec<String>, limits: Limits, rules: &Rules) -> anyhow::Result<()> {
    ensure!(secret::is_token_name(name), "{}", secret::TOKEN_NAME_RULE);
    let networks = Networks::parse(cidrs).context("--cidr")?;
    if rules.network != Network::Open {
        network::check(&config::agents_environment()?).context("--network")?;
    }
    let token = secret::app_token();
    ledger.create_token(name, &TokenHash::of(&token), &networks, limits, rules).await??;
    println!("{token}");
    eprintln!("This is the only time that the token of {name} is shown.");
    Ok(())
}

const NO_TOKEN: &str = "\"clawdforge token list\" shows those that are in force";

async fn change_token(ledger: &Ledger, name: &str, change: TokenChange) -> anyhow::Result<()> {
    if change.network.is_some_and(|rule| rule != Network::Open) {
        network::check(&config::agents_environment()?).context("--network")?;
    }
    ensure!(ledger.change_token(name, change).await?, "no token is named \"{name}\"; {NO_TOKEN}");
    println!("{name} is changed.");
    Ok(())
}

async fn rotate(ledger: &Ledger, name: &str, grace: i64) -> anyhow::Result<()> {
    let token = secret::app_token();
    let rotated = ledger.rotate_token(name, &TokenHash::of(&token), clock::now() + grace).await?;
    ensure!(rotated, "no token is named \"{name}\"; {NO_TOKEN}");
    println!("{token}");
    eprintln!("This is the only time that the new token of {name} is shown. The old one is good for {grace} seconds more.");
    Ok(())
}

async fn list(ledger: &Ledger) -> anyhow::Result<()> {
    println!(
        "{:<24} {:<8} {:>12} {:>12} {:>8} {:>8} {:<7} {:<5}  NETWORKS",
        "NAME", "ENABLED", "CREATED", "LAST USED", "AT ONCE", "USD/DAY", "REACHES", "HOME"
    );
    for token in ledger.tokens().await? {
        let last_used = token.last_used.map_or_else(|| "never".to_owned(), |at| at.to_string());
        let networks = if token.ip_cidrs.is_empty() { "any" } else { &token.ip_cidrs };
        let enabled = if token.enabled { "yes" } else { "no" };
        let at_once = token.limits.max_concurrent.map_or_else(|| "any".to_owned(), |most| most.to_string());
        let usd = token.limits.daily_usd.map_or_else(|| "any".to_owned(), |usd| usd.to_string());
        let (reaches, home) = (token.rules.network.as_str(), token.rules.home());
        println!(
            "{:<24} {enabled:<8} {:>12} {last_used:>12} {at_once:>8} {usd:>8} {reaches:<7} {home:<5}  {networks}",
            token.name, token.created_at
        );
    }
    Ok(())
}

async fn revoke(ledger: &Ledger, name: &str) -> anyhow::Result<()> {
    ensure!(ledger.revoke_token(name).await?, "no token is named \"{name}\"; \"clawdforge token list\" shows those that are");
    println!("{name} is revoked.");
    Ok(())
}
