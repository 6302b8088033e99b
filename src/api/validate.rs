//! What requests for runs, turns and sessions have in common, checked.

use std::time::Duration;

use super::auth::Caller;
use super::error::{ApiError, FieldError};
use crate::agent::contract::Attachment;
use crate::agent::questions::Ask;
use crate::agent::turn::{ASK, PERMISSIONS};
use crate::app::App;
use crate::config::is_model;

/// The longest prompt in bytes.
const MAX_PROMPT: usize = 10 << 20;
/// More files than a folder should be searched for.
const MAX_FILES: usize = 256;

pub(super) fn check_prompt(prompt: &str, errors: &mut Vec<FieldError>) {
    match prompt.len() {
        0 => errors.push(FieldError::new("/prompt", "a prompt is needed")),
        length if length > MAX_PROMPT => errors.push(FieldError::new("/prompt", "the prompt is longer than 10 MiB")),
        _ => {}
    }
}

pub(super) fn check_model(model: Option<&str>, errors: &mut Vec<FieldError>) {
    if model.is_some_and(|model| !is_model(model)) {
        errors.push(FieldError::new("/model", r"the model must match ^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$"));
    }
}

pub(super) fn check_files(files: Option<&[String]>, errors: &mut Vec<FieldError>) {
    if files.is_some_and(|files| files.len() > MAX_FILES) {
        errors.push(FieldError::new("/files", format!("at most {MAX_FILES} files can be attached")));
    }
}

/// How many a list is to have at most: from 1 to 200, and 50 where it does not say.
pub(super) fn limit(limit: Option<String>) -> Result<u32, ApiError> {
    let limit = limit.map_or(Some(50), |limit| limit.parse().ok()).filter(|limit| (1..=200).contains(limit));
    limit.ok_or_else(|| ApiError::BadRequest("Set limit to a number from 1 to 200, at most once.".to_owned()))
}

pub(super) fn check_timeout(secs: Option<i64>, most: i64, errors: &mut Vec<FieldError>) {
    if secs.is_some_and(|secs| !(5..=most).contains(&secs)) {
        errors.push(FieldError::new("/timeout_secs", format!("the timeout must be from 5 to {most} seconds")));
    }
}

/// How an agent is to ask.
pub(super) fn ask(timeout_secs: Option<i64>, allow_always: bool) -> Ask {
    Ask { timeout: Duration::from_secs(timeout_secs.unwrap_or(300).cast_unsigned()), allow_always }
}

pub(super) fn check_permission_timeout(secs: Option<i64>, permissions: Option<&str>, errors: &mut Vec<FieldError>) {
    if secs.is_some_and(|secs| !(10..=3600).contains(&secs)) {
        errors.push(FieldError::new("/permission_timeout_secs", "the timeout of a question must be from 10 to 3600 seconds"));
    }
    if secs.is_some() && permissions != Some(ASK) {
        errors.push(FieldError::new("/permission_timeout_secs", "nothing is asked; set permissions to ask"));
    }
}

pub(super) fn check_permissions(permissions: Option<&str>, errors: &mut Vec<FieldError>) {
    if permissions.is_some_and(|wanted| !PERMISSIONS.contains(&wanted)) {
        errors.push(FieldError::new("/permissions", "permissions must be approve-all, approve-reads, deny-all or ask"));
    }
}

/// Refuses permissions that an agent does not keep.
pub(super) fn check_kept(agent: &str, kept: &[&str], permissions: &str, errors: &mut Vec<FieldError>) {
    if !kept.contains(&permissions) {
        let detail = format!("that {agent} asks before it acts can't be promised; it can only have {}", kept.join(", "));
        errors.push(FieldError::new("/permissions", detail));
    }
}

/// Refuses an agent that is not one of the server's.
pub(super) fn check_agent(app: &App, agent: &str) -> Result<(), ApiError> {
    if app.agents.iter().any(|known| known == agent) {
        return Ok(());
    }
    Err(ApiError::Invalid(vec![FieldError::new(
        "/agent",
        format!("the agent must be one of {}; the operator names them in CLAWDFORGE_AGENTS", app.agents.join(", ")),
    )]))
}

/// The caller's files behind `tokens`. One that is not the caller's own, or not any more, is a `400` that names it.
pub(super) async fn attachments(app: &App, caller: &Caller, mut tokens: Vec<String>) -> Result<Vec<Attachment>, ApiError> {
    let mut seen = std::collections::HashSet::new();
    tokens.retain(|token| seen.insert(token.clone()));
    let files = app
        .ledger
        .files(&caller.app, tokens)
        .await?
        .map_err(|unknown| ApiError::BadRequest(format!("Upload the file again: \"{unknown}\" is unknown or expired.")))?;
    Ok(files.into_iter().map(|file| Attachment { file_token: file.file_token, name: file.name, size: file.size }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn models_match_the_documented_pattern() {
        for good in ["sonnet", "opus[1m]", "claude-3.5@20240620", "us.anthropic/x:1", "A", &"a".repeat(128)] {
            assert!(is_model(good), "{good}");
        }
        for bad in ["", "-p", "--model", "a b", "[x", ".a", "ü", "a\n", &"a".repeat(129)] {
            assert!(!is_model(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_model_is_never_an_option(model in "[-a-z.\\[\\]/ ]{0,6}") {
            prop_assert!(!is_model(&model) || !model.starts_with('-') && !model.contains(' '));
        }
    }
}
