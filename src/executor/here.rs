//! This machine: its agents, with what they need and what is left of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Unmade;
use crate::agent::acpx::command::{Acpx, Target};
use crate::agent::acpx::turn::Turns;
use crate::agent::acpx::workspace::{CONFIG, SessionDir};
use crate::agent::backend::Backends;
use crate::agent::bounds::Bounds;
use crate::agent::claude::files::obstacle_for;
use crate::agent::claude::models::KnownModels;
use crate::agent::claude::run::Claude;
use crate::agent::claude::sign_in::SignIn;
use crate::agent::claude::workspace::{CONFIG_OF_RUN, RunDirs};
use crate::agent::contract::{Conversation, Driver, Setup};
use crate::agent::direct::run::Runs;
use crate::agent::direct::{Direct, Unclaimed};
use crate::agent::environment::Environment;
use crate::agent::family;
use crate::agent::folder::{ATTACHING, clear};
use crate::agent::groups::Groups;
use crate::agent::kinds;
use crate::agent::launcher::Launcher;
use crate::agent::network::proxy::Proxy;
use crate::agent::network::{self, Impossible, WayOut};
use crate::agent::programs;
use crate::agent::sandbox::{self, Confinement};
use crate::agent::tag::Tag;
use crate::agent::warm_pool::{Pool, WarmKey};
use crate::blocking::blocking;
use crate::config::{Sandbox, Settings};

/// What carries out work on this machine. Clones share it.
#[derive(Clone)]
pub struct Here {
    /// What executes runs and turns.
    pub backends: Backends,
    /// Where and with what agents are started.
    pub launcher: Launcher,
    /// The folders of runs.
    pub run_dirs: RunDirs,
    /// Whether agents can be bound in what they reach of the network; why not.
    pub network: Result<(), Impossible>,
    acpx: Acpx,
    sign_in: SignIn,
    /// What speaks to the agents of new sessions.
    driver: Driver,
}

/// A session that is to be: it has a name and perhaps an agent already, and no owner.
pub struct Taken {
    /// The id that it has to have.
    pub session_id: String,
    /// The folder that its agent works in.
    pub cwd: String,
    /// What is to speak to its agent.
    pub driver: Driver,
    ahead: Option<Unclaimed>,
}

impl Here {
    /// Makes ready what agents need in this data folder, and what the ways of those go through that are bound.
    pub fn set_up(settings: &Settings, data_dir: &Path, environment: Environment) -> anyhow::Result<(Self, Option<Proxy>)> {
        let (confinement, network) = confinement(settings, data_dir, &environment)?;
        let socket = data_dir.join("network.sock");
        let models = network::models(&settings.agents, &environment, &settings.model_hosts);
        let way_out = network.is_ok().then(|| WayOut::new(socket.clone(), &models));
        let proxy = network.is_ok().then(|| Proxy::at(&socket, models)).transpose();
        let proxy = proxy.with_context(|| format!("{} can't be made", socket.display()))?;
        let launcher = Launcher {
            way_out,
            memories: data_dir.join("memories"),
            folder: folder(data_dir, "runs")?,
            uploads: folder(data_dir, "files")?,
            tag: Tag::server(data_dir)?,
            confinement,
            environment,
            bounds: Bounds::new(settings.agent_memory_mb, settings.agent_disk_mb, groups(settings.agent_processes)),
        };
        let acpx = acpx(settings, data_dir, &launcher)?;
        let run_dirs = RunDirs::new(launcher.clone(), settings.claude_bin.clone());
        let direct = Direct::new(acpx.clone(), programs::adapter(&settings.acpx_bin, &launcher.environment), settings.agent_idle);
        let renewals = Launcher { folder: folder(data_dir, "sign-in")?, ..launcher.clone() };
        let sign_in = SignIn::new(RunDirs::new(renewals, settings.claude_bin.clone()));
        let warm = Pool::new(settings.standby, run_dirs.clone(), acpx.clone(), direct.clone(), sign_in.clone());
        let backends = Backends {
            claude: Claude::new(run_dirs.clone(), warm.clone(), KnownModels::default()),
            others: Runs::new(direct.clone(), warm.clone()),
            direct,
            acpx: Turns::new(acpx.clone(), warm.clone()),
            warm,
        };
        Ok((Self { backends, launcher, run_dirs, network, acpx, sign_in, driver: settings.driver }, proxy))
    }

