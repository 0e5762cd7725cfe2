//! Replaces the text in a UDP datagram over IPv4. The kernel takes a replaced packet as it is, so lengths and checksums
//! must be right.

use std::net::Ipv4Addr;

/// What the sender says, and what the receiver gets to hear. Not of the same length, on purpose.
pub(crate) const SAID: &[u8] = b"the quick brown fox";
pub(crate) const HEARD: &[u8] = b"the slow green tortoise";

/// The packet with the new text, or `None` where it is not what was expected.
pub(crate) fn rewritten(packet: &[u8]) -> Option<Vec<u8>> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let (ip, udp) = packet.split_at_checked(header)?;
    let text = udp.get(8..)?;
    let rest = text.strip_prefix(SAID)?;

    let mut new = ip.to_vec();
    new.extend_from_slice(&udp[..8]);
    new.extend_from_slice(HEARD);
    new.extend_from_slice(rest);
    let (total, length) = (new.len(), new.len() - header);
    new[2..4].copy_from_slice(&u16::try_from(total).ok()?.to_be_bytes());
    new[10..12].fill(0);
    let checksum = checksum(&[&new[..header]]);
    new[10..12].copy_from_slice(&checksum.to_be_bytes());

    let length = u16::try_from(length).ok()?.to_be_bytes();
    new[header + 4..header + 6].copy_from_slice(&length);
    new[header + 6..header + 8].fill(0);
    let (source, destination) = (address(&new, 12)?, address(&new, 16)?);
    let pseudo = [&source.octets()[..], &destination.octets()[..], &[0, 17], &length].concat();
    // Zero would say that there is none.
    let checksum = match self::checksum(&[&pseudo, &new[header..]]) {
        0 => 0xffff,
        sum => sum,
    };
    new[header + 6..header + 8].copy_from_slice(&checksum.to_be_bytes());
    Some(new)
}

fn address(packet: &[u8], at: usize) -> Option<Ipv4Addr> {
    packet.get(at..)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets))
}

/// The Internet checksum (RFC 1071); all parts but the last are of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
