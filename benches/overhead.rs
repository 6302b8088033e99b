//! What the server costs: `cargo bench --bench overhead`.
//!
//! A stand-in that answers at once takes claude's place, so that what is measured is the server. Times of runs are taken
//! in turn with those of the same program started directly, in the same process, and compared at their medians.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use server::{Server, median, ms, row};

const RUNS: usize = 200;
const WARM_RUNS: usize = 15;
/// In which a successor is started.
const SETTLED: Duration = Duration::from_millis(1300);
/// A token whose agents are in a network namespace.
const BOUND: &str = r#"{"name": "bound", "network": "model"}"#;
const CONNECTIONS: usize = 32;
const LOAD_FOR: Duration = Duration::from_secs(5);
const STARTS: usize = 20;
/// Runs at once, and what is aimed for without the sandbox and in it.
const AT_ONCE: [(usize, &str, &str); 4] = [(1, "", ""), (4, "", ""), (16, "700/s", "350/s"), (64, "", "")];
/// How long runs are counted.
const COUNT_FOR: Duration = Duration::from_secs(4);
/// Answers as soon as it is asked: what is counted is the server and the start of a process.
const AT_ONCE_PROGRAM: &str = r#"#!/bin/sh
read -r _
echo '{"type":"result","subtype":"success","is_error":false,"result":"ok","stop_reason":"end_turn"}'
read -r _
"#;

fn main() {
    // Cargo passes --bench; a test run of all targets passes nothing, and is not to take half a minute.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/claude");
    println!("{:<44} {:>12} {:>12}", "", "measured", "aim");

    let starts: Vec<_> = (0..STARTS).map(|_| start(&stand_in).listened_after).collect();
    row("start to listening, median", &format!("{:.1} ms", ms(median(starts))), "50 ms");

    let server = start(&stand_in);
    std::thread::sleep(Duration::from_secs(1));
    row("resident, idle", &format!("{:.1} MiB", server.resident_mib()), "20 MiB");

    let token = server.mint();
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        direct.push(time(|| run_directly(&stand_in)));
        through.push(time(|| run(&server, &token)));
    }
    let (direct, through) = (median(direct), median(through));
    row("the program started directly, median", &format!("{:.2} ms", ms(direct)), "");
    row("POST /run, median", &format!("{:.2} ms", ms(through)), "");
    row("added by /run", &format!("{:.2} ms", ms(through.saturating_sub(direct))), "3 ms");
    row("ratio", &format!("{:.2}", through.as_secs_f64() / direct.as_secs_f64()), "");

    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let data = folder.path().join("data");
    let confined = start_with(&stand_in, &[("CLAWDFORGE_SANDBOX", "required"), ("CLAWDFORGE_DATA_DIR", data.to_str().unwrap())]);
    let confined_token = confined.mint();
    let bound_token = confined.mint_with(BOUND);
    let (mut open, mut closed, mut bound) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        open.push(time(|| run(&server, &token)));
        closed.push(time(|| run(&confined, &confined_token)));
        bound.push(time(|| run(&confined, &bound_token)));
    }
    let (open, closed, bound) = (median(open), median(closed), median(bound));
    row("POST /run in the sandbox, median", &format!("{:.2} ms", ms(closed)), "");
    row("added by the sandbox", &format!("{:.2} ms", ms(closed.saturating_sub(open))), "10 ms");
    row("added by it and a network of its own", &format!("{:.2} ms", ms(bound.saturating_sub(open))), "");
    drop(confined);

    // Those that were started ahead, whose fences stand already.
    let warm = |sandbox: &str| {
        let data = folder.path().join(format!("warm-{sandbox}"));
        let settings = [("CLAWDFORGE_SANDBOX", sandbox), ("CLAWDFORGE_DATA_DIR", data.to_str().unwrap()), ("CLAWDFORGE_STANDBY", "2")];
        start_with(&stand_in, &settings)
    };
    let (open, closed) = (warm("off"), warm("required"));
    let [open_token, closed_token, bound_token] = [open.mint(), closed.mint(), closed.mint_with(BOUND)];
    let mut times = [const { Vec::new() }; 3];
    for round in 0..=WARM_RUNS {
        for (times, (server, token)) in times.iter_mut().zip([(&open, &open_token), (&closed, &closed_token), (&closed, &bound_token)]) {
            let took = time(|| run(server, token));
            // The first was cold.
            times.extend((round > 0).then_some(took));
            std::thread::sleep(SETTLED);
        }
    }
    let [open, closed, bound] = times.map(median);
    row("warm POST /run, median", &format!("{:.2} ms", ms(open)), "");
    row("added by the sandbox", &format!("{:.2} ms", ms(closed.saturating_sub(open))), "10 ms");
    row("added by it and a network of its own", &format!("{:.2} ms", ms(bound.saturating_sub(open))), "10 ms");

    let program = folder.path().join("at-once");
    std::fs::write(&program, AT_ONCE_PROGRAM).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for confined in [false, true] {
        let sandbox = if confined { "required" } else { "off" };
        let data = folder.path().join(sandbox);
        let settings = [("CLAWDFORGE_SANDBOX", sandbox), ("CLAWDFORGE_DATA_DIR", data.to_str().unwrap()), ("CLAWDFORGE_MAX_RUNS", "64")];
        let server = start_with(&program, &settings);
        let token = server.mint();
        for (at_once, open_aim, confined_aim) in AT_ONCE {
            let rate = count_runs(&server, &token, at_once);
            let (where_, aim) = if confined { (", in the sandbox", confined_aim) } else { ("", open_aim) };
            row(&format!("runs a second, {at_once} at once{where_}"), &format!("{rate:.0}/s"), aim);
        }
    }

    let rate = load(&server.address);
    row(&format!("GET /healthz, {CONNECTIONS} connections"), &format!("{rate:.0}/s"), "30000/s");
    row("resident, after that", &format!("{:.1} MiB", server.resident_mib()), "");
}

