//! A rule: its conditions, and its action for matching packets.

use std::{net::IpAddr, ops::RangeInclusive};

use crate::types::Hook;

/// A rule: conditions on packets, and an action for the packets that match (queue, accept or drop).
///
/// A packet matches if all conditions are true. A rule without conditions matches every IPv4 and
/// IPv6 packet at its hook. Setting a condition again replaces it, except for conditions on the
/// mark, which all apply. [`install`](super::DivertBuilder::install) checks the rule.
///
/// ```
/// use tokio_nfqueue::{Hook, Protocol, Rule};
///
/// // Sends the DNS queries of this host to four queues. Accepts them while the queue is not bound.
/// let dns = Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53);
/// let rule = dns.to_queues(0..=3).bypass(true);
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
    pub(super) action: Option<RuleAction>,
    pub(super) fanout: bool,
    pub(super) bypass: bool,
}

impl Rule {
    /// Returns a rule that matches every packet at `hook`.
    ///
    /// It needs an action: [`to_queue`](Self::to_queue), [`to_queues`](Self::to_queues),
    /// [`accept`](Self::accept) or [`drop`](Self::drop).
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
            action: None,
            fanout: false,
            bypass: false,
        }
    }

    /// Matches only packets of this transport protocol.
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// Matches only packets to this port (host byte order). The [`protocol`](Self::protocol) must
    /// be set to one that has ports.
    ///
    /// A fragment other than the first carries no port and does not match.
    pub fn destination_port(mut self, port: u16) -> Self {
        self.destination_port = Some(port);
        self
    }

    /// Matches only packets from this port (host byte order). The [`protocol`](Self::protocol) must
    /// be set to one that has ports.
    ///
    /// A fragment other than the first carries no port and does not match.
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = Some(port);
        self
    }

    /// Matches only packets of the interface with exactly this name.
    ///
    /// At `Prerouting`, `Input` and `Forward`, this is the input interface. At `Output` and
    /// `Postrouting`, it is the output interface. The interface need not exist yet.
    ///
    /// A name has 1 to 15 bytes and contains no white space, `/` or NUL.
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interface = Some(name.into());
        self
    }

    /// Matches only IPv4 packets.
    pub fn ipv4(mut self) -> Self {
        self.family = Some(Family::Ipv4);
        self
    }

    /// Matches only IPv6 packets.
    pub fn ipv6(mut self) -> Self {
        self.family = Some(Family::Ipv6);
        self
    }

    /// Matches only packets from this network.
    ///
    /// `prefix` is the prefix length in bits, at most 32 for IPv4 and 128 for IPv6. The rule then
    /// matches only packets of the family of the address.
    pub fn source_address(mut self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.source = Some(Network { address: address.into(), prefix });
        self
    }

    /// Matches only packets to this network. See [`source_address`](Self::source_address) for
    /// `prefix`.
    pub fn destination_address(mut self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.destination = Some(Network { address: address.into(), prefix });
        self
    }

    /// Matches only packets with `packet mark & mask == value`.
    ///
    /// `value` must have no bits outside `mask`. To compare the whole mark, use `u32::MAX` as
    /// `mask`. The mark of an unmarked packet is 0.
    pub fn mark(mut self, value: u32, mask: u32) -> Self {
        self.marks.push(Mark { value, mask, equal: true });
        self
    }

    /// Matches only packets with `packet mark & mask != value`.
    ///
    /// Use this to exclude packets that already have a mark from a verdict or a socket, so that a
    /// repeated packet or your own traffic is not queued again. `value` must have no bits outside
    /// `mask`.
    pub fn unless_mark(mut self, value: u32, mask: u32) -> Self {
        self.marks.push(Mark { value, mask, equal: false });
        self
    }

    /// Sends matching packets to this queue.
    ///
    /// While no socket has the queue bound, the kernel drops them, unless [`bypass`](Self::bypass)
    /// is set. Therefore bind the queue before you install the rule.
    #[doc(alias = "NFQUEUE")]
    pub fn to_queue(self, queue: u16) -> Self {
        self.to_queues(queue..=queue)
    }

    /// Distributes matching packets over several queues (queue-balance).
    ///
    /// The kernel selects the queue by a hash of both addresses, and for IPv4 also of the protocol
    /// (`nfqueue_hash`). The hash is the same for both directions of a connection. It does not
    /// contain the ports, so all connections between two hosts use the same queue. The seed of the
    /// hash is random and changes with each boot.
    ///
    /// The range must contain at least one queue. It must not contain all 65 536 queues, because
    /// the kernel stores the count in 16 bits.
    #[doc(alias = "queue-balance")]
    pub fn to_queues(mut self, queues: RangeInclusive<u16>) -> Self {
        self.action = Some(RuleAction::Queue(*queues.start(), *queues.end()));
        self
    }

    /// Accepts matching packets. The later rules of this table do not see them. Chains of other
    /// tables do.
    pub fn accept(mut self) -> Self {
        self.action = Some(RuleAction::Accept);
        self
    }

    /// Drops matching packets.
    pub fn drop(mut self) -> Self {
        self.action = Some(RuleAction::Drop);
        self
    }

    /// Selects one of [several queues](Self::to_queues) by the number of the CPU that handles the
    /// packet, not by the hash of the addresses. Default: off.
    #[doc(alias = "queue-cpu-fanout")]
    pub fn fanout(mut self, on: bool) -> Self {
        self.fanout = on;
        self
    }

    /// Accepts matching packets while no socket has the queue bound. Default: off; the kernel drops
    /// them.
    ///
    /// The effect is that of [`accept`](Self::accept): the later rules of this table do not see
    /// them.
    ///
    /// This has no effect while the queue is bound and full. For that case, use
    /// [`fail_open`](crate::QueueBuilder::fail_open).
    #[doc(alias = "queue-bypass")]
    pub fn bypass(mut self, on: bool) -> Self {
        self.bypass = on;
        self
    }

    /// Returns the action of the rule, or the reason why the rule is invalid.
    pub(super) fn check(&self) -> Result<RuleAction, &'static str> {
        if let Hook::Other(_) = self.hook {
            return Err("the hook must be prerouting, input, forward, output or postrouting");
        }
        if self.source_port.is_some() || self.destination_port.is_some() {
            match self.protocol {
                None => return Err("a port needs a protocol; set it with protocol()"),
                Some(protocol) if !protocol.has_ports() => return Err("this protocol has no ports"),
                Some(_) => {}
            }
        }
        if let Some(name) = &self.interface {
            check_interface(name)?;
        }
        let networks = || self.source.into_iter().chain(self.destination);
        if networks().any(|network| network.prefix > if network.address.is_ipv4() { 32 } else { 128 }) {
            return Err("the prefix is longer than the address");
        }
        let mut families = self.family.into_iter().chain(networks().map(Network::family));
        if let Some(first) = families.next()
            && families.any(|family| family != first)
        {
            return Err("the rule requires both IPv4 and IPv6");
        }
        if self.marks.iter().any(|mark| mark.value & !mark.mask != 0) {
            return Err("the value of the mark has bits outside the mask");
        }
        match self.action {
            None => Err("the rule has no action; set it with to_queue(), to_queues(), accept() or drop()"),
            Some(RuleAction::Queue(first, last)) if first > last => Err("the range of queues is empty"),
            Some(RuleAction::Queue(0, u16::MAX)) => {
                Err("the range of queues is too large; it can contain at most 65535 queues")
            }
            Some(RuleAction::Drop | RuleAction::Accept) if self.bypass || self.fanout => {
                Err("bypass and fanout need to_queue() or to_queues()")
            }
            Some(action) => Ok(action),
        }
    }
}

