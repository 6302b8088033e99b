//! The model APIs with the real `claude`: what the model is asked, and what is left.

use std::fs;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{ADMIN, Answer, Options, settled, until};

const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC";

fn echo() -> Value {
    json!({"role": "user", "content": "stub: {\"echo\": true}"})
}

fn said(role: &str, content: impl Into<Value>) -> Value {
    json!({"role": role, "content": content.into()})
}

async fn ask(forge: &Forge, messages: Vec<Value>, more: Value) -> Answer {
    let mut body = json!({"model": "sonnet", "max_tokens": 500, "messages": messages});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    forge.server.post("/v1/messages", &forge.token, &body).await
}

/// The request that reached the model, and its messages without what the CLI says of itself: role, and each block with its text,
/// its data, or its ids.
fn reached(answer: &Answer) -> (Value, Vec<Value>) {
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let request: Value = serde_json::from_str(answer.json["content"][0]["text"].as_str().unwrap()).unwrap();
    let own = |block: &Value| {
        let mut block = block.as_object().unwrap().clone();
        block.remove("cache_control");
        let reminder = block.get("text").is_some_and(|text| text.as_str().unwrap().starts_with("<system-reminder>"));
        (!reminder).then_some(Value::Object(block))
    };
    let messages = request["messages"].as_array().unwrap().iter().filter(|message| message["role"] != "system");
    let messages = messages.map(|message| {
        let content = match &message["content"] {
            Value::String(said) => text(said),
            blocks => blocks.clone(),
        };
        said(message["role"].as_str().unwrap(), content.as_array().unwrap().iter().filter_map(own).collect::<Vec<_>>())
    });
    let messages = messages.filter(|message| message["content"] != json!([])).collect();
    (request, messages)
}

fn text(text: &str) -> Value {
    json!([{"type": "text", "text": text}])
}

#[tokio::test]
async fn the_model_sees_what_the_caller_sent_and_nothing_of_the_house() {
    let Some(forge) = Forge::start().await else { return };
    let (claude, pwned) = (forge.home.path().join(".claude"), forge.home.path().join("pwned"));
    fs::create_dir_all(claude.join("commands")).unwrap();
    fs::write(claude.join("CLAUDE.md"), "Speak of QUINCES.").unwrap();
    fs::write(claude.join("commands/fruit.md"), "QUINCES").unwrap();
    let hook = json!([{"hooks": [{"type": "command", "command": format!("touch {}", pwned.display())}]}]);
    let settings = json!({"hooks": {"SessionStart": hook, "UserPromptSubmit": hook, "Stop": hook}, "env": {"FRUIT": "QUINCES"}});
    fs::write(claude.join("settings.json"), settings.to_string()).unwrap();
    fs::write(forge.home.path().join("secret"), "QUINCES").unwrap();
    let mention = format!("@{}", forge.home.path().join("secret").display());

    let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}});
    let call = |id: &str| json!({"type": "tool_use", "id": id, "name": "look", "input": {"z": 1}});
    let result = |id: &str| json!({"type": "tool_result", "tool_use_id": id, "content": [{"type": "text", "text": format!("of {id}")}]});
    let history = vec![
        said("assistant", "I begin."),
        said("user", "/fruit"),
        said("assistant", "two"),
        said("user", mention.as_str()),
        said("assistant", vec![call("a"), call("b")]),
        said("user", vec![result("a"), result("b")]),
        said("assistant", "four"),
        said("user", json!([{"type": "text", "text": "/compact"}, image])),
        said("assistant", "five <b>\u{1F600}"),
        echo(),
    ];
    let tools: Vec<_> = (0..100).map(|at| json!({"name": format!("t.{at}-x"), "input_schema": {"type": "object"}})).collect();
    let answer = ask(&forge, history.clone(), json!({"system": "Be\nMio.", "tools": tools, "stop_sequences": ["END"]})).await;
    let (request, messages) = reached(&answer);
    assert!(!answer.text.contains("QUINCES") && !pwned.exists(), "{answer:?}");
    assert_eq!(request["system"].as_array().unwrap().last().unwrap()["text"], "Be\nMio.");
    assert_eq!(request["tools"], json!(tools));
    assert_eq!((&request["max_tokens"], &request["stop_sequences"]), (&json!(500), &json!(["END"])));
    assert!(request.get("thinking").is_none_or(|thinking| thinking["type"] == "disabled"), "{}", request["thinking"]);
    // The one thing that is added: a line's end before a slash that would make a command of it.
    let content = |message: &Value| match &message["content"] {
        Value::String(said) => text(said),
        blocks => blocks.clone(),
    };
    let plain = |message: &Value| json!([message["role"], content(message)]).to_string().replace("\\n/", "/");
    assert_eq!(messages.iter().map(plain).collect::<Vec<_>>(), history.iter().map(plain).collect::<Vec<_>>());
    for kept in ["projects", "session-env", "todos"] {
        assert_eq!(claude.join(kept).read_dir().map_or(0, Iterator::count), 0, "{kept} is not empty");
    }
}

