//! What identifies a connection.

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