/// A transport protocol, for [`Rule::protocol`].
///
/// The rule compares it with the layer 4 protocol (`meta l4proto`). In IPv6, this is the protocol
/// after the extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// TCP, protocol 6.
    Tcp,
    /// UDP, protocol 17.
    Udp,
    /// ICMP for IPv4, protocol 1.
    Icmp,
    /// ICMPv6, protocol 58.
    Icmpv6,
    /// Any protocol, by its number in the IP header.
    Other(u8),
}

impl Protocol {
    /// The number of the protocol in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Icmp => 1,
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmpv6 => 58,
            Self::Other(number) => number,
        }
    }

    /// Whether the header of the protocol begins with source and destination port: TCP, UDP, DCCP,
    /// SCTP, UDP-Lite.
    fn has_ports(self) -> bool {
        matches!(self.number(), 6 | 17 | 33 | 132 | 136)
    }
}

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

/// All addresses with the same first `prefix` bits as `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

impl Network {
    pub(super) fn family(self) -> Family {
        if self.address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }

    /// The network mask.
    pub(super) fn mask(self) -> Vec<u8> {
        let ones = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0).to_be_bytes();
        ones[..self.octets().len()].to_vec()
    }

    /// The network address: the address with the host bits cleared.
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

/// What a rule does with matching packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RuleAction {
    /// The first and the last queue number.
    Queue(u16, u16),
    Drop,
    Accept,
}

