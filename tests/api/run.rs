//! `POST /run`, its queue and its row.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server, until};

/// Checks that an answer is the failure of an agent, and gives its error.
#[track_caller]
pub fn failure(answer: &Answer, stop_reason: &str) -> String {
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.keys(), ["ok", "error", "stderr", "duration_ms", "stop_reason"]);
    assert_eq!((&answer.json["ok"], &answer.json["stop_reason"]), (&json!(false), &json!(stop_reason)));
    answer.json["error"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_answer_has_four_keys_and_a_row() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let answer = server.post("/run", &token, &json!({"prompt": "hello", "model": "opus", "system": "Be brief.", "timeout_secs": 30})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.keys(), ["ok", "result", "duration_ms", "stop_reason"]);
    assert_eq!((&answer.json["ok"], &answer.json["result"], &answer.json["stop_reason"]), (&json!(true), &json!("ok"), &json!("end_turn")));
    let row: String = server.query(
        "SELECT json_array(run_id, app_name, client_ip, model, prompt, finished_at >= started_at, duration_ms, ok, stop_reason, error, result,
             input_tokens, output_tokens, cost_usd) FROM runs",
    );
    let expected = json!([
        answer.header("x-run-id"),
        "app",
        "127.0.0.1",
        "opus",
        "hello",
        1,
        answer.json["duration_ms"],
        1,
        "end_turn",
        null,
        "ok",
        3,
        4,
        0.25
    ]);
    assert_eq!(serde_json::from_str::<Value>(&row).unwrap(), expected);
    assert!(!server.log().contains("hello"), "prompts are not logged");
}

#[tokio::test]
async fn a_cli_that_misbehaves_is_a_clear_502_and_the_server_stays_as_it_was() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    for (prompt, expected) in [
        ("do: lines", "claude gave no answer; it printed more than 32 MiB that are no answer"),
        ("do: flood", "claude gave no answer; it printed more than 32 MiB that are no answer"),
        ("do: garbage", "without an answer"),
        ("do: half", "without an answer"),
        ("do: close", "claude closed its output without an answer"),
        ("do: exit 3", "claude ended (exit status: 3) without an answer"),
    ] {
        let answer = server.post("/run", &token, &json!({"prompt": prompt, "timeout_secs": 20})).await;
        assert!(failure(&answer, "error").contains(expected), "{prompt}: {answer:?}");
        assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE stop_reason IS NOT 'error'"), 0);
        until("its processes to be gone", || server.agents().is_empty()).await;
    }
    let answer = server.run(&token, "do: stderr").await;
    failure(&answer, "error");
    let stderr = answer.json["stderr"].as_str().unwrap();
    assert_eq!(stderr.chars().count(), 4000);
    assert!(stderr.ends_with("eend\n"));
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn nothing_outlives_a_run_that_answered() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    assert_eq!(server.run(&token, "do: fork").await.json["result"], "forked");
    // Those that wiped their environment and left their parent, too.
    until("orphans to be gone", || server.descendants().is_empty()).await;
    assert_eq!(server.run(&token, "do: linger").await.json["result"], "lingered");
    assert_eq!(server.run(&token, "do: lock").await.json["result"], "locked");
    until("no folder", || server.count("runs") == 0).await;
}

#[tokio::test]
async fn one_runs_end_leaves_alone_what_may_be_anothers() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let orphans = |server: &Server| {
        let cmdlines = server.descendants().into_iter().filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok());
        cmdlines.filter(|line| line.starts_with("/bin/sleep\x00605")).count()
    };
    let other = tokio::time::timeout(Duration::from_secs(2), server.run(&token, "do: fork and hang"));
    let (other, ()) = tokio::join!(other, async {
        until("the orphan", || orphans(&server) == 1).await;
        assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
        assert_eq!(orphans(&server), 1);
    });
    assert!(other.is_err());
    until("the orphans to be gone", || server.descendants().is_empty()).await;
}

