//! What agents ask, as far as it needs no agent.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Answer, Options};

#[tokio::test]
async fn what_can_not_be_asked_is_refused_and_says_why() {
    let server = Options::acpx_stand_in().start();
    let token = server.mint("app").await;
    for (body, pointer) in [
        (json!({"permissions": "approve-all"}), "/permissions"),
        (json!({"permissions": "ask", "permission_timeout_secs": 9}), "/permission_timeout_secs"),
        (json!({"permissions": "ask", "permission_timeout_secs": 3601}), "/permission_timeout_secs"),
        (json!({"permission_timeout_secs": 10}), "/permission_timeout_secs"),
    ] {
        let mut asked = body;
        asked["prompt"] = json!("Hello.");
        let answer = Answer::of(server.request(Method::POST, "/run", &token).header("prefer", "respond-async").json(&asked)).await;
        assert_eq!(
            (answer.status, &answer.json["errors"][0]["pointer"]),
            (StatusCode::UNPROCESSABLE_ENTITY, &json!(pointer)),
            "{answer:?}"
        );
    }
    // Nobody could answer while it is waited for.
    let plain = server.post("/run", &token, &json!({"prompt": "Hello.", "permissions": "ask"})).await;
    assert!(plain.status == 422 && plain.json["errors"][0]["detail"].as_str().unwrap().contains("respond-async"), "{plain:?}");
    let by_acpx = server.post("/sessions", &token, &json!({"permissions": "ask"})).await;
    assert!(by_acpx.status == 422 && by_acpx.json["errors"][0]["detail"].as_str().unwrap().contains("acpx"), "{by_acpx:?}");
    server.post("/sessions", &token, &json!({"system": "Be brief."})).await.problem(422);
    assert_eq!(server.query::<i64>("SELECT (SELECT count(*) FROM sessions) + (SELECT count(*) FROM runs)"), 0);
}

#[tokio::test]
async fn an_answer_is_one_thing_to_a_question_that_is_there() {
    let server = Options::acpx_stand_in().start();
    let token = server.mint("app").await;
    let session = server.post("/sessions", &token, &json!({})).await.json["session_id"].as_str().unwrap().to_owned();
    let run = server.run(&token, "Hello.").await.header("x-run-id").to_owned();
    for of in [format!("/sessions/{session}"), format!("/runs/{run}")] {
        let list = server.get(&format!("{of}/permissions"), &token).await;
        assert_eq!(list.json, json!({"permissions": [], "count": 0}));
        let answer = async |body: Value| server.post(&format!("{of}/permissions/0123"), &token, &body).await;
        for wrong in [
            json!({}),
            json!({"option_id": "allow", "decision": "allow"}),
            json!({"decision": "maybe"}),
            json!({"decision": "allow", "answers": "Blue"}),
            json!({"decision": "allow", "updated_input": []}),
        ] {
            answer(wrong).await.problem(422);
        }
        answer(json!({"decision": "allow"})).await.problem(404);
    }
    // Only the tools of a run can be given something else.
    let body = json!({"decision": "deny", "message": "No."});
    server.post(&format!("/sessions/{session}/permissions/0123"), &token, &body).await.problem(422);
    for of in ["/sessions/0123", "/runs/0123"] {
        server.get(&format!("{of}/permissions"), &token).await.problem(404);
        server.post(&format!("{of}/permissions/0123"), &token, &json!({"decision": "allow"})).await.problem(404);
    }
}
