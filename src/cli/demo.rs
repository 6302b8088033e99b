//! `clawdforge demo`: everything real but the model.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use futures_util::FutureExt;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::http;
use super::serve::until_signalled;
use crate::boot;
use crate::config::{Flags, Settings};
use crate::demo;
use crate::demo::install::{self, Clis};
use crate::demo::stub::Stub;
use crate::secret::{self, TokenHash};
use crate::server::Stop;

/// Try everything without an account: the real CLIs against a stub of the model
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge demo --once\n  clawdforge demo --agent codex\n  clawdforge demo --bind 127.0.0.1:8800")]
pub struct Args {
    /// End after showing a run
    #[arg(long)]
    once: bool,
    /// The agent that is shown
    #[arg(long, value_name = "NAME", default_value = "claude", value_parser = demo::AGENTS, conflicts_with = "model_only")]
    agent: String,
    /// Serve the stub of the model alone, for a server or a CLI of your own
    #[arg(long, conflicts_with = "once")]
    model_only: bool,
    /// Address and port to listen on; port 0 is any free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    bind: SocketAddr,
    /// Folder where the CLIs are installed that this machine lacks [default: in the build folder, or in /var/tmp]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// Installs what is missing, serves from a temporary folder, shows a run, and goes on serving until Ctrl-C.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.model_only {
        super::runtime()?.block_on(serve_model(args.bind))?;
        return Ok(ExitCode::SUCCESS);
    }
    let cache = args.cache.clone().unwrap_or_else(install::default_cache);
    let say = |step: &str| println!("{step}");
    let mut clis = install::clis(&cache, &say)?;
    if args.agent != "claude" {
        clis = clis.with_agent(&args.agent, &cache, &say)?;
    }
    let folder = tempfile::Builder::new().prefix("clawdforge-demo-").tempdir().context("no temporary folder can be made")?;
    super::runtime()?.block_on(serve_and_show(&args, &clis, folder.path()))?;
    folder.close().context("the temporary folder was not removed")?;
    Ok(ExitCode::SUCCESS)
}

