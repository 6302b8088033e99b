//! What OpenAI's two APIs say alike of how the model is to answer.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::conversation::Conversation;
use super::refusal::Refusal;
use crate::agent::completion::Thinking;

const JSON_OBJECT: &str = "Answer with a single JSON object and nothing else: no words around it, no Markdown fence.";

/// The form of an answer, as the Messages API has it. What the model has to be told of it goes into the system prompt. Of a parameter
/// `param`, whose schema is `schema_param`.
pub(super) fn format(
    [param, schema_param]: [&str; 2],
    kind: &str,
    schema: Option<Box<RawValue>>,
    conversation: &mut Conversation,
) -> Result<Option<Box<RawValue>>, Refusal> {
    #[derive(Serialize)]
    struct Format {
        r#type: &'static str,
        schema: Box<RawValue>,
    }
    match (kind, schema) {
        ("text", _) => Ok(None),
        ("json_object", _) => {
            conversation.system(JSON_OBJECT);
            Ok(None)
        }
        ("json_schema", Some(schema)) => Ok(Some(to_raw_value(&Format { r#type: "json_schema", schema }).expect("a format is JSON"))),
        ("json_schema", None) => Err(Refusal::wrong(schema_param, "a schema is needed")),
        (other, _) => Err(Refusal::wrong(param, format!("\"{other}\" can't be had here"))),
    }
}

/// How much the model is to put into it, and whether it thinks first.
pub(super) fn effort(param: &str, effort: Option<&str>) -> Result<(Option<String>, Thinking), Refusal> {
    match effort {
        None | Some("none" | "minimal") => Ok((None, Thinking::Off)),
        Some(effort @ ("low" | "medium" | "high" | "xhigh" | "max")) => Ok((Some(effort.to_owned()), Thinking::On)),
        Some(other) => Err(Refusal::wrong(param, format!("\"{other}\" is none of none, minimal, low, medium, high, xhigh and max"))),
    }
}
