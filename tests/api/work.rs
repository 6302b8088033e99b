//! Runs that are watched, in the background, cancelled, and sent again.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Answer, Options, Server, many_descriptors, peak, until};

/// A run with these headers.
async fn run(server: &Server, token: &str, prompt: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = server.request(Method::POST, "/run", token).json(&json!({"prompt": prompt}));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    Answer::of(request).await
}

/// One in the background; gives its id.
async fn background(server: &Server, token: &str, prompt: &str) -> String {
    let answer = run(server, token, prompt, &[("prefer", "respond-async")]).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    assert_eq!(answer.header("preference-applied"), "respond-async");
    let id = answer.header("x-run-id").to_owned();
    assert_eq!((answer.header("location"), &answer.json["run_id"]), (format!("/runs/{id}").as_str(), &json!(id)));
    id
}

async fn state(server: &Server, token: &str, id: &str) -> Value {
    server.get(&format!("/runs/{id}"), token).await.json
}

async fn ended(server: &Server, token: &str, id: &str) -> Value {
    for _ in 0..600 {
        let state = state(server, token, id).await;
        if state["finished_at"].is_i64() {
            return state;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the run does not end")
}

async fn cancel(server: &Server, token: &str, id: &str) -> Answer {
    Answer::of(server.request(Method::DELETE, &format!("/runs/{id}"), token)).await
}

/// The names of the events in a stream, with their ids.
fn names(stream: &str) -> Vec<(u64, String)> {
    let frames = stream.split("\n\n").filter(|frame| frame.contains("event: "));
    let field = |frame: &str, name: &str| frame.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned)).unwrap_or_default();
    frames.map(|frame| (field(frame, "id: ").parse().unwrap_or_default(), field(frame, "event: "))).collect()
}

#[tokio::test]
async fn a_stream_ends_with_the_plain_answer() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let stream = [("accept", "text/event-stream")];
    let answer = run(&server, &token, "hello", &stream).await;
    assert_eq!((answer.status, answer.header("content-type")), (StatusCode::OK, "text/event-stream"));
    assert_eq!(names(&answer.text), [(1, "result".to_owned())]);
    let data = answer.text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    let plain = server.run(&token, "hello").await;
    let same = |text: &str| text.split("\"duration_ms\":").next().unwrap().to_owned();
    assert_eq!(same(data), same(&plain.text));

    let failed = run(&server, &token, "do: exit 3", &stream).await;
    assert_eq!(failed.status, StatusCode::OK);
    assert!(failed.text.starts_with("id: 1\nevent: error\n: 502\ndata: {\"ok\":false,"), "{failed:?}");
    run(&server, &token, "", &stream).await.problem(422);
    // Whoever comes later reads the same, and of another's nothing.
    let path = format!("/runs/{}/events", failed.header("x-run-id"));
    assert_eq!(server.get(&path, &token).await.text, failed.text);
    let other = server.mint("other").await;
    let never = server.get(&format!("/runs/{}/events", "0".repeat(32)), &other).await;
    assert_eq!(server.get(&path, &other).await.problem(404), never.problem(404));
}

#[tokio::test]
async fn what_is_not_kept_any_more_is_said() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let id = server.run(&token, "hello").await.header("x-run-id").to_owned();
    let events = |last: &'static str| server.request(Method::GET, &format!("/runs/{id}/events"), &token).header("last-event-id", last);
    assert_eq!(Answer::of(events("1")).await.text, "");
    assert_eq!(names(&Answer::of(events("7")).await.text)[0].1, "gap");
    Answer::of(events("x")).await.problem(400);
    std::fs::remove_file(server.data().join("feeds").join(&id)).unwrap();
    let told = Answer::of(events("0")).await.text;
    assert_eq!(names(&told).into_iter().map(|(_, name)| name).collect::<Vec<_>>(), ["gap", "result"]);
    assert!(told.contains("\"result\":\"ok\""), "{told}");
}

