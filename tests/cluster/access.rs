//! Who may do what at NATS: the example of docs/nats/nats.conf holds, and agents reach nothing that lets one in.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, push};
use async_nats::jetstream::stream;
use async_nats::{ConnectOptions, Event};
use futures_util::StreamExt;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::harness::{ADMIN, Options, nats_server, until, wait_for};
use crate::{background, is_left_out};

/// A program that ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// The server of the example, on a port of this machine alone, with TLS where it has a certificate.
fn example(folder: &Path, tls: bool) -> (Program, u16) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let example = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/nats/nats.conf")).unwrap();
    let store = folder.join("nats").display().to_string();
    let config = example.replace("0.0.0.0:4222", &format!("127.0.0.1:{port}")).replace("/var/lib/nats", &store);
    assert!(config.contains(&store) && config.contains(&port.to_string()));
    let config = if tls {
        let lines =
            ["tls {", "  cert_file:", "  key_file:", "}"].iter().fold(config, |config, line| config.replace(&format!("#{line}"), line));
        lines.replace("/etc/nats", &folder.display().to_string())
    } else {
        config
    };
    let file = folder.join("nats.conf");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(nats_server().unwrap());
    command.arg("-c").arg(file).envs([("NATS_GATEWAY", "g1"), ("NATS_ATTIC", "a1"), ("NATS_CELLAR", "c1")]);
    let server = Program(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    wait_for(|| std::net::TcpStream::connect(("127.0.0.1", port)));
    (server, port)
}

