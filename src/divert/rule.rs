//! One rule: what it matches, and where the matching packets go.

use std::{net::IpAddr, ops::RangeInclusive};

use crate::Hook;

/// Whether an interface is known at a hook by which packets came in; elsewhere it is the one they go out by.
pub(super) fn sees_input(hook: Hook) -> bool {
    matches!(hook, Hook::Prerouting | Hook::Input | Hook::Forward)
}

/// A transport protocol, for [`Rule::protocol`].
///
/// It is compared with what the kernel calls the layer 4 protocol: for IPv6 that is what follows the extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP, 6.
    Tcp,
    /// UDP, 17.
    Udp,
    /// ICMP of IPv4, 1.
    Icmp,
    /// ICMP of IPv6, 58.
    Icmpv6,
    /// Any other, by its number in the IP header.
    Other(u8),
}

impl Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Icmp => 1,
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmpv6 => 58,
            Self::Other(number) => number,
        }
    }

    /// Whether the header begins with a source and a destination port: TCP, UDP, DCCP, SCTP, UDP-Lite.
    fn has_ports(self) -> bool {
        matches!(self.number(), 6 | 17 | 33 | 132 | 136)
    }
}

/// What packets to take, and what to do with them: to a queue, or an immediate accept or drop.
///
/// All conditions must hold; without any, the rule takes every packet of IPv4 and IPv6 that passes its hook. Setting a
/// condition twice keeps the last one, except marks, which add up. A rule is checked when it is
/// [installed](super::DivertBuilder::install).
///
/// ```
/// use tokio_nfqueue::{Hook, Protocol, Rule};
///
/// // DNS queries of this machine, spread over four queues; they pass unseen while nobody has a queue bound.
/// let rule = Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53).to_queues(0..=3).bypass(true);
/// # let _ = rule;
/// ```
#[derive(Debug, Clone)]
#[must_use = "a rule does nothing until it is installed"]
pub struct Rule {
    pub(super) hook: Hook,
    pub(super) protocol: Option<Protocol>,
    pub(super) source_port: Option<u16>,
    pub(super) destination_port: Option<u16>,
    pub(super) interface: Option<String>,
    pub(super) family: Option<Family>,
    pub(super) source: Option<Network>,
    pub(super) destination: Option<Network>,
    pub(super) marks: Vec<Mark>,
    pub(super) terminal: Option<Terminal>,
    pub(super) fanout: bool,
    pub(super) bypass: bool,
}

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

/// The addresses that begin with the first `prefix` bits of `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

impl Network {
    pub(super) fn family(self) -> Family {
        if self.address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }

    /// The bits that count, as the mask of an address.
    pub(super) fn mask(self) -> Vec<u8> {
        let ones = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0).to_be_bytes();
        ones[..self.octets().len()].to_vec()
    }

    /// The address, its other bits cleared.
    pub(super) fn network(self) -> Vec<u8> {
        self.octets().iter().zip(self.mask()).map(|(octet, mask)| octet & mask).collect()
    }

    fn octets(self) -> Vec<u8> {
        match self.address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        }
    }
}

/// A condition on the packet's mark: `(mark & mask == value) == equal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) value: u32,
    pub(super) mask: u32,
    pub(super) equal: bool,
}

/// What a rule ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Terminal {
    /// First and last number.
    Queue(u16, u16),
    Drop,
    Accept,
}

impl Rule {
    /// A rule for every packet at `hook`; it still needs an end: [`to_queue`](Self::to_queue),
    /// [`to_queues`](Self::to_queues), [`accept`](Self::accept) or [`drop`](Self::drop).
    pub fn new(hook: Hook) -> Self {
        Self {
            hook,
            protocol: None,
            source_port: None,
            destination_port: None,
            interface: None,
            family: None,
            source: None,
            destination: None,
            marks: Vec::new(),
            terminal: None,
            fanout: false,
            bypass: false,
        }
    }

    /// Only packets of this transport protocol.
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// Only packets to this port (host byte order). The [`protocol`](Self::protocol) must be one that has ports.
    ///
    /// A fragment other than the first carries no port and does not match.
    pub fn destination_port(mut self, port: u16) -> Self {
        self.destination_port = Some(port);
        self
    }

