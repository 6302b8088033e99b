//! What a reply's text stands for: a JSON value, or itself.

use serde_json::value::RawValue;

/// A run's result, as the wire has it.
#[derive(Debug, serde::Serialize)]
#[serde(untagged)]
pub(super) enum Reply {
    /// The whole reply is a JSON object or array. Kept to the letter, so that numbers of any size and the order of keys
    /// come through.
    Json(Box<RawValue>),
    /// Any other reply.
    Text(String),
}

impl Reply {
    /// Reads a reply: the JSON object or array that it is, bare or in one Markdown fence; otherwise its text, untouched.
    pub(super) fn read(text: String) -> Self {
        let trimmed = text.trim();
        let candidate = inside_fence(trimmed).unwrap_or(trimmed).trim();
        // Read twice: a value's limits (nesting, surrogates) are those of the clients' parsers too.
        let value = candidate
            .starts_with(['{', '['])
            .then(|| serde_json::from_str::<serde_json::Value>(candidate).and_then(|_| serde_json::from_str(candidate)));
        match value {
            Some(Ok(json)) => Self::Json(json),
            _ => Self::Text(text),
        }
    }
}

/// What stands inside the fence that surrounds `text`, if one does.
fn inside_fence(text: &str) -> Option<&str> {
    let ticks = text.len() - text.trim_start_matches('`').len();
    if ticks < 3 {
        return None;
    }
    let (fence, rest) = text.split_at(ticks);
    let (_language, body) = rest.split_once('\n')?;
    let body = body.strip_suffix(fence)?;
    // The closing fence is a line of its own.
    let line = body.rfind('\n').map_or(body, |end| &body[end..]);
    (line.trim().is_empty()).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn read(text: &str) -> Value {
        serde_json::to_value(Reply::read(text.to_owned())).unwrap()
    }

    #[test]
    fn objects_and_arrays_are_values() {
        assert_eq!(read(r#"{"a": [1, 2.50]}"#), json!({"a": [1, 2.5]}));
        assert_eq!(read("\n [] \n"), json!([]));
        assert_eq!(read("```json\n{\"a\": 1}\n```"), json!({"a": 1}));
        assert_eq!(read("```\r\n[1]\r\n```\n"), json!([1]));
        assert_eq!(read("````\n{}\n  ````"), json!({}));
        let big = r#"{"z": 12345678901234567890123, "a": 1.10}"#;
        assert_eq!(serde_json::to_string(&Reply::read(big.to_owned())).unwrap(), big);
    }

    #[test]
    fn anything_else_is_text_untouched() {
        let deep = "[".repeat(100_000);
        for text in [
            "42",
            "true",
            "null",
            "\"quoted\"",
            "",
            " padded ",
            "{\"a\": 1",
            "{} {}",
            "here: {\"a\": 1}",
            "```json\n42\n```",
            "```json\n{}\n``` and more",
            "```json\n{}```\n[",
            "```json {} ```",
            "`{}`",
            "``` \n{}\n````x",
            r#"["\ud800"]"#,
            &deep,
        ] {
            assert_eq!(read(text), json!(text), "{text:.40}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("\\PC{0,6}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_value_comes_back_bare_or_fenced(value in value(), language in "[a-z]{0,5}", pad in "[ \n]{0,3}") {
            let text = serde_json::to_string_pretty(&value).unwrap();
            let expected = if value.is_object() || value.is_array() { value } else { json!(text) };
            prop_assert_eq!(&read(&text), &expected);
            let fenced = format!("{pad}```{language}\n{text}\n```{pad}");
            let expected = if expected.is_string() { json!(fenced) } else { expected };
            prop_assert_eq!(read(&fenced), expected);
        }

        #[test]
        fn any_text_is_itself_or_the_value_that_it_spells(text in "[`{}\\[\\]a1,:\"\n ]{0,40}") {
            let read = read(&text);
            match &read {
                Value::String(same) => prop_assert_eq!(same, &text),
                other => prop_assert!(other.is_object() || other.is_array()),
            }
            if let Ok(direct @ (Value::Object(_) | Value::Array(_))) = serde_json::from_str::<Value>(&text) {
                prop_assert_eq!(read, direct);
            }
        }
    }
}
