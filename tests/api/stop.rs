//! The ends of a server, and what comes after.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use rustix::process::Signal;
use serde_json::json;

use crate::harness::{ADMIN, Answer, Options, until};

#[tokio::test]
async fn a_stop_lets_running_work_finish_and_refuses_what_waits() {
    let mut server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = server.mint("app").await;
    let (running, waiting, ()) = tokio::join!(
        server.run(&token, "do: wait"),
        async {
            until("the run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
            server.run(&token, "waits").await
        },
        async {
            until("the run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            server.signal(Signal::TERM);
        }
    );
    assert_eq!(running.json["result"], "waited");
    assert!(waiting.problem(503).contains("stopping"));
    assert!(server.ended().success());
}

#[tokio::test]
async fn past_the_drain_time_running_work_is_ended_and_its_row_says_so() {
    let mut server = Options::stand_in().set("CLAWDFORGE_DRAIN_SECS", 1).start();
    let token = server.mint("app").await;
    let (answer, begun) = tokio::join!(server.run(&token, "do: fork and hang"), async {
        until("the run", || server.agents().len() >= 3).await;
        server.signal(Signal::INT);
        Instant::now()
    });
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert!(answer.json["error"].as_str().unwrap().contains("the server stopped"));
    assert!(server.ended().success());
    assert!(begun.elapsed() < Duration::from_secs(8));
    assert_eq!(server.query::<String>("SELECT stop_reason FROM runs"), "interrupted");
}

#[tokio::test]
async fn a_second_signal_does_not_wait() {
    let mut server = Options::stand_in().set("CLAWDFORGE_DRAIN_SECS", 60).start();
    let token = server.mint("app").await;
    let (answer, begun) = tokio::join!(server.run(&token, "do: hang"), async {
        until("the run", || !server.agents().is_empty()).await;
        server.signal(Signal::TERM);
        until("the stop to begin", || server.log().contains("stopping")).await;
        server.signal(Signal::TERM);
        Instant::now()
    });
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert!(server.ended().success());
    assert!(begun.elapsed() < Duration::from_secs(8));
}

#[tokio::test]
async fn after_a_crash_the_next_start_ends_processes_that_fork_and_exit_all_the_time() {
    let mut server = Options::stand_in().start();
    let token = server.mint("app").await;
    for _ in 0..3 {
        let beat = server.folder().join("beat");
        tokio::select! {
            answer = server.run(&token, "do: chain and hang") => panic!("{answer:?}"),
            () = until("the chain", || beat.exists()) => {}
        }
        server = server.crash_and_restart();
        let written = || std::fs::metadata(&beat).unwrap().modified().unwrap();
        let begun = written();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(written(), begun, "the chain goes on\n{}", server.log());
        std::fs::remove_file(&beat).unwrap();
    }
}

#[tokio::test]
async fn after_a_crash_the_next_start_ends_what_is_left_and_settles_its_rows() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let left = tokio::time::timeout(Duration::from_secs(30), async {
        tokio::select! {
            answer = server.run(&token, "do: fork and hang") => panic!("{answer:?}"),
            () = until("the run", || server.agents().len() >= 3) => server.agents(),
        }
    });
    assert!(left.await.unwrap().len() >= 3);
    let server = server.crash_and_restart();
    assert_eq!(server.agents(), [0; 0]);
    assert_eq!(server.query::<String>("SELECT stop_reason FROM runs WHERE finished_at IS NOT NULL AND NOT ok"), "interrupted");
    assert_eq!(server.data().join("runs").read_dir().unwrap().count(), 0);
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_log_that_nobody_reads_any_more_stops_nothing_and_a_hangup_does() {
    let mut server = Options::stand_in().set("CLAWDFORGE_DRAIN_SECS", 1).start();
    let token = server.mint("app").await;
    server.leave_log();
    let (answer, ()) = tokio::join!(server.run(&token, "do: fork and hang"), async {
        until("the run", || server.agents().len() >= 3).await;
        // Each says a line.
        for _ in 0..3 {
            assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
        }
        let dropped = async || {
            let text = server.get("/metrics", ADMIN).await.text;
            text.lines().find_map(|line| line.strip_prefix("clawdforge_log_lines_dropped_total ")?.parse::<u64>().ok()).unwrap()
        };
        let begun = Instant::now();
        while dropped().await == 0 {
            assert!(begun.elapsed() < Duration::from_secs(10));
        }
        server.signal(Signal::HUP);
    });
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    assert!(server.ended().success());
    assert_eq!(server.agents(), [0; 0]);
}

#[tokio::test]
async fn a_start_that_fails_in_the_middle_ends_what_it_has_started() {
    let options = Options::acpx_stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_DRAIN_SECS", 0);
    // Room for all that one app has in the background.
    let server = options.set("CLAWDFORGE_MAX_QUEUED_RUNS", 200).start();
    let (token, limited) =
        (server.mint("app").await, server.post("/admin/tokens", ADMIN, &json!({"name": "one", "max_concurrent": 1})).await);
    let limited = limited.json["token"].as_str().unwrap();
    let background = async |path: &str, token: &str, prompt: &str| {
        let request = server.request(Method::POST, path, token).header("prefer", "respond-async").json(&json!({"prompt": prompt}));
        assert_eq!(Answer::of(request).await.status, StatusCode::ACCEPTED);
    };
    let session = server.post("/sessions", limited, &json!({})).await.json["session_id"].as_str().unwrap().to_owned();
    background("/run", limited, "do: hang").await;
    until("the first run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
    background("/run", &token, "do: hang").await;
    // Enough that the run is going on by the time that the last fails.
    for _ in 0..60 {
        background(&format!("/sessions/{session}/turn"), limited, "hello").await;
    }
    let feed = server.data().join("feeds").join(format!("{session}-60"));
    server.signal(Signal::KILL);
    std::fs::remove_file(&feed).unwrap();
    std::fs::create_dir(&feed).unwrap();
    let mut server = server.restart();
    assert!(!server.ended().success());
    assert!(server.agents().is_empty(), "{}", server.log());
    std::fs::remove_dir(&feed).unwrap();
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE session_events SET finished_at = 1, ok = 0 WHERE finished_at IS NULL", []).unwrap();
    drop(server.restart());
}
