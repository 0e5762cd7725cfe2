//! Which connection a packet belongs to, by its bytes (`nf_ct_get_tuple`).

use std::net::IpAddr;

use etherparse::{IpSlice, Ipv6ExtensionSlice, LaxIpSlice};

/// Protocol, addresses and ports of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tuple {
    source: IpAddr,
    destination: IpAddr,
    pub(super) protocol: u8,
    /// 0 for protocols without ports. For ICMP echo: the identifier, and type and code of the
    /// request, also in the tuple of a reply.
    ports: (u16, u16),
}

impl Tuple {
    /// Source and destination exchanged. For ICMP echo, no packet has the result.
    pub(super) fn reversed(self) -> Self {
        let (source, destination) = self.ports;
        Self { source: self.destination, destination: self.source, ports: (destination, source), ..self }
    }

    pub(super) fn has_ports(self) -> bool {
        matches!(self.protocol, TCP | UDP | UDP_LITE | SCTP | DCCP)
    }

    /// Whether the protocol shows which packets begin a connection.
    pub(super) fn has_first_packets(self) -> bool {
        matches!(self.protocol, TCP | SCTP | DCCP)
    }
}

/// What a packet is for its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// It begins a connection, also if there is an older one with its tuple.
    First,
    /// It begins a connection if there is none.
    Any,
    /// It begins no connection.
    Later,
    /// As `Later`; the tuple is that of the other direction.
    Reply,
    /// An ICMP error. The tuple is that of the packet that it quotes.
    Error,
}

/// A packet, as connection tracking sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) tuple: Tuple,
    pub(super) part: Part,
    /// Whether it shows that the first packet has been answered.
    pub(super) answers: bool,
    /// Whether the kernel replies to the packet if it is rejected (`nf_send_reset`, `icmp_send`).
    pub(super) gets_replies: bool,
    /// Whether it may be for another host, or of another one, than its addresses say.
    pub(super) hides_addresses: bool,
}

/// An IP packet without fragments to be reassembled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet<'a> {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    /// From the transport header on. `None` if the packet is a fragment.
    pub(super) transport: Option<&'a [u8]>,
    /// Whether it has options of IPv4, or a routing header or destination options of IPv6.
    hides_addresses: bool,
}

impl<'a> Packet<'a> {
    /// `None` if it is no IP packet, or an incomplete one.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let ip = IpSlice::from_slice(bytes).ok()?;
        let payload = ip.payload();
        let hides_addresses = match &ip {
            IpSlice::Ipv4(ip) => !ip.header().options().is_empty(),
            IpSlice::Ipv6(ip) => {
                let hides = |header| {
                    matches!(header, Ipv6ExtensionSlice::Routing(_) | Ipv6ExtensionSlice::DestinationOptions(_))
                };
                ip.extensions().clone().into_iter().any(hides)
            }
        };
        Some(Self {
            source: ip.source_addr(),
            destination: ip.destination_addr(),
            protocol: payload.ip_number.0,
            transport: (!payload.fragmented).then_some(payload.payload),
            hides_addresses,
        })
    }

    /// The beginning of a packet, in an ICMP error.
    fn quoted(bytes: &'a [u8]) -> Option<Self> {
        let (ip, _) = LaxIpSlice::from_slice(bytes).ok()?;
        let payload = ip.payload();
        Some(Self {
            source: ip.source_addr(),
            destination: ip.destination_addr(),
            protocol: payload.ip_number.0,
            transport: (!payload.fragmented).then_some(payload.payload),
            hides_addresses: false,
        })
    }

    /// The ports, as in [`FlowTuple`](crate::types::FlowTuple).
    pub(super) fn ports(&self) -> (u16, u16) {
        let ports = |at| self.transport.and_then(|transport| ports(transport.get(at..)?)).unwrap_or_default();
        match self.protocol {
            TCP | UDP | UDP_LITE | SCTP | DCCP => ports(0),
            ICMP | ICMPV6 => (ports(4).0, 0),
            _ => (0, 0),
        }
    }
}

