//! Everything real but the model: an installer of pinned CLIs ([`install`]) and a stub of the Messages API ([`stub`]).
//! For `clawdforge demo`, for an app's own integration tests, and for this project's.

pub mod install;
pub mod stub;

use std::path::Path;

use crate::agent::environment::Environment;
use install::Clis;

/// What agents get of the environment when they are to talk to the stub at `url` and keep to the folder `home`. Nothing
/// of the user's own sign-in or settings gets in.
pub fn environment(clis: &Clis, url: &str, home: &Path) -> Environment {
    let fixed = [
        ("ANTHROPIC_BASE_URL", url.into()),
        ("ANTHROPIC_API_KEY", "stub".into()),
        ("HOME", home.as_os_str().to_owned()),
        ("PATH", clis.path.clone()),
        // The adapter's own copy is left out.
        ("CLAUDE_CODE_EXECUTABLE", clis.claude.clone().into()),
        ("LANG", "C.UTF-8".into()),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".into()),
        ("DISABLE_TELEMETRY", "1".into()),
        ("DISABLE_AUTOUPDATER", "1".into()),
    ];
    Environment::of(fixed)
}
