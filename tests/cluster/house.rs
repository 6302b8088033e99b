//! What the tests of several machines share.

use std::io::Write;
use std::sync::Once;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::{Answer, Server, nats_server};

/// Whether there is no NATS server: then the caller is to return. It is said aloud, once, and a failure in CI.
pub fn is_left_out() -> bool {
    static SAID: Once = Once::new();
    let missing = nats_server().is_none();
    if missing {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "nats-server is missing");
        let left_out =
            "SKIPPED: the tests of more than one machine did not run, because there is no nats-server (Debian: apt install nats-server)";
        SAID.call_once(|| drop(writeln!(std::io::stderr(), "{left_out}")));
    }
    missing
}

/// Asks for a run in the background, under a key. Gives its id.
pub async fn background(server: &Server, token: &str, prompt: &str, key: &str) -> String {
    let request = server.request(reqwest::Method::POST, "/run", token).header("prefer", "respond-async").header("idempotency-key", key);
    let answer = Answer::of(request.json(&json!({"prompt": prompt}))).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.header("x-run-id").to_owned()
}

/// Waits for the end of a run.
pub async fn ended(server: &Server, token: &str, id: &str) -> Value {
    let begun = Instant::now();
    loop {
        let state = server.get(&format!("/runs/{id}"), token).await.json;
        if state["finished_at"].is_i64() {
            return state;
        }
        assert!(begun.elapsed() < Duration::from_mins(1), "the run does not end: {state}\n{}", server.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A way to the NATS server that can be cut, and nobody is told.
pub struct Proxy {
    pub url: String,
    cut: watch::Sender<bool>,
}

impl Proxy {
    pub async fn to(url: &str) -> Self {
        let server = url.trim_start_matches("nats://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (cut, is_cut) = watch::channel(false);
        let url = format!("nats://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let (server, is_cut) = (server.clone(), is_cut.clone());
                tokio::spawn(async move {
                    whole(&is_cut).await;
                    let Ok(there) = TcpStream::connect(server).await else { return };
                    let ((mut read_here, mut write_here), (mut read_there, mut write_there)) = (here.into_split(), there.into_split());
                    tokio::select! {
                        () = copy(&mut read_here, &mut write_there, &is_cut) => {}
                        () = copy(&mut read_there, &mut write_here, &is_cut) => {}
                    }
                });
            }
        });
        Self { url, cut }
    }

    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    pub fn mend(&self) {
        self.cut.send_replace(false);
    }
}

async fn whole(is_cut: &watch::Receiver<bool>) {
    let _ = is_cut.clone().wait_for(|cut| !cut).await;
}

async fn copy(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin), is_cut: &watch::Receiver<bool>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read) = from.read(&mut buffer).await
        && read > 0
    {
        whole(is_cut).await;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
