//! The server: [`App`], the one ordered list of layers, and [`Server::serve`].
//!
//! The listener and the stop signal come from outside: production passes a bound port and SIGTERM, tests pass port 0
//! and a token of their own.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::{Router, middleware};
use hyper_util::server::graceful::GracefulShutdown;
use rustix::fs::{Access as AccessMode, access};
use rustix::process::geteuid;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::agent::acpx::Acpx;
use crate::agent::desk::Desks;
use crate::agent::family::{self, Mark};
use crate::agent::memory::Memory;
use crate::agent::programs::{self, ACPX_TESTED, ADAPTER_TESTED, CLAUDE_TESTED, Cli};
use crate::agent::queue::Queue;
use crate::agent::sandbox::Confinement;
use crate::agent::standby::Pool;
use crate::agent::{Environment, Workshop, claude, sandbox};
use crate::api;
use crate::config::{Sandbox, Settings};
use crate::feed::Feeds;
use crate::ledger::Ledger;
use crate::listener::{self, Places, Standing};
use crate::network::Networks;
use crate::runs::{self, Runs};
use crate::secret::TokenHash;
use crate::sessions::Sessions;
use crate::sweeper;
use crate::uploads::Uploads;

/// Open connections beyond those of runs and of the queue; further ones wait to be accepted.
const SPARE_CONNECTIONS: usize = 2048;
/// What the names of unfinished copies of the ledger begin with.
pub(crate) const PARTIAL: &str = ".partial-";
/// How long clients get to take their answers when all work is over.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// What the handlers share.
pub struct App {
    /// Who may call.
    pub access: Access,
    /// The ledger.
    pub ledger: Ledger,
    /// The uploads.
    pub uploads: Uploads,
    /// The runs.
    pub runs: Runs,
    /// What runs and turns say.
    pub feeds: Feeds,
    /// The sessions.
    pub sessions: Sessions,
    /// Agents that sessions may name.
    pub agents: Vec<String>,
    /// What shuts agents out of the data folder: `landlock`, or `off`.
    pub sandbox: &'static str,
    /// The `claude` CLI.
    pub claude: Arc<Cli>,
    /// The `acpx` CLI.
    pub acpx: Arc<Cli>,
    /// The adapter between acpx and claude.
    pub adapter: Arc<Cli>,
}

/// Who may call.
#[derive(Debug)]
pub struct Access {
    /// Networks that are answered at all.
    pub allow: Networks,
    /// Peers whose `X-Forwarded-For` counts.
    pub trusted_proxies: Networks,
    /// The operator's token.
    pub admin: Option<TokenHash>,
    /// Networks that see the metrics without it.
    pub metrics: Networks,
}

impl Access {
    fn standing(&self, address: IpAddr) -> Standing {
        if self.trusted_proxies.contain(address) {
            Standing::Proxy
        } else if self.allow.contain(address) {
            Standing::Allowed
        } else {
            Standing::Stranger
        }
    }
}

/// How a server is told to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Take no more work, and let what is running finish.
    pub begin: CancellationToken,
    /// Don't wait for it any longer.
    pub hurry: CancellationToken,
}

/// A server that is set up and holds its data folder.
pub struct Server {
    app: Arc<App>,
    workshop: Workshop,
    standby: Pool,
    places: Places,
    sweep_every: Duration,
    retention_days: u32,
    drain: Duration,
    /// Held as long as the server is: two servers in one data folder would end each other's runs.
    _lock: std::fs::File,
}

