//! How what the `claude` CLI prints is read.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};

use super::command::{self, MODE};
use super::completion::{self, Heard, Talk};
use super::models::KnownModels;
use super::result::{Answer, ResultLine};
use crate::agent::acp::TypedMessage;
use crate::agent::contract::{Ending, Event, Outcome, Spec, Usage};
use crate::agent::control::Control;
use crate::agent::process::{Line, MAX_LINE, Next};
use crate::agent::questions::{Ask, By, Choice, Question, Settled};

/// Says what a line of the output tells of the run's progress. What a subagent writes is not the run's text.
fn progress(line: &[u8], of_completion: bool, emit: impl Fn(Event)) {
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
        ("stream_event" | "assistant" | "user", _) if of_completion => {}
        ("stream_event", _) if parent_tool_use_id.is_none() => {
            let delta = &all()["event"]["delta"];
            match (delta["text"].as_str(), delta["thinking"].as_str()) {
                (Some(text), _) => emit(Event::Text { content: text.to_owned() }),
                (None, Some(thinking)) => emit(Event::Thinking { content: thinking.to_owned() }),
                (None, None) => {}
            }
        }
        ("assistant" | "user", _) => {
            for block in all()["message"]["content"].as_array_mut().into_iter().flatten() {
                let mut take = |key: &str| block.get_mut(key).map(Value::take).unwrap_or_default();
                match take("type").as_str() {
                    Some("tool_use") => emit(Event::ToolCall { args: take("input"), id: take("id"), name: take("name") }),
                    Some("tool_result") => {
                        let status = if take("is_error") == true { "failed" } else { "completed" };
                        emit(Event::ToolCallUpdate { id: take("tool_use_id"), result: take("content"), status: status.to_owned() });
                    }
                    _ => {}
                }
            }
        }
        ("system", Some("api_retry")) => {
            let mut all = all();
            let mut take = |key: &str| all.get_mut(key).map(Value::take).unwrap_or_default();
            emit(Event::Retry { attempt: take("attempt"), error: take("error"), max_retries: take("max_retries") });
        }
        _ => {}
    }
}

/// Has what a line asks answered by whoever may, and takes back what it takes back.
fn questions(line: &[u8], ask: Ask, Control { emit, questions, .. }: Control<'_>) {
    #[derive(Deserialize)]
    struct Asked {
        #[serde(rename = "type")]
        kind: String,
        request_id: Value,
        #[serde(default)]
        request: Request,
    }
    #[derive(Default, Deserialize)]
    struct Request {
        subtype: String,
    }
    let Ok(Asked { kind, request_id, request }) = serde_json::from_slice(line) else { return };
    match (kind.as_str(), request.subtype.as_str()) {
        ("control_request", "can_use_tool") => {
            let mut question = Question::new(request_id, Choice::of_a_tool(), ask);
            let Some(message) = TypedMessage::of(line, question.added()) else { return };
            question.message = message.raw();
            emit(Event::PermissionRequest { message: question.message.clone() });
            questions.ask(question);
        }
        ("control_cancel_request", _) => questions.withdraw(&request_id),
        _ => {}
    }
}

/// The line by which claude is told of the answer to its question, where it waits for one.
pub(super) fn answer_to(Settled { question, answer, by }: &Settled) -> Option<Vec<u8>> {
    let response = match by {
        By::Cancel => return None,
        _ if question.is_allowed(answer) => {
            let asked: Value = serde_json::from_str(question.message.get()).unwrap_or_default();
            let mut input = answer.updated_input.clone().unwrap_or_else(|| asked["request"]["input"].clone());
            if let (Some(answers), Value::Object(input)) = (&answer.answers, &mut input) {
                input.insert("answers".to_owned(), answers.clone());
            }
            json!({"behavior": "allow", "updatedInput": input})
        }
        By::Timeout => json!({"behavior": "deny", "message": "Nobody answered in time whether this may be done."}),
        By::Client | By::Operator => {
            json!({"behavior": "deny", "message": answer.message.as_deref().unwrap_or("The user does not want this to be done.")})
        }
    };
    let response = json!({"subtype": "success", "request_id": question.agent_id, "response": response});
    Some(format!("{}\n", json!({"type": "control_response", "response": response})).into_bytes())
}

