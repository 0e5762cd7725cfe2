//! The tuple of a connection: version, protocol, addresses and ports of its first packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::MetaKey;
use nfqueue_proto::types::{FlowTuple, Protocol};

use super::{
    encoder::{Encoder, Endpoint, IPV4_ADDRESS, IPV6_ADDRESS, PORT, PROTOCOL, REG_1, ValueType, concatenated, number},
    family::IpVersion,
};

/// Whether both are the same connection.
pub(super) fn same_connection(flow: FlowTuple, other: FlowTuple) -> bool {
    [other, other.reversed()].into_iter().any(|other| key_of(flow) == key_of(other))
}

/// The connection with this key, whose destination has been translated to what the data says.
pub(super) fn translated_flow(key: &[u8], data: &[u8]) -> Option<FlowTuple> {
    let address_length = if key.len() == 20 { 4 } else { 16 };
    let ip = |bytes: &[u8]| -> Option<IpAddr> {
        Some(match <[u8; 4]>::try_from(bytes) {
            Ok(octets) => Ipv4Addr::from(octets).into(),
            Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into(),
        })
    };
    let port = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let source = SocketAddr::new(ip(key.get(..address_length)?)?, port(key, 2 * address_length + 4)?);
    let destination = SocketAddr::new(ip(data.get(..address_length)?)?, port(data, address_length)?);
    Some(FlowTuple { protocol: (*key.get(2 * address_length)?).into(), source, destination })
}

/// The IP version. `None` if the addresses are of different versions.
pub(super) fn version_of(flow: FlowTuple) -> Option<IpVersion> {
    match (flow.source, flow.destination) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) => Some(IpVersion::V4),
        (SocketAddr::V6(_), SocketAddr::V6(_)) => Some(IpVersion::V6),
        _ => None,
    }
}

/// The key of a connection, as [`load`] loads it.
pub(super) fn key_of(flow: FlowTuple) -> Vec<u8> {
    let address = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let port = |port: u16| [port.to_be_bytes(), [0; 2]].concat();
    // Of ICMP, type and code of an echo request.
    let destination_port = match flow.protocol {
        Protocol::Icmp => 8 << 8,
        Protocol::Icmpv6 => 128 << 8,
        _ => flow.destination.port(),
    };
    [
        address(flow.source.ip()),
        address(flow.destination.ip()),
        vec![flow.protocol.number(), 0, 0, 0],
        port(flow.source.port()),
        port(destination_port),
    ]
    .concat()
}

/// The ports of a connection, as [`load_ports`] loads them.
pub(super) fn ports_key_of(flow: FlowTuple) -> Vec<u8> {
    let key = key_of(flow);
    key[key.len() - ports_key().0..].to_vec()
}

/// Whose addresses and ports a rule loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// Those of the connection: of the first packet, before address translation.
    Connection,
    /// Those of the other side's packets, before address translation.
    ConnectionReversed,
    /// Those of the connection's ends: of the sender of the first packet, and of the sender of the
    /// replies, each as it knows itself.
    Ends,
    /// The same, exchanged.
    EndsReversed,
    /// Those of the packet.
    Packet,
    /// The same, source and destination exchanged.
    PacketReversed,
    /// Those of the packet that an ICMP error quotes. [`Match::icmp_about`] must come before.
    ///
    /// [`Match::icmp_about`]: super::matching::Match::icmp_about
    Quoted(IpVersion),
    /// The same, source and destination exchanged.
    QuotedReversed(IpVersion),
    /// Those of the echo request that an echo reply answers.
    EchoReply(IpVersion),
    /// Those of an echo request.
    EchoRequest(IpVersion),
    /// Those of a packet whose protocol has no ports.
    WithoutPorts,
}

impl Of {
    pub(super) fn reversed(self) -> Self {
        match self {
            Self::Connection => Self::ConnectionReversed,
            Self::ConnectionReversed => Self::Connection,
            Self::Ends => Self::EndsReversed,
            Self::EndsReversed => Self::Ends,
            Self::Packet => Self::PacketReversed,
            Self::PacketReversed => Self::Packet,
            Self::Quoted(version) => Self::QuotedReversed(version),
            Self::WithoutPorts => Self::WithoutPorts,
            // Of ICMP, no packet has the reversed tuple.
            Self::QuotedReversed(version) | Self::EchoReply(version) | Self::EchoRequest(version) => {
                Self::Quoted(version)
            }
        }
    }

    pub(super) fn both(self) -> [Self; 2] {
        [self, self.reversed()]
    }

