//! How the `claude` CLI is brought to ask the model for a completion and nothing else.
//!
//! A process that was started without tools, settings and commands is told all the rest on its input: the system prompt and the
//! parameters, then the conversation, whose last line has it ask the model. What the model answers is read from the events of its
//! stream. The CLI's own result is an error by design: a budget of next to nothing makes it one request.

use std::collections::VecDeque;

use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::completion_lines::{Assistant, User, plain_text, push, settings};
use super::message::Assembly;
use super::models::{KnownModels, Model};
use crate::agent::completion::{Completion, Message, Parameters, Role, Thinking};
use crate::agent::contract::{Event, Spec};
use crate::agent::process::Next;
use crate::agent::programs::Tested;
use crate::blocking::aside;

/// How the CLI is called beside what is the same for runs: nothing of its own comes between the caller and the model.
pub(super) const ARGUMENTS: &[&str] = &[
    "--tools",
    "",
    "--setting-sources",
    "",
    "--strict-mcp-config",
    "--disable-slash-commands",
    "--max-turns",
    "1",
    // Spent by the first request: without it the CLI goes on by itself where a reply was cut, or called a tool.
    "--max-budget-usd",
    "0.000001",
];

/// Variables beside those of a run.
pub(super) const VARIABLES: &[(&str, &str)] = &[
    // A conversation that is too long would be summed up for four requests, and not be what the caller sent.
    ("DISABLE_AUTO_COMPACT", "1"),
    // A stream that broke off would be followed by another answer, which does not go on where the first ended.
    ("CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK", "1"),
];

/// Releases that take what the user said for a line of the user's when it comes in the way of a local command's, at once and at no cost.
/// Others take it for the model's, so it must be known; a test with the real CLI holds it for the newest here.
const HISTORY_AT_ONCE: Tested = Tested("2.1.332", "2.1.332");

/// A completion while it is talked about with the CLI.
#[derive(Debug)]
pub(super) struct Talk<'a> {
    spec: &'a Spec,
    completion: &'a Completion,
    models: KnownModels,
    /// Control requests that are not answered yet.
    unanswered: usize,
    /// The release, where it told.
    version: Option<String>,
    /// What is still to be said, each after the result of the one before.
    parts: VecDeque<Vec<u8>>,
    assembly: Assembly,
}

/// What a line was.
pub(super) enum Heard {
    /// Part of the talk.
    Next(Next),
    /// The CLI's last line.
    Over,
    /// Nothing that has to do with it.
    Unrelated,
    /// What must not be.
    Wrong(String),
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: String,
    subtype: Option<String>,
    parent_tool_use_id: Option<String>,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    response: Option<ControlResponse>,
    #[serde(default)]
    is_error: bool,
    #[serde(default)]
    tools: Vec<String>,
    claude_code_version: Option<String>,
}

#[derive(Deserialize)]
struct ControlResponse {
    subtype: String,
    response: Option<Initialized>,
}

#[derive(Deserialize)]
struct Initialized {
    models: Option<Vec<Model>>,
    claude_code_version: Option<String>,
}

impl<'a> Talk<'a> {
    pub(super) fn new(spec: &'a Spec, completion: &'a Completion, models: KnownModels) -> Self {
        Self { spec, completion, models, unanswered: 0, version: None, parts: VecDeque::new(), assembly: Assembly::default() }
    }

    /// The lines that come first.
    pub(super) fn opening(&mut self) -> Vec<u8> {
        let Parameters { thinking, .. } = &self.completion.parameters;
        let mut requests = vec![json!({"subtype": "initialize", "systemPrompt": [self.spec.system.as_deref().unwrap_or_default()]})];
        if matches!(thinking, Thinking::Off) {
            // Older releases; newer ones go by the variable.
            requests.push(json!({"subtype": "set_max_thinking_tokens", "max_thinking_tokens": 0}));
        }
        requests.push(json!({"subtype": "apply_flag_settings", "settings": settings(&self.completion.parameters)}));
        self.unanswered = requests.len();
        let mut lines = Vec::new();
        for (id, request) in requests.into_iter().enumerate() {
            push(&mut lines, &json!({"type": "control_request", "request_id": id.to_string(), "request": request}));
        }
        lines
    }

