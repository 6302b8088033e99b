//! Uploads on their way to other machines: each is put into a bucket once, and taken from there once by each machine that needs it. What is
//! not in the bucket any more is no machine's either.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::object_store::{InfoErrorKind, ObjectStore};
use futures_util::TryStreamExt;
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use uuid::Uuid;

use super::hub::Hub;
use super::wire::FILES;
use crate::agent::contract::Attachment;
use crate::ledger::{self, Ledger};

/// How old a machine's copy must be before it can count as left over.
const SETTLED_AFTER: Duration = Duration::from_mins(1);

/// What an upload is called in the bucket.
fn object(gateway: &str, file_token: &str) -> String {
    format!("{gateway}-{file_token}")
}

/// What a request is called in the bucket that is too large for a message.
pub(super) fn request(gateway: &str, job: &str) -> String {
    format!("{gateway}-request-{job}")
}

async fn bucket(hub: &Hub) -> io::Result<ObjectStore> {
    hub.jetstream.get_object_store(FILES).await.map_err(io::Error::other)
}

/// Puts what a job needs into the bucket, if it is not there. What has expired meanwhile is left out.
pub(super) async fn put(hub: &Hub, gateway: &str, uploads: &Path, files: &[Attachment]) -> io::Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let bucket = bucket(hub).await?;
    for Attachment { file_token, .. } in files {
        let name = object(gateway, file_token);
        match File::open(uploads.join(file_token)).await {
            Ok(_) if has(&bucket, &name).await? => {}
            Ok(mut file) => drop(bucket.put(name.as_str(), &mut file).await.map_err(io::Error::other)?),
            // Nor is it any machine's any more.
            Err(error) if error.kind() == ErrorKind::NotFound => drop(bucket.delete(&name).await),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn has(bucket: &ObjectStore, name: &str) -> io::Result<bool> {
    match bucket.info(name).await {
        Ok(object) => Ok(!object.deleted),
        Err(error) if error.kind() == InfoErrorKind::NotFound => Ok(false),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Puts a request into the bucket.
pub(super) async fn put_request(hub: &Hub, name: &str, request: &str) -> io::Result<()> {
    bucket(hub).await?.put(name, &mut request.as_bytes()).await.map(drop).map_err(io::Error::other)
}

/// Takes a request from the bucket.
pub(super) async fn request_of(hub: &Hub, name: &str) -> io::Result<String> {
    let mut request = String::new();
    get(&bucket(hub).await?, name).await?.read_to_string(&mut request).await?;
    Ok(request)
}

async fn get(bucket: &ObjectStore, name: &str) -> io::Result<impl tokio::io::AsyncRead + Unpin + use<>> {
    bucket.get(name).await.map_err(io::Error::other)
}

/// Takes what a job needs from the bucket, as far as it is not in `folder` yet. What is over is left out, and removed.
pub(super) async fn fetch(hub: &Hub, gateway: &str, folder: &Path, files: &[Attachment]) -> io::Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let bucket = bucket(hub).await?;
    for Attachment { file_token, .. } in files {
        let (name, whole) = (object(gateway, file_token), folder.join(file_token));
        match (has(&bucket, &name).await?, whole.exists()) {
            (true, true) => {}
            (true, false) => copy(&bucket, &name, &whole).await?,
            (false, _) => drop(tokio::fs::remove_file(&whole).await),
        }
    }
    Ok(())
}

async fn copy(bucket: &ObjectStore, name: &str, whole: &Path) -> io::Result<()> {
    let part = whole.with_extension(format!("{}.partial", Uuid::now_v7().simple()));
    let copied = async {
        tokio::io::copy(&mut get(bucket, name).await?, &mut File::create(&part).await?).await?;
        tokio::fs::rename(&part, whole).await
    };
    let copied = copied.await;
    if copied.is_err() {
        let _ = tokio::fs::remove_file(&part).await;
    }
    copied
}

/// The names in the bucket.
async fn names(hub: &Hub) -> io::Result<HashSet<String>> {
    let objects: Vec<_> = bucket(hub).await?.list().await.map_err(io::Error::other)?.try_collect().await.map_err(io::Error::other)?;
    Ok(objects.into_iter().map(|object| object.name).collect())
}

/// Takes out of the bucket what has no row in the ledger any more. `is_open` says of which jobs the requests are still needed.
pub(super) async fn sweep_bucket(hub: &Hub, gateway: &str, ledger: &Ledger, is_open: impl Fn(&str) -> bool) -> io::Result<usize> {
    let (own, request) = (format!("{gateway}-"), request(gateway, ""));
    let mut swept = 0;
    for name in names(hub).await? {
        let Some(file_token) = name.strip_prefix(&own) else { continue };
        let is_needed = match name.strip_prefix(&request) {
            Some(job) => is_open(job),
            None => ledger.knows_file(file_token.to_owned()).await.map_err(|error: ledger::Error| io::Error::other(error))?,
        };
        if !is_needed {
            bucket(hub).await?.delete(&name).await.map_err(io::Error::other)?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// Removes what is in `folder` and not in the bucket any more.
pub(super) async fn sweep_folder(hub: &Hub, folder: &Path) -> io::Result<usize> {
    // First, so that nothing is taken for left over that comes meanwhile.
    let mut entries = tokio::fs::read_dir(folder).await?;
    let (mut old, mut swept) = (Vec::new(), 0);
    while let Some(entry) = entries.next_entry().await? {
        let age = SystemTime::now().duration_since(entry.metadata().await?.modified()?).unwrap_or_default();
        if age > SETTLED_AFTER {
            old.push(entry);
        }
    }
    if old.is_empty() {
        return Ok(0);
    }
    let kept = names(hub).await?;
    for entry in old {
        let file_token = entry.file_name().to_string_lossy().into_owned();
        if !kept.iter().any(|name| name.ends_with(&file_token)) {
            tokio::fs::remove_file(entry.path()).await?;
            swept += 1;
        }
    }
    Ok(swept)
}
