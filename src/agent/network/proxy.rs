//! The server's side: a forwarding proxy for agents that are bound, each by its rule.

use std::convert::Infallible;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HOST, HeaderName, HeaderValue, PROXY_AUTHORIZATION};
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncReadExt, Interest, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Destination, Door, destination};
use crate::agent::contract::Network;

/// Connections that an agent may have open.
const MOST: usize = 256;
/// Bytes that are kept of each, at most, of what was not sent on yet.
const HEAD: usize = 64 << 10;
/// How long a connection may take to come about.
const CONNECTING: Duration = Duration::from_secs(10);

type Answer = Response<Either<Incoming, Full<Bytes>>>;

/// A proxy that is ready to serve.
pub struct Proxy {
    listener: UnixListener,
    models: Arc<[Destination]>,
}

impl Proxy {
    /// At this socket, in the place of one that an earlier server left. Always lets agents reach these.
    pub fn at(socket: &Path, models: Vec<Destination>) -> io::Result<Self> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Not by its whole path, which may be longer than an address can be.
        let folder = std::fs::File::open(socket.parent().unwrap_or(socket))?;
        let name = socket.file_name().unwrap_or_default().display().to_string();
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))?;
        Ok(Self { listener, models: models.into() })
    }

    /// Serves, for ever.
    pub async fn serve(self) {
        let mut agents = JoinSet::new();
        loop {
            while agents.try_join_next().is_some() {}
            match self.listener.accept().await {
                Ok((agent, _)) => drop(agents.spawn(serve_agent(agent, self.models.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "an agent's way out of its network can't be served");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// For as long as the agent, or something that it started, is there.
async fn serve_agent(mut agent: UnixStream, models: Arc<[Destination]>) {
    let (door, listener) = match agent.async_io(Interest::READABLE, || receive(&agent)).await {
        Ok(received) => received,
        Err(error) => return tracing::warn!(%error, "an agent did not hand its network over"),
    };
    let gone = async {
        let mut nothing = [0; 512];
        while agent.read(&mut nothing).await.is_ok_and(|read| read > 0) {}
    };
    tokio::select! {
        () = gone => {}
        () = accept(listener, door, models) => {}
    }
}

fn receive(agent: &UnixStream) -> io::Result<(Door, TcpListener)> {
    let (mut name, mut space) = ([0; 16], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(agent, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let door = std::str::from_utf8(&name[..received.bytes]).ok().and_then(Door::named);
    let mut listeners = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut listeners) => listeners.next(),
        _ => None,
    });
    let (Some(door), Some::<OwnedFd>(listener)) = (door, listeners.next()) else { return Err(io::ErrorKind::InvalidData.into()) };
    let listener = StdTcpListener::from(listener);
    listener.set_nonblocking(true)?;
    Ok((door, TcpListener::from_std(listener)?))
}

async fn accept(listener: TcpListener, door: Door, models: Arc<[Destination]>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MOST {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((connection, _)) => {
                let models = models.clone();
                match door {
                    Door::Proxy(rule) => connections.spawn(async move {
                        let serve = service_fn(|request| answer(request, rule, models.clone()));
                        let mut http = hyper::server::conn::http1::Builder::new();
                        let served = http.max_buf_size(HEAD).serve_connection(TokioIo::new(connection), serve);
                        let _ = served.with_upgrades().await;
                    }),
                    Door::Here(port) => connections.spawn(async move {
                        let mut connection = connection;
                        if let Ok(mut model) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
                            let _ = copy_bidirectional(&mut connection, &mut model).await;
                        }
                    }),
                };
            }
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn answer(request: Request<Incoming>, rule: Network, models: Arc<[Destination]>) -> Result<Answer, Infallible> {
    let tunnel = request.method() == Method::CONNECT;
    let to = if tunnel || request.uri().scheme_str() == Some("http") { destination(request.uri()) } else { None };
    let Some(to) = to else { return Ok(refusal(StatusCode::BAD_REQUEST, "this is a forwarding proxy; name a host and its port")) };
    let connection = match connect(&to, rule, &models).await {
        Ok(connection) => connection,
        Err(Refused::ByRule) => {
            tracing::debug!(host = to.0, port = to.1, rule = rule.as_str(), "an agent was not let out");
            let why = format!("{}:{} is outside what the app's token lets its agents reach (network: {})", to.0, to.1, rule.as_str());
            return Ok(refusal(StatusCode::FORBIDDEN, &why));
        }
        Err(Refused::Unreachable(error)) => {
            return Ok(refusal(StatusCode::BAD_GATEWAY, &format!("{}:{} can't be reached ({error})", to.0, to.1)));
        }
    };
    if tunnel {
        tokio::spawn(async move {
            if let Ok(upgraded) = hyper::upgrade::on(request).await {
                pass(upgraded, connection).await;
            }
        });
        return Ok(Response::new(Either::Right(Full::default())));
    }
    Ok(forward(request, connection).await.unwrap_or_else(|error| refusal(StatusCode::BAD_GATEWAY, &error.to_string())))
}

async fn pass(agent: Upgraded, mut outside: TcpStream) {
    let _ = copy_bidirectional(&mut TokioIo::new(agent), &mut outside).await;
}

/// Sends a request on as a client does, to where it is meant for.
async fn forward(mut request: Request<Incoming>, to: TcpStream) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(to)).await?;
    tokio::spawn(connection);
    let host = request.uri().authority().map(|authority| HeaderValue::from_str(authority.as_str())).transpose()?;
    for name in [CONNECTION, PROXY_AUTHORIZATION, HeaderName::from_static("proxy-connection")] {
        request.headers_mut().remove(name);
    }
    request.headers_mut().extend(host.map(|host| (HOST, host)));
    *request.uri_mut() = request.uri().path_and_query().map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()));
    Ok(sender.send_request(request).await?.map(Either::Left))
}

fn refusal(status: StatusCode, why: &str) -> Answer {
    let mut answer = Response::new(Either::Right(Full::from(format!("clawdforge: {why}\n"))));
    *answer.status_mut() = status;
    answer
}

enum Refused {
    ByRule,
    Unreachable(io::Error),
}

async fn connect(to: &Destination, rule: Network, models: &[Destination]) -> Result<TcpStream, Refused> {
    let is_model = models.contains(to);
    // A name that is not the model's is not even looked up: that would tell it to others.
    let may_be = is_model || (rule == Network::Web && matches!(to.1, 80 | 443));
    if !may_be {
        return Err(Refused::ByRule);
    }
    let connecting = async {
        let mut last = Refused::ByRule;
        // Looked up once: the address that is checked is the one that is connected to.
        for address in lookup_host((to.0.as_str(), to.1)).await.map_err(Refused::Unreachable)? {
            if !is_model && (!is_public(address.ip()) || is_own(address.ip()).await) {
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = Refused::Unreachable(error),
            }
        }
        Err(last)
    };
    timeout(CONNECTING, connecting).await.unwrap_or(Err(Refused::Unreachable(io::ErrorKind::TimedOut.into())))
}

/// Whether an address is of the open internet: not of this machine, a home, an office, a provider's inside, or of no one.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let is_shared = a == 100 && (64..128).contains(&b);
            let is_for_tests = a == 198 && (18..20).contains(&b);
            let is_special = matches!(a, 0 | 224..) || v4.octets().starts_with(&[192, 0, 0]);
            !(v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_documentation() || is_shared || is_for_tests || is_special)
        }
        // 2000::/3 is what is given out; some of it leads to addresses of the fourth version.
        IpAddr::V6(v6) => {
            let segments = v6.segments();
            let embedded = match segments {
                [0x2002, high, low, ..] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some((high, low)),
                _ => None,
            };
            match embedded {
                Some((high, low)) => is_public(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)).into()),
                None => segments[0] & 0xe000 == 0x2000 && !matches!(segments, [0x2001, 0..0x200 | 0xdb8, ..]),
            }
        }
    }
}

/// Whether an address is this machine's own: then something can be bound to it.
async fn is_own(address: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(address, 0)).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_open_internet_is_public() {
        for address in ["1.1.1.1", "100.63.0.1", "198.17.0.1", "203.0.114.1", "2606:4700::1111", "2001:4860::8888", "64:ff9b::101:101"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.1.1",
            "192.0.0.1",
            "192.0.2.1",
            "198.18.0.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "2002:7f00:1::",
            "2002:c0a8:101::1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
    }
}
