//! opencode.

use super::{Kind, Naming, SignIn, nothing};
use crate::agent::programs::Tested;
use crate::agent::turn::{APPROVE_ALL, PERMISSIONS};

pub(super) const KIND: Kind = Kind {
    name: "opencode",
    package: "opencode-ai",
    program: "opencode",
    arguments: &["acp"],
    tested: Tested("1.18.18", "1.18.18"),
    hosts: &[],
    variables: &[
        ("OPENCODE_DISABLE_AUTOUPDATE", "1"),
        ("OPENCODE_DISABLE_LSP_DOWNLOAD", "1"),
        // It would fetch its own plugins into each room, 20 MB of them.
        ("npm_config_offline", "true"),
    ],
    sign_in: SignIn {
        variables: &["OPENCODE_AUTH_CONTENT", "OPENCODE_API_KEY", "OPENCODE_CONFIG_CONTENT", "ANTHROPIC_API_KEY", "OPENAI_API_KEY"],
        home: None,
        folder: ".local/share/opencode",
        files: &["auth.json"],
        good_once: Some("refresh"),
        methods: &[],
        how: "run \"opencode auth login\" once, or set its provider's key",
    },
    model: Naming::Option,
    permissions: &PERMISSIONS,
    // It asks for nothing unless it is told to.
    told: |permissions| (permissions != APPROVE_ALL).then_some(("OPENCODE_PERMISSION", r#"{"*":"ask"}"#)),
    mode: nothing,
    takes_system: false,
    settings: None,
    before_resume: |_, _| Ok(()),
    lost: &[r#""service":"session""#],
};
