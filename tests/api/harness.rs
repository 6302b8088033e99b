//! Starts the real server for a test, and checks what it leaves.

#![allow(dead_code, reason = "not every test binary needs all of it")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const ADMIN: &str = "an-admin-token-for-tests";
const BINARY: &str = env!("CARGO_BIN_EXE_clawdforge");

/// How a server is to be started.
pub struct Options {
    settings: Vec<(&'static str, String)>,
    environment: Vec<(OsString, OsString)>,
    /// So many machines work for it, and it makes no runs itself; none by default.
    workers: usize,
}

impl Default for Options {
    fn default() -> Self {
        let workers = std::env::var("CLAWDFORGE_TEST_WORKERS").ok().map_or(0, |workers| workers.parse().unwrap());
        Self { settings: Vec::new(), environment: Vec::new(), workers }
    }
}

impl Options {
    /// A server for which so many machines work.
    pub fn workers(self, workers: usize) -> Self {
        Self { workers, ..self }
    }

    /// What it is set to, the last word first.
    fn setting(&self, variable: &str) -> Option<&str> {
        self.settings.iter().rev().find(|(name, _)| *name == variable).map(|(_, value)| value.as_str())
    }

    /// The program with what all of it gets, in a data folder.
    pub fn command(&self, arguments: &[&str], folder: &Path, data: &Path) -> Command {
        let mut command = Command::new(BINARY);
        command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        if self.environment.is_empty() {
            command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HOME", folder).env("STAND_IN_NOTES", folder);
        }
        command.envs(self.environment.iter().cloned());
        // Tests count processes; those of standbys ask for some.
        command
            .env("CLAWDFORGE_LOG", "json")
            .env("CLAWDFORGE_STANDBY", "0")
            .env("CLAWDFORGE_ACP", std::env::var("CLAWDFORGE_TEST_ACP").unwrap_or_default())
            .env("CLAWDFORGE_DATA_DIR", data);
        command.envs(self.settings.iter().cloned());
        command
    }

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
    workers: Option<Workers>,
}

impl Server {
    fn start(options: Options, folder: TempDir) -> Self {
        Self::start_with(options, folder, None)
    }

