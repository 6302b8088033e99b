//! What an agent with a shell can't do, with the real CLIs.

use std::io::Write;
use std::path::Path;

use clawdforge::agent::sandbox::{self, Impossible};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server, by_acpx, settled, until};
use crate::{Forge, clis};

/// Without Landlock the caller is to return: the test is skipped, which is said aloud.
async fn sandboxed(options: Options) -> Option<Forge> {
    if let Err(error @ Impossible::Unsupported) = sandbox::check(&["/var/lib/clawdforge".into()]) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: a test of the sandbox did not run: {error}");
        return None;
    }
    // The folder of the build may be in /tmp itself.
    let outside = |options: Options, _: &Path| options.start_below(Path::new(env!("CARGO_TARGET_TMPDIR")));
    Forge::start_at(options.set("CLAWDFORGE_SANDBOX", "required").set("CLAWDFORGE_STANDBY", 1), tempfile::tempdir().unwrap(), outside).await
}

async fn session(server: &Server, token: &str) -> Value {
    server.post("/sessions", token, &json!({})).await.json
}

/// Has the session's agent run a command in its shell. Gives what the command printed.
async fn shell(server: &Server, token: &str, session: &Value, command: &str) -> String {
    let tool = json!({"tool": {"name": "Bash", "input": {"command": format!("({command}) 2>&1; true"), "description": "test"}}});
    let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
    let answer: Answer = server.post(&path, token, &json!({"prompt": format!("stub: {tool}")})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", server.log());
    answer.json["text"].as_str().unwrap().to_owned()
}

// What is the same for all agents is tried in `tests/attacks`.
#[tokio::test]
async fn an_agent_does_not_reach_what_acpx_has_and_acpx_reads_nothing_of_its() {
    let Some(forge) = sandboxed(Options::default()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let other = server.mint("other").await;
    let victim = session(server, &other).await;
    shell(server, &other, &victim, "echo quince > diary.txt").await;
    let mine = session(server, token).await;
    let diary = format!("{}/diary.txt", victim["cwd"].as_str().unwrap());
    let room = Path::new(&diary).ancestors().nth(2).unwrap().display();
    // acpx's owner speaks with whoever reaches its socket.
    let connect = "net=require('net'); fs=require('fs'); \
        for (const path of fs.readFileSync('/proc/net/unix', 'utf8').match(/[/]tmp[/]acpx-.*sock$/gm)) \
            net.connect(path).on('error', e => console.log(e.code, 'denied', path)).on('connect', () => console.log('quince'))";
    for (what, command) in [
        ("read what acpx keeps of another", format!("cat {room}/home/.acpx/sessions/*; ls {room}/home")),
        // Without acpx there is no such socket.
        ("speak with its agent", if by_acpx() { format!("node -e \"{connect}\"") } else { "echo cannot".to_owned() }),
        ("take its agent's socket away", "rm -rf /tmp/acpx-*/*; ls /tmp/acpx-*/; mv /tmp/acpx-* moved".to_owned()),
        ("have acpx start something else", "echo x > ../home/.acpx/config.json; ls ../home".to_owned()),
        ("have acpx read settings", "echo x > .acpxrc.json; echo x > ../.acpxrc.json; mkdir ../x".to_owned()),
    ] {
        let told = shell(server, token, &mine, &command).await;
        assert!(["denied", "not permitted", "cannot", "No such file"].iter().any(|no| told.contains(no)), "{what}: {told}");
        assert!(!told.contains("quince"), "{what}: {told}");
    }

    // What stands in its own folder is nothing to acpx when that starts again.
    let pwned = Path::new(mine["cwd"].as_str().unwrap()).join("pwned");
    let preload = format!(
        r#"{{"auth": {{"NODE_OPTIONS": "--require={0}/evil.js"}}, "agents": {{"claude": {{"command": "touch {0}/pwned"}}}}}}"#,
        mine["cwd"].as_str().unwrap()
    );
    let evil = format!("echo 'require(\"fs\").writeFileSync(\"{}\", \"\")' > evil.js; echo '{preload}' > .acpxrc.json", pwned.display());
    shell(server, token, &mine, &evil).await;
    let owners = server.agents();
    for pid in owners {
        let cmdline = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if cmdline.contains("queue-owner") {
            rustix::process::kill_process(rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(), rustix::process::Signal::KILL)
                .unwrap();
        }
    }
    assert!(shell(server, token, &mine, "cat evil.js").await.contains("writeFileSync"));
    assert!(!pwned.exists(), "the agent's settings were acpx's");
    assert!(shell(server, &other, &victim, "cat diary.txt").await.contains("quince"));
}

#[tokio::test]
async fn nothing_of_an_apps_stands_on_a_command_line() {
    let Some(forge) = sandboxed(Options::default()).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let other = server.mint("other").await;
    let mine = session(server, token).await;
    // Every process can read the others'.
    let body = json!({"prompt": "stub: {\"delay_ms\": 3000}", "system": "of-the-system", "schema": {"description": "of-the-schema"}});
    let (_, told) = tokio::join!(server.post("/run", &other, &body), async {
        until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
        shell(
            server,
            token,
            &mine,
            r"cat /proc/[0-9]*/cmdline | tr '\0' '\n' | grep -e of-the-s[y] -e of-the-s[c] -e /session[s]/ -e /run[s]/ || echo none",
        )
        .await
    });
    assert!(told.contains("none"), "{told}");
    assert!(server.query::<String>("SELECT prompt FROM runs").contains("delay_ms"));
}

#[tokio::test]
async fn runs_are_confined_and_sessions_resume_after_a_restart() {
    let Some(forge) = sandboxed(Options::default()).await else { return };
    let Forge { server, token, home, stub: _stub } = forge;
    std::fs::create_dir_all(home.path().join(".claude")).unwrap();
    std::fs::write(home.path().join(".claude/settings.json"), r#"{"permissions": {"allow": ["Bash"]}}"#).unwrap();
    let ledger = server.data().join("clawdforge.db");
    let cat = json!({"tool": {"name": "Bash", "input": {"command": format!("cat {} || pwd", ledger.display()), "description": "test"}}});
    for _ in 0..2 {
        let file = server.upload(&token, "note.txt", "of its own").await;
        let answer = server.post("/run", &token, &json!({"prompt": format!("stub: {cat}"), "files": [file]})).await;
        let result = answer.json["result"].as_str().unwrap();
        assert!(result.contains("denied") && result.contains("/runs/") && !result.contains("SQLite"), "{answer:?}");
    }
    let kept = session(&server, &token).await;
    shell(&server, &token, &kept, "echo medlar > fruit").await;
    let server = server.crash_and_restart();
    assert!(shell(&server, &token, &kept, "cat fruit").await.contains("medlar"));
    // The conversation goes on too, and is kept nowhere but with the session.
    let path = format!("/sessions/{}/turn", kept["session_id"].as_str().unwrap());
    let told = server.post(&path, &token, &json!({"prompt": "stub: {\"echo\": true}"})).await;
    assert!(told.json["text"].as_str().unwrap().contains("echo medlar > fruit"), "{told:?}");
    for place in [".acpx", ".claude/projects"] {
        assert!(!home.path().join(place).exists(), "{place}");
    }
}

#[tokio::test]
async fn the_sandbox_is_on_below_the_home_folder_and_in_tmp() {
    let elsewhere = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for home in [elsewhere, tempfile::tempdir().unwrap()] {
        std::fs::create_dir_all(home.path().join(".config")).unwrap();
        std::fs::write(home.path().join(".bashrc"), "true\n").unwrap();
        std::fs::write(home.path().join(".claude.json"), r#"{"projects": {"/a": {}}}"#).unwrap();
        let forge = Forge::start_at(Options::default().set("CLAWDFORGE_STANDBY", 1), home, Options::start_below).await;
        let Some(Forge { server, token, home, .. }) = &forge else { return };
        if server.get("/healthz", "").await.json["sandbox"] == "off" {
            let _ = writeln!(std::io::stderr(), "SKIPPED: a test of the sandbox did not run");
            return;
        }
        assert_eq!(server.run(token, "Hello.").await.status, StatusCode::OK);
        let mine = session(server, token).await;
        for _ in 0..2 {
            let (data, home) = (server.data().display().to_string(), home.path().display());
            let attack = format!(
                "head -c 15 {data}/clawdforge.db; ls {data}; echo x > {data}/planted; echo mine > mine; cat mine {home}/.bashrc; \
                 for place in .bashrc planted .config/planted .claude.json; do echo x >> {home}/$place; done; echo x > ~/mine; cat ~/mine"
            );
            let told = shell(server, token, &mine, &attack).await;
            assert!(told.contains("mine\n") && told.ends_with('x') && told.matches("denied").count() == 8, "{told}");
            assert!(!told.contains("SQLite") && !told.contains("true\n"), "{told}");
        }
        // Nothing is left in it, and nothing changed: what claude writes down is in the sessions' and the runs' own folders.
        let mut names: Vec<_> = home.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != ".claude" && !server.folder().ends_with(name));
        names.sort();
        assert_eq!(names, [".bashrc", ".claude.json", ".config"]);
        assert_eq!(std::fs::read_to_string(home.path().join(".claude.json")).unwrap(), r#"{"projects": {"/a": {}}}"#);
    }
}

#[tokio::test]
async fn a_file_grows_no_larger_than_the_disk_bound_however_fast() {
    let Some(forge) = sandboxed(Options::default().set("CLAWDFORGE_AGENT_DISK_MB", 50)).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let mine = session(server, token).await;
    let tool = json!({"tool": {"name": "Bash", "input": {"command": "yes > large; ulimit -c; sleep 60", "description": "test"}}});
    let path = format!("/sessions/{}/turn", mine["session_id"].as_str().unwrap());
    let ended = server.post(&path, token, &json!({"prompt": format!("stub: {tool}")})).await;
    assert_eq!(ended.status, StatusCode::BAD_GATEWAY, "{ended:?}");
    assert!(ended.json["error"].as_str().unwrap().contains("more than 50 MiB of the disk"), "{ended:?}");
    let large = Path::new(mine["cwd"].as_str().unwrap()).join("large");
    assert!((1..=50 << 20).contains(&large.metadata().unwrap().len()), "{:?}", large.metadata());
}

#[tokio::test]
async fn a_sign_in_can_be_used_and_not_be_renewed_and_a_new_one_is_handed_out() {
    let Some(forge) = sandboxed(Options::default().set("ANTHROPIC_API_KEY", "")).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let config = forge.home.path().join(".claude");
    std::fs::create_dir_all(&config).unwrap();
    let sign_in = |key: &str| {
        let oauth = json!({"accessToken": key, "refreshToken": "r", "expiresAt": 9_999_999_999_999_u64, "scopes": ["user:inference"]});
        let _ = std::fs::remove_file(config.join(".credentials.json"));
        std::fs::write(config.join(".credentials.json"), json!({"claudeAiOauth": oauth}).to_string()).unwrap();
    };
    sign_in("first");
    let created = session(server, token).await;
    let path = format!("/sessions/{}/turn", created["session_id"].as_str().unwrap());
    let credential = async || server.post(&path, token, &json!({"prompt": "stub: {\"credential\": true}"})).await;
    let told = credential().await;
    assert!(told.json["text"].as_str().unwrap().contains("Bearer first"), "{told:?}");
    // Another sign-in, of the operator or of a renewal, is at once that of agents which live.
    sign_in("second");
    let copy = Path::new(created["cwd"].as_str().unwrap()).with_file_name("config").join(".credentials.json");
    until("the copy is the new one", || std::fs::read_to_string(&copy).is_ok_and(|copy| copy.contains("second"))).await;
    let told = credential().await;
    assert!(told.json["text"].as_str().unwrap().contains("Bearer second"), "{told:?}");
    let theirs = format!(
        "cat $CLAUDE_CONFIG_DIR/.credentials.json; for what in cat 'echo x >'; do eval $what {}; done",
        config.join(".credentials.json").display()
    );
    let told = shell(server, token, &created, &theirs).await;
    assert!(told.contains(r#""accessToken":"second""#) && !told.contains("refreshToken") && told.matches("denied").count() == 2, "{told}");
}

#[tokio::test]
async fn a_key_in_the_users_state_is_the_next_agents() {
    let Some(forge) = Forge::start_with(Options::default().set("ANTHROPIC_API_KEY", "")).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    let sign_in = |key: &str| std::fs::write(forge.home.path().join(".claude.json"), json!({"primaryApiKey": key}).to_string()).unwrap();
    sign_in("first");
    let created = session(server, token).await;
    let path = format!("/sessions/{}/turn", created["session_id"].as_str().unwrap());
    for key in ["first", "second"] {
        sign_in(key);
        for pid in server.agents() {
            let _ =
                rustix::process::kill_process(rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(), rustix::process::Signal::KILL);
        }
        settled("no agent", 0, || server.agents()).await;
        let told = server.post(&path, token, &json!({"prompt": "stub: {\"credential\": true}"})).await;
        assert!(told.json["text"].as_str().unwrap_or_default().contains(key), "{told:?}");
    }
}

#[tokio::test]
async fn programs_in_the_home_run_and_nothing_else_in_it_is_read() {
    // In which the CLIs are, and this server's own program.
    let home = env!("CARGO_MANIFEST_DIR");
    let config = tempfile::tempdir().unwrap();
    let options = Options::default().set("HOME", home).set("CLAUDE_CONFIG_DIR", config.path().display());
    let Some(forge) = sandboxed(options).await else { return };
    let (server, token) = (&forge.server, &forge.token);
    assert_eq!(server.run(token, "Hello.").await.status, StatusCode::OK, "{}", server.log());
    let mine = session(server, token).await;
    let told = shell(server, token, &mine, &format!("node --version; head -c 9 {home}/Cargo.toml; ls {home}; ls {home}/src")).await;
    assert!(told.contains("v2") && told.matches("denied").count() == 3 && !told.contains("[package]"), "{told}");
}

#[tokio::test]
async fn a_program_that_lies_in_the_home_itself_opens_nothing_beside_it() {
    let Some(clis) = clis() else { return };
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let claude = home.path().join("claude");
    std::fs::hard_link(clis.claude.canonicalize().unwrap(), &claude).unwrap();
    std::fs::write(home.path().join("diary"), "quince").unwrap();
    let options = Options::default().set("CLAUDE_CODE_EXECUTABLE", claude.display());
    let Some(forge) = Forge::start_at(options, home, Options::start_below).await else { return };
    let Forge { server, token, home, .. } = &forge;
    if server.get("/healthz", "").await.json["sandbox"] == "off" {
        let _ = writeln!(std::io::stderr(), "SKIPPED: a test of the sandbox did not run");
        return;
    }
    let mine = session(server, token).await;
    let told = shell(server, token, &mine, &format!("ls {0}; cat {0}/diary; echo mine", home.path().display())).await;
    assert!(told.contains("mine") && told.matches("denied").count() == 2 && !told.contains("quince"), "{told}");
}
