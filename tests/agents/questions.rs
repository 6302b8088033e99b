//! What agents ask before they act (`"permissions": "ask"`), with the real CLIs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{Answer, Options, Server, settled, until};

fn direct() -> Options {
    Options::default().set("CLAWDFORGE_ACP", "direct")
}

/// A prompt by which the model calls these tools at once.
fn calls(tools: &[Value]) -> String {
    format!("stub: {}", json!({"tools": [tools]}))
}

fn touch(file: &str) -> Value {
    json!({"name": "Bash", "input": {"command": format!("touch {file}"), "description": "test"}})
}

async fn create(server: &Server, token: &str, more: Value) -> (String, PathBuf) {
    let mut body = json!({"permissions": "ask"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = server.post("/sessions", token, &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    (format!("/sessions/{}", answer.json["session_id"].as_str().unwrap()), answer.json["cwd"].as_str().unwrap().into())
}

/// The questions that are open, as soon as there are so many.
async fn open(server: &Server, token: &str, of: &str, count: usize) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let list = server.get(&format!("{of}/permissions"), token).await;
        if list.json["count"] == count {
            return list.json["permissions"].as_array().unwrap().clone();
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{list:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn answer(server: &Server, token: &str, of: &str, question: &Value, body: Value) -> Answer {
    let id = question["permission_id"].as_str().unwrap();
    server.post(&format!("{of}/permissions/{id}"), token, &body).await
}

fn rows(server: &Server) -> String {
    server.query(
        "SELECT group_concat(coalesce(option_id, '-') || ':' || coalesce(answered_by, 'open'), ' ')
         FROM (SELECT * FROM session_events WHERE event = 'permission' ORDER BY id)",
    )
}

fn names(stream: &str) -> Vec<&str> {
    stream.lines().filter_map(|line| line.strip_prefix("event: ")).collect()
}

/// The data of an event of this name.
fn data(stream: &str, name: &str) -> Value {
    let event = stream.split("\n\n").find(|event| event.contains(&format!("event: {name}\n"))).unwrap();
    serde_json::from_str(event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap()).unwrap()
}

#[tokio::test]
async fn two_open_questions_are_answered_in_any_order_and_each_once() {
    // The home is closed whatever is answered, and this build may be in /tmp.
    let elsewhere = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = direct().set("CLAWDFORGE_AGENTS_READ", elsewhere.path().display());
    let Some(forge) = Forge::start_with(options).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let (session, _) = create(server, token, json!({})).await;
    let path = format!("{session}/turn");
    let files = ["a", "b"].map(|name| elsewhere.path().join(name));
    let reads = files.each_ref().map(|file| {
        std::fs::write(file, "the secret is quince").unwrap();
        json!({"name": "Read", "input": {"file_path": file}})
    });
    let streaming = async {
        let body = json!({"prompt": calls(&reads)});
        let request = server.request(Method::POST, &path, token).header("accept", "text/event-stream").json(&body);
        Answer::of(request).await.text
    };
    let answering = async {
        let questions = open(server, token, &session, 2).await;
        let [a, b] = files.each_ref().map(|file| {
            let is_it = |question: &&Value| question["request"]["params"]["toolCall"]["rawInput"]["file_path"] == json!(file);
            questions.iter().find(is_it).unwrap()
        });
        assert!(a["options"].as_array().unwrap().iter().all(|option| option["kind"] != "allow_always"), "{a}");
        answer(server, token, &session, b, json!({"option_id": "no such"})).await.problem(422);
        answer(server, token, &session, b, json!({"option_id": "allow_always"})).await.problem(422);
        answer(server, token, &session, b, json!({})).await.problem(422);
        let stranger = server.mint("stranger").await;
        answer(server, &stranger, &session, b, json!({"decision": "allow"})).await.problem(404);
        server.get(&format!("{session}/permissions"), &stranger).await.problem(404);

        let denied = answer(server, token, &session, b, json!({"decision": "deny"})).await;
        assert_eq!((denied.status, &denied.json["by"]), (StatusCode::OK, &json!("client")), "{denied:?}");
        assert_eq!(open(server, token, &session, 1).await[0]["permission_id"], a["permission_id"]);
        let option = a["options"].as_array().unwrap().iter().find(|option| option["kind"] == "allow_once").unwrap();
        let allowed = answer(server, token, &session, a, json!({"option_id": option["option_id"]})).await;
        assert_eq!(allowed.json["option_id"], option["option_id"]);
        (a.clone(), b.clone())
    };
    let (stream, (a, b)) = tokio::join!(streaming, answering);
    assert!(stream.contains("the secret is quince"), "{stream}");
    let failed = stream.split("\n\n").filter(|event| event.contains("event: tool_call_update") && event.contains("\"status\":\"failed\""));
    assert_eq!(failed.count(), 1, "{stream}");
    let asked = names(&stream).iter().filter(|name| **name == "permission_request").count();
    let resolved = names(&stream).iter().filter(|name| **name == "permission_resolved").count();
    assert_eq!((asked, resolved), (2, 2), "{stream}");
    let question = data(&stream, "permission_request");
    assert_eq!((&question["method"], &question["type"]), (&json!("session/request_permission"), &json!("permission_request")));
    assert_eq!(question["expires_at"].as_i64().unwrap() - question["asked_at"].as_i64().unwrap(), 300);
    assert_eq!(data(&stream, "permission_resolved")["permission_id"], b["permission_id"]);

    // The turn is over, and so are its questions.
    assert_eq!(answer(server, token, &session, &a, json!({"decision": "allow"})).await.status, StatusCode::OK);
    assert_eq!(answer(server, token, &session, &b, json!({"decision": "deny"})).await.status, StatusCode::OK);
    answer(server, token, &session, &b, json!({"decision": "allow"})).await.problem(409);
    assert_eq!(rows(server).split(' ').count(), 2);
    assert_eq!(server.get(&session, token).await.json["turn_count"], 1);
}

#[tokio::test]
async fn what_nobody_answers_is_refused_and_the_turns_clock_stands() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let (session, work) = create(server, token, json!({"permission_timeout_secs": 10})).await;
    let (path, body) = (format!("{session}/turn"), json!({"prompt": calls(&[touch("a")]), "timeout_secs": 6}));
    let (turn, question) = tokio::join!(server.post(&path, token, &body), async { open(server, token, &session, 1).await.remove(0) });
    assert_eq!(turn.status, StatusCode::OK, "{turn:?}");
    assert!(!work.join("a").exists());
    assert!(rows(server).ends_with(":timeout"), "{}", rows(server));
    answer(server, token, &session, &question, json!({"decision": "allow"})).await.problem(410);
}

#[tokio::test]
async fn a_cancelled_turn_and_a_dead_agent_answer_nothing_and_do_nothing() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let (session, _) = create(&server, &token, json!({})).await;
    let path = format!("{session}/turn");
    let body = json!({"prompt": calls(&[touch("a")])});
    // A client that waits for the turn leaves.
    let mut question = tokio::select! {
        turn = server.post(&path, &token, &body) => panic!("{turn:?}"),
        questions = open(&server, &token, &session, 1) => questions,
    };
    let question = question.remove(0);
    open(&server, &token, &session, 0).await;
    until("its row", || rows(&server) == "-:cancel").await;
    answer(&server, &token, &session, &question, json!({"decision": "allow"})).await.problem(410);

    // The adapter dies; then the server.
    let (session, work) = create(&server, &token, json!({})).await;
    let path = format!("{session}/turn");
    let turn = server.post(&path, &token, &body);
    let (failed, ()) = tokio::join!(turn, async {
        open(&server, &token, &session, 1).await;
        for pid in server.agents() {
            let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
        }
    });
    assert_eq!(failed.status, StatusCode::BAD_GATEWAY, "{failed:?}");
    assert_eq!(rows(&server), "-:cancel -:cancel");
    let background = server.request(Method::POST, &path, &token).header("prefer", "respond-async").json(&body);
    assert_eq!(Answer::of(background).await.status, StatusCode::ACCEPTED);
    let question = open(&server, &token, &session, 1).await.remove(0);
    // It is open a little before that.
    until("its row", || server.query::<i64>("SELECT count(*) FROM session_events WHERE permission_id IS NOT NULL") == 3).await;
    server.signal(Signal::KILL);
    let server = server.restart();
    assert_eq!(rows(&server), "-:cancel -:cancel -:cancel");
    open(&server, &token, &session, 0).await;
    answer(&server, &token, &session, &question, json!({"decision": "allow"})).await.problem(410);
    assert!(!work.join("a").exists());
}

#[tokio::test]
async fn always_is_offered_where_the_session_asked_for_it() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let (session, work) = create(server, token, json!({"allow_always": true})).await;
    let write = json!({"name": "Write", "input": {"file_path": work.join("a"), "content": "text"}});
    let (path, body) = (format!("{session}/turn"), json!({"prompt": calls(&[write])}));
    let (first, ()) = tokio::join!(server.post(&path, token, &body), async {
        let question = open(server, token, &session, 1).await.remove(0);
        let always = question["options"].as_array().unwrap().iter().find(|option| option["kind"] == "allow_always").unwrap();
        assert_eq!(answer(server, token, &session, &question, json!({"option_id": always["option_id"]})).await.status, StatusCode::OK);
    });
    assert_eq!(first.status, StatusCode::OK, "{first:?}");
    assert!(work.join("a").exists());
    server.post("/sessions", token, &json!({"permissions": "deny-all", "allow_always": true})).await.problem(422);
    server.post("/sessions", token, &json!({"permissions": "ask", "permission_timeout_secs": 9})).await.problem(422);
    server.post("/sessions", token, &json!({"permission_timeout_secs": 10})).await.problem(422);
}

#[tokio::test]
async fn an_agent_that_wants_to_know_something_is_told() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let (session, _) = create(server, token, json!({})).await;
    let which = json!({"question": "Which colour?", "header": "Colour", "multiSelect": false,
        "options": [{"label": "Red", "description": "warm"}, {"label": "Blue", "description": "cold"}]});
    let ask = json!({"name": "AskUserQuestion", "input": {"questions": [which]}});
    let (path, body) = (format!("{session}/turn"), json!({"prompt": calls(&[ask])}));
    let (turn, ()) = tokio::join!(server.post(&path, token, &body), async {
        let question = open(server, token, &session, 1).await.remove(0);
        assert_eq!(question["request"]["method"], "elicitation/create", "{question}");
        let fields = question["request"]["params"]["requestedSchema"]["properties"].as_object().unwrap();
        let field = fields.keys().next().unwrap();
        let answered = answer(server, token, &session, &question, json!({"decision": "allow", "answers": {field: "Blue"}})).await;
        assert_eq!(answered.status, StatusCode::OK, "{answered:?}");
    });
    assert!(turn.json["text"].as_str().unwrap().contains("Blue"), "{turn:?}");
}

#[tokio::test]
async fn a_run_asks_too() {
    let Some(forge) = Forge::start_with(direct()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let body = |tool: Value| json!({"prompt": calls(&[tool]), "permissions": "ask", "permission_timeout_secs": 10, "timeout_secs": 8});
    server.post("/run", token, &body(touch("a"))).await.problem(422);
    server.post("/run", token, &json!({"prompt": "a", "permissions": "approve-all"})).await.problem(422);
    let begin = async |tool: Value| {
        let request = server.request(Method::POST, "/run", token).header("prefer", "respond-async").json(&body(tool));
        format!("/runs/{}", Answer::of(request).await.json["run_id"].as_str().unwrap())
    };
    let result = async |run: &str| {
        let events = Answer::of(server.request(Method::GET, &format!("{run}/events"), token)).await.text;
        (events.clone(), data(&events, "result")["result"].to_string())
    };

    // What it may do is not what it was about to do.
    let run = begin(json!({"name": "Bash", "input": {"command": "touch a && echo changed", "description": "test"}})).await;
    let question = open(server, token, &run, 1).await.remove(0);
    assert_eq!(question["request"]["request"]["subtype"], "can_use_tool", "{question}");
    let input = json!({"command": "echo instead", "description": "test"});
    let allowed = answer(server, token, &run, &question, json!({"decision": "allow", "updated_input": input})).await;
    assert_eq!((allowed.status, &allowed.json["option_id"]), (StatusCode::OK, &json!("allow")), "{allowed:?}");
    let (events, text) = result(&run).await;
    assert!(text.contains("instead") && !text.contains("changed"), "{text}");
    assert_eq!(data(&events, "permission_request")["permission_id"], question["permission_id"]);
    assert_eq!(data(&events, "permission_resolved")["by"], "client");
    answer(server, token, &run, &question, json!({"decision": "allow"})).await.problem(409);

    // Why it may not is what the model hears.
    let run = begin(touch("b")).await;
    let question = open(server, token, &run, 1).await.remove(0);
    answer(server, token, &run, &question, json!({"decision": "deny", "message": "Not on a Friday."})).await;
    assert!(result(&run).await.1.contains("Not on a Friday."));

    // What it wants to know is answered by its question's text.
    let which = json!({"question": "Which colour?", "header": "Colour", "multiSelect": false,
        "options": [{"label": "Red", "description": "warm"}, {"label": "Blue", "description": "cold"}]});
    let run = begin(json!({"name": "AskUserQuestion", "input": {"questions": [which]}})).await;
    let question = open(server, token, &run, 1).await.remove(0);
    answer(server, token, &run, &question, json!({"decision": "allow", "answers": {"Which colour?": "Blue"}})).await;
    assert!(result(&run).await.1.contains("Blue"));

    // Nobody answers: its clock stood for the ten seconds.
    let run = begin(touch("c")).await;
    let question = open(server, token, &run, 1).await.remove(0);
    assert!(result(&run).await.1.contains("Nobody answered in time"));
    answer(server, token, &run, &question, json!({"decision": "deny"})).await.problem(410);

    let run = begin(touch("d")).await;
    open(server, token, &run, 1).await;
    assert_eq!(server.request(Method::DELETE, &run, token).send().await.unwrap().status(), StatusCode::OK);
    settled("processes of the run", 0, || server.agents()).await;
    assert_eq!(rows(server), "allow:client deny:client allow:client deny:timeout -:cancel");
}
