//! Settings, read once from flags and environment into types that can't be wrong.
//!
//! Nothing else looks at the environment of the server. A value that can't be right stops the start with one sentence
//! that names its variable.

mod flags;
mod nats;
mod secrets;
mod value;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use standardwebhooks::Webhook as Signer;

use crate::agent::contract::Driver;
use crate::log::LogFormat;
use crate::network::Networks;
use crate::secret::{TokenHash, is_token_name};
use crate::session;
use crate::webhook_target::Target;

pub use flags::{BindFlags, DataFlags, Flags, WorkerFlags};
pub use nats::{Nats, Worker};
pub use secrets::{ADMIN_TOKEN, ADMIN_TOKEN_FLAG, ADMIN_TOKEN_SHA256, agents_environment};
pub use value::BadSetting;

use secrets::admin;
use value::{bound, given, networks, number, text};

const DEFAULT_ALLOW: &str = "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7,fe80::/10";

/// Whether agents are shut out of the data folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// Or the server does not start.
    Required,
    /// Where it can be.
    Auto,
    /// They are not.
    Off,
}

/// The server's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address and port to listen on.
    pub bind: SocketAddr,
    /// Folder of the ledger, uploads and runs, as it was given.
    pub data_dir: PathBuf,
    /// How work goes to other machines, if it does.
    pub nats: Option<Nats>,
    /// The operator's token; without one `/admin` is closed.
    pub admin: Option<TokenHash>,
    /// Networks that are answered at all.
    pub allow: Networks,
    /// Peers whose `X-Forwarded-For` counts.
    pub trusted_proxies: Networks,
    /// The claude program: a path, or a name on PATH.
    pub claude_bin: OsString,
    /// The acpx program: a path, or a name on PATH.
    pub acpx_bin: OsString,
    /// Runs at once.
    pub max_runs: usize,
    /// Runs that wait for a place.
    pub max_queued_runs: usize,
    /// Agents that sessions may name.
    pub agents: Vec<String>,
    /// How many sessions may be open, and for how long.
    pub sessions: session::Limits,
    /// The sweeper's period.
    pub sweep_every: Duration,
    /// The largest upload in bytes.
    pub max_upload_bytes: u64,
    /// Days that rows of finished runs are kept.
    pub retention_days: u32,
    /// How long a stop waits for running work.
    pub drain: Duration,
    /// Idle processes that are kept started ahead of need.
    pub standby: usize,
    /// Whether agents are shut out of the data folder.
    pub sandbox: Sandbox,
    /// What agents can read although it lies in the home of the server's user, absolute.
    pub agents_read: Vec<PathBuf>,
    /// What agents reach as the models' APIs that are bound to those, beside what is known: a host and its port.
    pub model_hosts: Vec<(String, u16)>,
    /// Networks that see the metrics without the operator's token.
    pub metrics: Networks,
    /// MiB of memory after which a run, or a session, is ended.
    pub agent_memory_mb: Option<u64>,
    /// MiB in its folder after which a run, or a session, is ended.
    pub agent_disk_mb: Option<u64>,
    /// Processes and threads that a run, or a session, may have where it has a control group.
    pub agent_processes: u32,
    /// How long a session's agent stays without a turn.
    pub agent_idle: Duration,
    /// What speaks to the agents of new sessions.
    pub driver: Driver,
    /// Other names of models.
    pub model_map: BTreeMap<String, String>,
    /// Whether there is a page for the operator.
    pub ui: bool,
    /// Networks that apps' webhooks may go to; `None` for where the app's token may come from.
    pub webhook_networks: Option<Networks>,
    /// The operator's own webhook, and the secret that it is signed with.
    pub operator_webhook: Option<OperatorWebhook>,
    /// How log lines look.
    pub log: LogFormat,
}

