//! Work that would hold up the runtime's threads.

use std::io;

use tokio::runtime::{Handle, RuntimeFlavor};

/// Bytes from which on reading, writing or hashing them holds others up.
const LARGE: usize = 64 << 10;

/// Does work that waits for the disk on a thread for such.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|died| Err(io::Error::other(died)))
}

/// Does work on so many bytes here. Where they are many, this thread's other tasks go on elsewhere meanwhile.
pub fn aside<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let elsewhere = || Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    if bytes >= LARGE && elsewhere() { tokio::task::block_in_place(work) } else { work() }
}
