//! The tuple of a connection: version, protocol, addresses and ports of its first packet.

use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::DefaultNla;

use super::{
    encoder::{Encoder, IPV4_ADDRESS, IPV6_ADDRESS, PORT, PROTOCOL, ValueType, concatenated, number},
    family::IpVersion,
};

/// The addresses and ports of a connection, in either direction, for
/// [`Divert::forget_flow`](super::Divert::forget_flow).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowTuple {
    /// The number of the transport protocol: 6 for TCP, 17 for UDP.
    pub protocol: u8,
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
}

impl FlowTuple {
    /// A TCP connection.
    pub fn tcp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        Self { protocol: 6, source: source.into(), destination: destination.into() }
    }

    /// A flow of UDP datagrams.
    pub fn udp(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> Self {
        Self { protocol: 17, source: source.into(), destination: destination.into() }
    }

    pub(super) fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }

    /// The IP version. `None` if the addresses are of different versions.
    pub(super) fn version(self) -> Option<IpVersion> {
        match (self.source, self.destination) {
            (SocketAddr::V4(_), SocketAddr::V4(_)) => Some(IpVersion::V4),
            (SocketAddr::V6(_), SocketAddr::V6(_)) => Some(IpVersion::V6),
            _ => None,
        }
    }

    /// The key, as [`load`] loads it.
    pub(super) fn key(self) -> Vec<u8> {
        let address = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let port = |port: u16| [port.to_be_bytes(), [0; 2]].concat();
        [
            address(self.source.ip()),
            address(self.destination.ip()),
            vec![self.protocol, 0, 0, 0],
            port(self.source.port()),
            port(self.destination.port()),
        ]
        .concat()
    }
}

/// The fields of a key, for the packet's own direction or for the other: number and type.
fn fields(version: IpVersion, reversed: bool) -> [(u32, ValueType); 5] {
    let (source, destination, address) = match version {
        IpVersion::V4 => (CT_SRC_IP, CT_DST_IP, IPV4_ADDRESS),
        IpVersion::V6 => (CT_SRC_IP6, CT_DST_IP6, IPV6_ADDRESS),
    };
    let ends = [(source, destination), (CT_PROTO_SRC, CT_PROTO_DST)];
    let [(a, b), (c, d)] = if reversed { ends.map(|(source, destination)| (destination, source)) } else { ends };
    [(a, address), (b, address), (CT_PROTOCOL, PROTOCOL), (c, PORT), (d, PORT)]
}

/// Loads the original tuple of the packet's connection into the registers from `register` on.
pub(super) fn load(version: IpVersion, reversed: bool, mut register: u32, encoder: &mut Encoder) {
    for (key, value_type) in fields(version, reversed) {
        let attributes = vec![
            number(NFTA_CT_DREG, register),
            number(NFTA_CT_KEY, key),
            DefaultNla::new(NFTA_CT_DIRECTION, vec![IP_CT_DIR_ORIGINAL]),
        ];
        encoder.other("ct", attributes);
        register += value_type.length.div_ceil(4) as u32;
    }
}

/// The tuple in the language of nft. It names the fields of the packet, because nft has no type for
/// the ports of a connection whose protocol it does not know. The packet is the first one of its
/// connection, so they are the same but for NAT, and for protocols without ports.
pub(super) fn nft(version: IpVersion, reversed: bool) -> String {
    let ends = if reversed { ["d", "s"] } else { ["s", "d"] };
    let ip = match version {
        IpVersion::V4 => "ip",
        IpVersion::V6 => "ip6",
    };
    let [first, second] = ends;
    format!("{ip} {first}addr . {ip} {second}addr . meta l4proto . th {first}port . th {second}port")
}

/// Length and type of a key.
pub(super) fn key(version: IpVersion) -> (usize, u32) {
    let fields = fields(version, false);
    let length = fields.iter().map(|(_, value_type)| value_type.length.next_multiple_of(4)).sum();
    (length, concatenated(fields.iter().map(|(_, value_type)| *value_type)))
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
const CT_PROTOCOL: u32 = 10;
const CT_PROTO_SRC: u32 = 11;
const CT_PROTO_DST: u32 = 12;
const CT_SRC_IP: u32 = 19;
const CT_DST_IP: u32 = 20;
const CT_SRC_IP6: u32 = 21;
const CT_DST_IP6: u32 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_as_the_registers() {
        let tuple = FlowTuple::udp(([10, 0, 0, 1], 0x1234), ([10, 0, 0, 2], 53));
        assert_eq!(tuple.key(), [10, 0, 0, 1, 10, 0, 0, 2, 17, 0, 0, 0, 0x12, 0x34, 0, 0, 0, 53, 0, 0]);
        assert_eq!(key(IpVersion::V4).0, tuple.key().len());
        let tuple = FlowTuple::tcp(([1_u16; 8], 1), ([2_u16; 8], 2));
        assert_eq!(key(IpVersion::V6).0, tuple.key().len());
        assert_eq!(tuple.reversed().reversed(), tuple);
    }
}
