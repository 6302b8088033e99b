//! Each part of it is killed, again and again, while runs go on: nothing is lost, nothing is made twice, and no process is left.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::harness::{Options, Server, until};
use crate::{Proxy, background, ended, is_left_out};
use tokio::time::sleep;

/// How often the machines and the server are killed.
const KILLED: usize = 20;

/// Numbers that look like chance, and are the same in each run of the test.
struct Chance(u64);

impl Chance {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// How often each prompt reached an agent.
fn made(server: &Server) -> HashMap<String, usize> {
    let mut made = HashMap::new();
    for line in std::fs::read_to_string(server.folder().join("made")).unwrap_or_default().lines() {
        let number = line.split("number ").nth(1).and_then(|rest| rest.split('.').next()).unwrap().to_owned();
        *made.entry(number).or_insert(0) += 1;
    }
    made
}

/// Asks for so many runs.
async fn ask(server: &Server, token: &str, numbers: std::ops::Range<usize>) -> Vec<(usize, String)> {
    let mut ids = Vec::new();
    for number in numbers {
        ids.push((number, background(server, token, &format!("do: note number {number}."), &format!("key {number}")).await));
    }
    ids
}

/// Waits for the ends of all, each of which has one. Gives how many were cut short; none was made twice, and what succeeded was made.
async fn check(server: &Server, token: &str, ids: &[(usize, String)]) -> usize {
    let mut interrupted = 0;
    for (number, id) in ids {
        let state = ended(server, token, id).await;
        let times = made(server).get(&number.to_string()).copied().unwrap_or(0);
        match state["status"].as_str().unwrap() {
            "succeeded" => assert_eq!(times, 1, "{state}"),
            "interrupted" => {
                assert!(times <= 1, "made {times} times: {state}");
                interrupted += 1;
            }
            _ => panic!("{state}\n{}", server.log()),
        }
        let told = server.get(&format!("/runs/{id}/events"), token).await.text;
        assert_eq!(told.matches("event: result").count() + told.matches("event: error").count(), 1, "{told}");
    }
    until("the end of all processes", || server.agents().is_empty()).await;
    interrupted
}

fn options() -> Options {
    Options::stand_in().set("CLAWDFORGE_MAX_RUNS", 6).set("CLAWDFORGE_MAX_QUEUED_RUNS", 1000)
}

#[tokio::test]
async fn machines_are_killed() {
    if is_left_out() {
        return;
    }
    let mut server = options().workers(3).start();
    let token = server.mint("app").await;
    let (mut chance, mut ids) = (Chance(7), Vec::new());
    for round in 0..KILLED {
        ids.extend(ask(&server, &token, round * 8..(round + 1) * 8).await);
        sleep(Duration::from_millis(chance.below(300))).await;
        let name = format!("machine-{}", chance.below(3));
        server.workers().kill(&name);
        sleep(Duration::from_millis(chance.below(200))).await;
        server.start_workers();
    }
    let interrupted = check(&server, &token, &ids).await;
    // Two places each: more can't have been cut short.
    assert!(interrupted <= 2 * KILLED, "{interrupted}");
}

#[tokio::test]
async fn the_server_is_killed() {
    if is_left_out() {
        return;
    }
    let mut server = options().workers(2).start();
    let token = server.mint("app").await;
    let (mut chance, mut ids) = (Chance(11), Vec::new());
    for round in 0..KILLED {
        ids.extend(ask(&server, &token, round * 6..(round + 1) * 6).await);
        sleep(Duration::from_millis(chance.below(300))).await;
        server.kill();
        sleep(Duration::from_millis(chance.below(300))).await;
        server = server.restart();
        // Whoever did not hear the answer asks again, and gets the same run.
        let (number, id) = ids.last().unwrap();
        let again = background(&server, &token, &format!("do: note number {number}."), &format!("key {number}")).await;
        assert_eq!(again, *id);
    }
    assert_eq!(check(&server, &token, &ids).await, 0, "what goes on elsewhere goes on\n{}", server.log());
}

#[tokio::test]
async fn nats_is_killed_and_comes_back() {
    if is_left_out() {
        return;
    }
    let mut server = options().workers(2).start();
    let token = server.mint("app").await;
    let (mut chance, mut ids) = (Chance(13), Vec::new());
    for round in 0..10 {
        ids.extend(ask(&server, &token, round * 6..(round + 1) * 6).await);
        sleep(Duration::from_millis(chance.below(300))).await;
        server.workers().kill_nats();
        until("what is said of it", || server.log().matches("NATS can't be reached").count() >= 3 * (round + 1)).await;
        let health = server.get("/healthz", "").await.json;
        assert!(health["ok"] == true && health["cluster"]["connected"] == false, "{health}");
        // What is accepted meanwhile is not lost either.
        ids.extend(ask(&server, &token, 1000 + round..1001 + round).await);
        sleep(Duration::from_millis(chance.below(500))).await;
        server.workers().start_nats();
        until("the connections", || server.log().matches("connected to NATS").count() >= 3 * (round + 2)).await;
    }
    assert_eq!(check(&server, &token, &ids).await, 0, "{}", server.log());
}

#[tokio::test]
async fn a_machine_that_is_cut_off_is_found_out_and_comes_back() {
    if is_left_out() {
        return;
    }
    let mut server = options().workers(2).start();
    let token = server.mint("app").await;
    let proxy = Proxy::to(&server.workers().url).await;
    server.workers().stop_one("machine-0");
    server.workers().reach("machine-0", proxy.url.clone());
    server.start_workers();
    until("the machine", || server.log().matches("a machine is there").count() == 3).await;
    let on = |worker: &str| server.query::<i64>(&format!("SELECT count(*) FROM runs WHERE worker = '{worker}' AND finished_at IS NULL"));
    let mut hangs = Vec::new();
    while on("machine-0") == 0 {
        hangs.push(background(&server, &token, "do: hang", &format!("{}", hangs.len())).await);
        sleep(Duration::from_millis(200)).await;
    }
    let cut_off = on("machine-0");
    proxy.cut();
    let begun = Instant::now();
    until("that they are lost", || on("machine-0") == 0).await;
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let why = server.query::<String>("SELECT error FROM runs WHERE worker = 'machine-0' AND stop_reason = 'interrupted'");
    assert_eq!(why, "the machine machine-0 was lost before the answer");
    // The other goes on.
    let note = background(&server, &token, "do: note number 1.", "note").await;
    assert_eq!(ended(&server, &token, &note).await["status"], "succeeded");
    sleep(Duration::from_secs(30).saturating_sub(begun.elapsed())).await;
    let there = || i64::try_from(server.folder().join("machine-0/runs").read_dir().unwrap().count()).unwrap();
    assert_eq!(there(), cut_off, "it goes on where nobody hears of it");
    proxy.mend();
    // Nobody wants what it still does.
    until("its end there", || there() == 0).await;
    until("the machine", || server.log().matches("a machine is there").count() == 4).await;
    for id in &hangs {
        server.request(reqwest::Method::DELETE, &format!("/runs/{id}"), &token).send().await.unwrap();
    }
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE stop_reason = 'interrupted'"), cut_off);
    until("the end of all processes", || server.agents().is_empty()).await;
}
