//! Where in the network stack a packet is looked at.

use crate::Family;

/// A place in a packet's way through the network stack.
///
/// A packet for this host passes `Prerouting` and `Input`, one from it `Output` and `Postrouting`, one through it
/// `Prerouting`, `Forward` and `Postrouting`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Hook {
    /// Everything that arrives, before the routing decision.
    #[doc(alias = "NF_INET_PRE_ROUTING")]
    Prerouting,
    /// What is for this host.
    #[doc(alias = "NF_INET_LOCAL_IN")]
    Input,
    /// What is routed through this host.
    #[doc(alias = "NF_INET_FORWARD")]
    Forward,
    /// What this host sends.
    #[doc(alias = "NF_INET_LOCAL_OUT")]
    Output,
    /// Everything that leaves, after the routing decision.
    #[doc(alias = "NF_INET_POST_ROUTING")]
    Postrouting,
    /// Any other number, and every hook of a family that numbers its hooks otherwise (ARP, netdev).
    Other(u8),
}

impl Hook {
    /// The hook of this number in a family.
    pub(crate) fn new(family: Family, number: u8) -> Self {
        match (family, number) {
            (Family::Arp | Family::Netdev, number) => Self::Other(number),
            (_, 0) => Self::Prerouting,
            (_, 1) => Self::Input,
            (_, 2) => Self::Forward,
            (_, 3) => Self::Output,
            (_, 4) => Self::Postrouting,
            (_, number) => Self::Other(number),
        }
    }
}
