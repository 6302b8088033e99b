//! Bearer tokens and the ids that must not be guessed.
//!
//! A token's plaintext lives only in the request that carries it and in the answer that mints it; everything else
//! keeps its SHA-256. The hash is of a random 256-bit value, so it needs no salt and no slow function.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest, Sha256};

/// The SHA-256 of a bearer token, in lower-case hex. `Debug` prints nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenHash(String);

impl TokenHash {
    /// The hash of a token's plaintext.
    pub fn of(plaintext: &str) -> Self {
        Self(sha256_hex(plaintext.as_bytes()))
    }

    /// Takes a hash that [`TokenHash::as_str`] gave; `None` if it is not 64 hex digits.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| Self(hex.to_owned()))
    }

    /// The 64 hex digits, for the ledger.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenHash")
    }
}

/// A new app token's plaintext: `cf_` and 64 hex digits.
pub fn app_token() -> String {
    format!("cf_{}", random())
}

/// What [`is_token_name`] asks for, in words.
pub const TOKEN_NAME_RULE: &str = "the name must match ^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$";

/// Whether `name` may name a token: 1 to 64 characters that need no quoting in a path, a shell or a log.
pub fn is_token_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._@-".contains(&byte);
    name.len() <= 64 && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && name.bytes().all(allowed)
}

/// A new upload's token: `ff_` and 32 hex digits.
pub fn file_token() -> String {
    format!("ff_{}", random_hex::<16>())
}

/// A new secret to sign webhooks with, as Standard Webhooks has it: `whsec_` and 32 bytes in base64.
pub fn webhook_secret() -> String {
    format!("whsec_{}", BASE64.encode(random_bytes::<32>()))
}

/// What nobody guesses: 64 hex digits.
pub fn random() -> String {
    random_hex::<32>()
}

/// # Panics
/// Where the kernel gives no random bytes, which is beyond repair.
fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

fn random_hex<const N: usize>() -> String {
    hex(&random_bytes::<N>())
}

/// The SHA-256 of some bytes, in lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_sha256_and_debug_hides_it() {
        let hash = TokenHash::of("abc");
        assert_eq!(hash.as_str(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(format!("{hash:?}"), "TokenHash");
        assert_eq!(TokenHash::from_hex(hash.as_str()), Some(hash));
        assert_eq!(TokenHash::from_hex("abc"), None);
    }
}
