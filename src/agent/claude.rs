//! The `claude` CLI: how it is called, and how what it prints is read.
//!
//! It is run with stream-json both ways, because only so can its input be held open until its answer was read whole:
//! given a prompt and the end of its input at once, it exits without waiting for its pipe and cuts a longer reply.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::process::Command;
use uuid::Uuid;

use super::Environment;
use super::folder::{is_regular, read_regular, remove_tree};
use super::process::{Line, MAX_LINE, Next};

/// The heading in the prompt under which the attached files are named.
const FILES_HEADING: &str = "[Attached files — open with Read tool as needed]";

/// Bytes of one of the CLI's own files, at most.
const MOST_IN_A_FILE: u64 = 64 << 20;

/// The mode in which the CLI asks for what isn't plainly safe, which a run has nobody to answer. It is named, because what a
/// release starts in by itself changes.
const MODE: &str = "default";

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

/// Makes `command` a run of the CLI. What it calls temporary goes into `temporary`. Every process of the machine can read the
/// arguments, so nothing of an app's stands there.
pub fn prepare(command: &mut Command, run_id: Uuid, model: &str, temporary: &Path) {
    command.args(ARGUMENTS).args(["--session-id", &run_id.to_string(), "--model", model]).envs(VARIABLES.iter().copied());
    command.env("CLAUDE_CODE_TMPDIR", temporary).env("TMPDIR", temporary);
}

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

/// Says what a line of the output tells of the run's progress: `text` and `thinking` as they are generated, `tool_call`,
/// `tool_call_update`, and `retry` where the API is asked again. What a subagent writes is not the run's text.
pub fn said(line: &[u8], mut tell: impl FnMut(&str, Value)) {
    #[derive(Deserialize)]
    struct Progress {
        #[serde(rename = "type")]
        kind: String,
        subtype: Option<String>,
        parent_tool_use_id: Option<String>,
    }
    let Ok(Progress { kind, subtype, parent_tool_use_id }) = serde_json::from_slice(line) else { return };
    let all = || serde_json::from_slice::<Value>(line).unwrap_or_default();
    match (kind.as_str(), subtype.as_deref()) {
        ("stream_event", _) if parent_tool_use_id.is_none() => {
            let delta = &all()["event"]["delta"];
            match (delta["text"].as_str(), delta["thinking"].as_str()) {
                (Some(text), _) => tell("text", json!({"content": text})),
                (None, Some(thinking)) => tell("thinking", json!({"content": thinking})),
                (None, None) => {}
            }
        }
        ("assistant" | "user", _) => {
            for block in all()["message"]["content"].as_array().into_iter().flatten() {
                match block["type"].as_str() {
                    Some("tool_use") => tell("tool_call", json!({"id": block["id"], "name": block["name"], "args": block["input"]})),
                    Some("tool_result") => {
                        let status = if block["is_error"] == true { "failed" } else { "completed" };
                        tell("tool_call_update", json!({"id": block["tool_use_id"], "status": status, "result": block["content"]}));
                    }
                    _ => {}
                }
            }
        }
        ("system", Some("api_retry")) => {
            let all = all();
            tell("retry", json!({"attempt": all["attempt"], "max_retries": all["max_retries"], "error": all["error"]}));
        }
        _ => {}
    }
}

/// Tokens and cost of a run, as the CLI reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens read, those from the cache included.
    pub input_tokens: Option<i64>,
    /// Tokens written.
    pub output_tokens: Option<i64>,
    /// US dollars at list price, also where a subscription pays.
    pub cost_usd: Option<f64>,
}

/// What the CLI answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The model's reply, whole.
    Reply {
        /// Its text.
        text: String,
        /// Why the model stopped: `end_turn`, `max_tokens`, …
        stop_reason: String,
    },
    /// The CLI's own account of what went wrong.
    Failure(String),
}

/// Reads the lines of a run as they come.
#[derive(Debug, Default)]
pub struct Reader {
    answer: Option<Answer>,
    usage: Usage,
    retry: Option<Retry>,
    garbage: usize,
    flooded: bool,
}

