//! The other vendors' APIs on the wire: who may call, what refusals look like, and what is never run twice.

use std::time::Duration;

use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, until};

fn chat(content: &str) -> Value {
    json!({"model": "sonnet", "messages": [{"role": "user", "content": content}]})
}

fn messages(content: &str) -> Value {
    json!({"model": "sonnet", "max_tokens": 99, "messages": [{"role": "user", "content": content}]})
}

/// The message of an error in OpenAI's form, which has these parts and no others.
fn openai(answer: &Answer, status: u16, kind: &str) -> String {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), "application/json");
    assert!(answer.header("x-request-id").starts_with("req_"), "{answer:?}");
    let error = answer.json["error"].as_object().unwrap();
    assert_eq!(error.keys().collect::<Vec<_>>(), ["code", "message", "param", "type"]);
    assert_eq!(error["type"], kind);
    error["message"].as_str().unwrap().to_owned()
}

/// The same in Anthropic's form.
fn anthropic(answer: &Answer, status: u16, kind: &str) -> String {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.json["type"], "error");
    assert_eq!(answer.json["request_id"], answer.header("request-id"));
    assert_eq!(answer.json["error"]["type"], kind);
    answer.json["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_apps_token_opens_them_by_either_header() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let by_key = |path: &str, key: &str| Client::new().post(server.url(path)).header("x-api-key", key);
    let answer = Answer::of(by_key("/v1/messages", &token).json(&messages("hi"))).await;
    assert_eq!((answer.status, &answer.json["content"]), (StatusCode::OK, &json!([{"type": "text", "text": "ok"}])), "{answer:?}");
    assert_eq!(server.post("/v1/chat/completions", &token, &chat("hi")).await.json["choices"][0]["message"]["content"], "ok");
    assert_eq!(
        server.query::<String>(
            "SELECT json_group_array(json_array(app_name, prompt, result, input_tokens, output_tokens, cost_usd)) FROM runs"
        ),
        r#"[["app","hi","ok",3,4,0.25],["app","hi","ok",3,4,0.25]]"#
    );

    openai(&server.post("/v1/chat/completions", "cf_no", &chat("hi")).await, 401, "authentication_error");
    openai(&server.post("/v1/chat/completions", ADMIN, &chat("hi")).await, 403, "permission_error");
    anthropic(&Answer::of(by_key("/v1/messages", "cf_no").json(&messages("hi"))).await, 401, "authentication_error");
    let models = |key: &str| Client::new().get(server.url("/v1/models")).header("x-api-key", key).header("anthropic-version", "2023-06-01");
    anthropic(&Answer::of(models("cf_no")).await, 401, "authentication_error");
    assert_eq!(Answer::of(models(&token)).await.json["data"][0]["type"], "model");
}

#[tokio::test]
async fn refusals_are_in_the_vendors_words_whatever_part_of_the_server_they_come_from() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    openai(&server.get("/v1/nothing", &token).await, 404, "not_found_error");
    openai(&server.get("/v1/chat/completions", &token).await, 405, "invalid_request_error");
    openai(&Answer::of(server.request(Method::POST, "/v1/responses", &token).body("{}")).await, 415, "invalid_request_error");
    let malformed = server.request(Method::POST, "/v1/messages", &token).header("content-type", "application/json").body("{");
    anthropic(&Answer::of(malformed).await, 400, "invalid_request_error");
    let said = openai(
        &server.post("/v1/chat/completions", &token, &json!({"model": "sonnet", "messages": [], "nope": 1})).await,
        400,
        "invalid_request_error",
    );
    assert_eq!(said, "it is not known here; leave it out");
    assert!(
        anthropic(
            &server.post("/v1/messages", &token, &json!({"model": "sonnet", "messages": [], "max_tokens": 0})).await,
            400,
            "invalid_request_error"
        )
        .starts_with("max_tokens: ")
    );

    for (prompt, what) in [("do: bring tools", "Bash"), ("do: half", "without an answer"), ("do: exit 3", "without an answer")] {
        let answer = server.post("/v1/messages", &token, &messages(prompt)).await;
        assert!(anthropic(&answer, 502, "api_error").contains(what), "{answer:?}");
        assert_eq!(answer.header("x-should-retry"), "false");
    }
}

