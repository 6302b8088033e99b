//! The operator's commands.

use std::path::Path;
use std::process::{Command, Output};

use reqwest::StatusCode;

use crate::harness::{Options, Server};

fn clawdforge(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_clawdforge"));
    command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", home.path()).current_dir(home.path());
    let output = command.envs(variables.iter().copied()).output().unwrap();
    assert!(home.path().read_dir().unwrap().all(|entry| entry.unwrap().file_name() == "data"), "something was written into the home");
    output
}

fn on(server: &Server, arguments: &[&str]) -> (bool, String, String) {
    let output = clawdforge(arguments, &[("CLAWDFORGE_DATA_DIR", server.data().to_str().unwrap())]);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn tokens_are_managed_beside_a_running_server() {
    let server = Options::stand_in().start();
    let (created, token, told) =
        on(&server, &["token", "create", "app", "--cidr", "127.0.0.0/8", "--max-concurrent", "3", "--daily-usd", "2.5"]);
    assert!(created && told.contains("only time"), "{told}");
    assert_eq!(server.run(token.trim(), "hello").await.status, StatusCode::OK);
    let (_, list, _) = on(&server, &["token", "list"]);
    assert!(list.contains("app ") && list.contains("127.0.0.0/8") && list.contains(" 2.5 ") && !list.contains("cf_"), "{list}");
    let (again, _, told) = on(&server, &["token", "create", "app"]);
    assert!(!again && told.contains("in use"), "{told}");
    let (wrong, _, told) = on(&server, &["token", "create", "b", "--daily-usd", "much"]);
    assert!(!wrong && told.contains("--daily-usd"), "{told}");
    let (wrong, _, told) = on(&server, &["token", "create", "b", "--cidr", "10.0.0.0/99"]);
    assert!(!wrong && told.contains("10.0.0.0/99"), "{told}");
    let (changed, _, told) = on(&server, &["token", "change", "app", "--max-concurrent", "any", "--daily-usd", "7", "--home", "kept"]);
    assert!(changed, "{told}");
    let (_, list, _) = on(&server, &["token", "list"]);
    assert!(list.contains(" any ") && list.contains(" 7 ") && list.contains(" kept ") && list.contains("127.0.0.0/8"), "{list}");
    assert!(!on(&server, &["token", "change", "app", "--max-concurrent", "0"]).0 && !on(&server, &["token", "change", "nobody"]).0);
    let (rotated, second, told) = on(&server, &["token", "rotate", "app", "--grace-secs", "0"]);
    assert!(rotated && told.contains("only time"), "{told}");
    server.run(token.trim(), "hello").await.problem(401);
    let token = second;
    assert_eq!(server.run(token.trim(), "hello").await.status, StatusCode::OK);
    assert!(on(&server, &["token", "revoke", "app"]).0);
    server.run(token.trim(), "hello").await.problem(401);
    let (unknown, _, told) = on(&server, &["token", "revoke", "nobody"]);
    assert!(!unknown && told.contains("nobody"), "{told}");
}

#[tokio::test]
async fn the_health_check_follows_the_server() {
    let server = Options::stand_in().start();
    let address = server.address().to_string();
    assert!(clawdforge(&["healthcheck"], &[("CLAWDFORGE_BIND", &address)]).status.success());
    let refusing = Options::stand_in().set("CLAWDFORGE_ALLOW_CIDRS", "10.0.0.0/8").start();
    assert!(clawdforge(&["healthcheck", "--bind", &refusing.address().to_string()], &[]).status.success());
    drop(server);
    let output = clawdforge(&["healthcheck"], &[("CLAWDFORGE_BIND", &address)]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_start_that_can_not_be_right_is_one_sentence() {
    for (variable, value) in [
        ("CLAWDFORGE_BIND", "8800"),
        ("CLAWDFORGE_MAX_RUNS", "many"),
        ("CLAWDFORGE_ADMIN_TOKEN", "short"),
        ("CLAWDFORGE_ALLOW_CIDRS", "10.0.0.0/8;192.168.0.0/16"),
        ("CLAWDFORGE_DATA_DIR", "/proc/nowhere"),
        ("CLAWDFORGE_LOG", "xml"),
        ("CLAWDFORGE_SANDBOX", "maybe"),
        ("CLAWDFORGE_AGENTS_READ", "bin"),
        ("CLAWDFORGE_AGENTS_READ", "/"),
        ("CLAWDFORGE_MODEL_HOSTS", "http://gateway.lan"),
        ("CLAWDFORGE_AGENT_PROCESSES", "1"),
        ("CLAWDFORGE_UI", "maybe"),
    ] {
        let output = clawdforge(
            &["serve"],
            &[(variable, value), ("CLAWDFORGE_BIND", if variable == "CLAWDFORGE_BIND" { value } else { "127.0.0.1:0" })],
        );
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(told.contains(variable) && told.trim().lines().count() == 1, "{told}");
    }
}

#[tokio::test]
async fn two_servers_can_not_share_a_port_or_a_data_folder() {
    let server = Options::stand_in().start();
    let address = server.address().to_string();
    let output = clawdforge(&["serve"], &[("CLAWDFORGE_BIND", &address)]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && told.contains("CLAWDFORGE_BIND"), "{told}");
    let output = clawdforge(&["serve", "--bind", "127.0.0.1:0"], &[("CLAWDFORGE_DATA_DIR", server.data().to_str().unwrap())]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && told.contains("another clawdforge"), "{told}");
}

#[test]
fn the_doctor_says_what_to_do_about_each_trouble() {
    let output = clawdforge(&["doctor", "--bind", "127.0.0.1:0"], &[("CLAWDFORGE_CLAUDE_BIN", "no-such-claude")]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("FAILED   claude") && told.contains("npm install -g @anthropic-ai/claude-code"), "{told}");
    assert!(told.contains("warning  data folder: ./data is not there yet") && told.contains("ok       port"), "{told}");
    let settings = [("CLAWDFORGE_SANDBOX", "off"), ("CLAWDFORGE_AGENT_DISK_MB", "30")];
    let told = String::from_utf8(clawdforge(&["doctor", "--bind", "127.0.0.1:0"], &settings).stdout).unwrap();
    for (what, how) in [
        ("the ledger", "open: CLAWDFORGE_SANDBOX is \"off\""),
        ("the network, for apps whose token says", "open: CLAWDFORGE_SANDBOX is \"off\""),
        ("more memory", "open: set CLAWDFORGE_AGENT_MEMORY_MB"),
        ("more disk", "ended past 30 MiB"),
    ] {
        assert!(told.lines().any(|line| line.trim_start().starts_with(what) && line.contains(how)), "{what}: {told}");
    }
}

#[test]
fn every_command_shows_an_example() {
    for command in ["serve", "token", "doctor", "healthcheck", "demo"] {
        let help = String::from_utf8(clawdforge(&[command, "--help"], &[]).stdout).unwrap();
        assert!(help.contains("Example:\n") && help.contains(&format!("clawdforge {command}")), "{help}");
    }
}

#[tokio::test]
async fn a_backup_is_taken_beside_a_running_server_and_restored_elsewhere() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    let elsewhere = tempfile::tempdir().unwrap();
    let [file, data] = ["copy.db", "data"].map(|name| elsewhere.path().join(name).display().to_string());
    let (taken, _, told) = on(&server, &["backup", &file]);
    assert!(taken, "{told}");
    let (again, _, told) = on(&server, &["backup", &file]);
    assert!(!again && told.contains("there already"), "{told}");
    assert_eq!(elsewhere.path().read_dir().unwrap().count(), 1, "a backup is a single file");
    let streamed = clawdforge(&["backup", "-"], &[("CLAWDFORGE_DATA_DIR", server.data().to_str().unwrap())]);
    assert_eq!(streamed.stdout, std::fs::read(&file).unwrap());

    // A run that is not in the backup, in the ledger that it replaces.
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    let (busy, _, told) = on(&server, &["restore", &file]);
    assert!(!busy && told.contains("another clawdforge serves"), "{told}");
    let later = elsewhere.path().join("later.db").display().to_string();
    assert!(on(&server, &["backup", &later]).0);
    for (restored, runs) in [(&later, 2), (&file, 1)] {
        let output = clawdforge(&["restore", restored, "--data-dir", &data], &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let ledger = rusqlite::Connection::open(Path::new(&data).join("clawdforge.db")).unwrap();
        assert_eq!(ledger.query_row("SELECT count(*) FROM runs", [], |row| row.get::<_, i64>(0)).unwrap(), runs);
    }
    let entries = || Path::new(&data).read_dir().unwrap().map(|entry| entry.unwrap().path());
    let aside = entries().find(|path| path.to_string_lossy().contains("clawdforge.db.replaced-")).expect("the one that was replaced");
    let aside = rusqlite::Connection::open(aside).unwrap();
    assert_eq!(aside.query_row("SELECT count(*) FROM runs", [], |row| row.get::<_, i64>(0)).unwrap(), 2);

    // A ledger that is lost while the rest of the data folder is there, and a copy that was cut short.
    std::fs::remove_file(Path::new(&data).join("clawdforge.db")).unwrap();
    std::fs::create_dir(Path::new(&data).join("sessions")).unwrap();
    std::fs::write(Path::new(&data).join(".partial-x"), "half").unwrap();
    let lost = clawdforge(&["serve", "--data-dir", &data, "--bind", "127.0.0.1:0"], &[]);
    assert!(String::from_utf8_lossy(&lost.stderr).contains("clawdforge restore"), "{lost:?}");
    assert!(clawdforge(&["restore", &file, "--data-dir", &data], &[]).status.success());
    let foreign = clawdforge(&["restore", &file, "--data-dir", elsewhere.path().to_str().unwrap()], &[]);
    assert!(String::from_utf8_lossy(&foreign.stderr).contains("holds other things"), "{foreign:?}");

    rusqlite::Connection::open(elsewhere.path().join("foreign.db")).unwrap().execute_batch("CREATE TABLE a (x)").unwrap();
    let mut damaged = std::fs::read(&file).unwrap();
    damaged[5000..9000].fill(7);
    std::fs::write(elsewhere.path().join("damaged.db"), damaged).unwrap();
    std::fs::write(elsewhere.path().join("text.db"), "no database at all, but a text").unwrap();
    for wrong in ["foreign.db", "damaged.db", "text.db", "nowhere.db"] {
        let wrong = elsewhere.path().join(wrong).display().to_string();
        let output = clawdforge(&["restore", &wrong, "--data-dir", &data], &[]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && told.contains(&wrong), "{told}");
    }
    assert!(clawdforge(&["token", "list", "--data-dir", &data], &[]).status.success());
}

#[tokio::test]
async fn runs_and_usage_are_tables() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let id = server.run(&token, "line\nbreak").await.header("x-run-id").to_owned();
    let (listed, table, _) = on(&server, &["runs", "--limit", "5", "--status", "succeeded"]);
    assert!(listed && table.lines().count() == 2, "{table}");
    assert!(table.contains(&id) && table.contains("line break") && table.contains("0.2500"), "{table}");
    let (refused, _, told) = on(&server, &["runs", "--status", "odd"]);
    assert!(!refused && told.contains("--status is none of"), "{told}");
    let (summed, table, _) = on(&server, &["usage", "--app", "app"]);
    assert!(summed && table.lines().count() == 2 && table.contains("sonnet"), "{table}");
}
