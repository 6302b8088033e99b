//! ACP messages, each with the keys that clients read added to it.
//!
//! A message passes through whole: its own keys stay as they are, to the letter of their values, and what is added
//! stands behind them.

use std::collections::HashMap;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

use super::contract::Usage;

/// A message that an agent's client printed, with what was added.
#[derive(Debug)]
pub struct TypedMessage {
    message: Message,
    /// What clients read: `type` and its like.
    added: Map<String, Value>,
}

impl TypedMessage {
    /// A message with these keys added to it. `None` where it is not a JSON object.
    pub fn of(line: &[u8], added: Map<String, Value>) -> Option<Self> {
        Some(Self { message: serde_json::from_slice(line).ok()?, added })
    }

    /// The `type` that was added.
    pub fn kind(&self) -> &str {
        self.added.get("type").and_then(Value::as_str).unwrap_or("protocol")
    }

    /// Adds what clients read.
    pub fn add(&mut self, added: Map<String, Value>) {
        self.added.extend(added);
    }

    /// As it is handed on.
    pub fn raw(&self) -> Box<RawValue> {
        to_raw_value(self).expect("a message is JSON")
    }
}

impl Serialize for TypedMessage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in &self.message.0 {
            map.serialize_entry(key, value)?;
        }
        // A message's own key is never replaced.
        for (key, value) in self.added.iter().filter(|(key, _)| self.message.0.iter().all(|(own, _)| own != *key)) {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

/// A JSON object, its values as they were written.
#[derive(Debug)]
struct Message(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Message;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message, A::Error> {
                let mut entries: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((key, value)) = map.next_entry()? {
                    entries.retain(|(own, _)| *own != key);
                    entries.push((key, value));
                }
                Ok(Message(entries))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// How a turn ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TurnEnd {
    /// The agent stopped, for this reason.
    Stopped(String),
    /// The agent failed, in its own words.
    Failed(String),
}

/// The messages of one turn, as they come.
#[derive(Debug, Default)]
pub struct Messages {
    messages: Vec<TypedMessage>,
    /// Where the `tool_call` messages are, by the call's id, and whether their tool's own name is known.
    calls: HashMap<String, (usize, bool)>,
    text: String,
    /// The id of the request that is the turn.
    prompt_id: Option<Value>,
    /// The ids of requests from the agent that are not answered yet; they repeat ours.
    asked: Vec<Value>,
    session_id: Option<String>,
    usage: Usage,
    cost_usd: Option<f64>,
    agent_began: bool,
    mode: Option<String>,
    last_error: Option<String>,
}

impl Messages {
    /// Takes one line of output. Gives how the turn ended, where this message says so. What is not a JSON object is
    /// skipped.
    pub fn line(&mut self, line: &[u8]) -> Option<TurnEnd> {
        let message: Message = serde_json::from_slice(line).ok()?;
        // Read once more for its parts; what is too deep for that passes through as it is.
        let value: Value =
            serde_json::from_slice(line).or_else(|_| serde_json::from_str(&without_lone_surrogates(line))).unwrap_or(Value::Null);
        let (added, end) = self.read(&value);
        self.messages.push(TypedMessage { message, added });
        end
    }

    /// How many messages there were.
    pub fn count(&self) -> usize {
        self.messages.len()
    }

    /// The last message, to be added to.
    pub fn last_mut(&mut self) -> Option<&mut TypedMessage> {
        self.messages.last_mut()
    }

    /// The last message.
    pub fn last(&self) -> Option<&TypedMessage> {
        self.messages.last()
    }

    /// The text of the turn so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the agent calls the session, if it said so.
    pub fn session_id(&self) -> Option<&str> {
        self.session_id.as_deref()
    }

    /// The message of the last error, also of one that did not end the turn.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// Tokens, as far as the agent said so.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What the agent says the session has cost since it was started, in US dollars.
    pub fn cost_usd(&self) -> Option<f64> {
        self.cost_usd
    }

    /// Whether the agent was started for this turn.
    pub fn agent_began(&self) -> bool {
        self.agent_began
    }

    /// The mode that the agent says it works in, once the turn's prompt is on its way to it.
    pub fn mode_at_work(&self) -> Option<&str> {
        self.mode.as_deref().filter(|_| self.prompt_id.is_some())
    }

    /// All of them.
    pub fn into_messages(self) -> Vec<TypedMessage> {
        self.messages
    }

    fn read(&mut self, message: &Value) -> (Map<String, Value>, Option<TurnEnd>) {
        let method = message["method"].as_str();
        if let Some(id) = message["params"]["sessionId"].as_str() {
            self.session_id = Some(id.to_owned());
        }
        match method {
            Some("session/update") => {
                let params = &message["params"];
                // Older clients put the update straight into the parameters.
                let update = if params["update"].is_object() { &params["update"] } else { params };
                return (self.update(update), None);
            }
            Some("session/prompt") => self.prompt_id = Some(message["id"].clone()),
            Some("initialize") => self.agent_began = true,
            // Not every agent says that it took it.
            Some("session/set_mode") => self.note_mode(&message["params"]["modeId"]),
            Some(method) if from_agent(method) && !message["id"].is_null() => self.asked.push(message["id"].clone()),
            _ => {}
        }
        if matches!(method, Some("session/request_permission" | "elicitation/create")) {
            return (kind("permission_request"), None);
        }
        if method.is_some() {
            return (kind("protocol"), None);
        }
        self.response(message)
    }

    fn response(&mut self, message: &Value) -> (Map<String, Value>, Option<TurnEnd>) {
        let result = &message["result"];
        self.note_mode(&result["modes"]["currentModeId"]);
        if let Some(reason) = result["stopReason"].as_str() {
            let count = |name: &str| result["usage"][name].as_i64();
            let cached = [count("cachedReadTokens"), count("cachedWriteTokens")];
            let read = count("inputTokens").map(|read| cached.into_iter().flatten().fold(read, i64::saturating_add));
            let of_both = read.zip(count("outputTokens"));
            self.usage = Usage {
                input_tokens: of_both.map(|(read, _)| read),
                cached_tokens: of_both.and(cached[0]),
                output_tokens: of_both.map(|(_, written)| written),
                cost_usd: None,
            };
            return (kind("stop"), Some(TurnEnd::Stopped(reason.to_owned())));
        }
        let id = &message["id"];
        let to_agent = self.asked.iter().position(|asked| asked == id).map(|at| self.asked.swap_remove(at)).is_some();
        if message["error"].is_object() {
            let text = message["error"]["message"].as_str().unwrap_or_default().to_owned();
            self.last_error = Some(text.clone());
            let mut added = kind("error");
            added.insert("content".to_owned(), json!(text));
            // An error without an id is the client's own, and its last word.
            let ends = id.is_null() || (!to_agent && self.prompt_id.as_ref() == Some(id));
            return (added, ends.then_some(TurnEnd::Failed(text)));
        }
        (kind("protocol"), None)
    }

    fn note_mode(&mut self, mode: &Value) {
        if let Some(mode) = mode.as_str() {
            self.mode = Some(mode.to_owned());
        }
    }

    fn update(&mut self, update: &Value) -> Map<String, Value> {
        let name = update["sessionUpdate"].as_str().unwrap_or("protocol");
        let content = || update["content"]["text"].as_str().unwrap_or_default().to_owned();
        let mut added = match name {
            "agent_message_chunk" => {
                let content = content();
                self.text.push_str(&content);
                return with_content("text", content);
            }
            "agent_thought_chunk" => return with_content("thinking", content()),
            "tool_call" | "tool_call_update" => kind(name),
            "usage_update" => {
                self.cost_usd = update["cost"]["amount"].as_f64().filter(|_| update["cost"]["currency"] == "USD").or(self.cost_usd);
                return kind(name);
            }
            other => {
                self.note_mode(&update["currentModeId"]);
                let options = update["configOptions"].as_array().into_iter().flatten();
                options.filter(|option| option["id"] == "mode").for_each(|option| self.note_mode(&option["currentValue"]));
                return kind(other);
            }
        };
        let call = update["toolCallId"].as_str();
        let tool = update["_meta"]["claudeCode"]["toolName"].is_string();
        if name == "tool_call" {
            for key in ["name", "args", "result", "status"] {
                added.insert(key.to_owned(), Value::Null);
            }
            gather(&mut added, update, false);
            if let Some(call) = call {
                self.calls.insert(call.to_owned(), (self.messages.len(), tool));
            }
        } else if let Some((at, named)) = call.and_then(|call| self.calls.get_mut(call)) {
            gather(&mut self.messages[*at].added, update, *named);
            *named |= tool;
        }
        added
    }
}

/// Takes over what an update says of its tool call. A title stands for the name only where the tool's own is not known.
fn gather(added: &mut Map<String, Value>, update: &Value, named: bool) {
    let tool = &update["_meta"]["claudeCode"]["toolName"];
    let name = if tool.is_string() || named { tool } else { &update["title"] };
    let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    let result = if empty(&update["rawOutput"]) { &update["content"] } else { &update["rawOutput"] };
    for (key, value) in [("name", name), ("args", &update["rawInput"]), ("result", result), ("status", &update["status"])] {
        if !empty(value) {
            added.insert(key.to_owned(), value.clone());
        }
    }
}

/// The line with each half of a character, which Node writes where it cut a text, replaced by the tag for such.
fn without_lone_surrogates(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut whole = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        whole.push_str(before);
        let half = |text: &str, range: [char; 2]| {
            let mut chars = text.chars().skip(2).map(|c| c.to_ascii_lowercase());
            text.starts_with("\\u") && chars.next() == Some('d') && chars.next().is_some_and(|c| (range[0]..=range[1]).contains(&c))
        };
        let length = if half(escape, ['8', 'b']) && escape.get(6..).is_some_and(|next| half(next, ['c', 'f'])) {
            12
        } else if half(escape, ['8', 'f']) {
            whole.push_str("\\ufffd");
            rest = escape.get(6..).unwrap_or_default();
            continue;
        } else {
            // With the character behind it, so that an escaped backslash does not begin another escape.
            1 + escape[1..].chars().next().map_or(0, char::len_utf8)
        };
        let (kept, after) = escape.split_at(length.min(escape.len()));
        whole.push_str(kept);
        rest = after;
    }
    whole + rest
}

/// Whether it is the agent that calls this method. Agents have methods of their own, so it is the client's that are listed.
fn from_agent(method: &str) -> bool {
    let session =
        |step| ["new", "load", "resume", "prompt", "cancel", "set_mode", "set_model", "set_config_option", "close"].contains(&step);
    !matches!(method, "initialize" | "authenticate") && !method.strip_prefix("session/").is_some_and(session)
}

fn kind(name: &str) -> Map<String, Value> {
    Map::from_iter([("type".to_owned(), json!(name))])
}

fn with_content(name: &str, content: String) -> Map<String, Value> {
    let mut added = kind(name);
    added.insert("content".to_owned(), json!(content));
    added
}

#[cfg(test)]
mod tests;
