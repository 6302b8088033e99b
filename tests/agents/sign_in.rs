//! How claude's sign-in is kept: by the real CLI, and a stub of the endpoint at which it is renewed.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use clawdforge::demo::stub::Stub;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::clis;
use crate::harness::{Options, until};

/// What was asked of the endpoint: each refresh token, and whether it was the one to use.
type Renewals = Arc<Mutex<Vec<(String, bool)>>>;

/// A proxy that is the endpoint itself, whoever is asked for. Each refresh token is good for once.
struct Endpoint {
    url: String,
    authority: tempfile::NamedTempFile,
    renewals: Renewals,
}

impl Endpoint {
    async fn start() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // Else it has the name of the certificate that it signs, which would look like one that signed itself.
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = ["platform.claude.com", "api.anthropic.com"].map(str::to_owned);
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate.into()], key).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), authority.pem()).unwrap();
        let renewals = Renewals::default();
        let noted = renewals.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, acceptor.clone(), noted.clone()));
            }
        });
        Self { url, authority: file, renewals }
    }
}

async fn serve(mut client: TcpStream, acceptor: TlsAcceptor, renewals: Renewals) -> Option<()> {
    head(&mut client).await?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
    let mut client = acceptor.accept(client).await.ok()?;
    loop {
        let head = head(&mut client).await?.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).map_or(0, |length| length.trim().parse().unwrap());
        let mut body = vec![0; length];
        client.read_exact(&mut body).await.ok()?;
        let (status, answer) = if head.contains("/oauth/token") { renew(&body, &renewals) } else { ("404 Not Found", json!({})) };
        let answer = answer.to_string();
        let answer = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
        client.write_all(answer.as_bytes()).await.ok()?;
    }
}

async fn head(from: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(from.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}

/// A sign-in that is good for five seconds more than those that the server has renewed.
fn renew(body: &[u8], renewals: &Renewals) -> (&'static str, Value) {
    let asked: Value = serde_json::from_slice(body).unwrap();
    let mut renewals = renewals.lock().unwrap();
    let good = renewals.iter().filter(|(_, good)| *good).count();
    let token = asked["refresh_token"].as_str().unwrap_or_default().to_owned();
    let is_good = token == format!("refresh-{good}");
    renewals.push((token, is_good));
    if !is_good {
        return ("400 Bad Request", json!({"error": "invalid_grant"}));
    }
    let next = good + 1;
    let all = json!({
        "access_token": format!("access-{next}"), "refresh_token": format!("refresh-{next}"), "expires_in": 290,
        "token_type": "Bearer", "scope": "user:inference user:profile",
    });
    ("200 OK", all)
}

#[tokio::test]
async fn ten_agents_at_once_go_on_while_their_sign_in_is_renewed_and_its_refresh_token_rotates() {
    let Some(clis) = clis() else { return };
    let (stub, endpoint, home) = (Stub::start().await.unwrap(), Endpoint::start().await, tempfile::tempdir().unwrap());
    let file = home.path().join(".claude/.credentials.json");
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    let soon = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() + 1000;
    let oauth = json!({"accessToken": "access-0", "refreshToken": "refresh-0", "expiresAt": soon, "scopes": ["user:inference"]});
    std::fs::write(&file, json!({"claudeAiOauth": oauth}).to_string()).unwrap();
    let environment = clawdforge::demo::environment(clis, &stub.url(), home.path());
    let server = Options::default()
        .environment(environment.iter())
        .set("ANTHROPIC_API_KEY", "")
        .set("HTTPS_PROXY", &endpoint.url)
        .set("NO_PROXY", "127.0.0.1")
        .set("NODE_EXTRA_CA_CERTS", endpoint.authority.path().display())
        .set("CLAWDFORGE_AGENTS_READ", endpoint.authority.path().display())
        .set("CLAWDFORGE_CLAUDE_BIN", clis.claude.display())
        .set("CLAWDFORGE_ACPX_BIN", clis.acpx.display())
        .set("CLAWDFORGE_MAX_RUNS", 10)
        .start();
    let token = server.mint("app").await;
    let renewed = || endpoint.renewals.lock().unwrap().iter().filter(|(_, good)| *good).count();
    let (server, token, renewed) = (&server, &token, &renewed);
    let used = async |path: &str| {
        let answer = server.post(path, token, &json!({"prompt": "stub: {\"credential\": true}"})).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", server.log());
        answer.json.to_string()
    };
    let agents = (0..10).map(|at| async move {
        let path = if at % 2 == 0 {
            "/run".to_owned()
        } else {
            let session = server.post("/sessions", token, &json!({})).await.json;
            format!("/sessions/{}/turn", session["session_id"].as_str().unwrap())
        };
        // By the third renewal each has gone on through two.
        while renewed() < 3 {
            let told = used(&path).await;
            assert!(told.contains("Bearer access-") && !told.contains("access-0"), "{told}");
        }
        path
    });
    let paths = futures_util::future::join_all(agents).await;
    let newest = || serde_json::from_slice::<Value>(&std::fs::read(&file).unwrap()).unwrap()["claudeAiOauth"].clone();
    until("the file is whole", || newest()["refreshToken"].is_string()).await;
    for path in &paths[..2] {
        assert!(used(path).await.contains("Bearer access-"));
    }
    let renewals = endpoint.renewals.lock().unwrap().clone();
    assert!(renewals.iter().all(|(_, good)| *good), "a refresh token was used twice: {renewals:?}");
    // Which is only possible where nothing that they took along was lost.
    assert_ne!(newest()["refreshToken"], "refresh-0");
}
