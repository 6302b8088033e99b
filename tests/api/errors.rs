//! What refusals look like.

use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{ADMIN, Answer, Options, many_descriptors};

#[tokio::test]
async fn every_error_is_a_problem() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    Answer::of(Client::new().get(server.url("/nothing"))).await.problem(404);
    server.get("/admin", ADMIN).await.problem(404);
    let answer = Answer::of(server.request(Method::PUT, "/run", &token)).await;
    answer.problem(405);
    assert_eq!(answer.header("allow"), "POST");
    let answer = Answer::of(server.request(Method::DELETE, "/admin/tokens", ADMIN)).await;
    answer.problem(405);
    assert_eq!(answer.header("allow"), "POST,GET,HEAD");
    Answer::of(server.request(Method::DELETE, "/admin/tokens/%ff", ADMIN)).await.problem(404);

    let send = |kind: &str, body: &'static str| server.request(Method::POST, "/run", &token).header("content-type", kind).body(body);
    Answer::of(send("application/json", "{\"prompt\": ")).await.problem(400);
    Answer::of(send("application/json", "{\"prompt\": \"x\"} more")).await.problem(400);
    Answer::of(send("application/json", "")).await.problem(400);
    Answer::of(send("text/plain", "{\"prompt\": \"x\"}")).await.problem(415);
    Answer::of(server.request(Method::POST, "/run", &token).body("{}")).await.problem(415);
    assert_eq!(Answer::of(send("Application/JSON; charset=utf-8", "{\"prompt\": \"x\"}")).await.status, StatusCode::OK);
    Answer::of(server.request(Method::POST, "/files", &token).json(&json!({}))).await.problem(415);
}

#[tokio::test]
async fn validation_says_where() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let pointers = async |path: &str, token: &str, body: Value| -> Vec<String> {
        let answer = server.post(path, token, &body).await;
        answer.problem(422);
        let errors = answer.json["errors"].as_array().unwrap();
        assert!(errors.iter().all(|error| error["detail"].is_string()));
        errors.iter().map(|error| error["pointer"].as_str().unwrap().to_owned()).collect()
    };
    for (body, expected) in [
        (json!({}), vec!["/prompt"]),
        (json!({"prompt": ""}), vec!["/prompt"]),
        (json!({"prompt": 7}), vec!["/prompt"]),
        (json!({"prompt": "x", "timeout_secs": 4}), vec!["/timeout_secs"]),
        (json!({"prompt": "x", "timeout_secs": 601}), vec!["/timeout_secs"]),
        (json!({"prompt": "x", "timeout_secs": "60"}), vec!["/timeout_secs"]),
        (json!({"prompt": "x", "timeout_secs": 60.5}), vec!["/timeout_secs"]),
        (json!({"prompt": "x", "timeout_secs": 1e300}), vec!["/timeout_secs"]),
        (json!({"prompt": "x", "files": ["ff_a", 7]}), vec!["/files/1"]),
        (json!({"prompt": "", "model": "-x", "timeout_secs": 0}), vec!["/prompt", "/model", "/timeout_secs"]),
        (json!(["prompt"]), vec![""]),
    ] {
        assert_eq!(pointers("/run", &token, body.clone()).await, expected, "{body}");
    }
    assert_eq!(pointers("/admin/tokens", ADMIN, json!({"name": "a", "ip_cidrs": ["10.0.0.0/8", "10.0.0.0/99"]})).await, ["/ip_cidrs/1"]);
    let float = server.post("/run", &token, &json!({"prompt": "x", "timeout_secs": 60.0, "model": null, "files": null})).await;
    assert_eq!(float.status, StatusCode::OK, "{float:?}");
    assert_eq!(pointers("/admin/tokens", ADMIN, json!({"name": "../x"})).await, ["/name"]);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 1);
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_also_for_a_client_that_sends_it_all() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let prompt = |bytes: usize| json!({"prompt": "x".repeat(bytes)});
    assert_eq!(server.post("/run", &token, &prompt(10 << 20)).await.status, StatusCode::OK);
    server.post("/run", &token, &prompt((10 << 20) + 1)).await.problem(422);
    server.post("/run", &token, &prompt(70 << 20)).await.problem(413);
    // Refused before the body is read, and answered all the same.
    server.post("/run", "cf_unknown", &prompt(40 << 20)).await.problem(401);
}

