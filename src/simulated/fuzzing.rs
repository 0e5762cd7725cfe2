//! What the fuzz targets need of a simulated kernel.

use bytes::Bytes;

use super::{Kernel, TestPacket, pcap};

impl Kernel {
    /// Puts a datagram of any content into the socket of a queue, as if the kernel had sent it.
    pub(crate) fn forge(&self, queue: u16, datagram: &[u8]) {
        self.0.with(|inner, _| inner.model.forge(queue, datagram));
    }
}

/// The packets of a capture file.
pub(crate) fn capture(file: &[u8]) -> Result<Vec<TestPacket>, String> {
    pcap::parse(Bytes::copy_from_slice(file))
}
