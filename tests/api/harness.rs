//! Starts the real server for a test, and checks what it leaves.

#![allow(dead_code, reason = "not every test binary needs all of it")]

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const ADMIN: &str = "an-admin-token-for-tests";
const BINARY: &str = env!("CARGO_BIN_EXE_clawdforge");

/// How a server is to be started.
#[derive(Default)]
pub struct Options {
    settings: Vec<(&'static str, String)>,
    environment: Vec<(OsString, OsString)>,
}

impl Options {
    /// A server whose claude is the stand-in, which leaves its notes outside its folder.
    pub fn stand_in() -> Self {
        let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/claude");
        Self::default().set("CLAWDFORGE_CLAUDE_BIN", stand_in.display()).set("CLAWDFORGE_SANDBOX", "off")
    }

    /// One whose sessions are by the stand-in of acpx, too.
    pub fn acpx_stand_in() -> Self {
        let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand-in/acpx");
        Self::stand_in().set("CLAWDFORGE_ACP", "acpx").set("CLAWDFORGE_ACPX_BIN", stand_in.display())
    }

    pub fn set(mut self, variable: &'static str, value: impl ToString) -> Self {
        self.settings.push((variable, value.to_string()));
        self
    }

    /// Instead of a minimal environment.
    pub fn environment<'a>(mut self, variables: impl Iterator<Item = (&'a std::ffi::OsStr, &'a std::ffi::OsStr)>) -> Self {
        self.environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        self
    }

    pub fn start(self) -> Server {
        Server::start(self, tempfile::tempdir().unwrap())
    }

    /// With a data folder below this one.
    pub fn start_below(self, folder: &Path) -> Server {
        Server::start(self, tempfile::tempdir_in(folder).unwrap())
    }
}

/// A server process with a folder of its own. Dropped, it is stopped, and must have left nothing.
pub struct Server {
    process: Child,
    address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    /// Whether nobody reads the log any more.
    deaf: Arc<AtomicBool>,
    folder: Option<TempDir>,
    options: Options,
    client: Client,
}

impl Server {
    fn start(options: Options, folder: TempDir) -> Self {
        // For the tests' own clients. An error means that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Before there is a process that nobody would end if this failed.
        let client = Client::new();
        let mut command = Command::new(BINARY);
        command.args(["serve", "--bind", "127.0.0.1:0"]).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        if options.environment.is_empty() {
            command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HOME", folder.path()).env("STAND_IN_NOTES", folder.path());
        }
        command.envs(options.environment.iter().cloned());
        // Tests count processes; those of standbys ask for some.
        command
            .env("CLAWDFORGE_LOG", "json")
            .env("CLAWDFORGE_STANDBY", "0")
            .env("CLAWDFORGE_ACP", std::env::var("CLAWDFORGE_TEST_ACP").unwrap_or_default())
            .env("CLAWDFORGE_ADMIN_TOKEN", ADMIN)
            .env("CLAWDFORGE_DATA_DIR", folder.path().join("data"));
        command.envs(options.settings.iter().cloned());
        let mut process = command.spawn().unwrap();

        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, seen) = (BufReader::new(process.stderr.take().unwrap()).lines(), log.clone());
        let deaf = Arc::new(AtomicBool::new(false));
        let left = deaf.clone();
        let reading = move || {
            lines.map_while(Result::ok).take_while(|_| !left.load(Ordering::Relaxed)).for_each(|line| seen.lock().unwrap().push(line));
        };
        std::thread::spawn(reading);
        let listening = || {
            let log = log.lock().unwrap();
            let line = log.iter().find(|line| line.contains("\"listening\""))?;
            serde_json::from_str::<Value>(line).ok()?["address"].as_str()?.parse().ok()
        };
        let address = wait_for(|| listening().ok_or_else(|| log.lock().unwrap().join("\n")));
        Self { process, address, log, deaf, folder: Some(folder), options, client }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn folder(&self) -> &Path {
        self.folder.as_ref().unwrap().path()
    }