    /// Only packets from this port (host byte order). The [`protocol`](Self::protocol) must be one that has ports.
    ///
    /// A fragment other than the first carries no port and does not match.
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = Some(port);
        self
    }

    /// Only packets of the interface with exactly this name: the one they came in by at `Prerouting`, `Input` and
    /// `Forward`, the one they go out by at `Output` and `Postrouting`. The interface need not exist yet.
    ///
    /// A name has 1 to 15 bytes, none of them white space, `/` or NUL.
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interface = Some(name.into());
        self
    }

    /// Only IPv4.
    pub fn ipv4(mut self) -> Self {
        self.family = Some(Family::Ipv4);
        self
    }

    /// Only IPv6.
    pub fn ipv6(mut self) -> Self {
        self.family = Some(Family::Ipv6);
        self
    }

    /// Only packets from an address of this network: `prefix` is the number of leading bits that count, at most 32 for
    /// IPv4, 128 for IPv6. The address decides the family.
    pub fn source_address(mut self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.source = Some(Network { address: address.into(), prefix });
        self
    }

    /// Only packets to an address of this network; as [`source_address`](Self::source_address) otherwise.
    pub fn destination_address(mut self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.destination = Some(Network { address: address.into(), prefix });
        self
    }

    /// Only packets whose mark, masked with `mask`, is `value`. `value` may have no bit outside `mask`.
    ///
    /// An unmarked packet has mark 0. For the whole mark, say `u32::MAX` as mask.
    pub fn mark(mut self, value: u32, mask: u32) -> Self {
        self.marks.push(Mark { value, mask, equal: true });
        self
    }

    /// Only packets whose mark, masked with `mask`, is *not* `value`: the way to let packets by that a verdict of yours
    /// has marked, so that a repeated packet or your own traffic does not come back to the queue.
    pub fn unless_mark(mut self, value: u32, mask: u32) -> Self {
        self.marks.push(Mark { value, mask, equal: false });
        self
    }

    /// Sends the packets to this queue.
    ///
    /// While no socket has the queue bound they are dropped, unless [`bypass`](Self::bypass) is set: bind first, then
    /// install.
    #[doc(alias = "NFQUEUE")]
    pub fn to_queue(self, queue: u16) -> Self {
        self.to_queues(queue..=queue)
    }

    /// Spreads the packets over several queues by a hash of both addresses (for IPv4 also the protocol), which is the
    /// same for both directions (`nfqueue_hash`). Ports do not count: all connections between two machines stay in one
    /// queue. The seed is drawn when the system starts.
    ///
    /// The range may not be empty, and not be all 65 536 queues, for which the kernel has no number.
    #[doc(alias = "queue-balance")]
    pub fn to_queues(mut self, queues: RangeInclusive<u16>) -> Self {
        self.terminal = Some(Terminal::Queue(*queues.start(), *queues.end()));
        self
    }

    /// Accepts the packets: no later rule of this chain sees them. Chains of other tables do.
    pub fn accept(mut self) -> Self {
        self.terminal = Some(Terminal::Accept);
        self
    }

    /// Drops the packets.
    pub fn drop(mut self) -> Self {
        self.terminal = Some(Terminal::Drop);
        self
    }

    /// Chooses among [several queues](Self::to_queues) by the number of the CPU that handles the packet, not by flow.
    /// Default: no.
    #[doc(alias = "queue-cpu-fanout")]
    pub fn fanout(mut self, on: bool) -> Self {
        self.fanout = on;
        self
    }

    /// Lets packets pass while no socket has the queue bound, as if this rule said [`accept`](Self::accept): later rules
    /// do not see them. Default: no, they are dropped.
    ///
    /// It is of no help while the queue is bound and full: that is what fail-open is for.
    #[doc(alias = "queue-bypass")]
    pub fn bypass(mut self, on: bool) -> Self {
        self.bypass = on;
        self
    }

    /// Says what is wrong with the rule, if anything, and otherwise what it ends in.
    pub(super) fn check(&self) -> Result<Terminal, &'static str> {
        if let Hook::Other(_) = self.hook {
            return Err("family inet has five hooks, from prerouting to postrouting");
        }
        if self.source_port.is_some() || self.destination_port.is_some() {
            match self.protocol {
                None => return Err("a port needs a protocol"),
                Some(protocol) if !protocol.has_ports() => return Err("this protocol has no ports"),
                Some(_) => {}
            }
        }
        if let Some(name) = &self.interface {
            check_interface(name)?;
        }
        let networks = || self.source.into_iter().chain(self.destination);
        if networks().any(|network| network.prefix > if network.address.is_ipv4() { 32 } else { 128 }) {
            return Err("the address has fewer bits than the prefix");
        }
        let mut families = self.family.into_iter().chain(networks().map(Network::family));
        if let Some(first) = families.next()
            && families.any(|family| family != first)
        {
            return Err("the rule asks for IPv4 and for IPv6");
        }
        if self.marks.iter().any(|mark| mark.value & !mark.mask != 0) {
            return Err("the mark's value has bits outside its mask");
        }
        match self.terminal {
            None => Err("the rule has no end: to_queue, to_queues, accept or drop"),
            Some(Terminal::Queue(first, last)) if first > last => Err("the range of queues is empty"),
            Some(Terminal::Queue(0, u16::MAX)) => Err("the range of queues is too long: 65535 is the most"),
            Some(Terminal::Drop | Terminal::Accept) if self.bypass || self.fanout => {
                Err("bypass and fanout are for rules that end in a queue")
            }
            Some(terminal) => Ok(terminal),
        }
    }
}

