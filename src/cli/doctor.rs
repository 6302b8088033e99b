//! `clawdforge doctor`: what stands in the way of a run, and what to do about it.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::GetStreamErrorKind;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::healthcheck;
use crate::agent::bounds::Bounds;
use crate::agent::environment::Environment;
use crate::agent::groups::Groups;
use crate::agent::kinds;
use crate::agent::launcher::{Grants, Launcher};
use crate::agent::network;
use crate::agent::process::{self, ConverseOptions, Line, Next};
use crate::agent::programs::{self, ACPX_TESTED, ADAPTER_TESTED, CLAUDE_TESTED, Tested};
use crate::agent::sandbox::{self, Impossible};
use crate::agent::tag::Tag;
use crate::clock;
use crate::cluster::hub::Hub;
use crate::cluster::wire::WORK;
use crate::config::{self, Flags, Nats, Sandbox, Settings};
use crate::ledger::{Ledger, WorkerRow};

/// Free space in the data folder below which the doctor warns, in bytes.
const LITTLE_SPACE: u64 = 1 << 30;

/// Check the CLIs, the sign-in, the data folder and the port
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge doctor --data-dir /var/lib/clawdforge")]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
}

enum Finding {
    Good(String),
    /// Works, but not all of it.
    Warning(String),
    Bad(String),
    /// Nothing to do about, but to know.
    Detail(String),
}
use Finding::{Bad, Detail, Good, Warning};

