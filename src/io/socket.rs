//! The netlink socket: readiness, receiving into pooled buffers, sending. It knows nothing of the
//! content. With feature `test-util`, a kernel in memory can take the place of the real one.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use netlink_sys::{Socket as Netlink, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, sockopt},
};
use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyGuard},
    },
    runtime::Handle,
};

use super::{buffers::BufferPool, clock::QueueClock, sys, timer::Timer};
#[cfg(feature = "test-util")]
use super::{
    kernel::KernelStats,
    memory::{MemoryKernel, MemorySocket},
};
use crate::{
    types::{Error, ErrorKind},
    wire::port,
};

/// What carries the datagrams.
#[derive(Debug)]
pub(crate) enum Transport {
    Netlink(Netlink),
    #[cfg(feature = "test-util")]
    Memory(MemorySocket),
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Netlink(socket) => socket.as_fd(),
            #[cfg(feature = "test-util")]
            Self::Memory(socket) => socket.as_fd(),
        }
    }
}

impl AsRawFd for Transport {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

// Both kinds own their descriptor, and never exchange it.
impl sys::Owning for Arc<Transport> {}

/// A non-blocking netlink socket of the netfilter family, with the runtime that wakes its stream.
#[derive(Debug)]
pub(crate) struct Socket {
    transport: Arc<Transport>,
    runtime: Handle,
    /// Registered with the runtime when the stream is polled first: a queue that only `try_recv`
    /// reads must not wake the runtime for each packet.
    registered: OnceLock<AsyncFd<Arc<Transport>>>,
    port_id: u32,
    receive_buffer: AtomicUsize,
    /// The longest datagram that the kernel takes, in bytes.
    max_send: usize,
}

/// The result of receiving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// A datagram is in the buffer, or only its beginning if it was longer than the buffer.
    Datagram,
    /// There is no datagram now: the kernel returns EAGAIN only after it has found the socket empty
    /// under the lock of its queue, and each later datagram is an event for the runtime
    /// (`__skb_try_recv_datagram`, `netlink_sendskb`).
    Empty,
    /// The receive buffer had overflowed.
    Overrun,
}

/// The result of receiving up to two datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Few {
    /// One datagram is in the buffer, or two. `emptied`: there are no others now. The kernel
    /// returns fewer than it was asked for if the socket is empty, and keeps any error for the next
    /// call (`do_recvmmsg`).
    Datagrams { two: bool, emptied: bool },
    /// There is no datagram now.
    Empty,
    /// The receive buffer had overflowed.
    Overrun,
}

/// A netlink socket that is not registered with a runtime.
#[derive(Debug)]
pub(crate) struct Unregistered {
    socket: Transport,
    port_id: u32,
    receive_buffer: usize,
    max_send: usize,
}

impl Unregistered {
    /// Opens a socket in the calling thread's network namespace. `receive_buffer` is in bytes, as
    /// the kernel accounts them.
    pub(crate) fn open(receive_buffer: usize) -> Result<Self, Error> {
        let os = |operation: &'static str| move |source| Error::os(operation, source);
        let mut socket = Netlink::new(NETLINK_NETFILTER).map_err(os("open netlink socket"))?;
        socket.set_non_blocking(true).map_err(os("open netlink socket"))?;
        let port_id = port::bind_port(|port| socket.bind(&SocketAddr::new(port, 0)))
            .map_err(os("give the netlink socket an address"))?;
        // A connected socket receives only from the kernel (netlink_getsockbyportid).
        socket.connect(&SocketAddr::new(0, 0)).map_err(os("connect netlink socket"))?;
        // Otherwise the first overflow stops all receiving until the buffer has been read empty
        // (netlink_overrun).
        socket.set_no_enobufs(true).map_err(os("set NETLINK_NO_ENOBUFS"))?;
        discard_all(&socket);
        // Error messages in words from the kernel. Not supported before 4.12, and not needed.
        let _ = socket.set_ext_ack(true);
        let receive_buffer = set_receive_buffer(&socket, receive_buffer)?;
        let send_buffer =
            sockopt::socket_send_buffer_size(&socket).map_err(|e| Error::os("read SO_SNDBUF", e.into()))?;
        // netlink_sendmsg returns EMSGSIZE for a message longer than sk_sndbuf - 32.
        let socket = Transport::Netlink(socket);
        Ok(Self { socket, port_id, receive_buffer, max_send: send_buffer.saturating_sub(32) })
    }

