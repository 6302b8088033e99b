//! What it costs to watch: `cargo bench --bench streams`.
//!
//! A stand-in prints the time at which it prints, in place of claude; the readers compare that with when it reaches them,
//! beside one that reads the same program directly. Then as many as 200 runs are watched at once.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use server::{Server, median, ms, row};

const AT_ONCE: usize = 200;

fn main() {
    // Cargo passes --bench; a test run of all targets passes nothing, and is not to take half a minute.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/claude");
    let settings =
        [("CLAWDFORGE_STANDBY", "0"), ("CLAWDFORGE_ACPX_BIN", "no-acpx"), ("CLAWDFORGE_MAX_RUNS", "200"), ("PATH", "/usr/bin:/bin")];
    let server = Server::start(&[&[("CLAWDFORGE_CLAUDE_BIN", stand_in.to_str().unwrap())], &settings[..]].concat());
    let token = server.mint();
    println!("{:<44} {:>12} {:>12}", "", "measured", "aim");

    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        direct.extend(watch_directly(&stand_in));
        through.extend(watch(&server.address, &token));
    }
    let worst = through.iter().max().copied().unwrap_or_default();
    let (direct, through) = (median(direct), median(through));
    row("from print to reader, directly, median", &format!("{:.2} ms", ms(direct)), "");
    row("from print to reader, by /run, median", &format!("{:.2} ms", ms(through)), "");
    row("the same, the slowest", &format!("{:.2} ms", ms(worst)), "10 ms");

    let resident = std::thread::scope(|scope| {
        let watching: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(|| watch(&server.address, &token).len())).collect();
        let mut most = 0.0_f64;
        while !watching.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            most = most.max(server.resident_mib());
            std::thread::sleep(Duration::from_millis(50));
        }
        let pieces: usize = watching.into_iter().map(|watch| watch.join().unwrap()).sum();
        assert_eq!(pieces, AT_ONCE * 20);
        most
    });
    row(&format!("resident, {AT_ONCE} streams at once"), &format!("{resident:.1} MiB"), "60 MiB");
}

/// How long ago the time in a piece of text was.
fn delay(line: &str) -> Option<Duration> {
    let nanoseconds = line.split("at ").nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(now.saturating_sub(Duration::from_nanos(nanoseconds)))
}

fn watch_directly(program: &Path) -> Vec<Duration> {
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"do: tell the time\n").unwrap();
    let delays = BufReader::new(child.stdout.take().unwrap()).lines().filter_map(|line| delay(&line.unwrap())).collect();
    child.wait().unwrap();
    delays
}

fn watch(address: &str, token: &str) -> Vec<Duration> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let body = r#"{"prompt": "do: tell the time"}"#;
    let length = body.len();
    let head =
        format!("POST /run HTTP/1.1\r\nhost: bench\r\nconnection: close\r\nauthorization: Bearer {token}\r\naccept: text/event-stream");
    write!(stream, "{head}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.filter(|line| line.contains("\"content\"")).filter_map(|line| delay(&line)).collect()
}
