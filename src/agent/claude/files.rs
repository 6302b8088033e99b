//! The `claude` CLI's own files: the user's, and those that each agent has for itself.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokio::process::Command;

use super::sign_in;
use crate::agent::environment::Environment;
use crate::agent::folder::{is_regular, open_below, read_regular, replace};
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
    let own = ["settings.json", "CLAUDE.md", "agents", "skills", "rules"].map(|file| config.join(file));
    own.into_iter().chain([sign_in::file(environment), PathBuf::from("/etc/claude-code/managed-settings.json")]).collect()
}

/// The file that every process of the CLI reads and writes, in its configuration or, where that is not said, at home.
pub const STATE: &str = ".claude.json";

/// The same, of the user.
fn state_file(environment: &Environment) -> PathBuf {
    let folder = environment.get("CLAUDE_CONFIG_DIR").or_else(|| environment.get("HOME")).unwrap_or_default();
    Path::new(folder).join(STATE)
}

/// What else of its files the CLI reads at its start without a look at what they are (seen in 2.1.332).
const WAITED_FOR: &[&str] = &["plugins/installed_plugins.json", "plugins/known_marketplaces.json", "skills/manifest.json"];

/// What the CLI would wait for when it starts, for ever, in words. Agents may write where it reads where there is no sandbox, and could have put
/// a pipe there.
pub fn obstacle(environment: &Environment) -> Option<String> {
    let config = config_folder(environment).unwrap_or_default();
    let others = WAITED_FOR.iter().map(|file| config.join(file));
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

/// The user's settings that a run's agent reads, in the folder of the CLI's own files. The CLI knows nothing of `hooks`: settings name what
/// lies there.
const SETTINGS: &[&str] = &["settings.json", "CLAUDE.md", "agents", "commands", "hooks", "output-styles", "plugins", "rules", "skills"];
/// What of `.claude.json` is of no use to an agent: which folders the user has worked in, and what was said there.
const OF_THE_USER: &[&str] = &["projects", "githubRepoPaths"];

/// The user's settings.
pub fn settings(environment: &Environment) -> Vec<PathBuf> {
    let config = config_folder(environment).unwrap_or_default();
    SETTINGS.iter().map(|name| config.join(name)).collect()
}

/// Makes a folder for the CLI's own files of a run: what it writes stays there. The user's settings are links, and the state, which every
/// process of the CLI would else write, and the sign-in are copies.
pub fn make_config(folder: &Path, environment: &Environment) -> io::Result<()> {
    make_bare_config(folder)?;
    write_copies(folder, environment)?;
    // The CLI would put a file of its own in the place of a link to nothing.
    let mut there = settings(environment).into_iter().filter(|path| path.exists());
    there.try_for_each(|path| symlink(&path, folder.join(path.file_name().unwrap_or_default())))
}

/// Makes such a folder with nothing in it but a home, where `~/.claude` is the folder itself.
pub fn make_bare_config(folder: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(folder)?;
    make_home(folder)
}

/// Makes its home.
pub fn make_home(folder: &Path) -> io::Result<()> {
    let home = home_in(folder);
    DirBuilder::new().mode(0o700).create(&home)?;
    symlink("..", home.join(".claude"))
}

/// The home in such a folder.
pub fn home_in(folder: &Path) -> PathBuf {
    folder.join("home")
}

/// Copies the user's state and sign-in into such a folder.
pub fn write_copies(folder: &Path, environment: &Environment) -> io::Result<()> {
    let config = open_below(folder, &[])?;
    sign_in::put(&config, environment)?;
    let state = read_regular(&state_file(environment), MOST_IN_A_FILE).unwrap_or_default();
    let mut all: Map<String, Value> = serde_json::from_slice(&state).unwrap_or_default();
    for key in OF_THE_USER {
        all.remove(*key);
    }
    replace(&config, STATE, serde_json::to_string(&all)?.as_bytes())
}

/// Variables that would lead programs from the home that they are given back to the user's.
const OF_THE_HOME: &[&str] =
    &["CLAUDE_SECURESTORAGE_CONFIG_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"];

/// Has `command` be a claude with such a folder, at home in it.
pub fn use_config(command: &mut Command, folder: &Path) {
    command.env("HOME", home_in(folder)).env("CLAUDE_CONFIG_DIR", folder);
    for name in OF_THE_HOME {
        command.env_remove(name);
    }
}

/// The setting that names the folder of claude's memories.
pub const MEMORY: &str = "autoMemoryDirectory";

/// Has `command` be a claude that keeps memories, for which its settings name a folder.
pub fn keep_memory(command: &mut Command) {
    command.env("CLAUDE_CODE_DISABLE_AUTO_MEMORY", "0");
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
        let mut names: Vec<_> = own.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".claude.json", "home", "skills"]);
        assert_eq!(own.join("home/.claude/skills").canonicalize().unwrap(), home.path().join(".claude/skills").canonicalize().unwrap());
        make_config(&home.path().join("bare"), &Environment::of([("HOME", home.path().join("nobody"))])).unwrap();
        assert_eq!(std::fs::read_to_string(home.path().join("bare/.claude.json")).unwrap(), "{}");
    }
}
