//! claude, by its adapter. Its room, its sign-in and its sandbox are done apart ([`crate::agent::acpx::workspace`]): acpx needs them too.

use super::{Kind, Naming, SignIn, nothing};
use crate::agent::programs::ADAPTER_TESTED;
use crate::agent::turn::PERMISSIONS;

pub(super) const KIND: Kind = Kind {
    name: "claude",
    package: "@agentclientprotocol/claude-agent-acp",
    program: "claude-agent-acp",
    arguments: &[],
    tested: ADAPTER_TESTED,
    hosts: &["api.anthropic.com"],
    variables: &[],
    sign_in: SignIn {
        variables: &[],
        home: None,
        folder: ".claude",
        files: &[],
        good_once: None,
        methods: &[],
        how: "run \"claude\" once",
    },
    model: Naming::Variable("ANTHROPIC_MODEL"),
    permissions: &PERMISSIONS,
    told: nothing,
    // In which it asks for what isn't plainly safe. It is named each time, because what an adapter starts in changes.
    mode: |_| Some("default"),
    takes_system: true,
    settings: None,
    before_resume: |_, _| Ok(()),
    lost: &[],
};
