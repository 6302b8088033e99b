//! The flags, each with its variable, as they were given.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::value::{BadSetting, given, text};

/// Where the server keeps what is its own.
#[derive(Args, Clone, Debug, Default)]
pub struct DataFlags {
    /// Folder of the ledger, uploads and runs [default: ./data]
    #[arg(long, env = "CLAWDFORGE_DATA_DIR", value_name = "DIR", hide_env_values = true)]
    pub(super) data_dir: Option<String>,
}

/// Where the server listens.
#[derive(Args, Clone, Debug, Default)]
pub struct BindFlags {
    /// Address and port to listen on [default: 127.0.0.1:8800]
    #[arg(long, env = "CLAWDFORGE_BIND", value_name = "ADDRESS:PORT", hide_env_values = true)]
    pub(super) bind: Option<String>,
}

/// Where and how agents work on a machine, each flag with its variable.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct AgentFlags {
    #[command(flatten)]
    pub(super) data: DataFlags,
    /// The claude program, by path or by name on PATH [default: claude]
    #[arg(long, env = "CLAWDFORGE_CLAUDE_BIN", value_name = "PROGRAM", hide_env_values = true)]
    pub(super) claude_bin: Option<String>,
    /// The acpx program, by path or by name on PATH [default: acpx]
    #[arg(long, env = "CLAWDFORGE_ACPX_BIN", value_name = "PROGRAM", hide_env_values = true)]
    pub(super) acpx_bin: Option<String>,
    /// Runs at once [default: 8]
    #[arg(long, env = "CLAWDFORGE_MAX_RUNS", value_name = "N", hide_env_values = true)]
    pub(super) max_runs: Option<String>,
    /// Agents that sessions may name [default: claude]
    #[arg(long, env = "CLAWDFORGE_AGENTS", value_name = "NAME,…", hide_env_values = true)]
    pub(super) agents: Option<String>,
    /// The sweeper's period in seconds [default: 60]
    #[arg(long, env = "CLAWDFORGE_SWEEP_SECS", value_name = "SECONDS", hide_env_values = true)]
    pub(super) sweep_secs: Option<String>,
    /// Seconds that a stop waits for running work [default: 20]
    #[arg(long, env = "CLAWDFORGE_DRAIN_SECS", value_name = "SECONDS", hide_env_values = true)]
    pub(super) drain_secs: Option<String>,
    /// Idle processes that are kept started ahead of need; 0 for none [default: 2]
    #[arg(long, env = "CLAWDFORGE_STANDBY", value_name = "N", hide_env_values = true)]
    pub(super) standby: Option<String>,
    /// Whether agents are shut out of the data folder and the home: required, auto or off [default: auto]
    #[arg(long, env = "CLAWDFORGE_SANDBOX", value_name = "WHEN", hide_env_values = true)]
    pub(super) sandbox: Option<String>,
    /// What agents can read in the home of the server's user beside programs and claude's settings, as on PATH; nothing by default
    #[arg(long, env = "CLAWDFORGE_AGENTS_READ", value_name = "PATH:…", hide_env_values = true)]
    pub(super) agents_read: Option<String>,
    /// What agents reach whose app's token lets them reach the models' APIs alone, beside those: HOST:PORT,…; nothing by default
    #[arg(long, env = "CLAWDFORGE_MODEL_HOSTS", value_name = "HOST,…", hide_env_values = true)]
    pub(super) model_hosts: Option<String>,
    /// MiB of memory after which a run, or a session, is ended; no bound by default
    #[arg(long, env = "CLAWDFORGE_AGENT_MEMORY_MB", value_name = "MIB", hide_env_values = true)]
    pub(super) agent_memory_mb: Option<String>,
    /// MiB in its folder after which a run, or a session, is ended; no bound by default
    #[arg(long, env = "CLAWDFORGE_AGENT_DISK_MB", value_name = "MIB", hide_env_values = true)]
    pub(super) agent_disk_mb: Option<String>,
    /// Processes and threads that a run, or a session, may have, where the server can make control groups [default: 1024]
    #[arg(long, env = "CLAWDFORGE_AGENT_PROCESSES", value_name = "N", hide_env_values = true)]
    pub(super) agent_processes: Option<String>,
    /// Seconds without a turn after which a session's agent is ended, until the next turn [default: 300]
    #[arg(long, env = "CLAWDFORGE_AGENT_IDLE_SECS", value_name = "SECONDS", hide_env_values = true)]
    pub(super) agent_idle_secs: Option<String>,
    /// What speaks to the agents of new sessions: this program (direct) or acpx [default: direct]
    #[arg(long, env = "CLAWDFORGE_ACP", value_name = "DRIVER", hide_env_values = true)]
    pub(super) acp: Option<String>,
    /// How log lines look: text or json [default: text]
    #[arg(long, env = "CLAWDFORGE_LOG", value_name = "FORMAT", hide_env_values = true)]
    pub(super) log: Option<String>,
}

/// How machines find each other, each flag with its variable.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct NatsFlags {
    /// NATS servers by which work goes to other machines, comma-joined; prefer the variable where it holds a password; none by default
    #[arg(long, env = "CLAWDFORGE_NATS_URL", value_name = "nats://HOST:4222,…", hide_env_values = true)]
    pub(super) nats_url: Option<String>,
    /// File with the credentials for them, as nsc writes it
    #[arg(long, env = "CLAWDFORGE_NATS_CREDS", value_name = "FILE", hide_env_values = true)]
    pub(super) nats_creds: Option<String>,
    /// File with the certificates of who signs theirs, where the system does not know them
    #[arg(long, env = "CLAWDFORGE_NATS_CA", value_name = "FILE", hide_env_values = true)]
    pub(super) nats_ca: Option<String>,
}

