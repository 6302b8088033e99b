//! From settings to a server that holds its data folder, has its ledger open, and has cleared away what a crash left.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

use crate::agent::acpx::command::Acpx;
use crate::agent::acpx::turn::Turns;
use crate::agent::backend::Backends;
use crate::agent::bounds::Bounds;
use crate::agent::claude::models::KnownModels;
use crate::agent::claude::run::Claude;
use crate::agent::claude::sign_in::SignIn;
use crate::agent::claude::workspace::RunDirs;
use crate::agent::direct::Direct;
use crate::agent::direct::run::Runs;
use crate::agent::environment::Environment;
use crate::agent::family;
use crate::agent::folder::clear;
use crate::agent::groups::Groups;
use crate::agent::kinds::{self, Kind};
use crate::agent::launcher::Launcher;
use crate::agent::network::proxy::Proxy;
use crate::agent::network::{self, Impossible, WayOut};
use crate::agent::programs::{self, ACPX_TESTED, ADAPTER_TESTED, CLAUDE_TESTED, Cli};
use crate::agent::sandbox::{self, Confinement};
use crate::agent::tag::Tag;
use crate::agent::warm_pool::Pool;
use crate::app::{Access, App, OtherAgent};
use crate::blocking::blocking;
use crate::config::{Sandbox, Settings};
use crate::data_dir;
use crate::job::Jobs;
use crate::job::feed::Feeds;
use crate::job::lane::Lanes;
use crate::job::queue::Queue;
use crate::ledger::{JobId, Ledger};
use crate::listener::Places;
use crate::models::Models;
use crate::schema::Schemas;
use crate::server::{SPARE_CONNECTIONS, Server};
use crate::session::Sessions;
use crate::uploads::Uploads;
use crate::wrong_tokens::WrongTokens;

/// Makes the data folder ready, opens the ledger, and clears away what a crash left. An error says what to do.
pub async fn set_up(settings: Settings, environment: Environment) -> anyhow::Result<Server> {
    let data_dir = data_dir::make(&settings.data_dir)?;
    let lock = data_dir::lock(&data_dir)?;
    data_dir::check_home(&environment)?;
    data_dir::remove_partial(&data_dir);
    let ledger = Ledger::open(&Settings::ledger_file(&data_dir))?;
    let uploads = folder(&data_dir, "files")?;
    let (confinement, network) = confinement(&settings, &data_dir, &environment)?;
    let socket = data_dir.join("network.sock");
    let models = network::models(&settings.agents, &environment, &settings.model_hosts);
    let way_out = network.is_ok().then(|| WayOut::new(socket.clone(), &models));
    let proxy = network.is_ok().then(|| Proxy::at(&socket, models)).transpose();
    let proxy = proxy.with_context(|| format!("{} can't be made", socket.display()))?;
    let launcher = Launcher {
        way_out,
        memories: data_dir.join("memories"),
        folder: folder(&data_dir, "runs")?,
        uploads: uploads.clone(),
        tag: Tag::server(&data_dir)?,
        confinement,
        environment,
        bounds: Bounds::new(settings.agent_memory_mb, settings.agent_disk_mb, groups(settings.agent_processes)),
    };
    let uploads = Uploads::open(uploads, settings.max_upload_bytes).context("the uploads can't be read")?;
    let feeds = Feeds::new(folder(&data_dir, "feeds")?);
    let acpx = acpx(&settings, &data_dir, &launcher)?;
    let run_dirs = RunDirs::new(launcher.clone(), settings.claude_bin.clone());
    let direct = Direct::new(acpx.clone(), programs::adapter(&settings.acpx_bin, &launcher.environment), settings.agent_idle);
    let renewals = Launcher { folder: folder(&data_dir, "sign-in")?, ..launcher.clone() };
    let sign_in = SignIn::new(RunDirs::new(renewals, settings.claude_bin.clone()));
    let warm = Pool::new(settings.standby, run_dirs.clone(), acpx.clone(), direct.clone(), sign_in.clone());
    let lanes = Lanes::default();
    let claude = Claude::new(run_dirs.clone(), warm.clone(), KnownModels::default());
    let backends = Backends {
        claude: claude.clone(),
        others: Runs::new(direct.clone(), warm.clone()),
        direct: direct.clone(),
        acpx: Turns::new(acpx.clone(), warm.clone()),
        warm: warm.clone(),
    };
    let jobs = Jobs::new(
        Queue::new(settings.max_runs, settings.max_queued_runs),
        lanes.clone(),
        backends,
        ledger.clone(),
        feeds.clone(),
        Schemas::new(launcher.tag.clone()),
        settings.sessions.most_attached,
        settings.operator_webhook.as_ref().map(|webhook| webhook.url.clone()),
    );
    let sessions =
        Sessions::new(lanes, acpx, (direct.clone(), settings.driver), warm.clone(), ledger.clone(), feeds.clone(), settings.sessions);
    recover(&launcher, &sign_in, &jobs, &sessions).await.context("what an earlier end left can't be cleared away")?;

    let environment = &launcher.environment;
    let app = App {
        others: others(&settings, environment),
        adapter: Arc::new(Cli::new(programs::adapter(&settings.acpx_bin, environment), ADAPTER_TESTED, environment)),
        claude: Arc::new(Cli::new(settings.claude_bin, CLAUDE_TESTED, environment)),
        acpx: Arc::new(Cli::new(settings.acpx_bin, ACPX_TESTED, environment)),
        access: Access {
            allow: settings.allow,
            trusted_proxies: settings.trusted_proxies,
            admin: settings.admin,
            metrics: settings.metrics,
            webhooks: settings.webhook_networks,
            wrong: WrongTokens::default(),
        },
        data_dir: data_dir.clone(),
        ui: settings.ui,
        operator_webhook: settings.operator_webhook,
        jobs,
        feeds,
        sessions,
        models: Models::new(settings.model_map, claude),
        agents: settings.agents,
        network,
        sandbox: if launcher.confinement.is_some() { "landlock" } else { "off" },
        ledger,
        uploads,
    };
    Ok(Server {
        app: Arc::new(app),
        launcher,
        run_dirs,
        direct,
        proxy,
        sign_in,
        warm,
        places: Places::new(
            settings.max_runs + settings.max_queued_runs + SPARE_CONNECTIONS,
            settings.max_runs + settings.sessions.most_open,
        ),
        sweep_every: settings.sweep_every,
        retention_days: settings.retention_days,
        drain: settings.drain,
        _lock: lock,
    })
}

