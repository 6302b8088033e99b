//! Google's Gemini CLI.

use std::path::{Path, PathBuf};
use std::{fs, io};

use uuid::Uuid;

use super::{Kind, Naming, SignIn, nothing};
use crate::agent::programs::Tested;
use crate::agent::turn::PERMISSIONS;

pub(super) const KIND: Kind = Kind {
    name: "gemini",
    package: "@google/gemini-cli",
    program: "gemini",
    arguments: &["--acp"],
    tested: Tested("0.61.0", "0.61.0"),
    // It would start itself a second time, for more memory.
    hosts: &["generativelanguage.googleapis.com", "cloudcode-pa.googleapis.com", "oauth2.googleapis.com"],
    variables: &[("GEMINI_CLI_NO_RELAUNCH", "true")],
    sign_in: SignIn {
        variables: &["GEMINI_API_KEY", "GOOGLE_API_KEY"],
        // GEMINI_CLI_HOME names the folder above it.
        home: None,
        folder: ".gemini",
        files: &["oauth_creds.json", "google_accounts.json"],
        // Google's are good for ever.
        good_once: None,
        methods: &[(Some("GEMINI_API_KEY"), "gemini-api-key"), (None, "oauth-personal")],
        how: "run \"gemini\" once and sign in, or set GEMINI_API_KEY",
    },
    model: Naming::Method,
    permissions: &PERMISSIONS,
    told: nothing,
    mode: |_| Some("default"),
    takes_system: false,
    // Where it takes conversations away that are old, it takes this one too: one that it took up and that had no turn yet has an empty file
    // beside the others, and all go with that (seen in 0.61.0).
    settings: Some((
        ".gemini/settings.json",
        r#"{"general":{"sessionRetention":{"enabled":false},"enableAutoUpdate":false},"privacy":{"usageStatisticsEnabled":false}}"#,
    )),
    before_resume: set_aside,
    lost: &["No previous sessions found", "Invalid session identifier"],
};

/// Gives a conversation's files names that it never uses. It names a file by the minute and the conversation, and where it takes one up in
/// the minute of its start, it takes the file for a new one and empties it (seen in 0.61.0).
fn set_aside(home: &Path, session: &str) -> io::Result<()> {
    let is_folder = |path: &PathBuf| path.symlink_metadata().is_ok_and(|found| found.is_dir());
    let listed = |folder: PathBuf| folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let projects = listed(home.join(".gemini/tmp")).filter(is_folder);
    for chats in projects.map(|project| project.join("chats")).filter(is_folder) {
        for file in listed(chats.clone()) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(rest) = name.strip_prefix("session-").filter(|rest| !rest.starts_with(ASIDE)) else { continue };
            if rest.ends_with(&format!("-{}.jsonl", session.get(..8).unwrap_or(session))) {
                // There may be one of that minute already.
                fs::rename(&file, chats.join(format!("session-{ASIDE}{}-{rest}", Uuid::now_v7().simple())))?;
            }
        }
    }
    Ok(())
}

const ASIDE: &str = "before-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_set_aside_and_no_other() {
        let home = tempfile::tempdir().unwrap();
        let chats = home.path().join(".gemini/tmp/work/chats");
        fs::create_dir_all(&chats).unwrap();
        for id in ["0123abcd", "98765432"] {
            fs::write(chats.join(format!("session-2026-11-27T03-32-{id}.jsonl")), id).unwrap();
        }
        for _ in 0..2 {
            set_aside(home.path(), "0123abcd-e496-4f55").unwrap();
        }
        let mut names: Vec<_> = chats.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!((names.len(), names[0].as_str()), (2, "session-2026-11-27T03-32-98765432.jsonl"));
        assert!(names[1].starts_with("session-before-") && names[1].ends_with("-2026-11-27T03-32-0123abcd.jsonl"), "{names:?}");
    }
}