impl Reader {
    /// Takes one line of the output.
    pub fn line(&mut self, line: Line<'_>) -> Next {
        let Line::Whole(line) = line else {
            self.flooded = true;
            return Next::Stop;
        };
        match serde_json::from_slice::<Kind>(line) {
            Ok(Kind { kind, .. }) if kind == "result" => {
                // The first one is the answer: another comes only where the run was interrupted after it.
                if self.answer.is_none() {
                    self.result(line);
                }
                Next::Answered
            }
            Ok(Kind { kind, subtype, permission_mode, response }) => {
                let refused = match (kind.as_str(), subtype.as_deref(), response) {
                    ("system", Some("init"), _) => permission_mode.filter(|mode| mode != MODE).map(|mode| {
                        format!("claude started in its permission mode \"{mode}\", where it may do what a run must not; ask the operator to look for \"defaultMode\" in its managed settings")
                    }),
                    ("control_response", _, Some(Response { subtype, error })) if subtype == "error" => Some(format!(
                        "claude does not take the system prompt or the schema ({})",
                        error.as_deref().unwrap_or("it gives no reason")
                    )),
                    _ => None,
                };
                if let Some(why) = refused {
                    self.answer = Some(Answer::Failure(why));
                    return Next::Stop;
                }
                match (kind.as_str(), subtype.as_deref()) {
                    ("system", Some("api_retry")) => self.retry = serde_json::from_slice(line).ok(),
                    // The API has answered since.
                    ("assistant", _) => self.retry = None,
                    _ => {}
                }
                Next::More
            }
            Err(_) => {
                self.garbage += line.len() + 1;
                self.flooded = self.garbage > MAX_LINE;
                if self.flooded { Next::Stop } else { Next::More }
            }
        }
    }

    fn result(&mut self, line: &[u8]) {
        self.answer = Some(match serde_json::from_slice::<ResultLine>(line) {
            Ok(result) => {
                self.usage = result.usage();
                result.answer()
            }
            Err(error) => Answer::Failure(format!("claude's result line could not be read ({error})")),
        });
    }

    /// The answer, if one came.
    pub fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take()
    }

    /// The answer's text and stop reason, if it is a reply.
    pub fn take_reply(&mut self) -> Option<(String, String)> {
        match self.answer.take() {
            Some(Answer::Reply { text, stop_reason }) => Some((text, stop_reason)),
            other => {
                self.answer = other;
                None
            }
        }
    }

    /// Tokens and cost, as far as they are known.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What the CLI was doing instead of answering, in words, where its output tells.
    pub fn trouble(&self) -> Option<String> {
        if self.flooded {
            return Some(format!("it printed more than {} MiB that are no answer", MAX_LINE >> 20));
        }
        self.retry.as_ref().map(Retry::to_string)
    }
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: String,
    subtype: Option<String>,
    /// Of `system`/`init`.
    #[serde(rename = "permissionMode")]
    permission_mode: Option<String>,
    /// Of `control_response`.
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Response {
    subtype: String,
    error: Option<String>,
}

/// The line that says that the CLI will try an API call again.
#[derive(Debug, Deserialize)]
struct Retry {
    attempt: Option<u32>,
    max_retries: Option<u32>,
    error_status: Option<u16>,
    error: Option<String>,
}

