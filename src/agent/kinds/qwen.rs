//! Qwen Code.

use super::{Kind, Naming, SignIn, nothing};
use crate::agent::programs::Tested;
use crate::agent::turn::PERMISSIONS;

pub(super) const KIND: Kind = Kind {
    name: "qwen",
    package: "@qwen-code/qwen-code",
    program: "qwen",
    arguments: &["--acp"],
    tested: Tested("0.24.4", "0.24.4"),
    hosts: &["dashscope.aliyuncs.com", "portal.qwen.ai", "chat.qwen.ai"],
    variables: &[],
    sign_in: SignIn {
        variables: &["OPENAI_API_KEY", "DASHSCOPE_API_KEY"],
        home: Some("QWEN_HOME"),
        folder: ".qwen",
        files: &["oauth_creds.json"],
        good_once: Some("refresh_token"),
        methods: &[],
        how: "run \"qwen\" once and sign in, or set OPENAI_API_KEY, OPENAI_BASE_URL and OPENAI_MODEL",
    },
    model: Naming::Variable("OPENAI_MODEL"),
    permissions: &PERMISSIONS,
    told: nothing,
    // It would else decide by a model of its own what to ask for.
    mode: |_| Some("default"),
    takes_system: false,
    settings: Some((".qwen/settings.json", r#"{"privacy":{"usageStatisticsEnabled":false},"general":{"enableAutoUpdate":false}}"#)),
    before_resume: |_, _| Ok(()),
    lost: &[],
};