    /// Of a connection: the fields and their directions, given those of source and destination.
    fn of_connection(self, [source, destination]: [u32; 2]) -> Option<[(u32, u8); 2]> {
        match self {
            Self::Connection => Some([(source, IP_CT_DIR_ORIGINAL), (destination, IP_CT_DIR_ORIGINAL)]),
            Self::ConnectionReversed => Some([(source, IP_CT_DIR_REPLY), (destination, IP_CT_DIR_REPLY)]),
            Self::Ends => Some([(source, IP_CT_DIR_ORIGINAL), (source, IP_CT_DIR_REPLY)]),
            Self::EndsReversed => Some([(source, IP_CT_DIR_REPLY), (source, IP_CT_DIR_ORIGINAL)]),
            _ => None,
        }
    }

    /// Of a source and a destination, the one that comes first, and the other.
    fn order<T>(self, source: T, destination: T) -> [T; 2] {
        match self {
            Self::ConnectionReversed
            | Self::EndsReversed
            | Self::PacketReversed
            | Self::QuotedReversed(_)
            | Self::EchoReply(_) => [destination, source],
            _ => [source, destination],
        }
    }
}

/// The fields of a key.
fn fields(version: IpVersion) -> [ValueType; 5] {
    let address = match version {
        IpVersion::V4 => IPV4_ADDRESS,
        IpVersion::V6 => IPV6_ADDRESS,
    };
    [address, address, PROTOCOL, PORT, PORT]
}

/// Loads addresses, protocol and ports into the registers from `register` on.
pub(super) fn load(version: IpVersion, of: Of, mut register: u32, encoder: &mut Encoder) {
    let words = fields(version)[0].length as u32 / 4;
    let keys = match version {
        IpVersion::V4 => [CT_SRC_IP, CT_DST_IP],
        IpVersion::V6 => [CT_SRC_IP6, CT_DST_IP6],
    };
    if let Some(fields) = of.of_connection(keys) {
        for (key, direction) in fields {
            load_field(key, direction, register, encoder);
            register += words;
        }
        load_field(CT_PROTOCOL, IP_CT_DIR_ORIGINAL, register, encoder);
    } else {
        let quoted = matches!(of, Of::Quoted(_) | Of::QuotedReversed(_));
        for end in of.order(Endpoint::Source, Endpoint::Destination) {
            if quoted {
                encoder.quoted_address(version, end, register);
            } else {
                encoder.address(version, end, register);
            }
            register += words;
        }
        if quoted {
            encoder.quoted_protocol(version, register);
        } else {
            encoder.meta_into(MetaKey::L4Proto, register);
        }
    }
    load_ports(of, register + 1, encoder);
}

/// Loads the ports into two registers. For protocols without ports, those of the connection are
/// numbers that connection tracking uses in their place.
pub(super) fn load_ports(of: Of, register: u32, encoder: &mut Encoder) {
    if let Some(fields) = of.of_connection([CT_PROTO_SRC, CT_PROTO_DST]) {
        for ((key, direction), register) in fields.into_iter().zip(register..) {
            load_field(key, direction, register, encoder);
        }
        return;
    }
    match of {
        Of::EchoReply(version) => return encoder.echo_reply(version, register),
        Of::EchoRequest(_) => return encoder.echo_request(register),
        Of::WithoutPorts => return encoder.no_ports(register),
        _ => {}
    }
    for (end, register) in of.order(Endpoint::Source, Endpoint::Destination).into_iter().zip(register..) {
        match of {
            Of::Quoted(version) | Of::QuotedReversed(version) => encoder.quoted_port(version, end, register),
            _ => encoder.port(end, register),
        }
    }
}

/// Loads the protocol of the packet's connection into the first register.
pub(super) fn load_protocol(encoder: &mut Encoder) {
    load_field(CT_PROTOCOL, IP_CT_DIR_ORIGINAL, REG_1, encoder);
}

/// Loads the ports with which the replies of the packet's connection arrive into two registers.
pub(super) fn load_reply_ports(register: u32, encoder: &mut Encoder) {
    load_field(CT_PROTO_SRC, IP_CT_DIR_REPLY, register, encoder);
    load_field(CT_PROTO_DST, IP_CT_DIR_REPLY, register + 1, encoder);
}

fn load_field(key: u32, direction: u8, register: u32, encoder: &mut Encoder) {
    let attributes =
        [number(NFTA_CT_DREG, register), number(NFTA_CT_KEY, key), DefaultNla::new(NFTA_CT_DIRECTION, vec![direction])];
    encoder.expression("ct", &attributes);
}

/// The tuple in the language of nft. It names the fields of the packet, because nft has no type for
/// the ports of a connection whose protocol it does not know.
pub(super) fn nft(version: IpVersion, of: Of) -> String {
    let ip = match version {
        IpVersion::V4 => "ip",
        IpVersion::V6 => "ip6",
    };
    let [first, second] = of.order("s", "d");
    format!("{ip} {first}addr . {ip} {second}addr . meta l4proto . {}", nft_ports(of))
}

