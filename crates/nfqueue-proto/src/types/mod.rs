//! The types that every layer uses. They use nothing else of this crate.

use std::fmt;

mod connection;
mod error;
pub mod flow_codes;
mod flow_marks;
mod hook;
pub mod stats;
mod waiting;

pub use self::{
    connection::{ConnectionState, Direction, FlowTuple, Protocol},
    error::{Error, ErrorKind, TryRecvError},
    flow_marks::FlowMarks,
    hook::Hook,
    stats::Stats,
    waiting::{Histogram, Waited},
};
pub use stats::FillCounter;

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// The packet is dropped.
    #[doc(alias = "NF_DROP")]
    Drop,
    /// The packet is accepted: it continues with the next chain.
    #[doc(alias = "NF_ACCEPT")]
    Accept,
    /// The packet is sent through the hook again; see `Packet::repeat`.
    #[doc(alias = "NF_REPEAT")]
    Repeat,
    /// The packet is accepted and skips the remaining chains of the hook.
    #[doc(alias = "NF_STOP")]
    Stop,
    /// The packet is sent to another queue.
    #[doc(alias = "NF_QUEUE")]
    Requeue {
        /// The other queue's number.
        queue: u16,
        /// If that queue is not bound: accept the packet if true, drop it if false.
        bypass: bool,
    },
}

impl Action {
    /// Refuses an action that cannot be the default action of this queue.
    #[doc(hidden)]
    pub fn check_default(self, queue: u16) -> Result<(), &'static str> {
        match self {
            Self::Repeat => Err("Repeat would send the packet through the queue indefinitely"),
            Self::Requeue { queue: other, .. } if other == queue => {
                Err("a requeue to the same queue would send the packet through it indefinitely")
            }
            _ => Ok(()),
        }
    }
}

/// The kernel's id of a packet. Each queue counts from 1 and wraps at 2³².
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketId(u32);

impl PacketId {
    /// Ids come from the kernel only.
    #[doc(hidden)]
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Whether the kernel gave this id before `other`, in the same queue.
    ///
    /// Ids wrap at 2³², so the result is right only if the ids are less than 2³¹ apart. The ids of
    /// packets that wait at the same time always are. For that reason `PacketId` is not `Ord`.
    pub fn is_before(self, other: Self) -> bool {
        (self.0.wrapping_sub(other.0) as i32) < 0
    }
}

impl fmt::Display for PacketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The protocol family of the hook that queued a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// IPv4, from a rule of family `ip` or `inet`.
    #[doc(alias = "NFPROTO_IPV4")]
    Ipv4,
    /// IPv6, from a rule of family `ip6` or `inet`.
    #[doc(alias = "NFPROTO_IPV6")]
    Ipv6,
    /// ARP.
    #[doc(alias = "NFPROTO_ARP")]
    Arp,
    /// A bridge. The payload begins with the network header;
    /// `Packet::hw_protocol` is its protocol.
    #[doc(alias = "NFPROTO_BRIDGE")]
    Bridge,
    /// A device's ingress or egress.
    #[doc(alias = "NFPROTO_NETDEV")]
    Netdev,
    /// Any other number.
    Other(u8),
}

impl Family {
    /// The kernel's number (`NFPROTO_*`).
    pub fn number(self) -> u8 {
        match self {
            Self::Ipv4 => 2,
            Self::Arp => 3,
            Self::Netdev => 5,
            Self::Bridge => 7,
            Self::Ipv6 => 10,
            Self::Other(number) => number,
        }
    }
}

impl From<u8> for Family {
    fn from(number: u8) -> Self {
        match number {
            2 => Self::Ipv4,
            3 => Self::Arp,
            5 => Self::Netdev,
            7 => Self::Bridge,
            10 => Self::Ipv6,
            other => Self::Other(other),
        }
    }
}

/// A VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vlan {
    /// The tag protocol identifier, an EtherType: 0x8100, or 0x88a8 for a service tag.
    pub protocol: u16,
    /// The tag control information: priority (3 bits), drop eligible (1 bit), VLAN identifier (12
    /// bits).
    pub control: u16,
}

impl Vlan {
    /// The VLAN identifier, 12 bits.
    pub fn id(self) -> u16 {
        self.control & 0x0fff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_the_numbers_of_the_kernel() {
        assert!((0..=u8::MAX).all(|number| Family::from(number).number() == number));
        assert_eq!((Family::Ipv4.number(), Family::Ipv6.number()), (2, 10));
    }

    #[test]
    fn ids_compare_across_the_wrap() {
        assert!(PacketId(1).is_before(PacketId(2)));
        assert!(!PacketId(2).is_before(PacketId(2)) && !PacketId(2).is_before(PacketId(1)));
        assert!(PacketId(u32::MAX).is_before(PacketId(0)) && !PacketId(0).is_before(PacketId(u32::MAX)));
    }
}