impl Server {
    /// Makes the data folder ready, opens the ledger, and clears away what a crash left. An error says what to do.
    pub async fn set_up(settings: Settings, environment: Environment) -> anyhow::Result<Self> {
        let data_dir = data_dir(&settings.data_dir)?;
        let lock = lock(&data_dir)?;
        check_home(&environment)?;
        remove_partial(&data_dir);
        let folder = |name: &str| {
            let path = data_dir.join(name);
            std::fs::create_dir_all(&path).with_context(|| format!("the folder {} can't be made", path.display()))?;
            anyhow::Ok(path)
        };
        let ledger = Ledger::open(&Settings::ledger_file(&data_dir))?;
        let uploads = Uploads::open(folder("files")?, settings.max_upload_bytes).context("the uploads can't be read")?;
        let confinement = confinement(settings.sandbox, &data_dir, &environment)?;
        let workshop = Workshop {
            folder: folder("runs")?,
            mark: Mark::server(&data_dir)?,
            environment,
            confinement,
            memory: settings.agent_memory_mb.map(Memory::new),
        };
        let feeds = Feeds::new(folder("feeds")?);
        runs::recover(&workshop, &ledger, &feeds, api::render_run).await.context("what an earlier end left can't be cleared away")?;

        let confinement = workshop.confinement.clone().map(|confinement| Confinement { cut_off: false, ..confinement });
        let session_workshop = Workshop { folder: folder("sessions")?, confinement, ..workshop.clone() };
        let claude = data_dir.join(sandbox::CLAUDE.name);
        let _ = std::fs::remove_file(&claude);
        std::os::unix::fs::symlink(std::env::current_exe()?, &claude).with_context(|| format!("{} can't be made", claude.display()))?;
        let claude_program = settings.claude_bin.clone();
        let acpx = Acpx { program: settings.acpx_bin.clone(), workshop: session_workshop, claude_program, claude };
        let desks = Desks::new(workshop.clone(), settings.claude_bin.clone());
        let standby = Pool::new(settings.standby, desks.clone(), acpx.clone());
        let queue = Queue::new(settings.max_runs, settings.max_queued_runs);
        let sessions =
            Sessions::new(queue.clone(), acpx, standby.clone(), ledger.clone(), feeds.clone(), api::render_turn, settings.sessions);
        let turns = sessions.recover().await.context("what an earlier end left can't be cleared away")?;
        if turns > 0 {
            tracing::warn!(turns, "settled turns that an earlier end interrupted");
        }

        let environment = &workshop.environment;
        let app = App {
            adapter: Arc::new(Cli::new(programs::adapter(&settings.acpx_bin, environment), ADAPTER_TESTED, environment)),
            claude: Arc::new(Cli::new(settings.claude_bin, CLAUDE_TESTED, environment)),
            acpx: Arc::new(Cli::new(settings.acpx_bin, ACPX_TESTED, environment)),
            access: Access {
                allow: settings.allow,
                trusted_proxies: settings.trusted_proxies,
                admin: settings.admin,
                metrics: settings.metrics,
            },
            runs: Runs::new(queue, desks, standby.clone(), ledger.clone(), feeds.clone(), api::render_run),
            feeds,
            sessions,
            agents: settings.agents,
            sandbox: if workshop.confinement.is_some() { "landlock" } else { "off" },
            ledger,
            uploads,
        };
        Ok(Self {
            app: Arc::new(app),
            workshop,
            standby,
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

    /// The mark of all that its agents are.
    pub fn mark(&self) -> Mark {
        self.workshop.mark.clone()
    }

    /// Serves until `stop.begin`, then lets running work finish for the drain time, or until `stop.hurry`, and ends what
    /// is left. An error means that the server could not go on.
    pub async fn serve(self, listener: TcpListener, stop: Stop) -> anyhow::Result<()> {
        let mut background = self.background();
        let graceful = GracefulShutdown::new();
        let router = router(self.app.clone());
        let cut = CancellationToken::new();
        let standing = |address| self.app.access.standing(address);
        let resume = async {
            self.app.runs.resume().await?;
            self.app.sessions.resume().await
        };
        // What was started by then has to end too.
        let serve = async {
            resume.await.context("what waited for this start can't be started")?;
            tokio::select! {
                () = stop.begin.cancelled() => Ok(()),
                died = background.join_next() => anyhow::bail!("a background task ended ({died:?}); this is a defect of clawdforge"),
                never = listener::accept(&listener, &self.places, standing, &router, &graceful, &cut) => match never {},
            }
        };
        let served = serve.await;
        drop(listener);
        tracing::info!(drain_secs = self.drain.as_secs(), "stopping: running work may finish");
        tokio::join!(self.drain(&stop, graceful), self.standby.finish());
        cut.cancel();
        background.shutdown().await;
        family::end(&self.workshop.mark).await;
        self.app.sessions.forget_owners().await;
        tracing::info!("stopped");
        served
    }

    /// Lets runs end and clients take their answers, uploads too, for the drain time.
    async fn drain(&self, stop: &Stop, graceful: GracefulShutdown) {
        let [over, ended] = std::array::from_fn(|_| CancellationToken::new());
        let timer = async {
            let _ = timeout(self.drain, stop.hurry.cancelled()).await;
            over.cancel();
            std::future::pending::<()>().await;
        };
        let runs = async {
            tokio::join!(self.app.runs.finish(over.cancelled()), self.app.sessions.finish(over.cancelled()));
            ended.cancel();
        };
        let clients = async {
            let late = async {
                tokio::join!(over.cancelled(), ended.cancelled());
                sleep(LAST_ANSWERS).await;
            };
            tokio::select! {
                () = graceful.shutdown() => {}
                () = late => tracing::warn!("some clients did not take their answers"),
            }
        };
        tokio::select! {
            _ = async { tokio::join!(runs, clients) } => {}
            () = timer => {}
        }
    }

    /// The tasks that the server can't do without.
    fn background(&self) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let (app, period, days) = (self.app.clone(), self.sweep_every, self.retention_days);
        tasks.spawn(async move { sweeper::sweep(period, days, &app).await });
        let standby = self.standby.clone();
        tasks.spawn(async move { standby.keep().await });
        tasks.spawn(family::keep_ending());
        if let Some(memory) = self.workshop.memory.clone() {
            let mark = self.workshop.mark.clone();
            tasks.spawn(async move { memory.watch(&mark).await });
        }
        for cli in [self.app.claude.clone(), self.app.acpx.clone(), self.app.adapter.clone()] {
            let workshop = self.workshop.clone();
            tasks.spawn(async move { cli.watch(&workshop).await });
        }
        tasks
    }
}

/// The one list of layers, the outermost last.
fn router(app: Arc<App>) -> Router {
    api::routes(app.clone())
        .layer(middleware::from_fn(api::body::guard))
        .layer(middleware::from_fn(api::metrics::count))
        .layer(middleware::from_fn_with_state(app, api::auth::admit))
        .layer(CatchPanicLayer::custom(api::error::panicked))
}

/// How agents are to be confined, and can be.
fn confinement(sandbox: Sandbox, data_dir: &Path, environment: &Environment) -> anyhow::Result<Option<Confinement>> {
    if sandbox == Sandbox::Off {
        return Ok(None);
    }
    match sandbox::check(data_dir, environment) {
        Ok(()) => Ok(Some(Confinement { hidden: data_dir.to_owned(), cut_off: true })),
        Err(why) if sandbox == Sandbox::Required => Err(why).context("CLAWDFORGE_SANDBOX is \"required\""),
        Err(why) => {
            tracing::warn!("agents are not shut out of the data folder: {why}");
            Ok(None)
        }
    }
}

/// Makes the data folder, for this user alone. Gives its path with links resolved. A folder that holds things but no
/// ledger is left as it is: whoever named it has mistaken it, or the ledger is lost.
fn data_dir(path: &Path) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut others = entries.filter(|entry| entry.file_name() != "lock" && !is_partial(&entry.file_name()));
    anyhow::ensure!(
        Settings::ledger_file(path).exists() || others.next().is_none(),
        "the folder {} holds things and no ledger; set CLAWDFORGE_DATA_DIR to one of its own, or put a backup of the ledger back with \"clawdforge restore\"",
        path.display()
    );
    own_folder(path)
}

/// What a backup or a restore that was cut short leaves.
fn is_partial(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PARTIAL.as_bytes())
}

