//! What was said in a request, whatever API it came by.

use serde_json::Value;

/// One message. What an API says in several (a reply of two calls, say) is one.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Message {
    /// Whether the model said it.
    pub(super) of_model: bool,
    /// Its texts.
    pub(super) texts: Vec<String>,
    /// Whether the model calls tools in it.
    pub(super) calls: bool,
    /// What tools gave.
    pub(super) results: Vec<String>,
}

impl Message {
    pub(super) fn of_user() -> Self {
        Self::default()
    }

    pub(super) fn of_model() -> Self {
        Self { of_model: true, ..Self::default() }
    }

    fn only_results(&self) -> bool {
        !self.results.is_empty() && self.texts.is_empty()
    }
}

/// What agents say to the model beside the user's own words begins so.
const REMINDERS: [&str; 2] = ["<system-reminder>", "<environment_context>"];

/// What they ask beside the conversation begins so: for a title of it. The user's words come behind, and mean nothing there.
const TITLES: [&str; 3] = ["<session>", "Your task is to generate a very short title", "Generate a title for this conversation:"];

/// Whether a title is asked for.
pub(super) fn wants_title(conversation: &[Message]) -> bool {
    let last = conversation.iter().rev().take_while(|message| !message.of_model);
    last.flat_map(|message| &message.texts).any(|text| TITLES.iter().any(|title| text.starts_with(title)))
}

/// The user's own words: the last text that is not a reminder. Where only a tool's result came since, the one before.
pub(super) fn prompt(conversation: &[Message]) -> String {
    let texts = conversation.iter().rev().filter(|message| !message.of_model).flat_map(|message| message.texts.iter().rev());
    let own = |text: &&String| !REMINDERS.iter().any(|reminder| text.trim_start().starts_with(reminder));
    texts.into_iter().find(own).cloned().unwrap_or_default()
}

/// How often tools were called since the prompt.
pub(super) fn rounds(conversation: &[Message]) -> usize {
    let since = conversation.iter().rposition(|message| !message.of_model && message.results.is_empty()).unwrap_or_default();
    conversation[since..].iter().filter(|message| message.calls).count()
}

/// What a tool gave, where the conversation ends with that.
pub(super) fn tool_result(conversation: &[Message]) -> Option<String> {
    conversation.iter().rfind(|message| !message.of_model)?.results.first().cloned()
}

/// Puts together what an API says one by one: the items of one reply, and the results of its calls.
pub(super) fn joined(messages: impl IntoIterator<Item = Message>) -> Vec<Message> {
    let mut conversation: Vec<Message> = Vec::new();
    for message in messages {
        match conversation.last_mut() {
            Some(last) if last.of_model == message.of_model && (message.of_model || last.only_results() && message.only_results()) => {
                last.texts.extend(message.texts);
                last.results.extend(message.results);
                last.calls |= message.calls;
            }
            _ => conversation.push(message),
        }
    }
    conversation
}

/// The texts of a message's content: a text, or a list of parts of which some have a `text`.
pub(super) fn texts(content: &Value) -> Vec<String> {
    match content {
        Value::String(text) => vec![text.clone()],
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    }
}

/// A list in a request, or nothing.
pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}