/// The flags of `worker`, each with its variable.
#[derive(Args, Clone, Debug, Default)]
pub struct WorkerFlags {
    #[command(flatten)]
    pub(super) nats: NatsFlags,
    /// What this machine is called, always the same [default: the host's name]
    #[arg(long, env = "CLAWDFORGE_WORKER_NAME", value_name = "NAME", hide_env_values = true)]
    pub(super) worker_name: Option<String>,
    #[command(flatten)]
    pub(super) agents: AgentFlags,
}

/// The flags of `serve`, each with its variable.
#[derive(Args, Clone, Default)]
pub struct Flags {
    #[command(flatten)]
    pub(super) bind: BindFlags,
    #[command(flatten)]
    pub(super) agents: AgentFlags,
    #[command(flatten)]
    pub(super) nats: NatsFlags,
    /// The operator's bearer token, at least 16 characters; prefer the variable or a file: flags show in `ps`
    #[arg(long, env = "CLAWDFORGE_ADMIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub(super) admin_token: Option<String>,
    /// File that holds the operator's bearer token
    #[arg(long, env = "CLAWDFORGE_ADMIN_TOKEN_FILE", value_name = "FILE", hide_env_values = true)]
    pub(super) admin_token_file: Option<String>,
    /// SHA-256 of the operator's bearer token, in hex: then nothing on this machine holds the token itself
    #[arg(long, env = "CLAWDFORGE_ADMIN_TOKEN_SHA256", value_name = "HEX", hide_env_values = true)]
    pub(super) admin_token_sha256: Option<String>,
    /// Networks that are answered at all [default: loopback and the private networks]
    #[arg(long, env = "CLAWDFORGE_ALLOW_CIDRS", value_name = "CIDR,…", hide_env_values = true)]
    pub(super) allow_cidrs: Option<String>,
    /// Peers whose X-Forwarded-For counts [default: none]
    #[arg(long, env = "CLAWDFORGE_TRUSTED_PROXIES", value_name = "CIDR,…", hide_env_values = true)]
    pub(super) trusted_proxies: Option<String>,
    /// Runs that wait for a place, past which 503 [default: 64]
    #[arg(long, env = "CLAWDFORGE_MAX_QUEUED_RUNS", value_name = "N", hide_env_values = true)]
    pub(super) max_queued_runs: Option<String>,
    /// Open sessions at once [default: 32]
    #[arg(long, env = "CLAWDFORGE_MAX_SESSIONS", value_name = "N", hide_env_values = true)]
    pub(super) max_sessions: Option<String>,
    /// Seconds without a turn after which a session is closed [default: 3600]
    #[arg(long, env = "CLAWDFORGE_SESSION_TTL_SECS", value_name = "SECONDS", hide_env_values = true)]
    pub(super) session_ttl_secs: Option<String>,
    /// Seconds after which a closed session is deleted [default: 86400]
    #[arg(long, env = "CLAWDFORGE_SESSION_HARD_TTL_SECS", value_name = "SECONDS", hide_env_values = true)]
    pub(super) session_hard_ttl_secs: Option<String>,
    /// The largest upload in bytes [default: 104857600]
    #[arg(long, env = "CLAWDFORGE_MAX_UPLOAD_BYTES", value_name = "BYTES", hide_env_values = true)]
    pub(super) max_upload_bytes: Option<String>,
    /// Days that rows of finished runs are kept [default: 90]
    #[arg(long, env = "CLAWDFORGE_RETENTION_DAYS", value_name = "DAYS", hide_env_values = true)]
    pub(super) retention_days: Option<String>,
    /// Networks that see /metrics without the operator's token, comma-joined; none by default
    #[arg(long, env = "CLAWDFORGE_METRICS_CIDRS", value_name = "CIDRS", hide_env_values = true)]
    pub(super) metrics_cidrs: Option<String>,
    /// Other names of models, for apps that insist on theirs: gpt-4o=sonnet,…; none by default
    #[arg(long, env = "CLAWDFORGE_MODEL_MAP", value_name = "NAME=MODEL,…", hide_env_values = true)]
    pub(super) model_map: Option<String>,
    /// Networks that apps' webhooks may go to [default: those that the app's token may come from]
    #[arg(long, env = "CLAWDFORGE_WEBHOOK_CIDRS", value_name = "CIDR,…", hide_env_values = true)]
    pub(super) webhook_cidrs: Option<String>,
    /// Where the operator is told when claude's sign-in fails; nowhere by default
    #[arg(long, env = "CLAWDFORGE_OPERATOR_WEBHOOK", value_name = "URL", hide_env_values = true)]
    pub(super) operator_webhook: Option<String>,
    /// What that is signed with, whsec_…; prefer the variable: flags show in `ps`
    #[arg(long, env = "CLAWDFORGE_OPERATOR_WEBHOOK_SECRET", value_name = "SECRET", hide_env_values = true)]
    pub(super) operator_webhook_secret: Option<String>,
    /// Whether there is a page for the operator at /ui: on or off [default: on]
    #[arg(long, env = "CLAWDFORGE_UI", value_name = "WHETHER", hide_env_values = true)]
    pub(super) ui: Option<String>,
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
}
