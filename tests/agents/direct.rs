//! Sessions whose agent is spoken to directly. What they have in common with those by way of acpx stands in `sessions.rs`, which runs
//! with either: `CLAWDFORGE_TEST_ACP=direct`.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{Answer, Options, Server, settled, until};

fn direct() -> Options {
    Options::default().set("CLAWDFORGE_ACP", "direct")
}

async fn create(server: &Server, token: &str) -> String {
    let answer = server.post("/sessions", token, &json!({"model": "haiku"})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["session_id"].as_str().unwrap().to_owned()
}

async fn turn(server: &Server, token: &str, id: &str, prompt: &str) -> Answer {
    let answer = server.post(&format!("/sessions/{id}/turn"), token, &json!({"prompt": prompt})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer
}

/// What the model is asked, as a text.
async fn asked(server: &Server, token: &str, id: &str) -> String {
    let answer = turn(server, token, id, "stub: {\"echo\": true}").await;
    let request: Value = serde_json::from_str(answer.json["text"].as_str().unwrap()).unwrap();
    assert!(request["model"].as_str().unwrap().contains("haiku"), "{request}");
    request["messages"].to_string()
}

#[tokio::test]
async fn one_adapter_and_one_claude_stay_from_turn_to_turn_and_are_all_that_there_is() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token).await;
    turn(server, token, &id, "The word is quince.").await;
    let agents = settled("an adapter and its claude", 2, || server.agents()).await;
    let begun = Instant::now();
    assert!(asked(server, token, &id).await.contains("The word is quince."));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(settled("the same ones", 2, || server.agents()).await, agents);
    assert_eq!(server.query::<String>("SELECT driver FROM sessions"), "direct");
    // Neither is a close anyone else's affair.
    let other = create(server, token).await;
    let path = format!("/sessions/{other}");
    assert_eq!(server.request(reqwest::Method::DELETE, &path, token).send().await.unwrap().status(), StatusCode::OK);
    assert_eq!(settled("the first session's agents", 2, || server.agents()).await, agents);
}

#[tokio::test]
async fn an_answer_right_before_a_stop_is_in_the_conversation_after_it() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let Forge { server, token, home: _home, _stub } = forge;
    let id = create(&server, &token).await;
    turn(&server, &token, &id, "stub: {\"text\": \"the answer is medlar\"}").await;
    server.signal(Signal::TERM);
    let server = server.restart();
    assert!(asked(&server, &token, &id).await.contains("the answer is medlar"));
}

#[tokio::test]
async fn whichever_process_dies_the_next_turn_goes_on() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token).await;
    turn(server, token, &id, "The word is sorb.").await;
    for which in [0, 1] {
        let agents = settled("an adapter and its claude", 2, || server.agents()).await;
        // What it said last gets to the disk a little later.
        tokio::time::sleep(Duration::from_millis(300)).await;
        kill_process(Pid::from_raw(agents[which].cast_signed()).unwrap(), Signal::KILL).unwrap();
        until("its death", || !server.agents().contains(&agents[which])).await;
        assert!(asked(server, token, &id).await.contains("The word is sorb."));
    }
}

#[tokio::test]
async fn a_session_keeps_what_it_was_created_with() {
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_ACP", "acpx")).await else { return };
    let Forge { server, token, home: _home, _stub } = forge;
    let id = create(&server, &token).await;
    turn(&server, &token, &id, "The word is quince.").await;
    server.signal(Signal::TERM);
    let server = server.restart_with("CLAWDFORGE_ACP", "direct");
    assert!(asked(&server, &token, &id).await.contains("The word is quince."));
    assert!(server.running("acpx"));
    let other = create(&server, &token).await;
    turn(&server, &token, &other, "Hello.").await;
    assert_eq!(
        server.query::<String>("SELECT group_concat(driver) FROM (SELECT driver FROM sessions ORDER BY created_at, rowid)"),
        "acpx,direct"
    );
}
