//! `/sessions` with the real `acpx` and `claude`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawdforge::agent::acpx::workspace::SessionDir;
use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{Answer, Options, Server, by_acpx, until};

async fn create(server: &Server, token: &str, body: &Value) -> String {
    let answer = server.post("/sessions", token, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["session_id"].as_str().unwrap().to_owned()
}

async fn turn(server: &Server, token: &str, id: &str, prompt: &str) -> Answer {
    server.post(&format!("/sessions/{id}/turn"), token, &json!({"prompt": prompt})).await
}

async fn delete(server: &Server, token: &str, id: &str) -> Answer {
    Answer::of(server.request(Method::DELETE, &format!("/sessions/{id}"), token)).await
}

fn stub(directive: &Value) -> String {
    format!("stub: {directive}")
}

fn bash(command: &str) -> String {
    stub(&json!({"tool": {"name": "Bash", "input": {"command": command, "description": "test"}}}))
}

fn kill_agents(server: &Server) {
    for pid in server.agents() {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
    }
}

fn events(server: &Server) -> String {
    server.query("SELECT group_concat(event || coalesce(':' || stop_reason, ''), ' ') FROM (SELECT * FROM session_events ORDER BY id)")
}

#[tokio::test]
async fn the_round_trip_with_memory_model_and_meta() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let created = server.post("/sessions", token, &json!({"model": "haiku", "meta": {"n": 1.50, "b": [1]}})).await;
    assert_eq!(created.keys(), ["ok", "session_id", "agent", "model", "cwd", "created_at", "meta"]);
    assert_eq!((&created.json["agent"], &created.json["model"]), (&json!("claude"), &json!("haiku")));
    let id = created.json["session_id"].as_str().unwrap().to_owned();
    assert!(Path::new(created.json["cwd"].as_str().unwrap()).is_dir());

    let first = turn(server, token, &id, "The word is quince.").await;
    assert_eq!(first.status, StatusCode::OK, "{first:?}");
    assert_eq!(first.keys(), ["ok", "session_id", "turn_index", "events", "text", "stop_reason", "duration_ms"]);
    assert_eq!((&first.json["turn_index"], &first.json["stop_reason"]), (&json!(1), &json!("end_turn")));
    assert_eq!(first.json["text"], "The model stub read a prompt of 19 characters.");
    let last = first.json["events"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["type"], &last["result"]["stopReason"]), (&json!("stop"), &json!("end_turn")));

    let second = turn(server, token, &id, &stub(&json!({"echo": true}))).await;
    let request: Value = serde_json::from_str(second.json["text"].as_str().unwrap()).unwrap();
    assert_eq!(second.json["turn_index"], 2);
    assert!(request["messages"].to_string().contains("The word is quince."), "the first turn is remembered");
    assert!(request["model"].as_str().unwrap().contains("haiku"), "{}", request["model"]);

    let state = server.get(&format!("/sessions/{id}"), token).await;
    assert_eq!((&state.json["turn_count"], &state.json["live"], &state.json["closed_at"]), (&json!(2), &json!(true), &Value::Null));
    assert!(state.json["last_turn_at"].is_i64() && state.json["meta"] == created.json["meta"], "{state:?}");
    assert_eq!(server.get("/healthz", "").await.json["open_sessions"], 1);

    assert_eq!(delete(server, token, &id).await.json, json!({"ok": true, "session_id": id, "already_closed": false}));
    assert_eq!(delete(server, token, &id).await.json, json!({"ok": true, "session_id": id, "already_closed": true}));
    turn(server, token, &id, "More?").await.problem(410);
    assert_eq!(server.agents(), [0; 0]);
    assert_eq!(events(server), "create turn:end_turn turn:end_turn close");
    let row: String =
        server.query("SELECT json_array(model, input_tokens > 0, output_tokens > 0, ok) FROM session_events WHERE event = 'turn'");
    assert_eq!(row, r#"["haiku",1,1,1]"#);
}