#[tokio::test]
async fn a_timeout_ends_everything_also_what_ignores_signals() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let begun = Instant::now();
    let runs = ["do: hang", "do: stubborn", "do: fork and hang"].map(|prompt| {
        let (server, token) = (&server, &token);
        async move { server.post("/run", token, &json!({"prompt": prompt, "timeout_secs": 5})).await }
    });
    for answer in futures_util::future::join_all(runs).await {
        assert_eq!(failure(&answer, "timeout"), "claude did not answer within 5 s");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "it took {:?}", begun.elapsed());
    assert_eq!(server.descendants(), [0; 0]);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_run() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    for prompt in ["do: hang", "do: fork and hang"] {
        let leaves = tokio::time::timeout(Duration::from_millis(500), server.run(&token, prompt));
        assert!(leaves.await.is_err());
        until("the row to be completed", || server.query::<i64>("SELECT count(*) FROM runs WHERE finished_at IS NULL") == 0).await;
        assert_eq!(server.query::<String>("SELECT stop_reason FROM runs ORDER BY run_id DESC LIMIT 1"), "cancelled");
        assert_eq!(server.descendants(), [0; 0], "{prompt}");
    }
}

#[tokio::test]
async fn a_missing_cli_is_a_503_that_says_how_to_install_it() {
    let server = Options::default().set("CLAWDFORGE_CLAUDE_BIN", "no-such-claude").start();
    let token = server.mint("app").await;
    let answer = server.run(&token, "hello").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.keys(), ["ok", "error", "stderr", "duration_ms", "stop_reason"]);
    assert!(answer.json["error"].as_str().unwrap().contains("npm install -g @anthropic-ai/claude-code"));
    assert_eq!(server.query::<String>("SELECT run_id FROM runs WHERE NOT ok"), answer.header("x-run-id"));
}

#[tokio::test]
async fn a_sign_in_that_can_not_be_renewed_holds_up_nothing_and_leaves_nothing() {
    let no_program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in/no-program");
    // The last ends at once.
    for claude in ["no-such-claude", no_program, "/bin/false"] {
        let server = Options::stand_in().set("CLAWDFORGE_CLAUDE_BIN", claude).start();
        let token = server.mint("app").await;
        std::fs::create_dir(server.folder().join(".claude")).unwrap();
        let oauth = json!({"accessToken": "a", "refreshToken": "r", "expiresAt": 1000});
        std::fs::write(server.folder().join(".claude/.credentials.json"), json!({"claudeAiOauth": oauth}).to_string()).unwrap();
        let answered = tokio::time::timeout(Duration::from_secs(10), server.run(&token, "hello")).await;
        assert_eq!(answered.unwrap().json["ok"], false, "{claude}");
        assert!(server.log().contains("renew"), "{claude}: {}", server.log());
        until("an empty room", || server.count("sign-in") == 0).await;
    }
}

#[tokio::test]
async fn a_program_that_is_none_is_a_502() {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand-in/no-program");
    let start = |sandbox: &str| Options::default().set("CLAWDFORGE_CLAUDE_BIN", program).set("CLAWDFORGE_SANDBOX", sandbox).start();
    let server = start("off");
    let token = server.mint("app").await;
    assert!(failure(&server.run(&token, "hello").await, "error").contains("could not be started"));
    // In the sandbox it is the process itself that finds out.
    let server = start("auto");
    let token = server.mint("app").await;
    let error = failure(&server.run(&token, "hello").await, "error");
    assert!(error.contains("no-program can't be started") || error.contains("no-program could not be started"), "{error}");
}

#[tokio::test]
async fn runs_wait_in_order_and_past_the_queue_comes_503() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_MAX_QUEUED_RUNS", 2).start();
    let token = server.mint("app").await;
    let begun = |server: &Server| server.query::<i64>("SELECT count(*) FROM runs");
    let order = async |n: u64| {
        tokio::time::sleep(Duration::from_millis(300 * n)).await;
        let answer = server.run(&token, &format!("do: wait {n}")).await;
        (n, answer)
    };
    let refused = async {
        until("the first run", || begun(&server) == 1).await;
        tokio::time::sleep(Duration::from_millis(900)).await;
        server.run(&token, "one too many").await
    };
    let (first, second, third, refused) = tokio::join!(order(0), order(1), order(2), refused);
    assert!(refused.problem(503).contains("queue is full"));
    assert_eq!(refused.header("retry-after"), "5");
    for (_, answer) in [first, second, third] {
        assert_eq!(answer.json["result"], "waited");
        // The time in the queue is not the run's.
        assert!(answer.json["duration_ms"].as_i64().unwrap() < 3500, "{answer:?}");
    }
    let prompts: String = server.query("SELECT group_concat(prompt) FROM (SELECT prompt FROM runs ORDER BY rowid)");
    assert_eq!(prompts, "do: wait 0,do: wait 1,do: wait 2");
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_leaves_no_run() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_MAX_QUEUED_RUNS", 1).start();
    let token = server.mint("app").await;
    let (first, ()) = tokio::join!(server.run(&token, "do: wait"), async {
        until("the first run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
        assert!(tokio::time::timeout(Duration::from_millis(200), server.run(&token, "leaves")).await.is_err());
    });
    assert_eq!(first.status, StatusCode::OK);
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE prompt = 'leaves'"), 0);
}

