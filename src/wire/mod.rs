//! Bytes ↔ messages: the nfnetlink_queue protocol, pure. No socket, no clock, no runtime; nothing here panics on any input
//! and all work is linear in the input's length.
//!
//! Constants are those of `include/uapi/linux/netfilter/nfnetlink_queue.h` and `nfnetlink.h`.

pub(crate) mod config;
pub(crate) mod message;
pub(crate) mod packet;
pub(crate) mod verdict;
mod writer;

pub(crate) use message::{Answer, Message, Messages};
pub(crate) use packet::{PacketMessage, attribute};

/// `NFNL_SUBSYS_QUEUE`, the upper byte of every message type here.
const SUBSYSTEM: u16 = 3 << 8;
const MESSAGE_PACKET: u16 = SUBSYSTEM;
const MESSAGE_VERDICT: u16 = SUBSYSTEM | 1;
const MESSAGE_CONFIG: u16 = SUBSYSTEM | 2;
const MESSAGE_VERDICT_BATCH: u16 = SUBSYSTEM | 3;

/// `struct nlmsghdr`.
pub(crate) const NETLINK_HEADER: usize = 16;
/// `struct nfgenmsg`: family, version, resource id (here the queue number, big-endian).
pub(crate) const NETFILTER_HEADER: usize = 4;
/// `NFQA_VERDICT_HDR`, in a verdict message.
const ATTRIBUTE_VERDICT_HEADER: u16 = 2;

/// Largest payload an attribute can carry, and so the largest copy range: `0xffff - NLA_HDRLEN`
/// (`nfqnl_set_mode` turns anything above into it).
pub(crate) const MAX_PAYLOAD: usize = 65_531;

/// Rounds up to `NLMSG_ALIGNTO`, which is 4, as `NLA_ALIGNTO` is.
const fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}
