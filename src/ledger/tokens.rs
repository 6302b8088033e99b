//! The table `tokens`: who may call, by the SHA-256 of a bearer token.

use std::collections::HashMap;

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{Error, Ledger};
use crate::clock;
use crate::network::Networks;
use crate::secret::TokenHash;

/// The app behind a token that is in force.
#[derive(Clone, Debug)]
pub struct App {
    /// The token's name: what an app's records are filed under.
    pub name: String,
    /// Where the token may be used from; none means anywhere that the server answers.
    pub networks: Networks,
}

/// A row, as the operator sees it.
#[derive(Clone, Debug)]
pub struct TokenRow {
    /// Unique among the tokens in force.
    pub name: String,
    /// Comma-joined networks.
    pub ip_cidrs: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds of the last request that it authenticated.
    pub last_used: Option<i64>,
    /// False once it is revoked.
    pub enabled: bool,
}

/// A token in force already has that name.
#[derive(Debug, thiserror::Error)]
#[error("a token named \"{0}\" is in use; revoke it first, or choose another name")]
pub struct NameTaken(pub String);

impl Ledger {
    /// Records a new token, in the place of a revoked one of that name. Gives the time of its creation.
    pub async fn create_token(&self, name: &str, hash: &TokenHash, networks: &Networks) -> Result<Result<i64, NameTaken>, Error> {
        let (name, hash, networks, now) = (name.to_owned(), hash.clone(), networks.to_string(), clock::now());
        self.write(move |db| {
            let inserted = db.execute(
                "INSERT INTO tokens (name, token_sha256, ip_cidrs, created_at) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (name) DO UPDATE SET token_sha256 = excluded.token_sha256, ip_cidrs = excluded.ip_cidrs,
                     created_at = excluded.created_at, last_used = NULL, enabled = 1
                 WHERE enabled = 0",
                params![name, hash.as_str(), networks, now],
            )?;
            Ok(if inserted == 1 { Ok(now) } else { Err(NameTaken(name)) })
        })
        .await
    }

    /// Every token, revoked ones included, by name.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, Error> {
        self.flush_used().await?;
        self.read(|db| {
            db.prepare("SELECT name, ip_cidrs, created_at, last_used, enabled FROM tokens ORDER BY name")?.query_map([], row)?.collect()
        })
        .await
    }

    /// Takes a token out of force at once. False where no token ever had that name.
    pub async fn revoke_token(&self, name: &str) -> Result<bool, Error> {
        let name = name.to_owned();
        self.write(move |db| Ok(db.execute("UPDATE tokens SET enabled = 0 WHERE name = ?1", [name])? == 1)).await
    }

    /// The app whose token has this hash, if it is in force.
    pub async fn app(&self, hash: &TokenHash) -> Result<Option<App>, Error> {
        let hash = hash.clone();
        let found = self
            .read(move |db| {
                db.prepare_cached("SELECT name, ip_cidrs FROM tokens WHERE token_sha256 = ?1 AND enabled = 1")?
                    .query_row([hash.as_str()], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)))
                    .optional()
            })
            .await?;
        // Networks in the ledger were checked when they were written. If someone edited them into nonsense, refuse:
        // an empty list would mean anywhere.
        Ok(found.and_then(|(name, networks)| Some(App { name, networks: networks.parse().ok()? })))
    }

    /// Notes that a token was used now. The next write takes the note along: by itself it is worth none.
    pub fn touch_token(&self, name: &str) {
        self.used().insert(name.to_owned(), clock::now());
    }

    /// Writes the notes of when tokens were used.
    pub async fn flush_used(&self) -> Result<(), Error> {
        if self.used().is_empty() { Ok(()) } else { self.write(|_| Ok(())).await }
    }
}

pub(super) fn note_used(db: &Transaction<'_>, used: &HashMap<String, i64>) -> rusqlite::Result<()> {
    let mut statement = db.prepare_cached("UPDATE tokens SET last_used = ?2 WHERE name = ?1")?;
    used.iter().try_for_each(|(name, at)| statement.execute(params![name, at]).map(drop))
}

fn row(row: &Row<'_>) -> rusqlite::Result<TokenRow> {
    Ok(TokenRow { name: row.get(0)?, ip_cidrs: row.get(1)?, created_at: row.get(2)?, last_used: row.get(3)?, enabled: row.get(4)? })
}
