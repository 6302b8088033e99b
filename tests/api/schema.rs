//! What an app asks a reply to be, where that is meant to do harm.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server};

/// Takes 2^40 steps to check.
fn branching() -> Value {
    let step = |n: usize| json!({"allOf": [{"$ref": format!("#/$defs/s{}", n + 1)}, {"$ref": format!("#/$defs/s{}", n + 1)}]});
    let steps: serde_json::Map<_, _> =
        (0..40).map(|n| (format!("s{n}"), step(n))).chain([("s40".to_owned(), json!({"maxProperties": 9}))]).collect();
    json!({"$ref": "#/$defs/s0", "$defs": steps})
}

async fn run(server: &Server, token: &str, schema: &Value) -> Answer {
    server.post("/run", token, &json!({"prompt": "x", "schema": schema})).await
}

#[tokio::test]
async fn a_schema_that_takes_for_ever_costs_its_own_run_and_no_more() {
    let server = Options::stand_in().start();
    let (hostile, other) = (server.mint("hostile").await, server.mint("other").await);
    let begun = Instant::now();
    let (branching, plain) = (branching(), json!({"type": "object"}));
    let (first, second, (health, fits)) = tokio::join!(run(&server, &hostile, &branching), run(&server, &hostile, &branching), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let asked = Instant::now();
        let health = server.get("/healthz", "").await;
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        (health, run(&server, &other, &plain).await)
    });
    assert_eq!((health.status, fits.status), (StatusCode::OK, StatusCode::OK), "{fits:?}");
    for answer in [first, second] {
        assert!(answer.text.contains("takes more than 2 s"), "{answer:?}");
        assert!([StatusCode::UNPROCESSABLE_ENTITY, StatusCode::BAD_GATEWAY].contains(&answer.status), "{answer:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn patterns_are_bounded_too() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let nested = (0..8).fold("a".to_owned(), |inner, _| format!("(?:{inner}){{1,60}}"));
    for pattern in [nested, "(?:a?){99999}b".to_owned(), format!("(?=({}", "(x+x+)+".repeat(50))] {
        let answer = run(&server, &token, &json!({"propertyNames": {"pattern": pattern}})).await;
        assert!(answer.status.is_client_error() || answer.status == StatusCode::OK, "{answer:?}");
    }
    assert_eq!(server.get("/healthz", "").await.status, StatusCode::OK);
}
