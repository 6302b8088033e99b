//! Settings, read once from flags and environment into types that can't be wrong.
//!
//! Nothing else looks at the environment of the server. A value that can't be right stops the start with one sentence
//! that names its variable.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use crate::agent::launcher::Environment;
use crate::network::Networks;
use crate::secret::{TokenHash, is_token_name};
use crate::session;

/// The variable that holds the admin token's hash. It also reaches the process that is started again without the plaintext.
pub const ADMIN_TOKEN_SHA256: &str = "CLAWDFORGE_ADMIN_TOKEN_SHA256";
/// The variable that holds the admin token.
pub const ADMIN_TOKEN: &str = "CLAWDFORGE_ADMIN_TOKEN";
/// The flag that does.
pub const ADMIN_TOKEN_FLAG: &str = "--admin-token";

/// The shortest admin token that is taken, in characters.
const ADMIN_TOKEN_MIN: usize = 16;

/// The variables by which claude can be signed in, and those that name a file instead.
const SIGN_INS: [(&str, &str); 2] =
    [("CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN_FILE"), ("ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY_FILE")];

const DEFAULT_ALLOW: &str = "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7,fe80::/10";

/// Where the server keeps what is its own.
#[derive(Args, Clone, Debug, Default)]
pub struct DataFlags {
    /// Folder of the ledger, uploads and runs [default: ./data]
    #[arg(long, env = "CLAWDFORGE_DATA_DIR", value_name = "DIR", hide_env_values = true)]
    data_dir: Option<String>,
}

/// Where the server listens.
#[derive(Args, Clone, Debug, Default)]
pub struct BindFlags {
    /// Address and port to listen on [default: 127.0.0.1:8800]
    #[arg(long, env = "CLAWDFORGE_BIND", value_name = "ADDRESS:PORT", hide_env_values = true)]
    bind: Option<String>,
}