    /// Opens a socket of a kernel in memory.
    #[cfg(feature = "test-util")]
    pub(crate) fn open_in_memory(
        kernel: &Arc<dyn MemoryKernel>,
        receive_buffer: usize,
        flow_marks: Option<crate::types::FlowMarks>,
    ) -> Result<Self, Error> {
        // SO_SNDBUF of a new socket (`net.core.wmem_default`), less than which is free.
        const MAX_SEND: usize = 212_992 - 32;
        let socket = MemorySocket::open(Arc::clone(kernel), flow_marks)
            .map_err(|source| Error::os("open a socket in memory", source))?;
        let port_id = socket.port;
        let receive_buffer = kernel.set_receive_buffer(port_id, receive_buffer);
        Ok(Self { socket: Transport::Memory(socket), port_id, receive_buffer, max_send: MAX_SEND })
    }
}

impl AsFd for Unregistered {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Unregistered {
    /// Sends a message to the kernel, which executes it before this returns. Returns whether it was
    /// sent.
    pub(crate) fn send(&self, message: &[u8]) -> bool {
        rustix::net::send(self, message, SendFlags::empty()).is_ok()
    }

    /// A netlink socket that another process has opened and connected. The caller has checked that
    /// it is one.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Self, Error> {
        let os = |operation: &'static str| move |source| Error::os(operation, source);
        let socket = sys::netlink_socket(fd);
        // As `open` has done; these belong to the socket and are the same in both processes.
        socket.set_non_blocking(true).map_err(os("adopt netlink socket"))?;
        let mut address = SocketAddr::new(0, 0);
        socket.get_address(&mut address).map_err(os("read the address of the netlink socket"))?;
        let receive_buffer =
            sockopt::socket_recv_buffer_size(&socket).map_err(|e| Error::os("read SO_RCVBUF", e.into()))?;
        let send_buffer =
            sockopt::socket_send_buffer_size(&socket).map_err(|e| Error::os("read SO_SNDBUF", e.into()))?;
        let (port_id, socket) = (address.port_number(), Transport::Netlink(socket));
        Ok(Self { port_id, socket, receive_buffer, max_send: send_buffer.saturating_sub(32) })
    }
}

/// Discards what others have sent to the socket before it was connected.
fn discard_all(socket: &Netlink) {
    while rustix::net::recv(socket, &mut [0_u8; 1], RecvFlags::DONTWAIT).is_ok() {}
}

/// Port ids of this process's queues, in all network namespaces.
static OWN_PORTS: Mutex<OwnPorts> = Mutex::new(OwnPorts { open: Vec::new(), closed: VecDeque::new() });

struct OwnPorts {
    open: Vec<u32>,
    /// The last ones that were closed, or are being closed.
    closed: VecDeque<u32>,
}

impl OwnPorts {
    const CLOSED: usize = 64;

    fn close(&mut self, port: u32) {
        if let Some(at) = self.open.iter().position(|other| *other == port) {
            self.open.swap_remove(at);
        }
        if self.closed.len() == Self::CLOSED {
            self.closed.pop_front();
        }
        self.closed.push_back(port);
    }

    fn is_closed(&self, port: u32) -> bool {
        self.closed.contains(&port) && !self.open.contains(&port)
    }
}

fn own_ports() -> MutexGuard<'static, OwnPorts> {
    OWN_PORTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers the port id of a queue of this process.
pub(crate) fn own_port(port: u32) {
    own_ports().open.push(port);
}

/// The queue's socket is about to be closed.
pub(crate) fn forget_port(port: u32) {
    own_ports().close(port);
}

/// Whether a queue of this process has this port id.
pub(crate) fn is_own_port(port: u32) -> bool {
    own_ports().open.contains(&port)
}

/// Whether a queue of this process had this port id, whose socket another thread may be closing.
pub(crate) fn is_closed_port(port: u32) -> bool {
    own_ports().is_closed(port)
}

/// Sets the receive buffer, beyond `net.core.rmem_max` if that is allowed. Returns the resulting
/// size.
fn set_receive_buffer(socket: &Netlink, bytes: usize) -> Result<usize, Error> {
    // The kernel doubles the value to account for its own data; the limit is the doubled value.
    let half = (bytes / 2).min(i32::MAX as usize / 2);
    if sockopt::set_socket_recv_buffer_size_force(socket, half).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, half).map_err(|e| Error::os("set SO_RCVBUF", e.into()))?;
    }
    sockopt::socket_recv_buffer_size(socket).map_err(|e| Error::os("read SO_RCVBUF", e.into()))
}

/// The readiness of the socket, to be cleared when it has been found empty.
pub(crate) type Ready<'a> = AsyncFdReadyGuard<'a, Arc<Transport>>;

/// Registers with the current runtime. `None` if it has no I/O driver.
fn register(transport: &Arc<Transport>) -> Option<io::Result<AsyncFd<Arc<Transport>>>> {
    sys::register(Arc::clone(transport), Interest::READABLE)
}

