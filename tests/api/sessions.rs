//! `/sessions` where acpx misbehaves, and what needs no agent at all.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server, until};

fn options(behaviour: &str) -> Options {
    Options::acpx_stand_in().set("STAND_IN", behaviour)
}

async fn create(server: &Server, token: &str) -> String {
    let answer = server.post("/sessions", token, &json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["session_id"].as_str().unwrap().to_owned()
}

async fn turn(server: &Server, token: &str, id: &str, body: Value) -> Answer {
    server.post(&format!("/sessions/{id}/turn"), token, &body).await
}

#[tokio::test]
async fn without_what_speaks_to_an_agent_there_are_no_sessions_and_no_traces() {
    for (driver, looked_for) in [("acpx", "no-such-acpx"), ("direct", "claude-agent-acp")] {
        let options = Options::stand_in().set("CLAWDFORGE_ACP", driver).set("CLAWDFORGE_ACPX_BIN", "no-such-acpx");
        let server = options.set("PATH", "/usr/bin:/bin").start();
        let token = server.mint("app").await;
        let answer = server.post("/sessions", &token, &json!({})).await;
        let detail = answer.problem(503);
        assert!(detail.contains("npm install -g ") && detail.contains(looked_for), "{detail}");
        assert_eq!(answer.header("retry-after"), "5");
        assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 0);
        assert_eq!(server.count("sessions"), 0);
    }
}

#[tokio::test]
async fn without_claude_it_is_claude_that_is_said_to_be_missing() {
    let server = options("").set("CLAWDFORGE_CLAUDE_BIN", "no-such-claude").start();
    let token = server.mint("app").await;
    let answer = server.post("/sessions", &token, &json!({})).await;
    assert!(answer.problem(502).contains("the claude CLI is not installed (looked for \"no-such-claude\")"), "{answer:?}");
    assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 0);
    assert_eq!(server.count("sessions"), 0);
}

#[tokio::test]
async fn a_creation_that_fails_says_why_and_leaves_nothing() {
    for (behaviour, expected) in [("fail", "no agent here"), ("garbage", "did not say what it created")] {
        let server = options(behaviour).start();
        let token = server.mint("app").await;
        let answer = server.post("/sessions", &token, &json!({})).await;
        assert!(answer.problem(502).contains(expected), "{answer:?}");
        assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 0);
        assert_eq!(server.count("sessions"), 0);
    }
}

#[tokio::test]
async fn a_client_that_leaves_a_creation_that_hangs_leaves_nothing() {
    let server = options("hang").start();
    let token = server.mint("app").await;
    let body = json!({});
    let leaves = tokio::time::timeout(Duration::from_secs(1), server.post("/sessions", &token, &body));
    assert!(leaves.await.is_err());
    until("the row to go", || server.query::<i64>("SELECT count(*) FROM sessions") == 0).await;
    until("the processes to go", || server.descendants().is_empty()).await;
    assert_eq!(server.count("sessions"), 0);
}

#[tokio::test]
async fn a_turn_that_fails_says_why_and_the_session_stays_usable() {
    let server = options("").start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    for (prompt, expected) in [
        ("exit 1", "acpx ended (exit status: 1)"),
        ("exit 2", "acpx ended (exit status: 2)"),
        ("exit 3", "acpx ended (exit status: 3)"),
        ("exit 4", "acpx ended (exit status: 4)"),
        ("exit 5", "acpx ended (exit status: 5)"),
        ("exit 130", "acpx ended (exit status: 130)"),
        ("exit 0", "acpx ended (exit status: 0) before the turn did"),
        ("garbage", "before the turn did"),
        ("die", "acpx ended (signal: 9 (SIGKILL))"),
        ("flood", "printed too much"),
    ] {
        let answer = turn(&server, &token, &id, json!({"prompt": prompt})).await;
        assert_eq!(
            (answer.status, &answer.json["stop_reason"]),
            (StatusCode::BAD_GATEWAY, &json!("error")),
            "{prompt}: {:.500}",
            answer.text
        );
        assert!(answer.json["error"].as_str().unwrap().contains(expected), "{prompt}: {}", answer.json["error"]);
    }
    let answer = turn(&server, &token, &id, json!({"prompt": "hello"})).await;
    assert_eq!(
        (answer.status, &answer.json["turn_index"], &answer.json["text"]),
        (StatusCode::OK, &json!(1), &json!("answer")),
        "{answer:?}"
    );
    let types: Vec<_> = answer.json["events"].as_array().unwrap().iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["text", "stop"]);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM session_events WHERE finished_at IS NULL"), 0);
}

