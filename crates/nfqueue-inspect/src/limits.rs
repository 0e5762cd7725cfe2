//! How much the tables store, and for how long.

use std::time::Duration;

/// How much is stored, and for how long.
///
/// | field | default |
/// |---|---|
/// | [`connections`](Self::connections) | 16,384 |
/// | [`bytes_per_connection`](Self::bytes_per_connection) | 16 KiB |
/// | [`bytes`](Self::bytes) | 32 MiB |
/// | [`lifetime`](Self::lifetime) | 60 s |
/// | [`both_directions`](Self::both_directions) | `false` |
///
/// `Connections::most_memory` says how much memory that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// How many connections are remembered. When there are more, the oldest is removed: of those
    /// whose client has sent no bytes, while they are half of all or more, otherwise of the
    /// others. So a flood of SYNs removes only what a flood has added, and half of the table
    /// remains for connections with data.
    pub connections: usize,
    /// How many of the first bytes of a client are stored. After these, the connection must be
    /// decided. A ClientHello with post-quantum keys has about 2 KiB; web servers accept between 8
    /// and 64 KiB of HTTP headers.
    pub bytes_per_connection: usize,
    /// How many bytes are stored in total. When there are more, the connection that has begun to
    /// store bytes first is removed.
    pub bytes: usize,
    /// For how long a connection may be undecided: from its SYN to its first data, and again from
    /// there to the decision. A decided connection is forgotten when no segment of it has been
    /// accepted for as long.
    ///
    /// As long as a connection is remembered, its client cannot begin another one from the same
    /// port, except where [`both_directions`](Self::both_directions) permits it.
    pub lifetime: Duration,
    /// Whether the segments of servers are pushed as well: all of them, from the SYN-ACK until the
    /// connection is settled. The promise of this crate needs them: they prove which SYN the server
    /// has accepted, and which bytes it has received. With `true`, bytes are accepted only after
    /// the server's SYN-ACK.
    ///
    /// The packets of servers must come from where the servers are. If a client can send packets
    /// with the address of its server into the queue, it can forge these proofs: let the rule name
    /// the interface.
    ///
    /// QUIC ignores it.
    pub both_directions: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            bytes_per_connection: 16 << 10,
            bytes: 32 << 20,
            lifetime: Duration::from_secs(60),
            both_directions: false,
        }
    }
}

impl Limits {
    /// Sets [`connections`](Self::connections); at least 1.
    #[must_use]
    pub fn connections(self, connections: usize) -> Self {
        Self { connections: connections.max(1), ..self }
    }

    /// Sets [`bytes_per_connection`](Self::bytes_per_connection); from 1 to 1 MiB.
    #[must_use]
    pub fn bytes_per_connection(self, bytes: usize) -> Self {
        Self { bytes_per_connection: bytes.clamp(1, MOST_BYTES), ..self }
    }

    /// Sets [`bytes`](Self::bytes).
    #[must_use]
    pub fn bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// Sets [`lifetime`](Self::lifetime).
    #[must_use]
    pub fn lifetime(self, lifetime: Duration) -> Self {
        Self { lifetime, ..self }
    }

    /// Sets [`both_directions`](Self::both_directions).
    #[must_use]
    pub fn both_directions(self, both: bool) -> Self {
        Self { both_directions: both, ..self }
    }
}

/// The most bytes of a connection. Far below 2^31, from where on sequence numbers are ambiguous.
pub(crate) const MOST_BYTES: usize = 1 << 20;
