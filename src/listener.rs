//! Connections: who gets one, how many, and for how long.
//!
//! Descriptors are what a server runs out of. Addresses that are not allowed have few places of their own, for the moment that
//! their `403` takes, and one address never has all the places of the others.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use rustix::process::{Resource, getrlimit};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// How long a client may take to send a request's head, and how long a connection may be idle between requests. No round
/// number: a client that asks again after just as long would find its connection closing under it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(23);
/// Bytes of a request's head, and bytes of an answer that wait for a client that does not read.
const MOST_BUFFERED: usize = 64 << 10;
/// How long what was sent to a client may go unread.
const UNREAD_TIMEOUT: Duration = Duration::from_mins(1);
/// Connections at once of addresses that are not allowed. Further ones are closed.
const STRANGERS: usize = 16;
/// How long one of those may take, with its answer.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(3);
/// Descriptors that the server itself needs, and each run or session.
const OWN_DESCRIPTORS: u64 = 64;
const DESCRIPTORS_OF_WORK: u64 = 12;

/// The socket's peer, which every request carries.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// What an address is to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// One that is answered.
    Allowed,
    /// One that speaks for many.
    Proxy,
    /// One that is refused.
    Stranger,
}

/// The places that connections have. Clones share them.
#[derive(Clone, Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    /// What one address may have of them.
    share: usize,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    _counted: Option<Counted>,
}

/// One more of an address, until it is dropped.
#[derive(Debug)]
struct Counted {
    places: Places,
    address: IpAddr,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut by_address = self.places.by_address();
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

impl Places {
    /// As many as are wanted, and the limit of open files lets there be beside so many runs and sessions at once.
    pub fn new(wanted: usize, work: usize) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let others = OWN_DESCRIPTORS + DESCRIPTORS_OF_WORK * work as u64;
        // A connection that follows a run holds the file of its events too.
        let most = usize::try_from(files.saturating_sub(others) / 2).unwrap_or(usize::MAX).max(STRANGERS);
        if most < wanted {
            tracing::warn!(connections = most, "fewer connections than usual: the limit of open files is {files}");
        }
        let all = wanted.min(most);
        Self {
            all: Arc::new(Semaphore::new(all)),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            share: all - all / 8,
            by_address: Arc::default(),
        }
    }

    fn by_address(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection from this address; waits where all are taken. `None` where it has what it may.
    async fn enter(&self, address: IpAddr, standing: Standing) -> Option<Place> {
        let counted = match standing {
            Standing::Stranger => return Some(Place { _permit: self.strangers.clone().try_acquire_owned().ok()?, _counted: None }),
            Standing::Proxy => None,
            Standing::Allowed => Some(self.count(address)?),
        };
        Some(Place { _permit: self.all.clone().acquire_owned().await.ok()?, _counted: counted })
    }

    fn count(&self, address: IpAddr) -> Option<Counted> {
        let mut by_address = self.by_address();
        let count = by_address.entry(address).or_default();
        (*count < self.share).then(|| {
            *count += 1;
            Counted { places: self.clone(), address }
        })
    }
}

/// Takes connections, for ever. Each is served by a task of its own, until `cut`.
pub async fn accept(
    listener: &TcpListener,
    places: &Places,
    standing: impl Fn(IpAddr) -> Standing,
    router: &Router,
    graceful: &GracefulShutdown,
    cut: &CancellationToken,
) -> Infallible {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // The client is gone already, or the process is out of descriptors, which time mends.
                tracing::warn!(%error, "a connection was not accepted");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (peer, standing) = (peer.ip().to_canonical(), standing(peer.ip()));
        let Some(place) = places.enter(peer, standing).await else { continue };
        watch_over(&stream);
        let service = {
            let router = router.clone();
            service_fn(move |mut request: hyper::Request<Incoming>| {
                request.extensions_mut().insert(Peer(peer));
                let answer = router.clone().oneshot(request.map(Body::new));
                async { answer.await as Result<Response, Infallible> }
            })
        };
        let stranger = standing == Standing::Stranger;
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).max_buf_size(MOST_BUFFERED).keep_alive(!stranger);
        http.header_read_timeout(if stranger { STRANGER_TIMEOUT } else { HEADER_TIMEOUT });
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        let cut = cut.clone();
        tokio::spawn(async move {
            // A connection that breaks is the client's affair.
            if stranger {
                let _ = timeout(STRANGER_TIMEOUT, cut.run_until_cancelled(connection)).await;
            } else {
                let _ = cut.run_until_cancelled(connection).await;
            }
            drop(place);
        });
    }
}

/// A client that vanished without a word, or reads nothing of its answer, loses its connection, and so its run.
fn watch_over(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10)).with_retries(3);
    let set = stream
        .set_nodelay(true)
        .and_then(|()| socket.set_tcp_keepalive(&probes))
        .and_then(|()| socket.set_tcp_user_timeout(Some(UNREAD_TIMEOUT)));
    if let Err(error) = set {
        tracing::debug!(%error, "a socket's options were not set");
    }
}
