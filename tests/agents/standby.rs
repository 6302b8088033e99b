//! Agents that are started ahead of need, with the real CLIs.

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{Options, Server, by_acpx, settled, until};

/// The processes whose command line has this word, and that are not acpx's owners.
fn waiting(server: &Server, word: &str) -> Vec<u32> {
    let has = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
    };
    server.agents().into_iter().filter(has).collect()
}

#[tokio::test]
async fn a_run_and_a_turn_are_served_by_what_was_started_before() {
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_STANDBY", 2)).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let file = server.upload(token, "note.txt", "the cellar door").await;
    let slow = "stub: {\"delay_ms\": 1500}";
    assert_eq!(server.run(token, "hello").await.status, StatusCode::OK);
    let claude = settled("a claude that waits", 1, || waiting(server, "-p")).await;
    let (answer, ()) = tokio::join!(server.run(token, slow), async {
        until("the run", || server.query::<i64>("SELECT count(*) FROM runs") == 2).await;
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        assert!(waiting(server, "-p").contains(&claude[0]));
    });
    until("its end: it serves one run", || !waiting(server, "-p").contains(&claude[0])).await;
    assert_eq!(answer.json["result"], "The model stub read a prompt of 24 characters.", "{answer:?}");
    until("a successor", || waiting(server, "-p").iter().any(|pid| !claude.contains(pid))).await;
    let body = json!({"prompt": "stub: {\"echo\": true}", "files": [file]});
    let echoed = server.post("/run", token, &body).await;
    assert!(echoed.json["result"]["messages"].to_string().contains("note.txt"), "{echoed:?}");

    if !by_acpx() {
        return;
    }
    let session = server.post("/sessions", token, &json!({"model": "haiku"})).await.json["session_id"].as_str().unwrap().to_owned();
    let turns = format!("/sessions/{session}/turn");
    for (index, prompt) in ["My name is Mio.", slow, "stub: {\"echo\": true}"].into_iter().enumerate() {
        let acpx = settled("an acpx that waits", 1, || waiting(server, &session)).await;
        let body = json!({"prompt": prompt});
        let (answer, ()) = tokio::join!(server.post(&turns, token, &body), async {
            let turns = || server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn'");
            until("the turn", || turns() == i64::try_from(index).unwrap() + 1).await;
            assert!(waiting(server, &session).contains(&acpx[0]));
        });
        assert_eq!((answer.status, &answer.json["turn_index"]), (StatusCode::OK, &json!(index + 1)), "{answer:?}");
        if index == 2 {
            let request: Value = serde_json::from_str(answer.json["text"].as_str().unwrap()).unwrap();
            assert!(request["messages"].to_string().contains("My name is Mio.") && request["model"].as_str().unwrap().contains("haiku"));
        }
        until("its end", || waiting(server, &session).iter().all(|pid| !acpx.contains(pid))).await;
    }

    // Killed in its sleep: the next turn starts cold, and nobody notices.
    let acpx = settled("an acpx that waits", 1, || waiting(server, &session)).await;
    kill_process(Pid::from_raw(acpx[0].cast_signed()).unwrap(), Signal::KILL).unwrap();
    let answer = server.post(&turns, token, &json!({"prompt": "And now?"})).await;
    assert_eq!((answer.status, &answer.json["turn_index"]), (StatusCode::OK, &json!(4)), "{answer:?}");
    let close = server.request(reqwest::Method::DELETE, &format!("/sessions/{session}"), token).send().await.unwrap();
    assert_eq!(close.status(), StatusCode::OK);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(waiting(server, &session), [0; 0], "a closed session expects no turn");
}
