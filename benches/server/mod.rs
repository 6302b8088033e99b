//! A server to measure.

#![allow(dead_code, unreachable_pub, reason = "not every benchmark needs all of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clawdforge::agent::environment::Environment;
use clawdforge::demo::install::Clis;

const ADMIN: &str = "admin-token-of-the-benchmark";

pub fn row(what: &str, measured: &str, aim: &str) {
    println!("{what:<44} {measured:>12} {aim:>12}");
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

pub fn time(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// A server with the real CLIs, and these settings.
pub fn start_real(environment: &Environment, clis: &Clis, settings: &[(&str, &str)]) -> Server {
    let text = |value: &std::ffi::OsStr| value.to_str().unwrap().to_owned();
    let inherited: Vec<_> = environment.iter().map(|(name, value)| (text(name), text(value))).collect();
    let mut variables: Vec<(&str, &str)> = inherited.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    variables.extend([
        ("CLAWDFORGE_CLAUDE_BIN", clis.claude.to_str().unwrap()),
        ("CLAWDFORGE_ACPX_BIN", clis.acpx.to_str().unwrap()),
        ("CLAWDFORGE_SWEEP_SECS", "1"),
        ("CLAWDFORGE_DRAIN_SECS", "1"),
    ]);
    variables.extend(settings);
    Server::start(&variables)
}

/// A bare acpx.
pub fn acpx(environment: &Environment, clis: &Clis, folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(&clis.acpx);
    command.args(["--format", "json", "--json-strict", "--approve-all", "claude"]).args(arguments).current_dir(folder);
    command.env_clear().envs(environment.iter()).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// How long a bare `acpx prompt` takes to its `stopReason` line. It ends a second later, which is waited for.
pub fn bare_turn(mut command: Command) -> Duration {
    let begun = Instant::now();
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello.").unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("\"stopReason\"")));
    let answered = begun.elapsed();
    child.wait().unwrap();
    answered
}

/// Creates a session; gives its id.
pub fn create(server: &Server, token: &str) -> String {
    let answer = server.ask("POST", "/sessions", token, "{}");
    answer.split("\"session_id\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned()
}

pub fn take_turn(server: &Server, token: &str, session: &str) {
    let answer = server.ask("POST", &format!("/sessions/{session}/turn"), token, r#"{"prompt": "Hello."}"#);
    assert!(answer.contains("\"stop_reason\":\"end_turn\""), "{answer}");
}

pub struct Server {
    process: Child,
    pub address: String,
    pub listened_after: Duration,
    pub folder: tempfile::TempDir,
}

impl Server {
    /// Starts a server with these variables and no others.
    pub fn start(variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let mut process = Command::new(env!("CARGO_BIN_EXE_clawdforge"))
            .args(["serve", "--bind", "127.0.0.1:0"])
            .env_clear()
            .env("CLAWDFORGE_DATA_DIR", folder.path().join("data"))
            .envs(variables.iter().copied())
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
        Self { process, address, listened_after, folder }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn resident_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")).unwrap();
        kib.parse::<f64>().unwrap() / 1024.0
    }

    /// One request on a connection of its own; gives the answer, checked to be a success.
    pub fn ask(&self, method: &str, path: &str, token: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(["HTTP/1.1 200", "HTTP/1.1 202"].iter().any(|status| answer.starts_with(status)), "{answer}");
        answer
    }

    pub fn mint(&self) -> String {
        self.mint_with(r#"{"name": "bench"}"#)
    }

    pub fn mint_with(&self, asked: &str) -> String {
        let answer = self.ask("POST", "/admin/tokens", ADMIN, asked);
        answer.split("\"token\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}