fn remove_partial(data_dir: &Path) {
    for entry in std::fs::read_dir(data_dir).into_iter().flatten().flatten().filter(|entry| is_partial(&entry.file_name())) {
        if let Err(error) = std::fs::remove_file(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "a copy of the ledger that was cut short is left");
        }
    }
}

/// Makes a folder that is this user's alone. Gives its path with links resolved.
pub(crate) fn own_folder(path: &Path) -> anyhow::Result<PathBuf> {
    check_writable(path).context("CLAWDFORGE_DATA_DIR")?;
    let make = || {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        path.canonicalize()
    };
    make().with_context(|| {
        format!("the data folder {} can't be used; set CLAWDFORGE_DATA_DIR to one that this user may write", path.display())
    })
}

/// claude's folder: what is wrong with it would show in the first run.
fn check_home(environment: &Environment) -> anyhow::Result<()> {
    claude::config_folder(environment).map_or(Ok(()), |folder| check_writable(&folder))
}

/// Makes sure that a folder that is there can be written. A mount often belongs to someone else.
fn check_writable(folder: &Path) -> anyhow::Result<()> {
    let Ok(metadata) = folder.metadata() else { return Ok(()) };
    access(folder, AccessMode::READ_OK | AccessMode::WRITE_OK | AccessMode::EXEC_OK).map_err(|error| {
        let (folder, owner, user) = (folder.display(), metadata.uid(), geteuid().as_raw());
        anyhow::anyhow!("the folder {folder} belongs to user {owner} and can't be written by user {user}, as which the server runs ({error}); chown it, or name another one")
    })
}

/// Holds the data folder for as long as the file is open.
pub(crate) fn lock(data_dir: &Path) -> anyhow::Result<std::fs::File> {
    let file = data_dir.join("lock");
    let lock = std::fs::File::create(&file).with_context(|| format!("{} can't be written", file.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("{} can't be locked", file.display())),
        Err(std::fs::TryLockError::WouldBlock) => {
            anyhow::bail!(
                "another clawdforge serves the data folder {}; stop it, or set CLAWDFORGE_DATA_DIR to another one",
                data_dir.display()
            )
        }
    }
}