    /// Ends what a crash left running, and removes the folders of its runs. Gives how many there were of both.
    pub async fn clear_away(&self) -> anyhow::Result<(usize, usize)> {
        let processes = family::end(&self.launcher.tag).await;
        let folders = [self.launcher.folder.clone(), self.sign_in.folder().to_owned()];
        let folders = blocking(move || folders.iter().map(|folder| clear(folder, |_| false)).sum()).await?;
        Ok((processes, folders))
    }

    /// Has the tasks go on that agents can't do without.
    pub fn begin(&self, tasks: &mut JoinSet<()>) {
        let Backends { warm, direct, .. } = self.backends.clone();
        let rooms: [(_, &[_]); 2] = [(self.launcher.folder.clone(), &CONFIG_OF_RUN), (direct.folder().to_owned(), &[CONFIG])];
        let folders = [self.launcher.folder.clone(), direct.folder().to_owned()];
        tasks.spawn(async move { warm.keep().await });
        tasks.spawn(async move { direct.keep().await });
        let sign_in = self.sign_in.clone();
        tasks.spawn(async move { sign_in.keep(rooms).await });
        tasks.spawn(family::keep_ending());
        let Launcher { bounds, tag, .. } = self.launcher.clone();
        tasks.spawn(async move { bounds.watch(&tag, &folders).await });
    }

    /// Ends the agents of sessions. What they said last gets to the disk.
    pub async fn finish(&self) {
        self.backends.direct.finish().await;
    }

    /// Ends all that is left of any agent.
    pub async fn end(&self) {
        family::end(&self.launcher.tag).await;
        self.forget_owners().await;
    }

    /// What is to speak to an agent of this name. acpx knows others than those that this program does.
    pub fn driver_of(&self, agent: &str) -> Driver {
        if kinds::of(agent).is_some() { self.driver } else { Driver::Acpx }
    }

    fn target(&self, Conversation { session_id, setup, .. }: &Conversation) -> Target {
        self.acpx.target(session_id, setup)
    }

    /// A session that was started ahead, if `ahead` may be looked for, or a name for one.
    pub async fn take_session(&self, setup: &Setup, ahead: bool) -> Taken {
        let driver = self.driver_of(&setup.agent);
        let ahead = if ahead && driver == Driver::Direct { self.backends.warm.take_session(setup).await } else { None };
        let session_id = ahead.as_ref().map_or_else(|| Uuid::now_v7().simple().to_string(), |ahead| ahead.session_id().to_owned());
        let cwd = self.acpx.dir(&session_id).work().display().to_string();
        Taken { session_id, cwd, driver, ahead }
    }

    /// Makes the session, in a folder of its own. Gives what its driver calls it. Where it fails, something may be left.
    pub async fn create_session(
        &self,
        Taken { ahead, .. }: Taken,
        conversation: &Conversation,
        cancel: &CancellationToken,
    ) -> Result<String, Unmade> {
        let warm = &self.backends.warm;
        let _hold = warm.hold();
        let environment = self.launcher.environment.clone();
        if let Some(why) = obstacle_for(&environment).await {
            return Err(Unmade::Failed(why));
        }
        warm.renew_sign_in().await;
        let target = self.target(conversation);
        if ahead.is_none() {
            let dir = target.dir.clone();
            blocking(move || dir.make(&environment)).await?;
        }
        let name = match conversation.driver {
            Driver::Acpx => self.acpx.create(&target, cancel).await?,
            Driver::Direct => self.backends.direct.create(&target, ahead, cancel).await?,
        };
        warm.used(match conversation.driver {
            Driver::Acpx => WarmKey::Turn(target),
            Driver::Direct => WarmKey::Session(conversation.setup.clone()),
        });
        Ok(name)
    }

