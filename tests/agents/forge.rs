//! A server with the real CLIs, whose model is a stub.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clawdforge::demo::install::{self, Clis};
use clawdforge::demo::stub::Stub;

use crate::harness::{Options, Server};
use tempfile::TempDir;

/// CLIs other than the pinned ones, as `tests/newest.sh` installs them.
fn chosen() -> Option<Clis> {
    let folder = PathBuf::from(std::env::var_os("CLAWDFORGE_TEST_CLIS")?);
    let [node, claude, acpx] = ["node/node_modules/.bin", "claude/node_modules/.bin", "acpx/node_modules/.bin"].map(|bin| folder.join(bin));
    let own = std::env::var_os("PATH").unwrap_or_default();
    let path = [&node, &claude, &acpx].into_iter().cloned().chain(std::env::split_paths(&own));
    Some(Clis { claude: claude.join("claude"), acpx: acpx.join("acpx"), path: std::env::join_paths(path).unwrap() })
}

/// Says something aloud. Not by a macro that prints: the test runner would keep that for itself.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The CLIs. Without npm the caller is to return: the test is skipped, which is said aloud, and a failure in CI.
pub fn clis() -> Option<&'static Clis> {
    static CLIS: OnceLock<Result<Clis, String>> = OnceLock::new();
    let clis = CLIS
        .get_or_init(|| chosen().map_or_else(|| install::clis(&install::default_cache(), &say).map_err(|error| format!("{error:#}")), Ok));
    match clis {
        Ok(clis) => Some(clis),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "the CLIs are missing: {error}");
            say(&format!("SKIPPED: a test of the real CLIs did not run, because they are missing: {error}"));
            None
        }
    }
}

/// A server with the real CLIs, whose model is a stub.
pub struct Forge {
    pub server: Server,
    pub token: String,
    pub home: TempDir,
    pub stub: Stub,
}

impl Forge {
    pub async fn start() -> Option<Self> {
        Self::start_with(Options::default()).await
    }

    pub async fn start_with(options: Options) -> Option<Self> {
        Self::start_at(options, tempfile::tempdir().unwrap(), |options, _| options.start()).await
    }

    /// At home in this folder.
    pub async fn start_at(options: Options, home: TempDir, start: fn(Options, &Path) -> Server) -> Option<Self> {
        let clis = clis()?;
        let stub = Stub::start().await.unwrap();
        let environment = clawdforge::demo::environment(clis, &stub.url(), home.path());
        let options = options.set("CLAWDFORGE_CLAUDE_BIN", clis.claude.display()).set("CLAWDFORGE_ACPX_BIN", clis.acpx.display());
        let server = start(options.environment(environment.iter()), home.path());
        let token = server.mint("app").await;
        Some(Self { server, token, home, stub })
    }
}
