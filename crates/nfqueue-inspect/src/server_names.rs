//! The names in the first bytes of TCP connections.

use std::time::Instant;

use crate::{
    connections::{Answer, Connections, Stats},
    http::{self, Head},
    limits::Limits,
    name::{Fault, Name, Parsed},
    progress::{Decision, Progress, Reason},
    segment::{Segment, Unparsed},
    tls::{self, Hello},
};

/// What is known of a connection, when it must be decided.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Seen {
    /// A TLS ClientHello.
    Tls(Hello),
    /// The head of an HTTP/1 request.
    Http(Head),
    /// A ClientHello in QUIC. Its packets are read with the feature `quic`.
    Quic(Hello),
    /// Neither.
    Other,
    /// TLS, HTTP or QUIC from which no name can be read that all servers agree upon. Denying it is
    /// the safe decision.
    Unreadable(Fault),
    /// The message is longer than the bytes that are stored. Denying it is the safe decision.
    TooLong,
    /// The client ends its stream before the message is complete, or after nothing. Some servers
    /// act upon the part. Denying it is the safe decision.
    Incomplete,
}

impl Seen {
    /// The name, of whichever protocol.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Self::Tls(hello) | Self::Quic(hello) => hello.name.as_ref(),
            Self::Http(head) => head.host.as_ref(),
            _ => None,
        }
    }

    /// Whether a name should be there and cannot be read: `Unreadable`, `TooLong`, `Incomplete`.
    pub fn is_doubtful(&self) -> bool {
        matches!(self, Self::Unreadable(_) | Self::TooLong | Self::Incomplete)
    }

    fn of_tls(parsed: Parsed<Hello>) -> Option<Self> {
        match parsed {
            Parsed::NeedMore => None,
            Parsed::Found(hello) => Some(Self::Tls(hello)),
            Parsed::Unreadable(fault) => Some(Self::Unreadable(fault)),
            Parsed::OtherProtocol => Some(Self::Other),
        }
    }

    pub(crate) fn of_stream(bytes: &[u8]) -> Option<Self> {
        match tls::server_name(bytes) {
            Parsed::NeedMore => None,
            Parsed::Found(hello) => Some(Self::Tls(hello)),
            Parsed::Unreadable(fault) => Some(Self::Unreadable(fault)),
            Parsed::OtherProtocol => match http::host(bytes) {
                Parsed::NeedMore => None,
                Parsed::Found(head) => Some(Self::Http(head)),
                Parsed::Unreadable(fault) => Some(Self::Unreadable(fault)),
                Parsed::OtherProtocol => Some(Self::Other),
            },
        }
    }
}

/// What a filter does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hint {
    /// Accept the packet. Its connection is not decided yet.
    Undecided,
    /// Accept the packet.
    Allowed {
        /// The rest of the connection may leave the queue: see [`Progress::Allowed`].
        settled: bool,
    },
    /// Drop or reject the packet.
    Denied,
    /// Drop the packet.
    Drop(Reason),
    /// The table does not know the connection. See [`Progress::Unknown`]: drop or reject the
    /// packet, to be safe.
    Unknown,
    /// The packet is not what is inspected here. Of the three kinds, accept
    /// [`OtherProtocol`](Unparsed::OtherProtocol) at most.
    Unparsed(Unparsed),
}

impl Hint {
    /// Whether the packet may be accepted. Packets of unknown connections, of other protocols, and
    /// malformed ones may not.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Undecided | Self::Allowed { .. })
    }
}

/// Decides TCP connections by the names in them: TLS server names and hosts of HTTP.
///
/// ```
/// use std::time::Instant;
/// use nfqueue_inspect::{Decision, Hint, Limits, ServerNames};
///
/// let mut names = ServerNames::new(Limits::default().both_directions(true));
/// # let packet = [0; 20];
/// // For each packet of the queue, of clients and servers:
/// let hint = names.push(Instant::now(), &packet, |_connection, seen| {
///     let forbidden = seen.name().is_some_and(|name| name.is_in("forbidden.example"));
///     if forbidden || seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
/// });
/// match hint {
///     Hint::Undecided | Hint::Allowed { settled: false } => {} // accept
///     Hint::Allowed { settled: true } => {}                    // accept, for the whole connection
///     Hint::Denied => {}                                       // reject
///     _ => {}                                                  // drop
/// }
/// ```
#[derive(Debug)]
pub struct ServerNames {
    connections: Connections,
}

impl ServerNames {
    /// Without connections.
    pub fn new(limits: Limits) -> Self {
        Self { connections: Connections::new(limits) }
    }

    /// What to do with a packet, which begins with its IP header.
    ///
    /// `decide` is called when enough of the first bytes of a connection are known, and for TLS
    /// once more if the server has asked for a second hello.
    pub fn push(
        &mut self,
        now: Instant,
        packet: &[u8],
        decide: impl FnOnce(&crate::Connection, &Seen) -> Decision,
    ) -> Hint {
        match Segment::parse(packet) {
            Ok(segment) => self.push_segment(now, &segment, decide),
            Err(unparsed) => Hint::Unparsed(unparsed),
        }
    }

    /// What to do with a segment.
    pub fn push_segment(
        &mut self,
        now: Instant,
        segment: &Segment<'_>,
        decide: impl FnOnce(&crate::Connection, &Seen) -> Decision,
    ) -> Hint {
        let connection = segment.connection();
        let answer = self.connections.answer(&connection);
        let prefix = match self.connections.push(now, segment) {
            Progress::Bytes(prefix) => prefix,
            Progress::NoData => return Hint::Undecided,
            Progress::Allowed { settled } => return Hint::Allowed { settled },
            Progress::Denied => return Hint::Denied,
            Progress::Drop(reason) => return Hint::Drop(reason),
            Progress::Unknown => return Hint::Unknown,
        };
        let found = match answer {
            Answer::Other => Seen::of_stream(prefix.bytes),
            // A client that does not wait for the answer may send the second hello at once.
            Answer::Reading(_) | Answer::Retry => Seen::of_tls(tls::second_server_name(prefix.bytes)),
        };
        let waits = matches!(answer, Answer::Reading(_));
        let seen = match found {
            None if waits && prefix.full => return Hint::Drop(Reason::Gap),
            None if waits => return Hint::Undecided,
            Some(seen) => seen,
            None if prefix.full => Seen::TooLong,
            None if prefix.ended => Seen::Incomplete,
            None => return Hint::Undecided,
        };
        let is_first = answer == Answer::Other && matches!(seen, Seen::Tls(_));
        // No client sends a second hello with the first. It is judged when it comes again.
        let has_second = is_first && !tls::behind_hello(prefix.bytes).is_empty();
        let decision = decide(&connection, &seen);
        match decision {
            Decision::Allow if is_first => {
                self.connections.allow_after_answer(now, &connection);
                if has_second {
                    return Hint::Drop(Reason::Gap);
                }
            }
            _ => {
                self.connections.decide(now, &connection, decision);
            }
        }
        match decision {
            Decision::Allow => Hint::Allowed { settled: false },
            Decision::Deny => Hint::Denied,
        }
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        self.connections.stats()
    }

    /// How much memory is allocated now: see [`Connections::memory`].
    pub fn memory(&self) -> usize {
        self.connections.memory()
    }
}
