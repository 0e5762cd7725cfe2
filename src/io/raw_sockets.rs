//! Raw sockets that send complete IP packets. They receive nothing.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

use super::sys;
use crate::types::{Error, ErrorKind};

/// A raw socket for each family, registered with a runtime.
#[derive(Debug)]
pub(crate) struct RawSockets {
    v4: AsyncFd<Socket>,
    /// `None` if the system has no IPv6.
    v6: Option<AsyncFd<Socket>>,
}

/// The same, not registered with a runtime.
#[derive(Debug)]
pub(crate) struct Unregistered {
    v4: Socket,
    v6: Option<Socket>,
}

impl Unregistered {
    /// Opens the sockets in the calling thread's network namespace.
    pub(crate) fn open(mark: Option<u32>, interface: Option<&str>) -> Result<Self, Error> {
        let v4 = open(Domain::IPV4, mark, interface)?;
        v4.set_broadcast(true).map_err(|source| Error::os("set SO_BROADCAST", source))?;
        let v6 = match open(Domain::IPV6, mark, interface) {
            Err(error) if error.errno() == Some(Errno::AFNOSUPPORT) => None,
            result => Some(result?),
        };
        Ok(Self { v4, v6 })
    }
}

fn open(domain: Domain, mark: Option<u32>, interface: Option<&str>) -> Result<Socket, Error> {
    // IPPROTO_RAW implies IP_HDRINCL and IPV6_HDRINCL (`inet_create`, `inet6_create`).
    const RAW: i32 = 255;
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::from(RAW)))
        .map_err(|source| Error::os("open a raw socket", source))?;
    if let Some(mark) = mark {
        socket.set_mark(mark).map_err(|source| Error::os("set SO_MARK", source))?;
    }
    if let Some(interface) = interface {
        let bound = socket.bind_device(Some(interface.as_bytes()));
        bound.map_err(|source| Error::os(format!("bind to interface {interface:?}"), source))?;
    }
    Ok(socket)
}

impl RawSockets {
    /// Registers the sockets with the current runtime.
    pub(crate) fn register(unregistered: Unregistered) -> Result<Self, Error> {
        Ok(Self { v4: register(unregistered.v4)?, v6: unregistered.v6.map(register).transpose()? })
    }

    /// Sends a packet. Returns `Ok(false)` if the send buffer is full.
    pub(crate) fn try_send(&self, packet: &[u8], to: IpAddr) -> Result<bool, Error> {
        attempt(self.socket(to)?.get_ref(), packet, to)
    }

    /// Sends a packet. Waits while the send buffer is full.
    pub(crate) async fn send(&self, packet: &[u8], to: IpAddr) -> Result<(), Error> {
        let socket = self.socket(to)?;
        // The runtime finds out only later that a new socket is writable.
        if attempt(socket.get_ref(), packet, to)? {
            return Ok(());
        }
        loop {
            let mut ready = socket.writable().await.map_err(|source| {
                // Tokio has no other errors here.
                Error::os(SEND, source).with_kind(ErrorKind::NoRuntime)
            })?;
            if attempt(socket.get_ref(), packet, to)? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    fn socket(&self, to: IpAddr) -> Result<&AsyncFd<Socket>, Error> {
        match to {
            IpAddr::V4(_) => Ok(&self.v4),
            IpAddr::V6(_) => self
                .v6
                .as_ref()
                .ok_or_else(|| Error::new(ErrorKind::Unsupported, SEND).with_detail("this system has no IPv6")),
        }
    }
}

fn register(socket: Socket) -> Result<AsyncFd<Socket>, Error> {
    const OPERATION: &str = "register a raw socket";
    match sys::register(socket, Interest::WRITABLE) {
        Some(registered) => registered.map_err(|source| Error::os(OPERATION, source)),
        None => Err(Error::new(ErrorKind::NoRuntime, OPERATION)),
    }
}

fn attempt(socket: &Socket, packet: &[u8], to: IpAddr) -> Result<bool, Error> {
    loop {
        match socket.send_to(packet, &SocketAddr::new(to, 0).into()) {
            Ok(_) => return Ok(true),
            Err(source) if source.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(explain(source, to)),
        }
    }
}

fn explain(source: io::Error, to: IpAddr) -> Error {
    let errno = Errno::from_io_error(&source);
    // The capability was checked when the socket was opened.
    let error = Error::os(SEND, source).with_kind(ErrorKind::Other);
    match errno {
        Some(Errno::PERM) => error.with_detail("a rule at the output or postrouting hook dropped it"),
        Some(Errno::MSGSIZE) => error.with_detail("it is longer than the MTU of the interface"),
        // ip6_dst_lookup_tail finds no source address.
        Some(Errno::ADDRNOTAVAIL) if to.is_ipv6() => error.with_kind(ErrorKind::Unsupported).with_detail(
            "this host has no IPv6 address from which to send there; IPv6 may be switched off (disable_ipv6)",
        ),
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH) => error.with_detail(format!("there is no route to {to}")),
        Some(Errno::NOBUFS) => error.with_detail("no memory, or the interface's queue is full"),
        _ => error,
    }
}

pub(crate) const SEND: &str = "send a raw packet";