#[tokio::test]
async fn a_tool_call_has_its_result_and_a_file_can_be_attached() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    let answer = turn(server, token, &id, &bash("echo from-the-tool; pwd")).await;
    let call = answer.json["events"].as_array().unwrap().iter().find(|event| event["type"] == "tool_call").expect("a tool call");
    assert_eq!((&call["name"], &call["status"]), (&json!("Bash"), &json!("completed")), "{call}");
    assert_eq!(call["args"]["command"], "echo from-the-tool; pwd");
    assert!(call["result"].as_str().unwrap().contains("from-the-tool"), "{call}");

    let file = server.upload(token, "note.txt", "the cellar door").await;
    assert!(answer.json.get("files").is_none());
    let body = json!({"prompt": bash("cat note.txt"), "files": [file]});
    let answer = server.post(&format!("/sessions/{id}/turn"), token, &body).await;
    assert!(answer.json["text"].as_str().unwrap().contains("the cellar door"), "{answer:?}");
    assert_eq!(answer.json["files"], json!(["note.txt"]));
    let body = json!({"prompt": stub(&json!({"echo": true})), "files": [file]});
    let answer = server.post(&format!("/sessions/{id}/turn"), token, &body).await;
    let text = answer.json["text"].as_str().unwrap();
    assert!(text.contains("[Attached files") && text.contains("/work/note-2.txt"), "{answer:?}");
    assert_eq!(answer.json["files"], json!(["note-2.txt"]));
    // They are there two turns later, and after the agent's end.
    kill_agents(server);
    let later = turn(server, token, &id, &bash("cat note.txt; ls -A")).await;
    let text = later.json["text"].as_str().unwrap();
    assert!(text.contains("the cellar door") && text.contains("note-2.txt") && !text.contains(".attaching"), "{later:?}");
}

#[tokio::test]
async fn any_text_is_a_turn_and_reaches_the_model_as_it_is() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    for prompt in ["/clear", "/nonsense now", "[1, 2]", "[{\"type\": \"text\"}]", "--help", " padded "] {
        let answer = turn(server, token, &id, &format!("{prompt}\nstub: {{\"echo\": true}}")).await;
        let request: Value = serde_json::from_str(answer.json["text"].as_str().unwrap_or_default()).unwrap_or_default();
        let quoted = json!(prompt).to_string();
        assert!(request["messages"].to_string().contains(quoted.trim_matches('"')), "{prompt}: {answer:?}");
    }
}

#[tokio::test]
async fn what_is_anothers_does_not_exist() {
    let Some(forge) = Forge::start().await else { return };
    let (server, mine) = (&forge.server, &forge.token);
    let other = server.mint("other").await;
    let theirs = create(server, &other, &json!({})).await;
    let never = "0".repeat(32);
    for id in [&theirs, &never] {
        let get = server.get(&format!("/sessions/{id}"), mine).await;
        get.problem(404);
        assert_eq!(turn(server, mine, id, "Hello?").await.text, get.text);
        assert_eq!(delete(server, mine, id).await.text, get.text);
    }
    assert_eq!(server.get("/sessions", mine).await.json, json!({"sessions": [], "count": 0}));
    let list = server.get("/sessions?include_closed=false", &other).await;
    assert_eq!((&list.json["count"], &list.json["sessions"][0]["session_id"]), (&json!(1), &json!(theirs)));
}

#[tokio::test]
async fn an_api_error_fails_the_turn_and_the_session_stays_usable() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    let answer = turn(server, token, &id, &stub(&json!({"error": 401}))).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    assert_eq!(answer.keys(), ["ok", "session_id", "events", "error", "stderr", "stop_reason", "duration_ms"]);
    assert!(answer.json["error"].as_str().unwrap().contains("uthenticat"), "{}", answer.json["error"]);
    assert_eq!(answer.json["stop_reason"], "error");
    let next = turn(server, token, &id, "Again?").await;
    assert_eq!((next.status, &next.json["turn_index"]), (StatusCode::OK, &json!(1)), "{next:?}");
}

#[tokio::test]
async fn five_turns_at_once_go_in_order() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    let turns = (0..5).map(|n| {
        let id = &id;
        async move {
            tokio::time::sleep(Duration::from_millis(100 * n)).await;
            turn(server, token, id, &format!("Turn {n}")).await.json["turn_index"].as_u64().unwrap()
        }
    });
    assert_eq!(futures_util::future::join_all(turns).await, [1, 2, 3, 4, 5]);
    let prompts: String =
        server.query("SELECT group_concat(prompt) FROM (SELECT prompt FROM session_events WHERE event = 'turn' ORDER BY id)");
    assert_eq!(prompts, "Turn 0,Turn 1,Turn 2,Turn 3,Turn 4");
}

#[tokio::test]
async fn a_timeout_cancels_the_turn_and_the_next_starts_at_once() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    turn(server, token, &id, "Warm up.").await;
    let body = json!({"prompt": bash("true; sleep 621"), "timeout_secs": 5});
    let begun = Instant::now();
    let answer = server.post(&format!("/sessions/{id}/turn"), token, &body).await;
    assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("timeout")), "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(!server.running("sleep\x00621"));
    let begun = Instant::now();
    assert_eq!(turn(server, token, &id, "And now?").await.status, StatusCode::OK);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_client_that_leaves_and_a_close_cancel_the_turn() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    let sleeps = bash("true; sleep 622");
    tokio::select! {
        answer = turn(server, token, &id, &sleeps) => panic!("{answer:?}"),
        () = until("the command", || server.running("sleep\x00622")) => {}
    }
    until("the command to end", || !server.running("sleep\x00622")).await;
    until("the row", || events(server) == "create turn:cancelled").await;
    assert_eq!(turn(server, token, &id, "Still there?").await.status, StatusCode::OK);

    let (running, waiting, closed) = tokio::join!(
        turn(server, token, &id, &sleeps),
        async {
            until("the command", || server.running("sleep\x00622")).await;
            turn(server, token, &id, "I wait.").await
        },
        async {
            until("the command", || server.running("sleep\x00622")).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            delete(server, token, &id).await
        }
    );
    assert_eq!(running.status, StatusCode::BAD_GATEWAY, "{running:?}");
    waiting.problem(410);
    assert_eq!(closed.json["already_closed"], false, "{closed:?}");
    assert_eq!(server.agents(), [0; 0]);
}