/// Looks at a packet. `None` if it can belong to no connection: it is no whole IP packet, or ICMP
/// other than errors and echo.
pub(super) fn look(packet: &[u8]) -> Option<Seen> {
    let packet = Packet::parse(packet)?;
    let hides_addresses = packet.hides_addresses;
    if let Some(kind) = error(&packet) {
        let (tuple, _) = tuple(&Packet::quoted(kind)?)?;
        return Some(Seen { tuple, part: Part::Error, answers: false, gets_replies: false, hides_addresses });
    }
    let (tuple, is_reply) = tuple(&packet)?;
    let transport = packet.transport?;
    let (mut gets_replies, mut answers) = (true, false);
    let part = match tuple.protocol {
        TCP => {
            let flags = *transport.get(13)?;
            gets_replies = flags & tcp::RST == 0;
            answers = flags & (tcp::SYN | tcp::RST | tcp::ACK) == tcp::SYN | tcp::ACK;
            // `get_conntrack_index`, and what `tcp_new` takes for the middle of a connection.
            match flags & (tcp::SYN | tcp::RST | tcp::ACK | tcp::FIN) {
                flags if flags & (tcp::SYN | tcp::RST | tcp::ACK) == tcp::SYN => Part::First,
                tcp::ACK => Part::Any,
                _ => Part::Later,
            }
        }
        SCTP if *transport.get(4..)?.first_chunk()? == [0; 4] => Part::First,
        SCTP => {
            answers = transport.get(12) == Some(&2);
            Part::Later
        }
        // The type is in four bits.
        DCCP if transport.get(8)? >> 1 & 0xf == 0 => Part::First,
        DCCP => {
            answers = transport.get(8)? >> 1 & 0xf == 1;
            Part::Any
        }
        _ if is_reply => Part::Reply,
        _ => Part::Any,
    };
    Some(Seen { tuple, part, answers, gets_replies, hides_addresses })
}

/// The tuple, and whether the packet is the reply to an ICMP request.
fn tuple(packet: &Packet<'_>) -> Option<(Tuple, bool)> {
    let Packet { source, destination, protocol, transport, .. } = *packet;
    let transport = transport?;
    let tuple = |ports| Tuple { source, destination, protocol, ports };
    match (protocol, source) {
        (TCP | UDP | UDP_LITE | SCTP | DCCP, _) => Some((tuple(ports(transport)?), false)),
        (ICMP, IpAddr::V4(_)) | (ICMPV6, IpAddr::V6(_)) => {
            let (&kind, &code) = (transport.first()?, transport.get(1)?);
            // `invmap` of nf_conntrack_proto_icmp.c and nf_conntrack_proto_icmpv6.c.
            let (request, is_reply) = match (protocol, kind) {
                (ICMP, 8 | 13 | 15 | 17) | (ICMPV6, 128) => (kind, false),
                (ICMP, 0) => (8, true),
                (ICMP, 14 | 16 | 18) | (ICMPV6, 129) => (kind - 1, true),
                _ => return None,
            };
            let identifier = u16::from_be_bytes(*transport.get(4..)?.first_chunk()?);
            let of_request = tuple((identifier, u16::from_be_bytes([request, code])));
            let reversed = Tuple { source: destination, destination: source, ..of_request };
            Some((if is_reply { reversed } else { of_request }, is_reply))
        }
        (ICMP | ICMPV6, _) => None,
        _ => Some((tuple((0, 0)), false)),
    }
}

/// What an ICMP error quotes, if the packet is one.
fn error<'a>(packet: &Packet<'a>) -> Option<&'a [u8]> {
    let transport = packet.transport?;
    let kind = *transport.first()?;
    let is_error = match (packet.protocol, packet.source) {
        (ICMP, IpAddr::V4(_)) => matches!(kind, 3 | 4 | 5 | 11 | 12),
        (ICMPV6, IpAddr::V6(_)) => matches!(kind, 1..=4),
        _ => false,
    };
    transport.get(8..).filter(|_| is_error)
}