/// The agents other than claude that sessions may name.
fn others(settings: &Settings, environment: &Environment) -> Vec<OtherAgent> {
    let other = |kind: &'static Kind| {
        let cli = Arc::new(Cli::new(kind.program.into(), kind.tested, environment));
        OtherAgent { kind, cli, environment: environment.clone() }
    };
    kinds::others(&settings.agents).map(other).collect()
}

fn folder(data_dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = data_dir.join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("the folder {} can't be made", path.display()))?;
    Ok(path)
}

/// acpx, in the folder of the sessions. It has to reach its own sockets; the claude that it starts must not.
fn acpx(settings: &Settings, data_dir: &Path, launcher: &Launcher) -> anyhow::Result<Acpx> {
    let confinement = launcher.confinement.clone().map(|confinement| Confinement { cut_off: false, ..confinement });
    let launcher = Launcher { folder: folder(data_dir, "sessions")?, confinement, ..launcher.clone() };
    let claude = data_dir.join(sandbox::CLAUDE.name);
    let _ = std::fs::remove_file(&claude);
    std::os::unix::fs::symlink(std::env::current_exe()?, &claude).with_context(|| format!("{} can't be made", claude.display()))?;
    Ok(Acpx { program: settings.acpx_bin.clone(), launcher, claude_program: settings.claude_bin.clone(), claude })
}

/// Ends what a crash left running, removes the folders of its runs, and settles its rows. Before the first job.
async fn recover(launcher: &Launcher, sign_in: &SignIn, jobs: &Jobs, sessions: &Sessions) -> anyhow::Result<()> {
    let processes = family::end(&launcher.tag).await;
    let folders = [launcher.folder.clone(), sign_in.folder().to_owned()];
    let folders: usize = blocking(move || folders.iter().map(|folder| clear(folder, |_| false)).sum()).await?;
    let settled = jobs.settle_interrupted().await?;
    if processes + folders + settled.len() > 0 {
        tracing::warn!(processes, folders, rows = settled.len(), "cleared away what an earlier end left");
    }
    sessions.recover(settled.iter().any(|id| matches!(id, JobId::Turn { .. }))).await?;
    Ok(())
}

/// The control groups of agents, if there can be such, and how many processes each may have.
fn groups(processes: u32) -> Option<(Groups, u32)> {
    match Groups::find().and_then(Groups::take) {
        Ok(groups) => Some((groups, processes)),
        Err(why) => {
            tracing::info!("agents have no control groups of their own: {why}");
            None
        }
    }
}

/// How agents are to be confined, and can be, and whether they can be bound in what they reach of the network.
fn confinement(
    Settings { sandbox, agents_read, .. }: &Settings,
    data_dir: &Path,
    environment: &Environment,
) -> anyhow::Result<(Option<Confinement>, Result<(), Impossible>)> {
    let hidden = sandbox::hidden(data_dir, environment);
    let shut = if *sandbox == Sandbox::Off { Err(sandbox::Impossible::Off) } else { sandbox::check(&hidden) };
    match shut {
        Ok(()) => {
            if let Some(path) = agents_read.iter().find(|path| sandbox::is_around(path, &[data_dir.to_owned()])) {
                anyhow::bail!("CLAWDFORGE_AGENTS_READ names {}, which holds the data folder; name less, or move that", path.display());
            }
            let on_path = programs::places_on_path(environment).into_iter().filter(|place| !sandbox::is_around(place, &hidden));
            // A session's claude is started by this program.
            let read = on_path.chain(agents_read.clone()).chain([std::env::current_exe()?]).collect();
            Ok((Some(Confinement { hidden, read, cut_off: true }), network::check(environment)))
        }
        Err(why) if *sandbox == Sandbox::Required => Err(why).context("CLAWDFORGE_SANDBOX is \"required\""),
        Err(why) => {
            if *sandbox == Sandbox::Auto {
                tracing::warn!("agents are not shut out of the data folder: {why}");
            }
            Ok((None, Err(Impossible::Unconfined(why.to_string()))))
        }
    }
}
