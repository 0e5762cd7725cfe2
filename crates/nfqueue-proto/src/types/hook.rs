//! Netfilter's hooks.

use super::Family;

/// A hook of netfilter: a point of the network stack at which packets are filtered.
///
/// A packet to this host traverses `Prerouting` and `Input`. A packet from this host traverses
/// `Output` and `Postrouting`. A forwarded packet traverses `Prerouting`, `Forward` and
/// `Postrouting`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Hook {
    /// Every packet that arrives, before the routing decision.
    #[doc(alias = "NF_INET_PRE_ROUTING")]
    Prerouting,
    /// Packets to this host.
    #[doc(alias = "NF_INET_LOCAL_IN")]
    Input,
    /// Packets that this host forwards.
    #[doc(alias = "NF_INET_FORWARD")]
    Forward,
    /// Packets from this host.
    #[doc(alias = "NF_INET_LOCAL_OUT")]
    Output,
    /// Every packet that leaves, after the routing decision.
    #[doc(alias = "NF_INET_POST_ROUTING")]
    Postrouting,
    /// Any other number, and every hook of a family with other numbers (ARP, netdev).
    Other(u8),
}

impl Hook {
    /// The hook with this number in a family.
    #[doc(hidden)]
    pub fn new(family: Family, number: u8) -> Self {
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

    /// The kernel's number of the hook.
    ///
    /// The named hooks have the numbers of the families `ip`, `ip6`, `inet` and `bridge`, from 0
    /// for `Prerouting` to 4 for `Postrouting` (uapi/linux/netfilter.h). `Other` contains the
    /// number itself.
    pub fn number(self) -> u8 {
        match self {
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
            Self::Other(number) => number,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_hooks_have_the_kernels_numbers() {
        let named = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
        assert_eq!(named.map(Hook::number), [0, 1, 2, 3, 4]);
        assert_eq!(named.map(|hook| Hook::new(Family::Ipv4, hook.number())), named);
    }

    #[test]
    fn a_hook_has_the_number_it_was_made_from() {
        for family in (0..=u8::MAX).map(Family::from) {
            for number in 0..=u8::MAX {
                assert_eq!(Hook::new(family, number).number(), number, "{family:?}");
            }
        }
    }
}
