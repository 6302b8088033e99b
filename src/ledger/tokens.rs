//! The table `tokens`: who may call, by the SHA-256 of a bearer token.

use rusqlite::{OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::db::Ledger;
use super::error::Error;
use crate::agent::contract::{Network, Rules};
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
    /// What it may cost the others.
    pub limits: Limits,
    /// What binds its agents.
    pub rules: Rules,
}

/// What an app may cost the others; `None` for no limit of its own.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Limits {
    /// Runs and turns at once.
    pub max_concurrent: Option<u32>,
    /// US dollars a day in UTC, as the CLIs report them.
    pub daily_usd: Option<f64>,
}

impl Limits {
    /// Runs and turns at once.
    pub fn at_once(self) -> Option<usize> {
        self.max_concurrent.map(|most| usize::try_from(most).unwrap_or(usize::MAX))
    }
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
    /// What its app may cost the others.
    pub limits: Limits,
    /// What binds its app's agents.
    pub rules: Rules,
}

/// A token in force already has that name.
#[derive(Debug, thiserror::Error)]
#[error("a token named \"{0}\" is in use; revoke it first, or choose another name")]
pub struct NameTaken(pub String);

impl Ledger {
    /// Records a new token, in the place of a revoked one of that name. Gives the time of its creation.
    pub async fn create_token(
        &self,
        name: &str,
        hash: &TokenHash,
        networks: &Networks,
        limits: Limits,
        rules: &Rules,
    ) -> Result<Result<i64, NameTaken>, Error> {
        let (network, home) = (rules.network.as_str(), rules.home());
        let (name, hash, networks, now) = (name.to_owned(), hash.clone(), networks.to_string(), clock::now());
        self.write(move |db| {
            let inserted = db.execute(
                "INSERT INTO tokens (name, token_sha256, ip_cidrs, created_at, max_concurrent, daily_usd, network, home)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                 ON CONFLICT (name) DO UPDATE SET token_sha256 = excluded.token_sha256, ip_cidrs = excluded.ip_cidrs,
                     created_at = excluded.created_at, max_concurrent = excluded.max_concurrent, daily_usd = excluded.daily_usd,
                     network = excluded.network, home = excluded.home, last_used = NULL, enabled = 1
                 WHERE enabled = 0",
                params![name, hash.as_str(), networks, now, limits.max_concurrent, limits.daily_usd, network, home],
            )?;
            Ok(if inserted == 1 { Ok(now) } else { Err(NameTaken(name.clone())) })
        })
        .await
    }

    /// Every token, revoked ones included, by name.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, Error> {
        self.flush_used().await?;
        self.read(|db| {
            db.prepare(
                "SELECT name, ip_cidrs, created_at, last_used, enabled, max_concurrent, daily_usd, network, home FROM tokens ORDER BY name",
            )?
            .query_map([], row)?
            .collect()
        })
        .await
    }

    /// Takes a token out of force at once. False where no token ever had that name.
    pub async fn revoke_token(&self, name: &str) -> Result<bool, Error> {
        let name = name.to_owned();
        self.write(move |db| Ok(db.execute("UPDATE tokens SET enabled = 0 WHERE name = ?1", [&name])? == 1)).await
    }

    /// The app whose token has this hash, if it is in force.
    pub async fn app(&self, hash: &TokenHash) -> Result<Option<App>, Error> {
        let hash = hash.clone();
        let found = self
            .read(move |db| {
                db.prepare_cached(
                    "SELECT name, ip_cidrs, max_concurrent, daily_usd, network, home FROM tokens WHERE token_sha256 = ?1 AND enabled = 1",
                )?
                .query_row([hash.as_str()], |row| Ok((row.get(0)?, row.get::<_, String>(1)?, limits(row, 2)?, rules(row, 4)?)))
                .optional()
            })
            .await?;
        // Networks in the ledger were checked when they were written. If someone edited them into nonsense, refuse:
        // an empty list would mean anywhere.
        Ok(found.and_then(|(name, networks, limits, rules)| Some(App { name, networks: networks.parse().ok()?, limits, rules })))
    }

    /// What an app's runs and turns have cost since `since`, in US dollars, as far as they have ended.
    pub async fn spent(&self, app: &str, since: i64) -> Result<f64, Error> {
        let app = app.to_owned();
        self.read(move |db| {
            db.prepare_cached(
                "SELECT (SELECT total(cost_usd) FROM runs WHERE app_name = ?1 AND started_at >= ?2)
                      + (SELECT total(cost_usd) FROM session_events WHERE app_name = ?1 AND started_at >= ?2)",
            )?
            .query_row(params![app, since], |row| row.get(0))
        })
        .await
    }

    /// Notes that a token was used now. The next write takes the note along: by itself it is worth none.
    pub fn touch_token(&self, name: &str) {
        self.used.touch(name);
    }

    /// Writes the notes of when tokens were used.
    pub async fn flush_used(&self) -> Result<(), Error> {
        if self.used.is_empty() { Ok(()) } else { self.write(|_| Ok(())).await }
    }
}

fn row(row: &Row<'_>) -> rusqlite::Result<TokenRow> {
    Ok(TokenRow {
        name: row.get(0)?,
        ip_cidrs: row.get(1)?,
        created_at: row.get(2)?,
        last_used: row.get(3)?,
        enabled: row.get(4)?,
        limits: limits(row, 5)?,
        rules: rules(row, 7)?,
    })
}

/// A network that is none of the known ones is the smallest.
fn rules(row: &Row<'_>, at: usize) -> rusqlite::Result<Rules> {
    let network = Network::named(&row.get::<_, String>(at)?).unwrap_or(Network::Model);
    Ok(Rules::new(network, &row.get::<_, String>(at + 1)?, &row.get::<_, String>("name")?))
}

fn limits(row: &Row<'_>, at: usize) -> rusqlite::Result<Limits> {
    Ok(Limits { max_concurrent: row.get(at)?, daily_usd: row.get(at + 1)? })
}
