//! The caller's conversation, put together as the model is asked in: messages by turns, each a list of the Messages API's blocks.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};

use super::refusal::Refusal;
use crate::agent::completion::{Message, Role};

/// A conversation that grows.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    system: Vec<String>,
    messages: Vec<Message>,
    /// Where each message began in the request.
    places: Vec<String>,
}

/// A conversation that makes sense.
#[derive(Debug)]
pub(super) struct Whole {
    /// The system prompt, if there is one.
    pub(super) system: Option<String>,
    pub(super) messages: Vec<Message>,
    /// What the last message says, for the ledger.
    pub(super) prompt: String,
}

/// A block as far as it is looked at.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    text: Option<String>,
    id: Option<String>,
    tool_use_id: Option<String>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    source: Option<Source>,
}

#[derive(Deserialize)]
struct Source {
    #[serde(rename = "type")]
    kind: String,
}

impl Conversation {
    pub(super) fn system(&mut self, text: impl Into<String>) {
        self.system.push(text.into());
    }

    /// Adds what somebody said. Messages of one side that follow each other are one.
    pub(super) fn say(&mut self, place: impl Into<String>, role: Role, content: Vec<Box<RawValue>>) {
        if content.is_empty() {
            return;
        }
        match self.messages.last_mut() {
            Some(last) if last.role == role => last.content.extend(content),
            _ => {
                self.messages.push(Message { role, content });
                self.places.push(place.into());
            }
        }
    }

    /// The conversation, if the model can be asked to answer it.
    pub(super) fn finish(self) -> Result<Whole, Refusal> {
        let Self { system, messages, places } = self;
        let Some(last) = messages.last() else {
            return Err(Refusal::wrong("messages", "at least one message with something in it is needed"));
        };
        if last.role == Role::Assistant {
            let place = places.last().cloned().unwrap_or_default();
            return Err(Refusal::wrong(place, "the last message must not be the assistant's: an answer can't be begun for the model"));
        }
        let mut open = HashSet::new();
        for (Message { role, content }, place) in messages.iter().zip(&places) {
            let mut calls = HashSet::new();
            for block in content {
                let head = head(place, block)?;
                check(place, &head, *role)?;
                match head.kind {
                    "tool_use" => drop(calls.insert(head.id.unwrap_or_default())),
                    "tool_result" => {
                        let id = head.tool_use_id.unwrap_or_default();
                        if !open.remove(&id) {
                            return Err(Refusal::wrong(
                                place,
                                format!("the tool result \"{id}\" answers no call of the message before it"),
                            ));
                        }
                    }
                    _ => {}
                }
            }
            if let Some(id) = open.iter().next() {
                return Err(Refusal::wrong(place, format!("the tool call \"{id}\" of the message before has no result here")));
            }
            open = calls;
        }
        let prompt = spoken(&last.content);
        let system = Some(system.join("\n\n")).filter(|system| !system.is_empty());
        Ok(Whole { system, messages, prompt })
    }
}

fn head<'a>(place: &str, block: &'a RawValue) -> Result<Head<'a>, Refusal> {
    serde_json::from_str(block.get()).map_err(|error| Refusal::wrong(place, format!("a block can't be read ({error})")))
}

/// Refuses blocks that the model would not get as they are.
fn check(place: &str, head: &Head<'_>, role: Role) -> Result<(), Refusal> {
    let known = match role {
        Role::User => ["text", "image", "document", "tool_result", "search_result"].as_slice(),
        Role::Assistant => ["text", "thinking", "redacted_thinking", "tool_use"].as_slice(),
    };
    if !known.contains(&head.kind) {
        return Err(Refusal::wrong(place, format!("blocks of type \"{}\" can't be had here", head.kind)));
    }
    if matches!(head.kind, "image" | "document")
        && !head.source.as_ref().is_some_and(|source| matches!(source.kind.as_str(), "base64" | "text" | "content"))
    {
        return Err(Refusal::wrong(place, NOT_FETCHED));
    }
    if head.kind == "tool_result"
        && let Some(content) = head.content
        && let Ok(blocks) = serde_json::from_str::<Vec<Box<RawValue>>>(content.get())
    {
        for block in &blocks {
            check(place, &self::head(place, block)?, Role::User)?;
        }
    }
    Ok(())
}

/// What somebody said, in words.
fn spoken(content: &[Box<RawValue>]) -> String {
    let say = |block: &RawValue| {
        let head: Head<'_> = serde_json::from_str(block.get()).ok()?;
        Some(match head.kind {
            "text" => head.text?,
            "tool_result" => {
                let content = head.content.map_or("", RawValue::get);
                match serde_json::from_str::<Vec<Box<RawValue>>>(content) {
                    Ok(blocks) => spoken(&blocks),
                    Err(_) => serde_json::from_str(content).unwrap_or_default(),
                }
            }
            kind => format!("[{kind}]"),
        })
    };
    content.iter().filter_map(|block| say(block)).collect::<Vec<_>>().join("\n")
}

/// Why a place elsewhere is refused.
pub(super) const NOT_FETCHED: &str = "send the file itself, as base64 or a data: URL; this server fetches nothing";

fn raw(block: &impl Serialize) -> Box<RawValue> {
    to_raw_value(block).expect("a block is JSON")
}

/// A block of text; none for an empty one, which the model's API refuses.
pub(super) fn text(text: &str) -> Option<Box<RawValue>> {
    (!text.is_empty()).then(|| raw(&json!({"type": "text", "text": text})))
}

