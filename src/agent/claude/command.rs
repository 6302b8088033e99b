//! How the `claude` CLI is called for a run, and what it reads.
//!
//! It is run with stream-json both ways, because only so can its input be held open until its answer was read whole:
//! given a prompt and the end of its input at once, it exits without waiting for its pipe and cuts a longer reply.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::process::Command;
use uuid::Uuid;

use super::completion;

/// The heading in the prompt under which the attached files are named.
const FILES_HEADING: &str = "[Attached files — open with Read tool as needed]";

/// The mode in which the CLI asks for what isn't plainly safe, which a run has nobody to answer. It is named, because what a
/// release starts in by itself changes.
pub(super) const MODE: &str = "default";

/// How the CLI is called for any run. No transcript is kept: one a run would pile up under the user's home for ever.
const ARGUMENTS: &[&str] = &[
    "-p",
    "--input-format",
    "stream-json",
    "--output-format",
    "stream-json",
    "--verbose",
    "--include-partial-messages",
    "--no-session-persistence",
    "--permission-mode",
    MODE,
];

/// Variables that the CLI gets beside those of every agent.
pub const VARIABLES: &[(&str, &str)] = &[
    // `@path` in a prompt would otherwise put that file's text in front of the model without asking for permission,
    // whosever it is.
    ("CLAUDE_CODE_DISABLE_ATTACHMENTS", "1"),
    // A folder for memories would stay for every run, and what one app had remembered would be another's to read.
    ("CLAUDE_CODE_DISABLE_AUTO_MEMORY", "1"),
    // A request to the model after each turn for what the user might say next, which nobody sees.
    ("CLAUDE_CODE_ENABLE_PROMPT_SUGGESTION", "false"),
];

/// What a process of the CLI is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A run: the agent with its tools.
    Run,
    /// The same, which asks before it acts.
    Asking,
    /// A completion: the model alone.
    Completion,
    /// The same, which is asked nothing and renews the user's own sign-in.
    Renewal,
}

impl Purpose {
    /// What it is called in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Run | Self::Asking => "run",
            Self::Completion => "completion",
            Self::Renewal => "renewal",
        }
    }
}

/// Makes `command` a process of the CLI. What it calls temporary goes into `temporary`. Every process of the machine can read the
/// arguments, so nothing of an app's stands there.
pub fn prepare(command: &mut Command, purpose: Purpose, run_id: Uuid, model: &str, temporary: &Path) {
    if matches!(purpose, Purpose::Completion | Purpose::Renewal) {
        command.args(completion::ARGUMENTS).envs(completion::VARIABLES.iter().copied());
    }
    if purpose == Purpose::Asking {
        command.args(["--permission-prompt-tool", "stdio"]);
    }
    command.args(ARGUMENTS).args(["--session-id", &run_id.to_string(), "--model", model]).envs(VARIABLES.iter().copied());
    command.env("CLAUDE_CODE_TMPDIR", temporary).env("TMPDIR", temporary);
}

/// The text that the CLI is to take for the prompt, with the attached files named under it.
pub fn prompt_text(prompt: &str, files: &[PathBuf]) -> String {
    // A leading slash would make it a command of the CLI's own; behind a line's end it is text.
    let mut text = if prompt.starts_with('/') { format!("\n{prompt}") } else { prompt.to_owned() };
    if !files.is_empty() {
        let paths: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        text = format!("{text}\n\n{FILES_HEADING}\n{}", paths.join("\n"));
    }
    text
}

/// The lines that hand a run over: what is added to the CLI's own system prompt and what the reply has to fit, if there is
/// such, and the prompt.
pub fn input(prompt: &str, files: &[PathBuf], system: Option<&str>, schema: Option<&RawValue>) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Initialize<'a> {
        subtype: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        append_system_prompt: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        json_schema: Option<&'a RawValue>,
    }
    #[derive(Serialize)]
    struct ControlRequest<'a> {
        r#type: &'static str,
        request_id: &'static str,
        request: Initialize<'a>,
    }
    let mut lines = Vec::new();
    if system.is_some() || schema.is_some() {
        let request = Initialize { subtype: "initialize", append_system_prompt: system, json_schema: schema };
        let line = ControlRequest { r#type: "control_request", request_id: "run", request };
        serde_json::to_writer(&mut lines, &line).expect("a request is JSON");
        lines.push(b'\n');
    }
    let text = prompt_text(prompt, files);
    let message = json!({"type": "user", "message": {"role": "user", "content": [{"type": "text", "text": text}]}});
    lines.extend_from_slice(format!("{message}\n").as_bytes());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn system_prompt_and_schema_stand_on_a_line_before_the_prompt() {
        let schema = RawValue::from_string(r#"{"type": "object"}"#.to_owned()).unwrap();
        let lines = input("hello", &[], Some("Be\nbrief."), Some(&schema));
        let lines: Vec<serde_json::Value> =
            lines.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect();
        assert_eq!(
            lines[0]["request"],
            json!({"subtype": "initialize", "appendSystemPrompt": "Be\nbrief.", "jsonSchema": {"type": "object"}})
        );
        assert_eq!((lines.len(), &lines[1]["type"]), (2, &json!("user")));
    }

    proptest! {
        #[test]
        fn any_prompt_arrives_as_it_is(prompt in "[/@!# -]?\\PC{0,80}[\n\u{0}\u{1b}\"]?") {
            let line = input(&prompt, &[], None, None);
            prop_assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
            let message: serde_json::Value = serde_json::from_slice(&line).unwrap();
            let text = message["message"]["content"][0]["text"].as_str().unwrap();
            prop_assert!(!text.starts_with('/'));
            prop_assert_eq!(text.strip_prefix('\n').filter(|rest| rest.starts_with('/')).unwrap_or(text), prompt);
        }
    }
}
