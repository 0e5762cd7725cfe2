//! Packets built by hand. Each carries a number, which survives translation and is recognised in
//! the queue and at the receivers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(super) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
/// A protocol that no rule matches, for [`sentinel`] (RFC 3692).
pub(super) const SENTINEL: u8 = 253;

pub(super) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const PSH: u8 = 8;
pub(super) const ACK: u8 = 16;

/// Precedes the number, so that a packet of the kernel does not seem to have one.
const MAGIC: [u8; 2] = *b"nf";
/// An experimental TCP option (RFC 6994): connection tracking skips it.
const OPTION: [u8; 4] = [254, 8, MAGIC[0], MAGIC[1]];
/// "Port unreachable".
const UNREACHABLE: [u8; 2] = [3, 3];
const UNREACHABLE_V6: [u8; 2] = [1, 4];

/// The types of ICMP errors that [`icmp_error`] makes.
pub(super) const ERROR_TYPES: (u8, u8) = (UNREACHABLE[0], UNREACHABLE_V6[0]);

/// A TCP segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) flags: u8,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    /// In bytes.
    pub(super) payload: usize,
}

pub(super) fn tcp(from: SocketAddr, to: SocketAddr, segment: Segment, number: u32) -> Vec<u8> {
    let mut body = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    body.extend(segment.sequence.to_be_bytes());
    body.extend(if segment.flags & ACK != 0 { segment.acknowledgement } else { 0 }.to_be_bytes());
    // Seven words of header; a window of 64 000 bytes.
    body.extend([7 << 4, segment.flags, 0xfa, 0, 0, 0, 0, 0]);
    body.extend(OPTION);
    body.extend(number.to_be_bytes());
    body.resize(body.len() + segment.payload, b'.');
    finish((from.ip(), to.ip()), TCP, body, 16)
}

pub(super) fn udp(from: SocketAddr, to: SocketAddr, number: u32) -> Vec<u8> {
    let mut body = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    body.extend([0, 14, 0, 0]);
    body.extend(MAGIC);
    body.extend(number.to_be_bytes());
    finish((from.ip(), to.ip()), UDP, body, 6)
}

/// An error that `from` sends about a packet that it has received.
pub(super) fn icmp_error(from: IpAddr, to: IpAddr, about: &[u8], number: u32) -> Vec<u8> {
    let (protocol, kind) = if from.is_ipv4() { (ICMP, UNREACHABLE) } else { (ICMPV6, UNREACHABLE_V6) };
    let mut body = [kind, [0, 0]].concat();
    // The four unused bytes. The kernel's own errors have zeros there.
    body.extend(number.to_be_bytes());
    body.extend(about);
    finish((from, to), protocol, body, 2)
}

pub(super) fn sentinel(from: IpAddr, to: IpAddr, number: u32) -> Vec<u8> {
    let body = [&MAGIC[..], &number.to_be_bytes()].concat();
    header((from, to), SENTINEL, &body)
}

/// Sets the checksum, which is at this place of the body, and adds the IP header.
fn finish(addresses: (IpAddr, IpAddr), protocol: u8, mut body: Vec<u8>, checksum: usize) -> Vec<u8> {
    let mut sum = sum(&body);
    if protocol != ICMP {
        // The pseudo-header.
        sum += u64::from(protocol) + body.len() as u64;
        sum += match addresses {
            (IpAddr::V4(from), IpAddr::V4(to)) => self::sum(&from.octets()) + self::sum(&to.octets()),
            (IpAddr::V6(from), IpAddr::V6(to)) => self::sum(&from.octets()) + self::sum(&to.octets()),
            _ => panic!("{addresses:?} are of two families"),
        };
    }
    body[checksum..checksum + 2].copy_from_slice(&fold(sum).to_be_bytes());
    header(addresses, protocol, &body)
}

fn header(addresses: (IpAddr, IpAddr), protocol: u8, body: &[u8]) -> Vec<u8> {
    match addresses {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let [high, low] = (20 + body.len() as u16).to_be_bytes();
            let mut packet = vec![0x45, 0, high, low, 0, 1, 0x40, 0, 64, protocol, 0, 0];
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum = fold(sum(&packet)).to_be_bytes();
            packet[10..12].copy_from_slice(&sum);
            packet.extend(body);
            packet
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let [high, low] = (body.len() as u16).to_be_bytes();
            let mut packet = vec![0x60, 0, 0, 0, high, low, protocol, 64];
            packet.extend(from.octets());
            packet.extend(to.octets());
            packet.extend(body);
            packet
        }
        _ => panic!("{addresses:?} are of two families"),
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        // In UDP, zero means "no checksum".
        0 => 0xffff,
        sum => sum,
    }
}

/// What a packet of this module is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) number: u32,
    /// Where it comes from, as the receiver sees it: unknown without an IP header.
    pub(super) from: Option<SocketAddr>,
}

/// The label of an IP packet, `None` for packets of others.
pub(super) fn label(packet: &[u8]) -> Option<Label> {
    let (protocol, from, body) = match packet.first()? >> 4 {
        4 => {
            let from: [u8; 4] = *packet.get(12..)?.first_chunk()?;
            let header = usize::from(packet[0] & 15) * 4;
            (*packet.get(9)?, IpAddr::V4(Ipv4Addr::from(from)), packet.get(header..)?)
        }
        6 => {
            let from: [u8; 16] = *packet.get(8..)?.first_chunk()?;
            (*packet.get(6)?, IpAddr::V6(Ipv6Addr::from(from)), packet.get(40..)?)
        }
        _ => return None,
    };
    let number = number(protocol, body)?;
    let port = u16::from_be_bytes(*body.first_chunk()?);
    Some(Label { number, from: Some(SocketAddr::new(from, port)) })
}

/// The number in what follows the IP header.
pub(super) fn number(protocol: u8, body: &[u8]) -> Option<u32> {
    let u32_at = |at: usize| body.get(at..)?.first_chunk().copied().map(u32::from_be_bytes);
    match protocol {
        TCP if body.get(20..24)? == OPTION => u32_at(24),
        UDP if body.get(8..10)? == MAGIC => u32_at(10),
        ICMP if body.get(..2)? == UNREACHABLE => u32_at(4).filter(|number| *number != 0),
        ICMPV6 if body.get(..2)? == UNREACHABLE_V6 => u32_at(4).filter(|number| *number != 0),
        SENTINEL if body.get(..2)? == MAGIC => u32_at(2),
        _ => None,
    }
}
