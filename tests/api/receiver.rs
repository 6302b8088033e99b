//! A receiver of webhooks, which answers as it is told.

#![allow(dead_code, reason = "not every test binary needs all of it")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use standardwebhooks::Webhook;
use tokio::net::TcpListener;

use crate::harness::until;

/// A webhook that came.
#[derive(Clone, Debug)]
pub struct Received {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Received {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn id(&self) -> &str {
        self.headers["webhook-id"].to_str().unwrap()
    }

    /// Whether the specification's own library takes it for signed with this secret.
    pub fn is_signed(&self, secret: &str) -> bool {
        Webhook::new(secret).unwrap().verify(&self.body, &self.headers).is_ok()
    }
}

/// What it answers; where it is to answer nothing, none.
#[derive(Clone, Debug)]
pub enum Says {
    Status(u16),
    Redirect(String),
    Nothing,
}

#[derive(Clone, Default)]
struct Shared {
    received: Arc<Mutex<Vec<Received>>>,
    says: Arc<Mutex<VecDeque<Says>>>,
}

pub struct Receiver {
    pub address: SocketAddr,
    shared: Shared,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Receiver {
    /// One that answers 204, but first so.
    pub async fn start(says: impl IntoIterator<Item = Says>) -> Self {
        Self::start_on("127.0.0.1:0".parse().unwrap(), says).await
    }

    pub async fn start_on(address: SocketAddr, says: impl IntoIterator<Item = Says>) -> Self {
        let shared = Shared::default();
        shared.says.lock().unwrap().extend(says);
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(receive).with_state(shared.clone());
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, shared, serving }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().unwrap().clone()
    }

    /// What came, when there is so much.
    pub async fn wait_for(&self, count: usize) -> Vec<Received> {
        until("a webhook", || self.received().len() >= count).await;
        self.received()
    }
}

async fn receive(State(shared): State<Shared>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    shared.received.lock().unwrap().push(Received { path: uri.to_string(), headers, body });
    let says = shared.says.lock().unwrap().pop_front();
    match says {
        None => StatusCode::NO_CONTENT.into_response(),
        Some(Says::Status(status)) => (StatusCode::from_u16(status).unwrap(), "no ".repeat(500)).into_response(),
        Some(Says::Redirect(to)) => (StatusCode::TEMPORARY_REDIRECT, [("location", to)]).into_response(),
        Some(Says::Nothing) => std::future::pending().await,
    }
}