/// Whether a condition on the interface means the input interface at this hook. At other hooks it
/// means the output interface.
pub(super) fn sees_input(hook: Hook) -> bool {
    matches!(hook, Hook::Prerouting | Hook::Input | Hook::Forward)
}

/// Checks for the same names as the kernel (`dev_valid_name`), except that `:` is not checked here.
fn check_interface(name: &str) -> Result<(), &'static str> {
    match name.len() {
        0 => Err("the interface name is empty"),
        16.. => Err("the interface name is longer than 15 bytes"),
        _ if name.bytes().any(|byte| byte == 0 || byte == b'/' || byte.is_ascii_whitespace()) => {
            Err("the interface name contains white space, '/' or NUL")
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
    fn port_needs_a_protocol_with_ports() {
        assert_eq!(queued().destination_port(53).check(), Err("a port needs a protocol; set it with protocol()"));
        for protocol in [Protocol::Icmp, Protocol::Icmpv6, Protocol::Other(47)] {
            assert_eq!(queued().protocol(protocol).source_port(53).check(), Err("this protocol has no ports"));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Other(132), Protocol::Other(6)] {
            assert_eq!(queued().protocol(protocol).source_port(0).check(), Ok(RuleAction::Queue(1, 1)));
        }
    }

    #[test]
    fn interface_name_must_be_valid_for_the_kernel() {
        for bad in ["", "sixteen-bytes-xx", "a b", "a/b", "a\0b"] {
            assert!(queued().interface(bad).check().is_err(), "{bad:?}");
        }
        for good in ["lo", "fifteen-bytes-x", "eth0.1", "ä"] {
            assert!(queued().interface(good).check().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn rule_needs_an_action_and_a_valid_range_of_queues() {
        #[expect(clippy::reversed_empty_ranges, reason = "the range must be refused")]
        let empty = 3..=2;
        assert!(Rule::new(Hook::Input).to_queues(empty).check().is_err());
        assert!(Rule::new(Hook::Input).to_queues(0..=65535).check().is_err());
        assert_eq!(Rule::new(Hook::Input).to_queues(1..=65535).check(), Ok(RuleAction::Queue(1, 65535)));
        assert!(Rule::new(Hook::Input).check().is_err());
        assert!(Rule::new(Hook::Input).accept().bypass(true).check().is_err());
        assert_eq!(Rule::new(Hook::Input).to_queue(9).drop().check(), Ok(RuleAction::Drop));
    }

    #[test]
    fn conditions_must_have_the_same_family() {
        let (v4, v6) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
        assert!(queued().source_address(v4, 33).check().is_err());
        assert!(queued().source_address(v6, 129).check().is_err());
        assert!(queued().source_address(v4, 32).destination_address(v6, 128).check().is_err());
        assert!(queued().source_address(v4, 0).ipv6().check().is_err());
        assert!(queued().source_address(v6, 0).destination_address(v6, 128).ipv6().check().is_ok());
    }

    #[test]
    fn prefix_length_gives_the_network_mask() {
        let network = |prefix| Network { address: Ipv4Addr::new(10, 11, 255, 255).into(), prefix };
        assert_eq!(network(0).mask(), [0; 4]);
        assert_eq!(network(32).mask(), [0xff; 4]);
        assert_eq!(network(20).mask(), [0xff, 0xff, 0xf0, 0]);
        assert_eq!(network(20).network(), [10, 11, 0xf0, 0]);
        let network = Network { address: Ipv6Addr::from(u128::MAX).into(), prefix: 127 };
        assert_eq!(network.network(), (u128::MAX - 1).to_be_bytes());
    }

    #[test]
    fn mark_outside_its_mask_is_refused() {
        assert!(queued().mark(0x10, 0x0f).check().is_err());
        assert!(queued().unless_mark(0x10, 0x0f).check().is_err());
        assert!(queued().mark(0, 0).mark(0x0f, 0xff).check().is_ok());
    }
}