/// The flags of `serve`, each with its variable.
#[derive(Args, Clone, Default)]
pub struct Flags {
    #[command(flatten)]
    bind: BindFlags,
    #[command(flatten)]
    data: DataFlags,
    /// The operator's bearer token, at least 16 characters; prefer the variable or a file: flags show in `ps`
    #[arg(long, env = "CLAWDFORGE_ADMIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// File that holds the operator's bearer token
    #[arg(long, env = "CLAWDFORGE_ADMIN_TOKEN_FILE", value_name = "FILE", hide_env_values = true)]
    admin_token_file: Option<String>,
    /// SHA-256 of the operator's bearer token, in hex: then nothing on this machine holds the token itself
    #[arg(long, env = "CLAWDFORGE_ADMIN_TOKEN_SHA256", value_name = "HEX", hide_env_values = true)]
    admin_token_sha256: Option<String>,
    /// Networks that are answered at all [default: loopback and the private networks]
    #[arg(long, env = "CLAWDFORGE_ALLOW_CIDRS", value_name = "CIDR,…", hide_env_values = true)]
    allow_cidrs: Option<String>,
    /// Peers whose X-Forwarded-For counts [default: none]
    #[arg(long, env = "CLAWDFORGE_TRUSTED_PROXIES", value_name = "CIDR,…", hide_env_values = true)]
    trusted_proxies: Option<String>,
    /// The claude program, by path or by name on PATH [default: claude]
    #[arg(long, env = "CLAWDFORGE_CLAUDE_BIN", value_name = "PROGRAM", hide_env_values = true)]
    claude_bin: Option<String>,
    /// The acpx program, by path or by name on PATH [default: acpx]
    #[arg(long, env = "CLAWDFORGE_ACPX_BIN", value_name = "PROGRAM", hide_env_values = true)]
    acpx_bin: Option<String>,
    /// Runs at once [default: 8]
    #[arg(long, env = "CLAWDFORGE_MAX_RUNS", value_name = "N", hide_env_values = true)]
    max_runs: Option<String>,
    /// Runs that wait for a place, past which 503 [default: 64]
    #[arg(long, env = "CLAWDFORGE_MAX_QUEUED_RUNS", value_name = "N", hide_env_values = true)]
    max_queued_runs: Option<String>,
    /// Agents that sessions may name [default: claude]
    #[arg(long, env = "CLAWDFORGE_AGENTS", value_name = "NAME,…", hide_env_values = true)]
    agents: Option<String>,
    /// Open sessions at once [default: 32]
    #[arg(long, env = "CLAWDFORGE_MAX_SESSIONS", value_name = "N", hide_env_values = true)]
    max_sessions: Option<String>,
    /// Seconds without a turn after which a session is closed [default: 3600]
    #[arg(long, env = "CLAWDFORGE_SESSION_TTL_SECS", value_name = "SECONDS", hide_env_values = true)]
    session_ttl_secs: Option<String>,
    /// Seconds after which a closed session is deleted [default: 86400]
    #[arg(long, env = "CLAWDFORGE_SESSION_HARD_TTL_SECS", value_name = "SECONDS", hide_env_values = true)]
    session_hard_ttl_secs: Option<String>,
    /// The sweeper's period in seconds [default: 60]
    #[arg(long, env = "CLAWDFORGE_SWEEP_SECS", value_name = "SECONDS", hide_env_values = true)]
    sweep_secs: Option<String>,
    /// The largest upload in bytes [default: 104857600]
    #[arg(long, env = "CLAWDFORGE_MAX_UPLOAD_BYTES", value_name = "BYTES", hide_env_values = true)]
    max_upload_bytes: Option<String>,
    /// Days that rows of finished runs are kept [default: 90]
    #[arg(long, env = "CLAWDFORGE_RETENTION_DAYS", value_name = "DAYS", hide_env_values = true)]
    retention_days: Option<String>,
    /// Seconds that a stop waits for running work [default: 20]
    #[arg(long, env = "CLAWDFORGE_DRAIN_SECS", value_name = "SECONDS", hide_env_values = true)]
    drain_secs: Option<String>,
    /// Idle processes that are kept started ahead of need; 0 for none [default: 2]
    #[arg(long, env = "CLAWDFORGE_STANDBY", value_name = "N", hide_env_values = true)]
    standby: Option<String>,
    /// Whether agents are shut out of the data folder: required, auto or off [default: auto]
    #[arg(long, env = "CLAWDFORGE_SANDBOX", value_name = "WHEN", hide_env_values = true)]
    sandbox: Option<String>,
    /// Networks that see /metrics without the operator's token, comma-joined; none by default
    #[arg(long, env = "CLAWDFORGE_METRICS_CIDRS", value_name = "CIDRS", hide_env_values = true)]
    metrics_cidrs: Option<String>,
    /// MiB of memory after which a run, or a session, is ended; no bound by default
    #[arg(long, env = "CLAWDFORGE_AGENT_MEMORY_MB", value_name = "MIB", hide_env_values = true)]
    agent_memory_mb: Option<String>,
    /// How log lines look: text or json [default: text]
    #[arg(long, env = "CLAWDFORGE_LOG", value_name = "FORMAT", hide_env_values = true)]
    log: Option<String>,
}

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

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The server's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address and port to listen on.
    pub bind: SocketAddr,
    /// Folder of the ledger, uploads and runs, as it was given.
    pub data_dir: PathBuf,
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
    /// Networks that see the metrics without the operator's token.
    pub metrics: Networks,
    /// MiB of memory after which a run, or a session, is ended.
    pub agent_memory_mb: Option<u64>,
    /// How log lines look.
    pub log: LogFormat,
}

/// A setting that can't be right: one sentence that names it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable} {why}.")]
pub struct BadSetting {
    variable: &'static str,
    why: String,
}

impl BadSetting {
    fn new(variable: &'static str, why: impl Into<String>) -> Self {
        Self { variable, why: why.into() }
    }
}

impl DataFlags {
    /// The data folder, as it was given.
    pub fn read(self) -> PathBuf {
        text(self.data_dir, "./data").into()
    }
}

impl BindFlags {
    /// The address to listen on.
    pub fn read(self) -> Result<SocketAddr, BadSetting> {
        let bind = text(self.bind, "127.0.0.1:8800");
        bind.parse().map_err(|_| {
            BadSetting::new("CLAWDFORGE_BIND", format!("is \"{bind}\", which is not an IP address and port such as 127.0.0.1:8800"))
        })
    }
}

