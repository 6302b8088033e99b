//! What one app can cost the others.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, Server, until};

async fn mint(server: &Server, name: &str, limits: Value) -> String {
    let mut body = limits;
    body["name"] = json!(name);
    let answer = Answer::of(server.request(Method::POST, "/admin/tokens", ADMIN).json(&body)).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.keys(), ["name", "token", "ip_cidrs", "created_at"]);
    answer.json["token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_day_has_a_budget_and_past_it_comes_429_until_midnight() {
    let server = Options::stand_in().start();
    let token = mint(&server, "thrifty", json!({"daily_usd": 0.5})).await;
    let free = server.mint("free").await;
    // A run costs 0.25.
    for _ in 0..2 {
        assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    }
    let answer = server.run(&token, "hello").await;
    assert!(answer.problem(429).contains("midnight UTC"));
    let seconds: i64 = answer.header("retry-after").parse().unwrap();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
    assert!(((now + seconds) % 86_400 < 5 || (now + seconds) % 86_400 > 86_395) && seconds > 0, "{seconds}");
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE app_name = 'thrifty'"), 2);
    assert_eq!(server.run(&free, "hello").await.status, StatusCode::OK);

    // What was spent yesterday does not count.
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE runs SET started_at = started_at - 86400 WHERE app_name = 'thrifty'", []).unwrap();
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_waits_while_the_budget_is_spent_is_refused() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).start();
    let token = mint(&server, "thrifty", json!({"daily_usd": 0.25})).await;
    let (first, second) = tokio::join!(server.run(&token, "do: wait"), async {
        until("the first run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
        server.run(&token, "hello").await
    });
    assert_eq!(first.status, StatusCode::OK);
    second.problem(429);
}

#[tokio::test]
async fn an_app_has_so_many_runs_at_once_and_the_others_do_not_wait_for_it() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 4).start();
    let limited = mint(&server, "limited", json!({"max_concurrent": 1})).await;
    let other = server.mint("other").await;
    let at_once = || server.query::<i64>("SELECT count(*) FROM runs WHERE app_name = 'limited' AND finished_at IS NULL");
    let watch = async {
        let mut most = 0;
        while server.query::<i64>("SELECT count(*) FROM runs WHERE app_name = 'limited' AND finished_at IS NOT NULL") < 2 {
            most = most.max(at_once());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        most
    };
    let others = async {
        until("the first run", || at_once() == 1).await;
        server.run(&other, "hello").await
    };
    let (first, second, other, most) = tokio::join!(server.run(&limited, "do: wait"), server.run(&limited, "do: wait"), others, watch);
    assert!([first, second, other].iter().all(|answer| answer.status == StatusCode::OK));
    assert_eq!(most, 1);
}

#[tokio::test]
async fn a_busy_apps_runs_do_not_keep_anothers_waiting() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 1).set("CLAWDFORGE_MAX_QUEUED_RUNS", 4).start();
    let (busy, single) = (server.mint("busy").await, server.mint("single").await);
    let many = futures_util::future::join_all((0..5).map(|_| server.run(&busy, "do: wait")));
    let (many, single) = tokio::join!(many, async {
        until("the first run", || server.query::<i64>("SELECT count(*) FROM runs") == 1).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.run(&single, "do: wait").await
    });
    assert_eq!(single.status, StatusCode::OK);
    // It found the queue full; the last of the busy app's made room.
    let refused: Vec<_> = many.iter().filter(|answer| answer.status != StatusCode::OK).collect();
    assert_eq!(refused.len(), 1);
    assert!(refused[0].problem(503).contains("queue is full"));
    let order: String = server.query("SELECT group_concat(app_name) FROM (SELECT app_name FROM runs ORDER BY rowid)");
    assert_eq!(order, "busy,single,busy,busy,busy");
}

#[tokio::test]
async fn a_run_that_takes_too_much_memory_is_ended_and_says_so() {
    let server = Options::stand_in().set("CLAWDFORGE_AGENT_MEMORY_MB", 100).start();
    let token = server.mint("app").await;
    let (eats, waits) = tokio::join!(server.run(&token, "do: eat"), server.run(&token, "do: wait"));
    assert_eq!((eats.status, &eats.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("error")), "{eats:?}");
    assert!(eats.json["error"].as_str().unwrap().contains("more than 100 MiB of memory"), "{eats:?}");
    assert_eq!(waits.status, StatusCode::OK);
}

#[tokio::test]
async fn a_run_that_fills_the_disk_is_ended_and_says_so() {
    let server = Options::stand_in().set("CLAWDFORGE_AGENT_DISK_MB", 20).set("CLAWDFORGE_STANDBY", 0).start();
    let token = server.mint("app").await;
    let (fills, waits) = tokio::join!(server.run(&token, "do: fill"), server.run(&token, "do: wait"));
    assert_eq!((fills.status, &fills.json["stop_reason"]), (StatusCode::BAD_GATEWAY, &json!("error")), "{fills:?}");
    let error = fills.json["error"].as_str().unwrap();
    assert!(error.contains("more than 20 MiB of the disk") && error.contains("CLAWDFORGE_AGENT_DISK_MB"), "{fills:?}");
    assert_eq!(waits.status, StatusCode::OK);
    until("its folder to go", || server.data().join("runs").read_dir().unwrap().count() == 0).await;
}

#[tokio::test]
async fn limits_are_checked_and_shown() {
    let server = Options::stand_in().start();
    mint(&server, "a", json!({"max_concurrent": 3, "daily_usd": 1.5})).await;
    mint(&server, "b", json!({"max_concurrent": null})).await;
    let list = server.get("/admin/tokens", ADMIN).await;
    let limits = |at: usize| (list.json["tokens"][at]["max_concurrent"].clone(), list.json["tokens"][at]["daily_usd"].clone());
    assert_eq!(limits(0), (json!(3), json!(1.5)));
    assert_eq!(limits(1), (json!(null), json!(null)));
    for (wrong, pointer) in [(json!({"max_concurrent": 0}), "/max_concurrent"), (json!({"daily_usd": -1}), "/daily_usd")] {
        let mut body = wrong;
        body["name"] = json!("c");
        let answer = Answer::of(server.request(Method::POST, "/admin/tokens", ADMIN).json(&body)).await;
        answer.problem(422);
        assert_eq!(answer.json["errors"][0]["pointer"], pointer);
    }
}

#[tokio::test]
async fn what_waits_for_its_own_apps_limit_leaves_the_queue_to_others() {
    let server =
        Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 3).set("CLAWDFORGE_MAX_QUEUED_RUNS", 2).set("CLAWDFORGE_DRAIN_SECS", 0).start();
    let free = server.mint("free").await;
    for name in ["one", "two"] {
        let token = mint(&server, name, json!({"max_concurrent": 1})).await;
        for _ in 0..2 {
            let run = server.request(Method::POST, "/run", &token).header("prefer", "respond-async").json(&json!({"prompt": "do: hang"}));
            assert_eq!(Answer::of(run).await.status, StatusCode::ACCEPTED);
        }
    }
    until("the limited apps' runs", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 2).await;
    let (first, second, third) = tokio::join!(server.run(&free, "do: wait"), server.run(&free, "do: wait"), server.run(&free, "do: wait"));
    for answer in [first, second, third] {
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    }
    // What waits starts after a restart: it is not to be left.
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE runs SET finished_at = 1, ok = 0 WHERE queued AND finished_at IS NULL", []).unwrap();
}
