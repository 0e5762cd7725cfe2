//! Packets from a capture file in the classic format (`pcap-savefile(5)`), which takes two fixed
//! headers to read. Crates that read them (`pcap-parser`, `pcap-file`) bring five to nine others
//! and save ten lines: link types and cut packets stay here.

use std::path::Path;

use bytes::Bytes;

use super::packet::TestPacket;
use crate::types::{Error, ErrorKind};

impl TestPacket {
    /// The packets of a capture file, as `tcpdump -w` writes it: the IP packets in it, in order.
    /// Frames of other protocols and packets that were cut (`tcpdump -s`) are left out.
    ///
    /// # Errors
    /// * The file cannot be read.
    /// * `InvalidInput`: it is not a pcap file (pcapng is another format: `editcap -F pcap`
    ///   converts it), ends within a packet, or is of a link type other than Ethernet, raw IP,
    ///   loopback and Linux cooked capture.
    pub fn from_pcap(path: impl AsRef<Path>) -> Result<Vec<Self>, Error> {
        let path = path.as_ref();
        let operation = || format!("read capture file {}", path.display());
        let bytes = std::fs::read(path).map_err(|source| Error::os(operation(), source))?;
        Self::from_pcap_bytes(bytes).map_err(|error| error.with_operation(operation()))
    }

    /// As [`from_pcap`](Self::from_pcap), from the content of a file.
    ///
    /// # Errors
    /// `InvalidInput`, as for `from_pcap`.
    pub fn from_pcap_bytes(file: impl Into<Bytes>) -> Result<Vec<Self>, Error> {
        let invalid = |detail| Error::new(ErrorKind::InvalidInput, "read a capture").with_detail(detail);
        parse(file.into()).map_err(invalid)
    }
}

pub(super) fn parse(file: Bytes) -> Result<Vec<TestPacket>, String> {
    const HEADER: usize = 24;
    const RECORD: usize = 16;
    let magic = file.first_chunk().ok_or("it is shorter than a header")?;
    let word: fn([u8; 4]) -> u32 = match u32::from_le_bytes(*magic) {
        // With microseconds and with nanoseconds, in either byte order.
        0xa1b2_c3d4 | 0xa1b2_3c4d => u32::from_le_bytes,
        0xd4c3_b2a1 | 0x4d3c_b2a1 => u32::from_be_bytes,
        0x0a0d_0d0a => return Err("it is a pcapng file; `editcap -F pcap` converts it".to_owned()),
        _ => return Err("it is not a pcap file".to_owned()),
    };
    let at = |offset: usize| file.get(offset..)?.first_chunk().map(|bytes| word(*bytes));
    let link = at(20).ok_or("it is shorter than a header")? & 0x0fff_ffff;
    let mut packets = Vec::new();
    let mut next = HEADER;
    while next < file.len() {
        let number = packets.len() + 1;
        let cut = || format!("it ends within a packet, after {} whole ones", number - 1);
        let (captured, original) = (at(next + 8).ok_or_else(cut)?, at(next + 12).ok_or_else(cut)?);
        let begin = next + RECORD;
        let end = begin.checked_add(captured as usize).filter(|end| *end <= file.len()).ok_or_else(cut)?;
        next = end;
        if captured < original {
            continue;
        }
        if let Some(offset) = network_header(&file[begin..end], link)? {
            packets.push(TestPacket::raw(file.slice(begin + offset..end)));
        }
    }
    Ok(packets)
}

/// Where the IP packet in a frame begins. `None` if there is none.
fn network_header(frame: &[u8], link: u32) -> Result<Option<usize>, String> {
    // https://www.tcpdump.org/linktypes.html
    let (protocol_at, begin) = match link {
        0 | 108 => return Ok(is_ip(frame, 4)),
        101 | 228 | 229 => return Ok(is_ip(frame, 0)),
        1 => (12, 14),
        113 => (14, 16),
        276 => (0, 20),
        other => return Err(format!("link type {other} is not known")),
    };
    let mut protocol_at = protocol_at;
    let mut begin = begin;
    // VLAN tags.
    while let Some([0x81, 0x00] | [0x88, 0xa8]) = frame.get(protocol_at..).and_then(<[u8]>::first_chunk::<2>) {
        (protocol_at, begin) = (begin + 2, begin + 4);
    }
    Ok(match frame.get(protocol_at..).and_then(<[u8]>::first_chunk::<2>) {
        Some([0x08, 0x00] | [0x86, 0xdd]) => is_ip(frame, begin),
        _ => None,
    })
}

fn is_ip(frame: &[u8], begin: usize) -> Option<usize> {
    matches!(frame.get(begin)? >> 4, 4 | 6).then_some(begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UDP: &[u8] = b"\x45\0\0\x1c\0\0\0\0\x40\x11\0\0\x0a\0\0\x01\x0a\0\0\x02\0\x07\0\x07\0\x08\0\0";

    fn file(big: bool, link: u32, frames: &[(&[u8], u32)]) -> Bytes {
        let word = |number: u32| if big { number.to_be_bytes() } else { number.to_le_bytes() };
        let mut bytes = word(0xa1b2_c3d4).to_vec();
        bytes.extend([0; 16]);
        bytes.extend(word(link));
        for (frame, original) in frames {
            bytes.extend([0; 8]);
            bytes.extend(word(frame.len() as u32));
            bytes.extend(word(*original));
            bytes.extend(*frame);
        }
        bytes.into()
    }

    #[test]
    fn ip_packets_of_every_known_link_type_are_found() {
        let ethernet = [&[0; 12], &[8, 0][..], UDP].concat();
        let tagged = [&[0; 12], &[0x81, 0, 0, 5, 8, 0][..], UDP].concat();
        let arp = [&[0; 12], &[8, 6][..], &[0; 28]].concat();
        let cooked = [&[0; 14], &[8, 0][..], UDP].concat();
        let cooked_2 = [&[8, 0][..], &[0; 18], UDP].concat();
        let loopback = [&[2, 0, 0, 0], UDP].concat();
        for big in [false, true] {
            for (link, frame, count) in [
                (1, &ethernet[..], 1),
                (1, &tagged, 1),
                (1, &arp, 0),
                (101, UDP, 1),
                (113, &cooked, 1),
                (276, &cooked_2, 1),
                (0, &loopback, 1),
            ] {
                let length = frame.len() as u32;
                let packets = parse(file(big, link, &[(frame, length), (frame, length + 1)])).unwrap();
                assert_eq!(packets.len(), count, "link type {link}");
                assert!(packets.iter().all(|packet| packet.payload[..] == *UDP), "link type {link}");
            }
        }
    }

    #[test]
    fn bad_files_are_refused_by_what_is_wrong() {
        let good = file(false, 101, &[(UDP, 28)]);
        for (bytes, what) in [
            (Bytes::new(), "shorter"),
            (good.slice(..20), "shorter"),
            (good.slice(..30), "ends within"),
            (good.slice(..60), "ends within"),
            (Bytes::from_static(b"\x0a\x0d\x0d\x0a...................."), "pcapng"),
            (Bytes::from_static(b"hello, this is some text"), "not a pcap"),
            (file(false, 147, &[(UDP, 28)]), "147"),
            (file(false, 101, &[(UDP, 28), (&[], u32::MAX)]).slice(..84), ""),
        ] {
            let error = parse(bytes);
            match what {
                "" => assert!(error.is_ok()),
                _ => assert!(error.unwrap_err().contains(what), "{what}"),
            }
        }
    }
}
