//! Segmentation of super-packets (`skb_gso_segment`).

use bytes::Bytes;
use etherparse::{IpHeaders, PacketHeaders, PayloadSlice, TransportHeader};

use super::packet::TestPacket;

/// The segments of a packet, each with full checksums. The packet itself if it cannot be segmented.
pub(super) fn segments(packet: &TestPacket) -> Vec<TestPacket> {
    let size = usize::from(packet.segment_size);
    match split(&packet.payload, size) {
        Some(parts) if !parts.is_empty() => parts.into_iter().map(|payload| packet.segment(payload)).collect(),
        _ => vec![packet.segment(packet.payload.clone())],
    }
}

fn split(bytes: &[u8], size: usize) -> Option<Vec<Bytes>> {
    let headers = PacketHeaders::from_ip_slice(bytes).ok()?;
    let ip = match headers.net? {
        etherparse::NetHeaders::Ipv4(header, extensions) => IpHeaders::Ipv4(header, extensions),
        etherparse::NetHeaders::Ipv6(header, extensions) => IpHeaders::Ipv6(header, extensions),
        _ => return None,
    };
    let transport = headers.transport?;
    let payload = match headers.payload {
        PayloadSlice::Udp(payload) | PayloadSlice::Tcp(payload) => payload,
        _ => return None,
    };
    if payload.is_empty() {
        return None;
    }
    let count = payload.len().div_ceil(size.max(1));
    let parts = payload.chunks(size.max(1)).enumerate();
    parts.map(|(index, chunk)| segment(ip.clone(), transport.clone(), chunk, (index, count), size)).collect()
}

fn segment(
    mut ip: IpHeaders,
    mut transport: TransportHeader,
    chunk: &[u8],
    (index, count): (usize, usize),
    size: usize,
) -> Option<Bytes> {
    match &mut transport {
        TransportHeader::Udp(udp) => udp.length = (8 + chunk.len()) as u16,
        TransportHeader::Tcp(tcp) => {
            tcp.sequence_number = tcp.sequence_number.wrapping_add((index * size) as u32);
            let last = index + 1 == count;
            (tcp.fin, tcp.psh) = (tcp.fin && last, tcp.psh && last);
        }
        _ => return None,
    }
    ip.set_payload_len(transport.header_len() + chunk.len()).ok()?;
    match &mut ip {
        IpHeaders::Ipv4(header, _) => {
            header.identification = header.identification.wrapping_add(index as u16);
            header.header_checksum = header.calc_header_checksum();
            transport.update_checksum_ipv4(header, chunk).ok()?;
        }
        IpHeaders::Ipv6(header, _) => transport.update_checksum_ipv6(header, chunk).ok()?,
    }
    let mut bytes = Vec::new();
    ip.write(&mut bytes).ok()?;
    transport.write(&mut bytes).ok()?;
    bytes.extend_from_slice(chunk);
    Some(bytes.into())
}