#[tokio::test]
async fn the_answer_does_not_wait_for_acpx_to_end() {
    let server = options("").start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    let begun = Instant::now();
    assert_eq!(turn(&server, &token, &id, json!({"prompt": "hello"})).await.status, StatusCode::OK);
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    until("acpx to end by itself", || server.descendants().is_empty()).await;
}

#[tokio::test]
async fn where_the_cancel_hangs_the_owner_and_all_below_it_are_ended() {
    let server = options("hang-cancel").start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    let begun = Instant::now();
    let answer = turn(&server, &token, &id, json!({"prompt": "owner", "timeout_secs": 5})).await;
    assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("timeout")), "{answer:?}");
    assert_eq!(answer.json["events"].as_array().unwrap().len(), 1);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(!server.running("sleep\x00642") && !server.running("sleep\x00643"));
    assert_eq!(turn(&server, &token, &id, json!({"prompt": "hello"})).await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_is_asked_for_is_checked() {
    let server = options("").set("CLAWDFORGE_AGENTS", "claude,codex").start();
    let token = server.mint("app").await;
    for (body, pointer) in [
        (json!({"agent": "rm -rf"}), "/agent"),
        (json!({"agent": "gemini"}), "/agent"),
        (json!({"agent": "codex", "permissions": "deny-all"}), "/permissions"),
        (json!({"agent": "codex", "permissions": "approve-reads"}), "/permissions"),
        (json!({"agent": "codex", "model": "o9"}), "/model"),
        (json!({"model": "-x"}), "/model"),
        (json!({"meta": [1]}), "/meta"),
        (json!({"permissions": "all"}), "/permissions"),
    ] {
        let answer = server.post("/sessions", &token, &body).await;
        answer.problem(422);
        assert_eq!(answer.json["errors"][0]["pointer"], pointer, "{answer:?}");
    }
    let made = server.post("/sessions", &token, &json!({"agent": "codex", "meta": null})).await;
    assert_eq!((&made.json["agent"], &made.json["meta"], &made.json["model"]), (&json!("codex"), &Value::Null, &Value::Null));
    let id = made.json["session_id"].as_str().unwrap();
    turn(&server, &token, id, json!({"prompt": ""})).await.problem(422);
    turn(&server, &token, id, json!({"prompt": "x", "files": ["ff_none"]})).await.problem(400);
    server.get("/sessions?include_closed=perhaps", &token).await.problem(400);

    let older = create(&server, &token).await;
    Answer::of(server.request(Method::DELETE, &format!("/sessions/{older}"), &token)).await;
    let all = server.get("/sessions", &token).await;
    let ids: Vec<_> = all.json["sessions"].as_array().unwrap().iter().map(|session| session["session_id"].as_str().unwrap()).collect();
    assert_eq!(ids, [older.as_str(), id], "newest first");
    assert_eq!(all.json["sessions"][0]["live"], false);
    assert_eq!(server.get("/sessions?include_closed=False", &token).await.json["count"], 1);
    let keys = server.get(&format!("/sessions/{id}"), &token).await.keys();
    let expected =
        ["session_id", "agent", "model", "cwd", "created_at", "last_turn_at", "turn_count", "closed_at", "live", "meta", "permissions"];
    assert_eq!(keys, expected);
}

#[tokio::test]
async fn a_key_whose_creation_a_crash_took_back_is_free_again() {
    let server = options("hang").start();
    let token = server.mint("app").await;
    let create = async |server: &Server| {
        Answer::of(server.request(Method::POST, "/sessions", &token).header("idempotency-key", "k").json(&json!({}))).await
    };
    tokio::select! {
        answer = create(&server) => panic!("{answer:?}"),
        () = until("the creation", || server.running("sleep\x00640")) => {}
    }
    let server = server.crash_and_restart();
    assert_eq!(server.query::<i64>("SELECT count(*) FROM idempotency"), 0);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 0);
    tokio::select! {
        answer = create(&server) => panic!("{answer:?}"),
        () = until("the creation", || server.running("sleep\x00640")) => {}
    }
    server.signal(rustix::process::Signal::INT);
}

