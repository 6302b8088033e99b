//! `clawdforge healthcheck`: whether the server on the configured port is well.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use hyper::{Method, StatusCode};

use super::http;
use crate::config::BindFlags;

/// Exit with 0 where the server on the configured port is well
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge healthcheck --bind 127.0.0.1:8800")]
pub struct Args {
    #[command(flatten)]
    bind: BindFlags,
}

/// Asks the server; an error says what it answered instead.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let address = reachable(args.bind.read()?);
    super::runtime()?.block_on(check(address)).with_context(|| format!("the server on {address} is not well"))?;
    println!("The server on {address} is well.");
    Ok(ExitCode::SUCCESS)
}

/// Asks for `/healthz`. A server that does not answer this machine's own address is well too.
pub(super) async fn check(address: SocketAddr) -> anyhow::Result<()> {
    match http::send(Method::GET, &format!("http://{address}/healthz"), None, None, Duration::from_secs(5)).await? {
        (StatusCode::OK | StatusCode::FORBIDDEN, _) => Ok(()),
        (status, _) => bail!("it answered {status}"),
    }
}

/// The address to ask a server at that listens on `bind`.
pub(super) fn reachable(bind: SocketAddr) -> SocketAddr {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bind.port())
}
