//! From settings to a server that holds its data folder, has its ledger open, and has cleared away what a crash left.

use std::sync::Arc;

use anyhow::Context;

use crate::agent::environment::Environment;
use crate::agent::kinds::{self, Kind};
use crate::agent::programs::{self, ACPX_TESTED, ADAPTER_TESTED, CLAUDE_TESTED, Cli};
use crate::app::{Access, App, OtherAgent};
use crate::cluster::elsewhere::Elsewhere;
use crate::cluster::gateway::Gateway;
use crate::config::Settings;
use crate::data_dir;
use crate::executor::Executors;
use crate::executor::here::{Here, folder};
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
    let (here, proxy) = Here::set_up(&settings, &data_dir, environment)?;
    let uploads = Uploads::open(here.launcher.uploads.clone(), settings.max_upload_bytes).context("the uploads can't be read")?;
    let feeds = Feeds::new(folder(&data_dir, "feeds")?);
    let lanes = Lanes::default();
    let elsewhere = match &settings.nats {
        Some(nats) => Some(Elsewhere::connect(nats, ledger.gateway().await?, here.launcher.uploads.clone()).await?),
        None => None,
    };
    let executors = Executors::new(here.clone(), settings.max_runs, elsewhere);
    let queue = Queue::new(settings.max_runs, settings.max_queued_runs);
    let jobs = Jobs::new(
        queue.clone(),
        lanes.clone(),
        executors.clone(),
        ledger.clone(),
        feeds.clone(),
        Schemas::new(here.launcher.tag.clone()),
        settings.sessions.most_attached,
        settings.operator_webhook.as_ref().map(|webhook| webhook.url.clone()),
    );
    let sessions = Sessions::new(lanes, executors.clone(), ledger.clone(), feeds.clone(), settings.sessions);
    let gateway = executors.elsewhere().cloned().map(|elsewhere| Gateway {
        elsewhere,
        ledger: ledger.clone(),
        queue: queue.clone(),
        places: settings.max_runs,
        sweep_every: settings.sweep_every,
        sessions: sessions.clone(),
    });
    recover(&here, &jobs, &sessions).await.context("what an earlier end left can't be cleared away")?;

    let environment = &here.launcher.environment;
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
        data_dir,
        ui: settings.ui,
        operator_webhook: settings.operator_webhook,
        elsewhere: executors.elsewhere().cloned(),
        jobs,
        feeds,
        sessions,
        models: Models::new(settings.model_map, here.backends.claude.clone()),
        agents: settings.agents,
        network: here.network.clone(),
        sandbox: if here.launcher.confinement.is_some() { "landlock" } else { "off" },
        ledger,
        uploads,
    };
    Ok(Server {
        app: Arc::new(app),
        here,
        gateway,
        proxy,
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

/// Ends what a crash left running, removes the folders of its runs, and settles its rows. Before the first job.
async fn recover(here: &Here, jobs: &Jobs, sessions: &Sessions) -> anyhow::Result<()> {
    let (processes, folders) = here.clear_away().await?;
    let settled = jobs.settle_interrupted().await?;
    if processes + folders + settled.len() > 0 {
        tracing::warn!(processes, folders, rows = settled.len(), "cleared away what an earlier end left");
    }
    sessions.recover(settled.iter().any(|id| matches!(id, JobId::Turn { .. }))).await?;
    Ok(())
}
