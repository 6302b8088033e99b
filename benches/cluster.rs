//! What other machines cost and bring: `cargo bench --bench cluster`, four minutes. Needs a `nats-server`.
//!
//! A hop: warm runs by a server alone and by one whose runs another machine makes, in turn with the bare CLI; everything is real but the model.
//! Throughput and memory: the server is real, and machines in this process answer at once, or after two seconds, without an agent. All of it,
//! NATS and the clients too, shares this machine's processors.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use clawdforge::agent::contract::{Ending, Outcome};
use clawdforge::agent::environment::Environment;
use clawdforge::cluster::wire::{self, ANY, AT, Beat, Line, Name, Query, WORK, Work, bytes};
use clawdforge::demo::{self, install, install::Clis, stub::Stub};
use clawdforge::ledger::Machine;
use futures_util::StreamExt;
use server::{Server, median, ms, row, start_real, time};
use tokio::sync::Semaphore;

const ROUNDS: usize = 25;
/// In which a standby is started.
const PAUSE: Duration = Duration::from_millis(1500);
/// How long throughput is measured.
const SPELL: Duration = Duration::from_secs(8);

struct Nats {
    process: Child,
    url: String,
    _store: tempfile::TempDir,
}

impl Nats {
    fn start() -> Self {
        let store = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let mut command = Command::new("nats-server");
        command.args(["-js", "-a", "127.0.0.1", "-p", &port, "-sd"]).arg(store.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("nats-server is installed");
        while std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { process, url: format!("nats://127.0.0.1:{port}"), _store: store }
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    hop(&runtime);
    println!("\n{:<44} {:>12} {:>12} {:>12} {:>12}", "runs a second", "1 machine", "2", "4", "8");
    for (name, takes, places) in
        [("that are answered at once, 64 places each", Duration::ZERO, 64), ("of two seconds, 8 places each", Duration::from_secs(2), 8)]
    {
        let rates: Vec<_> = [1, 2, 4, 8].map(|machines| runtime.block_on(throughput(machines, places, takes))).into();
        println!("{name:<44} {}", rates.iter().map(|rate| format!("{rate:>12.1} ")).collect::<String>());
        let shares = rates.iter().zip([1, 2, 4, 8]).map(|(rate, machines)| rate / rates[0] / f64::from(machines));
        println!("{:<44} {}", "  of so many times one machine's", shares.map(|share| format!("{share:>12.2} ")).collect::<String>());
    }
    println!();
    runtime.block_on(memory());
}

/// What a warm run takes, alone and by way of another machine.
fn hop(runtime: &tokio::runtime::Runtime) {
    let clis = install::clis(&install::default_cache(), &|step| println!("{step}")).unwrap();
    let stub = runtime.block_on(Stub::start()).unwrap();
    let (home, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let environment = demo::environment(&clis, &stub.url(), home.path());
    let nats = Nats::start();
    let alone = start_real(&environment, &clis, &[("CLAWDFORGE_STANDBY", "1")]);
    let gateway =
        start_real(&environment, &clis, &[("CLAWDFORGE_NATS_URL", &nats.url), ("CLAWDFORGE_MAX_RUNS", "0"), ("CLAWDFORGE_STANDBY", "0")]);
    let mut worker = Command::new(env!("CARGO_BIN_EXE_clawdforge"));
    worker
        .args(["worker", "--worker-name", "attic", "--standby", "1", "--nats-url", &nats.url, "--data-dir"])
        .arg(folder.path().join("worker"));
    worker.env_clear().envs(environment.iter()).env("CLAWDFORGE_CLAUDE_BIN", &clis.claude).stderr(Stdio::null());
    let mut worker = worker.spawn().unwrap();
    let tokens = [alone.mint(), gateway.mint()];
    let run = |server: &Server, token: &str| {
        std::thread::sleep(PAUSE);
        time(|| assert!(server.ask("POST", "/run", token, r#"{"prompt": "Hello."}"#).contains("\"ok\":true")))
    };
    // The first has others started ahead.
    run(&alone, &tokens[0]);
    run(&gateway, &tokens[1]);
    let (mut bare, mut here, mut there) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(run_bare(&environment, &clis, folder.path()));
        here.push(run(&alone, &tokens[0]));
        there.push(run(&gateway, &tokens[1]));
    }
    let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&worker), rustix::process::Signal::TERM);
    worker.wait().unwrap();
    let [bare, here, there] = [bare, here, there].map(|times| ms(median(times)));
    row("a warm run, of bare claude -p's time", &format!("{:.3}", here / bare), "");
    row("the same by another machine", &format!("{:.3}", there / bare), "");
    row("what the hop adds", &format!("{:.1} ms", there - here), "5 ms");
}

fn run_bare(environment: &Environment, clis: &Clis, folder: &std::path::Path) -> Duration {
    time(|| {
        let mut command = Command::new(&clis.claude);
        command.args(["-p", "--output-format", "json"]).current_dir(folder).env_clear().envs(environment.iter());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"Hello.").unwrap();
        assert!(child.wait().unwrap().success());
    })
}

/// A server without places of its own, and machines that answer without an agent.
struct House {
    server: Server,
    token: String,
    client: reqwest::Client,
    over: Arc<AtomicBool>,
    _nats: Nats,
}

async fn house(machines: usize, places: usize, takes: Duration) -> House {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let nats = Nats::start();
    let settings = [
        ("CLAWDFORGE_NATS_URL", nats.url.as_str()),
        ("CLAWDFORGE_MAX_RUNS", "0"),
        ("CLAWDFORGE_MAX_QUEUED_RUNS", "10000"),
        ("CLAWDFORGE_STANDBY", "0"),
        ("CLAWDFORGE_SANDBOX", "off"),
        ("PATH", "/usr/bin:/bin"),
    ];
    let server = tokio::task::block_in_place(|| Server::start(&settings));
    let token = tokio::task::block_in_place(|| server.mint());
    let over = Arc::<AtomicBool>::default();
    for number in 0..machines {
        tokio::spawn(machine(nats.url.clone(), format!("machine-{number}"), places, takes, over.clone()));
    }
    let house = House { server, token, client: reqwest::Client::new(), over, _nats: nats };
    // All of them have shown by then.
    tokio::time::sleep(Duration::from_secs(3)).await;
    house
}

impl House {
    async fn run(&self) {
        let request = self.client.post(format!("http://{}/run", self.server.address)).bearer_auth(&self.token);
        let answer = request.header("content-type", "application/json").body(r#"{"prompt": "Hello."}"#).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    }
}

/// A machine that answers after a while.
async fn machine(url: String, worker: String, places: usize, takes: Duration, over: Arc<AtomicBool>) {
    let client = async_nats::connect(url).await.unwrap();
    let jetstream = async_nats::jetstream::new(client.clone());
    let machine = Machine { worker: worker.clone(), instance: "1".to_owned() };
    let going_on = Arc::<std::sync::Mutex<Vec<Name>>>::default();
    let beating = {
        let (client, machine, going_on) = (client.clone(), machine.clone(), going_on.clone());
        async move {
            loop {
                let jobs = going_on.lock().unwrap().clone();
                let beat =
                    Beat { machine: machine.clone(), version: "0".to_owned(), places, jobs, now_ms: 0, started_at: 0, stopping: false };
                client.publish(wire::beat(&machine.worker), bytes(&beat)).await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    };
    let beating = tokio::spawn(beating);
    let consumer: async_nats::jetstream::consumer::PullConsumer = loop {
        match jetstream.get_consumer_from_stream(ANY, WORK).await {
            Ok(consumer) => break consumer,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let (slots, tries) = (Arc::new(Semaphore::new(places)), AtomicUsize::new(0));
    while !over.load(Ordering::Relaxed) {
        let slot = slots.clone().acquire_owned().await.unwrap();
        let mut batch = consumer.batch().max_messages(1).expires(Duration::from_millis(500)).messages().await.unwrap();
        let Some(Ok(message)) = batch.next().await else { continue };
        let (client, jetstream, going_on) = (client.clone(), jetstream.clone(), going_on.clone());
        let machine = machine.tries(tries.fetch_add(1, Ordering::Relaxed) as u64);
        tokio::spawn(async move {
            let work: Work = serde_json::from_slice(&message.payload).unwrap();
            going_on.lock().unwrap().push(work.name.clone());
            let question = bytes(&Query::Claim { job: work.name.job.clone(), machine: machine.clone() });
            let answer = client.request(wire::ask(&work.name.gateway, &machine.worker), question).await;
            message.ack().await.unwrap();
            if answer.is_ok_and(|answer| answer.payload == "true") {
                tokio::time::sleep(takes).await;
                let outcome = Outcome { text: "ok".to_owned(), ..Outcome::of(Ending::Completed("end_turn".to_owned())) };
                let mut lines = serde_json::to_vec(&Line::Outcome(Box::new(outcome))).unwrap();
                lines.push(b'\n');
                lines.extend(serde_json::to_vec(&Line::Gone).unwrap());
                lines.push(b'\n');
                let mut headers = HeaderMap::new();
                headers.insert(AT, "0");
                let subject = wire::events(&work.name.gateway, &machine.worker, &work.name.job);
                jetstream.publish_with_headers(subject, headers, lines.into()).await.unwrap().await.unwrap();
            }
            going_on.lock().unwrap().retain(|name| *name != work.name);
            drop(slot);
        });
    }
    beating.abort();
}

/// Runs a second by so many machines, asked for by as many clients as there are places.
async fn throughput(machines: usize, places: usize, takes: Duration) -> f64 {
    let house = Arc::new(house(machines, places, takes).await);
    let (made, begun) = (Arc::<AtomicUsize>::default(), Instant::now());
    let clients = (machines * places).min(128);
    let asking = (0..clients).map(|_| {
        let (house, made) = (house.clone(), made.clone());
        tokio::spawn(async move {
            while begun.elapsed() < SPELL {
                house.run().await;
                // What ends later is not counted.
                made.fetch_add(usize::from(begun.elapsed() < SPELL), Ordering::Relaxed);
            }
        })
    });
    futures_util::future::join_all(asking.collect::<Vec<_>>()).await;
    house.over.store(true, Ordering::Relaxed);
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let made = made.load(Ordering::Relaxed) as f64;
    made / SPELL.as_secs_f64()
}

/// What the server has in memory with a thousand runs in flight, each with a client that waits.
async fn memory() {
    let house = Arc::new(house(2, 500, Duration::from_secs(12)).await);
    let before = house.server.resident_mib();
    let waiting: Vec<_> = (0..1000)
        .map(|_| {
            let house = house.clone();
            tokio::spawn(async move { house.run().await })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let during = house.server.resident_mib();
    row("the server's memory, idle", &format!("{before:.1} MiB"), "");
    row("with 1,000 runs in flight", &format!("{during:.1} MiB"), "");
    row("for each", &format!("{:.0} KiB", (during - before) * 1024.0 / 1000.0), "");
    futures_util::future::join_all(waiting).await;
    house.over.store(true, Ordering::Relaxed);
}
