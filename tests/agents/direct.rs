//! Sessions whose agent is spoken to directly. What they have in common with those by way of acpx stands in `sessions.rs`, which runs
//! with either: `CLAWDFORGE_TEST_ACP=acpx`.

use std::collections::BTreeSet;
use std::time::Duration;

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
    assert!(asked(server, token, &id).await.contains("The word is quince."));
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
    let Forge { server, token, home: _home, stub: _stub } = forge;
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
async fn an_idle_agent_is_ended_and_started_again_by_the_next_turn() {
    let Some(forge) = Forge::start_with(direct().set("CLAWDFORGE_AGENT_IDLE_SECS", 2)).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token).await;
    turn(server, token, &id, "The word is quince.").await;
    settled("an idle agent's end", 0, || server.agents()).await;
    assert!(asked(server, token, &id).await.contains("The word is quince."));
}

#[tokio::test]
async fn an_agent_that_knows_the_conversation_no_more_begins_another() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let kill = async || {
        for pid in server.agents() {
            let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
        }
        settled("no agent", 0, || server.agents()).await;
    };
    let id = create(server, token).await;
    // Nothing was said yet, so nothing was kept.
    kill().await;
    turn(server, token, &id, "The word is quince.").await;
    assert!(asked(server, token, &id).await.contains("The word is quince."));
    kill().await;
    std::fs::remove_dir_all(server.data().join("sessions").join(&id).join("config/projects")).unwrap();
    assert!(!asked(server, token, &id).await.contains("The word is quince."));
    turn(server, token, &id, "The word is medlar.").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    kill().await;
    assert!(asked(server, token, &id).await.contains("The word is medlar."));
}

#[tokio::test]
async fn a_system_prompt_is_told_at_each_start() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let body = json!({"model": "haiku", "system": "Speak of quinces only."});
    let id = server.post("/sessions", &token, &body).await.json["session_id"].as_str().unwrap().to_owned();
    let system = async |server: &Server| {
        let answer = turn(server, &token, &id, "stub: {\"echo\": true}").await;
        let request: Value = serde_json::from_str(answer.json["text"].as_str().unwrap()).unwrap();
        request["system"].to_string()
    };
    assert!(system(&server).await.contains("Speak of quinces only."));
    server.signal(Signal::TERM);
    let server = server.restart();
    assert!(system(&server).await.contains("Speak of quinces only."));
    server.post("/sessions", &token, &json!({"system": "x".repeat(65_537)})).await.problem(422);
}

#[tokio::test]
async fn sessions_of_the_kind_that_was_asked_for_last_are_started_ahead() {
    let Some(forge) = Forge::start_with(direct().set("CLAWDFORGE_STANDBY", 1)).await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let folders = |server: &Server| {
        let names = server.data().join("sessions").read_dir().unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
        names.collect::<BTreeSet<_>>()
    };
    let mut own = BTreeSet::from([create(&server, &token).await]);
    let (taken, agents) = loop {
        assert!(own.len() < 8, "none was taken");
        until("a session ahead", || folders(&server).len() == own.len() + 1 && server.agents().len() == 2 * own.len() + 2).await;
        // From when on it waits can't be seen.
        tokio::time::sleep(Duration::from_millis(300) * u32::try_from(own.len()).unwrap()).await;
        let (before, agents) = (folders(&server), server.agents());
        let created = create(&server, &token).await;
        own.insert(created.clone());
        if before.contains(&created) {
            break (created, agents);
        }
    };
    assert_eq!(server.get("/healthz", "").await.json["open_sessions"], own.len());
    turn(&server, &token, &taken, "The word is sorb.").await;
    assert!(asked(&server, &token, &taken).await.contains("The word is sorb."));
    assert!(agents.iter().all(|pid| server.agents().contains(pid)), "no agent was started for it");
    let pwd = turn(&server, &token, &taken, r#"stub: {"tool": {"name": "Bash", "input": {"command": "pwd"}}}"#).await;
    assert_eq!(pwd.json["text"].as_str().unwrap().trim(), server.data().join("sessions").join(&taken).join("work").to_str().unwrap());

    // One of another kind is not served by it, and changes what is expected.
    until("another ahead", || folders(&server).len() == own.len() + 1).await;
    let ahead = folders(&server).difference(&own).next().unwrap().clone();
    let other = server.post("/sessions", &token, &json!({"model": "haiku", "system": "Be brief."})).await;
    own.insert(other.json["session_id"].as_str().unwrap().to_owned());
    assert!(!own.contains(&ahead), "{other:?}");
    until("its end, with its folder", || !folders(&server).contains(&ahead)).await;
    until("one of the other kind", || folders(&server).len() == own.len() + 1).await;

    // After a crash nothing is left of it, and everything of the others.
    server.signal(Signal::KILL);
    let server = server.restart();
    assert_eq!(folders(&server), own);
    assert!(asked(&server, &token, &taken).await.contains("The word is sorb."));
}

#[tokio::test]
async fn a_session_keeps_what_it_was_created_with() {
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_ACP", "acpx")).await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
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
