//! The life of runs and turns where something comes between: a lock, a limit, a stop.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use rusqlite::Connection;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{ADMIN, Answer, Options, Server, until};

fn options() -> Options {
    Options::acpx_stand_in()
}

/// Mints a token of an app with limits.
async fn mint(server: &Server, name: &str, limits: Value) -> String {
    let mut body = limits;
    body["name"] = json!(name);
    let answer = server.post("/admin/tokens", ADMIN, &body).await;
    answer.json["token"].as_str().unwrap().to_owned()
}

async fn create(server: &Server, token: &str) -> String {
    server.post("/sessions", token, &json!({})).await.json["session_id"].as_str().unwrap().to_owned()
}

async fn send(server: &Server, token: &str, path: &str, prompt: &str, header: (&str, &str)) -> Answer {
    Answer::of(server.request(Method::POST, path, token).json(&json!({"prompt": prompt})).header(header.0, header.1)).await
}

/// Sends it until it is not refused any more.
async fn send_again(server: &Server, token: &str, path: &str, prompt: &str, header: (&str, &str)) -> Answer {
    let begun = Instant::now();
    loop {
        let answer = send(server, token, path, prompt, header).await;
        if answer.status != StatusCode::SERVICE_UNAVAILABLE {
            return answer;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn running(server: &Server, table: &str) {
    let sql = format!("SELECT count(*) FROM {table} WHERE status = 'running' AND prompt IS NOT NULL");
    until("it runs", || server.query::<i64>(&sql) == 1).await;
}

/// The ledger, locked as another program would.
fn lock(server: &Server) -> Connection {
    let ledger = Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute_batch("BEGIN IMMEDIATE").unwrap();
    ledger
}

const KEY: (&str, &str) = ("idempotency-key", "k");
const BACKGROUND: (&str, &str) = ("prefer", "respond-async");
const PLAIN: (&str, &str) = ("accept", "application/json");

#[tokio::test]
async fn a_key_is_free_again_where_the_budget_went_while_its_run_waited() {
    let server = options().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = mint(&server, "app", json!({"daily_usd": 0.2})).await;
    let (first, refused) = tokio::join!(server.run(&token, "do: wait"), async {
        running(&server, "runs").await;
        send(&server, &token, "/run", "hello", KEY).await
    });
    assert_eq!(first.status, StatusCode::OK);
    refused.problem(429);
    Answer::of(server.request(Method::DELETE, "/admin/tokens/app", ADMIN)).await;
    let token = mint(&server, "app", json!({"daily_usd": 2})).await;
    assert_eq!(send(&server, &token, "/run", "hello", KEY).await.json["result"], "ok");
    // That one keeps it.
    let again = send(&server, &token, "/run", "hello", KEY).await;
    assert_eq!((again.status, server.query::<i64>("SELECT count(*) FROM runs WHERE ok")), (StatusCode::OK, 2));
}

#[tokio::test]
async fn a_key_is_free_again_where_the_ledger_was_locked_at_the_start() {
    let server = options().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = mint(&server, "app", json!({"max_concurrent": 1})).await;
    let session = create(&server, &token).await;
    let turn = format!("/sessions/{session}/turn");
    for (path, table) in [("/run", "runs"), (turn.as_str(), "session_events")] {
        let key = ("idempotency-key", table);
        let (first, refused) = tokio::join!(server.run(&token, "do: wait"), async {
            running(&server, "runs").await;
            let waiting = format!("SELECT count(*) FROM {table} WHERE status = 'queued'");
            let (refused, ()) = tokio::join!(send(&server, &token, path, "hello", key), async {
                until("the second", || server.query::<i64>(&waiting) == 1).await;
                let ledger = lock(&server);
                tokio::time::sleep(Duration::from_millis(6500)).await;
                ledger.execute_batch("ROLLBACK").unwrap();
            });
            refused
        });
        assert_eq!(first.status, StatusCode::OK, "{first:?}");
        assert!(refused.problem(503).contains("locked"), "{refused:?}");
        assert_eq!(send_again(&server, &token, path, "hello", key).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_place_is_free_where_the_row_of_its_run_can_not_be_written() {
    let server = options().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let (first, ledger) = tokio::join!(server.run(&token, "do: wait"), async {
        running(&server, "runs").await;
        lock(&server)
    });
    assert_eq!(first.json["result"], "waited");
    let begun = Instant::now();
    let answer = server.run(&token, "hello").await;
    assert!(answer.problem(503).contains("locked"), "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    ledger.execute_batch("ROLLBACK").unwrap();
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    until("the first row", || server.query::<i64>("SELECT count(*) FROM runs WHERE result = 'waited'") == 1).await;
}

#[tokio::test]
async fn a_cancel_of_what_is_over_needs_no_ledger_to_write_to() {
    let server = options().start();
    let token = server.mint("app").await;
    let session = create(&server, &token).await;
    let turn = format!("/sessions/{session}/turn");
    send(&server, &token, &turn, "hello", BACKGROUND).await;
    until("the turn", || server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn' AND ok") == 1).await;
    let run = server.run(&token, "hello").await.header("x-run-id").to_owned();
    let ledger = lock(&server);
    for path in [format!("/runs/{run}"), format!("{turn}s/1")] {
        let answer = Answer::of(server.request(Method::DELETE, &path, &token)).await;
        assert_eq!((answer.status, &answer.json["already_over"]), (StatusCode::OK, &json!(true)), "{answer:?}");
    }
    ledger.execute_batch("ROLLBACK").unwrap();
}

#[tokio::test]
async fn turns_cost_what_they_cost_where_the_row_of_one_is_late() {
    let server = options().start();
    let token = server.mint("app").await;
    let session = create(&server, &token).await;
    let path = format!("/sessions/{session}/turn");
    let (first, ledger) = tokio::join!(send(&server, &token, &path, "cost slowly 0.5", PLAIN), async {
        running(&server, "session_events").await;
        lock(&server)
    });
    assert_eq!((first.status, &first.json["turn_index"]), (StatusCode::OK, &json!(1)), "{first:?}");
    // A close is not kept waiting, and leaves the session open.
    let closed = Answer::of(server.request(Method::DELETE, &format!("/sessions/{session}"), &token)).await;
    assert!(closed.problem(503).contains("locked"), "{closed:?}");
    ledger.execute_batch("ROLLBACK").unwrap();
    let second = send_again(&server, &token, &path, "cost 0.75", PLAIN).await;
    assert_eq!((second.status, &second.json["turn_index"]), (StatusCode::OK, &json!(2)), "{second:?}");
    until("the rows", || server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn' AND ok") == 2).await;
    let costs: String =
        server.query("SELECT group_concat(cost_usd) FROM (SELECT cost_usd FROM session_events WHERE event = 'turn' AND ok ORDER BY turn)");
    assert_eq!(costs, "0.5,0.25");
}

#[tokio::test]
async fn a_turn_that_was_cancelled_while_the_server_stopped_does_not_start_after_it() {
    let server = options().start();
    let token = server.mint("app").await;
    let session = create(&server, &token).await;
    let path = format!("/sessions/{session}/turn");
    // It has to begin to be answered before the server stops.
    let mut late = TcpStream::connect(server.address()).await.unwrap();
    late.write_all(b"DELETE ").await.unwrap();
    send(&server, &token, &path, "wait", BACKGROUND).await;
    running(&server, "session_events").await;
    assert_eq!(send(&server, &token, &path, "hello", BACKGROUND).await.status, StatusCode::ACCEPTED);
    server.signal(Signal::TERM);
    until("the stop", || server.log().contains("stopping")).await;
    // The first turn ends, and the second is left for the next start.
    until("the end of the first", || server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn' AND ok") == 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let rest = format!("/sessions/{session}/turns/2 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n");
    late.write_all(rest.as_bytes()).await.unwrap();
    let mut answer = String::new();
    late.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"already_over\":false"), "{answer}");
    let server = server.restart();
    let state = server.get(&format!("/sessions/{session}/turns/2"), &token).await.json;
    assert_eq!((&state["status"], &state["started_at"].is_i64()), (&json!("cancelled"), &true), "{state}");
    let told = server.get(&format!("/sessions/{session}/turns/2/events"), &token).await.text;
    assert!(told.contains("event: error\n: 409 problem\n"), "{told}");
}

#[tokio::test]
async fn turns_in_the_background_have_no_more_of_the_queue_than_runs() {
    let server = options().set("CLAWDFORGE_MAX_QUEUED_RUNS", 4).start();
    let token = mint(&server, "app", json!({"max_concurrent": 1})).await;
    let sessions = [create(&server, &token).await, create(&server, &token).await];
    let mut answers = Vec::new();
    for session in sessions.iter().cycle().take(6) {
        answers.push(send(&server, &token, &format!("/sessions/{session}/turn"), "wait", BACKGROUND).await.status.as_u16());
    }
    // One goes on, and two of the four that may wait can be this app's.
    assert_eq!(answers.iter().filter(|status| **status == 202).count(), 3, "{answers:?}");
    assert_eq!(answers.last(), Some(&503));
    until("their ends", || server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn' AND ok") == 3).await;
}

#[tokio::test]
async fn what_was_kept_with_whole_paths_finds_its_files_where_they_are_now() {
    let mut server = options().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let file = server.upload(&token, "a.txt", "content").await;
    send(&server, &token, "/run", "do: hang", BACKGROUND).await;
    let body = json!({"prompt": "do: where", "files": [file]});
    let waiting = Answer::of(server.request(Method::POST, "/run", &token).json(&body).header(BACKGROUND.0, BACKGROUND.1)).await;
    let id = waiting.header("x-run-id").to_owned();
    until("the first run", || server.query::<i64>("SELECT count(*) FROM runs WHERE NOT queued") == 1).await;
    server.signal(Signal::KILL);
    server.ended();
    let ledger = Connection::open(server.data().join("clawdforge.db")).unwrap();
    let moved =
        "UPDATE runs SET request = replace(replace(request, '\"file_token\":\"', '\"source\":\"/moved/files/'), ?1, '/moved') WHERE queued";
    assert_eq!(ledger.execute(moved, [server.data().display().to_string()]).unwrap(), 1);
    drop(ledger);
    let server = server.restart();
    until("its end", || server.query::<i64>(&format!("SELECT count(*) FROM runs WHERE run_id = '{id}' AND finished_at")) == 1).await;
    let state = server.get(&format!("/runs/{id}"), &token).await.json;
    assert!(state["result"].as_str().is_some_and(|result| result.contains("a.txt")), "{state}");
}