impl Flags {
    /// Checks every setting.
    pub fn read(self) -> Result<Settings, BadSetting> {
        let admin = admin(&self)?;
        let nats = self.nats.read()?;
        // Whoever has others carry work out need not do any.
        let fewest_runs = usize::from(nats.is_none());
        let max_upload_bytes: u64 = number("CLAWDFORGE_MAX_UPLOAD_BYTES", self.max_upload_bytes, 104_857_600, 1..=1 << 40)?;
        Ok(Settings {
            bind: self.bind.read()?,
            data_dir: self.agents.data.read(),
            nats,
            admin,
            allow: networks("CLAWDFORGE_ALLOW_CIDRS", &text(self.allow_cidrs, DEFAULT_ALLOW))?,
            trusted_proxies: networks("CLAWDFORGE_TRUSTED_PROXIES", &text(self.trusted_proxies, ""))?,
            claude_bin: text(self.agents.claude_bin, "claude").into(),
            acpx_bin: text(self.agents.acpx_bin, "acpx").into(),
            max_runs: number("CLAWDFORGE_MAX_RUNS", self.agents.max_runs, 8, fewest_runs..=1000)?,
            max_queued_runs: number("CLAWDFORGE_MAX_QUEUED_RUNS", self.max_queued_runs, 64, 0..=100_000)?,
            agents: agents(&text(self.agents.agents, "claude"))?,
            sessions: session::Limits {
                most_open: number("CLAWDFORGE_MAX_SESSIONS", self.max_sessions, 32, 0..=10_000)?,
                idle: Duration::from_secs(number("CLAWDFORGE_SESSION_TTL_SECS", self.session_ttl_secs, 3600, 1..=31_536_000)?),
                most_attached: max_upload_bytes.saturating_mul(10),
                closed: Duration::from_secs(number(
                    "CLAWDFORGE_SESSION_HARD_TTL_SECS",
                    self.session_hard_ttl_secs,
                    86_400,
                    0..=31_536_000,
                )?),
            },
            sweep_every: Duration::from_secs(number("CLAWDFORGE_SWEEP_SECS", self.agents.sweep_secs, 60, 1..=86_400)?),
            max_upload_bytes,
            retention_days: number("CLAWDFORGE_RETENTION_DAYS", self.retention_days, 90, 1..=36_500)?,
            drain: Duration::from_secs(number("CLAWDFORGE_DRAIN_SECS", self.agents.drain_secs, 20, 0..=3600)?),
            standby: number("CLAWDFORGE_STANDBY", self.agents.standby, 2, 0..=1000)?,
            sandbox: match given(self.agents.sandbox.as_deref()).unwrap_or("auto") {
                "required" => Sandbox::Required,
                "auto" => Sandbox::Auto,
                "off" => Sandbox::Off,
                other => {
                    return Err(BadSetting::new("CLAWDFORGE_SANDBOX", format!("is \"{other}\", which is neither required, auto nor off")));
                }
            },
            agents_read: agents_read(&text(self.agents.agents_read, ""))?,
            model_hosts: model_hosts(&text(self.agents.model_hosts, ""))?,
            metrics: networks("CLAWDFORGE_METRICS_CIDRS", &text(self.metrics_cidrs, ""))?,
            agent_memory_mb: bound("CLAWDFORGE_AGENT_MEMORY_MB", self.agents.agent_memory_mb)?,
            agent_disk_mb: bound("CLAWDFORGE_AGENT_DISK_MB", self.agents.agent_disk_mb)?,
            agent_processes: number("CLAWDFORGE_AGENT_PROCESSES", self.agents.agent_processes, 1024, 64..=1_000_000)?,
            agent_idle: Duration::from_secs(number("CLAWDFORGE_AGENT_IDLE_SECS", self.agents.agent_idle_secs, 300, 1..=86_400)?),
            driver: match given(self.agents.acp.as_deref()).unwrap_or("direct") {
                "acpx" => Driver::Acpx,
                "direct" => Driver::Direct,
                other => return Err(BadSetting::new("CLAWDFORGE_ACP", format!("is \"{other}\", which is neither acpx nor direct"))),
            },
            model_map: model_map(&text(self.model_map, ""))?,
            ui: match given(self.ui.as_deref()).unwrap_or("on") {
                "on" => true,
                "off" => false,
                other => return Err(BadSetting::new("CLAWDFORGE_UI", format!("is \"{other}\", which is neither on nor off"))),
            },
            webhook_networks: given(self.webhook_cidrs.as_deref()).map(|list| networks("CLAWDFORGE_WEBHOOK_CIDRS", list)).transpose()?,
            operator_webhook: operator_webhook(self.operator_webhook.as_deref(), self.operator_webhook_secret.as_deref())?,
            log: match given(self.agents.log.as_deref()).unwrap_or("text") {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                other => return Err(BadSetting::new("CLAWDFORGE_LOG", format!("is \"{other}\", which is neither text nor json"))),
            },
        })
    }
}

