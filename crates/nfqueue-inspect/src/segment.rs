//! What the inspection needs of a TCP segment or a UDP datagram, and how it is read from a packet.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::reader::Reader;

/// The two ends of a connection, as the packets of its client have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The end that has begun the connection.
    pub client: SocketAddr,
    /// The other end.
    pub server: SocketAddr,
}

impl Connection {
    pub(crate) fn reversed(self) -> Self {
        Self { client: self.server, server: self.client }
    }
}

/// The flags of a TCP segment that the inspection needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Flags {
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    pub urg: bool,
}

/// A TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The address and port that have sent it.
    pub source: SocketAddr,
    /// The address and port that it is sent to.
    pub destination: SocketAddr,
    /// The sequence number.
    pub sequence: u32,
    /// The acknowledgement number, which has a meaning with the flag ACK only.
    pub acknowledgment: u32,
    /// The flags.
    pub flags: Flags,
    /// What the segment carries. It must be complete: a packet of which the queue has copied a part
    /// only must be dropped.
    pub payload: &'a [u8],
}

/// A UDP datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// The address and port that have sent it.
    pub source: SocketAddr,
    /// The address and port that it is sent to.
    pub destination: SocketAddr,
    /// What the datagram carries.
    pub payload: &'a [u8],
}

/// Why a packet is not a segment or datagram that can be inspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unparsed {
    /// It is of another transport protocol.
    OtherProtocol,
    /// It is a fragment. With connection tracking, the kernel puts fragments together before the
    /// queue gets them. Without it, a filter must drop them: the receiver may put another segment
    /// together than the filter.
    Fragment,
    /// A header or length is wrong, or only a part of the packet was copied to the queue. A filter
    /// must drop it: a receiver may read it in another way. So it is with a TCP segment that begins
    /// or joins a connection of several paths (MPTCP): its options, not the sequence numbers, say
    /// where its bytes belong. Clients repeat the SYN without the option.
    Malformed,
}

impl fmt::Display for Unparsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherProtocol => "another transport protocol",
            Self::Fragment => "a fragment",
            Self::Malformed => "a malformed or incomplete packet",
        })
    }
}

impl std::error::Error for Unparsed {}

impl<'a> Segment<'a> {
    /// Reads a packet that begins with its IP header. Bytes after the packet are ignored.
    ///
    /// Checksums are not checked: the bytes of a segment that the server does not accept are
    /// compared with those of its other copies like any others.
    ///
    /// # Errors
    ///
    /// [`Unparsed`] says what the packet is. It never panics.
    pub fn parse(packet: &'a [u8]) -> Result<Self, Unparsed> {
        let (ip, mut tcp) = Ip::parse(packet, 6)?;
        let segment = (|| {
            let (source, destination) = (tcp.short()?, tcp.short()?);
            let (sequence, acknowledgment) = (tcp.word()?, tcp.word()?);
            let header = usize::from(tcp.byte()? >> 4) * 4;
            let flags = tcp.byte()?;
            // The window, the checksum and the urgent pointer.
            tcp.take(6)?;
            let options = tcp.take(header.checked_sub(20)?)?;
            if begins_multipath(options) {
                return None;
            }
            let flag = |bit: u8| flags >> bit & 1 != 0;
            Some(Segment {
                source: SocketAddr::new(ip.source, source),
                destination: SocketAddr::new(ip.destination, destination),
                sequence,
                acknowledgment,
                flags: Flags { fin: flag(0), syn: flag(1), rst: flag(2), ack: flag(4), urg: flag(5) },
                payload: tcp.rest(),
            })
        })();
        segment.ok_or(Unparsed::Malformed)
    }

    /// The connection, if the client has sent the segment.
    pub fn connection(&self) -> Connection {
        Connection { client: self.source, server: self.destination }
    }
}

impl<'a> Datagram<'a> {
    /// Reads a packet that begins with its IP header. Bytes after the packet are ignored.
    ///
    /// # Errors
    ///
    /// [`Unparsed`] says what the packet is. It never panics.
    pub fn parse(packet: &'a [u8]) -> Result<Self, Unparsed> {
        let (ip, mut udp) = Ip::parse(packet, 17)?;
        let datagram = (|| {
            let (source, destination) = (udp.short()?, udp.short()?);
            let length = usize::from(udp.short()?);
            // The checksum.
            udp.short()?;
            // 0: a jumbogram, or a packet that the kernel will split. Then the packet's length
            // counts.
            let payload = if length == 0 { udp.rest() } else { udp.take(length.checked_sub(8)?)? };
            Some(Datagram {
                source: SocketAddr::new(ip.source, source),
                destination: SocketAddr::new(ip.destination, destination),
                payload,
            })
        })();
        datagram.ok_or(Unparsed::Malformed)
    }

