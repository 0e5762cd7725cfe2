//! The tuples of connection tracking: what is in `CTA_TUPLE_ORIG`, `CTA_TUPLE_REPLY` and the like
//! (uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::NLA_F_NESTED;

use super::{packet::find, writer::put_attribute};
use crate::types::FlowTuple;

/// Decodes the attributes of a tuple. `None` if the addresses or the protocol are missing or
/// malformed.
///
/// Of protocols without ports, the kernel sends the number alone, of ICMP queries their identifier,
/// type and code, and of GRE the keys in the place of the ports.
pub fn decode(tuple: &[u8]) -> Option<FlowTuple> {
    let (ip, proto) = (find(tuple, IP)?, find(tuple, PROTO)?);
    let protocol = (*find(proto, PROTO_NUM)?.first()?).into();
    let number = |kind| Some(u16::from_be_bytes(find(proto, kind)?.try_into().ok()?));
    let identifier = || number(PROTO_ICMP_ID).or_else(|| number(PROTO_ICMPV6_ID));
    let endpoint = |[v4, v6]: [u16; 2], port: Option<u16>| -> Option<SocketAddr> {
        let address = match find(ip, v4) {
            Some(octets) => IpAddr::from(<[u8; 4]>::try_from(octets).ok()?),
            None => IpAddr::from(<[u8; 16]>::try_from(find(ip, v6)?).ok()?),
        };
        Some(SocketAddr::new(address, port.unwrap_or(0)))
    };
    Some(FlowTuple {
        protocol,
        source: endpoint(IP_SRC, number(PROTO_SRC_PORT).or_else(identifier))?,
        destination: endpoint(IP_DST, number(PROTO_DST_PORT))?,
    })
}

/// Encodes the attributes of a tuple. Protocols without ports have ports of 0.
pub fn encode(tuple: FlowTuple) -> Vec<u8> {
    let (mut ip, mut proto, mut nested) = (Vec::new(), Vec::new(), Vec::new());
    for (kinds, address) in [(IP_SRC, tuple.source.ip()), (IP_DST, tuple.destination.ip())] {
        match address {
            IpAddr::V4(address) => put_attribute(&mut ip, kinds[0], &address.octets()),
            IpAddr::V6(address) => put_attribute(&mut ip, kinds[1], &address.octets()),
        }
    }
    put_attribute(&mut proto, PROTO_NUM, &[tuple.protocol.number()]);
    let numbers = [tuple.source.port(), tuple.destination.port()].map(u16::to_be_bytes);
    if tuple.has_identifier() {
        let kind = if tuple.source.is_ipv4() { PROTO_ICMP_ID } else { PROTO_ICMPV6_ID };
        put_attribute(&mut proto, kind, &numbers[0]);
    } else {
        put_attribute(&mut proto, PROTO_SRC_PORT, &numbers[0]);
        put_attribute(&mut proto, PROTO_DST_PORT, &numbers[1]);
    }
    put_attribute(&mut nested, IP | NLA_F_NESTED, &ip);
    put_attribute(&mut nested, PROTO | NLA_F_NESTED, &proto);
    nested
}

// enum ctattr_tuple
const IP: u16 = 1;
const PROTO: u16 = 2;
// enum ctattr_ip: of IPv4 and of IPv6
const IP_SRC: [u16; 2] = [1, 3];
const IP_DST: [u16; 2] = [2, 4];
// enum ctattr_l4proto
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const PROTO_ICMP_ID: u16 = 4;
const PROTO_ICMPV6_ID: u16 = 7;

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::types::Protocol;

    /// As the kernel sends a tuple: addresses of IPv4, and what is known of the protocol.
    fn sent(proto: &[(u16, &[u8])]) -> Vec<u8> {
        let nest = |parts: &[(u16, &[u8])]| {
            let mut bytes = Vec::new();
            parts.iter().for_each(|(kind, value)| put_attribute(&mut bytes, *kind, value));
            bytes
        };
        let ip = nest(&[(1, &[10, 0, 0, 1]), (2, &[10, 0, 0, 2])]);
        nest(&[(0x8001, &ip), (0x8002, &nest(proto))])
    }

    #[test]
    fn protocols_have_ports_identifiers_keys_or_none() {
        let id: &[u8] = &[0, 7];
        for (proto, protocol, ports) in [
            (vec![(1, &[17_u8][..]), (2, &[0, 53]), (3, &[0x1f, 0x90])], Protocol::Udp, (53, 8080)),
            (vec![(1, &[1]), (4, id), (5, &[8]), (6, &[0])], Protocol::Icmp, (7, 0)),
            (vec![(1, &[58]), (7, id), (8, &[128]), (9, &[0])], Protocol::Icmpv6, (7, 0)),
            (vec![(1, &[47]), (2, &[1, 0]), (3, &[0, 1])], Protocol::Other(47), (256, 1)),
            (vec![(1, &[50])], Protocol::Other(50), (0, 0)),
        ] {
            let tuple = FlowTuple {
                protocol,
                source: ([10, 0, 0, 1], ports.0).into(),
                destination: ([10, 0, 0, 2], ports.1).into(),
            };
            assert_eq!(decode(&sent(&proto)), Some(tuple));
        }
        assert_eq!(decode(&sent(&[])), None, "a tuple without a protocol");
    }

    proptest! {
        #[test]
        fn a_tuple_is_decoded_as_it_was_encoded(
            protocol: u8, v6: bool, source: u128, destination: u128, ports: (u16, u16),
        ) {
            let address = |number: u128| match v6 {
                true => IpAddr::from(Ipv6Addr::from(number)),
                false => IpAddr::from(Ipv4Addr::from(number as u32)),
            };
            let mut tuple = FlowTuple {
                protocol: protocol.into(),
                source: SocketAddr::new(address(source), ports.0),
                destination: SocketAddr::new(address(destination), ports.1),
            };
            if tuple.has_identifier() {
                tuple.destination.set_port(0);
            }
            prop_assert_eq!(decode(&encode(tuple)), Some(tuple));
        }

        #[test]
        fn damaged_tuples_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode(&bytes);
        }
    }
}
