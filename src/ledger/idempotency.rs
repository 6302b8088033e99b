//! The table `idempotency`: which key of which app led to which work.

use rusqlite::{Connection, OptionalExtension, params};

use super::db::Ledger;
use super::error::Error;
use crate::clock;

/// A key that an app gave a request, so that it can be sent again.
#[derive(Clone, Debug)]
pub struct Key {
    /// The caller's token name.
    pub app_name: String,
    /// As it was sent.
    pub key: String,
    /// The SHA-256 of what was asked for.
    pub fingerprint: String,
}

/// What a key stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// The SHA-256 of what was asked for.
    pub fingerprint: String,
    /// A run's id, a session's, or a session's with the number of its turn.
    pub id: String,
}

impl Ledger {
    /// What a key of an app stands for, if it was used.
    pub async fn claimed(&self, key: &Key) -> Result<Option<Claimed>, Error> {
        let key = key.clone();
        self.read(move |db| {
            db.prepare_cached("SELECT fingerprint, id FROM idempotency WHERE app_name = ?1 AND key = ?2")?
                .query_row([key.app_name, key.key], |row| Ok(Claimed { fingerprint: row.get(0)?, id: row.get(1)? }))
                .optional()
        })
        .await
    }

    /// Forgets the keys that were used more than `secs` seconds ago.
    pub async fn forget_keys(&self, secs: u64) -> Result<usize, Error> {
        let before = clock::now() - i64::try_from(secs).unwrap_or(i64::MAX);
        self.write(move |db| db.execute("DELETE FROM idempotency WHERE created_at < ?1", [before])).await
    }
}

/// Takes a key for some work. False where it was taken before.
pub(super) fn claim(db: &Connection, key: &Key, id: &str) -> rusqlite::Result<bool> {
    let taken = db
        .prepare_cached(
            "INSERT INTO idempotency (app_name, key, fingerprint, id, created_at) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
        )?
        .execute(params![key.app_name, key.key, key.fingerprint, id, clock::now()])?;
    Ok(taken == 1)
}