    /// Takes a line of the output.
    pub(super) fn line(&mut self, line: &[u8]) -> Heard {
        let Ok(line) = serde_json::from_slice::<Line<'_>>(line) else { return Heard::Unrelated };
        match (line.kind.as_str(), line.subtype.as_deref()) {
            ("control_response", _) => {
                let Some(ControlResponse { subtype, response }) = line.response.filter(|_| self.unanswered > 0) else {
                    return Heard::Unrelated;
                };
                if subtype != "success" {
                    return Heard::Unrelated;
                }
                if let Some(Initialized { models, claude_code_version }) = response {
                    self.version = self.version.take().or(claude_code_version);
                    if let Some(models) = models {
                        self.models.tell(models);
                    }
                }
                self.unanswered -= 1;
                if self.unanswered > 0 {
                    return Heard::Next(Next::More);
                }
                let bytes = self.completion.messages.iter().flat_map(|message| &message.content).map(|block| block.get().len()).sum();
                self.parts = aside(bytes, || self.conversation());
                Heard::Next(self.parts.pop_front().map_or(Next::More, Next::Say))
            }
            ("system", Some("init")) => {
                if !line.tools.is_empty() {
                    return Heard::Wrong(format!(
                        "claude started with tools of its own ({}); ask the operator to look into its managed settings",
                        line.tools.join(", ")
                    ));
                }
                // What was said was said for another release.
                match (&self.version, line.claude_code_version) {
                    (Some(told), Some(version)) if *told != version => Heard::Wrong("claude was replaced meanwhile; try again".to_owned()),
                    _ => Heard::Next(Next::More),
                }
            }
            ("stream_event", _) if line.parent_tool_use_id.is_none() => {
                if let Some(event) = line.event {
                    self.assembly.take(event);
                }
                Heard::Next(Next::More)
            }
            ("result", _) => match self.parts.pop_front() {
                Some(part) if !line.is_error => Heard::Next(Next::Say(part)),
                _ => Heard::Over,
            },
            _ => Heard::Unrelated,
        }
    }

    /// What the model said.
    pub(super) fn assembly(&mut self) -> &mut Assembly {
        &mut self.assembly
    }

    /// The conversation, cut where a result has to be waited for: what the model said would overtake what was said before it.
    fn conversation(&self) -> VecDeque<Vec<u8>> {
        let at_once = self.version.as_deref().is_some_and(|version| HISTORY_AT_ONCE.includes(version));
        let asked = self.spec.model.as_deref().unwrap_or_default();
        // What a model thought is kept from others.
        let model = self.models.resolved(asked).unwrap_or_else(|| asked.to_owned());
        let mut parts = VecDeque::new();
        let mut lines = Vec::new();
        let Some((last, history)) = self.completion.messages.split_last() else { return parts };
        for Message { role, content } in history {
            let said = if at_once { plain_text(content) } else { None };
            match (role, said) {
                (Role::Assistant, _) => push(&mut lines, &Assistant::new(&model, content, None)),
                (Role::User, Some(text)) => push(&mut lines, &Assistant::new(&model, content, Some(text))),
                (Role::User, None) => {
                    push(&mut lines, &User::new(content, Some(false)));
                    parts.push_back(std::mem::take(&mut lines));
                }
            }
        }
        push(&mut lines, &User::new(&last.content, None));
        parts.push_back(lines);
        parts
    }
}

/// Whether a line answers that. Then the models are known.
pub(super) fn told_models(line: &[u8], models: &KnownModels) -> bool {
    let Ok(Line { response: Some(ControlResponse { response, .. }), .. }) = serde_json::from_slice(line) else { return false };
    if let Some(told) = response.and_then(|initialized| initialized.models) {
        models.tell(told);
    }
    true
}