#[tokio::test]
async fn the_description_is_openapi_3_1_and_names_every_path() {
    let server = Options::stand_in().start();
    let document = Answer::of(Client::new().get(server.url("/openapi.json"))).await.json;
    let told: Vec<_> = document["webhooks"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(told, ["batch.finished", "budget.spent", "ping", "run.finished", "session.closed", "signin.failed", "turn.finished"]);
    let data = &document["webhooks"]["run.finished"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]["data"];
    assert!(data["$ref"] == "#/components/schemas/RunState" || data["allOf"].is_array() || data["properties"].is_object(), "{data}");
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let paths: Vec<_> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let expected = "/admin/runs /admin/tokens /admin/tokens/{name} /admin/tokens/{name}/rotate /admin/tokens/{name}/webhook-secret /admin/usage /admin/workers /admin/workers/{name} /batches /batches/{id} /batches/{id}/results /files /healthz /metrics /run /runs /runs/{id} \
        /runs/{id}/events /runs/{id}/permissions /runs/{id}/permissions/{permission_id} /sessions /sessions/{id} /sessions/{id}/cancel /sessions/{id}/permissions /sessions/{id}/permissions/{permission_id} /sessions/{id}/turn /sessions/{id}/turns/{turn} \
        /sessions/{id}/turns/{turn}/events /usage /v1/chat/completions /v1/messages /v1/messages/count_tokens /v1/models \
        /v1/models/{id} /v1/responses /v1/responses/{id} /webhooks/deliveries /webhooks/deliveries/{id}/retry /webhooks/test";
    assert_eq!(paths.join(" "), expected);
}

#[tokio::test]
async fn one_address_never_has_all_connections_and_those_past_the_limit_wait() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_MAX_QUEUED_RUNS", 0).start();
    let mut silent = Vec::new();
    many_descriptors();
    let from = async |address: &str| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(format!("{address}:0").parse().unwrap()).unwrap();
        socket.connect(server.address()).await.unwrap()
    };
    for _ in 0..2049 {
        silent.push(from("127.0.0.2").await);
    }
    let health = || Client::new().get(server.url("/healthz")).timeout(std::time::Duration::from_secs(5)).send();
    assert_eq!(health().await.unwrap().status(), StatusCode::OK, "another address is answered");
    for _ in 0..300 {
        silent.push(from("127.0.0.3").await);
    }
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), health()).await.is_err());
    drop(silent);
    assert_eq!(health().await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn addresses_that_are_not_allowed_take_nothing_from_the_others() {
    let server = Options::stand_in().set("CLAWDFORGE_ALLOW_CIDRS", "127.0.0.1").start();
    let strange = async || {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        socket.connect(server.address()).await.unwrap()
    };
    let read = async |connection: &mut TcpStream| {
        let mut answer = Vec::new();
        let read = tokio::time::timeout(std::time::Duration::from_secs(10), connection.read_to_end(&mut answer));
        let _ = read.await.expect("the server closes the connection");
        String::from_utf8(answer).unwrap()
    };
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(strange().await);
    }
    assert_eq!(server.get("/healthz", "").await.status, StatusCode::OK);
    for connection in &mut silent {
        assert_eq!(read(connection).await, "");
    }
    // Those that ask are told, as the contract says.
    let mut asks = strange().await;
    asks.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(read(&mut asks).await.starts_with("HTTP/1.1 403 "));
}

#[tokio::test]
async fn a_client_that_does_not_send_its_request_loses_its_connection() {
    let server = Options::stand_in().start();
    let mut silent = TcpStream::connect(server.address()).await.unwrap();
    silent.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nslow: ").await.unwrap();
    let mut says_nothing = TcpStream::connect(server.address()).await.unwrap();
    let mut idle = TcpStream::connect(server.address()).await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let closed = async |connection: &mut TcpStream| {
        let mut answer = Vec::new();
        let read = tokio::time::timeout(std::time::Duration::from_secs(40), connection.read_to_end(&mut answer));
        read.await.expect("the server closes the connection").unwrap();
    };
    tokio::join!(closed(&mut silent), closed(&mut says_nothing), closed(&mut idle));
}
