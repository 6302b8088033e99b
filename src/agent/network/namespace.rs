//! The agent's side: a process becomes one in a network namespace of its own.

use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{getegid, geteuid};
use socket2::{Domain, Protocol, Socket, Type};

use super::Door;

/// From the kernel's `netlink.h`, `rtnetlink.h` and `if.h`.
const NETLINK_ROUTE: i32 = 0;
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const IFF_UP: u32 = 1;
/// The loopback is the first interface of each namespace.
const LOOPBACK: i32 = 1;

/// Puts this process, and all that it will start, into a network namespace in which there is a loopback and nothing else. It must have no
/// threads.
pub fn enter() -> io::Result<()> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    // It stays who it is, and nobody else is there.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    raise_loopback()
}

/// By a message that sets one flag: `nlmsghdr`, and `ifinfomsg` behind it.
fn raise_loopback() -> io::Result<()> {
    let mut socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_ROUTE)))?;
    let message = [
        &32_u32.to_ne_bytes()[..],
        &RTM_NEWLINK.to_ne_bytes(),
        &NLM_F_REQUEST_ACK.to_ne_bytes(),
        &[0; 8],
        &[0; 4],
        &LOOPBACK.to_ne_bytes(),
        &IFF_UP.to_ne_bytes(),
        &IFF_UP.to_ne_bytes(),
    ];
    socket.send(&message.concat())?;
    let mut answer = [0; 64];
    let length = socket.read(&mut answer)?;
    // Behind the header an error, negative, or 0.
    match answer.get(16..20).filter(|_| length >= 20).and_then(|error| error.try_into().ok()).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(ErrorKind::InvalidData.into()),
    }
}

/// Listens there, and hands that to the server at this socket, with what it is for. Gives the port. The server serves it for as long as this
/// process, or one that it becomes or starts, has the connection to that open.
pub fn hand_over(door: Door, socket: &Path) -> io::Result<u16> {
    let wanted = if let Door::Here(port) = door { port } else { 0 };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, wanted))?;
    let port = listener.local_addr()?.port();
    // Not by its whole path, which may be longer than an address can be.
    let folder = File::open(socket.parent().unwrap_or(socket))?;
    let name = socket.file_name().unwrap_or_default().display().to_string();
    let server = UnixStream::connect(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let listeners = [listener.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&listeners));
    sendmsg(&server, &[IoSlice::new(door.name().as_bytes())], &mut control, SendFlags::empty())?;
    fcntl_setfd(&server, FdFlags::empty())?;
    let _ = server.into_raw_fd();
    Ok(port)
}
