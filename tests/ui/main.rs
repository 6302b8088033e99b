//! The operator's page in a real browser, with the real claude, whose model is a stub: `page.test.mjs` says what is done there.

#![allow(unreachable_pub, missing_docs, dead_code, reason = "a test binary has no public items, and what it shares others use")]

#[path = "../agents/forge.rs"]
mod forge;
#[path = "../api/harness.rs"]
mod harness;

use std::path::Path;
use std::process::Command;

use clawdforge::agent::environment::Environment;
use clawdforge::agent::programs;

use forge::{Forge, say};
use harness::{ADMIN, Options};

/// A program of this machine; that it is missing is said aloud, and a failure in CI.
fn found(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = programs::find(program.as_ref(), &Environment::of([("PATH", path)]));
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{program} is missing");
        say(&format!("SKIPPED: the operator's page was not tried in a browser, because {program} is missing"));
    }
    found
}

/// What the test needs from npm, in the build's folder.
fn install(folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ui");
    std::fs::create_dir_all(folder).unwrap();
    for file in ["package.json", "package-lock.json", "browser.mjs", "page.test.mjs"] {
        std::fs::copy(source.join(file), folder.join(file)).unwrap();
    }
    let mut npm = Command::new("npm");
    npm.args(["ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(folder);
    // It would write into the user's home.
    let done = npm.env("npm_config_cache", folder.join("npm")).env("npm_config_update_notifier", "false").status().unwrap();
    assert!(done.success(), "npm ci: {done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_in_a_browser() {
    let (Some(chromium), Some(node), Some(_)) = (found("chromium"), found("node"), found("npm")) else { return };
    let Some(forge) = Forge::start_with(Options::default()).await else { return };
    let (url, folder) = (forge.server.url(""), Path::new(env!("CARGO_TARGET_TMPDIR")).join("ui"));
    let home = tempfile::tempdir().unwrap();
    let (temporary, profile) = (home.path().to_owned(), home.path().to_owned());
    let run = move || {
        install(&folder);
        let mut tests = Command::new(node);
        tests.args(["--test", "page.test.mjs"]).current_dir(folder).env("CHROMIUM", chromium);
        tests.env("CLAWDFORGE_URL", url).env("CLAWDFORGE_ADMIN_TOKEN", ADMIN).env("HOME", profile).env("TMPDIR", temporary);
        tests.output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}
