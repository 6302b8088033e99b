//! The table `files`: uploads, each with its owner and its end.

use rusqlite::{OptionalExtension, params};

use super::db::Ledger;
use super::error::Error;
use crate::clock;

/// An upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// `ff_…`: what the app names it by, and its name in the uploads folder.
    pub file_token: String,
    /// The name that the client gave, made safe.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

impl Ledger {
    /// Records an upload that is whole on disk.
    pub async fn add_file(&self, app: &str, file: &File, ttl_secs: u32) -> Result<(), Error> {
        let (app, file, now) = (app.to_owned(), file.clone(), clock::now());
        let size = i64::try_from(file.size).unwrap_or(i64::MAX);
        self.write(move |db| {
            db.execute(
                "INSERT INTO files (file_token, app_name, name, size, created_at, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![file.file_token, app, file.name, size, now, now + i64::from(ttl_secs)],
            )
        })
        .await
        .map(drop)
    }

    /// The app's uploads that `tokens` name, in that order, or the first token that names none that is alive.
    pub async fn files(&self, app: &str, tokens: Vec<String>) -> Result<Result<Vec<File>, String>, Error> {
        let (app, now) = (app.to_owned(), clock::now());
        self.read(move |db| {
            let mut statement =
                db.prepare_cached("SELECT name, size FROM files WHERE file_token = ?1 AND app_name = ?2 AND expires_at > ?3")?;
            let mut files = Vec::with_capacity(tokens.len());
            for file_token in tokens {
                let found = statement
                    .query_row(params![file_token, app, now], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.cast_unsigned())))
                    .optional()?;
                match found {
                    Some((name, size)) => files.push(File { file_token, name, size }),
                    None => return Ok(Err(file_token)),
                }
            }
            Ok(Ok(files))
        })
        .await
    }

    /// Forgets the uploads whose time is over, and gives their tokens.
    pub async fn expire_files(&self) -> Result<Vec<String>, Error> {
        let now = clock::now();
        self.write(move |db| {
            db.prepare("DELETE FROM files WHERE expires_at <= ?1 RETURNING file_token")?.query_map([now], |row| row.get(0))?.collect()
        })
        .await
    }

    /// Whether an upload of that token is on record, alive or not.
    pub async fn knows_file(&self, file_token: String) -> Result<bool, Error> {
        self.read(move |db| db.prepare_cached("SELECT 1 FROM files WHERE file_token = ?1")?.exists([file_token])).await
    }
}
