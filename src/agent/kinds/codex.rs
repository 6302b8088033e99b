//! OpenAI's codex, by its adapter.

use super::{Kind, Naming, SignIn};
use crate::agent::programs::Tested;
use crate::agent::turn::{APPROVE_ALL, ASK};

pub(super) const KIND: Kind = Kind {
    name: "codex",
    package: "@agentclientprotocol/codex-acp",
    program: "codex-acp",
    arguments: &[],
    tested: Tested("2.6.0", "2.6.0"),
    hosts: &["api.openai.com", "chatgpt.com", "auth.openai.com"],
    variables: &[],
    sign_in: SignIn {
        variables: &["OPENAI_API_KEY", "CODEX_API_KEY"],
        home: Some("CODEX_HOME"),
        folder: ".codex",
        files: &["auth.json"],
        good_once: Some("refresh_token"),
        methods: &[(Some("OPENAI_API_KEY"), "api-key")],
        how: "run \"codex login\" once, or set OPENAI_API_KEY",
    },
    model: Naming::Option,
    // In its other modes it has a sandbox of its own. Within ours that can't be had: then no command runs but one for which it asks.
    permissions: &[APPROVE_ALL, "deny-all", ASK],
    told: |permissions| Some(("INITIAL_AGENT_MODE", mode(permissions))),
    mode: |permissions| Some(mode(permissions)),
    takes_system: false,
    settings: None,
    before_resume: |_, _| Ok(()),
    lost: &["no rollout found"],
};

fn mode(permissions: &str) -> &'static str {
    if permissions == APPROVE_ALL { "agent-full-access" } else { "read-only" }
}