impl Settings {
    /// The ledger's file inside a data folder.
    pub fn ledger_file(data_dir: &Path) -> PathBuf {
        data_dir.join("clawdforge.db")
    }
}

/// Paths, apart as on PATH.
fn agents_read(list: &str) -> Result<Vec<PathBuf>, BadSetting> {
    let paths: Vec<_> = std::env::split_paths(list.trim()).filter(|path| !path.as_os_str().is_empty()).collect();
    match paths.iter().find(|path| !path.is_absolute()) {
        Some(path) => Err(BadSetting::new("CLAWDFORGE_AGENTS_READ", format!("has \"{}\", which is not a whole path", path.display()))),
        None => Ok(paths),
    }
}

/// Hosts with a port, 443 where there is none.
fn model_hosts(list: &str) -> Result<Vec<(String, u16)>, BadSetting> {
    let read = |item: &str| {
        let (host, port) = item.rsplit_once(':').map_or(Some((item, 443)), |(host, port)| Some((host, port.parse().ok()?)))?;
        let is_host = !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
        is_host.then(|| (host.to_ascii_lowercase(), port))
    };
    let wrong =
        |item: &str| BadSetting::new("CLAWDFORGE_MODEL_HOSTS", format!("has \"{item}\", which is not a host such as gateway.lan:8443"));
    let items = list.split(',').map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| read(item).ok_or_else(|| wrong(item))).collect()
}

/// Where the operator is told of what only the operator can mend.
#[derive(Clone)]
pub struct OperatorWebhook {
    /// Where it goes.
    pub url: String,
    /// `whsec_…`
    pub secret: String,
}

impl std::fmt::Debug for OperatorWebhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OperatorWebhook")
    }
}

fn operator_webhook(url: Option<&str>, secret: Option<&str>) -> Result<Option<OperatorWebhook>, BadSetting> {
    let Some(url) = given(url) else { return Ok(None) };
    Target::read(url).map_err(|why| BadSetting::new("CLAWDFORGE_OPERATOR_WEBHOOK", format!("is \"{url}\": {why}")))?;
    let secret = given(secret).filter(|secret| Signer::new(secret).is_ok());
    let wrong = || BadSetting::new("CLAWDFORGE_OPERATOR_WEBHOOK_SECRET", "is needed, as whsec_ and 24 to 64 bytes in base64".to_owned());
    Ok(Some(OperatorWebhook { url: url.to_owned(), secret: secret.ok_or_else(wrong)?.to_owned() }))
}

/// Pairs of a name and the model behind it.
fn model_map(list: &str) -> Result<BTreeMap<String, String>, BadSetting> {
    let pairs = list.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let read = |pair: &str| {
        let (name, model) = pair
            .split_once('=')
            .map(|(name, model)| (name.trim(), model.trim()))
            .filter(|(name, model)| is_model(name) && is_model(model))?;
        Some((name.to_owned(), model.to_owned()))
    };
    let wrong = |pair: &str| BadSetting::new("CLAWDFORGE_MODEL_MAP", format!("has \"{pair}\", which is not a pair such as gpt-4o=sonnet"));
    pairs.map(|pair| read(pair).ok_or_else(|| wrong(pair))).collect()
}