/// Reads the lines of a run, or of a completion, as they come.
#[derive(Debug, Default)]
pub(super) struct Reader<'a> {
    /// Of a completion.
    talk: Option<Talk<'a>>,
    /// How it asks, if it does.
    ask: Option<Ask>,
    answer: Option<Answer>,
    usage: Usage,
    retry: Option<Retry>,
    garbage: usize,
    flooded: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(spec: &'a Spec, models: &KnownModels) -> Self {
        let talk = spec.completion.as_ref().map(|completion| Talk::new(spec, completion, models.clone()));
        Self { talk, ask: spec.ask, ..Self::default() }
    }

    /// What the CLI is told first.
    pub(super) fn opening(&mut self, spec: &Spec, files: &[PathBuf]) -> Vec<u8> {
        match &mut self.talk {
            Some(talk) => talk.opening(),
            None => command::input(&spec.prompt, files, spec.system.as_deref(), spec.schema.as_deref()),
        }
    }

    /// Takes one line of the output, and says what it tells of the progress.
    pub(super) fn read(&mut self, line: Line<'_>, control: Control<'_>) -> Next {
        if let Line::Whole(line) = line {
            if self.talk.is_some() {
                completion::progress(line, control.emit);
            }
            progress(line, self.talk.is_some(), control.emit);
            if let Some(ask) = self.ask {
                questions(line, ask, control);
            }
        }
        self.line(line)
    }

    fn line(&mut self, line: Line<'_>) -> Next {
        let Line::Whole(line) = line else {
            self.flooded = true;
            return Next::Stop;
        };
        match self.talk.as_mut().map_or(Heard::Unrelated, |talk| talk.line(line)) {
            Heard::Next(next) => return next,
            Heard::Over => {
                if self.answer.is_none() {
                    self.result(line);
                }
                return Next::Answered;
            }
            Heard::Wrong(why) => {
                self.answer = Some(Answer::failure(why));
                return Next::Stop;
            }
            Heard::Unrelated => {}
        }
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
                        "claude does not take what it is told before the prompt ({})",
                        error.as_deref().unwrap_or("it gives no reason")
                    )),
                    _ => None,
                };
                if let Some(why) = refused {
                    self.answer = Some(Answer::failure(why));
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
                match &mut self.talk {
                    Some(talk) => {
                        if let Some(tokens) = talk.assembly().tokens() {
                            self.usage.input_tokens = Some(tokens.read());
                            self.usage.output_tokens = Some(tokens.output_tokens);
                            self.usage.cached_tokens = Some(tokens.cache_read_input_tokens);
                        }
                        result.completion(talk.assembly().finish())
                    }
                    None => result.answer(),
                }
            }
            Err(error) => Answer::failure(format!("claude's result line could not be read ({error})")),
        });
    }

    /// The answer, if one came.
    pub(super) fn take_answer(&mut self) -> Option<Answer> {
        self.answer.take()
    }

    /// The outcome, if the answer is a reply.
    pub(super) fn take_reply(&mut self) -> Option<Outcome> {
        match self.answer.take() {
            Some(Answer::Reply { text, stop_reason, message }) => {
                Some(Outcome { text, message, usage: self.usage, ..Outcome::of(Ending::Completed(stop_reason)) })
            }
            other => {
                self.answer = other;
                None
            }
        }
    }

    /// Tokens and cost, as far as they are known.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// What the CLI was doing instead of answering, in words, where its output tells.
    pub(super) fn trouble(&self) -> Option<String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn reply(reader: &mut Reader<'_>) -> Option<(String, String)> {
        match reader.take_answer() {
            Some(Answer::Reply { text, stop_reason, .. }) => Some((text, stop_reason)),
            _ => None,
        }
    }

    fn read(lines: &[&str]) -> (Reader<'static>, Vec<Next>) {
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
        assert_eq!(reply(&mut reader), Some(("hi".to_owned(), "end_turn".to_owned())));
        assert_eq!(reader.usage(), Usage { input_tokens: Some(7), cached_tokens: Some(4), output_tokens: Some(8), cost_usd: Some(0.5) });
    }

    #[test]
    fn an_error_is_told_in_the_clis_own_words() {
        for (line, expected) in [
            (r#"{"type":"result","subtype":"success","is_error":true,"result":"API Error: 401 no"}"#, "API Error: 401 no"),
            (r#"{"type":"result","subtype":"error_during_execution","is_error":true,"errors":["a","b"]}"#, "a; b"),
            (r#"{"type":"result","subtype":"error_max_turns","is_error":true}"#, "claude gave no reply (error_max_turns)"),
        ] {
            assert!(matches!(read(&[line]).0.take_answer(), Some(Answer::Failure { error, .. }) if error == expected), "{line}");
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
            assert!(matches!(reader.take_answer(), Some(Answer::Failure { error, .. }) if error.contains(why)), "{line}");
        }
        let (_, next) = read(&[r#"{"type":"system","subtype":"init","permissionMode":"default"}"#]);
        assert_eq!(next, [Next::More]);
    }

    #[test]
    fn a_result_after_the_answer_does_not_count() {
        let (mut reader, _) =
            read(&[r#"{"type":"result","is_error":false,"result":"first"}"#, r#"{"type":"result","is_error":true,"result":"second"}"#]);
        assert_eq!(reply(&mut reader), Some(("first".to_owned(), "end_turn".to_owned())));
    }

    proptest! {
        #[test]
        fn any_line_is_read_without_a_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::default();
            prop_assert_eq!(reader.line(Line::Whole(&line)), Next::More);
            prop_assert!(reader.take_answer().is_none());
        }

        #[test]
        fn any_reply_is_read_as_it_was_written(text in "\\PC{0,60}[\n\t]?\\PC{0,60}") {
            let line = json!({"type": "result", "is_error": false, "result": text}).to_string();
            let mut reader = Reader::default();
            prop_assert_eq!(reader.line(Line::Whole(line.as_bytes())), Next::Answered);
            prop_assert_eq!(super::tests::reply(&mut reader), Some((text, "end_turn".to_owned())));
        }
    }
}
