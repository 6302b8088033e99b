//! claude's sign-in: it stays with the server. Each agent has a copy that can't be renewed, so that nothing that an agent does ends the
//! sign-in, and what it learns of it is of no use in a few hours.
//!
//! claude renews a sign-in when less than five minutes of it are left, and whatever it is started for. One that has nothing to renew by never
//! tries, and takes up a new copy at its next request (all seen in 2.1.332). So the server starts one without tools in time, and hands the copies out.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::command::Purpose;
use super::completion_lines;
use super::files::config_folder;
use super::workspace::{NotStarted, RunDirs};
use crate::agent::contract::Rules;
use crate::agent::environment::Environment;
use crate::agent::folder::{open_below, read_regular, replace};
use crate::agent::process::{self, ConverseOptions, Line, Next};
use crate::blocking::blocking;

const FILE: &str = ".credentials.json";
/// Bytes of it, at most.
const MOST: u64 = 1 << 20;
/// How long before its end it is renewed: claude does it when less than five minutes are left.
const AHEAD: Duration = Duration::from_secs(285);
/// How long the renewal may take.
const RENEWING: Duration = Duration::from_secs(15);
/// How long claude has to put its lock away.
const UNLOCKING: Duration = Duration::from_millis(300);
/// After how long one that failed is tried again.
const TRY_AGAIN: Duration = Duration::from_mins(1);
/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Where it lies.
pub fn file(environment: &Environment) -> PathBuf {
    folder(environment).join(FILE)
}

/// The folder that it lies in, with the lock under which it is renewed.
pub fn folder(environment: &Environment) -> PathBuf {
    environment.get("CLAUDE_SECURESTORAGE_CONFIG_DIR").map(PathBuf::from).or_else(|| config_folder(environment)).unwrap_or_default()
}

fn read(environment: &Environment) -> Value {
    read_regular(&file(environment), MOST).ok().and_then(|file| serde_json::from_slice(&file).ok()).unwrap_or_default()
}

/// The sign-in without that by which it is renewed; `None` where there is none.
fn copy(environment: &Environment) -> Option<String> {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.remove("refreshToken");
                fields.values_mut().for_each(strip);
            }
            Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut all = read(environment);
    strip(&mut all);
    all.is_object().then(|| all.to_string())
}

/// Puts a copy into the configuration of an agent, which may be at work there. Nothing but that file is written, and no link is followed.
pub fn put(config: &OwnedFd, environment: &Environment) -> io::Result<()> {
    copy(environment).map_or(Ok(()), |copy| replace(config, FILE, copy.as_bytes()))
}

/// Whether it is to be renewed.
fn is_due(environment: &Environment) -> bool {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Renewable {
        #[serde(rename = "refreshToken")]
        _refresh_token: String,
        /// In milliseconds.
        expires_at: u64,
    }
    let Ok(Renewable { expires_at, .. }) = Renewable::deserialize(&read(environment)["claudeAiOauth"]) else { return false };
    let soon = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + AHEAD;
    Duration::from_millis(expires_at) < soon
}

/// Whether an error says that claude is not signed in.
pub fn is_about_sign_in(error: &str) -> bool {
    let error = error.to_lowercase();
    ["authenticat", "not logged in", "/login", "invalid api key", "oauth token"].iter().any(|words| error.contains(words))
}

/// Keeps it from ending. Clones are the same.
#[derive(Clone, Debug)]
pub struct SignIn {
    /// Where claude works that renews it.
    run_dirs: RunDirs,
    /// One renews it at once; when that was last.
    renewing: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

impl SignIn {
    /// That of the environment of these folders, in which claude renews it.
    pub fn new(run_dirs: RunDirs) -> Self {
        Self { run_dirs, renewing: Arc::default() }
    }

    /// Where claude works that renews it.
    pub fn folder(&self) -> &Path {
        &self.run_dirs.launcher.folder
    }

    async fn is_due(&self) -> bool {
        let environment = self.run_dirs.launcher.environment.clone();
        blocking(move || Ok(is_due(&environment))).await.unwrap_or(false)
    }

