//! Agents that are started ahead of need, with a stand-in that misbehaves.

use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::harness::{Options, Server, settled, until};
use crate::run::failure;

fn with_standbys(most: u32) -> Server {
    Options::stand_in().set("CLAWDFORGE_STANDBY", most).start()
}

async fn standbys(server: &Server, count: usize) -> Vec<u32> {
    settled(&format!("{count} standbys"), count, || server.agents()).await
}

/// A run that is to go well. Gives its result.
async fn run(server: &Server, token: &str, prompt: &str) -> String {
    let answer = server.run(token, prompt).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", server.log());
    answer.json["result"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_standby_serves_one_run_and_has_a_successor() {
    let server = with_standbys(1);
    let token = server.mint("app").await;
    run(&server, &token, "hello").await;
    let first = standbys(&server, 1).await;
    let running = async { until("its run", || server.query::<i64>("SELECT count(*) FROM runs") == 2).await };
    let (_, ()) = tokio::join!(run(&server, &token, "do: wait"), async {
        running.await;
        assert!(server.agents().contains(&first[0]), "the standby is what runs");
    });
    until("a successor", || server.agents().len() == 1 && server.agents() != first).await;
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 2, "a start ahead of need has no row");
    assert_eq!(server.get("/healthz", "").await.json["ok"], true);
    // Another model, another system prompt: another key, which takes the place.
    let second = server.agents();
    let body = json!({"prompt": "hello", "system": "Be brief."});
    assert_eq!(server.post("/run", &token, &body).await.status, StatusCode::OK);
    until("a standby of the newer key", || server.agents().len() == 1 && server.agents() != second).await;
}

#[tokio::test]
async fn two_apps_with_the_same_key_share_no_folder_and_no_process() {
    let server = with_standbys(2);
    let (a, b) = (server.mint("a").await, server.mint("b").await);
    let file = server.upload(&a, "secret.txt", "of a alone").await;
    run(&server, &a, "hello").await;
    standbys(&server, 1).await;
    let of_a = server.post("/run", &a, &json!({"prompt": "do: where", "files": [file]})).await.json["result"].clone();
    assert!(of_a.as_str().unwrap().ends_with(" secret.txt "), "{of_a}");
    standbys(&server, 1).await;
    let mut folders = vec![of_a.as_str().unwrap().split(' ').next().unwrap().to_owned()];
    for token in [&b, &a, &b] {
        let where_ = run(&server, token, "do: where").await;
        assert!(!where_.contains("secret.txt"), "{where_}");
        let folder = where_.split(' ').next().unwrap().to_owned();
        until("its folder to be gone", || !Path::new(&folder).exists()).await;
        folders.push(folder);
        standbys(&server, 1).await;
    }
    folders.sort();
    folders.dedup();
    assert_eq!(folders.len(), 4);
}

/// Makes a run whose successor is started while the stand-in misbehaves in this way.
async fn with_a_bad_successor(server: &Server, token: &str, how: &str) {
    let misbehave = server.folder().join("misbehave");
    let before = server.agents();
    let (_, ()) = tokio::join!(run(server, token, "do: wait"), async {
        until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE finished_at IS NULL") == 1).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        std::fs::write(&misbehave, how).unwrap();
    });
    let started = || server.agents().iter().any(|pid| !before.contains(pid));
    until("the successor", || how == "die" || started()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    std::fs::remove_file(misbehave).unwrap();
}

#[tokio::test]
async fn a_standby_that_is_no_good_is_not_noticed() {
    let server = with_standbys(1);
    let token = server.mint("app").await;
    let mut seen = 0;
    for (how, within) in [("die", 2), ("flood", 2), ("mute", 2), ("hang", 7), ("late", 7)] {
        with_a_bad_successor(&server, &token, how).await;
        let begun = Instant::now();
        assert_eq!(run(&server, &token, "hello").await, "ok", "{how}");
        assert!(begun.elapsed() < Duration::from_secs(within), "{how}: {:?}", begun.elapsed());
        until("a good standby", || server.agents().len() == 1).await;
        let log = server.log();
        let told = if matches!(how, "die" | "flood") { "a standby was thrown away" } else { "a standby was of no use" };
        let count = log.matches("a standby was ").count();
        assert!(log.contains(told) && count > seen, "{how} was not met\n{log}");
        seen = count;
    }
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE ok"), 10);
}

#[tokio::test]
async fn a_runs_time_begins_once_also_where_its_standby_was_no_good() {
    let server = with_standbys(1);
    let token = server.mint("app").await;
    with_a_bad_successor(&server, &token, "hang").await;
    let begun = Instant::now();
    let answer = server.post("/run", &token, &json!({"prompt": "do: hang", "timeout_secs": 5})).await;
    let elapsed = begun.elapsed();
    assert_eq!(answer.json["stop_reason"], "timeout", "{answer:?}");
    assert!(server.log().contains("a standby was of no use"));
    // What the standby took is told too, and is no time beyond what was asked for.
    let told = Duration::from_millis(answer.json["duration_ms"].as_u64().unwrap());
    assert!(elapsed < told + Duration::from_millis(900), "it took {elapsed:?}, of which {told:?} are told");
}

#[tokio::test]
async fn a_standby_that_was_killed_or_is_out_of_date_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("claude");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/claude"), &program).unwrap();
    let server = Options::default().set("CLAWDFORGE_CLAUDE_BIN", program.display()).set("CLAWDFORGE_STANDBY", 1).start();
    let token = server.mint("app").await;
    run(&server, &token, "hello").await;
    let killed = standbys(&server, 1).await;
    kill_process(Pid::from_raw(killed[0].cast_signed()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(run(&server, &token, "hello").await, "ok");

    standbys(&server, 1).await;
    let newer = std::fs::read_to_string(&program).unwrap().replace("result ok", "result newer");
    std::fs::write(folder.path().join("newer"), newer).unwrap();
    std::fs::set_permissions(folder.path().join("newer"), program.metadata().unwrap().permissions()).unwrap();
    std::fs::rename(folder.path().join("newer"), &program).unwrap();
    assert_eq!(run(&server, &token, "hello").await, "newer");

    let signed_in_before = standbys(&server, 1).await;
    std::fs::create_dir(server.folder().join(".claude")).unwrap();
    std::fs::write(server.folder().join(".claude/.credentials.json"), "{}").unwrap();
    let (_, ()) = tokio::join!(run(&server, &token, "do: wait"), async {
        until("a run without it", || !server.agents().is_empty() && !server.agents().contains(&signed_in_before[0])).await;
        assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE finished_at IS NULL"), 1);
    });
}

#[tokio::test]
async fn a_standby_that_hangs_does_not_cost_a_short_run_its_time() {
    let server = with_standbys(1);
    let token = server.mint("app").await;
    with_a_bad_successor(&server, &token, "hang").await;
    let answer = server.post("/run", &token, &json!({"prompt": "hello", "timeout_secs": 5})).await;
    assert_eq!((answer.status, &answer.json["result"]), (StatusCode::OK, &json!("ok")), "{answer:?}");
}

#[tokio::test]
async fn a_run_that_can_not_be_prepared_ends_its_standby() {
    let server = with_standbys(1);
    let token = server.mint("app").await;
    let file = server.upload(&token, "a.txt", "a").await;
    run(&server, &token, "hello").await;
    let standby = standbys(&server, 1).await;
    // Gone behind the ledger's back.
    for upload in server.data().join("files").read_dir().unwrap() {
        std::fs::remove_file(upload.unwrap().path()).unwrap();
    }
    let answer = server.post("/run", &token, &json!({"prompt": "hello", "files": [file]})).await;
    assert_ne!(answer.status, StatusCode::OK);
    until("its end", || !server.agents().contains(&standby[0])).await;
    until("no folder but a standby's", || server.data().join("runs").read_dir().unwrap().count() <= server.agents().len()).await;
}

#[tokio::test]
async fn a_burst_goes_well_and_leaves_as_many_as_are_allowed() {
    let server = with_standbys(2);
    let token = server.mint("app").await;
    run(&server, &token, "hello").await;
    standbys(&server, 1).await;
    let runs = (0..16).map(|_| run(&server, &token, "do: where"));
    let mut folders = futures_util::future::join_all(runs).await;
    folders.sort();
    folders.dedup();
    assert_eq!(folders.len(), 16, "each has a folder of its own");
    standbys(&server, 2).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(server.agents().len(), 2, "and no more");
}

#[tokio::test]
async fn none_are_started_where_none_are_wanted_or_somebody_waits() {
    let server = with_standbys(0);
    let token = server.mint("app").await;
    run(&server, &token, "hello").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(server.agents(), [0; 0]);

    let server = Options::stand_in().set("CLAWDFORGE_STANDBY", 2).set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let runs = (0..3).map(|_| run(&server, &token, "do: wait"));
    let most = async {
        let mut most = 0;
        until("the runs", || {
            most = most.max(server.agents().len());
            server.query::<i64>("SELECT count(*) FROM runs WHERE finished_at") == 2
        })
        .await;
        most
    };
    // The stand-in's own sleep is the second.
    assert!(tokio::join!(futures_util::future::join_all(runs), most).1 <= 2);
}

#[tokio::test]
async fn a_crash_with_standbys_leaves_nothing_behind() {
    let server = with_standbys(2);
    let token = server.mint("app").await;
    run(&server, &token, "hello").await;
    let before = standbys(&server, 1).await;
    let server = server.crash_and_restart();
    assert!(!server.agents().contains(&before[0]));
    assert_eq!(server.data().join("runs").read_dir().unwrap().count(), 0);
}

#[tokio::test]
async fn a_pipe_where_claude_keeps_its_state_fails_runs_at_once_and_holds_nobody_up() {
    let server = Options::stand_in().set("CLAWDFORGE_STANDBY", 1).start();
    let token = server.mint("app").await;
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    settled("the standby", 1, || server.agents()).await;
    let state = server.folder().join(".claude.json");
    rustix::fs::mknodat(rustix::fs::CWD, &state, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    // The one that waits has read its state already.
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    for _ in 0..3 {
        let error = failure(&server.run(&token, "hello").await, "error");
        assert!(error.contains(".claude.json") && error.contains("no regular file"), "{error}");
        assert_eq!(server.get("/healthz", "").await.status, StatusCode::OK);
    }
    std::fs::remove_file(state).unwrap();
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
}
