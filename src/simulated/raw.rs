//! Netlink sockets of a simulated kernel, for messages that this crate does not send.

use std::io;

use bytes::{Bytes, BytesMut};

use super::Kernel;

/// A netlink socket of a simulated kernel, without a queue of this crate: for messages of one's
/// own. Sends and receives do not block.
///
/// Its bytes are those of `NETLINK_NETFILTER`: see `uapi/linux/netfilter/nfnetlink_queue.h`.
#[derive(Debug)]
pub struct RawSocket {
    kernel: Kernel,
    port: u32,
}

impl Kernel {
    /// Opens a netlink socket. `no_enobufs` is the socket option `NETLINK_NO_ENOBUFS`.
    pub fn raw_socket(&self, no_enobufs: bool) -> RawSocket {
        let port = self.0.inner().model.open(no_enobufs, None);
        RawSocket { kernel: self.clone(), port }
    }

    /// Sets what the smallest head of a message takes of a receive buffer, in bytes: 512 before
    /// Linux 6.3, later 576 (the default) or 704, by the kernel's configuration
    /// (`SKB_SMALL_HEAD_CACHE_SIZE`, x86-64). With 576, a short message is charged 832 bytes.
    pub fn set_small_head(&self, bytes: usize) {
        self.0.inner().model.small_head = bytes;
    }
}

impl RawSocket {
    /// Sends a datagram, which the kernel executes before this returns.
    ///
    /// # Errors
    /// `EMSGSIZE`: it is longer than 212 960 bytes.
    pub fn send(&self, datagram: &[u8]) -> io::Result<()> {
        Ok(self.kernel.0.with(|inner, now| inner.model.send(self.port, datagram, now))?)
    }

    /// Receives a datagram.
    ///
    /// # Errors
    /// `WouldBlock`: there is none. `ENOBUFS`: the receive buffer had overflowed.
    pub fn receive(&self) -> io::Result<Bytes> {
        // More than the longest message.
        let mut room = BytesMut::with_capacity(1 << 18);
        self.kernel.0.inner().model.receive(self.port, &mut room)?;
        Ok(room.freeze())
    }

    /// Sets the size of the receive buffer in bytes, as the kernel accounts them. Default: 212 992.
    pub fn set_receive_buffer(&self, bytes: usize) {
        self.kernel.0.inner().model.set_receive_buffer(self.port, bytes);
    }

    /// The port id.
    pub fn port_id(&self) -> u32 {
        self.port
    }
}

impl Drop for RawSocket {
    /// Closes the socket: its queues are unbound.
    fn drop(&mut self) {
        self.kernel.0.with(|inner, now| inner.model.close(self.port, now));
    }
}
