//! Agents other than claude, each through the same: two turns, a tool call, an attack, a cancel, a kill and a restart.

use std::path::Path;
use std::time::{Duration, Instant};

use clawdforge::demo::install::default_cache;
use clawdforge::demo::stub::Stub;
use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, Server, settled, until};
use crate::{clis, say};

/// A server whose agents are claude and this one.
async fn start(name: &str) -> Option<(Server, String, tempfile::TempDir, Stub)> {
    let clis = clis()?.clone().with_agent(name, &default_cache(), &say).unwrap();
    let (stub, home) = (Stub::start().await.unwrap(), tempfile::tempdir().unwrap());
    let environment = clawdforge::demo::environment(&clis, &stub.url(), home.path());
    let options = Options::default().set("CLAWDFORGE_ACP", "direct").set("CLAWDFORGE_AGENTS", format!("claude,{name}"));
    let options = options.set("CLAWDFORGE_CLAUDE_BIN", clis.claude.display()).set("CLAWDFORGE_ACPX_BIN", clis.acpx.display());
    let server = options.environment(environment.iter()).start();
    let token = server.mint("app").await;
    Some((server, token, home, stub))
}

async fn create(server: &Server, token: &str, body: &Value) -> (String, String) {
    let answer = server.post("/sessions", token, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    (answer.json["session_id"].as_str().unwrap().to_owned(), answer.json["cwd"].as_str().unwrap().to_owned())
}

async fn turn(server: &Server, token: &str, id: &str, prompt: &str) -> String {
    let answer = server.post(&format!("/sessions/{id}/turn"), token, &json!({"prompt": prompt})).await;
    assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::OK, &json!("end_turn")), "{answer:?}");
    answer.json["text"].as_str().unwrap().to_owned()
}

/// A call of its shell; where it is to ask itself, so.
type Shell = fn(command: &str, asks: bool) -> Value;

