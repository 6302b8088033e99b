//! The connection to NATS, of a gateway and of a worker.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_nats::jetstream;
use async_nats::{Client, ConnectOptions, Event};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::wire::bytes;
use crate::config::Nats;

/// After how long without an answer a server is taken for gone, twice.
const PING: Duration = Duration::from_secs(4);
/// How long a machine may take for what it does at once.
pub(super) const AT_ONCE: Duration = Duration::from_secs(5);
/// How long it may be between tries to connect.
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// The connection. Clones share it.
#[derive(Clone, Debug)]
pub struct Hub {
    /// What is said and heard once.
    pub client: Client,
    /// What is kept until it is heard.
    pub jetstream: jetstream::Context,
    connected: watch::Receiver<Option<Instant>>,
}

impl Hub {
    /// Connects, or goes on trying to. An error is one of the settings.
    pub async fn connect(Nats { servers, credentials, certificates }: &Nats, name: &str) -> anyhow::Result<Self> {
        let (told, connected) = watch::channel(None);
        let said = Arc::<Mutex<String>>::default();
        let mut options = ConnectOptions::new()
            .name(format!("clawdforge {name}"))
            // Nobody else's answers can be listened to where the server's permissions say so.
            .custom_inbox_prefix(format!("_INBOX_{name}"))
            .retry_on_initial_connect()
            .ping_interval(PING)
            .request_timeout(Some(AT_ONCE))
            .subscription_capacity(1 << 16)
            .reconnect_delay_callback(|tries| LONGEST_DELAY.min(Duration::from_millis(50) * u32::try_from(tries).unwrap_or(u32::MAX)))
            .event_callback(move |event| {
                let (told, said) = (told.clone(), said.clone());
                async move {
                    match event {
                        Event::Connected => {
                            tracing::info!("connected to NATS");
                            told.send_replace(Some(Instant::now()));
                        }
                        Event::Disconnected | Event::Closed => {
                            tracing::warn!("NATS can't be reached; trying again until it can");
                            told.send_replace(None);
                        }
                        other => {
                            // The same is said at each try to connect.
                            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                            if *said != other.to_string() {
                                *said = other.to_string();
                                tracing::warn!(event = %other, "NATS");
                            }
                        }
                    }
                }
            });
        if let Some(file) = credentials {
            let read = options.credentials_file(file).await;
            options = read.with_context(|| format!("CLAWDFORGE_NATS_CREDS: {} holds no credentials", file.display()))?;
        }
        // Those of the first address that has some are for all.
        if let Some((user, password)) = servers.iter().find_map(|server| Some((server.username()?, server.password()?))) {
            options = options.user_and_password(user.to_owned(), password.to_owned());
        }
        if let Some(file) = certificates {
            options = options.require_tls(true).add_root_certificates(file.clone());
        }
        let client = options.connect(servers).await.context("CLAWDFORGE_NATS_URL: NATS can't be connected to")?;
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(AT_ONCE);
        Ok(Self { client, jetstream, connected })
    }

    /// Since when it is connected, if it is.
    pub fn connected_since(&self) -> Option<Instant> {
        *self.connected.borrow()
    }

    /// Comes when it is connected.
    pub async fn connected(&self) {
        // Where nobody tells any more, it is over anyway.
        let _ = self.connected.clone().wait_for(Option::is_some).await;
    }

    /// Comes when it is not.
    pub async fn disconnected(&self) {
        let _ = self.connected.clone().wait_for(Option::is_none).await;
    }

    /// Changes at each connection from now on, and at the end of each.
    pub fn connections(&self) -> watch::Receiver<Option<Instant>> {
        let mut connected = self.connected.clone();
        connected.mark_unchanged();
        connected
    }

    /// Asks, and reads the answer. `None` where there is none in time.
    pub async fn ask<T: DeserializeOwned>(&self, subject: String, question: &impl Serialize, within: Duration) -> Option<T> {
        let request = async_nats::Request::new().payload(bytes(question)).timeout(Some(within));
        let answered = self.client.send_request(subject, request).await.ok()?;
        serde_json::from_slice(&answered.payload).ok()
    }
}
