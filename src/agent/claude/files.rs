//! The `claude` CLI's own files, under the user's home.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokio::process::Command;

use crate::agent::environment::Environment;
use crate::agent::folder::{is_regular, read_regular};
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

/// The user's settings that a run's agent reads, in the folder of the CLI's own files.
const SETTINGS: &[&str] = &["settings.json", "CLAUDE.md", "agents", "commands", "output-styles", "plugins", "rules", "skills"];
/// What of `.claude.json` is of no use to an agent: which folders the user has worked in, and what was said there.
const OF_THE_USER: &[&str] = &["projects", "githubRepoPaths"];

/// Makes a folder for the CLI's own files of a run: what it writes stays there, but for the sign-in, which it renews where that is.
/// The user's settings are links, and the state, which every process of the CLI would else write, is a copy.
pub fn make_config(folder: &Path, environment: &Environment) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(folder)?;
    write_state(folder, environment)?;
    let config = config_folder(environment).unwrap_or_default();
    // The CLI would put a file of its own in the place of a link to nothing.
    let mut names = SETTINGS.iter().filter(|name| config.join(name).exists());
    names.try_for_each(|name| symlink(config.join(name), folder.join(name)))
}

/// Copies the user's state into such a folder.
pub fn write_state(folder: &Path, environment: &Environment) -> io::Result<()> {
    let state = read_regular(&state_file(environment), MOST_IN_A_FILE).unwrap_or_default();
    let mut all: Map<String, Value> = serde_json::from_slice(&state).unwrap_or_default();
    for key in OF_THE_USER {
        all.remove(*key);
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join(".claude.json"))?;
    file.write_all(serde_json::to_string(&all)?.as_bytes())
}

/// Has `command` be a claude with such a folder.
pub fn use_config(command: &mut Command, folder: &Path, environment: &Environment) {
    // These fail where they can't write what they fetched, and the home folder may be closed to them.
    command.env("npm_config_cache", folder.join("npm")).env("UV_CACHE_DIR", folder.join("uv"));
    command.env("CLAUDE_CONFIG_DIR", folder);
    // Its lock is there, too (seen in claude 2.1.197, which does not document it).
    command.env("CLAUDE_SECURESTORAGE_CONFIG_DIR", config_folder(environment).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_own_files_are_a_copy_of_the_state_and_links_to_the_settings() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(home.path().join(".claude/skills")).unwrap();
        std::fs::write(home.path().join(".claude.json"), r#"{"projects": {"/secret": {}}, "mcpServers": {"a": 1}}"#).unwrap();
        let environment = Environment::of([("HOME", home.path())]);
        let own = home.path().join("own");
        make_config(&own, &environment).unwrap();
        assert_eq!(std::fs::read_to_string(own.join(".claude.json")).unwrap(), r#"{"mcpServers":{"a":1}}"#);
        let names: Vec<_> = own.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).filter(|name| name != ".claude.json").collect();
        assert_eq!(names, ["skills"]);
        make_config(&home.path().join("bare"), &Environment::of([("HOME", home.path().join("nobody"))])).unwrap();
        assert_eq!(std::fs::read_to_string(home.path().join("bare/.claude.json")).unwrap(), "{}");
    }
}
