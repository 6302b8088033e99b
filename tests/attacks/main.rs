//! What an agent tries that follows a stranger's words: each file beside this one is an attempt, made by the real claude in a run and in a
//! session, in the arrangement that is the default.

#![allow(unreachable_pub, missing_docs, dead_code, reason = "a test binary has no public items, and what it shares others use")]

#[path = "../agents/forge.rs"]
mod forge;
#[path = "../api/harness.rs"]
mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use forge::{Forge, say};
use harness::{ADMIN, Answer, Options, Server, settled, until};

/// An attempt, by the name of its file, with what has to be so for it to be made here.
const ATTEMPTS: &[&str] = &[
    "own_folder",
    "hooks",
    "settings",
    "memories",
    "shell_startup",
    "git",
    "mcp_and_plugins",
    "sign_in",
    "ssh",
    "environ",
    "ptrace",
    "signals",
    "sockets",
    "links",
    "tag",
    "tmp",
    "daemon",
    "forks",
];

/// What must never be said to an agent of another.
const SECRETS: [&str; 5] = ["the-diary", "of-the-user", "of-another-app", "SQLite format", ADMIN];

/// A home with all that is worth an attack.
fn furnish(home: &Path) {
    for (file, content) in [
        (".claude/settings.json", r#"{"permissions": {"allow": ["Bash"]}}"#),
        (".claude/CLAUDE.md", "Be kind."),
        (".claude/skills/x/SKILL.md", "x"),
        (".claude/agents/x.md", "x"),
        (".claude/commands/x.md", "x"),
        (".claude/rules/x.md", "x"),
        (".claude/plugins/installed_plugins.json", "{}"),
        (".claude/projects/x/x.jsonl", "of-the-user"),
        (".claude.json", r#"{"projects": {"/of-the-user": {}}}"#),
        (".bashrc", "# of-the-user"),
        (".profile", "# of-the-user"),
        (".config/fish/config.fish", "# of-the-user"),
        (".gitconfig", "[user]\nname = of-the-user"),
        (".git-credentials", "of-the-user"),
        ("project/.git/hooks/pre-commit", "# of-the-user"),
        (".ssh/id_ed25519", "of-the-user"),
        (".ssh/authorized_keys", "of-the-user"),
    ] {
        let file = home.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }
    sign_in(home, 0);
}

fn sign_in(home: &Path, number: usize) {
    let oauth = json!({"accessToken": format!("access-{number}"), "refreshToken": "refresh-of-the-user", "expiresAt": 9_999_999_999_999_u64, "scopes": ["user:inference"]});
    fs::write(home.join(".claude/.credentials.json"), json!({"claudeAiOauth": oauth}).to_string()).unwrap();
}

/// Each file below a folder with what it holds.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in folder.read_dir().unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            all.extend(content(&entry.path()));
        } else {
            all.insert(entry.path(), fs::read(entry.path()).unwrap_or_default());
        }
    }
    all
}

/// A server with a victim: another app with a session, an upload and a file of its own.
struct Scene {
    forge: Forge,
    /// What an attempt has to know.
    variables: String,
    victim: String,
    session: Value,
}