    /// With these machines, where there are to be any.
    fn start_with(options: Options, folder: TempDir, workers: Option<Workers>) -> Self {
        // For the tests' own clients. An error means that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Before there is a process that nobody would end if this failed.
        let client = Client::new();
        let workers = (options.workers > 0).then(|| workers.unwrap_or_else(|| Workers::start(&options, folder.path())));
        let mut command = options.command(&["serve", "--bind", "127.0.0.1:0"], folder.path(), &folder.path().join("data"));
        command.env("CLAWDFORGE_ADMIN_TOKEN", options.setting("CLAWDFORGE_ADMIN_TOKEN").unwrap_or(ADMIN));
        if let Some(workers) = &workers {
            // Nothing is started ahead where nothing is started.
            command.env("CLAWDFORGE_NATS_URL", &workers.url).env("CLAWDFORGE_MAX_RUNS", "0").env("CLAWDFORGE_STANDBY", "0");
        }
        let mut process = command.spawn().unwrap();

        let log = Arc::new(Mutex::new(Vec::new()));
        let deaf = Arc::new(AtomicBool::new(false));
        collect(&mut process, &log, &deaf);
        let listening = || {
            let log = log.lock().unwrap();
            let line = log.iter().find(|line| line.contains("\"listening\""))?;
            serde_json::from_str::<Value>(line).ok()?["address"].as_str()?.parse().ok()
        };
        let address = wait_for(|| listening().ok_or_else(|| log.lock().unwrap().join("\n")));
        let here = || log.lock().unwrap().iter().filter(|line| line.contains("\"a machine is there\"")).count();
        wait_for(|| (here() >= options.workers).then_some(()).ok_or_else(|| log.lock().unwrap().join("\n")));
        Self { process, address, log, deaf, folder: Some(folder), options, client, workers }
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

    /// Those of the machines that carry out its work: its own, where no others do.
    pub fn data_folders(&self) -> Vec<PathBuf> {
        match &self.workers {
            None => vec![self.data()],
            Some(workers) => {
                (0..self.options.workers.max(workers.processes.len())).map(|number| self.folder().join(name(number))).collect()
            }
        }
    }

    /// What it says, and the machines that work for it.
    pub fn log(&self) -> String {
        let workers = self.workers.iter().map(Workers::log);
        std::iter::once(self.log.lock().unwrap().join("\n")).chain(workers).collect::<Vec<_>>().join("\n")
    }

    /// How many entries there are in a folder of those that agents work in.
    pub fn count(&self, folder: &str) -> usize {
        self.data_folders().iter().map(|data| data.join(folder).read_dir().unwrap().count()).sum()
    }

    /// The folder of a run or a session, or where it would be.
    pub fn room(&self, folder: &str, id: &str) -> PathBuf {
        let rooms: Vec<_> = self.data_folders().iter().map(|data| data.join(folder).join(id)).collect();
        rooms.iter().find(|room| room.exists()).unwrap_or(&rooms[0]).clone()
    }

    /// The processes that start agents: its own, where no others do.
    pub fn starters(&self) -> Vec<u32> {
        match &self.workers {
            None => vec![self.pid()],
            Some(workers) => workers.processes.values().map(Child::id).collect(),
        }
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

    /// Sends a signal; one that kills goes to the machines that work for it, too.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
        if signal == Signal::KILL {
            self.workers.iter().flat_map(|workers| workers.processes.values()).for_each(|process| {
                kill_process(Pid::from_child(process), signal).unwrap();
            });
        }
    }

    /// Waits until the process has ended.
    pub fn ended(&mut self) -> ExitStatus {
        wait_for(|| self.process.try_wait().unwrap().ok_or("the server still runs"))
    }

    /// Kills the server as a crash would, with the machines that work for it, and starts another on the same folder.
    pub fn crash_and_restart(self) -> Self {
        self.signal(Signal::KILL);
        self.restart()
    }

    /// Kills the server as a crash would, without the machines that work for it.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// The machines that work for it.
    pub fn workers(&mut self) -> &mut Workers {
        self.workers.as_mut().unwrap()
    }

    /// Starts those that were ended.
    pub fn start_workers(&mut self) {
        self.workers.as_mut().unwrap().start_missing(&self.options);
    }

    /// Starts another server on the same folder when this one has ended.
    pub fn restart(mut self) -> Self {
        self.ended();
        let (options, folder, workers) = (std::mem::take(&mut self.options), self.folder.take().unwrap(), self.workers.take());
        drop(self);
        let Some(mut workers) = workers else { return Self::start_with(options, folder, None) };
        let was_killed = workers.reap();
        let one_of = "SELECT instance FROM runs UNION SELECT instance FROM session_events";
        let ledger = rusqlite::Connection::open(folder.path().join("data/clawdforge.db")).unwrap();
        let instances: Option<String> =
            ledger.query_row(&format!("SELECT group_concat(quote(instance)) FROM ({one_of})"), [], |row| row.get(0)).unwrap();
        let going_on = ["runs", "session_events"].map(|table| {
            let of = instances.as_deref().unwrap_or("NULL");
            format!("(SELECT count(*) FROM {table} WHERE NOT queued AND finished_at IS NULL AND instance IN ({of}))")
        });
        let going_on = format!("SELECT {}", going_on.join(" + "));
        workers.start_missing(&options);
        let server = Self::start_with(options, folder, Some(workers));
        // Where all that worked was killed, that is found out when its machines are heard of.
        let is_lost = || server.query::<i64>(&going_on) > 0;
        let begun = Instant::now();
        while was_killed && is_lost() && begun.elapsed() < Duration::from_secs(15) {
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// The same, with another value of a setting.
    pub fn restart_with(mut self, variable: &'static str, value: &str) -> Self {
        self.options = std::mem::take(&mut self.options).set(variable, value);
        self.restart()
    }

    /// The processes of this server's runs, by what `/proc` shows of their environment.
    pub fn agents(&self) -> Vec<u32> {
        let mark = |data: PathBuf| data.metadata().map(|data| format!("AGENT_RUN={:x}-{:x}/", data.dev(), data.ino())).unwrap();
        let marks: Vec<_> = self.data_folders().into_iter().map(mark).collect();
        let variables = |pid: &u32, file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let has = |bytes: Vec<u8>, part: &str| bytes.split(|byte| *byte == 0).any(|whole| whole.starts_with(part.as_bytes()));
        // The server asks its CLIs for their versions when it starts, and later.
        let carries =
            |pid: &u32| marks.iter().any(|mark| has(variables(pid, "environ"), mark)) && !has(variables(pid, "cmdline"), "--version");
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
        family.extend(self.workers.iter().flat_map(|workers| workers.processes.values().map(Child::id)));
        let own = family.len();
        let everyone: Vec<_> = processes().filter_map(|pid| Some((pid, parent(pid)?))).collect();
        loop {
            let more: Vec<_> = everyone.iter().filter(|(pid, parent)| family.contains(parent) && !family.contains(pid)).collect();
            if more.is_empty() {
                return family.split_off(own);
            }
            family.extend(more.into_iter().map(|(pid, _)| pid));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(_folder) = &self.folder else { return };
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        if std::thread::panicking() {
            eprintln!("{}", self.log());
            let begun = Instant::now();
            while self.process.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(30) {
                std::thread::sleep(Duration::from_millis(20));
            }
            return;
        }
        let status = self.ended();
        assert!(status.success(), "the server ended with {status}\n{}", self.log());
        if let Some(workers) = &mut self.workers {
            workers.stop();
        }
        assert_eq!(self.agents(), [0; 0], "processes are left");
        for table in ["runs", "session_events"] {
            assert_eq!(
                self.query::<i64>(&format!("SELECT count(*) FROM {table} WHERE finished_at IS NULL")),
                0,
                "rows of {table} are left open"
            );
        }
        assert_eq!(self.count("runs"), 0, "folders are left");
    }
}

/// Has the lines of a process's log collected.
fn collect(process: &mut Child, log: &Arc<Mutex<Vec<String>>>, deaf: &Arc<AtomicBool>) {
    let (lines, seen, left) = (BufReader::new(process.stderr.take().unwrap()).lines(), log.clone(), deaf.clone());
    std::thread::spawn(move || {
        lines.map_while(Result::ok).take_while(|_| !left.load(Ordering::Relaxed)).for_each(|line| seen.lock().unwrap().push(line));
    });
}

/// Machines that work for a server, and the NATS server between them. Dropped, they are ended.
pub struct Workers {
    pub url: String,
    port: u16,
    folder: PathBuf,
    nats: Option<Child>,
    detours: BTreeMap<String, String>,
    started: usize,
    processes: BTreeMap<String, Child>,
    log: Arc<Mutex<Vec<String>>>,
}

/// The program of NATS, which Debian does not put where everybody looks.
pub fn nats_server() -> Option<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/usr/local/bin"].iter().map(|folder| Path::new(folder).join("nats-server")).find(|path| path.exists())
}

/// What a machine is called.
fn name(number: usize) -> String {
    format!("machine-{number}")
}

impl Workers {
    fn start(options: &Options, folder: &Path) -> Self {
        // Free now; whoever takes it meanwhile makes the test fail.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let url = format!("nats://127.0.0.1:{port}");
        let mut workers = Self {
            url,
            port,
            folder: folder.to_owned(),
            nats: None,
            detours: BTreeMap::new(),
            started: 0,
            processes: BTreeMap::new(),
            log: Arc::default(),
        };
        workers.start_nats();
        workers.start_missing(options);
        workers
    }

    /// Starts the NATS server, with what it had.
    pub fn start_nats(&mut self) {
        let store = self.folder.join("jetstream");
        let mut command = Command::new(nats_server().expect("there is no nats-server; install it, or unset CLAWDFORGE_TEST_WORKERS"));
        command.args(["-js", "-a", "127.0.0.1", "-p", &self.port.to_string(), "-sd"]).arg(store);
        self.nats = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        wait_for(|| std::net::TcpStream::connect(("127.0.0.1", self.port)));
    }

    /// Kills the NATS server as a crash would.
    pub fn kill_nats(&mut self) {
        let mut nats = self.nats.take().unwrap();
        nats.kill().unwrap();
        nats.wait().unwrap();
    }

    /// Has a machine reach NATS by another address from its next start on.
    pub fn reach(&mut self, name: &str, url: String) {
        self.detours.insert(name.to_owned(), url);
    }

    /// Starts the machines that are not there. Each has its share of the places.
    fn start_missing(&mut self, options: &Options) {
        let places: usize = options.setting("CLAWDFORGE_MAX_RUNS").map_or(8, |places| places.parse().unwrap());
        for number in 0..options.workers {
            let name = name(number);
            if self.processes.contains_key(&name) {
                continue;
            }
            let mut command = options.command(&["worker"], &self.folder, &self.folder.join(&name));
            let share = (places + options.workers - 1 - number) / options.workers;
            let url = self.detours.get(&name).unwrap_or(&self.url);
            command.env("CLAWDFORGE_NATS_URL", url).env("CLAWDFORGE_WORKER_NAME", &name).env("CLAWDFORGE_MAX_RUNS", share.to_string());
            let mut process = command.spawn().unwrap();
            collect(&mut process, &self.log, &Arc::default());
            self.processes.insert(name, process);
            self.started += 1;
        }
        // Before that a signal ends one as it ends any program.
        let working = || self.log().matches("\"working\"").count();
        wait_for(|| (working() >= self.started).then_some(()).ok_or_else(|| self.log()));
    }

    /// Lets go those that have ended. Says whether there were any.
    fn reap(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        let before = self.processes.len();
        self.processes.retain(|_, process| process.try_wait().unwrap().is_none());
        self.processes.len() < before
    }

    pub fn names(&self) -> Vec<String> {
        self.processes.keys().cloned().collect()
    }

    pub fn pid(&self, name: &str) -> u32 {
        self.processes[name].id()
    }

    /// Kills one as a crash would.
    pub fn kill(&mut self, name: &str) {
        let mut process = self.processes.remove(name).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Stops one.
    pub fn stop_one(&mut self, name: &str) {
        let mut process = self.processes.remove(name).unwrap();
        kill_process(Pid::from_child(&process), Signal::TERM).unwrap();
        assert!(wait_for(|| process.try_wait().unwrap().ok_or("a machine still works")).success());
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Ends them, which must go well.
    fn stop(&mut self) {
        for process in self.processes.values() {
            kill_process(Pid::from_child(process), Signal::TERM).unwrap();
        }
        for process in self.processes.values_mut() {
            let status = wait_for(|| process.try_wait().unwrap().ok_or("a machine still works"));
            assert!(status.success(), "a machine ended with {status}");
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        // In this order: a machine ends what it started.
        for process in self.processes.values_mut().chain(&mut self.nats) {
            let begun = Instant::now();
            while process.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(30) {
                let _ = kill_process(Pid::from_child(process), Signal::TERM);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
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