#[tokio::test]
async fn a_worker_can_do_its_part_and_no_more() {
    if is_left_out() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_nats, port) = example(folder.path(), false);
    let url = |user: &str| format!("nats://{user}@127.0.0.1:{port}");
    let options = || Options::acpx_stand_in().workers(0).set("CLAWDFORGE_MAX_RUNS", 0);
    let server = options().set("CLAWDFORGE_NATS_URL", url("gateway:g1")).start();
    let data = folder.path().join("attic");
    let mut worker = options().command(&["worker", "--worker-name", "attic"], folder.path(), &data);
    worker.env("CLAWDFORGE_NATS_URL", url("attic:a1")).env("CLAWDFORGE_MAX_RUNS", "2").stderr(Stdio::null());
    let worker = Program(worker.spawn().unwrap());
    until("the machine", || server.log().contains("a machine is there")).await;
    let token = server.mint("app").await;
    let file = server.upload(&token, "a.txt", "content").await;
    let answer = server.post("/run", &token, &json!({"prompt": "do: where", "files": [file]})).await;
    assert!(answer.json["result"].as_str().is_some_and(|result| result.contains("a.txt")), "{answer:?}");
    let large = server.post("/run", &token, &json!({"prompt": "x".repeat(1 << 20)})).await;
    assert_eq!(large.status, StatusCode::OK, "{large:?}");
    let session = server.post("/sessions", &token, &json!({})).await.json["session_id"].as_str().unwrap().to_owned();
    let turn = server.post(&format!("/sessions/{session}/turn"), &token, &json!({"prompt": "hello", "files": [file]})).await;
    assert_eq!(turn.status, StatusCode::OK, "{turn:?}");

    // The same user, by hand.
    let refused = Arc::<Mutex<Vec<String>>>::default();
    let told = refused.clone();
    let connecting = ConnectOptions::with_user_and_password("attic".into(), "a1".into()).custom_inbox_prefix("_INBOX_worker-attic");
    let connecting = connecting.event_callback(move |event| {
        if let Event::ServerError(error) = event {
            told.lock().unwrap().push(error.to_string());
        }
        async {}
    });
    let client = connecting.connect(format!("127.0.0.1:{port}")).await.unwrap();
    let mut listens = Vec::new();
    let others =
        ["clawdforge.1.order.cellar", "clawdforge.1.events.>", "clawdforge.1.work.>", "_INBOX_gateway.>", "_INBOX_worker-cellar.>", ">"];
    for subject in others {
        listens.push(client.subscribe(subject).await.unwrap());
    }
    let gateway = server.query::<String>("SELECT name FROM gateway");
    let says = [
        "clawdforge.1.beat.cellar".to_owned(),
        "clawdforge.1.hello".to_owned(),
        "clawdforge.1.order.cellar".to_owned(),
        "clawdforge.1.work.any".to_owned(),
        format!("clawdforge.1.ask.{gateway}.cellar"),
        format!("clawdforge.1.events.{gateway}.cellar.x"),
        format!("clawdforge.1.events.{gateway}._.x"),
        "$JS.API.STREAM.DELETE.clawdforge-1-work".to_owned(),
        "$JS.API.STREAM.PURGE.clawdforge-1-work".to_owned(),
        format!("$JS.API.CONSUMER.CREATE.clawdforge-1-events-{gateway}"),
        "$JS.API.CONSUMER.MSG.NEXT.clawdforge-1-work.on-cellar".to_owned(),
        "$O.clawdforge-1-files.M.x".to_owned(),
    ];
    for subject in says.clone() {
        client.publish(subject, "{}".into()).await.unwrap();
    }
    let all = || refused.lock().unwrap().len() >= others.len() + says.len();
    until("that all of it is refused", all).await;
    for subject in others.iter().map(|subject| (*subject).to_owned()).chain(says) {
        let is_refused = refused.lock().unwrap().iter().any(|said| said.contains(&format!("\"{subject}\"")));
        assert!(is_refused, "{subject}: {refused:?}");
    }
    // What a consumer has delivered as an order is none, although its maker may have it delivered anywhere.
    let hangs = background(&server, &token, "do: hang", "k").await;
    until("the run", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
    let order = format!(r#"{{"cancel":{{"gateway":"{gateway}","job":"{hangs}"}}}}"#);
    let file = server.upload(&token, "order.txt", order.clone().leak()).await;
    assert_eq!(server.post("/run", &token, &json!({"prompt": "hello", "files": [file]})).await.status, StatusCode::OK);
    let mut orders = client.subscribe("clawdforge.1.order.attic").await.unwrap();
    let forged = push::Config {
        deliver_subject: "clawdforge.1.order.attic".to_owned(),
        filter_subject: "$O.clawdforge-1-files.C.>".to_owned(),
        ack_policy: AckPolicy::None,
        ..push::Config::default()
    };
    let jetstream = async_nats::jetstream::new(client.clone());
    jetstream.create_consumer_on_stream(forged, "OBJ_clawdforge-1-files").await.unwrap();
    while orders.next().await.unwrap().payload != order.as_bytes() {}
    // Longer than a run takes to end.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(server.get(&format!("/runs/{hangs}"), &token).await.json["status"], "running");
    let cancelled = server.request(reqwest::Method::DELETE, &format!("/runs/{hangs}"), &token).send().await.unwrap();
    assert_eq!(cancelled.status(), StatusCode::OK);

    let stream = stream::Config { name: "mine".to_owned(), subjects: vec!["mine".to_owned()], ..stream::Config::default() };
    let made = tokio::time::timeout(Duration::from_secs(2), async_nats::jetstream::new(client).create_stream(stream)).await;
    assert!(!matches!(made, Ok(Ok(_))));
    assert_eq!(server.get("/admin/workers", ADMIN).await.json["count"], 1);
    drop(worker);
}

/// A worker of the example.
fn attic(folder: &Path, settings: &[(&str, String)]) -> Program {
    let options = Options::stand_in().workers(0);
    let mut worker = options.command(&["worker", "--worker-name", "attic"], folder, &folder.join("attic"));
    worker.envs(settings.iter().cloned()).env("CLAWDFORGE_MAX_RUNS", "1").stderr(Stdio::null());
    Program(worker.spawn().unwrap())
}

#[tokio::test]
async fn a_server_with_places_of_its_own_shares_the_work_by_tls() {
    if is_left_out() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let [ca, own, secret] = ["ca.pem", "server.pem", "server.key"].map(|name| folder.path().join(name));
    for (file, pem) in [(&ca, authority.pem()), (&own, certificate.pem()), (&secret, key.serialize_pem())] {
        std::fs::write(file, pem).unwrap();
    }
    let (_nats, port) = example(folder.path(), true);
    let url = |user: &str| format!("tls://{user}@127.0.0.1:{port}");
    let ca = ca.display().to_string();
    let options = Options::stand_in().workers(0).set("CLAWDFORGE_MAX_RUNS", 1);
    let server = options.set("CLAWDFORGE_NATS_URL", url("gateway:g1")).set("CLAWDFORGE_NATS_CA", &ca).start();
    let token = server.mint("app").await;
    // One at a time, as long as it is alone.
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    let _worker = attic(folder.path(), &[("CLAWDFORGE_NATS_URL", url("attic:a1")), ("CLAWDFORGE_NATS_CA", ca)]);
    until("the machine", || server.log().contains("a machine is there")).await;
    let begun = std::time::Instant::now();
    let (first, second) = tokio::join!(server.run(&token, "do: wait"), server.run(&token, "do: wait"));
    assert_eq!((first.status, second.status), (StatusCode::OK, StatusCode::OK));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs WHERE worker = 'attic'"), 1);
}

#[tokio::test]
async fn an_agent_reaches_no_credentials() {
    if is_left_out() || clawdforge::agent::sandbox::check(&[]).is_err() {
        return;
    }
    // Where nothing else is closed.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = folder.path().join("nats.creds");
    let seed = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY";
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\na.b.c\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    );
    std::fs::write(&file, credentials).unwrap();
    std::fs::write(folder.path().join("other"), "open").unwrap();
    let options = || Options::stand_in().workers(0).set("CLAWDFORGE_SANDBOX", "required").set("CLAWDFORGE_NATS_URL", "nats://127.0.0.1:1");
    let server = options().set("CLAWDFORGE_NATS_CREDS", file.display()).start();
    let token = server.mint("app").await;
    let read = async |path: &Path| server.run(&token, &format!("do: read {};", path.display())).await.json["result"].take();
    assert_eq!(read(&folder.path().join("other")).await, "open");
    assert_eq!(read(&file).await, "closed");
    let environment = server.run(&token, "do: env").await.json["result"].to_string();
    assert!(!environment.contains("NATS") && !environment.contains("CLAWDFORGE"), "{environment}");
}
