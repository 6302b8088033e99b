//! The `claude` CLI's own files, under the user's home.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::agent::environment::Environment;
use crate::agent::folder::{is_regular, read_regular, remove_tree};
use crate::blocking::blocking;

/// Bytes of one of the CLI's own files, at most.
const MOST_IN_A_FILE: u64 = 64 << 20;

/// The folder of the CLI's own files.
pub fn config_folder(environment: &Environment) -> Option<PathBuf> {
    let home = || environment.get("HOME").map(|home| Path::new(home).join(".claude"));
    environment.get("CLAUDE_CONFIG_DIR").map(PathBuf::from).or_else(home)
}

/// What of its files the CLI reads when it starts, and not again for a run.
pub fn read_at_start(environment: &Environment) -> Vec<PathBuf> {
    let config = config_folder(environment).unwrap_or_default();
    let own = [".credentials.json", "settings.json", "CLAUDE.md", "agents", "skills", "rules"];
    own.iter().map(|file| config.join(file)).chain([PathBuf::from("/etc/claude-code/managed-settings.json")]).collect()
}

/// The file that every process of the CLI reads and writes.
fn state_file(environment: &Environment) -> PathBuf {
    let folder = environment.get("CLAUDE_CONFIG_DIR").or_else(|| environment.get("HOME")).unwrap_or_default();
    Path::new(folder).join(".claude.json")
}

/// What else of its files the CLI reads at its start without a look at what they are (seen in 2.1.332).
const WAITED_FOR: &[&str] = &["plugins/installed_plugins.json", "plugins/known_marketplaces.json", "skills/manifest.json"];
/// The same, of the home folder.
const WAITED_FOR_AT_HOME: &[&str] = &[".config/anthropic/active_config", ".config/anthropic/configs/default.json"];

/// What the CLI would wait for when it starts, for ever, in words. Agents may write where it reads, and could have put a pipe there.
pub fn obstacle(environment: &Environment) -> Option<String> {
    let config = config_folder(environment).unwrap_or_default();
    let home = environment.get("HOME").map(PathBuf::from).unwrap_or_default();
    let others = WAITED_FOR.iter().map(|file| config.join(file)).chain(WAITED_FOR_AT_HOME.iter().map(|file| home.join(file)));
    let files = read_at_start(environment).into_iter().chain([state_file(environment)]).chain(others);
    let wrong = |path: PathBuf| {
        // What is not there is not read.
        let file = path.metadata().ok().filter(|file| !file.is_dir())?;
        let error = is_regular(&file, MOST_IN_A_FILE).err()?;
        Some(format!("claude can't be started with {}: {error}; ask the operator to remove it", path.display()))
    };
    files.into_iter().find_map(wrong)
}

/// The same, looked for on a thread that may wait for the disk.
pub async fn obstacle_for(environment: &Environment) -> Option<String> {
    let environment = environment.clone();
    blocking(move || Ok(obstacle(&environment))).await.ok().flatten()
}

/// What of `.claude.json`, which every process of the CLI writes to, is a sign-in or a setting.
pub fn kept_in_its_state(environment: &Environment) -> String {
    let state = read_regular(&state_file(environment), MOST_IN_A_FILE).unwrap_or_default();
    let all: Value = serde_json::from_slice(&state).unwrap_or_default();
    ["primaryApiKey", "oauthAccount", "mcpServers"].map(|key| all[key].to_string()).concat()
}

/// Removes what the CLI keeps of a run under the user's home although it was told to keep nothing.
pub fn clean_up(session_id: &str, environment: &Environment) -> io::Result<()> {
    // It becomes part of a path.
    if session_id.is_empty() || !session_id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Ok(());
    }
    let Some(Ok(kinds)) = config_folder(environment).map(|config| config.read_dir()) else { return Ok(()) };
    let unsent = format!("1p_failed_events.{session_id}.");
    for kind in kinds {
        let kind = kind?.path();
        // `session-env`, and whatever else is filed by session.
        let path = kind.join(session_id);
        if path.exists() {
            remove_tree(&path)?;
        }
        // Telemetry that could not be sent, a file a session.
        let files = kind.ends_with("telemetry").then(|| kind.read_dir()).transpose()?;
        for file in files.into_iter().flatten().flatten() {
            if file.file_name().as_encoded_bytes().starts_with(unsent.as_bytes()) {
                remove_tree(&file.path())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_filed_by_session_goes_with_it() {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join(".claude");
        for folder in ["session-env/one", "session-env/two", "telemetry"] {
            std::fs::create_dir_all(config.join(folder)).unwrap();
        }
        for file in ["session-env/one/a", "telemetry/1p_failed_events.one.5.json", "telemetry/1p_failed_events.two.6.json"] {
            std::fs::write(config.join(file), "").unwrap();
        }
        let environment = Environment::of([("HOME", home.path())]);
        clean_up("one", &environment).unwrap();
        clean_up("../session-env/two", &environment).unwrap();
        let left = |folder: &str| config.join(folder).read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(left("session-env"), ["two"]);
        assert_eq!(left("telemetry"), ["1p_failed_events.two.6.json"]);
    }
}
