//! Many runs at once.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, Server, until};
use crate::receiver::Receiver;

async fn make(server: &Server, token: &str, runs: &Value) -> Answer {
    server.post("/batches", token, &json!({"runs": runs})).await
}

async fn lines(server: &Server, token: &str, body: String) -> Answer {
    Answer::of(server.request(Method::POST, "/batches", token).header("content-type", "application/x-ndjson").body(body)).await
}

async fn state(server: &Server, token: &str, id: &str) -> Value {
    server.get(&format!("/batches/{id}"), token).await.json
}

async fn until_over(server: &Server, token: &str, id: &str) -> Value {
    let begun = Instant::now();
    loop {
        let state = state(server, token, id).await;
        if !state["finished_at"].is_null() {
            return state;
        }
        assert!(begun.elapsed() < Duration::from_mins(1), "{state}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn results(server: &Server, token: &str, id: &str, after: i64) -> Vec<Value> {
    let answer = server.get(&format!("/batches/{id}/results?after={after}"), token).await;
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn id(answer: &Answer) -> String {
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    let id = answer.json["batch_id"].as_str().unwrap().to_owned();
    assert_eq!(answer.header("location"), format!("/batches/{id}"));
    id
}

#[tokio::test]
async fn a_batch_is_made_and_its_results_come_in_the_order_of_their_end() {
    let server = Options::stand_in().start();
    let receiver = Receiver::start([]).await;
    let minted = server.post("/admin/tokens", ADMIN, &json!({"name": "app", "webhook": receiver.url("/")})).await.json;
    let (token, secret) = (minted["token"].as_str().unwrap(), minted["webhook_secret"].as_str().unwrap());
    let answer = make(&server, token, &json!([
        {"custom_id": "slow", "prompt": "do: wait"}, {"custom_id": "good", "prompt": "hello"}, {"custom_id": "bad", "prompt": "do: exit 3"}, {"prompt": "hello", "model": "opus"},
    ])).await;
    let id = id(&answer);
    assert_eq!((&answer.json["total"], &answer.json["status"]), (&json!(4), &json!("running")));
    let over = until_over(&server, token, &id).await;
    assert_eq!((&over["status"], &over["counts"]["succeeded"], &over["counts"]["failed"]), (&json!("finished"), &json!(3), &json!(1)));
    let all = results(&server, token, &id, 0).await;
    assert_eq!(all.iter().map(|line| line["seq"].as_i64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(all[3]["custom_id"], "slow");
    let by_id: BTreeMap<_, _> = all.iter().map(|line| (line["custom_id"].as_str().unwrap_or("none"), line)).collect();
    assert_eq!(by_id["good"]["answer"]["result"], "ok");
    assert_eq!(by_id["good"]["answer"].as_object().unwrap().keys().collect::<Vec<_>>(), ["duration_ms", "ok", "result", "stop_reason"]);
    assert!(by_id["bad"]["answer"]["error"].as_str().unwrap().contains("something is wrong") || by_id["bad"]["answer"]["ok"] == false);
    assert_eq!(results(&server, token, &id, 3).await, [all[3].clone()]);
    assert_eq!(results(&server, token, &id, 4).await, [Value::Null; 0]);
    // They are runs like any others.
    let run = server.get(&format!("/runs/{}", by_id["good"]["run_id"].as_str().unwrap()), token).await.json;
    assert_eq!(run["status"], "succeeded");
    assert_eq!(
        server.get("/usage", token).await.json["usage"].as_array().unwrap().iter().map(|row| row["runs"].as_i64().unwrap()).sum::<i64>(),
        4
    );
    let told = &receiver.wait_for(1).await[0];
    assert!(told.is_signed(secret));
    assert_eq!(
        (&told.json()["type"], &told.json()["data"]["batch_id"], &told.json()["data"]["status"]),
        (&json!("batch.finished"), &json!(id), &json!("finished"))
    );
    assert_eq!(server.get("/batches", token).await.json["batches"], json!([state(&server, token, &id).await]));
    let other = server.mint("other").await;
    server.get(&format!("/batches/{id}"), &other).await.problem(404);
    server.get(&format!("/batches/{id}/results"), &other).await.problem(404);
    assert_eq!(server.get("/batches", &other).await.json["count"], 0);
}

#[tokio::test]
async fn where_a_line_is_wrong_none_is_made_and_it_is_named() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let good = json!({"prompt": "hello"}).to_string();
    let many = |wrong: &str| format!("{}{wrong}\n{good}\n", format!("{good}\n").repeat(150));
    for (wrong, words) in [
        (r#"{"prompt": ""}"#, "/150/prompt line 151: a prompt is needed"),
        (r#"{"prompt": "hello""#, "/150 line 151: EOF"),
        ("[]", "/150 line 151:"),
        (r#"{"prompt": "a", "model": "--help"}"#, "/150/model line 151"),
        (r#"{"prompt": "a", "webhook": "http://127.0.0.1/"}"#, "/150/webhook line 151"),
        (r#"{"prompt": "a", "permissions": "ask"}"#, "/150/permissions line 151"),
        (r#"{"prompt": "a", "schema": {"type": 5}}"#, "/150/schema"),
        (r#"{"prompt": "a", "custom_id": ""}"#, "/150/custom_id"),
        (r#"{"prompt": "a", "agent": "nobody"}"#, "/150/agent"),
    ] {
        let refused = lines(&server, &token, many(wrong)).await;
        refused.problem(422);
        let error =
            format!("{} {}", refused.json["errors"][0]["pointer"].as_str().unwrap(), refused.json["errors"][0]["detail"].as_str().unwrap());
        assert!(error.starts_with(words), "{wrong}: {error}");
    }
    let unknown = lines(&server, &token, many(r#"{"prompt": "a", "files": ["ff_nothing"]}"#)).await;
    assert!(unknown.problem(400).starts_with("Line 151: "), "{unknown:?}");
    let twice = json!({"prompt": "a", "custom_id": "x"}).to_string();
    let refused = lines(&server, &token, format!("{twice}\n{}", many(&twice))).await;
    assert_eq!(refused.json["errors"][0]["pointer"], "/151/custom_id", "{refused:?}");
    for empty in ["", "\n \n"] {
        lines(&server, &token, empty.to_owned()).await.problem(422);
    }
    make(&server, &token, &json!([])).await.problem(422);
    let too_many = lines(&server, &token, format!("{good}\n").repeat(10_001)).await;
    assert!(too_many.json["errors"][0]["detail"].as_str().unwrap().contains("10000"), "{too_many:?}");
    for table in ["runs", "batches", "batch_lines"] {
        assert_eq!(server.query::<i64>(&format!("SELECT count(*) FROM {table}")), 0, "{table}");
    }
    let small = Options::stand_in().set("CLAWDFORGE_MAX_UPLOAD_BYTES", "1000").start();
    let token = small.mint("app").await;
    lines(&small, &token, many(&good)).await.problem(413);
    Answer::of(small.request(Method::POST, "/batches", &token).header("content-type", "text/plain").body("x")).await.problem(415);
    assert_eq!(small.query::<i64>("SELECT count(*) FROM batch_lines"), 0);
}

#[tokio::test]
async fn a_batch_takes_what_nobody_wants_and_one_place_stays_free() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", "3").start();
    let (token, other) = (server.mint("app").await, server.mint("other").await);
    let id = id(&make(&server, &token, &json!(vec![json!({"prompt": "do: wait"}); 8])).await);
    until("two of them", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 2).await;
    // There is always a place for one who waits.
    let begun = Instant::now();
    assert_eq!(server.run(&other, "hello").await.status, StatusCode::OK);
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'"), 2);
    // While others wait for a place none is taken.
    let (first, second, third) =
        tokio::join!(server.run(&other, "do: wait"), server.run(&other, "do: wait"), server.run(&other, "do: wait"));
    assert!([first, second, third].iter().all(|answer| answer.status == StatusCode::OK));
    let over = until_over(&server, &token, &id).await;
    assert_eq!(over["counts"]["succeeded"], 8);
    let most: i64 = server.query(
        "SELECT max((SELECT count(*) FROM runs AS other WHERE other.batch_id IS NOT NULL AND other.started_at <= runs.started_at AND other.finished_at > runs.started_at)) FROM runs WHERE batch_id IS NOT NULL",
    );
    assert!(most <= 3, "{most}");
    // Where there is one place in all, it is taken where nobody else has it.
    let one = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", "1").start();
    let token = one.mint("app").await;
    let id = self::id(&make(&one, &token, &json!([{"prompt": "hello"}, {"prompt": "hello"}])).await);
    assert_eq!(until_over(&one, &token, &id).await["counts"]["succeeded"], 2);
}

#[tokio::test]
async fn a_batch_keeps_to_its_apps_limits_and_pauses_where_the_budget_is_spent() {
    let server = Options::stand_in().start();
    let minted = server.post("/admin/tokens", ADMIN, &json!({"name": "app", "max_concurrent": 1, "daily_usd": 0.6})).await.json;
    let token = minted["token"].as_str().unwrap();
    let id = id(&make(&server, token, &json!(vec![json!({"prompt": "hello"}); 6])).await);
    let begun = Instant::now();
    let paused = loop {
        let state = state(&server, token, &id).await;
        if state["status"] == "paused" && state["counts"]["running"] == 0 {
            break state;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{state}");
        assert!(state["counts"]["running"].as_i64().unwrap() <= 1, "{state}");
    };
    assert_eq!(
        (&paused["counts"]["succeeded"], &paused["counts"]["queued"], &paused["counts"]["failed"]),
        (&json!(3), &json!(3), &json!(0))
    );
    assert!(paused["paused_until"].as_i64().unwrap() % 86_400 == 0);
    // What another may, it may meanwhile.
    let other = server.mint("other").await;
    let others = self::id(&make(&server, &other, &json!([{"prompt": "hello"}])).await);
    assert_eq!(until_over(&server, &other, &others).await["status"], "finished");
    Answer::of(server.request(Method::PATCH, "/admin/tokens/app", ADMIN).json(&json!({"daily_usd": null}))).await;
    // Its runs keep to what they were accepted with.
    let cancelled = Answer::of(server.request(Method::DELETE, &format!("/batches/{id}"), token)).await;
    assert_eq!((&cancelled.json["status"], &cancelled.json["counts"]["cancelled"]), (&json!("cancelled"), &json!(3)), "{cancelled:?}");
}

#[tokio::test]
async fn a_cancelled_batch_is_over_when_the_answer_comes() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", "4").start();
    let token = server.mint("app").await;
    let id = id(&make(&server, &token, &json!(vec![json!({"prompt": "do: hang"}); 20])).await);
    until("some of them", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 3).await;
    let begun = Instant::now();
    let cancelled = Answer::of(server.request(Method::DELETE, &format!("/batches/{id}"), &token)).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!((&cancelled.json["status"], &cancelled.json["counts"]["cancelled"]), (&json!("cancelled"), &json!(20)), "{cancelled:?}");
    assert_eq!((server.agents().len(), results(&server, &token, &id, 0).await.len()), (0, 20));
    let again = Answer::of(server.request(Method::DELETE, &format!("/batches/{id}"), &token)).await;
    assert_eq!(again.json, cancelled.json);
}

#[tokio::test]
async fn of_a_batch_that_a_crash_cuts_short_none_is_lost_and_none_made_twice() {
    let mut server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", "4").start();
    let token = server.mint("app").await;
    let prompts: Vec<_> =
        (0..150).map(|number| json!({"custom_id": number.to_string(), "prompt": format!("do: note <{number}>")})).collect();
    let id = id(&make(&server, &token, &json!(prompts)).await);
    for number in 0..20_u64 {
        tokio::time::sleep(Duration::from_millis(number * 37 % 211)).await;
        server = server.crash_and_restart();
    }
    let over = until_over(&server, &token, &id).await;
    let counts = &over["counts"];
    assert_eq!(counts["succeeded"].as_i64().unwrap() + counts["interrupted"].as_i64().unwrap(), 150, "{over}");
    let all = results(&server, &token, &id, 0).await;
    let names: HashSet<_> = all.iter().map(|line| line["custom_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!((all.len(), names.len()), (150, 150));
    assert_eq!(all.iter().map(|line| line["seq"].as_i64().unwrap()).collect::<Vec<_>>(), (1..=150).collect::<Vec<_>>());
    let notes = std::fs::read_to_string(server.folder().join("made")).unwrap();
    for line in &all {
        let made = notes.matches(&format!("<{}>", line["custom_id"].as_str().unwrap())).count();
        assert!(made == 1 || (made == 0 && line["status"] == "interrupted"), "{made} {line}");
    }
    // The crashes came while it went on.
    assert!(counts["interrupted"].as_i64().unwrap() > 0, "{over}");
}

#[tokio::test]
async fn ten_thousand_are_taken_at_once_and_others_hardly_wait() {
    let server = Options::stand_in().start();
    let (token, other) = (server.mint("app").await, server.mint("other").await);
    let body: String =
        (0..10_000).map(|number| format!("{}\n", json!({"custom_id": number.to_string(), "prompt": format!("number {number}")}))).collect();
    let begun = Instant::now();
    let id = id(&lines(&server, &token, body).await);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(server.run(&other, "hello").await.status, StatusCode::OK);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let begun = Instant::now();
    let cancelled = Answer::of(server.request(Method::DELETE, &format!("/batches/{id}"), &token)).await;
    assert_eq!(cancelled.json["status"], "cancelled", "{cancelled:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(results(&server, &token, &id, 9_990).await.len(), 10);
}