/// Runs of it, in every way that an app may ask for one.
async fn makes_runs(server: &Server, token: &str, name: &str, shell: Shell) {
    let call = |command: &str| format!("stub: {}", json!({"tool": shell(command, false)}));
    let run = async |body: Value| server.post("/run", token, &body).await;
    let rooms = || server.data().join("sessions").read_dir().unwrap().count();
    let before = rooms();
    let file = server.upload(token, "note.txt", "medlar").await;
    let answer = run(json!({"agent": name, "prompt": ECHO, "files": [file]})).await;
    assert_eq!((answer.status, &answer.json["stop_reason"]), (StatusCode::OK, &json!("end_turn")), "{answer:?}");
    assert!(answer.json["result"].to_string().contains("/note.txt"), "{answer:?}");

    // What isn't plainly safe is denied, unless it is allowed.
    let write =
        |permissions: Value| json!({"agent": name, "prompt": call("pwd; echo medlar > made; cat made"), "permissions": permissions});
    let denied = run(write(Value::Null)).await;
    let allowed = run(write(json!("approve-all"))).await;
    assert!(denied.status == StatusCode::OK && !denied.json["result"].as_str().unwrap().contains("medlar\n"), "{denied:?}");
    let text = allowed.json["result"].as_str().unwrap();
    assert!(text.contains("medlar") && text.contains(&server.data().join("sessions").display().to_string()), "{allowed:?}");

    let streamed = server.request(Method::POST, "/run", token).header("accept", "text/event-stream").json(&write(json!("approve-all")));
    let streamed = streamed.send().await.unwrap().text().await.unwrap();
    let at = |event: &str| streamed.find(&format!("event: {event}\n")).unwrap_or_else(|| panic!("no {event} in {streamed}"));
    assert!(at("tool_call") < at("tool_call_update") && at("tool_call_update") < at("result") && at("text") < at("result"));

    let asks = format!("stub: {}", json!({"tool": shell("echo medlar > made; cat made", true)}));
    let asks = json!({"agent": name, "prompt": asks, "permissions": "ask"});
    let asking = Answer::of(server.request(Method::POST, "/run", token).header("prefer", "respond-async").json(&asks)).await;
    let path = format!("/runs/{}", asking.json["run_id"].as_str().unwrap());
    let begun = Instant::now();
    let question = loop {
        let open = server.get(&format!("{path}/permissions"), token).await;
        if open.json["count"] == 1 {
            break open.json["permissions"][0]["permission_id"].as_str().unwrap().to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{open:?} {:?}", server.get(&path, token).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let question = format!("{path}/permissions/{question}");
    server.post(&question, token, &json!({"decision": "allow", "updated_input": {}})).await.problem(422);
    assert_eq!(server.post(&question, token, &json!({"decision": "allow"})).await.status, StatusCode::OK);
    let followed = server.get(&format!("{path}/events"), token).await.text;
    assert!(followed.contains("event: permission_resolved") && followed.contains("medlar\\n"), "{followed}");

    let late = json!({"agent": name, "prompt": call("tail -f /dev/null"), "permissions": "approve-all", "timeout_secs": 10});
    let late = run(late).await;
    assert_eq!((late.status, &late.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("timeout")), "{late:?}");

    // Bound, it reaches its model and not this server.
    let bound = server.post("/admin/tokens", ADMIN, &json!({"name": "bound", "network": "model"})).await;
    if bound.status == StatusCode::OK {
        let command = format!("curl -s -m 5 http://{}/healthz; curl -s -m 5 http://10.255.255.1/; sleep 0.5", server.address());
        let body = json!({"agent": name, "prompt": call(&command), "permissions": "approve-all"});
        let told = server.post("/run", bound.json["token"].as_str().unwrap(), &body).await;
        assert!(told.status == StatusCode::OK && told.text.contains("outside what the app's token lets"), "{told:?}");
        assert!(!told.text.contains("landlock"), "{told:?}");
    }

    // Nothing is left, but for one that waits for the next.
    until("an empty house", || rooms() <= before + 1).await;
    let row = server.query::<String>("SELECT group_concat(DISTINCT agent || ' ' || model) FROM runs");
    assert_eq!(row, format!("{name} "));
}

const ECHO: &str = "stub: {\"echo\": true}";

fn bytes_in(folder: &Path) -> u64 {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { bytes_in(&entry.path()) } else { entry.metadata().map_or(0, |file| file.len()) }).sum()
}

async fn goes_through_all_of_it(name: &str, shell: Shell) {
    let Some((server, token, home, _stub)) = start(name).await else { return };
    let call = |command: &str| format!("stub: {}", json!({"tool": shell(command, false)}));
    let (id, cwd) = create(&server, &token, &json!({"agent": name})).await;
    turn(&server, &token, &id, "The word is quince.").await;
    assert!(turn(&server, &token, &id, ECHO).await.contains("The word is quince."));
    let pwd = turn(&server, &token, &id, &call("pwd && echo made > made")).await;
    assert!(pwd.contains(&cwd) && Path::new(&cwd).join("made").is_file(), "{pwd}");
    assert!(!server.running("acpx"));
    makes_runs(&server, &token, name, shell).await;

    // What is the server's, and what is another session's.
    let other = server.data().join("sessions/other/work");
    std::fs::create_dir_all(&other).unwrap();
    std::fs::write(other.join("secret"), "medlar").unwrap();
    let data = server.data().display().to_string();
    let planted = home.path().join("planted").display().to_string();
    let attack = format!(
        "head -c 15 {data}/clawdforge.db; cat {data}/sessions/other/work/secret; for f in {data}/pwned {planted}; do echo x > $f; done; echo done"
    );
    let attacked = turn(&server, &token, &id, &call(&attack)).await;
    assert!(attacked.contains("done") && !attacked.contains("SQLite") && !attacked.contains("medlar"), "{attacked}");
    assert!(!server.data().join("pwned").exists() && !home.path().join("planted").exists());
    std::fs::remove_dir_all(server.data().join("sessions/other")).unwrap();

    // Cancelled, nothing of it goes on.
    let waits = |server: &Server| {
        let is_it = |pid: &u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().starts_with(b"tail\x00-f");
        server.agents().into_iter().filter(is_it).count()
    };
    let path = format!("/sessions/{id}/turn");
    let prompt = json!({"prompt": call("tail -f /dev/null")});
    let background = Answer::of(server.request(Method::POST, &path, &token).header("prefer", "respond-async").json(&prompt)).await;
    assert_eq!(background.status, StatusCode::ACCEPTED);
    until("the command", || waits(&server) > 0).await;
    let cancelled = server.post(&format!("/sessions/{id}/cancel"), &token, &json!({})).await;
    assert_eq!(cancelled.status, StatusCode::OK, "{cancelled:?}");
    assert_eq!(waits(&server), 0);

    // Whatever dies, it goes on from disk.
    turn(&server, &token, &id, "The word is sorb.").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    for pid in server.agents() {
        let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
    }
    settled("no agent", 0, || server.agents()).await;
    assert!(turn(&server, &token, &id, ECHO).await.contains("The word is sorb."));
    server.signal(Signal::TERM);
    let server = server.restart();
    assert!(turn(&server, &token, &id, ECHO).await.contains("The word is quince."));
    let room = bytes_in(&server.data().join("sessions").join(&id));
    assert!(room < 20 << 20, "{room}");
    let close = server.request(Method::DELETE, &format!("/sessions/{id}"), &token).send().await.unwrap();
    assert_eq!((close.status(), server.agents()), (StatusCode::OK, Vec::new()));
}

#[tokio::test]
async fn codex() {
    let shell = |command: &str, asks: bool| {
        let more = if asks { json!({"sandbox_permissions": "require_escalated", "justification": "test"}) } else { json!({}) };
        let mut input = json!({"cmd": command});
        input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"name": "exec_command", "input": input})
    };
    goes_through_all_of_it("codex", shell).await;
}