impl Scene {
    /// None where the sandbox can't be had, or the CLIs, which is said aloud.
    async fn set(options: Options) -> Option<Self> {
        let home = tempfile::tempdir().unwrap();
        furnish(home.path());
        let forge = Forge::start_at(options, home, |options, _| options.start()).await?;
        let server = &forge.server;
        if server.get("/healthz", "").await.json["sandbox"] == "off" {
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{}", server.log());
            say("SKIPPED: the attacks were not tried, because this machine has no sandbox");
            return None;
        }
        let victim = server.mint("victim").await;
        server.upload(&victim, "secret.txt", "of-another-app").await;
        let session = server.post("/sessions", &victim, &json!({})).await.json;
        let other = session["cwd"].as_str().unwrap().to_owned();
        fs::write(Path::new(&other).join("diary.txt"), "the-diary").unwrap();
        turn(server, &victim, &session, "quince-prompt").await;
        let agent = server.agents().into_iter().find(|pid| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains("--input-format"))
        });
        let variables = [
            ("DATA", server.data().display().to_string()),
            ("USER_HOME", forge.home.path().display().to_string()),
            ("SERVER", server.pid().to_string()),
            ("ADDRESS", server.address().to_string()),
            ("OTHER", other),
            ("OTHER_AGENT", agent.unwrap().to_string()),
        ];
        let variables = variables.map(|(name, value)| format!("export {name}='{value}'; ")).concat();
        Some(Self { forge, variables, victim, session })
    }

    /// Has an attempt made, as a run and as a session. Gives what each said.
    async fn attempt(&self, name: &str, token: &str, more: &str) -> [String; 2] {
        let answers = self.answers(name, token, more).await;
        [0, 1].map(|at| {
            let answer = &answers[at];
            assert_eq!(answer.status, StatusCode::OK, "{name}: {answer:?}\n{}", self.forge.server.log());
            answer.json[["result", "text"][at]].as_str().unwrap().to_owned()
        })
    }

    /// How the run and the session's turn ended in which an attempt is made.
    async fn answers(&self, name: &str, token: &str, more: &str) -> [Answer; 2] {
        let server = &self.forge.server;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attacks");
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap().leak() as &'static str;
        let upload = async |name: &str| server.upload(token, name, read(name)).await;
        let files = [upload("lib.sh").await, upload(&format!("{name}.sh")).await];
        let command = format!("{}{more}bash {name}.sh", self.variables);
        let tool = json!({"tool": {"name": "Bash", "input": {"command": command, "description": "test", "timeout": 100_000}}});
        let body = json!({"prompt": format!("stub: {tool}"), "files": files});
        let session = server.post("/sessions", token, &json!({})).await.json;
        let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
        let (run, turn) = tokio::join!(server.post("/run", token, &body), server.post(&path, token, &body));
        let close = server.request(reqwest::Method::DELETE, path.trim_end_matches("/turn"), token);
        assert_eq!(Answer::of(close).await.status, StatusCode::OK);
        [run, turn]
    }
}