#[tokio::test]
async fn a_full_server_is_said_so_that_a_library_tries_again() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_MAX_QUEUED_RUNS", 0).start();
    let token = server.mint("app").await;
    let waits = messages("do: wait");
    let (waiting, refused) = tokio::join!(server.post("/v1/messages", &token, &waits), async {
        until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE finished_at IS NULL") == 1).await;
        [server.post("/v1/messages", &token, &messages("hi")).await, server.post("/v1/chat/completions", &token, &chat("hi")).await]
    });
    assert_eq!(waiting.status, StatusCode::OK);
    anthropic(&refused[0], 503, "overloaded_error");
    openai(&refused[1], 503, "server_error");
    // Nothing was begun, so a library may try again by itself.
    assert_eq!((refused[0].header("retry-after"), refused[0].headers.get("x-should-retry")), ("5", None));
}

#[tokio::test]
async fn a_stream_that_fails_is_an_error_of_its_vendors_before_and_after_it_begins() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    // One that breaks off says so in its midst.
    let mut body = messages("do: half");
    body["stream"] = true.into();
    let answer = server.post("/v1/messages", &token, &body).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(
        answer.text.contains("event: content_block_delta") && answer.text.contains("event: error") && !answer.text.contains("message_stop"),
        "{answer:?}"
    );
    // One that never began is refused as any other.
    let mut body = chat("do: exit 3");
    body["stream"] = true.into();
    openai(&server.post("/v1/chat/completions", &token, &body).await, 502, "server_error");
}

#[tokio::test]
async fn a_missing_cli_and_a_spent_budget_are_said_in_the_vendors_words() {
    let server = Options::default().set("CLAWDFORGE_CLAUDE_BIN", "no-such-claude").start();
    let token = server.mint("app").await;
    assert!(
        openai(&server.post("/v1/responses", &token, &json!({"model": "sonnet", "input": "hi"})).await, 503, "server_error")
            .contains("no-such-claude")
    );
    // The list is there all the same.
    assert_eq!(server.get("/v1/models/sonnet", &token).await.status, StatusCode::OK);
    let spent =
        server.post("/admin/tokens", ADMIN, &json!({"name": "spent", "daily_usd": 0})).await.json["token"].as_str().unwrap().to_owned();
    let answer = server.post("/v1/messages", &spent, &messages("hi")).await;
    anthropic(&answer, 429, "rate_limit_error");
    assert_eq!(answer.header("x-should-retry"), "false");
    assert!(answer.header("retry-after").parse::<u32>().unwrap() <= 86_400);
    assert_eq!(server.post("/v1/chat/completions", &spent, &chat("hi")).await.json["error"]["code"], "insufficient_quota");
}

