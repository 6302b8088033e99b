//! The server: the one ordered list of layers, and [`Server::serve`].
//!
//! The listener and the stop signal come from outside: production passes a bound port and SIGTERM, tests pass port 0
//! and a token of their own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::{Router, middleware};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::agent::network::proxy::Proxy;
use crate::agent::tag::Tag;
use crate::api;
use crate::app::App;
use crate::cluster::gateway::Gateway;
use crate::executor::here::Here;
use crate::ledger::Ledger;
use crate::listener::{self, Places};
use crate::sweeper::Sweeper;
use crate::ui;
use crate::webhooks::Webhooks;

/// Open connections beyond those of runs and of the queue; further ones wait to be accepted.
pub(crate) const SPARE_CONNECTIONS: usize = 2048;
/// How long clients get to take their answers when all work is over.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

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
    pub(crate) app: Arc<App>,
    pub(crate) here: Here,
    pub(crate) proxy: Option<Proxy>,
    pub(crate) places: Places,
    pub(crate) sweep_every: Duration,
    pub(crate) retention_days: u32,
    pub(crate) drain: Duration,
    pub(crate) gateway: Option<Gateway>,
    /// Held as long as the server is: two servers in one data folder would end each other's runs.
    pub(crate) _lock: std::fs::File,
}

impl Server {
    /// Its ledger.
    pub fn ledger(&self) -> &Ledger {
        &self.app.ledger
    }

    /// The tag of all that its agents are.
    pub fn tag(&self) -> Tag {
        self.here.launcher.tag.clone()
    }

    /// Serves until `stop.begin`, then lets running work finish for the drain time, or until `stop.hurry`, and ends what
    /// is left. An error means that the server could not go on.
    pub async fn serve(mut self, listener: TcpListener, stop: Stop) -> anyhow::Result<()> {
        let mut background = self.background();
        if let Some(proxy) = self.proxy.take() {
            background.spawn(proxy.serve());
        }
        let port = listener.local_addr()?.port();
        background.spawn(self.app.jobs.clone().make_batches());
        background.spawn(Webhooks { app: self.app.clone(), port }.send());
        let graceful = GracefulShutdown::new();
        let router = router(self.app.clone());
        let cut = CancellationToken::new();
        let standing = |address| self.app.access.standing(address);
        // What was started by then has to end too.
        let serve = async {
            self.app.jobs.resume().await.context("what waited for this start can't be started")?;
            // What is said of jobs that nobody follows is thrown away.
            if let Some(gateway) = self.gateway.take() {
                gateway.begin(&mut background);
            }
            tokio::select! {
                () = stop.begin.cancelled() => Ok(()),
                died = background.join_next() => anyhow::bail!("a background task ended ({died:?}); this is a defect of clawdforge"),
                never = listener::accept(&listener, &self.places, standing, &router, &graceful, &cut) => match never {},
            }
        };
        let served = serve.await;
        drop(listener);
        tracing::info!(drain_secs = self.drain.as_secs(), "stopping: running work may finish");
        tokio::join!(self.drain(&stop, graceful), self.here.backends.warm.finish());
        self.here.finish().await;
        cut.cancel();
        background.shutdown().await;
        self.here.end().await;
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
            tokio::join!(self.app.jobs.finish(over.cancelled()), self.app.sessions.finish(over.cancelled()));
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
        let sweeper = Sweeper {
            sessions: self.app.sessions.clone(),
            uploads: self.app.uploads.clone(),
            ledger: self.app.ledger.clone(),
            feeds: self.app.feeds.clone(),
            run_dirs: self.here.run_dirs.clone(),
            memories: self.here.launcher.memories.clone(),
            retention_days: self.retention_days,
        };
        let period = self.sweep_every;
        tasks.spawn(async move { sweeper.sweep(period).await });
        self.here.begin(&mut tasks);
        let others = self.app.others.iter().map(|other| other.cli.clone());
        for cli in [self.app.claude.clone(), self.app.acpx.clone(), self.app.adapter.clone()].into_iter().chain(others) {
            let launcher = self.here.launcher.clone();
            tasks.spawn(async move { cli.watch(&launcher).await });
        }
        tasks
    }
}

/// The one list of layers, the outermost last.
fn router(app: Arc<App>) -> Router {
    let routes = api::routes(app.clone());
    let routes = if app.ui { routes.merge(ui::routes(app.clone())) } else { routes };
    routes
        .layer(middleware::from_fn(api::body::guard))
        .layer(middleware::from_fn(api::metrics::count))
        .layer(middleware::from_fn_with_state(app, api::auth::admit))
        .layer(CatchPanicLayer::custom(api::error::panicked))
        .layer(middleware::from_fn(api::v1::refusal::translate))
}