fn ports(transport: &[u8]) -> Option<(u16, u16)> {
    let [a, b, c, d] = *transport.first_chunk()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const DCCP: u8 = 33;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SCTP: u8 = 132;
pub(super) const UDP_LITE: u8 = 136;

mod tcp {
    pub(super) const FIN: u8 = 0x01;
    pub(super) const SYN: u8 = 0x02;
    pub(super) const RST: u8 = 0x04;
    pub(super) const ACK: u8 = 0x10;
}

#[cfg(test)]
mod tests {
    use super::{super::TestPacket, *};

    const V4: [&str; 2] = ["10.0.0.1", "10.0.0.2"];
    const V6: [&str; 2] = ["fd00::1", "fd00::2"];

    fn addresses(names: [&str; 2]) -> [IpAddr; 2] {
        names.map(|name| name.parse().unwrap())
    }

    fn of(names: [&str; 2], protocol: u8, transport: &[u8]) -> Option<Seen> {
        let [source, destination] = addresses(names);
        look(TestPacket::ip(source, destination, protocol.into(), transport).payload())
    }

    fn tcp_segment(flags: u8) -> [u8; 20] {
        let mut bytes = [0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0];
        bytes[13] = flags;
        bytes
    }

    #[test]
    fn the_first_packets_of_connections_are_known() {
        const PUSH: u8 = 0x08;
        for (flags, part, gets_replies) in [
            (tcp::SYN, Part::First, true),
            (tcp::SYN | tcp::FIN | PUSH, Part::First, true),
            (tcp::SYN | tcp::ACK, Part::Later, true),
            (tcp::ACK, Part::Any, true),
            (tcp::ACK | PUSH, Part::Any, true),
            (tcp::FIN | tcp::ACK, Part::Later, true),
            (tcp::RST, Part::Later, false),
            (tcp::RST | tcp::ACK, Part::Later, false),
            (tcp::SYN | tcp::RST, Part::Later, false),
            (0, Part::Later, true),
        ] {
            let seen = of(V4, TCP, &tcp_segment(flags)).unwrap();
            assert_eq!((seen.part, seen.gets_replies), (part, gets_replies), "{flags:#x}");
        }
        let sctp = |tag| of(V6, SCTP, &[&[0, 1, 0, 2][..], &[0, 0, 0, tag], &[0; 8]].concat()).unwrap().part;
        assert_eq!([sctp(0), sctp(1)], [Part::First, Part::Later]);
        let dccp = |kind: u8| of(V4, DCCP, &[&[0, 1, 0, 2, 4, 0, 0, 0][..], &[kind << 1], &[0; 7]].concat()).unwrap();
        assert_eq!([dccp(0).part, dccp(2).part], [Part::First, Part::Any]);
        for protocol in [UDP, UDP_LITE, 47, 50] {
            assert_eq!(of(V4, protocol, &[0; 8]).unwrap().part, Part::Any);
        }
    }

    #[test]
    fn both_directions_have_one_tuple() {
        for names in [V4, V6] {
            let [one, other] = [names, [names[1], names[0]]];
            let there = of(one, UDP, &[0, 1, 0, 2, 0, 8, 0, 0]).unwrap().tuple;
            let back = of(other, UDP, &[0, 2, 0, 1, 0, 8, 0, 0]).unwrap().tuple;
            assert_eq!(there, back.reversed());
            assert_ne!(there, of(one, TCP, &tcp_segment(0)).unwrap().tuple);
        }
    }

    #[test]
    fn echo_replies_belong_to_their_request() {
        for (names, protocol, kinds) in [(V4, ICMP, [8, 0]), (V4, ICMP, [13, 14]), (V6, ICMPV6, [128, 129])] {
            let echo = |names, kind, id| of(names, protocol, &[kind, 0, 0, 0, 0, id, 0, 1]).unwrap();
            let request = echo(names, kinds[0], 7);
            let reply = echo([names[1], names[0]], kinds[1], 7);
            assert_eq!((request.part, reply.part), (Part::Any, Part::Reply));
            assert_eq!(request.tuple, reply.tuple);
            assert_ne!(request.tuple, echo(names, kinds[0], 8).tuple);
            // A request of the other side is not of this connection.
            let other = echo([names[1], names[0]], kinds[0], 7);
            assert!(other.tuple != request.tuple && other.tuple != request.tuple.reversed());
        }
    }

    #[test]
    fn errors_belong_to_what_they_quote() {
        for (names, protocol, kind) in [(V4, ICMP, 3), (V4, ICMP, 11), (V6, ICMPV6, 1), (V6, ICMPV6, 3)] {
            let [source, destination] = addresses(names);
            let quoted = TestPacket::ip(source, destination, TCP.into(), &tcp_segment(tcp::ACK));
            let whole = quoted.payload();
            // The header and eight bytes.
            let quote = &whole[..whole.len() - 12];
            let error = of([names[1], names[0]], protocol, &[&[kind, 0, 0, 0, 0, 0, 0, 0], quote].concat()).unwrap();
            assert_eq!((error.part, error.tuple, error.gets_replies), (Part::Error, look(whole).unwrap().tuple, false));
        }
    }

    #[test]
    fn other_packets_belong_to_no_connection() {
        let [source, destination] = addresses(V4);
        let mut fragment = TestPacket::ip(source, destination, UDP.into(), &[0; 8]).payload().to_vec();
        fragment[6] = 0x20;
        let whole = TestPacket::ip(source, destination, UDP.into(), &[0; 8]).payload().to_vec();
        for bytes in [&[][..], &[0x45; 19], &[0; 40], &fragment, &whole[..24]] {
            assert_eq!(look(bytes), None, "{bytes:?}");
        }
        // Router and neighbour discovery, an error that quotes nothing, the ICMP of the other IP
        // version, headers that end early.
        for (names, protocol, transport) in [
            (V4, ICMP, &[9, 0, 0, 0, 0, 0, 0, 0][..]),
            (V6, ICMPV6, &[135, 0, 0, 0, 0, 0, 0, 0]),
            (V4, ICMP, &[3, 0, 0, 0, 0, 0, 0, 0]),
            (V4, ICMPV6, &[128, 0, 0, 0, 0, 1, 0, 0]),
            (V4, UDP, &[0, 1, 0]),
            (V4, TCP, &[0, 1, 0, 2]),
            (V4, SCTP, &[0, 1, 0, 2]),
        ] {
            assert_eq!(of(names, protocol, transport), None, "{protocol} {transport:?}");
        }
    }
}
