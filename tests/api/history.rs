//! What was run, what it cost, and what is counted.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, Server};

fn ids(answer: &Answer) -> Vec<String> {
    let runs = answer.json["runs"].as_array().unwrap();
    runs.iter().map(|run| run["run_id"].as_str().unwrap().to_owned()).collect()
}

async fn three_runs_and_anothers(server: &Server) -> (String, Vec<String>) {
    let (token, other) = (server.mint("app").await, server.mint("other").await);
    let mut newest_first = Vec::new();
    for prompt in ["first", "do: exit 3", &"long ".repeat(100)] {
        newest_first.insert(0, server.run(&token, prompt).await.header("x-run-id").to_owned());
    }
    server.post("/run", &other, &json!({"prompt": "theirs", "model": "opus"})).await;
    (token, newest_first)
}

#[tokio::test]
async fn one_sees_ones_own_runs_newest_first() {
    let server = Options::stand_in().start();
    let (token, runs) = three_runs_and_anothers(&server).await;
    let all = server.get("/runs", &token).await;
    assert_eq!((ids(&all), &all.json["count"]), (runs.clone(), &json!(3)));
    let newest = &all.json["runs"][0];
    assert_eq!(newest["prompt"].as_str().unwrap().len(), 200);
    assert_eq!((&newest["status"], &newest["result"], &newest["cost_usd"]), (&json!("succeeded"), &json!("ok"), &json!(0.25)));
    assert_eq!(ids(&server.get("/runs?limit=1", &token).await), runs[..1]);
    assert_eq!(ids(&server.get(&format!("/runs?before={}", runs[0]), &token).await), runs[1..]);
    assert_eq!(ids(&server.get("/runs?status=failed", &token).await), runs[1..2]);
    for wrong in ["limit=0", "limit=201", "limit=x", "status=odd", "limit=1&limit=2"] {
        server.get(&format!("/runs?{wrong}"), &token).await.problem(400);
    }
    let every = server.get("/admin/runs", ADMIN).await;
    assert_eq!((&every.json["count"], &every.json["runs"][0]["app_name"]), (&json!(4), &json!("other")));
    server.get("/admin/runs", &token).await.problem(403);
}

#[tokio::test]
async fn usage_is_summed_by_day_and_model() {
    let server = Options::stand_in().start();
    let (token, _) = three_runs_and_anothers(&server).await;
    let usage = server.get("/usage", &token).await.json;
    let [day] = usage["usage"].as_array().unwrap().as_slice() else { panic!("{usage}") };
    assert_eq!((&day["model"], &day["runs"], &day["turns"]), (&json!("sonnet"), &json!(3), &json!(0)));
    assert_eq!((&day["input_tokens"], &day["output_tokens"], &usage["cost_usd"]), (&json!(6), &json!(8), &json!(0.5)));
    assert_eq!(server.get("/usage?to=1000", &token).await.json["usage"], json!([]));
    server.get("/usage?from=yesterday", &token).await.problem(400);
    let every = server.get("/admin/usage", ADMIN).await.json;
    assert_eq!(every["usage"].as_array().unwrap().iter().map(|row| row["app_name"].clone()).collect::<Vec<_>>(), ["app", "other"]);
}

#[tokio::test]
async fn metrics_are_for_the_operator_or_allowed_addresses() {
    let server = Options::stand_in().start();
    let (token, _) = three_runs_and_anothers(&server).await;
    server.get("/no/such/path", &token).await;
    // The last run's process ends after its answer.
    let mut text = String::new();
    for _ in 0..200 {
        text = server.get("/metrics", ADMIN).await.text;
        if text.contains("going_on{kind=\"run\"} 0") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    for line in [
        r#"clawdforge_requests_total{method="POST",route="/run",status="200"} 3"#,
        r#"clawdforge_requests_total{method="POST",route="/run",status="502"} 1"#,
        r#"clawdforge_requests_total{method="GET",route="other",status="404"} 1"#,
        r#"clawdforge_tokens_total{app="app",model="sonnet",direction="output"} 8"#,
        r#"clawdforge_cost_usd_total{app="other",model="opus"} 0.25"#,
        r#"clawdforge_duration_seconds_count{kind="run"} 4"#,
        r#"clawdforge_queue_wait_seconds_count{kind="run"} 4"#,
        r#"clawdforge_standbys_total{kind="run",found="miss"} 4"#,
        r#"clawdforge_going_on{kind="run"} 0"#,
        "clawdforge_queue_length 0",
        "clawdforge_open_sessions 0",
    ] {
        assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("processes_killed_total{"), "what went well was ended by somebody\n{text}");
    server.get("/metrics", &token).await.problem(403);
    Answer::of(reqwest::Client::new().request(Method::GET, server.url("/metrics"))).await.problem(401);
    let open = Options::stand_in().set("CLAWDFORGE_METRICS_CIDRS", "127.0.0.0/8").start();
    let answer = Answer::of(reqwest::Client::new().request(Method::GET, open.url("/metrics"))).await;
    assert!(answer.status == StatusCode::OK && answer.text.ends_with("# EOF\n"), "{answer:?}");
}

#[tokio::test]
async fn a_schema_that_is_none_is_refused() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let wrong =
        [json!({"type": "nonsense"}), json!([]), json!("x"), json!({"$ref": "http://127.0.0.1:1/x"}), json!({"x": "y".repeat(70_000)})];
    for schema in wrong {
        let answer = server.post("/run", &token, &json!({"prompt": "x", "schema": schema})).await;
        answer.problem(422);
        assert_eq!(answer.json["errors"][0]["pointer"], "/schema");
    }
    let fits = server.post("/run", &token, &json!({"prompt": "x", "schema": {"type": "object"}})).await;
    assert_eq!((fits.status, &fits.json["result"]), (StatusCode::OK, &json!({})));
    let answer = server.post("/run", &token, &json!({"prompt": "do: where", "schema": {"type": "object"}})).await;
    assert_eq!(
        (answer.status, &answer.json["error"]),
        (StatusCode::BAD_GATEWAY, &json!("the reply does not fit the schema: it is no JSON"))
    );
    let null = server.post("/run", &token, &json!({"prompt": "x", "schema": Value::Null})).await;
    assert_eq!(null.status, StatusCode::OK);
}

#[tokio::test]
async fn nothing_costs_nothing() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let usage = server.get("/usage", &token).await;
    assert!(usage.text.contains(r#""cost_usd":0.0"#), "{usage:?}");
}