fn time(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// What a program without the server would do: start it, hand the prompt over, read the answer, wait.
fn run_directly(program: &Path) {
    let arguments = ["-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose", "--model", "sonnet"];
    let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"{\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"hello\"}]}}\n").unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("\"result\":\"ok\"")));
    drop(stdin);
    child.wait().unwrap();
}

fn start(claude: &Path) -> Server {
    start_with(claude, &[("CLAWDFORGE_SANDBOX", "off")])
}

fn start_with(claude: &Path, more: &[(&str, &str)]) -> Server {
    // What runs cost that are started cold, as the program itself is. Those that are not: the benchmark "latency".
    let settings = [("CLAWDFORGE_STANDBY", "0"), ("CLAWDFORGE_ACPX_BIN", "no-acpx"), ("PATH", "/usr/bin:/bin")];
    Server::start(&[&[("CLAWDFORGE_CLAUDE_BIN", claude.to_str().unwrap())], &settings[..], more].concat())
}

fn run(server: &Server, token: &str) {
    assert!(server.ask("POST", "/run", token, r#"{"prompt": "hello"}"#).contains("\"result\":\"ok\""));
}

/// Runs a second, so many of them at once.
fn count_runs(server: &Server, token: &str, at_once: usize) -> f64 {
    let answered = AtomicU64::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while begun.elapsed() < COUNT_FOR {
                    run(server, token);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    per_second(answered.into_inner(), begun.elapsed())
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

/// Requests a second of `/healthz`, one after the other on each of the connections.
fn load(address: &str) -> f64 {
    let answered = AtomicU64::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_nodelay(true).unwrap();
                let mut buffer = [0; 4096];
                while begun.elapsed() < LOAD_FOR {
                    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: bench\r\n\r\n").unwrap();
                    let count = stream.read(&mut buffer).unwrap();
                    assert!(buffer[..count].starts_with(b"HTTP/1.1 200"));
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    per_second(answered.into_inner(), begun.elapsed())
}