/// What the kernel allows (`dev_valid_name`), except that `:` is left to it.
fn check_interface(name: &str) -> Result<(), &'static str> {
    match name.len() {
        0 => Err("the interface's name is empty"),
        16.. => Err("the interface's name is longer than 15 bytes"),
        _ if name.bytes().any(|byte| byte == 0 || byte == b'/' || byte.is_ascii_whitespace()) => {
            Err("the interface's name has a character that no interface can have")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn queued() -> Rule {
        Rule::new(Hook::Output).to_queue(1)
    }

    #[test]
    fn ports_need_a_protocol_that_has_them() {
        assert_eq!(queued().destination_port(53).check(), Err("a port needs a protocol"));
        for protocol in [Protocol::Icmp, Protocol::Icmpv6, Protocol::Other(47)] {
            assert_eq!(queued().protocol(protocol).source_port(53).check(), Err("this protocol has no ports"));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Other(132), Protocol::Other(6)] {
            assert_eq!(queued().protocol(protocol).source_port(0).check(), Ok(Terminal::Queue(1, 1)));
        }
    }

    #[test]
    fn interfaces_are_named_as_the_kernel_names_them() {
        for bad in ["", "sixteen-bytes-xx", "a b", "a/b", "a\0b"] {
            assert!(queued().interface(bad).check().is_err(), "{bad:?}");
        }
        for good in ["lo", "fifteen-bytes-x", "eth0.1", "ä"] {
            assert!(queued().interface(good).check().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn ranges_have_an_end_and_a_size() {
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        let empty = 3..=2;
        assert!(Rule::new(Hook::Input).to_queues(empty).check().is_err());
        assert!(Rule::new(Hook::Input).to_queues(0..=65535).check().is_err());
        assert_eq!(Rule::new(Hook::Input).to_queues(1..=65535).check(), Ok(Terminal::Queue(1, 65535)));
        assert!(Rule::new(Hook::Input).check().is_err());
        assert!(Rule::new(Hook::Input).accept().bypass(true).check().is_err());
        assert_eq!(Rule::new(Hook::Input).to_queue(9).drop().check(), Ok(Terminal::Drop));
    }

    #[test]
    fn addresses_agree_on_a_family() {
        let (v4, v6) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
        assert!(queued().source_address(v4, 33).check().is_err());
        assert!(queued().source_address(v6, 129).check().is_err());
        assert!(queued().source_address(v4, 32).destination_address(v6, 128).check().is_err());
        assert!(queued().source_address(v4, 0).ipv6().check().is_err());
        assert!(queued().source_address(v6, 0).destination_address(v6, 128).ipv6().check().is_ok());
    }

    #[test]
    fn a_prefix_is_a_mask() {
        let network = |prefix| Network { address: Ipv4Addr::new(10, 11, 255, 255).into(), prefix };
        assert_eq!(network(0).mask(), [0; 4]);
        assert_eq!(network(32).mask(), [0xff; 4]);
        assert_eq!(network(20).mask(), [0xff, 0xff, 0xf0, 0]);
        assert_eq!(network(20).network(), [10, 11, 0xf0, 0]);
        let network = Network { address: Ipv6Addr::from(u128::MAX).into(), prefix: 127 };
        assert_eq!(network.network(), (u128::MAX - 1).to_be_bytes());
    }

    #[test]
    fn a_mark_that_cannot_match_is_refused() {
        assert!(queued().mark(0x10, 0x0f).check().is_err());
        assert!(queued().unless_mark(0x10, 0x0f).check().is_err());
        assert!(queued().mark(0, 0).mark(0x0f, 0xff).check().is_ok());
    }
}
