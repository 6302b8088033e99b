//! The agents that are spoken to directly: a file for each, which declares how it is started, where its sign-in lies, how a model is
//! named to it and what its modes are. All that they have in common is done elsewhere, by what is declared here.

mod claude;
mod codex;
mod gemini;
mod opencode;
mod qwen;

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokio::process::Command;

use super::environment::Environment;
use super::folder::{make_below, read_regular, replace, replace_by_link};
use super::programs::Tested;
use super::turn::{APPROVE_ALL, ASK, CLAUDE_AGENT};

/// Bytes of a file of a sign-in, at most.
const MOST: u64 = 1 << 20;

/// An agent, as its file declares it.
#[derive(Debug)]
pub struct Kind {
    /// What sessions and `CLAWDFORGE_AGENTS` call it.
    pub name: &'static str,
    /// What `npm install -g` has to be given.
    pub package: &'static str,
    /// The program that speaks the protocol, by its name on PATH.
    pub program: &'static str,
    /// Its arguments.
    pub arguments: &'static [&'static str],
    /// The versions that this release was tested with.
    pub tested: Tested,
    /// Where its model is, and its sign-in renewed: hosts, by HTTPS. None where it has no model of its own.
    pub hosts: &'static [&'static str],
    /// What it gets of variables beside every agent's.
    pub variables: &'static [(&'static str, &'static str)],
    /// Where its sign-in lies.
    pub sign_in: SignIn,
    /// How a model is named to it.
    pub model: Naming,
    /// The permissions that it keeps.
    pub permissions: &'static [&'static str],
    /// What it is told of the permissions when it is started.
    pub told: fn(permissions: &str) -> Option<(&'static str, &'static str)>,
    /// The mode in which it keeps permissions; `None` where it has no modes.
    pub mode: fn(permissions: &str) -> Option<&'static str>,
    /// Whether something can be added to its system prompt.
    pub takes_system: bool,
    /// A file of settings that it has in its home, where there is one, with what stands in it.
    pub settings: Option<(&'static str, &'static str)>,
    /// What is to be done in its home before it takes up a conversation.
    pub before_resume: fn(home: &Path, session: &str) -> io::Result<()>,
    /// What an error says by which it does not know a conversation, beside the protocol's own code.
    pub lost: &'static [&'static str],
}

/// Where an agent's sign-in lies.
#[derive(Debug)]
pub struct SignIn {
    /// Variables, one of which signs it in.
    pub variables: &'static [&'static str],
    /// The variable that names the folder of what is its own, where there is one.
    pub home: Option<&'static str>,
    /// That folder below a home.
    pub folder: &'static str,
    /// The files in it by which it is signed in.
    pub files: &'static [&'static str],
    /// What in them is good once, and renewed with each use.
    pub good_once: Option<&'static str>,
    /// The protocol's methods of signing in, each with the variable that it needs; without one it needs the files.
    pub methods: &'static [(Option<&'static str>, &'static str)],
    /// How a person signs in.
    pub how: &'static str,
}

/// How a model is named to an agent.
#[derive(Debug)]
pub enum Naming {
    /// By a variable, when it is started.
    Variable(&'static str),
    /// By `session/set_model`.
    Method,
    /// By the option `model` of the session.
    Option,
}

const ALL: [&Kind; 5] = [&claude::KIND, &codex::KIND, &gemini::KIND, &opencode::KIND, &qwen::KIND];

/// The agent of this name, if the server knows it.
pub fn of(name: &str) -> Option<&'static Kind> {
    ALL.into_iter().find(|kind| kind.name == name)
}

/// Those of these names that the server knows, but for claude.
pub fn others(names: &[String]) -> impl Iterator<Item = &'static Kind> {
    names.iter().filter(|name| *name != CLAUDE_AGENT).filter_map(|name| of(name))
}

/// The agent that is spoken to by the program of this name.
pub fn with_program(program: &str) -> Option<&'static Kind> {
    ALL.into_iter().find(|kind| kind.program == program)
}

/// Where nothing is told, or there is nothing to tell.
fn nothing<T>(_: &str) -> Option<T> {
    None
}

impl Kind {
    /// Whether the permissions hold in one of its modes.
    pub fn keeps(&self, permissions: &str, mode: &str) -> bool {
        (self.mode)(permissions).is_none_or(|own| own == mode)
            || mode == "plan"
            || (permissions == APPROVE_ALL && matches!(mode, "acceptEdits" | "bypassPermissions"))
            // An answer for always has it change its mode.
            || (permissions == ASK && mode == "acceptEdits")
    }

    /// Whether an error says that it does not know a conversation.
    pub fn has_lost(&self, error: &Value) -> bool {
        /// By which the protocol says so.
        const NOT_FOUND: i64 = -32002;
        error["code"] == NOT_FOUND || self.lost.iter().any(|words| error.to_string().contains(words))
    }

    /// Makes its home ready for a start, by which it takes up a conversation or not.
    pub fn prepare(&self, home: &Path, session: Option<&str>) -> io::Result<()> {
        if let Some((file, settings)) = self.settings {
            let file = home.join(file);
            std::fs::create_dir_all(file.parent().unwrap_or(home))?;
            std::fs::write(file, settings)?;
        }
        session.map_or(Ok(()), |session| (self.before_resume)(home, session))
    }

    /// Has `command` be this agent, with the setup of a session.
    pub fn furnish(&self, command: &mut Command, permissions: &str, model: Option<&str>) {
        command.args(self.arguments).envs(self.variables.iter().copied()).envs((self.told)(permissions));
        if let (Naming::Variable(name), Some(model)) = (&self.model, model) {
            command.env(name, model);
        }
    }

