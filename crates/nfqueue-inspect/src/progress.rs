//! What the table says of a segment.

use std::fmt;

/// What a segment means for its connection, and what a filter must do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// Accept it. It carries nothing that could be judged: a SYN, an acknowledgement, a reset, or a
    /// segment of the server.
    NoData,
    /// Judge the bytes. If they suffice, [`decide`](crate::Connections::decide) and follow the
    /// decision. Otherwise accept the segment, and the next one brings more bytes.
    ///
    /// A retransmission returns the same bytes again.
    Bytes(Prefix<'a>),
    /// The connection was allowed: accept the segment.
    Allowed {
        /// Whether the server has acknowledged all bytes that were judged. Only then may the rest
        /// of the connection leave the queue: before, a retransmission with other bytes is possible
        /// that only this table notices. Always `false` if no segments of the server are pushed.
        settled: bool,
    },
    /// The connection was denied: drop or reject the segment.
    Denied,
    /// Drop the segment. It must not reach the server: what was judged would not be what the server
    /// gets. TCP repeats it if it was honest.
    Drop(Reason),
    /// The table has no such connection. It began before the program, or was removed because it was
    /// old or the table full. Nothing is known of the bytes that the server has received.
    ///
    /// To be safe, drop or reject it. Who accepts it gives a client that can fill the table, or
    /// wait, a way around the filter.
    Unknown,
}

/// The first bytes that a client has sent, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prefix<'a> {
    /// All bytes from the first one on.
    pub bytes: &'a [u8],
    /// The segment carries more bytes than the table stores. Decide, or drop the segment: its last
    /// bytes are not compared with those of a retransmission.
    pub full: bool,
    /// The client ends its stream with this segment. Servers may act upon an incomplete request
    /// then.
    pub ended: bool,
}

/// A decision on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The connection may continue.
    Allow,
    /// No more segments of the client may reach the server.
    Deny,
}

/// Why a segment must be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// It carries other bytes than an earlier segment in the same place. The server may have
    /// received either.
    Conflict,
    /// Bytes before it are missing. They will be sent, and then this segment again.
    Gap,
    /// It carries bytes from before the first one.
    BeforeStart,
    /// It has the flag URG: servers take urgent bytes out of the stream.
    Urgent,
    /// A SYN with data (TCP Fast Open). Clients then send a SYN without.
    SynData,
    /// A SYN with another sequence number, while the server may be in the connection that an
    /// earlier SYN has begun.
    OtherStart,
    /// The server has not accepted the client's SYN, or not been seen to.
    Unconfirmed,
    /// It acknowledges what the server has not sent, or carries flags that make no sense together.
    Unacceptable,
    /// In QUIC: the packet cannot be read with the public keys, or breaks the protocol.
    Unreadable,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Conflict => "other bytes than before",
            Self::Gap => "bytes are missing",
            Self::BeforeStart => "bytes from before the first one",
            Self::Urgent => "urgent data",
            Self::SynData => "a SYN with data",
            Self::OtherStart => "another SYN",
            Self::Unconfirmed => "the server has not accepted the connection",
            Self::Unacceptable => "a wrong acknowledgement, or wrong flags",
            Self::Unreadable => "an unreadable packet",
        })
    }
}
