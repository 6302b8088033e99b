//! `clawdforge demo`, and the operator's commands with the real CLIs.

use std::process::Command;

use crate::{Forge, clis};

/// What the stub says to the second turn's prompt.
const SECOND_ANSWER: &str = "\"text\": \"The model stub read a prompt of 37 characters.\"";

/// What `demo --once` shows of an agent: two turns, whatever it is. It leaves nothing.
fn shown(agent: &str) -> Option<String> {
    let _ = clis()?;
    let (home, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut demo = Command::new(env!("CARGO_BIN_EXE_clawdforge"));
    demo.args(["demo", "--once", "--agent", agent]).env("HOME", home.path()).env("TMPDIR", temporary.path());
    let output = demo.output().unwrap();
    let (shown, told) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{shown}\n{told}");
    assert!(shown.contains("\"turn_index\": 2") && shown.contains(SECOND_ANSWER), "{shown}");
    assert_eq!(home.path().read_dir().unwrap().count() + temporary.path().read_dir().unwrap().count(), 0);
    Some(shown)
}

#[test]
fn the_demo_shows_a_run_and_leaves_nothing() {
    let Some(shown) = shown("claude") else { return };
    assert!(shown.contains("\"result\": \"The model stub read a prompt of 23 characters.\""), "{shown}");
}

#[test]
fn the_demo_shows_codex() {
    shown("codex");
}

#[test]
fn the_demo_shows_gemini() {
    shown("gemini");
}

#[test]
fn the_demo_shows_opencode() {
    shown("opencode");
}

#[test]
fn the_demo_shows_qwen() {
    shown("qwen");
}

#[tokio::test]
async fn the_doctor_knows_versions_and_sign_in() {
    let Some(forge) = Forge::start().await else { return };
    let clis = clis().unwrap();
    let home = tempfile::tempdir().unwrap();
    let doctor = |key: &str| {
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_clawdforge"));
        doctor.args(["doctor", "--bind", &forge.server.address().to_string()]).env_clear();
        doctor.env("PATH", &clis.path).env("HOME", home.path()).env("ANTHROPIC_API_KEY", key).current_dir(home.path());
        doctor.env("CLAWDFORGE_CLAUDE_BIN", &clis.claude).env("CLAWDFORGE_ACPX_BIN", &clis.acpx);
        let output = doctor.output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (well, told) = doctor("any");
    assert!(well, "{told}");
    for line in [" claude: 2.", "ok       sign-in: by api_key", " acpx: 0.", " adapter: ", "ok       port: a server answers"] {
        assert!(told.contains(line), "{told}");
    }
    let (well, told) = doctor("");
    assert!(!well && told.contains("FAILED   sign-in"), "{told}");
}
