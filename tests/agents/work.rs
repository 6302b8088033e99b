//! Runs and turns that are watched, in the background, cancelled, and sent again, with the real CLIs.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{Answer, Server, until};

/// An event of a stream, and when it came.
#[derive(Debug)]
struct Event {
    id: u64,
    name: String,
    data: Value,
    at: Instant,
}

/// Reads events until there are `most`, or the stream ends.
async fn events(request: RequestBuilder, most: usize) -> Vec<Event> {
    let response = request.send().await.unwrap();
    assert_eq!((response.status(), response.headers()["content-type"].to_str().unwrap()), (StatusCode::OK, "text/event-stream"));
    let (mut bytes, mut text, mut events) = (response.bytes_stream(), String::new(), Vec::new());
    while let Some(piece) = bytes.next().await {
        text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        while let Some((frame, rest)) = text.split_once("\n\n") {
            let field = |name: &str| frame.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            let data = serde_json::from_str(field("data: ")).unwrap_or_default();
            events.push(Event {
                id: field("id: ").parse().unwrap_or_default(),
                name: field("event: ").to_owned(),
                data,
                at: Instant::now(),
            });
            text = rest.to_owned();
            if events.len() == most {
                return events;
            }
        }
    }
    events
}

fn stream(server: &Server, token: &str, path: &str, prompt: &str) -> RequestBuilder {
    server.request(Method::POST, path, token).header("accept", "text/event-stream").json(&json!({"prompt": prompt}))
}

fn text(events: &[Event]) -> String {
    events.iter().filter(|event| event.name == "text").filter_map(|event| event.data["content"].as_str()).collect()
}

/// What the stub is to say, slowly.
const WORDS: &str = "Plums ripen late, and quinces later still; the medlar waits for the frost before it is any good at all.";

fn slowly(pace_ms: u64) -> String {
    format!("stub: {}", json!({"text": WORDS, "pace_ms": pace_ms}))
}

#[tokio::test]
async fn a_runs_text_comes_in_pieces_and_a_reader_that_is_cut_goes_on() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let all = events(stream(server, token, "/run", &slowly(150)), usize::MAX).await;
    assert_eq!(all.iter().map(|event| event.id).collect::<Vec<_>>(), (1..=all.len() as u64).collect::<Vec<_>>());
    let last = all.last().unwrap();
    assert_eq!((last.name.as_str(), &last.data["result"], text(&all).as_str()), ("result", &json!(WORDS), WORDS));
    let first = all.iter().find(|event| event.name == "text").unwrap();
    assert!(last.at - first.at > Duration::from_millis(500), "the text came at once");

    let cut = events(stream(server, token, "/run", &slowly(150)).header("idempotency-key", "k"), 3).await;
    let id: String = server.query("SELECT run_id FROM runs ORDER BY rowid DESC LIMIT 1");
    let rest =
        |after: u64| events(server.request(Method::GET, &format!("/runs/{id}/events"), token).header("last-event-id", after), usize::MAX);
    let (one, other) = tokio::join!(rest(3), rest(0));
    assert_eq!(text(&cut) + &text(&one), WORDS);
    assert_eq!(text(&other), WORDS);
    let ids: Vec<_> = cut.iter().chain(&one).map(|event| event.id).collect();
    assert_eq!(ids, other.iter().map(|event| event.id).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_tools_calls_are_told() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let file = server.upload(token, "fruit.txt", "medlar").await;
    let path = server.data().join("nowhere.txt");
    let tool = json!({"tool": {"name": "Read", "input": {"file_path": path}}});
    let body = json!({"prompt": format!("stub: {tool}"), "files": [file]});
    let request = server.request(Method::POST, "/run", token).header("accept", "text/event-stream").json(&body);
    let all = events(request, usize::MAX).await;
    let call = all.iter().find(|event| event.name == "tool_call").expect("a call");
    let update = all.iter().find(|event| event.name == "tool_call_update").expect("an update");
    assert_eq!((&call.data["name"], &call.data["id"]), (&json!("Read"), &update.data["id"]));
    assert_eq!(update.data["status"], "failed");
}

#[tokio::test]
async fn a_key_that_three_callers_use_at_once_creates_one_session() {
    let Some(forge) = Forge::start().await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let create = |server: &Server, body: Value| {
        Answer::of(server.request(Method::POST, "/sessions", &token).header("idempotency-key", "k").json(&body))
    };
    let body = json!({"meta": {"a": 1}});
    let (one, two, three) = tokio::join!(create(&server, body.clone()), create(&server, body.clone()), create(&server, body.clone()));
    assert_eq!((one.status, &one.text, &one.text), (StatusCode::OK, &two.text, &three.text));
    create(&server, json!({})).await.problem(422);
    let server = server.crash_and_restart();
    assert_eq!(create(&server, body).await.text, one.text);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 1);
}

