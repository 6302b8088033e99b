//! What an agent may do comes from its session's permissions alone, by what is on the disk afterwards.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::Forge;
use crate::harness::{Answer, Options, Server, by_acpx, until};

/// The user's own settings, which would let everything pass.
fn allow_all(home: &Path) {
    std::fs::create_dir_all(home.join(".claude")).unwrap();
    let settings = json!({"permissions": {"allow": ["Bash", "Write", "Read(//**)"], "defaultMode": "acceptEdits"}});
    std::fs::write(home.join(".claude/settings.json"), settings.to_string()).unwrap();
}

async fn use_tool(server: &Server, token: &str, path: &str, name: &str, input: Value) -> Answer {
    let prompt = format!("stub: {}", json!({"tool": {"name": name, "input": input}}));
    let answer = server.post(path, token, &json!({"prompt": prompt})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer
}

/// Has the agent write by its shell, write by its own tool, and read outside its folder. Gives which of them came about.
async fn attempts(server: &Server, token: &str, session: &Value, secret: &Path, round: usize) -> [bool; 3] {
    let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
    let work = PathBuf::from(session["cwd"].as_str().unwrap());
    let (touched, written) = (work.join(format!("touched-{round}")), work.join(format!("written-{round}")));
    use_tool(server, token, &path, "Bash", json!({"command": format!("touch {}", touched.display()), "description": "test"})).await;
    use_tool(server, token, &path, "Write", json!({"file_path": written, "content": "text"})).await;
    let read = use_tool(server, token, &path, "Read", json!({"file_path": secret})).await;
    [touched.exists(), written.exists(), read.json["text"].as_str().unwrap().contains("quince")]
}

#[tokio::test]
async fn each_permission_holds_also_after_the_family_was_killed() {
    // Neither in the home nor in /tmp, which are closed whatever the permissions are; this build may be there.
    let elsewhere = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = Options::default().set("CLAWDFORGE_AGENTS_READ", elsewhere.path().display());
    let Some(forge) = Forge::start_with(options).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    allow_all(forge.home.path());
    let secret = elsewhere.path().join("diary");
    std::fs::write(&secret, "quince").unwrap();
    for (permissions, may) in
        [("deny-all", [false, false, false]), ("approve-reads", [false, false, true]), ("approve-all", [true, true, true])]
    {
        // The default model: what a release starts an agent in depends on it.
        let session = server.post("/sessions", token, &json!({"permissions": permissions})).await.json;
        assert_eq!(attempts(server, token, &session, &secret, 1).await, may, "{permissions}");
        for pid in server.agents() {
            let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
        }
        until("the family's end", || server.agents().is_empty()).await;
        assert_eq!(attempts(server, token, &session, &secret, 2).await, may, "{permissions}, resumed");
        let state = server.get(&format!("/sessions/{}", session["session_id"].as_str().unwrap()), token).await;
        assert_eq!(state.json["permissions"], permissions);
    }
}

#[tokio::test]
async fn a_turn_in_a_mode_where_permissions_do_not_hold_is_ended_before_it_does_anything() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let session = server.post("/sessions", token, &json!({"permissions": "deny-all"})).await.json;
    let work = PathBuf::from(session["cwd"].as_str().unwrap());
    // As a release might start in one by itself, an operator's managed settings say, or something that an agent left behind.
    let settings = work.parent().unwrap().join("config/settings.json");
    // By a rename: claude chooses yet another mode where it finds half a file.
    let meddled = settings.with_extension("meddled");
    let meddling = async {
        loop {
            std::fs::write(&meddled, json!({"permissions": {"defaultMode": "acceptEdits"}}).to_string()).unwrap();
            std::fs::rename(&meddled, &settings).unwrap();
            sleep(Duration::from_millis(5)).await;
        }
    };
    let tool = json!({"tool": {"name": "Write", "input": {"file_path": work.join("written"), "content": "text"}}, "delay_ms": 500});
    let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
    let body = json!({"prompt": format!("stub: {tool}")});
    let answer = tokio::select! {
        answer = server.post(&path, token, &body) => answer,
        () = meddling => unreachable!("it never comes to an end"),
    };
    assert!(!work.join("written").exists());
    // One that is spoken to directly is told its mode each time, whatever its settings say.
    if by_acpx() {
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
        let error = answer.json["error"].as_str().unwrap();
        assert!(error.contains("\"acceptEdits\"") && error.contains("deny-all"), "{error}");
        assert_eq!(server.agents(), [0; 0]);
    }
}

#[tokio::test]
async fn a_run_writes_nothing_whatever_mode_the_user_prefers() {
    let Some(forge) = Forge::start().await else { return };
    std::fs::create_dir_all(forge.home.path().join(".claude")).unwrap();
    let settings = json!({"permissions": {"defaultMode": "acceptEdits"}});
    std::fs::write(forge.home.path().join(".claude/settings.json"), settings.to_string()).unwrap();
    let write = json!({"tool": {"name": "Write", "input": {"file_path": "written", "content": "text"}}});
    let answer = forge.server.run(&forge.token, &format!("stub: {write}")).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert!(!answer.json["result"].as_str().unwrap().contains("created"), "{answer:?}");
}
