//! Webhooks: sends what the ledger has to tell, signed by the [Standard Webhooks](https://www.standardwebhooks.com) specification, until it
//! arrives or nobody is there any more.
//!
//! What is due stands in the table `deliveries`, so a restart loses nothing; what was being sent then is sent again.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Response, Url, header};
use standardwebhooks::Webhook;
use tokio::net::lookup_host;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::api::webhooks::payload;
use crate::app::App;
use crate::clock;
use crate::ledger::{Delivery, Due, OPERATOR, Tried};
use crate::network::Networks;
use crate::webhook_target::{Reach, Target};

/// How often it is looked for what is due.
const LOOK: Duration = Duration::from_millis(250);
/// What is sent to one receiver at once.
const AT_ONCE: u32 = 4;
/// How long a try may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Seconds after a failure until the next try; after the last of them it is given up.
const AGAIN: [i64; 6] = [5, 60, 5 * 60, 30 * 60, 2 * 3600, 8 * 3600];
/// Characters of an answer that are kept.
const CHARACTERS: usize = 200;

/// What sends them.
pub(crate) struct Webhooks {
    pub(crate) app: Arc<App>,
    /// The server's own port.
    pub(crate) port: u16,
}

impl Webhooks {
    /// Sends what is due, for ever.
    pub(crate) async fn send(self) {
        // An error means that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let this = Arc::new(self);
        let (mut sending, mut busy): (JoinSet<String>, HashMap<String, usize>) = (JoinSet::new(), HashMap::new());
        loop {
            match this.app.ledger.take_due(AT_ONCE, busy.keys().cloned().collect()).await {
                Ok(due) => {
                    for due in due {
                        *busy.entry(due.origin.clone()).or_default() += 1;
                        let this = this.clone();
                        sending.spawn(async move {
                            this.deliver(&due).await;
                            due.origin
                        });
                    }
                }
                Err(error) => tracing::warn!(%error, "webhooks wait: the ledger can't be used"),
            }
            tokio::select! {
                Some(sent) = sending.join_next() => {
                    // One that died of a defect is sent again by its lease; its receiver is not known then.
                    let Ok(origin) = sent else { busy.clear(); continue };
                    if let Some(count) = busy.get_mut(&origin) {
                        *count = count.saturating_sub(1);
                    }
                    busy.retain(|_, count| *count > 0);
                }
                () = sleep(LOOK) => {}
            }
        }
    }

    async fn deliver(&self, Due { delivery, secrets, networks, .. }: &Due) {
        let tried = self.tried(delivery, secrets, networks.as_ref()).await;
        let Delivery { delivery_id, event, app_name, attempts, .. } = delivery;
        match &tried.error {
            None => tracing::info!(delivery_id, event, app = app_name, attempt = attempts + 1, "webhook delivered"),
            Some(error) => tracing::warn!(
                delivery_id,
                event,
                app = app_name,
                attempt = attempts + 1,
                again_at = tried.next_at,
                error,
                "webhook failed"
            ),
        }
        // Where the ledger can't be written to, it is sent again by its lease.
        if let Err(error) = self.app.ledger.note_delivery(delivery, tried).await {
            tracing::error!(%error, delivery_id, "what came of a webhook was not written down; it will be sent again");
        }
    }

    async fn tried(&self, delivery: &Delivery, secrets: &[String], networks: Option<&Networks>) -> Tried {
        let over = |error: &str| Tried { http_status: None, error: Some(error.to_owned()), next_at: None, ends_subscription: false };
        let by_operator = self.app.operator_webhook.as_ref().filter(|_| delivery.app_name == OPERATOR);
        let own = by_operator.map(|webhook| vec![webhook.secret.clone()]);
        let (secrets, token) = match (own, networks) {
            (Some(own), _) => (own, None),
            (None, Some(networks)) if !secrets.is_empty() => (secrets.to_vec(), Some(networks)),
            (None, Some(_)) => return over("the app has no secret to sign it with; its operator makes one"),
            (None, None) => return over("the app's token is out of force"),
        };
        let body = match payload(&self.app, delivery).await {
            Ok(Some(body)) => body,
            Ok(None) => return over("what it tells of is not kept any more"),
            Err(error) => return failed(delivery, None, error.to_string()),
        };
        let reach = Reach { setting: self.app.access.webhooks.as_ref(), token, allow: &self.app.access.allow, port: self.port };
        match timeout(PATIENCE, post(delivery, body, &secrets, &reach)).await {
            Err(_) => failed(delivery, None, format!("no answer within {} s", PATIENCE.as_secs())),
            Ok(Err(error)) => failed(delivery, None, error),
            Ok(Ok(answer)) => match answer.status().as_u16() {
                status @ 200..300 => Tried { http_status: Some(status), error: None, next_at: None, ends_subscription: false },
                410 => Tried {
                    http_status: Some(410),
                    error: Some("its receiver wants no more (410)".to_owned()),
                    next_at: None,
                    ends_subscription: true,
                },
                status @ 300..400 => failed(delivery, Some(status), "it answered with a redirect, and those are not followed".to_owned()),
                status => {
                    let said = timeout(PATIENCE, beginning(answer)).await.unwrap_or_default();
                    failed(delivery, Some(status), format!("it answered {status}: {said}"))
                }
            },
        }
    }
}