async fn session(server: &Server, token: &str) -> String {
    server.post("/sessions", token, &json!({})).await.json["session_id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_turn_is_streamed_resumed_and_repeated() {
    let Some(forge) = Forge::start().await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let path = format!("/sessions/{}/turn", session(&server, &token).await);
    let all = events(stream(&server, &token, &path, &slowly(100)), usize::MAX).await;
    let last = all.last().unwrap();
    assert_eq!((last.name.as_str(), &last.data["text"], &last.data["turn_index"]), ("result", &json!(WORDS), &json!(1)));
    assert_eq!(text(&all), WORDS);
    let plain: Vec<_> = last.data["events"].as_array().unwrap().iter().map(|event| event["type"].clone()).collect();
    assert_eq!(plain, all[..all.len() - 1].iter().map(|event| event.data["type"].clone()).collect::<Vec<_>>());
    assert!(last.at - all.iter().find(|event| event.name == "text").unwrap().at > Duration::from_millis(300));

    let keyed = |prompt: &str| server.request(Method::POST, &path, &token).header("idempotency-key", "k").json(&json!({"prompt": prompt}));
    let long = slowly(100);
    let (first, second) = tokio::join!(Answer::of(keyed(&long)), Answer::of(keyed(&long)));
    assert_eq!((first.status, &first.text, &first.json["turn_index"]), (StatusCode::OK, &second.text, &json!(2)));
    Answer::of(keyed("another")).await.problem(422);
    let events_path = format!("{path}s/2/events");
    let rest = events(server.request(Method::GET, &events_path, &token).header("last-event-id", 5), usize::MAX).await;
    assert_eq!((rest[0].id, rest.last().unwrap().data.to_string()), (6, first.json.to_string()));
    let server = server.crash_and_restart();
    let again = server.request(Method::POST, &path, &token).header("idempotency-key", "k").json(&json!({"prompt": long}));
    assert_eq!(Answer::of(again).await.text, first.text);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM session_events WHERE event = 'turn'"), 2);
}

#[tokio::test]
async fn turns_in_the_background_are_cancelled_or_survive_a_crash_that_found_them_waiting() {
    let Some(forge) = Forge::start().await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let id = session(&server, &token).await;
    let path = format!("/sessions/{id}/turn");
    let tool = json!({"tool": {"name": "Bash", "input": {"command": "true; sleep 641", "description": "test"}}});
    let sleeps = format!("stub: {tool}");
    let background = async |server: &Server, prompt: &str| {
        let request = server.request(Method::POST, &path, &token).header("prefer", "respond-async").json(&json!({"prompt": prompt}));
        let answer = Answer::of(request).await;
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
        answer.header("location").to_owned()
    };
    let status = async |server: &Server, location: &str| server.get(location, &token).await.json;

    let [running, waiting] = [background(&server, &sleeps).await, background(&server, "hello").await];
    assert_eq!((running.as_str(), waiting.as_str()), (format!("{path}s/1").as_str(), format!("{path}s/2").as_str()));
    until("the command", || server.running("sleep\x00641")).await;
    assert_eq!(status(&server, &running).await["status"], "running");
    assert_eq!(status(&server, &waiting).await["status"], "queued");
    let cancel = Answer::of(server.request(Method::POST, &format!("/sessions/{id}/cancel"), &token)).await;
    assert_eq!(cancel.json, json!({"ok": true, "session_id": id, "cancelled": 2}));
    assert!(!server.running("sleep\x00641"));
    for location in [&running, &waiting] {
        assert_eq!(status(&server, location).await["status"], "cancelled");
    }
    let one = background(&server, r#"stub: {"delay_ms": 60000}"#).await;
    let cancel_one = async || Answer::of(server.request(Method::DELETE, &one, &token)).await.json;
    assert_eq!(cancel_one().await, json!({"ok": true, "session_id": id, "turn": 3, "already_over": false}));
    assert_eq!(
        (cancel_one().await["already_over"].clone(), status(&server, &one).await["status"].clone()),
        (json!(true), json!("cancelled"))
    );
    let again = Answer::of(server.request(Method::POST, &format!("/sessions/{id}/cancel"), &token)).await;
    assert_eq!((again.status, &again.json["cancelled"]), (StatusCode::OK, &json!(0)));

    let [running, waiting] = [background(&server, r#"stub: {"delay_ms": 60000}"#).await, background(&server, "hello").await];
    until("the turn", || server.query::<i64>("SELECT count(*) FROM session_events WHERE status = 'running'") == 1).await;
    let server = server.crash_and_restart();
    assert_eq!(status(&server, &running).await["status"], "interrupted");
    let told = Answer::of(server.request(Method::GET, &format!("{running}/events"), &token)).await.text;
    assert!(told.contains("event: error\n: 502\n"), "{told}");
    let begun = Instant::now();
    while status(&server, &waiting).await["status"] != "succeeded" {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", server.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let state = server.get(&format!("/sessions/{id}"), &token).await.json;
    assert_eq!(state["turn_count"], 1);
}

#[tokio::test]
async fn a_reply_fits_the_schema_or_it_is_said_where_not() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    let ask = async |reply: Value| {
        let tool = json!({"tool": {"name": "StructuredOutput", "input": reply}});
        server.post("/run", token, &json!({"prompt": format!("stub: {tool}"), "schema": schema})).await
    };
    let answer = ask(json!({"n": 3})).await;
    assert_eq!((answer.status, &answer.json["result"]), (StatusCode::OK, &json!({"n": 3})), "{answer:?}");
    let text = format!("stub: {}", json!({"text": r#"{"n": "three"}"#}));
    let wrong = server.post("/run", token, &json!({"prompt": text, "schema": schema})).await;
    assert_eq!(wrong.status, StatusCode::BAD_GATEWAY, "{wrong:?}");
    assert!(wrong.json["error"].as_str().unwrap().contains("does not fit the schema"), "{wrong:?}");
}