/// A call of a tool with `arguments` in JSON.
pub(super) fn tool_use(place: &str, id: &str, name: &str, arguments: &str) -> Result<Box<RawValue>, Refusal> {
    #[derive(Serialize)]
    struct ToolUse<'a> {
        r#type: &'static str,
        id: &'a str,
        name: &'a str,
        input: Box<RawValue>,
    }
    let arguments = if arguments.trim().is_empty() { "{}" } else { arguments };
    let input = RawValue::from_string(arguments.to_owned()).ok().filter(|input| input.get().starts_with('{'));
    let input = input.ok_or_else(|| Refusal::wrong(place, "the arguments of a call must be a JSON object"))?;
    Ok(raw(&ToolUse { r#type: "tool_use", id, name, input }))
}

/// What a tool gave.
pub(super) fn tool_result(id: &str, content: &[Box<RawValue>]) -> Box<RawValue> {
    #[derive(Serialize)]
    struct ToolResult<'a> {
        r#type: &'static str,
        tool_use_id: &'a str,
        content: &'a [Box<RawValue>],
    }
    raw(&ToolResult { r#type: "tool_result", tool_use_id: id, content })
}

/// What the model thought, as it signed it.
pub(super) fn thinking(text: &str, signature: &str) -> Box<RawValue> {
    raw(&json!({"type": "thinking", "thinking": text, "signature": signature}))
}

/// An image or a PDF, from a `data:` URL.
pub(super) fn attachment(place: &str, url: &str) -> Result<Box<RawValue>, Refusal> {
    let (media_type, data) = data_url(url).ok_or_else(|| Refusal::wrong(place, NOT_FETCHED))?;
    base64(place, media_type, data)
}

/// An image or a PDF, from its base64.
pub(super) fn base64(place: &str, media_type: &str, data: &str) -> Result<Box<RawValue>, Refusal> {
    let kind = match media_type {
        "image/jpeg" | "image/jpg" | "image/png" | "image/gif" | "image/webp" => "image",
        "application/pdf" => "document",
        other => {
            let message = format!("\"{other}\" can't be had here; send a PNG, JPEG, GIF or WebP image, or a PDF");
            return Err(Refusal::wrong(place, message));
        }
    };
    let media_type = if media_type == "image/jpg" { "image/jpeg" } else { media_type };
    Ok(raw(&json!({"type": kind, "source": {"type": "base64", "media_type": media_type, "data": data}})))
}

/// The type and the base64 of a `data:` URL.
pub(super) fn data_url(url: &str) -> Option<(&str, &str)> {
    let (kind, data) = url.strip_prefix("data:")?.split_once(',')?;
    let kind = kind.strip_suffix(";base64")?;
    Some((kind.split(';').next().unwrap_or_default(), data))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(id: &str) -> Box<RawValue> {
        tool_use("m", id, "t", "{\"z\": 1, \"a\": 2}").unwrap()
    }

    fn said(text: &str) -> Vec<Box<RawValue>> {
        super::text(text).into_iter().collect()
    }

    #[test]
    fn one_sides_messages_are_one_and_results_find_their_calls() {
        let mut conversation = Conversation::default();
        conversation.system("a");
        conversation.say("messages.0", Role::User, said("one"));
        conversation.say("messages.1", Role::Assistant, vec![call("1"), call("2")]);
        conversation.say("messages.2", Role::User, vec![tool_result("1", &said("rain"))]);
        conversation.say("messages.3", Role::User, vec![tool_result("2", &said("sun"))]);
        conversation.say("messages.4", Role::User, said("and?"));
        conversation.system("b");
        let Whole { system, messages, prompt } = conversation.finish().unwrap();
        assert_eq!((system.as_deref(), messages.len(), messages[2].content.len()), (Some("a\n\nb"), 3, 3));
        assert_eq!(prompt, "rain\nsun\nand?");
        assert_eq!(messages[1].content[0].get(), r#"{"type":"tool_use","id":"1","name":"t","input":{"z": 1, "a": 2}}"#);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let refused = |turns: Vec<(Role, Vec<Box<RawValue>>)>| {
            let mut conversation = Conversation::default();
            for (at, (role, content)) in turns.into_iter().enumerate() {
                conversation.say(format!("messages.{at}"), role, content);
            }
            let Refusal { param, message, .. } = conversation.finish().unwrap_err();
            format!("{} {message}", param.unwrap())
        };
        let image = RawValue::from_string(r#"{"type":"image","source":{"type":"url","url":"http://x"}}"#.to_owned()).unwrap();
        assert!(refused(vec![]).starts_with("messages at least"));
        assert!(refused(vec![(Role::User, said("a")), (Role::Assistant, said("b"))]).starts_with("messages.1 the last"));
        assert!(
            refused(vec![(Role::Assistant, vec![call("1")]), (Role::User, said("b"))])
                .contains("\"1\" of the message before has no result")
        );
        assert!(refused(vec![(Role::User, vec![tool_result("9", &[])])]).contains("\"9\" answers no call"));
        assert!(refused(vec![(Role::User, vec![image.clone()])]).contains("fetches nothing"));
        assert!(
            refused(vec![(Role::Assistant, vec![call("1")]), (Role::User, vec![tool_result("1", &[image])])]).contains("fetches nothing")
        );
    }

    #[test]
    fn files_come_as_data_urls() {
        assert_eq!(data_url("data:image/png;base64,AA=="), Some(("image/png", "AA==")));
        assert_eq!(data_url("data:application/pdf;name=a.pdf;base64,AA=="), Some(("application/pdf", "AA==")));
        assert_eq!((data_url("https://x/y.png"), data_url("data:text/plain,hello")), (None, None));
        assert!(attachment("p", "data:audio/wav;base64,AA").unwrap_err().message.contains("audio/wav"));
    }
}