async fn turn(server: &Server, token: &str, session: &Value, prompt: &str) -> String {
    let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
    let answer = server.post(&path, token, &json!({"prompt": prompt})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["text"].as_str().unwrap().to_owned()
}

/// Nothing was reached and nothing lost, and something was tried.
fn judge(name: &str, told: &str) {
    let failed: Vec<_> = told.lines().filter(|line| line.starts_with("REACHED") || line.starts_with("LOST")).collect();
    assert!(failed.is_empty(), "{name}: {failed:#?}\n{told}");
    assert!(told.lines().any(|line| line.starts_with("held: ") || line.starts_with("kept: ")), "{name} was not tried: {told}");
    for secret in SECRETS {
        assert!(!told.contains(secret), "{name} learnt {secret}: {told}");
    }
}

#[tokio::test]
async fn an_agent_reaches_its_own_and_nothing_else() {
    let Some(scene) = Scene::set(Options::default().set("CLAWDFORGE_STANDBY", 1).set("ANTHROPIC_API_KEY", "")).await else { return };
    let (server, token) = (&scene.forge.server, &scene.forge.token);
    let home = scene.forge.home.path();
    let abstract_one = SocketAddr::from_abstract_name("victim-of-attacks").unwrap();
    let _listener = UnixListener::bind_addr(&abstract_one);
    let _keys = UnixListener::bind(home.join("agent.sock")).unwrap();
    let shared = tempfile::Builder::new().prefix("victim-of-attacks-").tempdir_in("/tmp").unwrap();
    fs::write(shared.path().join("file"), "of-another-app").unwrap();
    let before = content(home);
    // What only newer kernels can close.
    let can_scope = fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| {
        let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        (numbers.next(), numbers.next()) >= (Some(6), Some(12))
    });
    let attempts = ATTEMPTS.iter().filter(|name| **name != "signals" || can_scope);
    let scene = &scene;
    let variables = &format!("export SHARED='{}'; ", shared.path().display());
    let trying = stream::iter(attempts).for_each_concurrent(2, |name| async move {
        for told in scene.attempt(name, token, variables).await {
            judge(name, &told);
        }
    });
    // It is handed out anew all the time, whatever stands in the way.
    let renewing = async {
        for number in 0.. {
            sign_in(home, number);
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        () = trying => {}
        () = renewing => {}
    }
    sign_in(home, 0);
    assert_eq!(content(home), before, "the home has changed");
    let names: Vec<_> = server.data().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let known = ["claude-of-session", "feeds", "files", "lock", "network.sock", "runs", "sessions", "sign-in"];
    assert!(names.iter().all(|name| name.starts_with("clawdforge.db") || known.contains(&&**name)), "{names:?}");
    assert_eq!(fs::read_to_string(Path::new(scene.session["cwd"].as_str().unwrap()).join("diary.txt")).unwrap(), "the-diary");
    // The other goes on, nothing that was planted runs in it, and nothing of the attempts is left.
    turn(server, &scene.victim, &scene.session, "And now?").await;
    assert_eq!(server.run(&scene.victim, "Hello.").await.status, StatusCode::OK);
    // What has no mark, or a false one, ends with the last that it may be of.
    let close =
        server.request(reqwest::Method::DELETE, &format!("/sessions/{}", scene.session["session_id"].as_str().unwrap()), &scene.victim);
    assert_eq!(Answer::of(close).await.status, StatusCode::OK);
    until("nothing of the attempts", || !server.running("sleep\x00633")).await;
    until("empty rooms", || server.data().join("runs").read_dir().unwrap().count() <= 1).await;
}

#[tokio::test]
async fn a_bound_agent_reaches_its_model_alone() {
    let Some(scene) = Scene::set(Options::default()).await else { return };
    let server = &scene.forge.server;
    let minted = server.post("/admin/tokens", ADMIN, &json!({"name": "bound", "network": "model"})).await;
    let Some(token) = minted.json["token"].as_str() else {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{minted:?}");
        return say("SKIPPED: the attacks by the network were not tried, because this machine has no network namespaces");
    };
    let near = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let variables = format!("export NEAR={}; ", near.local_addr().unwrap());
    for told in scene.attempt("network", token, &variables).await {
        judge("network", &told);
    }
    for name in ["daemon", "sockets"] {
        for told in scene.attempt(name, token, "").await {
            judge(name, &told);
        }
    }
    assert!(timeout(Duration::ZERO, near.accept()).await.is_err(), "somebody came");
    settled("the victim's agents", server.agents().len(), || server.agents()).await;
}

#[tokio::test]
async fn a_hog_hurts_itself_alone() {
    let options = Options::default().set("CLAWDFORGE_AGENT_DISK_MB", 100).set("CLAWDFORGE_AGENT_MEMORY_MB", 1500);
    let Some(scene) = Scene::set(options).await else { return };
    let (server, token) = (&scene.forge.server, &scene.forge.token);
    for (name, why) in [("disk", "more than 100 MiB of the disk"), ("memory", "more than 1500 MiB of memory")] {
        let (ended, ()) = tokio::join!(scene.answers(name, token, ""), async {
            assert_eq!(server.run(&scene.victim, "Hello.").await.status, StatusCode::OK);
        });
        for answer in ended {
            assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{name}: {answer:?}");
            assert!(answer.json["error"].as_str().unwrap().contains(why), "{name}: {answer:?}");
        }
    }
    turn(server, &scene.victim, &scene.session, "And now?").await;
}
