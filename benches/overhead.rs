//! What the server costs: `cargo bench --bench overhead`.
//!
//! A stand-in that answers at once takes claude's place, so that what is measured is the server. Times of runs are taken
//! in turn with those of the same program started directly, in the same process, and compared at their medians.

#![allow(missing_docs, reason = "a program")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const RUNS: usize = 200;
const CONNECTIONS: usize = 32;
const LOAD_FOR: Duration = Duration::from_secs(5);
const STARTS: usize = 20;
const ADMIN: &str = "admin-token-of-the-benchmark";
const BINARY: &str = env!("CARGO_BIN_EXE_clawdforge");

fn main() {
    // Cargo passes --bench; a test run of all targets passes nothing, and is not to take half a minute.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/claude");
    println!("{:<44} {:>12} {:>12}", "", "measured", "aim");

    let starts: Vec<_> = (0..STARTS).map(|_| Server::start(&stand_in).listened_after).collect();
    row("start to listening, median", &format!("{:.1} ms", ms(median(starts))), "50 ms");

    let server = Server::start(&stand_in);
    std::thread::sleep(Duration::from_secs(1));
    row("resident, idle", &format!("{:.1} MiB", server.resident_mib()), "20 MiB");

    let token = server.mint();
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        direct.push(time(|| run_directly(&stand_in)));
        through.push(time(|| server.run(&token)));
    }
    let (direct, through) = (median(direct), median(through));
    row("the program started directly, median", &format!("{:.2} ms", ms(direct)), "");
    row("POST /run, median", &format!("{:.2} ms", ms(through)), "");
    row("added by /run", &format!("{:.2} ms", ms(through.saturating_sub(direct))), "3 ms");
    row("ratio", &format!("{:.2}", through.as_secs_f64() / direct.as_secs_f64()), "");

    let rate = server.load();
    row(&format!("GET /healthz, {CONNECTIONS} connections"), &format!("{rate:.0}/s"), "30000/s");
    row("resident, after that", &format!("{:.1} MiB", server.resident_mib()), "");
}

fn row(what: &str, measured: &str, aim: &str) {
    println!("{what:<44} {measured:>12} {aim:>12}");
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
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
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("\"result\":\"ok\""), "{line}");
    drop(stdin);
    child.wait().unwrap();
}

struct Server {
    process: Child,
    address: String,
    listened_after: Duration,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(claude: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let mut process = Command::new(BINARY)
            .args(["serve", "--bind", "127.0.0.1:0", "--acpx-bin", "no-acpx", "--claude-bin"])
            .arg(claude)
            .env("CLAWDFORGE_DATA_DIR", folder.path().join("data"))
            .env("CLAWDFORGE_ADMIN_TOKEN", ADMIN)
            .env("CLAWDFORGE_LOG", "json")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let line = lines.find_map(|line| line.ok().filter(|line| line.contains("\"listening\""))).expect("the server listens");
        let listened_after = begun.elapsed();
        std::thread::spawn(move || lines.for_each(drop));
        let address = line.split("\"address\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();
        Self { process, address, listened_after, _folder: folder }
    }

    fn resident_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")).unwrap();
        kib.parse::<f64>().unwrap() / 1024.0
    }

    /// One request on a connection of its own; gives the answer, checked to be a success.
    fn ask(&self, path: &str, token: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer
    }

    fn mint(&self) -> String {
        let answer = self.ask("/admin/tokens", ADMIN, r#"{"name": "bench"}"#);
        answer.split("\"token\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned()
    }

    fn run(&self, token: &str) {
        assert!(self.ask("/run", token, r#"{"prompt": "hello"}"#).contains("\"result\":\"ok\""));
    }

    /// Requests a second of `/healthz`, one after the other on each of the connections.
    fn load(&self) -> f64 {
        let answered = AtomicU64::new(0);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS {
                scope.spawn(|| {
                    let mut stream = TcpStream::connect(&self.address).unwrap();
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
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let answered = answered.into_inner() as f64;
        answered / begun.elapsed().as_secs_f64()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}