    pub fn data(&self) -> PathBuf {
        self.folder().join("data")
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Reads one more line of the log, and then leaves it.
    pub fn leave_log(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn request(&self, method: Method, path: &str, token: &str) -> RequestBuilder {
        self.client.request(method, self.url(path)).bearer_auth(token)
    }

    /// Mints a token for an app.
    pub async fn mint(&self, name: &str) -> String {
        let answer = Answer::of(self.request(Method::POST, "/admin/tokens", ADMIN).json(&json!({"name": name}))).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        answer.json["token"].as_str().unwrap().to_owned()
    }

    pub async fn post(&self, path: &str, token: &str, body: &Value) -> Answer {
        Answer::of(self.request(Method::POST, path, token).json(body)).await
    }

    pub async fn get(&self, path: &str, token: &str) -> Answer {
        Answer::of(self.request(Method::GET, path, token)).await
    }

    pub async fn run(&self, token: &str, prompt: &str) -> Answer {
        self.post("/run", token, &json!({"prompt": prompt})).await
    }

    /// Uploads a file; gives its token.
    pub async fn upload(&self, token: &str, name: &str, content: &'static str) -> String {
        let part = reqwest::multipart::Part::text(content).file_name(name.to_owned());
        let form = reqwest::multipart::Form::new().part("file", part);
        let answer = Answer::of(self.request(Method::POST, "/files", token).multipart(form)).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        answer.json["file_token"].as_str().unwrap().to_owned()
    }

    /// One value from the ledger.
    pub fn query<T: rusqlite::types::FromSql>(&self, sql: &str) -> T {
        let ledger = rusqlite::Connection::open(self.data().join("clawdforge.db")).unwrap();
        ledger.query_row(sql, [], |row| row.get(0)).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Waits until the process has ended.
    pub fn ended(&mut self) -> ExitStatus {
        wait_for(|| self.process.try_wait().unwrap().ok_or("the server still runs"))
    }

    /// Kills the server as a crash would, and starts another on the same folder.
    pub fn crash_and_restart(self) -> Self {
        self.signal(Signal::KILL);
        self.restart()
    }

    /// Starts another server on the same folder when this one has ended.
    pub fn restart(mut self) -> Self {
        self.ended();
        let (options, folder) = (std::mem::take(&mut self.options), self.folder.take().unwrap());
        drop(self);
        Self::start(options, folder)
    }

    /// The same, with another value of a setting.
    pub fn restart_with(mut self, variable: &'static str, value: &str) -> Self {
        self.options = std::mem::take(&mut self.options).set(variable, value);
        self.restart()
    }

    /// The processes of this server's runs, by what `/proc` shows of their environment.
    pub fn agents(&self) -> Vec<u32> {
        let data = self.data().metadata().unwrap();
        let mark = format!("AGENT_RUN={:x}-{:x}/", data.dev(), data.ino());
        let variables = |pid: &u32, file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let has = |bytes: Vec<u8>, part: &str| bytes.split(|byte| *byte == 0).any(|whole| whole.starts_with(part.as_bytes()));
        // The server asks its CLIs for their versions when it starts, and later.
        let carries = |pid: &u32| has(variables(pid, "environ"), &mark) && !has(variables(pid, "cmdline"), "--version");
        processes().filter(carries).collect()
    }

    /// Whether one of them has `text` in its command line, whose words are parted by NUL.
    pub fn running(&self, text: &str) -> bool {
        let cmdline = |pid: &u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        self.agents().iter().any(|pid| String::from_utf8_lossy(&cmdline(pid)).contains(text))
    }

    /// The processes below the server.
    pub fn descendants(&self) -> Vec<u32> {
        let mut family = vec![self.pid()];
        let everyone: Vec<_> = processes().filter_map(|pid| Some((pid, parent(pid)?))).collect();
        loop {
            let more: Vec<_> = everyone.iter().filter(|(pid, parent)| family.contains(parent) && !family.contains(pid)).collect();
            if more.is_empty() {
                return family.split_off(1);
            }
            family.extend(more.into_iter().map(|(pid, _)| pid));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(folder) = &self.folder else { return };
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        if std::thread::panicking() {
            eprintln!("{}", self.log());
            let begun = Instant::now();
            while self.process.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(30) {
                std::thread::sleep(Duration::from_millis(20));
            }
            return;
        }
        let data = folder.path().join("data");
        let status = self.ended();
        assert!(status.success(), "the server ended with {status}\n{}", self.log());
        assert_eq!(self.agents(), [0; 0], "processes are left");
        for table in ["runs", "session_events"] {
            assert_eq!(
                self.query::<i64>(&format!("SELECT count(*) FROM {table} WHERE finished_at IS NULL")),
                0,
                "rows of {table} are left open"
            );
        }
        assert_eq!(data.join("runs").read_dir().unwrap().count(), 0, "folders are left");
    }
}

fn processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// `None` where the process is gone, or a zombie.
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    (fields.next()? != "Z").then(|| fields.next()?.parse().ok())?
}

/// Polls until there is a value; past 30 s it fails with the last reason.
pub fn wait_for<T, E: std::fmt::Display>(mut look: impl FnMut() -> Result<T, E>) -> T {
    let begun = Instant::now();
    loop {
        match look() {
            Ok(value) => return value,
            Err(reason) => assert!(begun.elapsed() < Duration::from_secs(30), "waited too long: {reason}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether sessions are by way of acpx here.
pub fn by_acpx() -> bool {
    std::env::var("CLAWDFORGE_TEST_ACP").as_deref() == Ok("acpx")
}

/// The most memory that the server ever had, in KiB.
pub fn peak(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap()
}

/// Lets this process open as many files as it may.
pub fn many_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
}

/// Polls without holding up the test's other futures.
pub async fn until(what: &str, mut look: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !look() {
        assert!(begun.elapsed() < Duration::from_secs(30), "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Polls until there are so many of these processes, and the same ones for a while: what ran before may still be ending.
pub async fn settled(what: &str, count: usize, mut look: impl FnMut() -> Vec<u32>) -> Vec<u32> {
    let (mut seen, mut since) = (Vec::new(), Instant::now());
    until(what, || {
        let now = look();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        seen.len() == count && since.elapsed() > Duration::from_millis(400)
    })
    .await;
    seen
}

/// An answer, read whole.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
    /// Null where the body is not JSON.
    pub json: Value,
}

impl Answer {
    pub async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        Self { status, headers, json: serde_json::from_str(&text).unwrap_or_default(), text }
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Checks that this is a problem as RFC 9457 has it, and gives its detail.
    #[track_caller]
    pub fn problem(&self, status: u16) -> &str {
        assert_eq!((self.status.as_u16(), &self.json["status"]), (status, &json!(status)), "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert!(self.json["type"].is_string() && self.json["title"].is_string());
        self.json["detail"].as_str().unwrap()
    }

    /// The keys of the body, in the order that they came.
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<_> = self.json.as_object().unwrap().keys().cloned().collect();
        keys.sort_by_key(|key| self.text.find(&format!("\"{key}\":")).unwrap());
        keys
    }
}