pub(super) fn nft_ports(of: Of) -> String {
    let [first, second] = of.order("s", "d");
    format!("th {first}port . th {second}port")
}

/// Length and type of a key.
pub(super) fn key(version: IpVersion) -> (usize, u32) {
    let fields = fields(version);
    let length = fields.iter().map(|value_type| value_type.length.next_multiple_of(4)).sum();
    (length, concatenated(fields))
}

/// Loads the address and the port to which the destination of the packet's connection has been
/// translated.
pub(super) fn load_translated(version: IpVersion, register: u32, encoder: &mut Encoder) {
    let (address, words) = match version {
        IpVersion::V4 => (CT_SRC_IP, 1),
        IpVersion::V6 => (CT_SRC_IP6, 4),
    };
    load_field(address, IP_CT_DIR_REPLY, register, encoder);
    load_field(CT_PROTO_SRC, IP_CT_DIR_REPLY, register + words, encoder);
}

/// Length and type of what [`load_translated`] loads.
pub(super) fn translated(version: IpVersion) -> (usize, u32) {
    let address = fields(version)[0];
    (address.length + 4, concatenated([address, PORT]))
}

/// Length and type of a key of ports.
pub(super) fn ports_key() -> (usize, u32) {
    (8, concatenated([PORT, PORT]))
}

/// The type of the elements in the language of nft.
pub(super) fn nft_type(version: IpVersion) -> String {
    let address = match version {
        IpVersion::V4 => "ipv4_addr",
        IpVersion::V6 => "ipv6_addr",
    };
    format!("{address} . {address} . inet_proto . inet_service . inet_service")
}

// uapi/linux/netfilter/nf_tables.h
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_DIRECTION: u16 = 3;
const IP_CT_DIR_ORIGINAL: u8 = 0;
const IP_CT_DIR_REPLY: u8 = 1;
const CT_PROTOCOL: u32 = 10;
const CT_PROTO_SRC: u32 = 11;
const CT_PROTO_DST: u32 = 12;
const CT_SRC_IP: u32 = 19;
const CT_DST_IP: u32 = 20;
const CT_SRC_IP6: u32 = 21;
const CT_DST_IP6: u32 = 22;

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV6;

    use super::*;

    #[test]
    fn keys_are_as_the_registers() {
        let tuple = FlowTuple::udp(([10, 0, 0, 1], 0x1234), ([10, 0, 0, 2], 53));
        assert_eq!(key_of(tuple), [10, 0, 0, 1, 10, 0, 0, 2, 17, 0, 0, 0, 0x12, 0x34, 0, 0, 0, 53, 0, 0]);
        assert_eq!(key(IpVersion::V4).0, key_of(tuple).len());
        let tuple = FlowTuple::tcp(([1_u16; 8], 1), ([2_u16; 8], 2));
        assert_eq!(key(IpVersion::V6).0, key_of(tuple).len());
    }

    #[test]
    fn connections_are_named_by_either_direction_and_by_translated_addresses() {
        let [client, server, service] =
            [([10, 0, 0, 1], 7), ([10, 0, 0, 2], 8), ([10, 0, 0, 3], 9)].map(SocketAddr::from);
        let flow = FlowTuple::udp(client, service);
        assert!(same_connection(flow, flow) && same_connection(flow, flow.reversed()));
        assert!(!same_connection(flow, FlowTuple::tcp(client, service)));
        let data = [10, 0, 0, 2, 0, 8, 0, 0];
        assert_eq!(translated_flow(&key_of(flow), &data), Some(FlowTuple::udp(client, server)));
        for length in 0..20 {
            assert_eq!(translated_flow(&key_of(flow)[..length], &data), None);
        }
        assert_eq!(translated_flow(&key_of(flow), &data[..5]), None);
        let v6 = FlowTuple::tcp(([1_u16; 8], 1), ([2_u16; 8], 2));
        let data = [[3; 16].as_slice(), &[0, 3, 0, 0]].concat();
        assert_eq!(translated_flow(&key_of(v6), &data).unwrap().destination, ([0x0303_u16; 8], 3).into());
        // Scopes are those of this host's interfaces.
        let scoped = |scope| SocketAddrV6::new([0xfe80_u16; 8].into(), 1, 0, scope);
        assert!(same_connection(FlowTuple::tcp(scoped(0), scoped(0)), FlowTuple::tcp(scoped(2), scoped(2))));
        // Echo requests have an identifier in both directions.
        let ping = |source, destination| FlowTuple { protocol: Protocol::Icmp, source, destination };
        let reply = ping(SocketAddr::new(server.ip(), 7), SocketAddr::new(client.ip(), 99));
        assert!(same_connection(ping(client, server), reply));
        assert_eq!(key_of(ping(client, server).reversed())[12..], [0, 7, 0, 0, 8, 0, 0, 0]);
    }
}
