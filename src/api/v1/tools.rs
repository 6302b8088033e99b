//! Functions of OpenAI's APIs as tools of the Messages API.

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::refusal::Refusal;

/// A function that the model may call.
#[derive(Deserialize, ToSchema)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) description: Option<String>,
    /// A JSON Schema of an object.
    #[schema(value_type = Option<serde_json::Value>)]
    pub(super) parameters: Option<Box<RawValue>>,
    pub(super) strict: Option<bool>,
}

/// Which functions the model has to call.
#[derive(Deserialize)]
#[serde(untagged, expecting = "\"none\", \"auto\", \"required\" or an object that names a function is needed")]
pub(super) enum Choice {
    Word(String),
    Object {
        #[serde(rename = "type")]
        kind: Option<String>,
        name: Option<String>,
        function: Option<Named>,
    },
}

#[derive(Deserialize)]
pub(super) struct Named {
    name: String,
}

/// A function as a tool, under its own name and with its own schema.
pub(super) fn tool(place: &str, function: Function) -> Result<Box<RawValue>, Refusal> {
    #[derive(Serialize)]
    struct Tool {
        name: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        description: Option<String>,
        input_schema: Box<RawValue>,
        #[serde(skip_serializing_if = "Option::is_none")]
        strict: Option<bool>,
    }
    let Function { name, description, parameters, strict } = function;
    if name.is_empty() {
        return Err(Refusal::wrong(format!("{place}.name"), "a name is needed"));
    }
    let input_schema = match parameters.filter(|schema| schema.get() != "null") {
        None => to_raw_value(&json!({"type": "object", "properties": {}})).expect("a schema is JSON"),
        Some(schema) if schema.get().starts_with('{') => schema,
        Some(_) => return Err(Refusal::wrong(format!("{place}.parameters"), "a JSON Schema of an object is needed")),
    };
    let tool = Tool { name, description, input_schema, strict: strict.filter(|strict| *strict) };
    Ok(to_raw_value(&tool).expect("a tool is JSON"))
}

/// The choice as the Messages API has it.
pub(super) fn choice(place: &str, choice: Option<Choice>, parallel: Option<bool>, offered: bool) -> Result<Option<Box<RawValue>>, Refusal> {
    let mut chosen = match choice {
        None => json!({"type": "auto"}),
        Some(Choice::Word(word)) => match word.as_str() {
            "auto" => json!({"type": "auto"}),
            "none" => json!({"type": "none"}),
            "required" => json!({"type": "any"}),
            other => return Err(Refusal::wrong(place, format!("\"{other}\" is none of none, auto and required"))),
        },
        Some(Choice::Object { kind, name, function }) => match (kind.as_deref(), function.map(|function| function.name).or(name)) {
            (None | Some("function"), Some(name)) => json!({"type": "tool", "name": name}),
            (kind, _) => return Err(Refusal::wrong(place, format!("\"{}\" can't be had here; name a function", kind.unwrap_or_default()))),
        },
    };
    if !offered {
        return match chosen["type"].as_str() {
            Some("auto" | "none") => Ok(None),
            _ => Err(Refusal::wrong(place, "there are no tools to call")),
        };
    }
    if parallel == Some(false) && chosen["type"] != "none" {
        chosen["disable_parallel_tool_use"] = Value::Bool(true);
    }
    // What the model's API does by itself.
    Ok((chosen != json!({"type": "auto"})).then(|| to_raw_value(&chosen).expect("a choice is JSON")))
}

/// Whether a tool must be called, which goes together with no thinking.
pub(super) fn is_forced(choice: Option<&RawValue>) -> bool {
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "type")]
        kind: String,
    }
    choice.and_then(|choice| serde_json::from_str(choice.get()).ok()).is_some_and(|Kind { kind }| matches!(kind.as_str(), "any" | "tool"))
}