#[tokio::test]
async fn a_tool_that_is_called_like_one_of_the_clis_is_the_callers() {
    let Some(forge) = Forge::start().await else { return };
    let pwned = forge.home.path().join("pwned");
    let prompt = format!("stub: {}", json!({"tool": {"name": "Bash", "input": {"command": format!("touch {}", pwned.display())}}}));
    let tool = json!({"name": "Bash", "input_schema": {"type": "object"}});
    let answer = ask(&forge, vec![said("user", prompt)], json!({"tools": [tool]})).await;
    assert_eq!((&answer.json["stop_reason"], &answer.json["content"][0]["name"]), (&json!("tool_use"), &json!("Bash")), "{answer:?}");
    assert!(!pwned.exists());
    // The ledger says what was called.
    assert!(forge.server.query::<String>("SELECT result FROM runs").contains("\"name\":\"Bash\""));
}

#[tokio::test]
async fn a_stream_comes_as_it_is_made_and_one_that_is_left_leaves_nothing() {
    let Some(forge) = Forge::start().await else { return };
    let prompt = format!("stub: {}", json!({"bytes": 4000, "pace_ms": 20, "thinking": "hm"}));
    let body = json!({"model": "sonnet", "stream": true, "messages": [said("user", prompt)]});
    let mut response = forge.server.request(Method::POST, "/v1/chat/completions", &forge.token).json(&body).send().await.unwrap();
    let (mut seen, begun) = (String::new(), Instant::now());
    while !seen.contains("cdef") {
        seen += &String::from_utf8_lossy(&response.chunk().await.unwrap().unwrap());
    }
    assert!(begun.elapsed() < Duration::from_secs(5) && seen.contains("\"reasoning_content\":\"hm\""), "{seen}");
    drop(response);
    until("the end of its row", || forge.server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'cancelled'") == 1).await;
    settled("processes of the run", 0, || forge.server.agents()).await;
}

#[tokio::test]
async fn what_is_asked_for_again_finds_a_process_that_waits() {
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_STANDBY", 1)).await else { return };
    let answer = ask(&forge, vec![echo()], json!({})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    settled("a process that waits", 1, || forge.server.agents()).await;
    // Whatever it is: only the model must be the same.
    let history = vec![said("user", "one"), said("assistant", "two"), echo()];
    let (request, messages) =
        reached(&ask(&forge, history, json!({"system": "S", "tools": [{"name": "t", "input_schema": {"type": "object"}}]})).await);
    assert_eq!((messages.len(), &request["tools"][0]["name"]), (3, &json!("t")));
    let metrics = forge.server.get("/metrics", ADMIN).await.text;
    assert!(
        metrics
            .lines()
            .any(|line| line.contains("standbys_total") && line.contains("completion") && line.contains("hit") && line.ends_with(" 1")),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_response_can_be_gone_on_with_after_a_restart() {
    let Some(forge) = Forge::start().await else { return };
    let ask = async |forge: &Forge, body: Value| forge.server.post("/v1/responses", &forge.token, &body).await;
    let first = ask(&forge, json!({"model": "sonnet", "input": "My name is Mio.", "instructions": "Be brief."})).await;
    let second = ask(&forge, json!({"model": "sonnet", "input": "And yours?", "previous_response_id": first.json["id"]})).await;
    assert_eq!(second.status, StatusCode::OK, "{second:?}");
    let forge = Forge { server: forge.server.crash_and_restart(), ..forge };
    let path = format!("/v1/responses/{}", second.json["id"].as_str().unwrap());
    assert_eq!(forge.server.get(&path, &forge.token).await.json, second.json);
    let third = ask(&forge, json!({"model": "sonnet", "input": [echo()], "previous_response_id": second.json["id"]})).await;
    let reply = third.json["output"][0]["content"][0]["text"].as_str().unwrap();
    let (request, messages) = reached(&Answer { json: json!({"content": [{"text": reply}]}), ..third.clone() });
    assert_eq!(
        messages.iter().map(|message| message["role"].as_str().unwrap()).collect::<Vec<_>>(),
        ["user", "assistant", "user", "assistant", "user"]
    );
    assert_eq!(messages[0]["content"], text("My name is Mio."));
    assert_eq!(messages[1]["content"][0]["text"], first.json["output"][0]["content"][0]["text"]);
    // Instructions are of their own response alone.
    assert!(!request["system"].to_string().contains("Be brief."));
}
