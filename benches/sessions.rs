//! What sessions cost: `cargo bench --bench sessions`, a quarter of an hour.
//!
//! Everything is real but the model. By way of acpx and with agents that are spoken to directly, the time of a turn's answer is taken in turn
//! with the moment at which a bare `acpx prompt` prints its `stopReason` line, and at which the adapter does, spoken to by nothing but this
//! program, and compared at the medians.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use clawdforge::agent::environment::Environment;
use clawdforge::agent::programs;
use clawdforge::demo::{self, install, stub::Stub};
use server::{Server, acpx, bare_turn, create, median, ms, row, start_real, take_turn, time};

const DRIVERS: [&str; 2] = ["acpx", "direct"];
const FIRST: usize = 5;
const TURNS: usize = 10;
const OPEN: usize = 24;
const THROUGH: usize = 200;
/// acpx ends a second after its answer, and a prompt that comes before waits for that.
const PAUSE: Duration = Duration::from_secs(2);

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let clis = install::clis(&install::default_cache(), &|step| println!("{step}")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stub = runtime.block_on(Stub::start()).unwrap();
    let (home, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let environment = demo::environment(&clis, &stub.url(), home.path());
    println!("{:<44} {:>12} {:>12}", "", "measured", "aim");

    let start = |driver: &str, hard_ttl: &str, standby: &str| {
        let settings = [("CLAWDFORGE_ACP", driver), ("CLAWDFORGE_STANDBY", standby), ("CLAWDFORGE_SESSION_HARD_TTL_SECS", hard_ttl)];
        let server = start_real(&environment, &clis, &settings);
        let token = server.mint();
        (server, token)
    };
    let servers = DRIVERS.map(|driver| start(driver, "3600", "0"));
    let first = servers.each_ref().map(|(server, token)| {
        // The first of all reads the programs from disk.
        let times = (0..=FIRST).map(|_| {
            let (time, session) = timed(|| first_turn(server, token));
            close(server, token, &session);
            std::thread::sleep(PAUSE);
            time
        });
        median(times.skip(1).collect())
    });
    for (driver, first) in DRIVERS.into_iter().zip(first) {
        row(&format!("create and first turn, {driver}, median"), &format!("{:.0} ms", ms(first)), "");
    }
    row("  of acpx", &format!("{:.2}", first[1].as_secs_f64() / first[0].as_secs_f64()), "0.30");
    let (server, token) = start("direct", "3600", "1");
    let times = (0..=FIRST).map(|_| {
        let (time, session) = timed(|| first_turn(&server, &token));
        close(&server, &token, &session);
        std::thread::sleep(4 * PAUSE);
        time
    });
    let pooled = median(times.skip(1).collect());
    row("  the same, where one was started ahead", &format!("{:.0} ms", ms(pooled)), "");
    row("  of acpx", &format!("{:.2}", pooled.as_secs_f64() / first[0].as_secs_f64()), "0.10");
    drop(server);

    let sessions = servers.each_ref().map(|(server, token)| create(server, token));
    let acpx = |arguments: &[&str]| acpx(&environment, &clis, folder.path(), arguments);
    assert!(acpx(&["sessions", "new", "--name", "bare"]).output().unwrap().status.success());
    let mut adapter = Adapter::start(&environment, &clis, folder.path());
    let mut times: [Vec<Duration>; 4] = Default::default();
    for turn in 0..=TURNS {
        let mut took = vec![bare_turn(acpx(&["prompt", "-s", "bare", "--file", "-"])), time(|| adapter.turn())];
        took.extend(servers.iter().zip(&sessions).map(|((server, token), session)| time(|| take_turn(server, token, session))));
        // The first of each starts the agent.
        if turn > 0 {
            times.iter_mut().zip(took).for_each(|(times, took)| times.push(took));
        }
        std::thread::sleep(PAUSE);
    }
    let _ = acpx(&["sessions", "close", "bare"]).output();
    drop(adapter);
    let [bare, adapter, by_acpx, direct] = times.map(median);
    row("bare acpx prompt to its stopReason, median", &format!("{:.0} ms", ms(bare)), "");
    row("the adapter alone to its stopReason, median", &format!("{:.0} ms", ms(adapter)), "");
    for (what, through, aim) in [("by acpx", by_acpx, "1.15"), ("directly", direct, "")] {
        row(&format!("POST /sessions/{{id}}/turn, {what}, median"), &format!("{:.0} ms", ms(through)), "");
        row("  of bare", &format!("{:.2}", through.as_secs_f64() / bare.as_secs_f64()), aim);
    }

    row("  directly, more than the adapter alone", &format!("{:+.0} ms", ms(direct) - ms(adapter)), "20 ms");
    row("private memory of a direct session", &format!("{:.0} MiB", private_mib_of_a_child(servers[1].0.pid())), "180 MiB");

    let [(server, token), _] = &servers;
    let before = server.resident_mib();
    at_once(4, OPEN - 1, || drop(create(server, token)));
    row(&format!("resident, for {OPEN} more open sessions"), &format!("{:+.1} MiB", server.resident_mib() - before), "1 MiB");
    drop(servers);

    for driver in DRIVERS {
        let (server, token) = start(driver, "0", "0");
        at_once(4, 4, || through_its_life(&server, &token));
        std::thread::sleep(2 * PAUSE);
        let before = leftovers(&server, home.path());
        at_once(4, THROUGH, || through_its_life(&server, &token));
        std::thread::sleep(2 * PAUSE);
        let after = leftovers(&server, home.path());
        for ((what, before), (_, after)) in before.into_iter().zip(after) {
            row(&format!("{what} left by {THROUGH} sessions, {driver}"), &format!("{:+}", after - before), "0");
        }
    }
}

/// The adapter, spoken to by hand.
struct Adapter {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    id: usize,
    session: String,
}

impl Adapter {
    fn start(environment: &Environment, clis: &install::Clis, folder: &Path) -> Self {
        let mut command = Command::new(programs::adapter(clis.acpx.as_os_str(), environment));
        command.env_clear().envs(environment.iter()).env("CLAUDE_CODE_ENABLE_PROMPT_SUGGESTION", "false").current_dir(folder);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (input, lines) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()).lines());
        let mut adapter = Self { child, input, lines, id: 0, session: String::new() };
        adapter.ask("initialize", r#"{"protocolVersion":1,"clientCapabilities":{}}"#);
        let made = adapter.ask("session/new", &format!(r#"{{"cwd":"{}","mcpServers":[]}}"#, folder.display()));
        made.split("\"sessionId\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().clone_into(&mut adapter.session);
        adapter.turn();
        adapter
    }

    fn turn(&mut self) {
        let params = format!(r#"{{"sessionId":"{}","prompt":[{{"type":"text","text":"Hello."}}]}}"#, self.session);
        assert!(self.ask("session/prompt", &params).contains("\"stopReason\""));
    }

    fn ask(&mut self, method: &str, params: &str) -> String {
        self.id += 1;
        let id = self.id;
        writeln!(self.input.as_mut().unwrap(), r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}"#).unwrap();
        let answers = format!("\"id\":{id},");
        self.lines.find_map(|line| line.ok().filter(|line| line.contains(&answers) && line.contains("\"result\""))).unwrap()
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // At the end of its input it ends by itself, with its claude.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// What each child of a process has to itself on average, with all that it started.
fn private_mib_of_a_child(pid: u32) -> f64 {
    let of: Vec<_> = children(pid).into_iter().map(private_mib).collect();
    of.iter().sum::<f64>() / f64::from(u32::try_from(of.len().max(1)).unwrap())
}

fn private_mib(pid: u32) -> f64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let private = smaps.lines().filter(|line| line.starts_with("Private_"));
    let kib = private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).sum::<f64>();
    kib / 1024.0 + children(pid).into_iter().map(private_mib).sum::<f64>()
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = Path::new(&format!("/proc/{pid}/task")).read_dir().into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
}

fn through_its_life(server: &Server, token: &str) {
    let session = first_turn(server, token);
    close(server, token, &session);
}

/// Creates a session and takes a turn. Gives its id.
fn first_turn(server: &Server, token: &str) -> String {
    let session = create(server, token);
    take_turn(server, token, &session);
    session
}

fn close(server: &Server, token: &str, session: &str) {
    server.ask("DELETE", &format!("/sessions/{session}"), token, "");
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let begun = Instant::now();
    let done = work();
    (begun.elapsed(), done)
}

/// Does `work` so many times, on so many threads.
fn at_once(threads: usize, times: usize, work: impl Fn() + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < times {
                    work();
                }
            });
        }
    });
}

fn leftovers(server: &Server, home: &Path) -> Vec<(&'static str, i64)> {
    let count = |folder: &Path| folder.read_dir().map_or(0, |entries| i64::try_from(entries.count()).unwrap());
    vec![
        ("processes", i64::try_from(children(server.pid()).len()).unwrap()),
        // Not readable for an ordinary user: then both counts are nought.
        ("descriptors", count(Path::new(&format!("/proc/{}/fd", server.pid())))),
        ("files", files_in(home) + files_in(&server.folder.path().join("data/sessions"))),
    ]
}

/// Files and folders below a folder, but for the copies that claude keeps of its own settings.
fn files_in(folder: &Path) -> i64 {
    let entries = folder.read_dir().into_iter().flatten().flatten().filter(|entry| entry.file_name() != "backups");
    entries.map(|entry| 1 + if entry.path().is_dir() { files_in(&entry.path()) } else { 0 }).sum()
}