#[tokio::test]
async fn a_librarys_retry_joins_what_goes_on_and_nothing_goes_on_for_nobody() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let attempt = |count: u32, prompt: &str| {
        server.request(Method::POST, "/v1/chat/completions", &token).header("x-stainless-retry-count", count).json(&chat(prompt))
    };
    // The first attempt leaves before there is an answer.
    let first = attempt(0, "do: wait").timeout(Duration::from_millis(700)).send().await;
    assert!(first.is_err_and(|error| error.is_timeout()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let answer = Answer::of(attempt(1, "do: wait")).await;
    assert_eq!(answer.json["choices"][0]["message"]["content"], "ok", "{answer:?}");
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 1);
    assert_eq!(server.query::<String>("SELECT run_id FROM runs"), answer.header("x-run-id"));

    // Another request is another run, also of a library that tries again.
    assert_eq!(Answer::of(attempt(1, "other")).await.status, StatusCode::OK);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 2);

    // Where nobody comes back it ends, soon.
    let left = attempt(0, "do: hang").timeout(Duration::from_millis(500)).send().await;
    assert!(left.is_err());
    until("the end of what nobody waits for", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'cancelled'") == 1).await;
    // And at once where no library tries again.
    let begun = std::time::Instant::now();
    let left = server
        .request(Method::POST, "/v1/chat/completions", &token)
        .json(&chat("do: hang"))
        .timeout(Duration::from_millis(500))
        .send()
        .await;
    assert!(left.is_err());
    until("the end of the other", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'cancelled'") == 2).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn names_of_other_vendors_stand_for_models() {
    let server = Options::stand_in().set("CLAWDFORGE_MODEL_MAP", "gpt-4o=sonnet,gpt-4o-mini=haiku").start();
    let token = server.mint("app").await;
    let mut body = chat("hi");
    body["model"] = "gpt-4o-mini".into();
    assert_eq!(server.post("/v1/chat/completions", &token, &body).await.status, StatusCode::OK);
    assert_eq!(server.query::<String>("SELECT model FROM runs"), "haiku");
    assert_eq!(server.get("/v1/models/gpt-4o", &token).await.json["id"], "gpt-4o");
    openai(&server.get("/v1/models/gpt-5", &token).await, 404, "not_found_error");
}

#[tokio::test]
async fn a_response_is_its_apps_alone_and_goes_after_a_day() {
    let server = Options::stand_in().set("CLAWDFORGE_SWEEP_SECS", 1).start();
    let (token, other) = (server.mint("app").await, server.mint("other").await);
    let ask = async |token: &str, body: Value| server.post("/v1/responses", token, &body).await;
    let kept = ask(&token, json!({"model": "sonnet", "input": "one", "metadata": {"a": "b"}})).await.json;
    let path = format!("/v1/responses/{}", kept["id"].as_str().unwrap());
    let seen = server.get(&path, &token).await.json;
    assert_eq!(seen, kept);
    openai(&server.get(&path, &other).await, 404, "not_found_error");
    openai(&Answer::of(server.request(Method::DELETE, &path, &other)).await, 404, "not_found_error");
    let next = ask(&other, json!({"model": "sonnet", "input": "two", "previous_response_id": kept["id"]})).await;
    assert_eq!(next.json["error"]["code"], "previous_response_not_found");
    // One that is used is kept on, with what it goes on with.
    let next = ask(&token, json!({"model": "sonnet", "input": "two", "previous_response_id": kept["id"]})).await.json;
    assert_eq!(next["previous_response_id"], kept["id"]);
    let age = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    age.busy_timeout(Duration::from_secs(5)).unwrap();
    age.execute("UPDATE responses SET used_at = used_at - 90000", []).unwrap();
    until("the sweep", || server.query::<i64>("SELECT count(*) FROM responses") == 0).await;
    openai(&server.get(&path, &token).await, 404, "not_found_error");
}

#[tokio::test]
async fn what_waited_under_a_key_is_answered_after_a_restart() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let keyed = |server: &crate::harness::Server| {
        let request = server.request(Method::POST, "/v1/messages", &token).header("idempotency-key", "one").json(&messages("hi"));
        tokio::spawn(Answer::of(request))
    };
    let hanging = server.request(Method::POST, "/v1/messages", &token).json(&messages("do: hang"));
    let hanging = tokio::spawn(hanging.send());
    until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
    let waiting = keyed(&server);
    until("the one that waits", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'queued'") == 1).await;
    let server = server.crash_and_restart();
    assert!(hanging.await.unwrap().is_err() && waiting.await.is_err());
    let answer = keyed(&server).await.unwrap();
    assert_eq!((answer.status, &answer.json["content"][0]["text"]), (StatusCode::OK, &json!("ok")), "{answer:?}");
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 2);
    // The key stands for that request alone.
    let other = server.request(Method::POST, "/v1/messages", &token).header("idempotency-key", "one").json(&messages("other"));
    anthropic(&Answer::of(other).await, 400, "invalid_request_error");
}
