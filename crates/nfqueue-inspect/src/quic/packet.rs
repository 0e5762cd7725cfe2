//! The packets in a datagram (RFC 9000, section 17; RFC 9369, section 3.2).

use crate::reader::Reader;

/// The versions whose Initial packets can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packet<'a> {
    Initial(Initial<'a>),
    /// It carries no ClientHello.
    Other,
    /// It has another version. What follows in the datagram is part of it.
    UnknownVersion,
}

/// An Initial packet with its protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initial<'a> {
    pub(super) version: Version,
    /// The Destination Connection ID.
    pub(super) connection_id: &'a [u8],
    /// The header up to the packet number. It has at least one byte.
    pub(super) header: &'a [u8],
    /// The packet number and the payload.
    pub(super) protected: &'a [u8],
}

/// The longest connection ID of versions 1 and 2.
pub(super) const LONGEST_ID: usize = 20;

impl<'a> Packet<'a> {
    /// The next packet of a datagram that is not empty. `None`: it is malformed.
    pub(super) fn next(datagram: &mut Reader<'a>) -> Option<Self> {
        let whole = datagram.rest();
        let first = datagram.byte()?;
        if first & 0x80 == 0 {
            // A short header has no length: the packet takes the rest.
            datagram.take(datagram.rest().len())?;
            return Some(Self::Other);
        }
        let number = datagram.word()?;
        // Initial, 0-RTT, Handshake and Retry have other numbers in version 2.
        let (version, kind) = match number {
            1 => (Version::V1, first >> 4 & 3),
            0x6b33_43cf => (Version::V2, (first >> 4 & 3).wrapping_sub(1) & 3),
            _ => {
                datagram.take(datagram.rest().len())?;
                return Some(Self::UnknownVersion);
            }
        };
        let connection_id = datagram.bytes_of_byte()?.rest();
        let own_id = datagram.bytes_of_byte()?.rest();
        if connection_id.len() > LONGEST_ID || own_id.len() > LONGEST_ID || kind == 3 {
            // A Retry is the server's.
            return None;
        }
        if kind == 0 {
            let token = datagram.variable()?;
            datagram.take(usize::try_from(token).ok()?)?;
        }
        let length = usize::try_from(datagram.variable()?).ok()?;
        let header = &whole[..whole.len() - datagram.rest().len()];
        let protected = datagram.take(length)?;
        let initial = Initial { version, connection_id, header, protected };
        Some(if kind == 0 { Self::Initial(initial) } else { Self::Other })
    }
}

/// Calls `crypto` with the offset and the bytes of every CRYPTO frame. `None`: there is a frame
/// that Initial packets do not have, or a malformed one. RFC 9000, section 12.4.
pub(super) fn crypto_frames<'a>(frames: &'a [u8], mut crypto: impl FnMut(u64, &'a [u8])) -> Option<()> {
    let mut frames = Reader::new(frames);
    // A packet without frames breaks the protocol.
    if frames.is_empty() {
        return None;
    }
    while !frames.is_empty() {
        match frames.variable()? {
            // PADDING, PING.
            0 | 1 => {}
            // ACK, without or with ECN.
            kind @ (2 | 3) => {
                frames.variable()?;
                frames.variable()?;
                let ranges = frames.variable()?;
                frames.variable()?;
                for _ in 0..ranges {
                    frames.variable()?;
                    frames.variable()?;
                }
                if kind == 3 {
                    (0..3).try_for_each(|_| frames.variable().map(drop))?;
                }
            }
            6 => {
                let offset = frames.variable()?;
                let length = usize::try_from(frames.variable()?).ok()?;
                crypto(offset, frames.take(length)?);
            }
            // CONNECTION_CLOSE of the transport.
            0x1c => {
                frames.variable()?;
                frames.variable()?;
                let length = usize::try_from(frames.variable()?).ok()?;
                frames.take(length)?;
            }
            _ => return None,
        }
    }
    Some(())
}