impl Flags {
    /// Whether the admin token came in a way that other processes can read.
    pub fn show_admin_token(&self) -> bool {
        given(self.admin_token.as_deref()).is_some()
    }

    /// Checks every setting.
    pub fn read(self) -> Result<Settings, BadSetting> {
        let admin = admin(&self)?;
        let max_upload_bytes: u64 = number("CLAWDFORGE_MAX_UPLOAD_BYTES", self.max_upload_bytes, 104_857_600, 1..=1 << 40)?;
        Ok(Settings {
            bind: self.bind.read()?,
            data_dir: self.data.read(),
            admin,
            allow: networks("CLAWDFORGE_ALLOW_CIDRS", &text(self.allow_cidrs, DEFAULT_ALLOW))?,
            trusted_proxies: networks("CLAWDFORGE_TRUSTED_PROXIES", &text(self.trusted_proxies, ""))?,
            claude_bin: text(self.claude_bin, "claude").into(),
            acpx_bin: text(self.acpx_bin, "acpx").into(),
            max_runs: number("CLAWDFORGE_MAX_RUNS", self.max_runs, 8, 1..=1000)?,
            max_queued_runs: number("CLAWDFORGE_MAX_QUEUED_RUNS", self.max_queued_runs, 64, 0..=100_000)?,
            agents: agents(&text(self.agents, "claude"))?,
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
            sweep_every: Duration::from_secs(number("CLAWDFORGE_SWEEP_SECS", self.sweep_secs, 60, 1..=86_400)?),
            max_upload_bytes,
            retention_days: number("CLAWDFORGE_RETENTION_DAYS", self.retention_days, 90, 1..=36_500)?,
            drain: Duration::from_secs(number("CLAWDFORGE_DRAIN_SECS", self.drain_secs, 20, 0..=3600)?),
            standby: number("CLAWDFORGE_STANDBY", self.standby, 2, 0..=1000)?,
            sandbox: match given(self.sandbox.as_deref()).unwrap_or("auto") {
                "required" => Sandbox::Required,
                "auto" => Sandbox::Auto,
                "off" => Sandbox::Off,
                other => {
                    return Err(BadSetting::new("CLAWDFORGE_SANDBOX", format!("is \"{other}\", which is neither required, auto nor off")));
                }
            },
            metrics: networks("CLAWDFORGE_METRICS_CIDRS", &text(self.metrics_cidrs, ""))?,
            agent_memory_mb: match number("CLAWDFORGE_AGENT_MEMORY_MB", self.agent_memory_mb, 0, 0..=1 << 20)? {
                0 => None,
                mib => Some(mib),
            },
            log: match given(self.log.as_deref()).unwrap_or("text") {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                other => return Err(BadSetting::new("CLAWDFORGE_LOG", format!("is \"{other}\", which is neither text nor json"))),
            },
        })
    }
}

/// What agents get of this process's environment. A sign-in that stands in a file (`ANTHROPIC_API_KEY_FILE`) is read from
/// it.
pub fn agents_environment() -> Result<Environment, BadSetting> {
    with_sign_ins(Environment::inherited())
}

fn with_sign_ins(mut environment: Environment) -> Result<Environment, BadSetting> {
    for (variable, file_variable) in SIGN_INS {
        let Some(file) = environment.take(file_variable) else { continue };
        let Some(file) = given(file.to_str()).map(str::to_owned) else { continue };
        if environment.get(variable).is_some_and(|value| !value.is_empty()) {
            return Err(BadSetting::new(file_variable, format!("and {variable} are both set; set one of them")));
        }
        let secret = in_file(file_variable, &file)?;
        if secret.is_empty() || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadSetting::new(file_variable, format!("names \"{file}\", which does not hold one token and nothing else")));
        }
        environment.set(variable, secret);
    }
    Ok(environment)
}

impl Settings {
    /// The ledger's file inside a data folder.
    pub fn ledger_file(data_dir: &Path) -> PathBuf {
        data_dir.join("clawdforge.db")
    }
}