impl std::fmt::Display for Retry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it was trying again after an API error")?;
        match (self.error_status, self.error.as_deref()) {
            (Some(status), Some(error)) => write!(f, " ({status} {error})")?,
            (Some(status), None) => write!(f, " ({status})")?,
            (None, Some(error)) => write!(f, " ({error})")?,
            (None, None) => {}
        }
        if let (Some(attempt), Some(most)) = (self.attempt, self.max_retries) {
            write!(f, ", attempt {attempt} of {most}")?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct ResultLine {
    subtype: Option<String>,
    #[serde(default)]
    is_error: bool,
    result: Option<String>,
    #[serde(default)]
    errors: Vec<String>,
    stop_reason: Option<String>,
    total_cost_usd: Option<f64>,
    usage: Option<TokenCounts>,
}

#[derive(Deserialize)]
struct TokenCounts {
    input_tokens: Option<i64>,
    cache_creation_input_tokens: Option<i64>,
    cache_read_input_tokens: Option<i64>,
    output_tokens: Option<i64>,
}

impl ResultLine {
    fn answer(self) -> Answer {
        match self.result {
            Some(text) if !self.is_error => Answer::Reply { text, stop_reason: self.stop_reason.unwrap_or_else(|| "end_turn".to_owned()) },
            Some(message) if !message.is_empty() => Answer::Failure(message),
            _ if !self.errors.is_empty() => Answer::Failure(self.errors.join("; ")),
            _ => Answer::Failure(format!("claude gave no reply ({})", self.subtype.as_deref().unwrap_or("no reason given"))),
        }
    }

    fn usage(&self) -> Usage {
        let counts = self.usage.as_ref();
        Usage {
            input_tokens: counts.and_then(|counts| {
                let read = [counts.input_tokens, counts.cache_creation_input_tokens, counts.cache_read_input_tokens];
                counts.input_tokens.map(|_| read.into_iter().flatten().fold(0, i64::saturating_add))
            }),
            output_tokens: counts.and_then(|counts| counts.output_tokens),
            cost_usd: self.total_cost_usd,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(lines: &[&str]) -> (Reader, Vec<Next>) {
        let mut reader = Reader::default();
        let next = lines.iter().map(|line| reader.line(Line::Whole(line.as_bytes()))).collect();
        (reader, next)
    }

    #[test]
    fn a_reply_with_its_usage() {
        let (mut reader, next) = read(&[
            r#"{"type":"system","subtype":"init","tools":[]}"#,
            r#"{"type":"assistant","message":{"content":[]}}"#,
            r#"{"type":"result","subtype":"success","is_error":false,"result":"hi","stop_reason":"end_turn","total_cost_usd":0.5,
                "usage":{"input_tokens":1,"cache_creation_input_tokens":2,"cache_read_input_tokens":4,"output_tokens":8,"new":{}}}"#,
        ]);
        assert_eq!(next, [Next::More, Next::More, Next::Answered]);
        assert_eq!(reader.take_answer(), Some(Answer::Reply { text: "hi".into(), stop_reason: "end_turn".into() }));
        assert_eq!(reader.usage(), Usage { input_tokens: Some(7), output_tokens: Some(8), cost_usd: Some(0.5) });
    }

    #[test]
    fn an_error_is_told_in_the_clis_own_words() {
        for (line, expected) in [
            (r#"{"type":"result","subtype":"success","is_error":true,"result":"API Error: 401 no"}"#, "API Error: 401 no"),
            (r#"{"type":"result","subtype":"error_during_execution","is_error":true,"errors":["a","b"]}"#, "a; b"),
            (r#"{"type":"result","subtype":"error_max_turns","is_error":true}"#, "claude gave no reply (error_max_turns)"),
        ] {
            assert_eq!(read(&[line]).0.take_answer(), Some(Answer::Failure(expected.into())));
        }
    }

    #[test]
    fn a_retry_is_remembered() {
        let (reader, _) = read(&[
            r#"{"type":"system","subtype":"api_retry","attempt":4,"max_retries":10,"retry_delay_ms":4380.8,"error_status":529,"error":"overloaded"}"#,
        ]);
        let told = "it was trying again after an API error (529 overloaded), attempt 4 of 10";
        assert_eq!(reader.trouble().as_deref(), Some(told));
    }

    #[test]
    fn a_run_that_is_not_what_was_asked_for_is_ended() {
        for (line, why) in [
            (r#"{"type":"system","subtype":"init","permissionMode":"auto"}"#, "\"auto\""),
            (r#"{"type":"control_response","response":{"subtype":"error","request_id":"run","error":"no such thing"}}"#, "no such thing"),
        ] {
            let (mut reader, next) = read(&[line]);
            assert_eq!(next, [Next::Stop]);
            assert!(matches!(reader.take_answer(), Some(Answer::Failure(text)) if text.contains(why)), "{line}");
        }
        let (_, next) = read(&[r#"{"type":"system","subtype":"init","permissionMode":"default"}"#]);
        assert_eq!(next, [Next::More]);
    }

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

    #[test]
    fn a_result_after_the_answer_does_not_count() {
        let (mut reader, _) =
            read(&[r#"{"type":"result","is_error":false,"result":"first"}"#, r#"{"type":"result","is_error":true,"result":"second"}"#]);
        assert_eq!(reader.take_answer(), Some(Answer::Reply { text: "first".into(), stop_reason: "end_turn".into() }));
    }

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

    proptest! {
        #[test]
        fn any_line_is_read_without_a_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::default();
            prop_assert_eq!(reader.line(Line::Whole(&line)), Next::More);
            prop_assert_eq!(reader.take_answer(), None);
        }

        #[test]
        fn any_prompt_arrives_as_it_is(prompt in "[/@!# -]?\\PC{0,80}[\n\u{0}\u{1b}\"]?") {
            let line = input(&prompt, &[], None, None);
            prop_assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
            let message: serde_json::Value = serde_json::from_slice(&line).unwrap();
            let text = message["message"]["content"][0]["text"].as_str().unwrap();
            prop_assert!(!text.starts_with('/'));
            prop_assert_eq!(text.strip_prefix('\n').filter(|rest| rest.starts_with('/')).unwrap_or(text), prompt);
        }

        #[test]
        fn any_reply_is_read_as_it_was_written(reply in "\\PC{0,60}[\n\t]?\\PC{0,60}") {
            let line = json!({"type": "result", "is_error": false, "result": reply}).to_string();
            let mut reader = Reader::default();
            prop_assert_eq!(reader.line(Line::Whole(line.as_bytes())), Next::Answered);
            prop_assert_eq!(reader.take_answer(), Some(Answer::Reply { text: reply, stop_reason: "end_turn".to_owned() }));
        }
    }
}
