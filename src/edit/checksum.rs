//! Computes Internet checksums (RFC 1071) in place, with the sums of etherparse.

use etherparse::checksum::Sum16BitWords;

use super::layout::{Layout, Transport, Version};

/// Computes the checksums of a complete packet: of the IPv4 header, and of TCP, UDP, ICMP or
/// ICMPv6.
///
/// A UDP datagram over IPv4 without a checksum (0) stays without one. Over IPv6 it gets a checksum,
/// which every receiver accepts.
///
/// A UDP super-packet gets the sum of the pseudo header instead. `__udp_gso_segment`
/// (net/ipv4/udp_offload.c) computes the checksums of the segments from that sum, also if the
/// packet is not marked as `CHECKSUM_PARTIAL`. TCP segmentation computes the checksums from the
/// start.
pub(super) fn complete(packet: &mut [u8], layout: &Layout, gso: bool) {
    if layout.version == Version::V4 {
        let header = usize::from(packet[0] & 0xf) * 4;
        packet[10..12].fill(0);
        let sum = Sum16BitWords::new().add_slice(&packet[..header]);
        // The sum adds the words in their memory order, so its bytes are native-endian here and
        // below.
        packet[10..12].copy_from_slice(&sum.ones_complement().to_ne_bytes());
    }
    let Ok(transport) = layout.editable() else { return };
    let at = layout.at + transport.checksum_at();
    if transport == Transport::Udp && layout.version == Version::V4 && packet[at..at + 2] == [0, 0] {
        return;
    }
    packet[at..at + 2].fill(0);
    let pseudo_header = pseudo_header(packet, layout, transport, layout.destination);
    let checksum = if gso && transport == Transport::Udp {
        (!pseudo_header.ones_complement()).to_ne_bytes()
    } else {
        to_checksum(&pseudo_header.add_slice(&packet[layout.at..layout.payload_end]), transport)
    };
    packet[at..at + 2].copy_from_slice(&checksum);
}

/// Whether the transport checksum is incomplete (`CHECKSUM_PARTIAL`, include/linux/skbuff.h).
///
/// An incomplete checksum is the sum of the pseudo header only. The interface adds the rest.
///
/// A UDP socket with an IPv4 source route sums the next hop instead of the final destination
/// (`udp_send_skb`; seen on Linux 6.18). This also counts as incomplete, although the interface
/// would complete it to a wrong checksum.
pub(super) fn is_partial(packet: &[u8], layout: &Layout) -> bool {
    let Ok(transport) = layout.editable() else { return false };
    let at = layout.at + transport.checksum_at();
    let is_sum_with = |destination| {
        let sum = !pseudo_header(packet, layout, transport, destination).ones_complement();
        packet[at..at + 2] == sum.to_ne_bytes()
    };
    transport.has_ports() && [layout.destination, layout.version.destination_at()].into_iter().any(is_sum_with)
}

/// Updates the transport checksum `old` for a change of the covered bytes `from` to `to` (RFC
/// 1624).
pub(super) fn adjusted(old: [u8; 2], from: &[u8], to: &[u8], transport: Transport) -> [u8; 2] {
    // ~(~old + ~from + to). The complement of a sum equals the sum of the complements of its words.
    let removed = Sum16BitWords::new().add_slice(from).ones_complement().to_ne_bytes();
    let sum = Sum16BitWords::new().add_2bytes(old.map(|byte| !byte)).add_2bytes(removed).add_slice(to);
    to_checksum(&sum, transport)
}

fn to_checksum(sum: &Sum16BitWords, transport: Transport) -> [u8; 2] {
    match transport {
        // A UDP checksum of 0 means that the datagram has none.
        Transport::Udp => sum.to_ones_complement_with_no_zero(),
        _ => sum.ones_complement(),
    }
    .to_ne_bytes()
}

/// The sum of the pseudo header, with the destination address at offset `destination`.
fn pseudo_header(packet: &[u8], layout: &Layout, transport: Transport, destination: usize) -> Sum16BitWords {
    let (source, address_len) = match (layout.version, transport) {
        (Version::V4, Transport::Icmpv4) => return Sum16BitWords::new(),
        (Version::V4, _) => (12, 4),
        (Version::V6, _) => (8, 16),
    };
    let length = (layout.payload_end - layout.at) as u32;
    Sum16BitWords::new()
        .add_slice(&packet[source..source + address_len])
        .add_slice(&packet[destination..destination + address_len])
        .add_2bytes([0, layout.protocol.0])
        .add_slice(&length.to_be_bytes())
}
