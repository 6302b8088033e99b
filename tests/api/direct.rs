//! Sessions that are spoken to directly, where the adapter misbehaves.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server, until};

/// With a stand-in for the adapter.
fn options(behaviour: &str) -> Options {
    let path = format!("{}/tests/stand-in/adapter:{}", env!("CARGO_MANIFEST_DIR"), std::env::var("PATH").unwrap());
    Options::stand_in().set("CLAWDFORGE_ACP", "direct").set("PATH", path).set("STAND_IN", behaviour)
}

async fn create(server: &Server, token: &str) -> String {
    let answer = server.post("/sessions", token, &json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["session_id"].as_str().unwrap().to_owned()
}

async fn turn(server: &Server, token: &str, id: &str, body: Value) -> Answer {
    server.post(&format!("/sessions/{id}/turn"), token, &body).await
}

fn nothing_is_left(server: &Server) -> bool {
    server.agents().is_empty()
        && server.query::<i64>("SELECT count(*) FROM sessions") == 0
        && server.data().join("sessions").read_dir().unwrap().count() == 0
}

#[tokio::test]
async fn an_adapter_that_dies_at_its_start_is_a_clear_error_and_leaves_nothing() {
    let server = options("die").start();
    let token = server.mint("app").await;
    let answer = server.post("/sessions", &token, &json!({})).await;
    assert!(answer.problem(502).contains("the agent ended before it answered \"initialize\""), "{answer:?}");
    assert!(nothing_is_left(&server));
}

#[tokio::test]
async fn an_adapter_that_hangs_keeps_neither_a_client_that_left_nor_a_stop() {
    let mut server = options("hang").set("CLAWDFORGE_STANDBY", 1).set("CLAWDFORGE_DRAIN_SECS", 0).start();
    let token = server.mint("app").await;
    let creating = server.request(Method::POST, "/sessions", &token).json(&json!({})).timeout(Duration::from_secs(1));
    creating.send().await.unwrap_err();
    until("its end", || nothing_is_left(&server)).await;

    let (begun, body) = (Instant::now(), json!({}));
    let (answer, ()) = tokio::join!(server.post("/sessions", &token, &body), async {
        until("the adapter", || !server.agents().is_empty()).await;
        server.signal(Signal::TERM);
    });
    assert!(!answer.status.is_success(), "{answer:?}");
    assert!(server.ended().success() && begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(server.agents(), [0; 0]);
}

#[tokio::test]
async fn an_adapter_that_floods_between_turns_is_ended_and_the_next_turn_goes_on() {
    let server = options("flood").start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    for _ in 0..2 {
        let answer = turn(&server, &token, &id, json!({"prompt": "Hello."})).await;
        assert_eq!((answer.status, &answer.json["text"]), (StatusCode::OK, &json!("refused 0")), "{answer:?}");
        until("its end", || server.agents().is_empty()).await;
    }
}

#[tokio::test]
async fn what_is_asked_between_turns_is_refused_before_the_next_one() {
    let server = options("speak").start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    let text = async || turn(&server, &token, &id, json!({"prompt": "Hello."})).await.json["text"].clone();
    assert_eq!(text().await, "refused 0");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(text().await, "refused -32601");
}

#[tokio::test]
async fn what_nobody_knows_passes_through_whole() {
    let server = options("strange").start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    let answer = turn(&server, &token, &id, json!({"prompt": "Hello."})).await;
    assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::OK, &json!("tea_time")), "{answer:?}");
    let update = r#"{"jsonrpc":"2.0","method":"session/update","params":{"sessionId":"one","update":{"sessionUpdate":"mood_update","mood":1.50,"new":[{}]}},"more":{"a":1e3},"type":"mood_update"}"#;
    assert!(answer.text.contains(update), "{}", answer.text);
    assert!(answer.text.contains(r#""usage":{"inputTokens":1,"outputTokens":2,"sips":3}},"extra":true,"type":"stop"}"#), "{}", answer.text);
}

/// The same stand-in for another agent, with which runs are made.
fn other(behaviour: &str) -> Options {
    options(behaviour).set("CLAWDFORGE_AGENTS", "claude,gemini")
}

fn no_run_is_left(server: &Server) -> bool {
    server.agents().is_empty() && server.data().join("sessions").read_dir().unwrap().count() == 0
}

#[tokio::test]
async fn a_run_by_an_agent_that_misbehaves_is_a_clear_error_and_leaves_nothing() {
    for (behaviour, stop_reason, words) in [
        ("die", "error", "the agent ended before it answered \"initialize\"; it said: It is broken."),
        ("hang", "timeout", "within 5 s"),
        ("stall", "timeout", "within 5 s"),
    ] {
        let server = other(behaviour).start();
        let token = server.mint("app").await;
        let failed = server.post("/run", &token, &json!({"prompt": "Hello.", "agent": "gemini", "timeout_secs": 5})).await;
        assert_eq!((failed.status, &failed.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!(stop_reason)), "{failed:?}");
        assert!(failed.json["error"].as_str().unwrap().contains(words), "{failed:?}");
        until("its end", || no_run_is_left(&server)).await;
    }
}

#[tokio::test]
async fn a_run_by_another_agent_ends_with_its_client_and_with_the_server() {
    let server = other("stall").start();
    let token = server.mint("app").await;
    let body = json!({"prompt": "Hello.", "agent": "gemini"});
    let leaving = server.request(Method::POST, "/run", &token).json(&body).timeout(Duration::from_secs(2));
    leaving.send().await.unwrap_err();
    until("its end", || no_run_is_left(&server)).await;
    until("its row", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'cancelled'") == 1).await;

    let going_on = server.request(Method::POST, "/run", &token).header("prefer", "respond-async").json(&body);
    assert_eq!(Answer::of(going_on).await.status, StatusCode::ACCEPTED);
    until("the agent", || !server.agents().is_empty()).await;
    let server = server.crash_and_restart();
    assert!(no_run_is_left(&server));
    assert_eq!(server.query::<String>("SELECT group_concat(status) FROM runs"), "cancelled,interrupted");
}