    /// Whether it is signed in, as far as that can be seen.
    pub fn is_signed_in(&self, environment: &Environment) -> bool {
        self.sign_in.variables.iter().any(|name| environment.has(name)) || self.sign_in.has_files(environment)
    }
}

impl SignIn {
    /// How it can be signed in here, by the protocol.
    pub fn method(&self, environment: &Environment) -> Option<&'static str> {
        let can_be = |variable: Option<&str>| variable.map_or_else(|| self.has_files(environment), |name| environment.has(name));
        self.methods.iter().find(|(variable, _)| can_be(*variable)).map(|(_, method)| *method)
    }

    /// Its files that are there.
    pub fn found(&self, environment: &Environment) -> Vec<PathBuf> {
        let folder = self.real(environment).unwrap_or_default();
        self.files.iter().map(|file| folder.join(file)).filter(|file| file.is_file()).collect()
    }

    fn has_files(&self, environment: &Environment) -> bool {
        !self.found(environment).is_empty()
    }

    /// The folder of the user's own.
    fn real(&self, environment: &Environment) -> Option<PathBuf> {
        let named = self.home.and_then(|name| environment.get(name)).map(PathBuf::from);
        named.or_else(|| Some(Path::new(environment.get("HOME")?).join(self.folder)))
    }

    /// Those that the agent has to renew where they lie: a copy of what is good once would end the sign-in.
    pub fn renewed_in_place(&self, environment: &Environment) -> Vec<PathBuf> {
        fn has(value: &Value, key: &str) -> bool {
            match value {
                Value::Object(fields) => fields.iter().any(|(name, value)| (name == key && value.is_string()) || has(value, key)),
                Value::Array(items) => items.iter().any(|item| has(item, key)),
                _ => false,
            }
        }
        let read = |file: &PathBuf| serde_json::from_slice(&read_regular(file, MOST).ok()?).ok();
        let is_good_once = |file: &PathBuf| self.good_once.is_some_and(|key| read(file).is_some_and(|content: Value| has(&content, key)));
        self.found(environment).into_iter().filter(is_good_once).collect()
    }

    /// Puts the sign-in where an agent looks for it that is at home in `home`, and has it look there: copies, but links to what is renewed in
    /// place.
    pub fn put(&self, command: &mut Command, home: &Path, environment: &Environment) -> io::Result<()> {
        if let Some(name) = self.home {
            command.env_remove(name);
        }
        let in_place = self.renewed_in_place(environment);
        let folders: Vec<_> = Path::new(self.folder).iter().filter_map(OsStr::to_str).collect();
        for real in self.found(environment) {
            let own = make_below(home, &folders)?;
            let name = real.file_name().and_then(OsStr::to_str).unwrap_or_default();
            if in_place.contains(&real) {
                replace_by_link(&own, name, &real)?;
            } else {
                replace(&own, name, &read_regular(&real, MOST)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_keeps_permissions_only_in_the_mode_that_it_is_told() {
        for kind in ALL {
            assert!(kind.permissions.contains(&APPROVE_ALL), "{}", kind.name);
            for permissions in kind.permissions {
                if let Some(mode) = (kind.mode)(permissions) {
                    assert!(kind.keeps(permissions, mode) && !kind.keeps(permissions, "auto"), "{} {permissions}", kind.name);
                }
            }
        }
        assert!(!of("claude").unwrap().keeps("deny-all", "acceptEdits"));
        assert!(!of("gemini").unwrap().keeps("deny-all", "yolo"));
    }

    #[test]
    fn what_is_pinned_was_tested() {
        let pins = [
            include_str!("../../../npm/acpx/package.json"),
            include_str!("../../../npm/codex/package.json"),
            include_str!("../../../npm/gemini/package.json"),
            include_str!("../../../npm/opencode/package.json"),
            include_str!("../../../npm/qwen/package.json"),
        ];
        for (kind, pins) in ALL.into_iter().zip(pins) {
            assert!(pins.contains(&format!(": \"{}\"", kind.tested.1)), "{} {}", kind.name, kind.tested);
        }
    }

    #[test]
    fn a_sign_in_is_copied_but_where_it_is_good_once() {
        let (user, room) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let environment = Environment::of([("HOME", user.path())]);
        let kind = of("codex").unwrap();
        assert!(!kind.is_signed_in(&environment));
        std::fs::create_dir(user.path().join(".codex")).unwrap();
        let [theirs, own] = [&user, &room].map(|home| home.path().join(".codex/auth.json"));
        let key = r#"{"OPENAI_API_KEY":"sk-1","tokens":null}"#;
        let tokens = r#"{"OPENAI_API_KEY":null,"tokens":{"access_token":"a","refresh_token":"r"}}"#;
        for content in [key, tokens, tokens, key, key] {
            std::fs::write(&theirs, content).unwrap();
            assert!(kind.is_signed_in(&environment));
            kind.sign_in.put(&mut Command::new("true"), room.path(), &environment).unwrap();
            assert_eq!(std::fs::read_to_string(&own).unwrap(), content);
            std::fs::write(&own, "changed").unwrap();
            let kept = if content == key { content } else { "changed" };
            assert_eq!(std::fs::read_to_string(&theirs).unwrap(), kept);
        }
        std::fs::remove_dir_all(room.path().join(".codex")).unwrap();
        std::os::unix::fs::symlink(user.path(), room.path().join(".codex")).unwrap();
        kind.sign_in.put(&mut Command::new("true"), room.path(), &environment).unwrap_err();
    }
}