/// Whether it can be the name of a model.
pub(crate) fn is_model(model: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/@[]-".contains(&byte);
    model.len() <= 128 && model.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && model.bytes().all(allowed)
}

/// Whether it can be the name of a machine, which is part of subjects.
pub(crate) fn is_machine_name(name: &str) -> bool {
    let begins_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    begins_well && name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// An agent's name becomes an argument of acpx, which runs a name that it does not know as a command.
fn agents(list: &str) -> Result<Vec<String>, BadSetting> {
    let names: Vec<_> = list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    match names.iter().find(|name| !is_token_name(name)) {
        Some(name) => {
            Err(BadSetting::new("CLAWDFORGE_AGENTS", format!("names \"{name}\", which is not the name of an agent such as claude")))
        }
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::flags::AgentFlags;
    use super::*;

    #[test]
    fn defaults_are_the_documented_ones() {
        let settings = Flags::default().read().unwrap();
        assert_eq!(settings.bind.to_string(), "127.0.0.1:8800");
        assert_eq!(settings.data_dir, Path::new("./data"));
        assert!(settings.admin.is_none());
        assert!(settings.trusted_proxies.is_empty());
        assert_eq!((settings.max_runs, settings.max_queued_runs), (8, 64));
        for (address, answered) in [("127.0.0.1", true), ("::1", true), ("192.168.3.4", true), ("8.8.8.8", false), ("2001:db8::1", false)] {
            assert_eq!(settings.allow.contain(address.parse().unwrap()), answered, "{address}");
        }
    }

    #[test]
    fn a_wrong_value_is_one_sentence_that_names_its_variable() {
        let wrong = |flags: Flags| flags.read().unwrap_err().to_string();
        let bind = BindFlags { bind: Some("localhost".into()) };
        assert_eq!(
            wrong(Flags { bind, ..Flags::default() }),
            "CLAWDFORGE_BIND is \"localhost\", which is not an IP address and port such as 127.0.0.1:8800."
        );
        assert_eq!(
            wrong(Flags { agents: AgentFlags { max_runs: Some("0".into()), ..AgentFlags::default() }, ..Flags::default() }),
            "CLAWDFORGE_MAX_RUNS is \"0\", which is not a whole number from 1 to 1000."
        );
        let short = wrong(Flags { admin_token: Some("too-short".into()), ..Flags::default() });
        assert_eq!(short, "CLAWDFORGE_ADMIN_TOKEN holds a token shorter than 16 characters; choose a longer one.");
        let cidrs = wrong(Flags { allow_cidrs: Some("10.0.0.0/40".into()), ..Flags::default() });
        assert!(cidrs.starts_with("CLAWDFORGE_ALLOW_CIDRS is wrong: \"10.0.0.0/40\""), "{cidrs}");
        let file = wrong(Flags { admin_token_file: Some("/nowhere/at/all".into()), ..Flags::default() });
        assert!(file.starts_with("CLAWDFORGE_ADMIN_TOKEN_FILE names \"/nowhere/at/all\""), "{file}");
    }

    #[test]
    fn models_may_have_other_names() {
        let read = |map: &str| Flags { model_map: Some(map.into()), ..Flags::default() }.read();
        let map = read("gpt-4o=sonnet, gpt-4o-mini = haiku,").unwrap().model_map;
        assert_eq!(map.into_iter().collect::<Vec<_>>(), [("gpt-4o".into(), "sonnet".into()), ("gpt-4o-mini".into(), "haiku".into())]);
        for wrong in ["gpt-4o", "=sonnet", "a=--model", "a=b=c"] {
            assert!(read(wrong).unwrap_err().to_string().contains("gpt-4o=sonnet"), "{wrong}");
        }
    }

    #[test]
    fn an_empty_value_is_an_absent_one() {
        let agents = AgentFlags { max_runs: Some(" ".into()), ..AgentFlags::default() };
        let flags = Flags { agents, admin_token: Some(String::new()), ..Flags::default() };
        assert_eq!(flags.read().unwrap().max_runs, 8);
    }
}