/// Says what a line of the output tells of the model's message.
pub(super) fn progress(line: &[u8], emit: impl FnOnce(Event)) {
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "type")]
        kind: String,
        delta: Option<SubKind>,
        content_block: Option<SubKind>,
    }
    #[derive(Deserialize)]
    struct SubKind {
        #[serde(rename = "type")]
        kind: Option<String>,
        #[serde(default)]
        stop_reason: Option<String>,
    }
    let Ok(Line { kind, parent_tool_use_id: None, event: Some(event), .. }) = serde_json::from_slice(line) else { return };
    let Ok(of) = serde_json::from_str::<Kind>(event.get()) else { return };
    // Where a stream broke off the CLI writes an end of its own.
    if kind != "stream_event" || (of.kind == "message_delta" && of.delta.as_ref().is_none_or(|delta| delta.stop_reason.is_none())) {
        return;
    }
    let sub = of.delta.or(of.content_block).and_then(|sub| sub.kind);
    let kind = sub.map_or_else(|| of.kind.clone(), |sub| format!("{}.{sub}", of.kind));
    emit(Event::Model { kind, event: event.to_owned() });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::contract::Rules;
    use crate::agent::programs::CLAUDE_TESTED;
    use serde_json::Value;
    use serde_json::value::to_raw_value;
    use std::time::Duration;

    #[test]
    fn the_newest_release_that_is_tested_takes_the_history_at_once() {
        assert!(HISTORY_AT_ONCE.includes(CLAUDE_TESTED.1), "see with tests/agents whether it does");
    }

    fn raw(value: Value) -> Box<RawValue> {
        to_raw_value(&value).unwrap()
    }

    fn spec(messages: Vec<Message>) -> Spec {
        Spec {
            prompt: String::new(),
            model: Some("sonnet".to_owned()),
            system: Some("Be Mio.".to_owned()),
            schema: None,
            files: Vec::new(),
            timeout: Duration::from_secs(5),
            session: None,
            ask: None,
            agent: None,
            rules: Rules::default(),
            yields: false,
            completion: Some(Completion { messages, parameters: Parameters::default() }),
        }
    }

    fn text(role: Role, text: &str) -> Message {
        Message { role, content: vec![raw(json!({"type": "text", "text": text}))] }
    }

    fn lines(part: &[u8]) -> Vec<Value> {
        part.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    /// What is said after the opening, part by part, to a release of this version.
    fn said(spec: &Spec, version: Option<&str>) -> Vec<Vec<Value>> {
        let mut talk = Talk::new(spec, spec.completion.as_ref().unwrap(), KnownModels::default());
        let opening = lines(&talk.opening());
        let mut parts = Vec::new();
        for request in &opening {
            let response = json!({"models": [{"value": "sonnet", "resolvedModel": "claude-sonnet-5"}], "claude_code_version": version});
            let line = json!({"type": "control_response", "response": {"subtype": "success", "request_id": request["request_id"], "response": response}});
            if let Heard::Next(Next::Say(part)) = talk.line(line.to_string().as_bytes()) {
                parts.push(lines(&part));
            }
        }
        while let Heard::Next(Next::Say(part)) = talk.line(br#"{"type": "result", "is_error": false}"#) {
            parts.push(lines(&part));
        }
        parts
    }

    fn conversation() -> Spec {
        let result = Message { role: Role::User, content: vec![raw(json!({"type": "tool_result", "tool_use_id": "t", "content": "x"}))] };
        spec(vec![
            text(Role::User, "/one"),
            text(Role::Assistant, "two"),
            result,
            text(Role::Assistant, "four"),
            text(Role::User, "five"),
            text(Role::Assistant, "six"),
            text(Role::User, "/seven"),
        ])
    }

    #[test]
    fn every_line_of_the_users_is_waited_for_where_the_release_is_not_known() {
        for version in [None, Some("2.1.197"), Some("99.0.0")] {
            let parts = said(&conversation(), version);
            let kinds: Vec<Vec<_>> = parts.iter().map(|part| part.iter().map(|line| line["type"].as_str().unwrap()).collect()).collect();
            assert_eq!(kinds, [vec!["user"], vec!["assistant", "user"], vec!["assistant", "user"], vec!["assistant", "user"]]);
            assert_eq!(parts[0][0]["shouldQuery"], false);
            assert_eq!(parts[0][0]["message"]["content"][0]["text"], "\n/one");
            assert_eq!(parts[1][0]["message"]["model"], "claude-sonnet-5");
            assert_eq!(parts[3][1]["message"]["content"], json!([{"type": "text", "text": "\n/seven"}]));
            assert!(parts[3][1].get("shouldQuery").is_none());
        }
    }

    #[test]
    fn plain_text_goes_at_once_to_a_release_that_is_known() {
        let parts = said(&conversation(), Some("2.1.332"));
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(parts[0][0]["local_command_source"], "/one");
        assert_eq!(parts[0][2]["type"], "user");
        assert_eq!(parts[1][1]["local_command_source"], "five");
    }

    #[test]
    fn tools_of_the_clis_own_end_it() {
        let spec = conversation();
        let mut talk = Talk::new(&spec, spec.completion.as_ref().unwrap(), KnownModels::default());
        let heard = talk.line(br#"{"type": "system", "subtype": "init", "tools": ["Bash"]}"#);
        assert!(matches!(heard, Heard::Wrong(why) if why.contains("Bash")));
    }
}