#[tokio::test]
async fn gemini() {
    let shell = |command: &str, _| json!({"name": "run_shell_command", "input": {"command": command, "description": "test"}});
    goes_through_all_of_it("gemini", shell).await;
}

#[tokio::test]
async fn opencode() {
    goes_through_all_of_it("opencode", |command, _| json!({"name": "bash", "input": {"command": command, "description": "test"}})).await;
}

#[tokio::test]
async fn qwen() {
    let shell = |command: &str, _| {
        // On a busy machine it loses what a command printed that ends at once.
        let command = format!("{command}; sleep 0.5");
        json!({"name": "run_shell_command", "input": {"command": command, "description": "test", "is_background": false}})
    };
    goes_through_all_of_it("qwen", shell).await;
}

#[tokio::test]
async fn an_agent_that_is_not_there_or_not_known_is_named() {
    let server = Options::stand_in().set("CLAWDFORGE_AGENTS", "claude,gemini").set("CLAWDFORGE_ACP", "direct").start();
    let token = server.mint("app").await;
    let missing = server.post("/sessions", &token, &json!({"agent": "gemini"})).await;
    let detail = missing.problem(503);
    assert!(detail.contains("gemini") && detail.contains("npm install -g @google/gemini-cli"), "{detail}");
    server.post("/sessions", &token, &json!({"agent": "codex"})).await.problem(422);
    server.post("/sessions", &token, &json!({"agent": "gemini", "system": "Be brief."})).await.problem(422);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM sessions"), 0);

    let missing = server.post("/run", &token, &json!({"agent": "gemini", "prompt": "Hello."})).await;
    assert_eq!((missing.status, &missing.json["ok"]), (StatusCode::SERVICE_UNAVAILABLE, &json!(false)), "{missing:?}");
    assert!(missing.json["error"].as_str().unwrap().contains("npm install -g @google/gemini-cli"), "{missing:?}");
    for (more, pointer) in [
        (json!({"agent": "codex"}), "/agent"),
        (json!({"agent": "gemini", "system": "Be brief."}), "/system"),
        (json!({"agent": "gemini", "schema": {"type": "object"}}), "/schema"),
        (json!({"agent": "gemini", "permissions": "yolo"}), "/permissions"),
        (json!({"permissions": "approve-all"}), "/permissions"),
        (json!({"agent": "gemini", "permissions": "deny-all", "permission_timeout_secs": 20}), "/permission_timeout_secs"),
        (json!({"agent": "gemini", "permissions": "ask"}), "/permissions"),
    ] {
        let mut body = json!({"prompt": "Hello."});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = server.post("/run", &token, &body).await;
        refused.problem(422);
        assert_eq!(refused.json["errors"][0]["pointer"], pointer, "{refused:?}");
    }
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 1);
}