    /// Ends the agent of a session. Its folder stays.
    pub async fn close_session(&self, conversation: &Conversation) {
        let target = self.target(conversation);
        self.backends.warm.forget_session(&target.name);
        match conversation.driver {
            Driver::Acpx => self.acpx.close(&target).await,
            Driver::Direct => self.backends.direct.end(&target.name).await,
        }
        if let Err(error) = blocking(move || target.dir.forget_owner()).await {
            tracing::warn!(conversation.session_id, %error, "a lock or a socket of acpx may be left until the session is deleted");
        }
    }

    /// Takes away all that there is of a session.
    pub async fn remove_session(&self, session_id: &str) -> std::io::Result<()> {
        self.backends.warm.forget_session(session_id);
        self.backends.direct.end(session_id).await;
        let dir = self.acpx.dir(session_id);
        blocking(move || dir.remove()).await
    }

    /// Notes for whom a session is that was made here.
    pub async fn set_owner(&self, session_id: &str, gateway: String) -> std::io::Result<()> {
        let dir = self.acpx.dir(session_id);
        blocking(move || dir.set_owner(&gateway)).await
    }

    /// The sessions that were made here for others, by for whom.
    pub async fn owned(&self) -> std::io::Result<HashMap<String, Vec<String>>> {
        let folder = self.acpx.launcher.folder.clone();
        blocking(move || {
            let mut owned = HashMap::<String, Vec<String>>::new();
            for session in folder.read_dir()?.flatten() {
                if let Some(gateway) = SessionDir::new(session.path()).owner() {
                    owned.entry(gateway).or_default().push(session.file_name().to_string_lossy().into_owned());
                }
            }
            Ok(owned)
        })
        .await
    }

    /// Brings the folders of sessions up to date that an earlier end left. `interrupted` says whether turns were cut short.
    pub async fn recover_sessions(&self, interrupted: bool) {
        self.each_session(
            "the folder of a session that was started ahead is left",
            |dir| if dir.is_unclaimed() { dir.remove() } else { Ok(()) },
        )
        .await;
        self.each_session("a session's folder may not be up to date", move |dir| {
            // A file of a turn that was being copied.
            let cleared = if interrupted { clear(&dir.work(), |name| !name.starts_with(ATTACHING)).map(drop) } else { Ok(()) };
            cleared.and(dir.renew())
        })
        .await;
        self.forget_owners().await;
    }

    /// Removes what acpx's owners leave when they are killed. Only for when none is alive.
    async fn forget_owners(&self) {
        self.each_session("a lock or a socket of acpx may be left", SessionDir::forget_owner).await;
    }

    /// Does the same to each session's folder. One that fails keeps nobody from the others.
    async fn each_session(&self, trouble: &'static str, work: impl Fn(&SessionDir) -> std::io::Result<()> + Send + 'static) {
        let folder = self.acpx.launcher.folder.clone();
        let each = move || {
            for session in folder.read_dir()?.flatten() {
                if let Err(error) = work(&SessionDir::new(session.path())) {
                    tracing::warn!(path = %session.path().display(), %error, trouble);
                }
            }
            Ok(())
        };
        if let Err(error) = blocking(each).await {
            tracing::warn!(%error, trouble);
        }
    }
}

impl Taken {
    /// Gives it back.
    pub async fn give_back(self) {
        if let Some(ahead) = self.ahead {
            ahead.end().await;
        }
    }
}

/// A folder in the data folder.
pub(crate) fn folder(data_dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
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
    Settings { sandbox, agents_read, nats, .. }: &Settings,
    data_dir: &Path,
    environment: &Environment,
) -> anyhow::Result<(Option<Confinement>, Result<(), Impossible>)> {
    // What lets one in at NATS is no agent's.
    let credentials = nats.iter().filter_map(|nats| nats.credentials.clone());
    let hidden: Vec<_> = sandbox::hidden(data_dir, environment).into_iter().chain(credentials).collect();
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
