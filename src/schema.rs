//! JSON Schemas of apps, and whether replies fit them.
//!
//! A schema of two kilobytes can take longer to check than anyone waits: its references branch, or a pattern goes back and
//! forth. So a check is a process of its own (`clawdforge fit`) with bounds on memory and time, and of an app there is one at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setpriority_process, setrlimit};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::agent::process::{self, ConverseOptions, Line, Next};
use crate::agent::tag::Tag;

/// The longest schema in bytes.
const MAX_BYTES: usize = 64 << 10;
/// How deep a schema may be nested.
const MAX_DEPTH: usize = 64;
/// How many references a schema may have.
const MAX_REFERENCES: usize = 200;
/// The longest regular expression in a schema, in bytes.
const MAX_PATTERN: usize = 1000;
/// Checks at once, of all apps.
const AT_ONCE: usize = 2;
/// How long a check may wait for others, its app's or all.
const WAIT: Duration = Duration::from_secs(20);
/// Seconds of a processor that a check may take.
const CPU_SECS: u64 = 2;
/// How long a check may take by the clock: there may be little of the processors for it.
const WITHIN: Duration = Duration::from_secs(10);
/// Bytes of memory that a check may take, with a reply of some ten MiB in it.
const MEMORY: u64 = 1 << 30;

/// Why a schema or a reply is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// It is no schema, or more than one may be.
    #[error("{0}")]
    Schema(String),
    /// The reply does not fit.
    #[error("the reply does not fit the schema{0}")]
    Reply(String),
    /// It could not be checked, for now.
    #[error("the schema could not be checked ({0}); try again later")]
    Unchecked(String),
}

/// What checks schemas. Clones share the places.
#[derive(Clone, Debug)]
pub struct Schemas {
    tag: Tag,
    places: Arc<Semaphore>,
    /// Of each app that has a check, or waits for one.
    apps: Arc<Mutex<HashMap<String, Arc<Semaphore>>>>,
}

/// What a check is told on its input, as a line.
#[derive(Debug, Deserialize, Serialize)]
struct Question {
    schema: Box<RawValue>,
    reply: Option<String>,
}

/// What it prints.
#[derive(Debug, Deserialize, Serialize)]
enum Answer {
    Fits,
    NoSchema(String),
    NoFit(String),
}

impl Schemas {
    /// Checks by processes that carry tags of this server.
    pub fn new(server: Tag) -> Self {
        Self { tag: server, places: Arc::new(Semaphore::new(AT_ONCE)), apps: Arc::default() }
    }

    /// Whether this is a schema at all. The CLI takes anything for one, and ignores what is none.
    pub async fn check(&self, app: &str, schema: &RawValue) -> Result<(), Wrong> {
        within_limits(schema.get()).map_err(Wrong::Schema)?;
        self.ask(app, Question { schema: schema.to_owned(), reply: None }).await
    }

    /// Whether a reply fits. claude gives up after some tries, and replies all the same.
    pub async fn fit(&self, app: &str, schema: &RawValue, reply: &str) -> Result<(), Wrong> {
        self.ask(app, Question { schema: schema.to_owned(), reply: Some(reply.to_owned()) }).await
    }

    async fn ask(&self, app: &str, question: Question) -> Result<(), Wrong> {
        let own = self.apps().entry(app.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(1))).clone();
        let place = async { (own.acquire().await, self.places.acquire().await) };
        let asked = match timeout(WAIT, place).await {
            Ok(_place) => Box::pin(self.ask_process(&question)).await,
            Err(_) => Err(Wrong::Unchecked("too many are checked at once".to_owned())),
        };
        drop(own);
        self.apps().retain(|_, own| Arc::strong_count(own) > 1);
        asked
    }

    fn apps(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Semaphore>>> {
        self.apps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask_process(&self, question: &Question) -> Result<(), Wrong> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("clawdforge").arg("fit").env_clear();
        let mut printed = None;
        let read = |line: Line<'_>| {
            if let Line::Whole(line) = line {
                printed = serde_json::from_slice::<Answer>(line).ok();
            }
            Next::Answered
        };
        let mut input = serde_json::to_vec(question).expect("a question is JSON");
        input.push(b'\n');
        let cancel = CancellationToken::new();
        let talk =
            ConverseOptions { input, hold_input: false, time_up: Box::pin(sleep(WITHIN)), cancel: &cancel, patience: None, more: None };
        // Of its own: the end of one family must not be that of another.
        let tag = self.tag.run(&format!("schema-{}", uuid::Uuid::new_v4().simple()));
        process::converse(&mut command, &tag, talk, read).await.map_err(|error| Wrong::Unchecked(error.to_string()))?;
        match printed {
            Some(Answer::Fits) => Ok(()),
            Some(Answer::NoSchema(why)) => Err(Wrong::Schema(why)),
            Some(Answer::NoFit(why)) => Err(Wrong::Reply(why)),
            None => Err(Wrong::Schema(format!(
                "to check this schema takes more than {CPU_SECS} s, or more than {} MiB; make it simpler",
                MEMORY >> 20
            ))),
        }
    }
}

