//! The socket of a kernel in memory: what replaces system calls where there is no nfnetlink_queue.
//! The content is the same as that of a netlink socket.

use std::{
    fmt::Debug,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use bytes::BytesMut;
use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

use super::{clock::MemoryClock, kernel::KernelStats};

/// A kernel in memory, as the sockets of this crate see it.
pub(crate) trait MemoryKernel: Debug + Send + Sync {
    /// Opens a socket, and returns its port id. `signal` is to be readable while the socket is.
    /// `flow_marks`: packets are sent to its queues by rules with flow marks.
    fn open(&self, signal: Signal, flow_marks: Option<crate::types::FlowMarks>) -> u32;
    fn close(&self, port: u32);
    /// Executes a datagram before it returns. The caller may hold locks: no task is woken.
    fn send(&self, port: u32, datagram: &[u8]) -> Result<(), Errno>;
    /// Wakes those who wait for what has been sent. The caller holds no lock.
    fn wake(&self);
    /// Appends a datagram to `buffer`, up to its capacity.
    fn receive(&self, port: u32, buffer: &mut BytesMut) -> Result<(), Errno>;
    /// As `receive`, up to two datagrams. Returns how many, and whether there are no more.
    fn receive_two(&self, port: u32, buffers: [&mut BytesMut; 2]) -> Result<(usize, bool), Errno>;
    /// Returns the resulting size.
    fn set_receive_buffer(&self, port: u32, bytes: usize) -> usize;
    /// Whether the caller may send.
    fn is_capable(&self) -> bool;
    /// Whether the calling thread might send when it sent last.
    fn was_capable(&self) -> bool;
    fn interface_name(&self, index: u32) -> Result<String, Errno>;
    /// The counters of a queue that is bound.
    fn stats(&self, queue: u16) -> Option<KernelStats>;
    /// The id of the first packet of a queue.
    fn first_id(&self) -> u32;
    fn clock(&self) -> Arc<MemoryClock>;
}

/// A descriptor that is readable while a socket is.
#[derive(Debug, Clone)]
pub(crate) struct Signal(Arc<OwnedFd>);

impl Signal {
    fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// The socket has become readable.
    pub(crate) fn raise(&self) {
        // It fails only if it is readable anyway.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// The socket has become empty.
    pub(crate) fn lower(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// A socket of a kernel in memory.
#[derive(Debug)]
pub(crate) struct MemorySocket {
    pub(super) kernel: Arc<dyn MemoryKernel>,
    pub(super) port: u32,
    signal: Signal,
}

impl MemorySocket {
    pub(super) fn open(kernel: Arc<dyn MemoryKernel>, flow_marks: Option<crate::types::FlowMarks>) -> io::Result<Self> {
        let signal = Signal::new()?;
        let port = kernel.open(signal.clone(), flow_marks);
        Ok(Self { kernel, port, signal })
    }

    /// For a thread that may watch the descriptor longer than the socket lives.
    pub(super) fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.signal.0)
    }
}

impl AsFd for MemorySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.0.as_fd()
    }
}

impl Drop for MemorySocket {
    fn drop(&mut self) {
        self.kernel.close(self.port);
    }
}