/// Prints a line for each check. Exit code 1 where a run could not work.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let settings = args.flags.read()?;
    let mut well = true;
    for finding in super::runtime()?.block_on(examine(&settings))? {
        match finding {
            Good(text) => println!("ok       {text}"),
            Warning(text) => println!("warning  {text}"),
            Detail(text) => println!("         {text}"),
            Bad(text) => {
                well = false;
                println!("FAILED   {text}");
            }
        }
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn examine(settings: &Settings) -> anyhow::Result<Vec<Finding>> {
    // The CLIs are tried in a folder of their own: the data folder may be what is wrong.
    let folder = tempfile::tempdir()?;
    let launcher = Launcher {
        folder: folder.path().to_owned(),
        uploads: folder.path().to_owned(),
        tag: Tag::server(folder.path())?,
        environment: config::agents_environment()?,
        confinement: None,
        bounds: Bounds::default(),
        way_out: None,
        memories: folder.path().to_owned(),
    };
    let mut findings = examine_clis(settings, &launcher).await;
    findings.extend(examine_data_dir(&settings.data_dir));
    findings.push(examine_port(settings).await);
    findings.extend(examine_sandbox(settings, &launcher.environment));
    if let Some(nats) = &settings.nats {
        findings.extend(examine_nats(nats, settings).await);
    }
    findings.push(match settings.admin {
        Some(_) => Good("admin token: set".to_owned()),
        None => Warning(
            "admin token: none, so /admin is closed; manage tokens with \"clawdforge token\", or set CLAWDFORGE_ADMIN_TOKEN".to_owned(),
        ),
    });
    Ok(findings)
}

async fn examine_clis(settings: &Settings, launcher: &Launcher) -> Vec<Finding> {
    let mut findings = vec![
        examine_cli("claude", "@anthropic-ai/claude-code", &settings.claude_bin, CLAUDE_TESTED, launcher, Bad).await,
        examine_cli("acpx", "acpx", &settings.acpx_bin, ACPX_TESTED, launcher, Warning).await,
        examine_adapter(settings, launcher).await,
    ];
    for kind in kinds::others(&settings.agents) {
        findings.push(examine_cli(kind.name, kind.package, OsStr::new(kind.program), kind.tested, launcher, Warning).await);
        findings.push(if kind.is_signed_in(&launcher.environment) {
            Good(format!("sign-in of {}: found", kind.name))
        } else {
            Warning(format!("sign-in of {}: none found; {}", kind.name, kind.sign_in.how))
        });
    }
    if let Some(claude) = programs::find(&settings.claude_bin, &launcher.environment) {
        findings.insert(1, examine_sign_in(&claude, launcher).await);
    }
    findings
}

async fn examine_cli(
    name: &str,
    package: &str,
    program: &OsStr,
    tested: Tested,
    launcher: &Launcher,
    missing: fn(String) -> Finding,
) -> Finding {
    match programs::find(program, &launcher.environment) {
        None => missing(format!("{name}: \"{}\" is not on PATH; install it with \"npm install -g {package}\"", program.display())),
        Some(path) => match programs::version(&path, launcher).await {
            Some(version) => examine_version(name, &version, &path, tested),
            None => missing(format!("{name}: {} does not tell its version; try \"{} --version\" by hand", path.display(), path.display())),
        },
    }
}

fn examine_version(name: &str, version: &str, path: &Path, tested: Tested) -> Finding {
    let found = format!("{name}: {version} at {}", path.display());
    if tested.includes(version) {
        return Good(found);
    }
    Warning(format!("{found}; this release was tested with {tested}. It is used all the same: docs/operations.md says how to try it"))
}

async fn examine_adapter(settings: &Settings, launcher: &Launcher) -> Finding {
    let program = programs::adapter(&settings.acpx_bin, &launcher.environment);
    let Some(path) = programs::find(&program, &launcher.environment) else {
        let name = program.display();
        return Warning(format!(
            "adapter: \"{name}\" is not installed, so there are no sessions of claude; install it with \"npm install -g @agentclientprotocol/{name}\""
        ));
    };
    match programs::version(&path, launcher).await {
        Some(version) => examine_version("adapter", &version, &path, ADAPTER_TESTED),
        // Older ones don't tell.
        None => Good(format!("adapter: {}", path.display())),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthStatus {
    logged_in: bool,
    auth_method: Option<String>,
}

async fn examine_sign_in(claude: &Path, launcher: &Launcher) -> Finding {
    const HOW: &str = "run \"claude\" once and sign in, or set CLAUDE_CODE_OAUTH_TOKEN (from \"claude setup-token\") or ANTHROPIC_API_KEY";
    let mut printed = Vec::new();
    let read = |line: Line<'_>| {
        match line {
            Line::Whole(line) if printed.len() < 1 << 16 => printed.extend_from_slice(line),
            _ => return Next::Stop,
        }
        Next::More
    };
    let mut command = launcher.command(claude, &launcher.folder, Grants::default());
    let time_up = Box::pin(sleep(Duration::from_secs(15)));
    let talk =
        ConverseOptions { input: Vec::new(), hold_input: false, time_up, cancel: &CancellationToken::new(), patience: None, more: None };
    let tag = launcher.tag.run("doctor");
    let _ = process::converse(command.args(["auth", "status"]), &tag, talk, read).await;
    match serde_json::from_slice::<AuthStatus>(&printed) {
        Ok(AuthStatus { logged_in: true, auth_method }) => {
            Good(format!("sign-in: by {}", auth_method.as_deref().unwrap_or("a way that claude does not name")))
        }
        Ok(_) => Bad(format!("sign-in: claude is not signed in; {HOW}")),
        Err(_) => Warning(format!("sign-in: claude does not tell; if runs fail to authenticate, {HOW}")),
    }
}

fn examine_data_dir(folder: &Path) -> Vec<Finding> {
    use rustix::fs::{Access, access};
    let shown = folder.display();
    let file = Settings::ledger_file(folder);
    let ledger = if !folder.exists() {
        Warning(format!("data folder: {shown} is not there yet; \"clawdforge serve\" makes it"))
    } else if let Err(error) = access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) {
        Bad(format!("data folder: {shown} can't be written ({error}); make it this user's, or set CLAWDFORGE_DATA_DIR to another one"))
    } else if let Err(error) = file.exists().then(|| Ledger::open(&file)).transpose() {
        Bad(format!("data folder: {shown}: {error}"))
    } else {
        Good(format!("data folder: {shown}"))
    };
    if !folder.exists() {
        return vec![ledger];
    }
    let space = match rustix::fs::statvfs(folder) {
        Ok(disk) => match disk.f_bavail.saturating_mul(disk.f_frsize) {
            free if free < LITTLE_SPACE => Warning(format!("disk: {} MiB free in the data folder; free some space", free >> 20)),
            free => Good(format!("disk: {} GiB free in the data folder", free >> 30)),
        },
        Err(error) => Warning(format!("disk: its free space is not known ({error})")),
    };
    vec![ledger, space]
}

fn examine_sandbox(settings: &Settings, environment: &Environment) -> Vec<Finding> {
    let folder = settings.data_dir.canonicalize().unwrap_or_else(|_| std::path::absolute(&settings.data_dir).unwrap_or_default());
    let shut = if settings.sandbox == Sandbox::Off { Err(Impossible::Off) } else { sandbox::check(&sandbox::hidden(&folder, environment)) };
    let finding = match (settings.sandbox, &shut) {
        (Sandbox::Required, Err(why)) => Bad(format!("sandbox: {why}")),
        (_, Err(why)) => Warning(format!("sandbox: agents can read the ledger, other apps' files and the home folder: {why}")),
        (_, Ok(())) => Good("sandbox: agents are shut out of the data folder and the home folder".to_owned()),
    };
    let network = shut.as_ref().map_err(ToString::to_string);
    let network = network.and_then(|()| network::check(environment).map_err(|why| why.to_string()));
    let network = ("the network, for apps whose token says web or model", network.map(|()| "network namespaces and a proxy"));
    let detail = |(what, how): (&str, Result<&str, String>)| {
        Detail(match how {
            Ok(how) => format!("{what:<74} closed ({how})"),
            Err(why) => format!("{what:<74} open: {why}"),
        })
    };
    let fences = sandbox::fences(shut.as_ref().copied()).into_iter().chain([network]).map(detail);
    let groups = Groups::find().map(|_| "cgroup v2").map_err(|why| why.to_string());
    let how = if groups.is_ok() { "by cgroup v2" } else { "looked at twice a second" };
    let bounds = [
        ("memory", settings.agent_memory_mb, "CLAWDFORGE_AGENT_MEMORY_MB", how),
        ("disk", settings.agent_disk_mb, "CLAWDFORGE_AGENT_DISK_MB", "looked at twice a second"),
    ];
    let bounds = bounds.map(|(what, bound, setting, how)| {
        let what = format!("more {what} than a run or session is to have");
        Detail(match bound {
            Some(mib) => format!("{what:<74} ended past {mib} MiB ({how})"),
            None => format!("{what:<74} open: set {setting}"),
        })
    });
    std::iter::once(finding)
        .chain(fences)
        .chain(bounds)
        .chain([detail(("more processes or processor time than its share", groups))])
        .collect()
}

/// How long NATS may take to be connected.
const CONNECT: Duration = Duration::from_secs(5);
/// From how many milliseconds on the difference of two clocks is worth a word.
const APART: i64 = 2000;

async fn examine_nats(nats: &Nats, settings: &Settings) -> Vec<Finding> {
    let hub = match Hub::connect(nats, "doctor").await {
        Ok(hub) => hub,
        Err(error) => return vec![Bad(format!("NATS: {error:#}"))],
    };
    if timeout(CONNECT, hub.connected()).await.is_err() {
        let why = "does it listen there, is TLS as it wants it, and are the credentials in force?";
        return vec![Bad(format!("NATS: none of the servers that CLAWDFORGE_NATS_URL names can be connected to; {why}"))];
    }
    let begun = Instant::now();
    let stream = hub.jetstream.get_stream(WORK).await;
    let connected = format!("NATS: connected; JetStream answers after {} ms", begun.elapsed().as_millis());
    let mut findings = match stream.map_err(|error| error.kind()) {
        Ok(stream) => vec![
            Good(connected),
            Good(format!("NATS: the stream of work is there, with {} pieces that wait", stream.cached_info().state.messages)),
        ],
        Err(GetStreamErrorKind::JetStream(error)) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
            vec![Good(connected), Warning("NATS: the stream of work is not there yet; \"clawdforge serve\" makes it".to_owned())]
        }
        Err(error) => vec![Bad(format!(
            "NATS: connected, but JetStream does not answer ({error}); start the server with -js, and allow it to this user"
        ))],
    };
    let file = Settings::ledger_file(&settings.data_dir);
    let workers = match file.exists().then(|| Ledger::open(&file)) {
        Some(Ok(ledger)) => ledger.workers().await.unwrap_or_default(),
        _ => Vec::new(),
    };
    findings.extend(workers.into_iter().map(|WorkerRow { name, clock_ms, seen_at, .. }| {
        if clock_ms.abs() > APART {
            Warning(format!("machine {name}: its clock is {clock_ms} ms ahead of this one; have both set by NTP"))
        } else {
            Good(format!("machine {name}: heard of {} s ago, its clock is {clock_ms} ms ahead", clock::now() - seen_at))
        }
    }));
    findings
}

async fn examine_port(settings: &Settings) -> Finding {
    let bind = settings.bind;
    match TcpListener::bind(bind).await {
        Ok(_) => Good(format!("port: {bind} is free")),
        Err(_) if healthcheck::check(healthcheck::reachable(bind)).await.is_ok() => Good(format!("port: a server answers on {bind}")),
        Err(error) => Bad(format!("port: {bind} can't be used ({error}); set CLAWDFORGE_BIND to another address and port")),
    }
}
