//! What the handlers share.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::agent::environment::Environment;
use crate::agent::kinds::Kind;
use crate::agent::network;
use crate::agent::programs::Cli;
use crate::cluster::elsewhere::Elsewhere;
use crate::config::OperatorWebhook;
use crate::job::Jobs;
use crate::job::feed::Feeds;
use crate::ledger::Ledger;
use crate::listener::Standing;
use crate::models::Models;
use crate::network::Networks;
use crate::secret::TokenHash;
use crate::session::Sessions;
use crate::uploads::Uploads;
use crate::wrong_tokens::WrongTokens;

/// What the handlers share.
pub struct App {
    /// Who may call.
    pub access: Access,
    /// The folder of all that is the server's own.
    pub data_dir: PathBuf,
    /// The operator's own webhook.
    pub operator_webhook: Option<OperatorWebhook>,
    /// Whether there is a page for the operator.
    pub ui: bool,
    /// The ledger.
    pub ledger: Ledger,
    /// The uploads.
    pub uploads: Uploads,
    /// Other machines, where work can go there.
    pub elsewhere: Option<Elsewhere>,
    /// Runs and turns.
    pub jobs: Jobs,
    /// What they say.
    pub feeds: Feeds,
    /// The sessions.
    pub sessions: Sessions,
    /// The models.
    pub models: Models,
    /// Agents that sessions may name.
    pub agents: Vec<String>,
    /// What shuts agents out of the data folder: `landlock`, or `off`.
    pub sandbox: &'static str,
    /// Whether agents can be bound in what they reach of the network; why not.
    pub network: Result<(), network::Impossible>,
    /// The `claude` CLI.
    pub claude: Arc<Cli>,
    /// The `acpx` CLI.
    pub acpx: Arc<Cli>,
    /// The adapter between acpx and claude.
    pub adapter: Arc<Cli>,
    /// The other agents that sessions may name, as far as the server knows them.
    pub others: Vec<OtherAgent>,
}

/// An agent other than claude.
pub struct OtherAgent {
    /// What it is.
    pub kind: &'static Kind,
    /// Its program.
    pub cli: Arc<Cli>,
    /// Where its sign-in may stand.
    pub environment: Environment,
}

/// Who may call.
#[derive(Debug)]
pub struct Access {
    /// Networks that are answered at all.
    pub allow: Networks,
    /// Peers whose `X-Forwarded-For` counts.
    pub trusted_proxies: Networks,
    /// The operator's token.
    pub admin: Option<TokenHash>,
    /// Networks that see the metrics without it.
    pub metrics: Networks,
    /// Networks that webhooks may go to; `None` for where the app's token may come from.
    pub webhooks: Option<Networks>,
    /// Who sent wrong tokens lately.
    pub wrong: WrongTokens,
}

impl Access {
    /// What an address may do here.
    pub fn standing(&self, address: IpAddr) -> Standing {
        if self.trusted_proxies.contain(address) {
            Standing::Proxy
        } else if self.allow.contain(address) {
            Standing::Allowed
        } else {
            Standing::Stranger
        }
    }
}
