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
    /// Who is told of ends in the background, where a request names nobody.
    pub webhook: Option<String>,
    /// Whether it has a secret that webhooks are signed with.
    pub signs: bool,
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
    /// Unix seconds until which the token that it replaced is good, too, where there is one.
    pub old_until: Option<i64>,
    /// Who is told of ends in the background.
    pub webhook: Option<String>,
}

/// What is to be changed of a token; `None` leaves it.
#[derive(Clone, Debug, Default)]
pub struct TokenChange {
    /// Where it may be used from.
    pub networks: Option<Networks>,
    /// Runs and turns at once.
    pub max_concurrent: Option<Option<u32>>,
    /// US dollars a day in UTC.
    pub daily_usd: Option<Option<f64>>,
    /// What its app's agents reach of the network.
    pub network: Option<Network>,
    /// What lasts from one run to the next: one of [`Rules::HOMES`].
    pub home: Option<&'static str>,
    /// Who is told of ends in the background.
    pub webhook: Option<Option<String>>,
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
                     network = excluded.network, home = excluded.home, last_used = NULL, enabled = 1,
                     old_sha256 = NULL, old_until = NULL, webhook = NULL, webhook_secret = NULL, old_webhook_secret = NULL,
                     old_webhook_secret_until = NULL
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
        self.read(|db| db.prepare(&format!("SELECT {COLUMNS} FROM tokens ORDER BY name"))?.query_map(params![clock::now()], row)?.collect())
            .await
    }

    /// The token of that name, if it is in force.
    pub async fn token(&self, name: &str) -> Result<Option<TokenRow>, Error> {
        let name = name.to_owned();
        self.read(move |db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM tokens WHERE name = ?2 AND enabled = 1"))?
                .query_row(params![clock::now(), name], row)
                .optional()
        })
        .await
    }

    /// Changes a token that is in force, from the next request that it comes with. False where there is none of that name.
    pub async fn change_token(&self, name: &str, change: TokenChange) -> Result<bool, Error> {
        let name = name.to_owned();
        self.write(move |db| {
            let TokenChange { networks, max_concurrent, daily_usd, network, home, webhook } = &change;
            let changed = db.execute(
                "UPDATE tokens SET ip_cidrs = coalesce(?2, ip_cidrs), max_concurrent = iif(?3, ?4, max_concurrent),
                     daily_usd = iif(?5, ?6, daily_usd), network = coalesce(?7, network), home = coalesce(?8, home),
                     webhook = iif(?9, ?10, webhook)
                 WHERE name = ?1 AND enabled = 1",
                params![
                    name,
                    networks.as_ref().map(ToString::to_string),
                    max_concurrent.is_some(),
                    max_concurrent.flatten(),
                    daily_usd.is_some(),
                    daily_usd.flatten(),
                    network.map(Network::as_str),
                    home,
                    webhook.is_some(),
                    webhook.as_ref().and_then(Option::as_ref),
                ],
            )?;
            Ok(changed == 1)
        })
        .await
    }

    /// Has a new token stand for that of this name, which is good until `old_until`, too, in Unix seconds; whatever it replaced before is good
    /// no more. False where none of that name is in force.
    pub async fn rotate_token(&self, name: &str, hash: &TokenHash, old_until: i64) -> Result<bool, Error> {
        let (name, hash) = (name.to_owned(), hash.clone());
        self.write(move |db| {
            let rotated = db.execute(
                "UPDATE tokens SET old_sha256 = token_sha256, old_until = ?3, token_sha256 = ?2 WHERE name = ?1 AND enabled = 1",
                params![name, hash.as_str(), old_until],
            )?;
            Ok(rotated == 1)
        })
        .await
    }

    /// Gives an app a secret that its webhooks are signed with, beside the one that it has until `old_until`, in Unix seconds; or only, where
    /// `replace` is false, if it has none. False where it did not, or no token of that name is in force.
    pub async fn give_webhook_secret(&self, name: &str, secret: &str, old_until: i64, replace: bool) -> Result<bool, Error> {
        let (name, secret) = (name.to_owned(), secret.to_owned());
        self.write(move |db| {
            let given = db.execute(
                "UPDATE tokens SET old_webhook_secret = webhook_secret, old_webhook_secret_until = ?3, webhook_secret = ?2
                 WHERE name = ?1 AND enabled = 1 AND (?4 OR webhook_secret IS NULL)",
                params![name, secret, old_until, replace],
            )?;
            Ok(given == 1)
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
                    "SELECT name, ip_cidrs, max_concurrent, daily_usd, network, home, webhook, webhook_secret IS NOT NULL FROM tokens
                     WHERE enabled = 1 AND (token_sha256 = ?1 OR (old_sha256 = ?1 AND old_until > ?2))",
                )?
                .query_row(params![hash.as_str(), clock::now()], |row| {
                    let (networks, limits, rules) = (row.get::<_, String>(1)?, limits(row, 2)?, rules(row, 4)?);
                    let (name, webhook, signs) = (row.get(0)?, row.get(6)?, row.get(7)?);
                    Ok((networks, App { name, networks: Networks::default(), limits, rules, webhook, signs }))
                })
                .optional()
            })
            .await?;
        // Networks in the ledger were checked when they were written. If someone edited them into nonsense, refuse:
        // an empty list would mean anywhere.
        Ok(found.and_then(|(networks, app)| Some(App { networks: networks.parse().ok()?, ..app })))
    }

    /// Who is told of what an app has in the background, if somebody is.
    pub async fn webhook_of(&self, app: &str) -> Result<Option<String>, Error> {
        let app = app.to_owned();
        self.read(move |db| {
            let found = db.prepare_cached("SELECT webhook FROM tokens WHERE name = ?1 AND enabled = 1")?.query_row([app], |row| row.get(0));
            Ok(found.optional()?.flatten())
        })
        .await
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

/// The first parameter is now, in Unix seconds.
const COLUMNS: &str = "name, ip_cidrs, created_at, last_used, enabled, max_concurrent, daily_usd, network, home,
    iif(old_until > ?1, old_until, NULL), webhook";

fn row(row: &Row<'_>) -> rusqlite::Result<TokenRow> {
    Ok(TokenRow {
        name: row.get(0)?,
        ip_cidrs: row.get(1)?,
        created_at: row.get(2)?,
        last_used: row.get(3)?,
        enabled: row.get(4)?,
        limits: limits(row, 5)?,
        rules: rules(row, 7)?,
        old_until: row.get(9)?,
        webhook: row.get(10)?,
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
