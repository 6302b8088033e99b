//! Everything real but the model: an installer of pinned CLIs ([`install`]) and a stub of the models' APIs ([`stub`]).
//! For `clawdforge demo`, for an app's own integration tests, and for this project's.

pub mod install;
pub mod past;
pub mod stub;

use std::path::Path;

use serde_json::{Value, json};

use crate::agent::environment::Environment;
use install::Clis;

/// The agents that a demonstration can show.
pub const AGENTS: [&str; 5] = ["claude", "codex", "gemini", "opencode", "qwen"];

/// What agents get of the environment when they are to talk to the stub at `url` and keep to the folder `home`. Nothing
/// of the user's own sign-in or settings gets in.
pub fn environment(clis: &Clis, url: &str, home: &Path) -> Environment {
    let fixed = [
        ("ANTHROPIC_BASE_URL", url.into()),
        ("ANTHROPIC_API_KEY", "stub".into()),
        ("HOME", home.as_os_str().to_owned()),
        ("PATH", clis.path.clone()),
        ("OPENAI_BASE_URL", format!("{url}/v1").into()),
        ("OPENAI_API_KEY", "stub".into()),
        ("OPENAI_MODEL", "stub".into()),
        ("CODEX_CONFIG", codex(url).to_string().into()),
        ("GOOGLE_GEMINI_BASE_URL", url.into()),
        ("GEMINI_API_KEY", "stub".into()),
        ("GEMINI_MODEL", "gemini-2.5-pro".into()),
        ("OPENCODE_CONFIG_CONTENT", opencode(url).to_string().into()),
        // The adapter's own copy is left out.
        ("CLAUDE_CODE_EXECUTABLE", clis.claude.clone().into()),
        ("LANG", "C.UTF-8".into()),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".into()),
        ("DISABLE_TELEMETRY", "1".into()),
        ("DISABLE_AUTOUPDATER", "1".into()),
        ("OPENCODE_DISABLE_MODELS_FETCH", "1".into()),
    ];
    Environment::of(fixed)
}

/// Codex asks its own API only for an account, and another one by such a table. What fails is not tried again.
fn codex(url: &str) -> Value {
    json!({
        "model_provider": "stub",
        "model_providers": {"stub": {
            "name": "stub", "base_url": format!("{url}/v1"), "env_key": "OPENAI_API_KEY", "wire_api": "responses",
            "request_max_retries": 0, "stream_max_retries": 0,
        }},
        "analytics": {"enabled": false},
    })
}

fn opencode(url: &str) -> Value {
    json!({
        "model": "stub/stub",
        "small_model": "stub/stub",
        "share": "disabled",
        "autoupdate": false,
        "provider": {"stub": {
            "npm": "@ai-sdk/openai-compatible", "options": {"baseURL": format!("{url}/v1"), "apiKey": "stub"}, "models": {"stub": {}},
        }},
    })
}