fn failed(delivery: &Delivery, http_status: Option<u16>, error: String) -> Tried {
    let again = AGAIN.get(delivery.attempts as usize).map(|secs| clock::now() + secs);
    Tried { http_status, error: Some(error), next_at: again, ends_subscription: false }
}

/// Sends it, to an address that was looked at before and no other.
async fn post(delivery: &Delivery, body: String, secrets: &[String], reach: &Reach<'_>) -> Result<Response, String> {
    let url = Url::parse(&delivery.url).map_err(|error| error.to_string())?;
    let target = Target::read(&delivery.url).map_err(|why| why.to_string())?;
    let addresses = addresses(&target, reach).await?;
    let timestamp = clock::now();
    let signature = signature(&delivery.delivery_id, timestamp, &body, secrets)?;
    let client = Client::builder()
        .redirect(Policy::none())
        .no_proxy()
        .resolve_to_addrs(&target.host, &addresses)
        .user_agent(concat!("clawdforge/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| said(&error))?;
    let request = client
        .post(url)
        .header(header::CONTENT_TYPE, "application/json")
        .header("webhook-id", &delivery.delivery_id)
        .header("webhook-timestamp", timestamp)
        .header("webhook-signature", signature);
    request.body(body).send().await.map_err(|error| said(&error))
}

/// Where it may be sent.
async fn addresses(target: &Target, reach: &Reach<'_>) -> Result<Vec<SocketAddr>, String> {
    if let Some(address) = target.literal() {
        return allowed([address], target, reach);
    }
    let found = lookup_host((target.host.as_str(), target.port)).await;
    let found = found.map_err(|error| format!("{} can't be looked up ({error})", target.host))?;
    allowed(found.map(|found| found.ip()), target, reach)
}

/// Of what its name stands for, that which the app can reach.
fn allowed(found: impl IntoIterator<Item = IpAddr>, target: &Target, reach: &Reach<'_>) -> Result<Vec<SocketAddr>, String> {
    let (mut may, mut why) = (Vec::new(), None);
    for address in found {
        match reach.check(address, target.port) {
            Ok(()) => may.push(SocketAddr::new(address, target.port)),
            Err(refused) => why = Some(refused.to_string()),
        }
    }
    if may.is_empty() { Err(why.unwrap_or_else(|| format!("{} has no address", target.host))) } else { Ok(may) }
}

/// By each of the secrets that are good.
fn signature(id: &str, timestamp: i64, body: &str, secrets: &[String]) -> Result<String, String> {
    let sign = |secret: &String| Webhook::new(secret)?.sign(id, timestamp, body.as_bytes());
    let signatures: Result<Vec<_>, _> = secrets.iter().map(sign).collect();
    Ok(signatures.map_err(|error| format!("it can't be signed ({error})"))?.join(" "))
}

/// An error with its causes, without the address, which may hold a secret of the receiver's.
fn said(error: &reqwest::Error) -> String {
    let first = if error.is_connect() { "nobody could be reached there" } else { "it broke off" };
    let causes = std::iter::successors(std::error::Error::source(error), |error| error.source()).map(ToString::to_string);
    let text: Vec<_> = std::iter::once(first.to_owned()).chain(causes).collect();
    text.join(": ").chars().take(CHARACTERS).collect()
}

/// The beginning of an answer.
async fn beginning(mut answer: Response) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < CHARACTERS * 4
        && let Ok(Some(piece)) = answer.chunk().await
    {
        bytes.extend_from_slice(&piece);
    }
    String::from_utf8_lossy(&bytes).chars().take(CHARACTERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_name_with_good_and_bad_addresses_only_the_good_are_used() {
        let (target, networks) = (Target::read("http://both.lan:9000/").unwrap(), "10.0.0.0/8".parse::<Networks>().unwrap());
        let reach = Reach { setting: None, token: Some(&networks), allow: &Networks::default(), port: 8800 };
        let found = |addresses: &[&str]| allowed(addresses.iter().map(|address| address.parse().unwrap()), &target, &reach);
        let good: SocketAddr = "10.1.2.3:9000".parse().unwrap();
        assert_eq!(found(&["169.254.169.254", "10.1.2.3", "127.0.0.1", "::1"]), Ok(vec![good]));
        assert!(found(&["127.0.0.1", "169.254.169.254"]).unwrap_err().contains("169.254.169.254"));
        assert!(found(&[]).unwrap_err().contains("both.lan"));
    }
}
