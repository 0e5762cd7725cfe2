//! The words that every layer shares. Knows nothing else of this crate.

use std::fmt;

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// The packet is dropped.
    #[doc(alias = "NF_DROP")]
    Drop,
    /// The packet is accepted: it goes on to the next chain.
    #[doc(alias = "NF_ACCEPT")]
    Accept,
    /// The packet passes the hook again; see [`Packet::repeat`](crate::Packet::repeat).
    #[doc(alias = "NF_REPEAT")]
    Repeat,
    /// The packet is accepted and skips the rest of the hook's chains.
    #[doc(alias = "NF_STOP")]
    Stop,
    /// The packet goes to another queue.
    #[doc(alias = "NF_QUEUE")]
    Requeue {
        /// The other queue's number.
        queue: u16,
        /// Where nobody owns that queue: accept the packet if true, drop it if false.
        bypass: bool,
    },
}

/// The kernel's id of a packet: counts up from 1 in each queue, and wraps at 2³².
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketId(pub(crate) u32);

impl PacketId {
    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for PacketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
