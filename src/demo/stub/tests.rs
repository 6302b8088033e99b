//! One directive is the same deed in every API.

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::routes;

const CALL: &str = r#"stub: {"thinking": "Hm.", "tool": {"name": "look", "input": {"at": "it"}}}"#;

/// The path of each API, a request that says `prompt`, and one in which a tool was then called and said `found`.
fn apis(prompt: &str) -> [(&'static str, Value, Value); 4] {
    let user = json!({"role": "user", "content": prompt});
    let message = json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": prompt}]});
    let content = json!({"role": "user", "parts": [{"text": "<session_context>"}, {"text": prompt}]});
    [
        (
            "/v1/messages",
            json!({"messages": [user]}),
            json!({"messages": [
                user,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "found"}]},
            ]}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [user]}),
            json!({"messages": [
                user,
                {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "found"},
            ]}),
        ),
        (
            "/v1/responses",
            json!({"input": [message]}),
            json!({"input": [
                message,
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "found"},
            ]}),
        ),
        (
            "/v1beta/models/g:generateContent",
            json!({"contents": [content]}),
            json!({"contents": [
                content,
                {"role": "model", "parts": [{"functionCall": {"name": "look", "args": {}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "look", "response": {"output": "found"}}}]},
            ]}),
        ),
    ]
}

async fn ask(path: &str, request: &Value) -> (StatusCode, String) {
    let request = Request::post(path).body(Body::from(request.to_string())).unwrap();
    let response = routes().oneshot(request).await.unwrap();
    let status = response.status();
    (status, String::from_utf8(to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec()).unwrap())
}

/// The data of a stream's events; `[DONE]` is none.
fn data(stream: &str) -> Vec<Value> {
    stream.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect()
}

#[tokio::test]
async fn a_text_is_said_whole_and_in_pieces() {
    let text = "å".repeat(3000);
    let prompt = format!(r#"stub: {{"text": "{text}", "stop_reason": "max_tokens"}}"#);
    let said = [
        ("/content/0/text", "/delta/text", "/stop_reason", "max_tokens"),
        ("/choices/0/message/content", "/choices/0/delta/content", "/choices/0/finish_reason", "length"),
        ("/output/0/content/0/text", "/delta", "/incomplete_details/reason", "max_output_tokens"),
        ("/candidates/0/content/parts/0/text", "/candidates/0/content/parts/0/text", "/candidates/0/finishReason", "MAX_TOKENS"),
    ];
    for ((path, mut request, _), (whole, piece, stop, reason)) in apis(&prompt).into_iter().zip(said) {
        let (_, answer) = ask(path, &request).await;
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer.pointer(whole), Some(&json!(text)), "{path}");
        assert_eq!(answer.pointer(stop), Some(&json!(reason)), "{path}");
        request["stream"] = json!(true);
        let (_, stream) = ask(&path.replace(":generate", ":streamGenerate"), &request).await;
        let pieces: Vec<_> = data(&stream).iter().filter_map(|event| Some(event.pointer(piece)?.as_str()?.to_owned())).collect();
        assert!(pieces.len() > 1 && pieces.concat() == text, "{path}: {stream}");
        assert!(stream.contains(reason), "{path}: {stream}");
    }
}

#[tokio::test]
async fn a_tool_is_called_once_and_its_result_is_the_reply() {
    let input = json!({"at": "it"});
    let called = [
        ("/content/1/input", input.clone(), "/content/1/text"),
        ("/choices/0/message/tool_calls/0/function/arguments", json!(input.to_string()), "/choices/0/message/content"),
        ("/output/1/arguments", json!(input.to_string()), "/output/1/content/0/text"),
        ("/candidates/0/content/parts/1/functionCall/args", input.clone(), "/candidates/0/content/parts/1/text"),
    ];
    for ((path, before, after), (call, input, reply)) in apis(CALL).into_iter().zip(called) {
        let answer: Value = serde_json::from_str(&ask(path, &before).await.1).unwrap();
        assert_eq!(answer.pointer(call), Some(&input), "{path}: {answer}");
        let answer: Value = serde_json::from_str(&ask(path, &after).await.1).unwrap();
        assert_eq!(answer.pointer(reply), Some(&json!("found")), "{path}: {answer}");
    }
}

#[tokio::test]
async fn tools_are_called_step_by_step_in_every_api() {
    let step = |name: &str| json!([{"name": name, "input": {}}, {"name": name, "input": {}}]);
    let prompt = format!("stub: {}", json!({"tools": [step("first"), step("second")]}));
    for (path, before, after) in apis(&prompt) {
        for (request, expected) in [(&before, "first"), (&after, "second")] {
            let answer = ask(path, request).await.1;
            assert_eq!(answer.matches(expected).count(), 2, "{path}: {answer}");
        }
    }
}

#[tokio::test]
async fn an_error_is_said_as_each_api_says_it() {
    for ((path, request, _), kind) in apis(r#"stub: {"error": 429}"#).into_iter().zip([
        "rate_limit_error",
        "rate_limit_exceeded",
        "rate_limit_exceeded",
        "RESOURCE_EXHAUSTED",
    ]) {
        let (status, answer) = ask(path, &request).await;
        assert!(status == StatusCode::TOO_MANY_REQUESTS && answer.contains(kind), "{path}: {status} {answer}");
    }
}

#[tokio::test]
async fn what_asks_for_a_title_gets_one_whatever_the_prompt_says() {
    let title = "Your task is to generate a very short title.\n\nUser's first message:\nstub: {\"error\": 500}";
    for (path, request, _) in apis(title) {
        let (status, answer) = ask(path, &request).await;
        assert!(status == StatusCode::OK && answer.contains("A talk with the stub"), "{path}: {status} {answer}");
    }
}

#[tokio::test]
async fn a_tool_of_a_free_form_gets_its_input_as_it_is() {
    let prompt = r#"stub: {"tool": {"name": "exec", "input": "text(1)"}}"#;
    let tools = json!([{"type": "namespace", "name": "functions", "tools": [{"type": "custom", "name": "exec"}]}]);
    let message = json!({"role": "user", "content": prompt});
    for request in [
        json!({"input": [{"type": "additional_tools", "tools": tools}, message]}),
        json!({"tools": tools, "input": [message]}),
        json!({"tools": tools[0]["tools"], "input": [message]}),
    ] {
        let answer: Value = serde_json::from_str(&ask("/v1/responses", &request).await.1).unwrap();
        let call = &answer["output"][0];
        assert_eq!((&call["type"], &call["input"]), (&json!("custom_tool_call"), &json!("text(1)")), "{answer}");
    }
}