#[tokio::test]
async fn sessions_outlive_a_crash_in_the_middle_of_a_turn() {
    let Some(forge) = Forge::start().await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let id = create(&server, &token, &json!({})).await;
    turn(&server, &token, &id, "The word is medlar.").await;
    let sleeps = bash("true; sleep 623");
    tokio::select! {
        answer = turn(&server, &token, &id, &sleeps) => panic!("{answer:?}"),
        () = until("the command", || server.running("sleep\x00623")) => {}
    }
    let sockets = SessionDir::new(server.room("sessions", &id)).sockets();
    assert_eq!(sockets.is_dir(), by_acpx());
    let server = server.crash_and_restart();
    assert!(!server.running("sleep\x00623") && !server.running("queue-owner"));
    assert!(!sockets.exists(), "{} is left", sockets.display());
    assert_eq!(events(&server), "create turn:end_turn turn:interrupted");
    let state = server.get(&format!("/sessions/{id}"), &token).await;
    assert_eq!((&state.json["live"], &state.json["turn_count"]), (&json!(true), &json!(1)));
    let next = turn(&server, &token, &id, &stub(&json!({"echo": true}))).await;
    assert_eq!(next.json["turn_index"], 2, "{next:?}");
    assert!(next.json["text"].as_str().unwrap().contains("The word is medlar."));
}

#[tokio::test]
async fn a_stop_cancels_a_turn_past_the_drain_time() {
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_DRAIN_SECS", 1)).await else { return };
    let Forge { mut server, token, home: _home, stub: _stub } = forge;
    let id = create(&server, &token, &json!({})).await;
    let sleeps = bash("true; sleep 624");
    let queues = server.room("sessions", &id).join("home/.acpx/queues");
    let locks = || queues.read_dir().into_iter().flatten().flatten();
    let sockets = SessionDir::new(server.room("sessions", &id)).sockets();
    let (answer, ()) = tokio::join!(turn(&server, &token, &id, &sleeps), async {
        until("the command", || server.running("sleep\x00624")).await;
        assert_eq!((sockets.is_dir(), locks().next().is_some()), (by_acpx(), by_acpx()));
        server.signal(Signal::TERM);
    });
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    assert!(server.ended().success());
    assert_eq!(events(&server), "create turn:interrupted");
    assert_eq!(server.agents(), [0; 0]);
    assert!(!sockets.exists() && locks().next().is_none(), "{} or a lock is left", sockets.display());
}

