//! The netlink socket in Tokio's reactor: readiness, receiving into pooled memory, sending. Knows no meaning of bytes.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use netlink_sys::{Socket as Netlink, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::{
    io::Errno,
    net::{SendFlags, sockopt},
};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use crate::{Error, ErrorKind, keeper::Timer, sys};

mod memory;

pub(crate) use memory::Memory;

/// A netlink socket of the netfilter family, non-blocking, registered with the current runtime.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: AsyncFd<Netlink>,
    port_id: u32,
    receive_buffer: AtomicUsize,
    /// The longest datagram the kernel takes in one send.
    max_send: usize,
}

/// What a receive brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// A datagram is in the buffer; only its beginning, if it was longer than the buffer.
    Datagram,
    /// Nothing is there now.
    Empty,
    /// The socket's buffer had overflowed.
    Overrun,
}

/// A netlink socket that no runtime knows yet.
#[derive(Debug)]
pub(crate) struct Unregistered {
    socket: Netlink,
    port_id: u32,
    receive_buffer: usize,
    max_send: usize,
}

impl Unregistered {
    /// Opens a socket in the calling thread's network namespace. `receive_buffer` is in bytes, as the kernel charges them.
    pub(crate) fn open(receive_buffer: usize) -> Result<Self, Error> {
        let os = |operation: &'static str| move |source| Error::os(operation, source);
        let socket = Netlink::new(NETLINK_NETFILTER).map_err(os("open netlink socket"))?;
        socket.set_non_blocking(true).map_err(os("open netlink socket"))?;
        // Connected, it takes messages from the kernel alone (netlink_getsockbyportid). It gets its address in the same
        // call, so nobody can have sent it any before.
        socket.connect(&SocketAddr::new(0, 0)).map_err(os("connect netlink socket"))?;
        let mut address = SocketAddr::new(0, 0);
        socket.get_address(&mut address).map_err(os("read the address of the netlink socket"))?;
        let port_id = address.port_number();
        // Without it one overflow stops all receiving until the buffer has been read empty (netlink_overrun).
        socket.set_no_enobufs(true).map_err(os("set NETLINK_NO_ENOBUFS"))?;
        // The kernel's own words beside an errno, where it has any; not there before 4.12, and not needed.
        let _ = socket.set_ext_ack(true);
        let receive_buffer = set_receive_buffer(&socket, receive_buffer)?;
        let send_buffer =
            sockopt::socket_send_buffer_size(&socket).map_err(|e| Error::os("read SO_SNDBUF", e.into()))?;
        // netlink_sendmsg: a message longer than sk_sndbuf - 32 is EMSGSIZE.
        Ok(Self { socket, port_id, receive_buffer, max_send: send_buffer.saturating_sub(32) })
    }
}

/// Port ids of this process's queues, in whichever network namespaces.
static OWN_PORTS: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Notes the port id of a queue of this process.
pub(crate) fn own_port(port: u32) {
    OWN_PORTS.lock().unwrap_or_else(PoisonError::into_inner).push(port);
}

/// The queue's socket is about to be closed.
pub(crate) fn forget_port(port: u32) {
    let mut ports = OWN_PORTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(at) = ports.iter().position(|other| *other == port) {
        ports.swap_remove(at);
    }
}

/// Whether a queue of this process has this port id.
pub(crate) fn is_own_port(port: u32) -> bool {
    OWN_PORTS.lock().unwrap_or_else(PoisonError::into_inner).contains(&port)
}

/// Sets the receive buffer, past `net.core.rmem_max` where that is allowed; tells what came of it.
fn set_receive_buffer(socket: &Netlink, bytes: usize) -> Result<usize, Error> {
    // The kernel doubles what it is told, for its bookkeeping; the charge counts against the doubled value.
    let half = (bytes / 2).min(i32::MAX as usize / 2);
    if sockopt::set_socket_recv_buffer_size_force(socket, half).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, half).map_err(|e| Error::os("set SO_RCVBUF", e.into()))?;
    }
    sockopt::socket_recv_buffer_size(socket).map_err(|e| Error::os("read SO_RCVBUF", e.into()))
}

impl Socket {
    /// Registers a socket with the current runtime.
    pub(crate) fn register(unregistered: Unregistered) -> Result<Self, Error> {
        let Unregistered { socket, port_id, receive_buffer, max_send } = unregistered;
        let fd = match sys::register(socket) {
            Some(registered) => registered.map_err(|source| Error::os("register netlink socket", source))?,
            None => return Err(Error::new(ErrorKind::NoRuntime, "register netlink socket")),
        };
        Ok(Self { fd, port_id, receive_buffer: receive_buffer.into(), max_send })
    }

    /// By which the kernel knows the socket.
    pub(crate) fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Sees to it that the receive buffer is so large at least, in bytes as the kernel charges them, if the system lets it.
    pub(crate) fn grow_receive_buffer(&self, bytes: usize) -> Result<(), Error> {
        // One at a time, so that none makes less what another has made more.
        static GROWING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = GROWING.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > self.receive_buffer() {
            let came = set_receive_buffer(self.fd.get_ref(), bytes)?;
            self.receive_buffer.store(came, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Has the timer told when the socket is readable.
    pub(crate) fn watch(&self, timer: &Timer, again: bool) -> io::Result<()> {
        timer.watch(self.fd.get_ref(), again)
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Bytes the socket's receive buffer may hold, as the kernel charges them.
    pub(crate) fn receive_buffer(&self) -> usize {
        self.receive_buffer.load(Ordering::Relaxed)
    }

    /// The longest datagram that can be sent, in bytes.
    pub(crate) fn max_send(&self) -> usize {
        self.max_send
    }

    /// The name of an interface in the socket's network namespace (SIOCGIFNAME asks for the socket's, not the caller's).
    pub(crate) fn interface_name(&self, index: u32) -> Result<String, Error> {
        rustix::net::netdevice::index_to_name(self.fd.get_ref(), index)
            .map_err(|errno| Error::os(format!("name interface {index}"), errno.into()).with_kind(ErrorKind::Other))
    }

    /// Ready when the socket may have something to read. Keeps the last waker only: for the stream alone.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<AsyncFdReadyGuard<'_, Netlink>>> {
        self.fd.poll_read_ready(cx)
    }

    /// Receives one datagram, if one is there, behind what `memory` holds.
    pub(crate) fn receive(&self, memory: &mut Memory) -> io::Result<Received> {
        loop {
            return match memory.receive(self.fd.get_ref()) {
                Ok(_) => Ok(Received::Datagram),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Ok(Received::Empty),
                Err(Errno::NOBUFS) => Ok(Received::Overrun),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Sends one datagram to the kernel, which executes it before this returns. It never waits for room.
    pub(crate) fn send(&self, datagram: &[u8]) -> io::Result<()> {
        loop {
            match rustix::net::send(self.fd.get_ref(), datagram, SendFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
