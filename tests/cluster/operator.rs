//! What the operator sees of several machines.

use std::process::Command;

use crate::harness::{ADMIN, Answer, Options, until};
use crate::is_left_out;
use reqwest::StatusCode;
use serde_json::json;

#[tokio::test]
async fn machines_are_seen() {
    if is_left_out() {
        return;
    }
    let mut server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 3).workers(2).start();
    let token = server.mint("app").await;
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    assert!(server.query::<String>("SELECT worker FROM runs").starts_with("machine-"));
    let health = server.get("/healthz", "").await.json;
    assert_eq!(health["cluster"], json!({"connected": true, "workers": 2}));
    until("their rows", || server.query::<i64>("SELECT count(*) FROM workers") == 2).await;
    let listed = server.get("/admin/workers", ADMIN).await;
    let names: Vec<_> = listed.json["workers"].as_array().unwrap().iter().map(|worker| worker["name"].as_str().unwrap()).collect();
    assert_eq!((listed.json["connected"].as_bool(), names), (Some(true), vec!["machine-0", "machine-1"]), "{listed:?}");
    let first = &listed.json["workers"][0];
    assert_eq!((&first["here"], &first["places"], &first["version"]), (&json!(true), &json!(2), &json!(env!("CARGO_PKG_VERSION"))));
    assert!(first["clock_ms"].as_i64().unwrap().abs() < 1000, "{listed:?}");
    assert_eq!(server.get("/admin/workers", &token).await.status, StatusCode::FORBIDDEN);
    let metrics = server.get("/metrics", ADMIN).await.text;
    assert!(metrics.contains(r#"clawdforge_workers{worker="machine-1",what="places"} 1"#), "{metrics}");

    let url = server.workers().url.clone();
    let said = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clawdforge"));
        command.args(arguments).arg("--data-dir").arg(server.data()).env("CLAWDFORGE_NATS_URL", &url).env_remove("CLAWDFORGE_BIND");
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let list = said(&["worker", "list"]);
    assert!(list.lines().nth(1).is_some_and(|line| line.starts_with("machine-0 ") && line.contains(" now ")), "{list}");
    let refused = said(&["worker", "forget", "machine-0"]);
    assert!(refused.contains("the machine machine-0 is there; stop it first"), "{refused}");
    let doctor = said(&["doctor"]);
    for line in [
        "ok       NATS: connected; JetStream answers after",
        "ok       NATS: the stream of work is there",
        "ok       machine machine-1: heard of",
    ] {
        assert!(doctor.contains(line), "{doctor}");
    }
    let unknown = said(&["worker", "forget", "nobody"]);
    assert!(unknown.contains("no machine is named \"nobody\""), "{unknown}");
}

#[tokio::test]
async fn a_server_without_places_and_machines_says_so() {
    if is_left_out() {
        return;
    }
    let mut server = Options::stand_in().workers(1).start();
    let token = server.mint("app").await;
    server.workers().stop_one("machine-0");
    // A server that has just begun waits for them to show.
    let begun = std::time::Instant::now();
    let refused = loop {
        let answer = tokio::time::timeout(std::time::Duration::from_secs(2), server.run(&token, "hello")).await;
        if let Ok(answer) = answer {
            break answer;
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{}", server.log());
    };
    assert!(refused.problem(503).starts_with("No machine is there"), "{refused:?}");
    assert!(!refused.header("retry-after").is_empty());
    Answer::of(server.request(reqwest::Method::POST, "/sessions", &token).json(&json!({}))).await.problem(503);
}
