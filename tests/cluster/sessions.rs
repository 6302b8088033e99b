//! What lasts: sessions where they live, streams, files.

use std::time::{Duration, SystemTime};

use crate::harness::{ADMIN, Answer, Options, Server, until};
use crate::{background, ended, is_left_out};
use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

async fn create(server: &Server, token: &str) -> String {
    let answer = server.post("/sessions", token, &json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["session_id"].as_str().unwrap().to_owned()
}

async fn turn(server: &Server, token: &str, id: &str, prompt: &str) -> Answer {
    server.post(&format!("/sessions/{id}/turn"), token, &json!({"prompt": prompt})).await
}

/// What is known of a machine.
async fn machine(server: &Server, name: &str) -> Value {
    let workers = server.get("/admin/workers", ADMIN).await.json["workers"].take();
    workers.as_array().unwrap().iter().find(|worker| worker["name"] == name).cloned().unwrap_or_default()
}

async fn away(server: &Server, name: &str) {
    let begun = std::time::Instant::now();
    while machine(server, name).await["here"] != false {
        assert!(begun.elapsed() < Duration::from_secs(15), "it is not found out");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn sessions_live_where_they_were_made() {
    if is_left_out() {
        return;
    }
    let mut server = Options::acpx_stand_in().workers(2).start();
    let token = server.mint("app").await;
    for _ in 0..4 {
        create(&server, &token).await;
    }
    assert_eq!(server.query::<String>("SELECT group_concat(count) FROM (SELECT count(*) AS count FROM sessions GROUP BY worker)"), "2,2");
    let on = |server: &Server, worker: &str| {
        server.query::<String>(&format!("SELECT session_id FROM sessions WHERE worker = '{worker}' LIMIT 1"))
    };
    let (here, there) = (on(&server, "machine-0"), on(&server, "machine-1"));
    for id in [&here, &there] {
        assert_eq!(turn(&server, &token, id, "hello").await.status, StatusCode::OK);
    }
    let there_row = "SELECT worker FROM session_events WHERE turn = 1 AND session_id = ";
    assert_eq!(server.query::<String>(&format!("{there_row}'{there}'")), "machine-1");
    server.request(Method::DELETE, "/admin/workers/machine-0", ADMIN).send().await.unwrap().error_for_status().unwrap_err();

    server.workers().kill("machine-0");
    away(&server, "machine-0").await;
    let refused = turn(&server, &token, &here, "hello").await;
    assert!(refused.problem(503).contains("machine-0"), "{refused:?}");
    assert!(refused.header("retry-after").parse::<u32>().unwrap() > 0);
    assert_eq!(turn(&server, &token, &there, "hello").await.status, StatusCode::OK);
    assert_eq!(server.query::<i64>(&format!("SELECT count(*) FROM session_events WHERE event = 'turn' AND session_id = '{here}'")), 1);
    server.start_workers();
    until("the machine", || server.log().matches("a machine is there").count() == 3).await;
    let back = turn(&server, &token, &here, "hello").await;
    assert_eq!((back.status, &back.json["turn_index"]), (StatusCode::OK, &json!(2)), "{back:?}");

    // It dies in a turn, and the next one waits for it.
    let background = |prompt: &'static str| {
        let request = server.request(Method::POST, &format!("/sessions/{here}/turn"), &token).header("prefer", "respond-async");
        Answer::of(request.json(&json!({"prompt": prompt})))
    };
    assert_eq!((background("owner").await.status, background("hello").await.status), (StatusCode::ACCEPTED, StatusCode::ACCEPTED));
    until("the turn", || server.running("sleep\x00643")).await;
    server.workers().kill("machine-0");
    away(&server, "machine-0").await;
    until("the end of the turn", || server.query::<i64>("SELECT count(*) FROM session_events WHERE stop_reason = 'interrupted'") == 1)
        .await;
    assert_eq!(server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn' AND finished_at IS NULL"), 1);
    let forgotten = Answer::of(server.request(Method::DELETE, "/admin/workers/machine-0", ADMIN)).await;
    assert_eq!((forgotten.status, &forgotten.json["sessions_closed"]), (StatusCode::OK, &json!(2)), "{forgotten:?}");
    until("the end of what waits", || server.query::<i64>("SELECT count(*) FROM session_events WHERE finished_at IS NULL") == 0).await;
    assert_eq!(turn(&server, &token, &here, "hello").await.status, StatusCode::GONE);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'worker_forgotten'"), 2);
    assert_eq!(machine(&server, "machine-0").await, Value::Null);
    let unknown = Answer::of(server.request(Method::DELETE, "/admin/workers/machine-7", ADMIN)).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    // New ones go to those that are there.
    create(&server, &token).await;
    // What ran there ends with its next start.
    server.start_workers();
    until("the end of all", || server.agents().is_empty()).await;
}

#[tokio::test]
async fn a_session_that_is_deleted_while_its_machine_is_away_goes_when_it_is_back() {
    if is_left_out() {
        return;
    }
    let options = Options::acpx_stand_in().set("CLAWDFORGE_SESSION_HARD_TTL_SECS", 0).set("CLAWDFORGE_SWEEP_SECS", 1);
    let mut server = options.workers(1).start();
    let token = server.mint("app").await;
    let id = create(&server, &token).await;
    assert_eq!(server.count("sessions"), 1);
    server.workers().kill("machine-0");
    away(&server, "machine-0").await;
    let closed = Answer::of(server.request(Method::DELETE, &format!("/sessions/{id}"), &token)).await;
    assert_eq!(closed.status, StatusCode::OK, "{closed:?}");
    until("its end", || server.query::<i64>("SELECT count(*) FROM sessions") == 0).await;
    assert_eq!(server.count("sessions"), 1);
    server.start_workers();
    until("the end of its folder", || server.count("sessions") == 0).await;
}

#[tokio::test]
async fn a_machine_that_stops_finishes_what_it_has_and_takes_no_more() {
    if is_left_out() {
        return;
    }
    let mut server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 2).workers(1).start();
    let token = server.mint("app").await;
    let first = background(&server, &token, "do: wait", "a").await;
    until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
    kill_process(Pid::from_raw(server.workers().pid("machine-0").cast_signed()).unwrap(), Signal::TERM).unwrap();
    until("what is said of it", || server.log().contains("what goes on may finish")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let second = background(&server, &token, "hello", "b").await;
    assert_eq!(ended(&server, &token, &first).await["status"], "succeeded");
    server.workers().stop_one("machine-0");
    assert_eq!(server.get(&format!("/runs/{second}"), &token).await.json["status"], "queued");
    server.start_workers();
    assert_eq!(ended(&server, &token, &second).await["status"], "succeeded");
}

#[tokio::test]
async fn a_stream_goes_on_where_the_server_was_killed() {
    if is_left_out() {
        return;
    }
    let mut server = Options::stand_in().workers(2).start();
    let token = server.mint("app").await;
    let id = background(&server, &token, "do: tell the time", "k").await;
    let feed = server.data().join("feeds").join(&id);
    until("a part of it", || std::fs::read_to_string(&feed).unwrap_or_default().matches("at ").count() > 5).await;
    server.kill();
    // It goes on meanwhile.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let server = server.restart();
    assert_eq!(ended(&server, &token, &id).await["status"], "succeeded");
    let told = server.get(&format!("/runs/{id}/events"), &token).await.text;
    let ids: Vec<u32> = told.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect();
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "{told}");
    let times: Vec<u64> = told.split("at ").skip(1).map(|rest| rest.split('"').next().unwrap().parse().unwrap()).collect();
    assert_eq!(times.len(), 20, "{told}");
    assert!(times.windows(2).all(|pair| pair[0] < pair[1]), "{told}");
    let rest = Answer::of(server.request(Method::GET, &format!("/runs/{id}/events"), &token).header("last-event-id", ids[9].to_string()));
    assert!(told.ends_with(&rest.await.text) && server.query::<i64>("SELECT count(*) FROM runs") == 1);
}

#[tokio::test]
async fn a_file_goes_to_a_machine_once_and_is_gone_with_its_time() {
    if is_left_out() {
        return;
    }
    let server = Options::stand_in().set("CLAWDFORGE_SWEEP_SECS", 1).workers(1).start();
    let token = server.mint("app").await;
    let file = server.upload(&token, "a.txt", "content").await;
    let copy = server.folder().join("machine-0/files").join(&file);
    let mut written = None;
    for _ in 0..2 {
        let answer = server.post("/run", &token, &json!({"prompt": "do: where", "files": [file]})).await;
        assert!(answer.json["result"].as_str().is_some_and(|result| result.contains("a.txt")), "{answer:?}");
        let now = copy.metadata().unwrap().modified().unwrap();
        assert_eq!(*written.get_or_insert(now), now, "it came once");
    }
    let old = SystemTime::now() - Duration::from_mins(2);
    std::fs::File::open(&copy).unwrap().set_modified(old).unwrap();
    // As long as its time is not over, it stays.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(copy.exists());
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE files SET expires_at = 1", []).unwrap();
    until("the end of its copy", || !copy.exists()).await;
    // A request that is too large for a message goes the same way.
    let answer = server.post("/run", &token, &json!({"prompt": "x".repeat(2 << 20)})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
}