#[tokio::test]
async fn a_deleted_session_leaves_nothing_of_what_it_said() {
    let server = options("").set("CLAWDFORGE_SWEEP_SECS", 1).set("CLAWDFORGE_SESSION_HARD_TTL_SECS", 0).start();
    let token = server.mint("app").await;
    let (kept, id) = (create(&server, &token).await, create(&server, &token).await);
    for session in [&kept, &id] {
        assert_eq!(turn(&server, &token, session, json!({"prompt": "hello"})).await.status, StatusCode::OK);
    }
    let feeds = server.data().join("feeds");
    // As a crash leaves them: of a run without a row, and of a session that an earlier release deleted.
    let orphans = [feeds.join("0".repeat(32)), feeds.join(format!("{}-1", "0".repeat(32)))];
    for orphan in &orphans {
        let old = std::time::SystemTime::now() - Duration::from_hours(1);
        std::fs::File::create(orphan).unwrap().set_modified(old).unwrap();
    }
    std::fs::File::open(feeds.join(format!("{kept}-1")))
        .unwrap()
        .set_modified(std::time::SystemTime::now() - Duration::from_hours(1))
        .unwrap();
    Answer::of(server.request(Method::DELETE, &format!("/sessions/{id}"), &token)).await;
    until("the sweep", || {
        let left: Vec<_> = feeds.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left == [format!("{kept}-1")]
    })
    .await;
    assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 1);
}

#[tokio::test]
async fn a_sessions_files_have_a_bound_and_what_is_not_attached_does_not_count() {
    let server = options("").set("CLAWDFORGE_MAX_UPLOAD_BYTES", 100).start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    let bytes = || server.query::<i64>("SELECT attached_bytes FROM sessions");
    let file = server.upload(&token, "a.txt", "x".repeat(100).leak()).await;
    let attach = |prompt: &'static str| json!({"prompt": prompt, "files": [file]});
    for n in 1..=9 {
        let answer = turn(&server, &token, &id, attach("hello")).await;
        let name = if n == 1 { "a.txt".to_owned() } else { format!("a-{n}.txt") };
        assert_eq!((answer.status, &answer.json["files"]), (StatusCode::OK, &json!([name])), "{answer:?}");
    }
    // A turn that fails has its files all the same.
    let failed = turn(&server, &token, &id, attach("exit 1")).await;
    assert_eq!((failed.status, &failed.json["files"]), (StatusCode::BAD_GATEWAY, &json!(["a-10.txt"])), "{failed:?}");
    for headers in [None, Some(("prefer", "respond-async"))] {
        let request = server.request(Method::POST, &format!("/sessions/{id}/turn"), &token).json(&attach("hello"));
        let answer = Answer::of(headers.into_iter().fold(request, |request, (name, value)| request.header(name, value))).await;
        assert!(answer.problem(413).contains("1000 bytes"), "{answer:?}");
    }
    assert_eq!(bytes(), 1000);
    assert_eq!(turn(&server, &token, &id, json!({"prompt": "hello"})).await.status, StatusCode::OK);

    // What can't be copied is gone from the count too.
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE sessions SET attached_bytes = 0", []).unwrap();
    std::fs::remove_file(server.data().join("files").join(&file)).unwrap();
    assert!(turn(&server, &token, &id, attach("hello")).await.problem(400).contains("Upload the files again"));
    assert_eq!(bytes(), 0);
}