#[tokio::test]
async fn a_background_run_is_seen_to_its_end() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let first = background(&server, &token, "do: wait").await;
    let second = background(&server, &token, "do: exit 3").await;
    let waiting = state(&server, &token, &second).await;
    assert_eq!((&waiting["status"], &waiting["started_at"], &waiting["result"]), (&json!("queued"), &Value::Null, &Value::Null));
    let done = ended(&server, &token, &first).await;
    assert_eq!((&done["status"], &done["result"], &done["cost_usd"]), (&json!("succeeded"), &json!("waited"), &json!(0.25)));
    assert_eq!((&done["input_tokens"], &done["output_tokens"], &done["stop_reason"]), (&json!(3), &json!(4), &json!("end_turn")));
    let failed = ended(&server, &token, &second).await;
    assert_eq!((&failed["status"], &failed["stop_reason"]), (&json!("failed"), &json!("error")));
    let other = server.mint("other").await;
    server.get(&format!("/runs/{first}"), &other).await.problem(404);
    cancel(&server, &other, &first).await.problem(404);
}

#[tokio::test]
async fn a_cancel_ends_the_run_and_its_processes_at_every_step() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let running = background(&server, &token, "do: fork and hang").await;
    let queued = background(&server, &token, "hello").await;
    until("its processes", || server.running("sleep\x00601")).await;
    assert_eq!(cancel(&server, &token, &queued).await.json, json!({"ok": true, "run_id": queued, "already_over": false}));
    assert_eq!(state(&server, &token, &queued).await["status"], "cancelled");
    assert_eq!(cancel(&server, &token, &running).await.status, StatusCode::OK);
    assert_eq!(server.descendants(), [0; 0]);
    assert_eq!(state(&server, &token, &running).await["status"], "cancelled");
    assert_eq!(cancel(&server, &token, &running).await.json["already_over"], true);
    let told = server.get(&format!("/runs/{running}/events"), &token).await.text;
    assert!(told.contains("event: error\n: 502\n") && told.contains("\"stop_reason\":\"cancelled\""), "{told}");
    // One that somebody waits for.
    let (answer, ()) = tokio::join!(server.run(&token, "do: hang"), async {
        until("the run", || server.running("sleep\x00600")).await;
        let id: String = server.query("SELECT run_id FROM runs WHERE finished_at IS NULL");
        assert_eq!(cancel(&server, &token, &id).await.status, StatusCode::OK);
    });
    assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("cancelled")));
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_it_but_not_with_a_key() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    for (key, status) in [(None, "cancelled"), (Some("k"), "succeeded")] {
        let mut request = server.request(Method::POST, "/run", &token).header("accept", "text/event-stream");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let response = request.json(&json!({"prompt": "do: wait"})).send().await.unwrap();
        let id = response.headers()["x-run-id"].to_str().unwrap().to_owned();
        until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
        drop(response);
        assert_eq!(ended(&server, &token, &id).await["status"], status);
    }
}

#[tokio::test]
async fn a_key_that_ten_callers_use_at_once_runs_once() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let key = [("idempotency-key", "\"8e03978e-40d5-43e8-bc93-6894a57f9324\"")];
    let answers = join_all((0..10).map(|_| run(&server, &token, "do: wait", &key))).await;
    for answer in &answers {
        assert_eq!((answer.status, &answer.text), (StatusCode::OK, &answers[0].text));
        assert_eq!(answer.header("x-run-id"), answers[0].header("x-run-id"));
    }
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 1);
    // Another body is another request; another app's key is another key.
    assert!(run(&server, &token, "hello", &key).await.problem(422).contains("another request"));
    let other = server.mint("other").await;
    assert_eq!(run(&server, &other, "hello", &key).await.json["result"], "ok");
    run(&server, &token, "hello", &[("idempotency-key", "")]).await.problem(400);
    run(&server, &token, "hello", &[("idempotency-key", &"k".repeat(256))]).await.problem(400);

    let server = server.crash_and_restart();
    let again = run(&server, &token, "do: wait", &key).await;
    assert_eq!((again.status, &again.text), (StatusCode::OK, &answers[0].text));
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 2);
}

