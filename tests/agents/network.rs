//! What agents reach of the network whose app's token bounds that, by the real CLIs.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use crate::harness::{Options, Server};
use crate::{Forge, say};

/// A token with a rule. None where this machine can't keep it, which is said aloud.
async fn bound(server: &Server, rule: &str) -> Option<String> {
    let asked = json!({"name": rule, "network": rule});
    let minted = server.post("/admin/tokens", crate::harness::ADMIN, &asked).await;
    if minted.status == StatusCode::UNPROCESSABLE_ENTITY {
        let why = minted.json["errors"][0]["detail"].as_str().unwrap().to_owned();
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{why}");
        say(&format!("SKIPPED: a test of bound networks did not run: {why}"));
        return None;
    }
    Some(minted.json["token"].as_str().unwrap().to_owned())
}

/// Counts who comes.
async fn listen(at: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(at).await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let _ = client.read(&mut [0; 1024]).await;
            let _ = client.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nquince").await;
        }
    });
    (address, count)
}

async fn shell(server: &Server, token: &str, session: &Value, command: &str) -> String {
    let tool = json!({"tool": {"name": "Bash", "input": {"command": format!("({command}) 2>&1; true"), "description": "test"}}});
    let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
    let answer = server.post(&path, token, &json!({"prompt": format!("stub: {tool}")})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", server.log());
    answer.json["text"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_bound_agent_reaches_its_model_and_nothing_that_is_near() {
    let Some(forge) = Forge::start_with(Options::default().set("CLAWDFORGE_STANDBY", 2)).await else { return };
    let server = &forge.server;
    let (near, came) = listen((Ipv4Addr::LOCALHOST, 0).into()).await;
    let resolver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let asked = resolver.local_addr().unwrap();
    // Not for the loopback alone: this machine by its name, if it has an address.
    let own = std::process::Command::new("hostname").arg("-I").output().map(|told| String::from_utf8_lossy(&told.stdout).into_owned());
    let own = own.unwrap_or_default().split_whitespace().next().unwrap_or("127.0.0.1").to_owned();
    for rule in ["web", "model"] {
        let Some(token) = bound(server, rule).await else { return };
        // Cold, and from the pool.
        for _ in 0..2 {
            assert_eq!(server.run(&token, "Hello.").await.status, StatusCode::OK, "{rule}\n{}", server.log());
        }
        let session = server.post("/sessions", &token, &json!({})).await.json;
        let told = shell(
            server,
            &token,
            &session,
            &format!(
                "curl -s -m 5 http://10.255.255.1/; curl -s -m 5 http://{near}/; curl -s -m 5 --noproxy '*' http://{near}/; curl -s -m 5 http://{}/healthz; \
                 curl -s -m 5 --noproxy '*' http://{}/healthz; curl -s -m 5 http://{own}/; curl -sk -m 5 https://{own}/; curl -s -m 5 -p http://{near}/; \
                 for name in HTTP_PROXY http_proxy; do env | grep -c ^$name=; done; \
                 python3 -c \"import socket; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', {}))\"; \
                 ls /sys/class/net; cat /proc/net/route | wc -l; curl -s -m 5 http://secret.example.invalid/",
                server.address(),
                server.address(),
                asked.port(),
            ),
        )
        .await;
        assert!(!told.contains("quince") && !told.contains("sandbox"), "{rule}: {told}");
        assert!(told.contains("outside what the app's token lets its agents reach"), "{rule}: {told}");
    }
    assert_eq!(came.load(Ordering::Relaxed), 0);
    assert!(resolver.try_recv(&mut [0; 16]).is_err());
    // Others are as free as ever.
    let session = server.post("/sessions", &forge.token, &json!({})).await.json;
    let told = shell(server, &forge.token, &session, &format!("curl -s -m 5 http://{near}/")).await;
    assert!(told.contains("quince"), "{told}");
    let listed = server.get("/admin/tokens", crate::harness::ADMIN).await.json;
    let rules: Vec<_> = listed["tokens"].as_array().unwrap().iter().map(|token| token["network"].as_str().unwrap()).collect();
    assert_eq!(rules, ["open", "model", "web"]);
}
