//! The operator's token, and claude's sign-in.

use super::flags::Flags;
use super::value::{BadSetting, given};
use crate::agent::environment::Environment;
use crate::secret::TokenHash;

/// The variable that holds the admin token's hash. It also reaches the process that is started again without the plaintext.
pub const ADMIN_TOKEN_SHA256: &str = "CLAWDFORGE_ADMIN_TOKEN_SHA256";
/// The variable that holds the admin token.
pub const ADMIN_TOKEN: &str = "CLAWDFORGE_ADMIN_TOKEN";
/// The flag that does.
pub const ADMIN_TOKEN_FLAG: &str = "--admin-token";

/// The shortest admin token that is taken, in characters.
const ADMIN_TOKEN_MIN: usize = 16;

/// The variables by which claude can be signed in, and those that name a file instead.
const SIGN_INS: [(&str, &str); 2] =
    [("CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN_FILE"), ("ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY_FILE")];

/// What agents get of this process's environment. A sign-in that stands in a file (`ANTHROPIC_API_KEY_FILE`) is read from
/// it.
pub fn agents_environment() -> Result<Environment, BadSetting> {
    with_sign_ins(Environment::inherited())
}

fn with_sign_ins(mut environment: Environment) -> Result<Environment, BadSetting> {
    for (variable, file_variable) in SIGN_INS {
        let Some(file) = environment.take(file_variable) else { continue };
        let Some(file) = given(file.to_str()).map(str::to_owned) else { continue };
        if environment.get(variable).is_some_and(|value| !value.is_empty()) {
            return Err(BadSetting::new(file_variable, format!("and {variable} are both set; set one of them")));
        }
        let secret = in_file(file_variable, &file)?;
        if secret.is_empty() || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadSetting::new(file_variable, format!("names \"{file}\", which does not hold one token and nothing else")));
        }
        environment.set(variable, secret);
    }
    Ok(environment)
}

pub(super) fn admin(flags: &Flags) -> Result<Option<TokenHash>, BadSetting> {
    const FILE: &str = "CLAWDFORGE_ADMIN_TOKEN_FILE";
    let hash = given(flags.admin_token_sha256.as_deref());
    let (variable, token) = match (given(flags.admin_token.as_deref()), given(flags.admin_token_file.as_deref())) {
        (Some(_), Some(_)) => return Err(BadSetting::new(FILE, "and CLAWDFORGE_ADMIN_TOKEN are both set; set one of them")),
        (Some(_), _) | (_, Some(_)) if hash.is_some() => {
            return Err(BadSetting::new(ADMIN_TOKEN_SHA256, "and the token itself are both set; set one of them"));
        }
        (Some(token), None) => (ADMIN_TOKEN, token.to_owned()),
        (None, Some(file)) => (FILE, in_file(FILE, file)?),
        (None, None) => {
            return match hash {
                None => Ok(None),
                Some(hash) => TokenHash::from_hex(hash)
                    .map(Some)
                    .ok_or_else(|| BadSetting::new(ADMIN_TOKEN_SHA256, "is not 64 lower-case hex digits")),
            };
        }
    };
    if token.chars().count() < ADMIN_TOKEN_MIN {
        return Err(BadSetting::new(variable, format!("holds a token shorter than {ADMIN_TOKEN_MIN} characters; choose a longer one")));
    }
    // What can't stand in a header could never be presented.
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(BadSetting::new(variable, "holds a token with spaces or characters beyond ASCII; choose another one"));
    }
    Ok(Some(TokenHash::of(&token)))
}

/// What a file that a variable names holds.
fn in_file(variable: &'static str, file: &str) -> Result<String, BadSetting> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => Err(BadSetting::new(variable, format!("names \"{file}\", which can't be read ({error})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_in_may_stand_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        let read = |content: &str, more: &[(&str, &str)]| {
            std::fs::write(&file, content).unwrap();
            let named = ("ANTHROPIC_API_KEY_FILE", file.to_str().unwrap());
            with_sign_ins(Environment::of(more.iter().copied().chain([named]))).map_err(|error| error.to_string())
        };
        let environment = read("sk-1\n", &[("ANTHROPIC_API_KEY", "")]).unwrap();
        assert_eq!(environment.iter().collect::<Vec<_>>(), [("ANTHROPIC_API_KEY".as_ref(), "sk-1".as_ref())]);
        let both = read("sk-1", &[("ANTHROPIC_API_KEY", "sk-2")]).unwrap_err();
        assert_eq!(both, "ANTHROPIC_API_KEY_FILE and ANTHROPIC_API_KEY are both set; set one of them.");
        for wrong in ["", "two words"] {
            assert!(read(wrong, &[]).unwrap_err().ends_with("which does not hold one token and nothing else."));
        }
    }
}