#[tokio::test]
async fn the_cap_holds_and_what_is_swept_leaves_nothing() {
    let options = Options::default().set("CLAWDFORGE_MAX_SESSIONS", 2).set("CLAWDFORGE_SESSION_TTL_SECS", 8);
    let options = options.set("CLAWDFORGE_SESSION_HARD_TTL_SECS", 0).set("CLAWDFORGE_SWEEP_SECS", 1);
    let Some(forge) = Forge::start_with(options).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let body = json!({});
    let creations = futures_util::future::join_all((0..4).map(|_| server.post("/sessions", token, &body))).await;
    let (made, refused): (Vec<_>, Vec<_>) = creations.into_iter().partition(|answer| answer.status == StatusCode::OK);
    assert_eq!((made.len(), refused.len()), (2, 2));
    for answer in refused {
        answer.problem(503);
        assert_eq!(answer.header("retry-after"), "5");
    }
    let id = made[0].json["session_id"].as_str().unwrap();
    assert_eq!(turn(server, token, id, "Hello.").await.status, StatusCode::OK);
    let begun = Instant::now();
    while server.query::<i64>("SELECT count(*) FROM sessions") > 0 {
        assert!(begun.elapsed() < Duration::from_mins(1), "{}", server.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let swept = server.query::<i64>("SELECT count(*) FROM session_events WHERE event IN ('sweep_close', 'hard_delete')");
    assert_eq!(swept, 4);
    assert_eq!(server.agents(), [0; 0]);
    let home = forge.home.path();
    for kept in [".acpx/sessions", ".acpx/queues", ".claude/projects", ".claude/session-env"] {
        let left: Vec<_> = home.join(kept).read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    assert_eq!(server.count("sessions"), 0);
    assert_eq!(server.get(&format!("/sessions/{id}"), token).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_turn_costs_what_its_agent_says_more_than_before() {
    let Some(forge) = Forge::start().await else { return };
    let Forge { server, token, home: _home, stub: _stub } = forge;
    let id = create(&server, &token, &json!({"model": "opus"})).await;
    let long = stub(&json!({"bytes": 3000}));
    for _ in 0..2 {
        assert_eq!(turn(&server, &token, &id, &long).await.status, StatusCode::OK);
    }
    let server = server.crash_and_restart();
    assert_eq!(turn(&server, &token, &id, &long).await.status, StatusCode::OK);
    let costs = "SELECT count(*) FROM session_events WHERE event = 'turn' AND cost_usd BETWEEN 0.015 AND 0.03";
    assert_eq!(
        server.query::<i64>(costs),
        3,
        "{}",
        server.query::<String>("SELECT group_concat(coalesce(cost_usd, 0)) FROM session_events")
    );

    let body = json!({"name": "thrifty", "daily_usd": 0.01});
    let thrifty = server.post("/admin/tokens", crate::harness::ADMIN, &body).await.json["token"].as_str().unwrap().to_owned();
    let id = create(&server, &thrifty, &json!({"model": "opus"})).await;
    assert_eq!(turn(&server, &thrifty, &id, &long).await.status, StatusCode::OK);
    turn(&server, &thrifty, &id, &long).await.problem(429);
}

#[tokio::test]
async fn an_agent_other_than_claude_works_where_the_session_says() {
    let Some(clis) = crate::clis() else { return };
    let programs = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in/agent"), programs.path().join("other-agent")).unwrap();
    let path = std::env::join_paths(std::iter::once(programs.path().to_owned()).chain(std::env::split_paths(&clis.path))).unwrap();
    let options = Options::default().set("CLAWDFORGE_AGENTS", "claude,other-agent").set("PATH", path.display());
    let Some(forge) = Forge::start_with(options).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let created = server.post("/sessions", token, &json!({"agent": "other-agent"})).await;
    assert_eq!(created.status, StatusCode::OK, "{created:?}");
    for prompt in ["one", "two"] {
        let answer = turn(server, token, created.json["session_id"].as_str().unwrap(), prompt).await;
        assert_eq!(answer.json["text"], json!(format!("{} {prompt}", created.json["cwd"].as_str().unwrap())), "{answer:?}");
    }
}

#[tokio::test]
async fn a_session_goes_on_where_its_socket_was_taken_away() {
    if !by_acpx() {
        return;
    }
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_STANDBY", 1)).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    turn(server, token, &id, "The word is medlar.").await;
    let queues = server.room("sessions", &id).join("home/.acpx/queues");
    let socket = || {
        let mut files = queues.read_dir().unwrap().map(|file| file.unwrap().path());
        let lock = files.find(|path| path.extension().is_some_and(|extension| extension == "lock")).unwrap();
        let lock: Value = serde_json::from_slice(&std::fs::read(lock).unwrap()).unwrap();
        PathBuf::from(lock["socketPath"].as_str().unwrap())
    };
    let take_the_folder = |socket: &Path| std::fs::remove_dir_all(socket.parent().unwrap()).unwrap();
    let take_its_place = |socket: &Path| {
        std::fs::remove_file(socket).unwrap();
        std::fs::write(socket, "").unwrap();
    };
    for take_away in [take_the_folder, take_its_place] {
        take_away(&socket());
        let told = turn(server, token, &id, &stub(&json!({"echo": true}))).await;
        assert_eq!(told.status, StatusCode::OK, "{told:?}");
        assert!(told.json["text"].as_str().unwrap().contains("The word is medlar."), "{told:?}");
    }
}

#[tokio::test]
async fn nothing_is_made_for_a_session_whose_folder_is_gone() {
    let Some(forge) = Forge::start().await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let id = create(server, token, &json!({})).await;
    let room = server.room("sessions", &id);
    let sockets = SessionDir::new(room.clone()).sockets();
    // One that waits there would make parts of it again.
    kill_agents(server);
    until("their end", || server.agents().is_empty()).await;
    std::fs::remove_dir_all(room).unwrap();
    assert_eq!(std::fs::remove_dir(&sockets).is_ok(), by_acpx());
    let told = turn(server, token, &id, "hello").await;
    assert_eq!(told.status, StatusCode::BAD_GATEWAY, "{told:?}");
    assert!(told.json["error"].as_str().unwrap().contains("is gone; create another session"), "{told:?}");
    assert!(!sockets.exists());
    assert_eq!(delete(server, token, &id).await.status, StatusCode::OK);
    assert!(!sockets.exists());
}
