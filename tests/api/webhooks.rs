//! Who is told of what ends in the background.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Answer, Options, Server, until};
use crate::receiver::{Receiver, Says};

/// An app with a webhook: its token, and the secret.
async fn mint(server: &Server, more: &Value) -> (String, String) {
    let mut asked = json!({"name": "app"});
    asked.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let minted = server.post("/admin/tokens", ADMIN, &asked).await;
    assert_eq!(minted.status, StatusCode::OK, "{minted:?}");
    let text = |key: &str| minted.json[key].as_str().unwrap_or_default().to_owned();
    (text("token"), text("webhook_secret"))
}

async fn in_background(server: &Server, token: &str, path: &str, body: &Value) -> Answer {
    Answer::of(server.request(Method::POST, path, token).header("prefer", "respond-async").json(body)).await
}

async fn run(server: &Server, token: &str, body: &Value) -> String {
    let answer = in_background(server, token, "/run", body).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
    answer.json["run_id"].as_str().unwrap().to_owned()
}

async fn deliveries(server: &Server, token: &str) -> Vec<Value> {
    server.get("/webhooks/deliveries", token).await.json["deliveries"].as_array().unwrap().clone()
}

/// Has what waits for its next try tried now.
fn hurry(server: &Server) {
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.busy_timeout(Duration::from_secs(5)).unwrap();
    ledger.execute("UPDATE deliveries SET next_at = unixepoch() WHERE next_at IS NOT NULL", []).unwrap();
}

