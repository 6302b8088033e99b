//! `clawdforge serve`: the daemon.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use anyhow::Context;
use futures_util::FutureExt;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::tag::Tag;
use crate::agent::{children, family};
use crate::boot;
use crate::config::{self, ADMIN_TOKEN, ADMIN_TOKEN_FLAG, ADMIN_TOKEN_SHA256, Flags, WorkerFlags};
use crate::log;
use crate::secret::TokenHash;
use crate::server::Stop;

/// Start the server
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  CLAWDFORGE_ADMIN_TOKEN=\"$(openssl rand -hex 32)\" clawdforge serve --bind 0.0.0.0:8800 --data-dir /var/lib/clawdforge"
)]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Serves until SIGTERM or Ctrl-C; a second one ends running work at once.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let token_shows = args.flags.show_admin_token();
    let settings = args.flags.read()?;
    let environment = config::agents_environment()?;
    if let Some(hash) = settings.admin.as_ref().filter(|_| token_shows) {
        return Err(start_again(hash));
    }
    let _log = log::begin(settings.log);
    warn_of_unknown_settings();
    allow_many_connections();
    // Other processes of this user, agents first, can't read the server's memory or environment.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("the process can't be shielded")?;

    super::runtime()?.block_on(async {
        let bind = settings.bind;
        let listener = TcpListener::bind(bind)
            .await
            .with_context(|| format!("CLAWDFORGE_BIND: can't listen on {bind}; stop what does, or choose another address and port"))?;
        let data_dir = settings.data_dir.clone();
        let server = boot::set_up(settings, environment).await?;
        tracing::info!(address = %listener.local_addr()?, data_dir = %data_dir.display(), version = env!("CARGO_PKG_VERSION"), "listening");
        let (tag, stop) = (server.tag(), Stop::default());
        Box::pin(until_signalled(tag, &stop, server.serve(listener, stop.clone()))).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Serves as a process whose children are all agents, with this tag, until it is told to stop, by signal too.
pub(super) async fn until_signalled(tag: Tag, stop: &Stop, serve: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    children::adopt().context("orphans can't be adopted")?;
    let [mut interrupt, mut terminate] = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?];
    // A terminal that is closed takes the server along, and so what the server must end.
    let mut hangup = signal(SignalKind::hangup())?;
    let signals = async {
        for told in [&stop.begin, &stop.hurry] {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
            told.cancel();
        }
        std::future::pending::<()>().await;
    };
    let reaping = async {
        let failed = children::reap().await;
        tracing::error!(?failed, "orphans are not waited for any more; stopping");
        stop.begin.cancel();
        std::future::pending::<()>().await;
    };
    let serving = async {
        tokio::select! {
            served = serve => served,
            () = signals => Ok(()),
            () = reaping => Ok(()),
        }
    };
    if let Ok(served) = AssertUnwindSafe(serving).catch_unwind().await {
        return served;
    }
    family::end(&tag).await;
    anyhow::bail!("the server met a defect, which its log has as a panic; its agents are ended")
}

/// Replaces this process by one that knows the admin token's hash alone: what a process was started with can be read in
/// `/proc` by every process of the same user, and so by agents. Returns only where that failed.
fn start_again(admin: &TokenHash) -> anyhow::Error {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "clawdforge".into());
    let error = std::process::Command::new("/proc/self/exe")
        .arg0(name)
        .args(without_admin_token(arguments))
        .env_remove(ADMIN_TOKEN)
        .env(ADMIN_TOKEN_SHA256, admin.as_str())
        .exec();
    anyhow::Error::new(error).context("the server can't start itself again without the admin token; is /proc mounted?")
}

fn without_admin_token(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut value_follows = false;
    for argument in arguments {
        let is_flag = argument == ADMIN_TOKEN_FLAG;
        let is_both = argument.as_encoded_bytes().strip_prefix(ADMIN_TOKEN_FLAG.as_bytes()).is_some_and(|rest| rest.starts_with(b"="));
        if !value_follows && !is_flag && !is_both {
            kept.push(argument);
        }
        value_follows = is_flag && !value_follows;
    }
    kept
}

/// A variable of ours that is no setting, of a server or of a worker, is a misspelt one, or one of another release.
pub(super) fn warn_of_unknown_settings() {
    let serve = <Args as clap::Args>::augment_args(clap::Command::new("serve"));
    let worker = <WorkerFlags as clap::Args>::augment_args(clap::Command::new("worker"));
    let known: Vec<_> = serve.get_arguments().chain(worker.get_arguments()).filter_map(clap::Arg::get_env).collect();
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"CLAWDFORGE_")) {
        if !known.contains(&name.as_os_str()) {
            tracing::warn!(variable = %name.display(), "not a setting of this release, and ignored");
        }
    }
}

/// Descriptors are few by default, for programs that use `select`; this one does not.
pub(super) fn allow_many_connections() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::debug!(%error, "the limit of open files was not raised");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_token_is_taken_out_of_the_arguments() {
        let kept = |line: &str| {
            let kept = without_admin_token(line.split(' ').map(OsString::from));
            kept.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
        };
        assert_eq!(kept("serve --admin-token secret --bind x"), "serve --bind x");
        assert_eq!(kept("serve --admin-token=secret --bind x"), "serve --bind x");
        assert_eq!(kept("serve --admin-token-file f --max-runs 2"), "serve --admin-token-file f --max-runs 2");
        assert_eq!(kept("serve --admin-token --admin-token"), "serve");
    }
}