async fn serve_model(bind: SocketAddr) -> anyhow::Result<()> {
    let stub = Stub::start_on(bind).await.with_context(|| format!("can't listen on {bind}; choose another --bind"))?;
    let url = stub.url();
    println!("The model stub listens until it is ended. For the CLIs:\n\nexport ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY=stub");
    println!("export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=stub OPENAI_MODEL=stub");
    println!("export GOOGLE_GEMINI_BASE_URL={url} GEMINI_API_KEY=stub");
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

async fn serve_and_show(args: &Args, clis: &Clis, folder: &Path) -> anyhow::Result<()> {
    let stub = Stub::start().await.context("the model stub can't listen")?;
    let (home, data_dir) = (folder.join("home"), folder.join("data"));
    std::fs::create_dir(&home)?;
    let listener = TcpListener::bind(args.bind).await.with_context(|| format!("can't listen on {}; choose another --bind", args.bind))?;
    let address = listener.local_addr()?;
    let admin = secret::app_token();
    let settings = Settings {
        bind: address,
        data_dir,
        admin: Some(TokenHash::of(&admin)),
        claude_bin: clis.claude.clone().into(),
        acpx_bin: clis.acpx.clone().into(),
        agents: agents(&args.agent),
        ..Flags::default().read()?
    };
    let server = boot::set_up(settings, demo::environment(clis, &stub.url(), &home)).await?;
    server.ledger().insert_past(demo::past::runs()).await?;
    let stop = Stop::default();
    let url = format!("http://{address}");
    let showing = async {
        // Printing panics where nobody reads; the server and its agents still have to end.
        let showing = AssertUnwindSafe(show(&url, &admin, &args.agent)).catch_unwind();
        let shown = showing.await.unwrap_or_else(|_| Err(anyhow!("nobody reads what is shown")));
        if args.once || shown.is_err() {
            stop.begin.cancel();
        } else {
            println!("\nServing until Ctrl-C.");
        }
        shown
    };
    let serving = until_signalled(server.tag(), &stop, server.serve(listener, stop.clone()));
    let (served, shown) = tokio::join!(serving, showing);
    served.and(shown)
}

/// The agents of a demonstration: the one that is shown, and claude, which makes the runs that name none.
fn agents(shown: &str) -> Vec<String> {
    let mut agents = vec!["claude".to_owned(), shown.to_owned()];
    agents.dedup();
    agents
}

/// Mints a token, makes a run and a session of two turns, and prints them with lines to paste.
async fn show(url: &str, admin: &str, agent: &str) -> anyhow::Result<()> {
    let mint = format!("{url}/admin/tokens");
    for app in demo::past::APPS {
        post(&mint, admin, &json!({"name": app, "ip_cidrs": ["127.0.0.0/8", "::1"], "daily_usd": 2.0})).await?;
    }
    let minted = post(&mint, admin, &json!({"name": "demo"})).await?;
    let token = minted["token"].as_str().context("no token was minted")?;
    println!("The server listens on {url}; the model behind the real {agent} CLI is a stub.\n");
    println!(
        "Admin token  {admin}\nApp token    {token}\nPage         {url}/ui (sign in with the admin token; the runs of the days before are the demo's)\n"
    );

    let mut request = json!({"prompt": "Say hello to the house.", "timeout_secs": 60});
    if agent != "claude" {
        request["agent"] = agent.into();
    }
    println!("POST /run\n{request:#}\n");
    let answer = post(&format!("{url}/run"), token, &request).await?;
    println!("200 OK\n{answer:#}\n");

    let request = if agent == "claude" { json!({}) } else { json!({"agent": agent, "permissions": "approve-all"}) };
    println!("POST /sessions\n{request}\n");
    let session = post(&format!("{url}/sessions"), token, &request).await?;
    let turns = format!("{url}/sessions/{}/turn", session["session_id"].as_str().context("no session was created")?);
    for prompt in ["My name is Mio.", "What was the first thing that I said?"] {
        println!("POST /sessions/…/turn\n{:#}\n", json!({"prompt": prompt}));
        let mut answer = post(&turns, token, &json!({"prompt": prompt})).await?;
        let events = answer["events"].as_array().map_or(0, Vec::len);
        answer["events"] = json!(format!("{events} events"));
        println!("200 OK\n{answer:#}\n");
    }

    println!("Lines to paste (a line \"stub: {{…}}\" in the prompt decides what the model stub does):\n");
    println!("curl -s {url}/healthz");
    for prompt in [r"What is a LAN?", r#"stub: {\"text\": \"{\\\"answer\\\": 42}\"}"#, r#"stub: {\"error\": 401}"#] {
        println!(
            "curl -s {url}/run -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' -d '{{\"prompt\": \"{prompt}\"}}'"
        );
    }
    let chat = r#"{"model": "sonnet", "stream": true, "messages": [{"role": "user", "content": "Hello."}]}"#;
    println!("curl -sN {url}/v1/chat/completions -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' -d '{chat}'");
    println!("curl -s {turns} -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' -d '{{\"prompt\": \"And now?\"}}'");
    println!("curl -s {url}/files -H 'Authorization: Bearer {token}' -F file=@/etc/hostname");
    println!("curl -s {mint} -H 'Authorization: Bearer {admin}'");
    Ok(())
}

async fn post(url: &str, token: &str, body: &Value) -> anyhow::Result<Value> {
    let (status, answer) = http::send(Method::POST, url, Some(token), Some(body.to_string()), Duration::from_secs(90)).await?;
    ensure!(status == StatusCode::OK, "{url} answered {status}: {}", String::from_utf8_lossy(&answer));
    Ok(serde_json::from_slice(&answer)?)
}
