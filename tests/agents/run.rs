//! `POST /run` with the real `claude`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawdforge::agent::programs::CLAUDE_TESTED;
use reqwest::StatusCode;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{Options, until};
use crate::receiver::Receiver;

/// A prompt that tells the stub what to do.
fn stub(directive: &Value) -> String {
    format!("stub: {directive}")
}

/// What the model got to read of the user: the text of the message's own block.
async fn read_by_model(forge: &Forge, prompt: &str) -> String {
    let prompt = format!("{prompt}\nstub: {{\"echo\": true}}");
    let answer = forge.server.run(&forge.token, &prompt).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    // The whole reply is the request as JSON, so the result is that object.
    answer.json["result"]["messages"].to_string()
}

#[tokio::test]
async fn a_prompt_is_answered() {
    let Some(forge) = Forge::start().await else { return };
    let answer = forge.server.run(&forge.token, "Hello, house.").await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.json["result"], "The model stub read a prompt of 13 characters.");
    assert_eq!(answer.json["stop_reason"], "end_turn");
    let row: String = forge.server.query("SELECT json_array(ok, input_tokens > 0, output_tokens > 0, cost_usd > 0) FROM runs");
    assert_eq!(row, "[1,1,1,1]");
    for kept in ["projects", "session-env", "todos"] {
        let kept = forge.home.path().join(".claude").join(kept);
        assert_eq!(kept.read_dir().map_or(0, Iterator::count), 0, "{} is not empty", kept.display());
    }
    let begun = Instant::now();
    loop {
        let health = forge.server.get("/healthz", "").await;
        if let Some(version) = health.json["claude_version"].as_str().filter(|_| health.json["acpx_version"].is_string()) {
            assert_eq!(health.json["claude_tested"], CLAUDE_TESTED.includes(version));
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{health:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn any_text_is_a_prompt_and_reaches_the_model_as_it_is() {
    let Some(forge) = Forge::start().await else { return };
    let secret = forge.home.path().join("secret.txt");
    fs::write(&secret, "TOPSECRET").unwrap();
    let mentions = format!("What is in @{}?", secret.display());
    for prompt in ["--help", "-p", "/clear", "/nonsense now", "!ls", "#remember", &mentions, "tab\tquote\" \u{1F600}"] {
        let read = read_by_model(&forge, prompt).await;
        let quoted = json!(prompt).to_string();
        assert!(read.contains(quoted.trim_matches('"')), "{prompt}: {read:.2000}");
        assert!(!read.contains("TOPSECRET"), "{prompt}");
    }
}

#[tokio::test]
async fn results_are_values_where_the_whole_reply_is_one() {
    let Some(forge) = Forge::start().await else { return };
    for (text, expected) in [
        ("{\"a\": [1, 2]}", json!({"a": [1, 2]})),
        ("```json\n[true]\n```", json!([true])),
        ("42", json!("42")),
        ("Here: {}", json!("Here: {}")),
    ] {
        let answer = forge.server.run(&forge.token, &stub(&json!({"text": text}))).await;
        assert_eq!(answer.json["result"], expected, "{answer:?}");
    }
}

#[tokio::test]
async fn model_and_system_prompt_reach_the_model() {
    let Some(forge) = Forge::start().await else { return };
    let body = json!({"prompt": "stub: {\"echo\": true}", "model": "claude-haiku-4-5", "system": "--Speak like the sea.\nAlways."});
    let answer = forge.server.post("/run", &forge.token, &body).await;
    assert_eq!(answer.json["result"]["model"], "claude-haiku-4-5");
    assert!(answer.json["result"]["system"].to_string().contains("--Speak like the sea.\\nAlways."));
}

#[tokio::test]
async fn long_replies_arrive_whole_eight_at_once() {
    let Some(forge) = Forge::start().await else { return };
    let bytes = 3_000_000;
    let expected: String = "0123456789abcdef".chars().cycle().take(bytes).collect();
    let prompt = stub(&json!({"bytes": bytes}));
    let runs = (0..8).map(|_| forge.server.run(&forge.token, &prompt));
    for answer in futures_util::future::join_all(runs).await {
        assert_eq!(answer.status, StatusCode::OK, "{:.500}", answer.text);
        assert!(answer.json["result"] == expected.as_str(), "{} bytes came", answer.json["result"].as_str().unwrap_or_default().len());
    }
}

#[tokio::test]
async fn a_long_prompt_arrives_whole() {
    let Some(forge) = Forge::start().await else { return };
    let prompt = "word ".repeat(80_000);
    let answer = forge.server.run(&forge.token, &prompt).await;
    assert_eq!(answer.json["result"], "The model stub read a prompt of 400000 characters.", "{answer:?}");
}

#[tokio::test]
async fn an_api_error_is_a_502_in_the_clis_words() {
    let Some(forge) = Forge::start().await else { return };
    for (error, expected) in [(401, "authenticate"), (429, "429"), (400, "400")] {
        let answer = forge.server.run(&forge.token, &stub(&json!({"error": error}))).await;
        assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("error")), "{answer:?}");
        assert!(answer.json["error"].as_str().unwrap().contains(expected), "{answer:?}");
    }
}

#[tokio::test]
async fn a_timeout_says_that_the_api_was_overloaded() {
    let Some(forge) = Forge::start().await else { return };
    let prompt = stub(&json!({"error": 529, "retry": true}));
    let answer = forge.server.post("/run", &forge.token, &json!({"prompt": prompt, "timeout_secs": 5})).await;
    assert_eq!(answer.json["stop_reason"], "timeout", "{answer:?}");
    let error = answer.json["error"].as_str().unwrap();
    assert!(
        error.starts_with("claude did not answer within 5 s; it was trying again after an API error (529 overloaded), attempt "),
        "{error}"
    );
}

#[tokio::test]
async fn a_reply_that_ends_in_the_middle_is_a_502() {
    let Some(forge) = Forge::start().await else { return };
    let prompt = stub(&json!({"bytes": 200_000, "cut": true}));
    let answer = forge.server.post("/run", &forge.token, &json!({"prompt": prompt, "timeout_secs": 8})).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{:.1000}", answer.text);
}

#[tokio::test]
async fn an_attached_file_is_named_and_can_be_read_and_others_can_not() {
    let Some(forge) = Forge::start().await else { return };
    let file = forge.server.upload(&forge.token, "note.txt", "the cellar door").await;
    let body = |prompt: &str| json!({"prompt": prompt, "files": [file]});
    let answer = forge.server.post("/run", &forge.token, &body("stub: {\"echo\": true}")).await;
    let read = answer.json["result"]["messages"].to_string();
    let paths = forge.server.data_folders().into_iter().map(|data| data.canonicalize().unwrap().join("runs"));
    let mut paths = paths.map(|rooms| rooms.join(answer.header("x-run-id")).join("note.txt"));
    let is_named = |path: &PathBuf| read.contains(&format!("[Attached files — open with Read tool as needed]\\n{}", path.display()));
    let path = paths.find(is_named).unwrap_or_else(|| panic!("{read:.3000}"));

    // The folder's name is not known before the run, so the agent looks for the file from where it is.
    let find = stub(&json!({"tool": {"name": "Read", "input": {"file_path": "note.txt"}}}));
    let answer = forge.server.post("/run", &forge.token, &body(&find)).await;
    assert!(answer.json["result"].as_str().unwrap().contains("the cellar door"), "{answer:?}");
    let outside = stub(&json!({"tool": {"name": "Read", "input": {"file_path": "/etc/passwd"}}}));
    let answer = forge.server.post("/run", &forge.token, &body(&outside)).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(!answer.json["result"].as_str().unwrap().contains("root:"), "{answer:?}");
    until("no folder", || !path.exists() && forge.server.count("runs") == 0).await;
}

/// Lets the agent run any command, as an owner's own settings might.
fn allow_bash(home: &Path) {
    fs::create_dir_all(home.join(".claude")).unwrap();
    fs::write(home.join(".claude/settings.json"), r#"{"permissions": {"allow": ["Bash"]}}"#).unwrap();
}

fn bash(command: &str) -> String {
    stub(&json!({"tool": {"name": "Bash", "input": {"command": command, "description": "test"}}}))
}

#[tokio::test]
async fn without_leave_bash_is_denied_and_the_run_ends_well() {
    let Some(forge) = Forge::start().await else { return };
    let answer = forge.server.run(&forge.token, &bash("touch made-by-bash")).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert!(!answer.json["result"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn what_bash_started_ends_with_the_run() {
    let Some(forge) = Forge::start().await else { return };
    allow_bash(forge.home.path());
    let leave = "(env -i setsid /bin/sleep 611 >/dev/null 2>&1 &) ; (setsid sleep 612 >/dev/null 2>&1 &) ; echo started";
    let answer = forge.server.run(&forge.token, &bash(leave)).await;
    assert!(answer.json["result"].as_str().unwrap().contains("started"), "{answer:?}");
    until("no process", || forge.server.descendants().is_empty()).await;
    until("no file", || forge.home.path().join(".claude/session-env").read_dir().map_or(0, Iterator::count) == 0).await;

    let begun = Instant::now();
    let answer = forge.server.post("/run", &forge.token, &json!({"prompt": bash("true; sleep 613"), "timeout_secs": 5})).await;
    assert_eq!(answer.json["stop_reason"], "timeout", "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(forge.server.descendants(), [0; 0]);

    let sleeps = bash("true; sleep 614");
    let leaves = tokio::time::timeout(Duration::from_secs(3), forge.server.run(&forge.token, &sleeps));
    assert!(leaves.await.is_err());
    until("the row", || forge.server.query::<i64>("SELECT count(*) FROM runs WHERE stop_reason = 'cancelled'") == 1).await;
    assert_eq!(forge.server.descendants(), [0; 0]);
}

#[tokio::test]
async fn after_a_crash_in_the_middle_nothing_goes_on() {
    let Some(forge) = Forge::start_with(Options::default()).await else { return };
    allow_bash(forge.home.path());
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let sleeps = bash("true; sleep 615");
    tokio::select! {
        answer = server.run(&token, &sleeps) => panic!("{answer:?}"),
        () = until("the command", || server.running("sleep\x00615")) => {}
    }
    let server = server.crash_and_restart();
    assert!(!server.running("sleep\x00615") && !server.running("--input-format"));
    assert_eq!(server.query::<String>("SELECT stop_reason FROM runs"), "interrupted");
    assert_eq!(server.run(&token, "Again?").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_pipe_where_claude_reads_fails_the_run_at_once() {
    let Some(forge) = Forge::start().await else { return };
    // Each of these claude waits for.
    for place in [
        ".claude/.credentials.json",
        ".claude/plugins/installed_plugins.json",
        ".claude/plugins/known_marketplaces.json",
        ".claude/skills/manifest.json",
    ] {
        let pipe = forge.home.path().join(place);
        std::fs::create_dir_all(pipe.parent().unwrap()).unwrap();
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let answer = forge.server.post("/run", &forge.token, &json!({"prompt": "hello", "timeout_secs": 5})).await;
        let error = answer.json["error"].as_str().unwrap_or_default();
        assert!(error.contains(place) && error.contains("no regular file"), "{place}: {answer:?}");
        std::fs::remove_file(pipe).unwrap();
    }
    assert_eq!(forge.server.run(&forge.token, "hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn the_operator_is_told_when_the_sign_in_fails() {
    let receiver = Receiver::start([]).await;
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let options = Options::default().set("CLAWDFORGE_OPERATOR_WEBHOOK", receiver.url("/operator"));
    let Some(forge) = Forge::start_with(options.set("CLAWDFORGE_OPERATOR_WEBHOOK_SECRET", secret)).await else { return };
    for _ in 0..2 {
        let answer = forge.server.run(&forge.token, r#"stub: {"error": 401, "retry": false}"#).await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    }
    let told = &receiver.wait_for(1).await[0];
    assert!(told.is_signed(secret));
    assert_eq!(told.json()["type"], "signin.failed");
    // One cause, one message.
    assert_eq!(forge.server.query::<i64>("SELECT count(*) FROM deliveries"), 1);
}
