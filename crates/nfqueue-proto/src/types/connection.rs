//! Connections: what identifies them, and what a packet is in one.

use std::net::SocketAddr;

/// A transport protocol, by its number in the IP header. In IPv6, this is the protocol after the
/// extension headers.
///
/// `Protocol::from` returns the named variant for a number that has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
    /// Any other protocol, by its number.
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
}

impl From<u8> for Protocol {
    fn from(number: u8) -> Self {
        match number {
            1 => Self::Icmp,
            6 => Self::Tcp,
            17 => Self::Udp,
            58 => Self::Icmpv6,
            other => Self::Other(other),
        }
    }
}

/// Protocol, addresses and ports of one direction of a connection.
///
/// `Conntrack` has those of both directions, and `Divert::forget_flow` takes either.
///
/// | protocol | port of `source` | port of `destination` |
/// |---|---|---|
/// | TCP, UDP, UDP-Lite, SCTP, DCCP | the source port | the destination port |
/// | ICMP and ICMPv6 queries, such as echo | the identifier, in both directions | 0; ignored |
/// | GRE of PPTP | the call id in packets of the other direction | that in packets of this direction |
/// | others | 0 | 0 |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowTuple {
    /// The transport protocol.
    pub protocol: Protocol,
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port, of the same IP version.
    pub destination: SocketAddr,
}

impl FlowTuple {
    /// A TCP connection.
    pub fn tcp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        Self { protocol: Protocol::Tcp, source: source.into(), destination: destination.into() }
    }

    /// A flow of UDP datagrams.
    pub fn udp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        Self { protocol: Protocol::Udp, source: source.into(), destination: destination.into() }
    }

    /// The other direction, without address translation.
    #[doc(hidden)]
    pub fn reversed(self) -> Self {
        let mut reversed = Self { source: self.destination, destination: self.source, ..self };
        if self.has_identifier() {
            reversed.source.set_port(self.source.port());
            reversed.destination.set_port(0);
        }
        reversed
    }

    /// Whether the port of the source is the identifier of an ICMP query.
    #[doc(hidden)]
    pub fn has_identifier(self) -> bool {
        matches!(self.protocol, Protocol::Icmp | Protocol::Icmpv6)
    }
}

/// The state of a packet's connection, as connection tracking sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectionState {
    /// The packet is not valid in its connection. Such a packet has no entry, so
    /// `Packet::connection_state` returns `None` for it.
    Invalid,
    /// Packets in both directions have been seen.
    #[doc(alias = "IP_CT_ESTABLISHED")]
    Established,
    /// The packet opens a connection, or is an ICMP error, that belongs to another connection.
    #[doc(alias = "IP_CT_RELATED")]
    Related,
    /// The packet opens a connection, or packets in one direction only have been seen.
    #[doc(alias = "IP_CT_NEW")]
    New,
    /// The packet is excluded from connection tracking (`notrack`). Such a packet has no entry, so
    /// `Packet::connection_state` returns `None` for it.
    #[doc(alias = "IP_CT_UNTRACKED")]
    Untracked,
    /// A value of the kernel's `enum ip_conntrack_info` that this crate does not know. Rules refuse
    /// it.
    Other(u32),
}

/// The direction of a packet in its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the side that opened the connection.
    Original,
    /// To the side that opened the connection.
    Reply,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_has_the_number_it_was_made_from() {
        assert!((0..=u8::MAX).all(|number| Protocol::from(number).number() == number));
        assert_eq!(
            [1, 6, 17, 58].map(Protocol::from),
            [Protocol::Icmp, Protocol::Tcp, Protocol::Udp, Protocol::Icmpv6]
        );
    }

    #[test]
    fn both_directions_of_an_icmp_query_have_its_identifier() {
        let [client, server] = [([10, 0, 0, 1], 7), ([10, 0, 0, 2], 0)].map(SocketAddr::from);
        let ping = FlowTuple { protocol: Protocol::Icmp, source: client, destination: server };
        let reply = ping.reversed();
        assert_eq!((reply.source, reply.destination), (([10, 0, 0, 2], 7).into(), ([10, 0, 0, 1], 0).into()));
        assert_eq!(reply.reversed(), ping);
        let tcp = FlowTuple::tcp(client, server);
        assert_eq!(tcp.reversed(), FlowTuple::tcp(server, client));
    }
}
