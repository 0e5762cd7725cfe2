//! The ClientHello in the first packets of a QUIC client, versions 1 and 2 (RFC 9000, RFC 9369).
//!
//! The keys of these packets follow from a connection ID that the client sends. So everybody on the
//! path can read them. CRYPTO frames may be in any order, in any number of packets and datagrams.
//!
//! The rule is that of TCP: every byte of a client's stream has one value in all datagrams that are
//! accepted. A server may take a datagram for the beginning of a connection of its own, so each
//! connection ID that a client derives keys from has a stream of its own, which is judged of its
//! own. That is also what a Retry needs. A packet that can be opened with the keys of two is
//! dropped.
//!
//! Servers find a connection by its ID. So an ID has one pair of ports: while it is remembered, a
//! packet from another port with that ID is dropped. After a HelloRetryRequest the stream has a
//! second hello, which is judged as well.
//!
//! What it does not do:
//!
//! - One client may have many QUIC connections on one pair of ports. After the first is allowed,
//!   the others must still be judged: do not let the flow leave the queue.
//! - Datagrams must be single ones. Bind the queue without GSO, or divide what the kernel has put
//!   together.
//! - More than sixteen connections begun on one pair of ports within the lifetime are dropped.
//! - Initial packets of other versions are dropped. Clients then use version 1, or TCP.
//! - A connection that migrates has other addresses, and is unknown. So is one whose first packets
//!   were sent before the program began.
//! - A stream is forgotten after its [lifetime](crate::Limits::lifetime). Servers give up
//!   incomplete handshakes earlier: RFC 9000 has an idle timeout, and implementations use 10 to 30
//!   s.

mod crypto;
mod hellos;
mod keys;
mod packet;
#[cfg(test)]
mod tests;

pub use hellos::QuicNames;

/// An Initial packet of version 1 (or 2) to a connection ID of up to 20 bytes, protected with the
/// keys of `key`. For tests and fuzzing. `frames` has up to 16,000 bytes.
#[doc(hidden)]
pub fn seal_initial(version_2: bool, key: &[u8], to: &[u8], number: u8, frames: &[u8]) -> Vec<u8> {
    let (version, first, version_number) =
        if version_2 { (packet::Version::V2, 0xd0, 0x6b33_43cf_u32) } else { (packet::Version::V1, 0xc0, 1) };
    let mut frames = frames.to_vec();
    // Header protection takes its sample from here.
    frames.resize(frames.len().max(4), 0);
    let mut header = vec![first];
    header.extend(version_number.to_be_bytes());
    header.push(to.len() as u8);
    header.extend(to);
    header.extend([0, 0]);
    header.extend((0x4000 | (frames.len() + 17) as u16).to_be_bytes());
    header.push(number);
    keys::Keys::of_client(version, key).seal(header, 1, &frames)
}