impl Socket {
    /// A socket for the current runtime, which must have an I/O driver.
    pub(crate) fn new(unregistered: Unregistered) -> Result<Self, Error> {
        let Unregistered { socket, port_id, receive_buffer, max_send } = unregistered;
        let no_runtime = || Error::new(ErrorKind::NoRuntime, "register netlink socket");
        let runtime = Handle::try_current().map_err(|_| no_runtime())?;
        let transport = Arc::new(socket);
        // Only to find out whether that works.
        match register(&transport) {
            Some(registered) => drop(registered.map_err(|source| Error::os("register netlink socket", source))?),
            None => return Err(no_runtime()),
        }
        let registered = OnceLock::new();
        Ok(Self { transport, runtime, registered, port_id, receive_buffer: receive_buffer.into(), max_send })
    }

    /// Whether the kernel lets the calling thread send now; `None` if that is unknown.
    pub(crate) fn is_capable(&self) -> Option<bool> {
        match &*self.transport {
            Transport::Netlink(_) => sys::has_net_admin(),
            #[cfg(feature = "test-util")]
            Transport::Memory(socket) => Some(socket.kernel.is_capable()),
        }
    }

    /// Whether the kernel let the calling thread send when it sent last; `None` if that is unknown.
    /// A thread does not regain the capability while it sends: if it has the capability now, it had
    /// it during the send.
    pub(crate) fn was_capable(&self) -> Option<bool> {
        match &*self.transport {
            Transport::Netlink(_) => sys::has_net_admin(),
            #[cfg(feature = "test-util")]
            Transport::Memory(socket) => Some(socket.kernel.was_capable()),
        }
    }

    /// The id that the kernel gives to a queue's first packet.
    pub(crate) fn first_id(&self) -> u32 {
        match &*self.transport {
            // nfqnl counts a queue's packets from 1 (`++queue->id_sequence`).
            Transport::Netlink(_) => 1,
            #[cfg(feature = "test-util")]
            Transport::Memory(socket) => socket.kernel.first_id(),
        }
    }

    /// The clock of the kernel.
    pub(crate) fn clock(&self) -> QueueClock {
        match &*self.transport {
            Transport::Netlink(_) => QueueClock::System,
            #[cfg(feature = "test-util")]
            Transport::Memory(socket) => QueueClock::Memory(socket.kernel.clock()),
        }
    }

    /// Whether the kernel is one in memory.
    pub(crate) fn is_in_memory(&self) -> bool {
        match &*self.transport {
            Transport::Netlink(_) => false,
            #[cfg(feature = "test-util")]
            Transport::Memory(_) => true,
        }
    }

    /// The counters of a queue in a kernel in memory; `None` for the real kernel.
    #[cfg(feature = "test-util")]
    pub(crate) fn stats_in_memory(&self, queue: u16) -> Option<Option<KernelStats>> {
        match &*self.transport {
            Transport::Netlink(_) => None,
            Transport::Memory(socket) => Some(socket.kernel.stats(queue)),
        }
    }

    /// The port id of the socket.
    pub(crate) fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Sets the receive buffer as far as the system allows it, in bytes as the kernel accounts
    /// them. The caller sees to it that there is one call at a time.
    pub(crate) fn set_receive_buffer(&self, bytes: usize) -> Result<(), Error> {
        let came = match &*self.transport {
            Transport::Netlink(socket) => set_receive_buffer(socket, bytes)?,
            #[cfg(feature = "test-util")]
            Transport::Memory(socket) => socket.kernel.set_receive_buffer(socket.port, bytes),
        };
        self.receive_buffer.store(came, Ordering::Relaxed);
        Ok(())
    }

    /// Lets the timer thread report when the socket is readable.
    pub(crate) fn watch(&self, timer: &Timer) -> io::Result<()> {
        #[cfg(feature = "test-util")]
        if let Transport::Memory(socket) = &*self.transport {
            timer.watch_in_memory(socket.descriptor());
        }
        timer.watch(&*self.transport)
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }

    /// The size of the receive buffer in bytes, as the kernel accounts them.
    pub(crate) fn receive_buffer(&self) -> usize {
        self.receive_buffer.load(Ordering::Relaxed)
    }

    /// The longest datagram that can be sent, in bytes.
    pub(crate) fn max_send(&self) -> usize {
        self.max_send
    }

