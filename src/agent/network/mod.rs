//! What an agent reaches of the network, where its app's token bounds that.
//!
//! The kernel's own rules without privileges know ports and no addresses, so a bound agent is started in a network namespace of its own, in which
//! there is nothing but a loopback. What listens there is a socket that the server accepts from ([`proxy`]): so the server decides where a
//! connection goes, looks names up itself, and nothing else leads out. Programs are told by the usual variables; one that does not go by them has no network.
//! A model's API that is on this machine's loopback is on the agent's at the same port.

pub mod namespace;
pub mod proxy;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use hyper::Uri;
use serde_json::Value;

use super::contract::Network;
use super::environment::Environment;
use super::kinds;

/// Variables by which programs are told of a proxy. Some know the small ones alone.
const VARIABLES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"];
/// Those by which they are told for what to do without it: for what agents have on their own loopback, some of them a part of themselves.
const EXCEPTIONS: [&str; 2] = ["NO_PROXY", "no_proxy"];
const OWN: &str = "127.0.0.1,localhost,::1";

/// Why agents can't be bound.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Impossible {
    /// They would not be shut out of the proxy's socket.
    #[error("agents are not in the sandbox: {0}")]
    Unconfined(String),
    /// Something forbids it.
    #[error(
        "this machine lets its user make no network namespace ({0}); allow user namespaces: under systemd RestrictNamespaces=user net, in a container a seccomp profile with unshare"
    )]
    NoNamespace(String),
    /// The way out is not the server's to decide.
    #[error("the server's own way to the network is a proxy ({0}), which looks names up itself; run it without, or bound it there")]
    Proxied(&'static str),
}

/// Whether agents with this environment can be bound here. Starts a process that tries.
pub fn check(environment: &Environment) -> Result<(), Impossible> {
    if let Some(name) = VARIABLES.into_iter().find(|name| environment.has(name)) {
        return Err(Impossible::Proxied(name));
    }
    let mut tries = Command::new("/proc/self/exe");
    tries.args(["confine", "--network", "model", "--", "/proc/self/exe", "--version"]);
    let tried = tries.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output();
    match tried {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(Impossible::NoNamespace(String::from_utf8_lossy(&output.stderr).trim().replace("clawdforge: ", ""))),
        Err(error) => Err(Impossible::NoNamespace(error.to_string())),
    }
}

/// A place that is named by its host, in small letters, and its port.
pub type Destination = (String, u16);

/// The models' APIs: those of these agents, what the environment has in their place, and what the operator adds.
pub fn models(agents: &[String], environment: &Environment, added: &[Destination]) -> Vec<Destination> {
    let own = agents.iter().filter_map(|name| kinds::of(name)).flat_map(|kind| kind.hosts).map(|host| ((*host).to_owned(), 443));
    let named = environment.iter().filter(|(name, _)| name.as_encoded_bytes().ends_with(b"_BASE_URL")).filter_map(|(_, url)| url.to_str());
    let configured = ["CODEX_CONFIG", "OPENCODE_CONFIG_CONTENT"].into_iter().filter_map(|name| environment.get(name)?.to_str());
    let urls: Vec<String> = configured.flat_map(urls).chain(named.map(str::to_owned)).collect();
    own.chain(urls.iter().filter_map(|url| destination(&url.parse().ok()?))).chain(added.iter().cloned()).collect()
}

/// The base addresses in a configuration.
fn urls(config: &str) -> Vec<String> {
    fn find(value: &Value, urls: &mut Vec<String>) {
        for (name, value) in value.as_object().into_iter().flatten() {
            match value.as_str() {
                Some(url) if matches!(name.as_str(), "base_url" | "baseURL") => urls.push(url.to_owned()),
                _ => find(value, urls),
            }
        }
    }
    let mut urls = Vec::new();
    find(&serde_json::from_str(config).unwrap_or_default(), &mut urls);
    urls
}

/// Where an address leads; `None` where it names no host, or no port and no scheme that has one.
fn destination(url: &Uri) -> Option<Destination> {
    let port = url.port_u16().or_else(|| match url.scheme_str() {
        Some("https") => Some(443),
        Some("http") => Some(80),
        _ => None,
    })?;
    let host = url.host()?;
    Some((host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase(), port))
}

/// Has `command` go by the way out at this port of its loopback.
pub fn tell(command: &mut Command, port: u16) {
    command.envs(VARIABLES.map(|name| (name, format!("http://127.0.0.1:{port}"))));
    // Node's own fetch goes by them where it is told to.
    command.env("NODE_USE_ENV_PROXY", "1");
    command.envs(EXCEPTIONS.map(|name| (name, OWN)));
}

/// How bound agents get out.
#[derive(Clone, Debug)]
pub struct WayOut {
    /// The proxy's socket.
    pub socket: PathBuf,
    /// The ports of models' APIs on this machine's loopback.
    pub here: Vec<u16>,
}

impl WayOut {
    /// By this socket, to these models.
    pub fn new(socket: PathBuf, models: &[Destination]) -> Self {
        let is_here = |host: &str| host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
        let here: BTreeSet<u16> = models.iter().filter(|(host, _)| is_here(host)).map(|(_, port)| *port).collect();
        Self { socket, here: here.into_iter().collect() }
    }
}

/// What a socket in an agent's network is for, as it is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// It is a proxy, which keeps this rule.
    Proxy(Network),
    /// It leads to this port of the server's loopback.
    Here(u16),
}

impl Door {
    /// As it is told.
    pub fn name(self) -> String {
        match self {
            Self::Proxy(rule) => rule.as_str().to_owned(),
            Self::Here(port) => port.to_string(),
        }
    }

    /// As it was told.
    pub fn named(name: &str) -> Option<Self> {
        name.parse().map(Self::Here).ok().or_else(|| Network::named(name).map(Self::Proxy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_are_where_the_environment_has_them() {
        let environment = Environment::of([
            ("ANTHROPIC_BASE_URL", "http://Gateway.lan:8080/x"),
            ("OPENAI_BASE_URL", "https://[::1]/v1"),
            ("CODEX_CONFIG", r#"{"model_providers": {"a": {"base_url": "http://127.0.0.1:9/v1"}}}"#),
            ("BASE", "http://no"),
        ]);
        let models = models(&["claude".to_owned(), "acpx-only".to_owned()], &environment, &[("added".to_owned(), 1)]);
        let of = |host: &str, port| models.contains(&(host.to_owned(), port));
        assert!(of("api.anthropic.com", 443) && of("gateway.lan", 8080) && of("::1", 443) && of("127.0.0.1", 9) && of("added", 1));
        assert_eq!(models.len(), 5);
        assert_eq!(WayOut::new(PathBuf::new(), &models).here, [9, 443]);
        for door in [Door::Proxy(Network::Web), Door::Here(80)] {
            assert_eq!(Door::named(&door.name()), Some(door));
        }
    }
}
