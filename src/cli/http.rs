//! One HTTP request, for commands that ask a server.

use std::time::Duration;

use anyhow::Context;
use axum::body::{Body, Bytes};
use http_body_util::BodyExt;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

/// Sends `json`, if any, with the bearer `token`, if any, and reads the whole answer.
pub(super) async fn send(
    method: Method,
    url: &str,
    token: Option<&str>,
    json: Option<String>,
    within: Duration,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let mut request = Request::builder().method(method).uri(url).header(header::CONTENT_TYPE, "application/json");
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(json.map_or_else(Body::empty, Body::from))?;
    let exchange = async {
        let answer = Client::builder(TokioExecutor::new()).build_http().request(request).await?;
        let status = answer.status();
        anyhow::Ok((status, answer.into_body().collect().await?.to_bytes()))
    };
    timeout(within, exchange).await.context("no answer in time")?
}