#[tokio::test]
async fn a_locked_ledger_is_a_503_that_says_so_and_starts_nothing() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute_batch("BEGIN IMMEDIATE").unwrap();
    let answer = server.run(&token, "hello").await;
    assert!(answer.problem(503).contains("locked"), "{answer:?}");
    ledger.execute_batch("ROLLBACK").unwrap();
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 1);
}

#[tokio::test]
async fn an_answer_is_given_and_its_row_completed_later_where_the_ledger_is_locked_at_the_end() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    let (answer, ()) = tokio::join!(server.run(&token, "do: wait"), async {
        until("the run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
        ledger.execute_batch("BEGIN IMMEDIATE").unwrap();
    });
    assert_eq!(answer.json["result"], "waited");
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE finished_at IS NULL"), 1);
    ledger.execute_batch("ROLLBACK").unwrap();
    until("the row", || server.query::<i64>("SELECT count(*) FROM runs WHERE result = 'waited'") == 1).await;
}

#[tokio::test]
async fn processes_that_fork_and_exit_all_the_time_end_with_their_run() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let beat = server.folder().join("beat");
    for prompt in ["do: chain", "do: chain, wiped"].repeat(3) {
        assert_eq!(server.run(&token, prompt).await.json["result"], "chained");
        until("the run's folder to go", || server.count("runs") == 0).await;
        let begun = std::fs::metadata(&beat).unwrap().modified().unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(std::fs::metadata(&beat).unwrap().modified().unwrap(), begun, "the chain goes on\n{}", server.log());
    }
}

#[tokio::test]
async fn a_server_out_of_descriptors_ends_what_a_run_left_as_soon_as_it_can() {
    let server = Options::stand_in().set("CLAWDFORGE_SWEEP_SECS", 1).start();
    let token = server.mint("app").await;
    let limit = |current| {
        for pid in server.starters() {
            prlimit(Pid::from_raw(pid.cast_signed()), Resource::Nofile, Rlimit { current: Some(current), maximum: Some(4096) }).unwrap();
        }
    };
    limit(4096);
    let body = json!({"prompt": "do: fork and hang", "timeout_secs": 5});
    let (answer, ()) = tokio::join!(server.post("/run", &token, &body), async {
        until("the run", || server.agents().len() >= 3).await;
        limit(3);
    });
    failure(&answer, "timeout");
    until("what is said of it", || server.log().contains("trying again until they are gone")).await;
    limit(4096);
    until("the end of all", || server.descendants().is_empty()).await;
    until("what is said of it", || server.log().contains("what was left of an agent is gone")).await;
    until("the sweep of its folder", || server.count("runs") == 0).await;
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_missing_folder_is_the_servers_fault_and_an_expired_file_the_callers() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let file = server.upload(&token, "a.txt", "text").await;
    std::fs::remove_file(server.data().join("files").join(&file)).unwrap();
    let answer = server.post("/run", &token, &json!({"prompt": "hello", "files": [file]})).await;
    assert!(answer.problem(400).contains("Upload the files again"));
    let rooms: Vec<_> = server.data_folders().iter().map(|data| data.join("runs")).collect();
    for rooms in &rooms {
        std::fs::remove_dir(rooms).unwrap();
    }
    server.run(&token, "hello").await.problem(500);
    for rooms in &rooms {
        std::fs::create_dir(rooms).unwrap();
    }
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
}