    /// The name of an interface in the socket's network namespace (SIOCGIFNAME uses the socket's
    /// namespace, not the caller's).
    pub(crate) fn interface_name(&self, index: u32) -> Result<String, Error> {
        let name = match &*self.transport {
            Transport::Netlink(socket) => rustix::net::netdevice::index_to_name(socket, index),
            #[cfg(feature = "test-util")]
            Transport::Memory(socket) => socket.kernel.interface_name(index),
        };
        name.map_err(|errno| {
            Error::os(format!("find the name of interface {index}"), errno.into()).with_kind(ErrorKind::Other)
        })
    }

    /// Ready when the socket may be readable. Keeps only the last waker, so only the stream may use
    /// it.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<Ready<'_>>> {
        let registered = match self.registered.get() {
            Some(registered) => registered,
            None => {
                let _entered = self.runtime.enter();
                match register(&self.transport) {
                    Some(Ok(registered)) => self.registered.get_or_init(|| registered),
                    Some(Err(source)) => return Poll::Ready(Err(source)),
                    None => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }
        };
        registered.poll_read_ready(cx)
    }

    /// Receives one datagram into `buffers`, if there is one.
    pub(crate) fn receive(&self, buffers: &mut BufferPool) -> io::Result<Received> {
        loop {
            let received = match &*self.transport {
                Transport::Netlink(socket) => buffers.receive(socket).map(drop),
                #[cfg(feature = "test-util")]
                Transport::Memory(socket) => socket.kernel.receive(socket.port, buffers.landing()),
            };
            return match received {
                Ok(()) => Ok(Received::Datagram),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Ok(Received::Empty),
                Err(Errno::NOBUFS) => Ok(Received::Overrun),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Receives up to two datagrams into `buffers` by one system call, which also finds out whether
    /// there are more.
    pub(crate) fn receive_two(&self, buffers: &mut BufferPool) -> io::Result<Few> {
        loop {
            let received = match &*self.transport {
                Transport::Netlink(socket) => buffers.receive_two(socket).map(|count| (count, count < 2)),
                #[cfg(feature = "test-util")]
                Transport::Memory(socket) => socket.kernel.receive_two(socket.port, buffers.landings()),
            };
            return match received {
                Ok((count, emptied)) => Ok(Few::Datagrams { two: count == 2, emptied }),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Ok(Few::Empty),
                Err(Errno::NOBUFS) => Ok(Few::Overrun),
                // A seccomp filter refuses the call. The rest is received one by one.
                Err(Errno::NOSYS | Errno::PERM) => Ok(match self.receive(buffers)? {
                    Received::Datagram => Few::Datagrams { two: false, emptied: false },
                    Received::Empty => Few::Empty,
                    Received::Overrun => Few::Overrun,
                }),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Called after sending, without a lock: what a kernel in memory has done may wake tasks.
    pub(crate) fn sent(&self) {
        #[cfg(feature = "test-util")]
        if let Transport::Memory(socket) = &*self.transport {
            socket.kernel.wake();
        }
    }

    /// Sends one datagram to the kernel, which executes it before this returns. It never blocks.
    pub(crate) fn send(&self, datagram: &[u8]) -> Result<(), Errno> {
        loop {
            let sent = match &*self.transport {
                Transport::Netlink(socket) => rustix::net::send(socket, datagram, SendFlags::empty()).map(drop),
                #[cfg(feature = "test-util")]
                Transport::Memory(socket) => socket.kernel.send(socket.port, datagram),
            };
            match sent {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_sys::protocols::NETLINK_USERSOCK;

    use super::*;

    #[test]
    fn the_last_closed_ports_are_known_unless_they_are_open() {
        let last = OwnPorts::CLOSED as u32;
        let mut ports = OwnPorts { open: (0..=last).chain([last]).collect(), closed: VecDeque::new() };
        assert!((0..=last).all(|port| !ports.is_closed(port)));
        (0..=last).for_each(|port| ports.close(port));
        assert_eq!((0..=last).filter(|port| !ports.is_closed(*port)).collect::<Vec<_>>(), [0, last]);
        ports.close(last);
        assert!(ports.is_closed(last) && ports.open.is_empty());
    }

    #[test]
    fn what_was_sent_before_the_connection_is_discarded() {
        let open = || {
            let mut socket = Netlink::new(NETLINK_USERSOCK).unwrap();
            let port = socket.bind_auto().unwrap();
            (socket, port)
        };
        let (socket, port) = open();
        let (other, _) = open();
        for _ in 0..3 {
            other.send_to(&[7; 100], &port, 0).unwrap();
        }
        assert!(rustix::net::recv(&socket, &mut [0_u8; 1], RecvFlags::DONTWAIT | RecvFlags::PEEK).is_ok());
        discard_all(&socket);
        let left = rustix::net::recv(&socket, &mut [0_u8; 1], RecvFlags::DONTWAIT);
        assert_eq!(left.unwrap_err(), Errno::AGAIN);
    }
}