#[tokio::test]
async fn a_failure_is_repeated_too_and_a_refusal_is_not() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_MAX_QUEUED_RUNS", 0).start();
    let token = server.mint("app").await;
    let key = [("idempotency-key", "k")];
    let (first, refused) = tokio::join!(server.run(&token, "do: wait"), async {
        until("the first run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
        run(&server, &token, "do: stderr", &key).await
    });
    assert_eq!(first.status, StatusCode::OK);
    refused.problem(503);
    // The first run's place is free a little after its answer.
    let mut failed = refused;
    let begun = Instant::now();
    while failed.status == StatusCode::SERVICE_UNAVAILABLE && begun.elapsed() < Duration::from_secs(10) {
        failed = run(&server, &token, "do: stderr", &key).await;
    }
    assert_eq!(failed.status, StatusCode::BAD_GATEWAY);
    assert!(failed.json["stderr"].as_str().unwrap().ends_with("end\n"), "{failed:?}");
    assert_eq!(run(&server, &token, "do: stderr", &key).await.text, failed.text);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 2);
}

#[tokio::test]
async fn after_a_crash_each_background_run_has_one_honest_end() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let done = background(&server, &token, "hello").await;
    ended(&server, &token, &done).await;
    let running = background(&server, &token, "do: hang").await;
    until("the run", || server.running("sleep\x00600")).await;
    let queued = [background(&server, &token, "first").await, background(&server, &token, "second").await];
    let key = [("idempotency-key", "k"), ("prefer", "respond-async")];
    let keyed = run(&server, &token, "third", &key).await.header("x-run-id").to_owned();

    let server = server.crash_and_restart();
    assert_eq!(state(&server, &token, &done).await["status"], "succeeded");
    assert_eq!(state(&server, &token, &running).await["status"], "interrupted");
    let told = server.get(&format!("/runs/{running}/events"), &token).await.text;
    assert_eq!(names(&told).last().unwrap().1, "error", "{told}");
    for id in queued.iter().chain([&keyed]) {
        assert_eq!(ended(&server, &token, id).await["status"], "succeeded");
    }
    let order: String = server.query("SELECT group_concat(prompt) FROM (SELECT prompt FROM runs ORDER BY started_at, run_id)");
    assert_eq!(order, "hello,do: hang,first,second,third");
    let again = run(&server, &token, "third", &key).await;
    assert_eq!((again.status, again.header("x-run-id")), (StatusCode::ACCEPTED, keyed.as_str()));
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 5);
}

#[tokio::test]
async fn a_request_that_can_not_be_read_any_more_does_not_stop_the_start() {
    let mut server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    background(&server, &token, "do: hang").await;
    let [odd, good] = [background(&server, &token, "odd").await, background(&server, &token, "good").await];
    server.signal(Signal::KILL);
    server.ended();
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE runs SET request = '{}' WHERE run_id = ?1", [&odd]).unwrap();
    drop(ledger);
    let server = server.restart();
    assert_eq!(ended(&server, &token, &odd).await["status"], "failed");
    let told = server.get(&format!("/runs/{odd}/events"), &token).await.text;
    assert!(told.contains("event: error\n: 502\n"), "{told}");
    assert_eq!(ended(&server, &token, &good).await["status"], "succeeded");
}

#[tokio::test]
async fn a_stop_leaves_what_waits_in_the_background_for_the_next_start() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let running = background(&server, &token, "do: wait").await;
    let queued = background(&server, &token, "hello").await;
    until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
    server.signal(Signal::TERM);
    let server = server.restart();
    assert_eq!(state(&server, &token, &running).await["status"], "succeeded");
    assert_eq!(ended(&server, &token, &queued).await["status"], "succeeded");
}

#[tokio::test]
async fn a_thousand_readers_that_stop_reading_cost_little_and_hold_up_nobody() {
    many_descriptors();
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let id = server.run(&token, "do: long").await.header("x-run-id").to_owned();
    let request = format!("GET /runs/{id}/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n");
    let mut readers = Vec::new();
    for _ in 0..1000 {
        let mut reader = TcpStream::connect(server.address()).await.unwrap();
        reader.write_all(request.as_bytes()).await.unwrap();
        reader.read_u8().await.unwrap();
        readers.push(reader);
    }
    let before = std::time::Instant::now();
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    assert!(before.elapsed() < Duration::from_secs(2));
    // 3 MB wait for each of them, of which a quarter of a MiB is held.
    assert!(peak(&server) < 400 << 10, "the server's memory went up to {} KiB", peak(&server));
    let last = server.get(&format!("/runs/{id}/events"), &token).await.text;
    assert!(last.len() > 3_000_000 && last.ends_with("}\n\n"));
    drop(readers);
}
