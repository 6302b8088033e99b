//! What it costs to speak the model APIs: `cargo bench --bench model_apis`, two minutes.
//!
//! First everything is real but the model, which answers at once: each round takes the bare CLI with a conversation pasted into its
//! prompt, a warm run, and warm completions in turn. Then a stand-in prints the time at which it prints, in place of claude.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clawdforge::demo::{self, install, stub::Stub};
use serde_json::{Value, json};
use server::{Server, median, ms, row, start_real, time};

const ROUNDS: usize = 12;
/// In which the next process is started.
const PAUSE: Duration = Duration::from_secs(3);
const AT_ONCE: usize = 50;

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!("{:<52} {:>12} {:>8} {:>8}", "medians", "measured", "ratio", "aim");
    latency();
    println!();
    streams();
}

/// A conversation of so many messages, the last by the user.
fn conversation(length: usize) -> Vec<Value> {
    let said = |at: usize| format!("This is message {at} of a talk about the sea, the harbour, and what the fishermen say of the weather.");
    let role = |at: usize| if (length - at) % 2 == 1 { "user" } else { "assistant" };
    (0..length).map(|at| json!({"role": role(at), "content": said(at)})).collect()
}

fn latency() {
    let clis = install::clis(&install::default_cache(), &|step| println!("{step}")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stub = runtime.block_on(Stub::start()).unwrap();
    let (home, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let environment = demo::environment(&clis, &stub.url(), home.path());
    let server = start_real(&environment, &clis, &[("CLAWDFORGE_STANDBY", "4")]);
    let token = server.mint();

    let pasted: String = conversation(20).iter().map(|said| format!("{}: {}\n", said["role"], said["content"])).collect();
    let bare = || {
        let mut command = Command::new(&clis.claude);
        command.args(["-p", "--output-format", "json", "--model", "sonnet"]).current_dir(folder.path());
        command.env_clear().envs(environment.iter()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(pasted.as_bytes()).unwrap();
        assert!(String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).contains("\"is_error\":false"));
    };
    let ask = |path: &str, body: Value| drop(server.ask("POST", path, &token, &body.to_string()));
    let run = || ask("/run", json!({"prompt": "Hello."}));
    let completion = |length| {
        ask("/v1/messages", json!({"model": "sonnet", "max_tokens": 500, "system": "Be brief.", "messages": conversation(length)}));
    };
    let each: [(&str, &dyn Fn()); 5] = [
        ("claude -p, 20 messages pasted into the prompt", &bare),
        ("POST /run, one prompt, warm", &run),
        ("POST /v1/messages, 1 message, warm", &|| completion(1)),
        ("POST /v1/messages, 20 messages, warm", &|| completion(20)),
        ("POST /v1/messages, 100 messages, warm", &|| completion(100)),
    ];
    let mut times = vec![Vec::new(); each.len()];
    for round in 0..=ROUNDS {
        for (taken, (_, work)) in times.iter_mut().zip(&each) {
            let took = time(work);
            if round > 0 {
                taken.push(took);
            }
            std::thread::sleep(PAUSE);
        }
    }
    let bare = ms(median(times[0].clone()));
    for ((name, _), (taken, aim)) in each.iter().zip(times.into_iter().zip(["", "", "", "0.25", ""])) {
        let taken = ms(median(taken));
        println!("{name:<52} {taken:>9.0} ms {:>8.2} {aim:>8}", taken / bare);
    }
}

fn streams() {
    let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/claude");
    let settings =
        [("CLAWDFORGE_STANDBY", "0"), ("CLAWDFORGE_ACPX_BIN", "no-acpx"), ("CLAWDFORGE_MAX_RUNS", "50"), ("PATH", "/usr/bin:/bin")];
    let server = Server::start(&[&[("CLAWDFORGE_CLAUDE_BIN", stand_in.to_str().unwrap())], &settings[..]].concat());
    let token = server.mint();
    for path in ["/v1/chat/completions", "/v1/responses", "/v1/messages"] {
        let pieces: Vec<_> = (0..5).map(|_| watch(&server.address, &token, path)).collect();
        let first = pieces.iter().map(|pieces| pieces[0]).collect();
        row(&format!("first piece, from print to reader, {path}"), &format!("{:.2} ms", ms(median(first))), "5 ms");
        row("  every piece", &format!("{:.2} ms", ms(median(pieces.concat()))), "");
    }
    let idle = server.resident_mib();
    let most = std::thread::scope(|scope| {
        let watching: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(|| watch(&server.address, &token, "/v1/chat/completions").len())).collect();
        let mut most = 0.0_f64;
        while !watching.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            most = most.max(server.resident_mib());
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(watching.into_iter().map(|watch| watch.join().unwrap()).sum::<usize>(), AT_ONCE * 20);
        most
    });
    row(&format!("resident before, and with {AT_ONCE} streams"), &format!("{idle:.1}, {most:.1} MiB"), "");
}

/// How long ago the time in a piece of text was.
fn delay(line: &str) -> Option<Duration> {
    let nanoseconds = line.split("at ").nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(now.saturating_sub(Duration::from_nanos(nanoseconds)))
}

fn watch(address: &str, token: &str, path: &str) -> Vec<Duration> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let said = [json!({"role": "user", "content": "do: tell the time"})];
    let field = if path == "/v1/responses" { "input" } else { "messages" };
    let mut body = json!({"model": "sonnet", "stream": true, field: said});
    if path == "/v1/messages" {
        body["max_tokens"] = 99.into();
    }
    let body = body.to_string();
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\nauthorization: Bearer {token}");
    write!(stream, "{head}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.filter(|line| line.contains("delta")).filter_map(|line| delay(&line)).collect()
}
