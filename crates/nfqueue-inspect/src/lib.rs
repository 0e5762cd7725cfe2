//! The first bytes that the client of a connection sends, in order, and the names in them: TLS
//! server names, hosts of HTTP, and with the feature `quic` those of QUIC. For filters that receive
//! packets from a queue ([tokio-nfqueue](https://docs.rs/tokio-nfqueue)) or elsewhere.
//!
//! It has no sockets, no clock and no runtime: packets and the time are handed in. It cannot panic
//! on any input, and its memory is bounded.
//!
//! | type | what it does |
//! |---|---|
//! | [`ServerNames`] | takes packets, asks a function when a name is known, says what to do |
//! | [`Connections`] | the same for any protocol over TCP: returns the bytes, and is told the decision |
//! | [`tls::server_name`], [`http::host`] | read names from the first bytes |
//! | `quic::QuicNames` | [`ServerNames`] for QUIC |
//! | [`Segment`], [`Datagram`] | read what the above need from a packet |
//!
//! ```
//! use std::time::Instant;
//! use nfqueue_inspect::{Connections, Decision, Limits, Progress, Segment};
//!
//! /// Whether a packet is accepted. No client may say "attack" in its first 20 bytes.
//! fn accepts(connections: &mut Connections, now: Instant, packet: &[u8]) -> bool {
//!     let Ok(segment) = Segment::parse(packet) else { return false };
//!     let decision = match connections.push(now, &segment) {
//!         Progress::NoData | Progress::Allowed { .. } => return true,
//!         Progress::Bytes(first) if first.bytes.windows(6).any(|word| word == b"attack") => {
//!             Decision::Deny
//!         }
//!         Progress::Bytes(first) if first.bytes.len() >= 20 || first.ended => Decision::Allow,
//!         // More bytes are needed, and this segment is a part of them.
//!         Progress::Bytes(_) => return true,
//!         // Denied, unknown, or not what the server may get.
//!         _ => return false,
//!     };
//!     connections.decide(now, &segment.connection(), decision);
//!     decision == Decision::Allow
//! }
//!
//! let mut connections = Connections::new(Limits::default().both_directions(true));
//! assert!(!accepts(&mut connections, Instant::now(), b"not a packet"));
//! ```
//!
//! # The promise
//!
//! **Every byte that was judged has the same value in all segments that are accepted.** A segment
//! that was accepted may still be lost, or the server may ignore it: because of its checksum, its
//! TTL, its acknowledgement, its window, an option. Then a retransmission counts, with other bytes.
//! So nothing is assumed of what the server receives: whichever copies it takes, and in whichever
//! order, what it gets is what was judged, or less.
//!
//! That requires that the program drops what [`Progress::Drop`], [`Progress::Denied`] and
//! [`Progress::Unknown`] say, and that all packets of clients come into the queue until
//! [`Progress::Allowed`] is `settled`.
//!
//! | what a client may try | what happens |
//! |---|---|
//! | an overlap with other bytes, before or after the decision | dropped: [`Reason::Conflict`] |
//! | a segment after a gap | dropped, TCP sends it again: [`Reason::Gap`] |
//! | bytes from before the first one, such as a keep-alive with a byte of garbage | dropped: [`Reason::BeforeStart`], [`Reason::Conflict`] |
//! | urgent data, or an urgent pointer before data | dropped: [`Reason::Urgent`]. After the decision only where it concerns judged bytes |
//! | a SYN with data | dropped, clients then send a SYN without: [`Reason::SynData`] |
//! | data without a SYN, or when its connection was removed | [`Progress::Unknown`]: drop it |
//! | a SYN with another sequence number that the server ignores, to move the stream | dropped, or without effect until the server has accepted it: [`Reason::OtherStart`], [`Reason::Unconfirmed`] |
//! | the same with SYN cookies, which accept several SYNs at once | segments must acknowledge what the server has sent after the last SYN-ACK, and those that begin 1 to 3 bytes before or after the first one wait until the server has acknowledged that: [`Reason::Unacceptable`] |
//! | a FIN before bytes that were seen | dropped: [`Reason::Conflict`] |
//! | bytes behind a FIN that was accepted, which the server may have ignored | dropped: [`Reason::Conflict`] |
//! | a connection of several paths (MPTCP), in which an option says where bytes belong | [`Unparsed::Malformed`]: dropped, clients then send a SYN without |
//! | records that some servers skip before a ClientHello, or of other versions | [`Seen::Unreadable`] |
//! | another name in the second hello, after a HelloRetryRequest: OpenSSL and GnuTLS take it | judged as well; a TLS connection is undecided until its server has answered the first |
//! | a second hello before that answer | judged; in one segment with the first, it must come again |
//! | the parts of a hello of QUIC from two ports, or to two addresses of the server | dropped: [`Reason::OtherStart`] |
//! | resets | accepted. They change nothing: the server may have ignored them |
//! | sequence numbers across 2^32 | compared modulo 2^32 |
//! | a message that is longer than the limit | [`Prefix::full`], [`Seen::TooLong`]: decide, or drop it |
//! | a stream that ends within the message | [`Prefix::ended`], [`Seen::Incomplete`] |
//! | fragments, malformed and incomplete packets | [`Unparsed`]: drop them |
//! | a flood of SYNs | takes up to half of the table, from where the oldest are removed; no buffers |
//! | many connections with data | the oldest is removed, and unknown from then on |
//! | single bytes, sent slowly | the lifetime counts from the first byte |
//!
//! # One direction, or both
//!
//! With [`Limits::both_directions`], the packets of servers are pushed as well. They prove which
//! SYN the server has accepted and which bytes it has received. All of the above holds then, also
//! when a connection was removed from the table while the server still has it.
//!
//! Without them, the first SYN counts for as long as the connection is remembered. So:
//!
//! - A client that ends a connection cannot begin another one from the same port for the
//!   [lifetime](Limits::lifetime): its SYN is dropped. Proxies with many connections to one server
//!   need both directions, or a short lifetime.
//! - When a connection is removed or expires while the server still has it, the client can send a
//!   SYN that the server ignores, and so move the stream. The lifetime should be longer than the
//!   server waits for a complete message.
//! - A Linux server that uses SYN cookies can be made to begin the stream one to three bytes early
//!   or late.
//! - `settled` is never true: a flow that leaves the queue earlier can send other bytes in the
//!   place of those that were judged, if the server has ignored these. If such a flow stays in the
//!   queue for 4 GiB, its bytes are compared with those at the beginning, and it stalls.
//! - Somebody who can forge the client's address can block a port of it for the lifetime, by a SYN.
//!
//! # What it does not do
//!
//! - Only the beginning of a connection is judged. HTTP carries other requests, with other hosts,
//!   on the same connection.
//! - Without [`Limits::both_directions`], only the first hello of TLS over TCP is judged.
//! - The name is what the client says. It may say another one than that of the server that it
//!   reaches; an [encrypted hello](tls::Hello::encrypted_hello) hides it.
//! - A segment of an allowed connection that stays in the network until its client has begun
//!   another connection from the same port, and the server accepted it, is not compared.
//! - A server that uses SYN cookies accepts the segment that ended a handshake again for some
//!   minutes, also after the connection has ended. So a client can begin an allowed, settled
//!   connection anew without a SYN, and without being judged.
//! - Somebody who can send a SYN to the client in the server's name, from the server's port, begins
//!   a second connection, with the client as the server. If the client's own connection is then
//!   removed from a full table, its segments count as those of a server, and are not judged.
//! - A table is for one network: addresses that exist twice, in two VRFs or behind two VLANs, need
//!   two tables.
//!
//! # Memory
//!
//! [`Connections::most_memory`]: [`Limits::bytes`], and about 440 bytes for each of
//! [`Limits::connections`] (a power of two of them), whatever clients do. With the defaults these
//! are 39 MiB. A connection allocates a buffer when it has data: at least 512 bytes, doubled when
//! it is full, and reduced to the judged bytes by the decision. A settled or denied connection has
//! none. [`Connections::memory`] is what is allocated now.
#![cfg_attr(docsrs, feature(doc_cfg))]
mod connections;
pub mod http;
mod limits;
mod name;
mod progress;
#[cfg(feature = "quic")]
#[cfg_attr(docsrs, doc(cfg(feature = "quic")))]
pub mod quic;
mod reader;
mod segment;
mod server_names;
mod stream;
mod table;
#[cfg(test)]
mod test_messages;
pub mod tls;

pub use self::{
    connections::{Connections, Stats},
    limits::Limits,
    name::{Fault, Name, Parsed},
    progress::{Decision, Prefix, Progress, Reason},
    segment::{Connection, Datagram, Flags, Segment, Unparsed},
    server_names::{Hint, Seen, ServerNames},
};
