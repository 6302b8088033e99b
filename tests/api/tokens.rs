//! What the operator does with tokens that are in force.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, Server, until};

async fn send(server: &Server, method: Method, path: &str, body: &Value) -> Answer {
    Answer::of(server.request(method, path, ADMIN).json(body)).await
}

#[tokio::test]
async fn a_token_is_changed_from_its_next_request_on() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let patch = async |body: Value| send(&server, Method::PATCH, "/admin/tokens/app", &body).await;
    let changed = patch(json!({"ip_cidrs": ["10.0.0.0/8"], "max_concurrent": 3, "daily_usd": 2.5, "home": "kept"})).await;
    assert_eq!(changed.status, StatusCode::OK, "{changed:?}");
    let expected =
        json!({"ip_cidrs": "10.0.0.0/8", "max_concurrent": 3, "daily_usd": 2.5, "home": "kept", "network": "open", "enabled": true});
    expected.as_object().unwrap().iter().for_each(|(key, value)| assert_eq!(&changed.json[key], value));
    server.run(&token, "hello").await.problem(403);
    let changed = patch(json!({"ip_cidrs": null, "daily_usd": 0})).await;
    assert_eq!((&changed.json["ip_cidrs"], &changed.json["max_concurrent"]), (&json!(""), &json!(3)));
    server.run(&token, "hello").await.problem(429);
    let changed = patch(json!({"daily_usd": null, "home": null})).await;
    assert_eq!((&changed.json["daily_usd"], &changed.json["home"]), (&json!(null), &json!("fresh")));
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    for (wrong, pointer) in [
        (json!({"ip_cidrs": ["10.0.0.0/40"]}), "/ip_cidrs/0"),
        (json!({"max_concurrent": 0}), "/max_concurrent"),
        (json!({"daily_usd": -1}), "/daily_usd"),
        (json!({"network": "lan"}), "/network"),
        (json!({"home": "mine"}), "/home"),
        // Without the sandbox no rule can be kept.
        (json!({"network": "model"}), "/network"),
        (json!({"daily_eur": 1}), "/daily_eur"),
    ] {
        let refused = patch(wrong).await;
        refused.problem(422);
        assert_eq!(refused.json["errors"][0]["pointer"], pointer, "{refused:?}");
    }
    assert_eq!(patch(json!({})).await.json["max_concurrent"], 3);
    send(&server, Method::PATCH, "/admin/tokens/nobody", &json!({})).await.problem(404);
    Answer::of(server.request(Method::PATCH, "/admin/tokens/app", &token).json(&json!({}))).await.problem(403);
}

#[tokio::test]
async fn a_rotated_token_is_good_for_its_time_and_a_revoked_one_for_none() {
    let server = Options::stand_in().start();
    let first = server.mint("app").await;
    let rotate = async |body: Value| send(&server, Method::POST, "/admin/tokens/app/rotate", &body).await;
    let works = async |token: &str| server.get("/runs", token).await.status == StatusCode::OK;
    let rotated = rotate(json!({})).await;
    let second = rotated.json["token"].as_str().unwrap().to_owned();
    assert!(works(&first).await && works(&second).await && first != second);
    let listed = server.get("/admin/tokens", ADMIN).await.json;
    assert_eq!(listed["tokens"][0]["old_until"], rotated.json["old_until"]);
    let third = rotate(json!({"grace_secs": 1})).await.json["token"].as_str().unwrap().to_owned();
    assert!(!works(&first).await && works(&third).await);
    let begun = Instant::now();
    while works(&second).await {
        assert!(begun.elapsed() < Duration::from_secs(5), "the old token is still good");
    }
    assert!(server.get("/admin/tokens", ADMIN).await.json["tokens"][0].get("old_until").is_none());
    let fourth = rotate(json!({"grace_secs": 0})).await.json["token"].as_str().unwrap().to_owned();
    assert!(!works(&third).await && works(&fourth).await);
    assert_eq!(rotate(json!({"grace_secs": 3_000_000})).await.json["errors"][0]["pointer"], "/grace_secs");
    let fifth = rotate(json!({})).await.json["token"].as_str().unwrap().to_owned();
    assert_eq!(Answer::of(server.request(Method::DELETE, "/admin/tokens/app", ADMIN)).await.status, StatusCode::OK);
    assert!(!works(&fourth).await && !works(&fifth).await);
    rotate(json!({})).await.problem(404);
    let again = server.mint("app").await;
    assert!(works(&again).await && !works(&fourth).await && !works(&fifth).await);
}

#[tokio::test]
async fn wrong_tokens_wait_and_right_ones_do_not() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let took = async |token: &str, path: &str| {
        let begun = Instant::now();
        let status = server.get(path, token).await.status;
        (status, begun.elapsed())
    };
    let quick = Duration::from_millis(700);
    for number in 0..10 {
        let (status, took) = took("cf_wrong", if number % 2 == 0 { "/runs" } else { "/admin/tokens" }).await;
        assert!(status == StatusCode::UNAUTHORIZED && took < quick, "{status} after {took:?}");
    }
    // Two at once don't get more answers than one.
    let (first, second, right, operator) =
        tokio::join!(took("cf_wrong", "/runs"), took("cf_wrong", "/admin/tokens"), took(&token, "/runs"), took(ADMIN, "/admin/tokens"));
    assert!(first.0 == StatusCode::UNAUTHORIZED && second.0 == StatusCode::UNAUTHORIZED);
    let waited = [first.1, second.1];
    assert!(waited.iter().min().unwrap() > &quick && waited.iter().max().unwrap() > &Duration::from_millis(1700), "{waited:?}");
    assert!(right.0 == StatusCode::OK && operator.0 == StatusCode::OK);
    assert!(right.1 < quick && operator.1 < quick, "{right:?} {operator:?}");
    until("it is in the log", || server.log().contains("more than ten wrong tokens")).await;
}
