//! Encodes and decodes the messages of the nfnetlink_queue protocol.
//!
//! This module uses no socket, no clock and no runtime. It does not panic on any input, and its run
//! time is linear in the length of the input.
//!
//! The constants come from `include/uapi/linux/netfilter/nfnetlink_queue.h` and `nfnetlink.h`.

pub mod config;
#[cfg(feature = "conntrack")]
pub mod conntrack;
#[cfg(feature = "conntrack")]
pub mod expectation;
#[cfg(feature = "kernel-side")]
pub mod kernel_side;
pub mod message;
pub mod packet;
pub mod port;
pub mod tuple;
pub mod verdict;
mod writer;

pub use message::{Message, Messages, Refused, Reply};
pub use packet::{PacketMessage, attribute};

/// `NFNL_SUBSYS_QUEUE`, in the upper byte of every message type.
const SUBSYSTEM: u16 = 3 << 8;
const MESSAGE_PACKET: u16 = SUBSYSTEM;
const MESSAGE_VERDICT: u16 = SUBSYSTEM | 1;
const MESSAGE_CONFIG: u16 = SUBSYSTEM | 2;
const MESSAGE_VERDICT_BATCH: u16 = SUBSYSTEM | 3;

/// `struct nlmsghdr`.
pub const NETLINK_HEADER: usize = 16;
/// `struct nfgenmsg`: family, version, resource id. Here the resource id is the queue number,
/// big-endian.
pub const NETFILTER_HEADER: usize = 4;
/// `NFQA_VERDICT_HDR`, in a verdict message.
const ATTRIBUTE_VERDICT_HEADER: u16 = 2;

/// The largest payload that an attribute can carry, in bytes: `0xffff - NLA_HDRLEN`.
///
/// This is also the largest copy range. `nfqnl_set_mode` reduces larger copy ranges to it.
pub const MAX_PAYLOAD: usize = 65_531;

/// Rounds up to a multiple of 4, the value of `NLMSG_ALIGNTO` and `NLA_ALIGNTO`.
const fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}