/// What is seen of a schema without compiling it.
fn within_limits(schema: &str) -> Result<(), String> {
    if schema.len() > MAX_BYTES {
        return Err("the schema is longer than 64 KiB".to_owned());
    }
    let schema: Value = serde_json::from_str(schema).map_err(|error| error.to_string())?;
    if !schema.is_object() {
        return Err("the schema must be a JSON object".to_owned());
    }
    let (mut references, mut level, mut depth) = (0, vec![&schema], 0);
    while !level.is_empty() {
        depth += 1;
        if depth > MAX_DEPTH {
            return Err(format!("the schema is nested deeper than {MAX_DEPTH} levels"));
        }
        for object in level.iter().filter_map(|value| value.as_object()) {
            references += ["$ref", "$dynamicRef", "$recursiveRef"].iter().filter(|key| object.contains_key(**key)).count();
            let patterns = object.get("patternProperties").and_then(Value::as_object).into_iter().flat_map(serde_json::Map::keys);
            if patterns.map(String::as_str).chain(object.get("pattern").and_then(Value::as_str)).any(|pattern| pattern.len() > MAX_PATTERN)
            {
                return Err(format!("a pattern in the schema is longer than {MAX_PATTERN} bytes"));
            }
        }
        if references > MAX_REFERENCES {
            return Err(format!("the schema has more than {MAX_REFERENCES} references"));
        }
        level = level.into_iter().flat_map(below).collect();
    }
    Ok(())
}

fn below(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(values) => values.iter().collect(),
        Value::Object(values) => values.values().collect(),
        _ => Vec::new(),
    }
}

/// What `clawdforge fit` does with the line on its input: gives the line to print. It bounds the process that it is called in.
pub fn answer(question: &str) -> anyhow::Result<String> {
    let bound = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    bound(Resource::Cpu, CPU_SECS)?;
    bound(Resource::As, MEMORY)?;
    bound(Resource::Core, 0)?;
    // Runs come first.
    let _ = setpriority_process(None, 10);
    let Question { schema, reply } = serde_json::from_str(question)?;
    Ok(serde_json::to_string(&judge(schema.get(), reply.as_deref()))?)
}

fn judge(schema: &str, reply: Option<&str>) -> Answer {
    let schema = match serde_json::from_str(schema) {
        Ok(schema) => schema,
        Err(error) => return Answer::NoSchema(error.to_string()),
    };
    let validator = match jsonschema::validator_for(&schema) {
        Ok(validator) => validator,
        Err(error) => return Answer::NoSchema(format!("this is no JSON Schema: {error}")),
    };
    let Some(reply) = reply else { return Answer::Fits };
    let Ok(reply) = serde_json::from_str::<Value>(reply) else { return Answer::NoFit(": it is no JSON".to_owned()) };
    let wrong = validator.iter_errors(&reply).next();
    wrong.map_or(Answer::Fits, |error| Answer::NoFit(format!(" at \"{}\": {error}", error.instance_path())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_reply_that_does_not_fit_is_told_where() {
        let schema = r#"{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}"#;
        let why = |reply| match judge(schema, Some(reply)) {
            Answer::NoFit(why) => Wrong::Reply(why).to_string(),
            other => format!("{other:?}"),
        };
        assert_eq!(why(r#"{"a": [1, 2]}"#), "Fits");
        assert_eq!(why(r#"{"a": [1, "x"]}"#), r#"the reply does not fit the schema at "/a/1": "x" is not of type "integer""#);
        assert_eq!(why("words"), "the reply does not fit the schema: it is no JSON");
    }

    #[test]
    fn what_is_too_much_is_seen_before_it_is_compiled() {
        let deep = (0..100).fold(json!({}), |inner, _| json!({"not": inner}));
        let many: Vec<_> = (0..300).map(|_| json!({"$ref": "#"})).collect();
        for (schema, why) in [
            (deep, "nested deeper"),
            (json!({"anyOf": many}), "references"),
            (json!({"properties": {"a": {"pattern": "a".repeat(2000)}}}), "pattern"),
            (json!({"patternProperties": {"a".repeat(2000): {}}}), "pattern"),
            (json!({"description": "x".repeat(70_000)}), "64 KiB"),
            (json!([]), "object"),
        ] {
            let refused = within_limits(&schema.to_string()).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
        within_limits(&json!({"properties": {"pattern": {"type": "string"}, "a": {"$ref": "#"}}}).to_string()).unwrap();
    }
}