    /// The connection, if the client has sent the datagram.
    pub fn connection(&self) -> Connection {
        Connection { client: self.source, server: self.destination }
    }
}

/// Whether options of TCP begin a connection of several paths, or add a path to one: MP_CAPABLE and
/// MP_JOIN of RFC 8684. With syncookies, a Linux server takes the former from the segment that ends
/// the handshake.
fn begins_multipath(options: &[u8]) -> bool {
    let mut options = Reader::new(options);
    loop {
        match options.byte() {
            // The end of the list.
            None | Some(0) => return false,
            Some(1) => {}
            Some(kind) => {
                let length = options.byte().and_then(|length| usize::from(length).checked_sub(2));
                let Some(content) = length.and_then(|length| options.take(length)) else { return false };
                if kind == 30 && content.first().is_none_or(|first| first >> 4 <= 1) {
                    return true;
                }
            }
        }
    }
}

struct Ip {
    source: IpAddr,
    destination: IpAddr,
}

impl Ip {
    /// The addresses, and what follows the IP header if it is of `protocol`.
    fn parse(packet: &[u8], protocol: u8) -> Result<(Self, Reader<'_>), Unparsed> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(packet, protocol),
            Some(6) => Self::parse_v6(packet, protocol),
            _ => Err(Unparsed::Malformed),
        }
    }

    fn parse_v4(packet: &[u8], wanted: u8) -> Result<(Self, Reader<'_>), Unparsed> {
        let header = packet.get(..20).ok_or(Unparsed::Malformed)?;
        let at = usize::from(header[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let body = packet.get(..total).and_then(|packet| packet.get(at.max(20)..));
        let body = body.filter(|_| at >= 20).ok_or(Unparsed::Malformed)?;
        // The flag "more fragments", and the offset.
        if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
            return Err(Unparsed::Fragment);
        }
        if header[9] != wanted {
            return Err(Unparsed::OtherProtocol);
        }
        let address = |at: usize| {
            let bytes: [u8; 4] = header[at..at + 4].try_into().expect("four bytes");
            IpAddr::V4(Ipv4Addr::from(bytes))
        };
        Ok((Self { source: address(12), destination: address(16) }, Reader::new(body)))
    }

    fn parse_v6(packet: &[u8], wanted: u8) -> Result<(Self, Reader<'_>), Unparsed> {
        let header = packet.get(..40).ok_or(Unparsed::Malformed)?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut body = Reader::new(packet.get(40..40 + length).ok_or(Unparsed::Malformed)?);
        let mut next = header[6];
        let extension = |next: u8, body: &mut Reader<'_>| {
            let (after, length) = (body.byte()?, usize::from(body.byte()?));
            // Authentication counts in words, the others in units of eight bytes.
            body.take(if next == 51 { length * 4 + 6 } else { length * 8 + 6 })?;
            Some(after)
        };
        loop {
            match next {
                // Hop-by-hop options, a routing header, authentication, destination options.
                0 | 43 | 51 | 60 => next = extension(next, &mut body).ok_or(Unparsed::Malformed)?,
                44 => return Err(Unparsed::Fragment),
                _ if next == wanted => break,
                _ => return Err(Unparsed::OtherProtocol),
            }
        }
        let address = |at: usize| {
            let bytes: [u8; 16] = header[at..at + 16].try_into().expect("sixteen bytes");
            IpAddr::V6(Ipv6Addr::from(bytes))
        };
        Ok((Self { source: address(8), destination: address(24) }, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: [u8; 23] = [0x9c, 0x40, 1, 0xbb, 0, 0, 0, 5, 0, 0, 0, 6, 0x50, 0x31, 1, 0, 0, 0, 0, 0, b'a', b'b', b'c'];

    fn v4(protocol: u8, body: &[u8]) -> Vec<u8> {
        let total = (20 + body.len()) as u16;
        let mut packet = vec![0x45, 0, (total >> 8) as u8, total as u8, 0, 0, 0x40, 0, 64, protocol, 0, 0];
        packet.extend([192, 0, 2, 1, 192, 0, 2, 7]);
        packet.extend(body);
        packet
    }

    fn v6(next: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, (body.len() >> 8) as u8, body.len() as u8, next, 64];
        packet.extend([[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]; 2].concat());
        packet.extend(body);
        packet
    }

    #[test]
    fn a_segment_is_read_from_both_versions_of_ip() {
        let chain = [
            &[43, 0, 0, 0, 0, 0, 0, 0][..],
            &[51, 1, 0, 0, 0, 0, 0, 0],
            &[0; 8],
            &[6, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        // Hop-by-hop options of 8 bytes, a routing header of 16, authentication of 12.
        let chain = [&chain.concat()[..], &TCP].concat();
        let mut behind = v4(6, &TCP);
        behind.extend([0; 5]);
        for packet in [v4(6, &TCP), behind, v6(6, &TCP), v6(0, &chain)] {
            let segment = Segment::parse(&packet).unwrap();
            assert_eq!((segment.sequence, segment.acknowledgment, segment.payload), (5, 6, &b"abc"[..]));
            let flags = Flags { fin: true, ack: true, urg: true, ..Flags::default() };
            assert_eq!(segment.flags, flags);
            assert_eq!((segment.source.port(), segment.destination.port()), (40_000, 443));
        }
    }

    #[test]
    fn a_datagram_is_read() {
        let packet = v4(17, &[0x9c, 0x40, 1, 0xbb, 0, 10, 0, 0, b'h', b'i', b'!']);
        assert_eq!(Datagram::parse(&packet).unwrap().payload, b"hi");
        assert_eq!(Datagram::parse(&v4(17, &[0, 1, 0, 1, 0, 7, 0, 0])), Err(Unparsed::Malformed));
        assert_eq!(Datagram::parse(&v4(17, &[0, 1, 0, 1, 0, 9, 0, 0])), Err(Unparsed::Malformed));
    }

    #[test]
    fn fragments_and_packets_of_which_a_part_is_missing_are_not_read() {
        let mut fragment = v4(6, &TCP);
        fragment[6] = 0x20;
        assert_eq!(Segment::parse(&fragment), Err(Unparsed::Fragment));
        assert_eq!(Segment::parse(&v6(44, &[6, 0, 0, 0, 0, 0, 0, 0])), Err(Unparsed::Fragment));
        assert_eq!(Segment::parse(&v4(17, &TCP)), Err(Unparsed::OtherProtocol));
        assert_eq!(Segment::parse(&v6(50, &TCP)), Err(Unparsed::OtherProtocol));
        for packet in [v4(6, &TCP), v6(6, &TCP)] {
            for end in 0..packet.len() {
                assert_eq!(Segment::parse(&packet[..end]), Err(Unparsed::Malformed));
            }
        }
        let mut offset = TCP;
        offset[12] = 0x40;
        assert_eq!(Segment::parse(&v4(6, &offset)), Err(Unparsed::Malformed));
        offset[12] = 0xf0;
        assert_eq!(Segment::parse(&v4(6, &offset)), Err(Unparsed::Malformed));
    }

    #[test]
    fn a_segment_that_begins_or_joins_a_connection_of_several_paths_is_not_read() {
        let with = |options: &[u8]| {
            let mut tcp = TCP[..20].to_vec();
            tcp[12] = ((20 + options.len()) << 2) as u8;
            tcp.extend(options);
            Segment::parse(&v4(6, &tcp)).map(|segment| segment.payload.len())
        };
        let malformed = Err(Unparsed::Malformed);
        // MP_CAPABLE of a SYN, MP_JOIN of one behind the size of segments, MP_CAPABLE with keys.
        assert_eq!(with(&[30, 4, 1, 1]), malformed);
        let join = [2, 4, 5, 0xb4, 1, 30, 12, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1];
        assert_eq!(with(&join), malformed);
        let keys = [&[30, 20, 1, 1][..], &[0; 16]].concat();
        assert_eq!(with(&keys), malformed);
        // Data of one that has begun, behind the end of the list, in another option, cut off.
        for options in
            [&[30, 4, 0x20, 1][..], &[0, 30, 4, 1], &[254, 8, 30, 4, 1, 1, 0, 0], &[30, 9, 1, 1], &[1, 1, 1, 30]]
        {
            assert_eq!(with(options), Ok(0), "{options:?}");
        }
    }
}