    /// Renews it where it would end soon. To be waited for before an agent is given a copy.
    pub async fn renew(&self) {
        if !self.is_due().await {
            return;
        }
        let this = self.clone();
        let mut renewing = self.renewing.clone().lock_owned().await;
        // Of its own: a caller that leaves must not leave claude with the lock of the sign-in.
        let renewal = tokio::spawn(async move {
            if this.is_due().await && renewing.is_none_or(|tried| tried.elapsed() > TRY_AGAIN) {
                *renewing = Some(Instant::now());
                match this.have_it_renewed().await {
                    Ok(()) if !this.is_due().await => {
                        *renewing = None;
                        tracing::info!("the sign-in of claude was renewed");
                    }
                    Ok(()) => tracing::warn!("claude did not renew its sign-in; if runs fail to authenticate, sign in again"),
                    Err(error) => tracing::warn!(%error, "the sign-in of claude can't be renewed"),
                }
            }
        });
        let _ = renewal.await;
    }

    async fn have_it_renewed(&self) -> io::Result<()> {
        let (run_dir, _) = self.run_dirs.set_up(Uuid::now_v7(), Vec::new()).await?;
        let done = async {
            while self.is_due().await {
                sleep(Duration::from_millis(100)).await;
            }
            sleep(UNLOCKING).await;
        };
        let options = ConverseOptions {
            input: completion_lines::ask(),
            hold_input: true,
            time_up: Box::pin(async {
                let _ = timeout(RENEWING, done).await;
            }),
            cancel: &CancellationToken::new(),
            patience: None,
            more: None,
        };
        let renewed = match run_dir.start(Purpose::Renewal, "sonnet", &Rules::default()) {
            Ok(waiting) => {
                process::converse_with(waiting, &run_dir.tag(), options, |_: Line<'_>| Next::More).await;
                Ok(())
            }
            Err(NotStarted::NotInstalled(program)) => Err(io::Error::other(format!("{} is not installed", program.display()))),
            Err(NotStarted::Failed(why)) => Err(io::Error::other(why)),
        };
        run_dir.clear_away().await;
        renewed
    }

    /// Renews it in time, and keeps the agents' copies as it is, for ever. Their configurations are in the folders of `rooms`, each below what
    /// is named beside it.
    pub async fn keep(&self, rooms: [(PathBuf, &'static [&'static str]); 2]) {
        let mut last = None;
        loop {
            self.renew().await;
            let (environment, rooms, before) = (self.run_dirs.launcher.environment.clone(), rooms.clone(), last.clone());
            let hand_out = move || {
                let now = copy(&environment);
                if let Some(copy) = now.as_ref().filter(|copy| Some(*copy) != before.as_ref()) {
                    for (rooms, below) in rooms {
                        for room in rooms.read_dir().into_iter().flatten().flatten() {
                            // It may be gone by now, or its agent may have put something else in its place.
                            let _ = open_below(&room.path(), below).and_then(|config| replace(&config, FILE, copy.as_bytes()));
                        }
                    }
                }
                Ok(now)
            };
            last = blocking(hand_out).await.ok().flatten();
            sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_nothing_to_renew_by_and_goes_nowhere_else() {
        let home = tempfile::tempdir().unwrap();
        let environment = Environment::of([("HOME", home.path())]);
        let [room, precious] = ["room", "precious"].map(|name| home.path().join(name));
        std::fs::create_dir_all(room.join("config")).unwrap();
        let config = || open_below(&room, &["config"]).unwrap();
        put(&config(), &environment).unwrap();
        assert_eq!(room.join("config").read_dir().unwrap().count(), 0);
        std::fs::create_dir(home.path().join(".claude")).unwrap();
        let sign_in = |expires_at: u64| {
            let all = format!(
                r#"{{"claudeAiOauth":{{"accessToken":"a","expiresAt":{expires_at},"refreshToken":"r"}},"mcpOAuth":[{{"refreshToken":"m"}}]}}"#
            );
            std::fs::write(file(&environment), all).unwrap();
        };
        sign_in(u64::MAX);
        assert!(!is_due(&environment));
        sign_in(1000);
        assert!(is_due(&environment));
        std::fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, room.join("config").join(FILE)).unwrap();
        put(&config(), &environment).unwrap();
        assert_eq!(
            std::fs::read_to_string(room.join("config").join(FILE)).unwrap(),
            r#"{"claudeAiOauth":{"accessToken":"a","expiresAt":1000},"mcpOAuth":[{}]}"#
        );
        assert_eq!(std::fs::read_to_string(precious).unwrap(), "precious");
        std::fs::rename(room.join("config"), home.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(home.path().join("elsewhere"), room.join("config")).unwrap();
        open_below(&room, &["config"]).unwrap_err();
    }
}