fn admin(flags: &Flags) -> Result<Option<TokenHash>, BadSetting> {
    const FILE: &str = "CLAWDFORGE_ADMIN_TOKEN_FILE";
    let hash = given(flags.admin_token_sha256.as_deref());
    let (variable, token) = match (given(flags.admin_token.as_deref()), given(flags.admin_token_file.as_deref())) {
        (Some(_), Some(_)) => return Err(BadSetting::new(FILE, "and CLAWDFORGE_ADMIN_TOKEN are both set; set one of them")),
        (Some(_), _) | (_, Some(_)) if hash.is_some() => {
            return Err(BadSetting::new(ADMIN_TOKEN_SHA256, "and the token itself are both set; set one of them"));
        }
        (Some(token), None) => (ADMIN_TOKEN, token.to_owned()),
        (None, Some(file)) => (FILE, in_file(FILE, file)?),
        (None, None) => {
            return match hash {
                None => Ok(None),
                Some(hash) => TokenHash::from_hex(hash)
                    .map(Some)
                    .ok_or_else(|| BadSetting::new(ADMIN_TOKEN_SHA256, "is not 64 lower-case hex digits")),
            };
        }
    };
    if token.chars().count() < ADMIN_TOKEN_MIN {
        return Err(BadSetting::new(variable, format!("holds a token shorter than {ADMIN_TOKEN_MIN} characters; choose a longer one")));
    }
    // What can't stand in a header could never be presented.
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(BadSetting::new(variable, "holds a token with spaces or characters beyond ASCII; choose another one"));
    }
    Ok(Some(TokenHash::of(&token)))
}

/// What a file that a variable names holds.
fn in_file(variable: &'static str, file: &str) -> Result<String, BadSetting> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => Err(BadSetting::new(variable, format!("names \"{file}\", which can't be read ({error})"))),
    }
}

/// Compose files pass unset variables on as empty ones.
fn given(value: Option<&str>) -> Option<&str> {
    value.map(str::trim).filter(|text| !text.is_empty())
}

fn text(value: Option<String>, default: &str) -> String {
    given(value.as_deref()).unwrap_or(default).to_owned()
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

fn networks(variable: &'static str, list: &str) -> Result<Networks, BadSetting> {
    list.parse().map_err(|error| BadSetting::new(variable, format!("is wrong: {error}")))
}

fn number<T>(variable: &'static str, value: Option<String>, default: T, range: std::ops::RangeInclusive<T>) -> Result<T, BadSetting>
where
    T: FromStr + PartialOrd + std::fmt::Display,
{
    let Some(text) = given(value.as_deref()) else { return Ok(default) };
    text.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| {
        BadSetting::new(variable, format!("is \"{text}\", which is not a whole number from {} to {}", range.start(), range.end()))
    })
}

#[cfg(test)]
mod tests {
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
            wrong(Flags { max_runs: Some("0".into()), ..Flags::default() }),
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
    fn an_empty_value_is_an_absent_one() {
        let flags = Flags { max_runs: Some(" ".into()), admin_token: Some(String::new()), ..Flags::default() };
        assert_eq!(flags.read().unwrap().max_runs, 8);
    }

    #[test]
    fn a_sign_in_may_stand_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        let read = |content: &str, more: &[(&str, &str)]| {
            std::fs::write(&file, content).unwrap();
            let named = ("ANTHROPIC_API_KEY_FILE", file.to_str().unwrap());
            with_sign_ins(Environment::of(more.iter().copied().chain([named]))).map_err(|error| error.to_string())
        };
        let environment = read("sk-1\n", &[("ANTHROPIC_API_KEY", "")]).unwrap();
        assert_eq!(environment.iter().collect::<Vec<_>>(), [("ANTHROPIC_API_KEY".as_ref(), "sk-1".as_ref())]);
        let both = read("sk-1", &[("ANTHROPIC_API_KEY", "sk-2")]).unwrap_err();
        assert_eq!(both, "ANTHROPIC_API_KEY_FILE and ANTHROPIC_API_KEY are both set; set one of them.");
        for wrong in ["", "two words"] {
            assert!(read(wrong, &[]).unwrap_err().ends_with("which does not hold one token and nothing else."));
        }
    }
}