async fn until_listed(server: &Server, token: &str, what: &str, is_it: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let listed = deliveries(server, token).await;
        if is_it(&listed) {
            return listed;
        }
        assert!(begun.elapsed() < Duration::from_secs(40), "waited too long for {what}: {listed:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn an_end_in_the_background_is_told_signed_and_once() {
    let server = Options::acpx_stand_in().start();
    let receiver = Receiver::start([]).await;
    let (token, secret) = mint(&server, &json!({"webhook": receiver.url("/hook")})).await;
    assert!(secret.starts_with("whsec_"));
    let id = run(&server, &token, &json!({"prompt": "hello"})).await;
    let [first] = receiver.wait_for(1).await.try_into().unwrap();
    assert!(first.is_signed(&secret) && !first.is_signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"));
    assert_eq!((first.path.as_str(), &first.headers["content-type"]), ("/hook", &"application/json".parse().unwrap()));
    let (told, state) = (first.json(), server.get(&format!("/runs/{id}"), &token).await.json);
    assert_eq!(told["type"], "run.finished");
    assert!(told["timestamp"].as_str().unwrap().ends_with('Z'));
    assert!(
        first.body.windows(20).any(|part| part == b"\"data\":{\"run_id\":\"01a"[..20].as_ref()) || told["data"]["run_id"] == id.as_str()
    );
    let mut without = state.clone();
    without["result"] = Value::Null;
    assert_eq!(told["data"], without);
    assert!(!String::from_utf8_lossy(&first.body).contains(&token));

    // The whole of it, elsewhere.
    run(&server, &token, &json!({"prompt": "hello", "webhook": receiver.url("/other?full=1")})).await;
    let other = &receiver.wait_for(2).await[1];
    assert_eq!((other.path.as_str(), &other.json()["data"]["result"]), ("/other?full=1", &state["result"]));
    assert!(other.is_signed(&secret) && other.id() != first.id());

    let session = server.post("/sessions", &token, &json!({})).await.json["session_id"].as_str().unwrap().to_owned();
    let turn = in_background(&server, &token, &format!("/sessions/{session}/turn"), &json!({"prompt": "hello"})).await;
    assert_eq!(turn.status, StatusCode::ACCEPTED, "{turn:?}");
    let turn = receiver.wait_for(3).await[2].json();
    assert_eq!((&turn["type"], &turn["data"]["session_id"], &turn["data"]["turn"]), (&json!("turn.finished"), &json!(session), &json!(1)));
    assert_eq!((&turn["data"]["status"], &turn["data"]["text"]), (&json!("succeeded"), &Value::Null));
    Answer::of(server.request(Method::DELETE, &format!("/sessions/{session}"), &token)).await;
    let closed = receiver.wait_for(4).await[3].json();
    assert_eq!((&closed["type"], &closed["data"]["live"]), (&json!("session.closed"), &json!(false)));

    // What its client waits for is told to nobody.
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    let pinged = server.post("/webhooks/test", &token, &json!({})).await;
    let ping = &receiver.wait_for(5).await[4];
    assert_eq!(
        (ping.json(), ping.id()),
        (
            json!({"type": "ping", "timestamp": ping.json()["timestamp"], "data": {"app_name": "app"}}),
            pinged.json["delivery_id"].as_str().unwrap()
        )
    );
    let listed = until_listed(&server, &token, "all of them", |listed| listed.iter().all(|one| one["status"] == "delivered")).await;
    assert_eq!(
        listed.iter().map(|one| one["event"].as_str().unwrap()).collect::<Vec<_>>(),
        ["ping", "session.closed", "turn.finished", "run.finished", "run.finished"]
    );
    assert!(listed.iter().all(|one| one["attempts"] == 1 && one["error"].is_null()), "{listed:?}");
    assert_eq!(receiver.received().len(), 5);
    let other = server.mint("other").await;
    assert_eq!(deliveries(&server, &other).await.len(), 0);
    let path = format!("/webhooks/deliveries/{}/retry", ping.id());
    server.post(&path, &other, &json!({})).await.problem(404);
    assert_eq!(server.post(&path, &token, &json!({})).await.json["status"], "pending");
    assert_eq!(receiver.wait_for(6).await[5].id(), ping.id());
}

#[tokio::test]
async fn one_that_fails_is_told_again_until_it_is_given_up() {
    let server = Options::stand_in().start();
    let receiver = Receiver::start([500, 503, 500].map(Says::Status)).await;
    let (token, secret) = mint(&server, &json!({"webhook": receiver.url("/")})).await;
    let begun = Instant::now();
    run(&server, &token, &json!({"prompt": "hello"})).await;
    let failed = until_listed(&server, &token, "the failure", |listed| listed.iter().any(|one| one["http_status"] == 500)).await;
    let error = failed[0]["error"].as_str().unwrap();
    assert!(error.starts_with("it answered 500: no no") && error.len() < 230 && failed[0]["status"] == "pending", "{failed:?}");
    let wait = failed[0]["next_at"].as_i64().unwrap() - failed[0]["created_at"].as_i64().unwrap();
    assert!((4..=8).contains(&wait), "{wait}");
    // The first time of itself.
    receiver.wait_for(2).await;
    assert!(begun.elapsed() > Duration::from_secs(4));
    for count in 3..=4 {
        until_listed(&server, &token, "the failure", |listed| {
            listed[0]["attempts"] == count - 1 && listed[0]["next_at"].as_i64() > Some(0)
        })
        .await;
        until("it is due", || {
            hurry(&server);
            receiver.received().len() >= count
        })
        .await;
    }
    let received = receiver.received();
    assert!(received.iter().all(|one| one.id() == received[0].id() && one.body == received[0].body && one.is_signed(&secret)));
    let listed = until_listed(&server, &token, "its arrival", |listed| listed[0]["status"] == "delivered").await;
    assert_eq!((&listed[0]["attempts"], &listed[0]["http_status"], &listed[0]["next_at"]), (&json!(4), &json!(204), &Value::Null));

    // One that always fails is given up, after seven tries.
    let never = Receiver::start(vec![Says::Status(500); 20]).await;
    server.post("/webhooks/test", &token, &json!({"webhook": never.url("/")})).await;
    let begun = Instant::now();
    while deliveries(&server, &token).await[0]["status"] == "pending" {
        assert!(begun.elapsed() < Duration::from_mins(1));
        hurry(&server);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!((&deliveries(&server, &token).await[0]["attempts"], never.received().len()), (&json!(7), 7));
}

#[tokio::test]
async fn one_that_hangs_or_redirects_holds_up_nobody() {
    let server = Options::stand_in().start();
    let (hangs, good) = (Receiver::start(vec![Says::Nothing; 50]).await, Receiver::start([]).await);
    let redirects = Receiver::start([Says::Redirect(good.url("/led-astray"))]).await;
    let (token, _) = mint(&server, &json!({"webhook": good.url("/")})).await;
    let test = async |url: String| server.post("/webhooks/test", &token, &json!({"webhook": url})).await.status;
    for _ in 0..10 {
        assert_eq!(test(hangs.url("/")).await, StatusCode::OK);
    }
    hangs.wait_for(4).await;
    assert_eq!(test(redirects.url("/")).await, StatusCode::OK);
    let begun = Instant::now();
    test(good.url("/")).await;
    good.wait_for(1).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let listed = until_listed(&server, &token, "the redirect", |listed| listed.iter().any(|one| one["http_status"] == 307)).await;
    assert!(listed.iter().any(|one| one["error"].as_str().is_some_and(|error| error.contains("redirect"))));
    // So many at once, and no more.
    assert_eq!((hangs.received().len(), good.received().len()), (4, 1));
    until_listed(&server, &token, "the patience's end", |listed| listed.iter().any(|one| one["error"] == "no answer within 15 s")).await;
}

#[tokio::test]
async fn a_receiver_that_wants_no_more_gets_no_more() {
    let server = Options::stand_in().start();
    let receiver = Receiver::start([Says::Status(410)]).await;
    let (token, _) = mint(&server, &json!({"webhook": receiver.url("/")})).await;
    run(&server, &token, &json!({"prompt": "hello"})).await;
    let listed = until_listed(&server, &token, "the end", |listed| listed.iter().any(|one| one["status"] == "failed")).await;
    assert!(listed[0]["error"].as_str().unwrap().contains("410"));
    let tokens = server.get("/admin/tokens", ADMIN).await.json;
    assert!(tokens["tokens"][0].get("webhook").is_none(), "{tokens}");
    let id = run(&server, &token, &json!({"prompt": "hello"})).await;
    until("its end", || server.query::<i64>(&format!("SELECT count(*) FROM runs WHERE run_id = '{id}' AND ok")) == 1).await;
    assert_eq!((deliveries(&server, &token).await.len(), receiver.received().len()), (1, 1));
}

#[tokio::test]
async fn nothing_is_lost_where_the_receiver_or_the_server_is_away() {
    let server = Options::stand_in().start();
    let away = Receiver::start([]).await;
    let (address, url) = (away.address, away.url("/"));
    drop(away);
    let (token, secret) = mint(&server, &json!({"webhook": url})).await;
    run(&server, &token, &json!({"prompt": "hello"})).await;
    let failed = until_listed(&server, &token, "the failure", |listed| listed.iter().any(|one| one["error"].is_string())).await;
    assert!(failed[0]["error"].as_str().unwrap().contains("nobody could be reached") && failed[0]["http_status"].is_null(), "{failed:?}");
    // One is interrupted by the crash, and that is told, too.
    let interrupted = run(&server, &token, &json!({"prompt": "do: hang"})).await;
    until("it goes on", || server.query::<i64>("SELECT count(*) FROM runs WHERE status = 'running'") == 1).await;
    let server = server.crash_and_restart();
    let receiver = Receiver::start_on(address, []).await;
    until("it is due", || {
        hurry(&server);
        receiver.received().len() >= 2
    })
    .await;
    let told: Vec<_> =
        receiver.received().iter().map(|one| (one.json()["data"]["status"].as_str().unwrap().to_owned(), one.is_signed(&secret))).collect();
    assert!(told.contains(&("succeeded".to_owned(), true)) && told.contains(&("interrupted".to_owned(), true)), "{told:?}");
    assert_eq!(server.get(&format!("/runs/{interrupted}"), &token).await.json["status"], "interrupted");
}

#[tokio::test]
async fn a_webhook_goes_only_where_the_app_can_go() {
    let server = Options::stand_in().start();
    let receiver = Receiver::start([]).await;
    let (token, _) = mint(&server, &json!({"webhook": receiver.url("/")})).await;
    let test = async |token: &str, url: &str| server.post("/webhooks/test", token, &json!({"webhook": url})).await;
    for url in [
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://0.0.0.0/",
        "http://8.8.8.8/",
        "http://2852039166/",
        "ftp://127.0.0.1/",
        "http://a:b@127.0.0.1/",
        "hook",
        "",
    ] {
        let refused = test(&token, url).await;
        refused.problem(422);
        assert_eq!(refused.json["errors"][0]["pointer"], "/webhook", "{url}");
    }
    // By a name that is looked up when it is sent.
    for (url, why) in [
        (server.url("/healthz"), "the server itself"),
        (server.url("/healthz").replace("127.0.0.1", "localhost"), "the server itself"),
        ("http://no-such-host.invalid/".to_owned(), "can't be looked up"),
    ] {
        assert_eq!(test(&token, &url).await.status, StatusCode::OK, "{url}");
        until_listed(&server, &token, why, |listed| {
            listed[0]["url"] == url.as_str() && listed[0]["error"].as_str().is_some_and(|error| error.contains(why))
        })
        .await;
    }
    let bound =
        server.post("/admin/tokens", ADMIN, &json!({"name": "far", "ip_cidrs": ["10.0.0.0/8"], "webhook": "https://10.1.2.3/hook"})).await;
    assert_eq!(bound.status, StatusCode::OK, "{bound:?}");
    for url in ["http://127.0.0.1/", "http://[::1]/", "http://192.168.1.1/"] {
        let refused = Answer::of(server.request(Method::PATCH, "/admin/tokens/far", ADMIN).json(&json!({"webhook": url}))).await;
        refused.problem(422);
    }
    // What it may do now counts, not what it might when it was asked for.
    assert_eq!(test(&token, &receiver.url("/").replace("127.0.0.1", "localhost")).await.status, StatusCode::OK);
    receiver.wait_for(1).await;
    let allowed = Options::stand_in().set("CLAWDFORGE_WEBHOOK_CIDRS", "10.0.0.0/8").start();
    let (token, _) = mint(&allowed, &json!({"webhook": receiver.url("/").replace("127.0.0.1", "localhost")})).await;
    run(&allowed, &token, &json!({"prompt": "hello"})).await;
    until_listed(&allowed, &token, "the refusal", |listed| {
        listed.iter().any(|one| one["error"].as_str().is_some_and(|error| error.contains("CLAWDFORGE_WEBHOOK_CIDRS")))
    })
    .await;
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test]
async fn a_secret_is_rotated_with_both_valid_and_asked_for_where_there_is_none() {
    let server = Options::stand_in().start();
    let receiver = Receiver::start([]).await;
    let token = server.mint("app").await;
    let asked = json!({"prompt": "hello", "webhook": receiver.url("/")});
    let refused = in_background(&server, &token, "/run", &asked).await;
    refused.problem(422);
    assert!(refused.json["errors"][0]["detail"].as_str().unwrap().contains("webhook-secret"), "{refused:?}");
    let give = async || server.post("/admin/tokens/app/webhook-secret", ADMIN, &json!({})).await.json;
    let first = give().await["webhook_secret"].as_str().unwrap().to_owned();
    run(&server, &token, &asked).await;
    assert!(receiver.wait_for(1).await[0].is_signed(&first));
    let rotated = give().await;
    let second = rotated["webhook_secret"].as_str().unwrap().to_owned();
    run(&server, &token, &asked).await;
    let both = &receiver.wait_for(2).await[1];
    assert!(both.is_signed(&first) && both.is_signed(&second));
    {
        let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
        ledger.execute("UPDATE tokens SET old_webhook_secret_until = unixepoch()", []).unwrap();
    }
    run(&server, &token, &asked).await;
    let one = &receiver.wait_for(3).await[2];
    assert!(!one.is_signed(&first) && one.is_signed(&second));
    // One that is waited for tells nobody.
    let refused = server.post("/run", &token, &asked).await;
    assert_eq!(refused.json["errors"][0]["pointer"], "/webhook", "{refused:?}");
    server.post("/admin/tokens/nobody/webhook-secret", ADMIN, &json!({})).await.problem(404);
    let changed = Answer::of(server.request(Method::PATCH, "/admin/tokens/app", ADMIN).json(&json!({"webhook": receiver.url("/")}))).await;
    assert!(changed.json["webhook"].is_string() && changed.json.get("webhook_secret").is_none(), "{changed:?}");
    // A revoked app is told nothing more.
    let slow = run(&server, &token, &json!({"prompt": "do: wait"})).await;
    Answer::of(server.request(Method::DELETE, "/admin/tokens/app", ADMIN)).await;
    until("its end", || server.query::<i64>(&format!("SELECT count(*) FROM runs WHERE run_id = '{slow}' AND ok")) == 1).await;
    until("it is given up", || server.query::<i64>("SELECT count(*) FROM deliveries WHERE next_at IS NOT NULL") == 0).await;
    assert_eq!(receiver.received().len(), 3);
}

#[tokio::test]
async fn a_spent_budget_is_told_once_a_day() {
    let server = Options::stand_in().start();
    let receiver = Receiver::start([]).await;
    let (token, secret) = mint(&server, &json!({"webhook": receiver.url("/"), "daily_usd": 0.4})).await;
    for _ in 0..2 {
        assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    }
    server.run(&token, "hello").await.problem(429);
    let told = &receiver.wait_for(1).await[0];
    assert!(told.is_signed(&secret));
    assert_eq!(told.json()["data"], json!({"app_name": "app", "spent_usd": 0.5, "daily_usd": 0.4}));
    Answer::of(server.request(Method::PATCH, "/admin/tokens/app", ADMIN).json(&json!({"daily_usd": 0.6}))).await;
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test]
async fn a_receiver_with_tls_has_to_be_who_it_says() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;

    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.into()], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut client = acceptor.accept(client).await.ok()?;
                let _ = client.read(&mut [0; 8192]).await.ok()?;
                client.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await.ok()
            });
        }
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), authority.pem()).unwrap();
    for (known, expected) in [(true, "delivered"), (false, "pending")] {
        let options = Options::stand_in();
        let options = if known { options.set("SSL_CERT_FILE", file.path().display()) } else { options };
        let server = options.start();
        let (token, _) = mint(&server, &json!({"webhook": format!("https://localhost:{port}/")})).await;
        server.post("/webhooks/test", &token, &json!({})).await;
        let listed =
            until_listed(&server, &token, expected, |listed| listed[0]["http_status"] == 204 || listed[0]["error"].is_string()).await;
        assert_eq!(listed[0]["status"], expected, "{listed:?}");
    }
}
