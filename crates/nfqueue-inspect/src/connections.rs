//! The table of TCP connections.

use std::time::Instant;

use crate::{
    limits::{Limits, MOST_BYTES},
    progress::{Decision, Prefix, Progress, Reason},
    segment::{Connection, Segment},
    stream::Stream,
    table::{List, Table},
    tls,
};

/// The first bytes of the clients of TCP connections.
///
/// Every segment of a client is given to [`push`](Self::push) before its packet is decided, and the
/// filter does what the [`Progress`] says. The crate's documentation says what that promises.
#[derive(Debug)]
pub struct Connections {
    limits: Limits,
    table: Table<Connection, Tracked>,
    /// What all streams have allocated.
    bytes: usize,
    stats: Stats,
}

/// What happened since the table was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Connections that were added, also those that begin on the addresses and ports of an earlier
    /// one.
    pub connections: u64,
    /// Connections that were removed undecided, because the table was full of others.
    pub evicted: u64,
    /// Connections that were removed undecided, because their lifetime was over.
    pub expired: u64,
    /// Segments that must be dropped because they carry other bytes than earlier ones.
    pub conflicts: u64,
}

#[derive(Debug)]
struct Tracked {
    state: State,
    /// What the server has accepted. With one direction only: what the client has begun.
    start: Option<Start>,
    /// A SYN was accepted, and the server may answer it.
    offered: bool,
    /// Whether the server wants another hello, once the first one is allowed.
    answer: Answer,
    stream: Stream,
}

/// What the server has answered to a ClientHello that was allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// There was none, or the answer is no HelloRetryRequest.
    Other,
    /// So many bytes are those of a HelloRetryRequest.
    Reading(u8),
    /// A HelloRetryRequest: the client sends a second hello.
    Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Undecided,
    Allowed { settled: bool },
    Denied,
}

#[derive(Debug, Clone, Copy)]
struct Start {
    /// The sequence number of the client's first byte.
    first: u32,
    /// The sequence number of the server's first byte, if its SYN-ACK was seen.
    server: Option<u32>,
    /// A segment of the client has been accepted that the server may take as the end of the
    /// handshake.
    established: bool,
    /// How many bytes of the client have been accepted, up to the last one.
    sent: u32,
    /// The server has acknowledged bytes of the client.
    arrived: bool,
    /// How many bytes the server has sent, up to the last one.
    server_sent: u32,
}

impl Tracked {
    fn new(start: Option<Start>, offered: bool) -> Self {
        let (state, answer) = (State::Undecided, Answer::Other);
        Self { state, start, offered, answer, stream: Stream::default() }
    }

    fn allow(&mut self) {
        self.state = State::Allowed { settled: false };
        self.answer = Answer::Other;
        self.stream.shrink();
    }

    /// Bytes of the server, and how many have come before them.
    fn read_answer(&mut self, offset: u32, payload: &[u8]) {
        let Answer::Reading(mut read) = self.answer else { return };
        // What is missing before them comes again.
        let Some(new) = u32::from(read).checked_sub(offset).and_then(|known| payload.get(known as usize..)) else {
            return;
        };
        for byte in new {
            match tls::in_retry_request(read.into(), *byte) {
                None => {
                    self.answer = Answer::Retry;
                    return;
                }
                Some(true) => read += 1,
                Some(false) => return self.allow(),
            }
        }
        self.answer = if usize::from(read) == tls::RETRY_REQUEST { Answer::Retry } else { Answer::Reading(read) };
    }
}

impl Start {
    fn new(first: u32, server: Option<u32>) -> Self {
        Self { first, server, established: false, sent: 0, arrived: false, server_sent: 0 }
    }
}

/// The SYN cookies of Linux count sizes of segments, four of them, in the number that also counts
/// the client's bytes: `check_tcp_syn_cookie` in `net/ipv4/syncookies.c`. So a server that has kept
/// nothing of the handshake takes a segment that begins up to three bytes early or late for its
/// end, and its stream begins there.
const COOKIE_STEPS: u32 = 3;

impl Connections {
    /// An empty table.
    pub fn new(limits: Limits) -> Self {
        let bytes_per_connection = limits.bytes_per_connection.clamp(1, MOST_BYTES);
        let limits = Limits { bytes_per_connection, ..limits };
        Self { limits, table: Table::new(limits.connections), bytes: 0, stats: Stats::default() }
    }

    /// What a segment means, at this time. The segment may be of the client or of the server.
    ///
    /// The bytes of a segment count as sent, whatever the filter then does with it. Nothing needs
    /// to be taken back if it is dropped.
    ///
    /// A time before that of an earlier call counts as the same time.
    pub fn push(&mut self, now: Instant, segment: &Segment<'_>) -> Progress<'_> {
        self.expire(now);
        let connection = segment.connection();
        let known = self.table.find(&connection);
        let plain_syn = segment.flags.syn && !(segment.flags.ack || segment.flags.rst || segment.flags.fin);
        if let Some(number) = self.table.find(&connection.reversed()) {
            self.server_segment(number, segment, now);
            // A plain SYN always begins a connection of its own, also if somebody has sent one to
            // the client in the server's name.
            if (known.is_none() && !plain_syn) || (segment.flags.syn && segment.flags.ack) {
                return Progress::NoData;
            }
        }
        match known {
            Some(number) if segment.flags.syn => match self.begin_again(number, segment, plain_syn, now) {
                Ok(()) => Progress::NoData,
                Err(reason) => Progress::Drop(reason),
            },
            Some(number) => self.client_segment(number, segment, now),
            None if plain_syn && segment.payload.is_empty() => {
                self.begin(segment, now);
                Progress::NoData
            }
            None if plain_syn => Progress::Drop(Reason::SynData),
            None => Progress::Unknown,
        }
    }

    /// Decides a connection. Its later segments return the decision.
    ///
    /// With [`Decision::Allow`], the bytes that [`Progress::Bytes`] returned last are those that
    /// were judged. They are kept, and compared with retransmissions, until the server has
    /// acknowledged them. A decision cannot be changed from [`Decision::Deny`] to
    /// [`Decision::Allow`].
    ///
    /// Returns `false` if the table has no such connection.
    pub fn decide(&mut self, now: Instant, connection: &Connection, decision: Decision) -> bool {
        let Some(number) = self.table.find(connection) else { return false };
        self.table.renew(number, List::Used, now);
        let tracked = self.table.entry(number);
        let before = tracked.stream.memory();
        match (decision, tracked.state) {
            (Decision::Allow, State::Undecided) => tracked.allow(),
            (Decision::Allow, _) => {}
            (Decision::Deny, _) => {
                tracked.state = State::Denied;
                tracked.stream = Stream::default();
            }
        }
        self.bytes = self.bytes - before + tracked.stream.memory();
        true
    }

    /// Allows a connection when its server has answered the hello, and wants no other one. Until
    /// then it is undecided. If it does want another one, that must be decided.
    pub(crate) fn allow_after_answer(&mut self, now: Instant, connection: &Connection) {
        let Some(number) = self.table.find(connection) else { return };
        let tracked = self.table.entry(number);
        // Servers of TLS do not begin. With one direction, nothing is seen of them.
        if self.limits.both_directions && tracked.start.is_some_and(|start| start.server_sent == 0) {
            tracked.answer = Answer::Reading(0);
        } else {
            self.decide(now, connection, Decision::Allow);
        }
    }

    /// What the server of a connection has answered to an allowed hello.
    pub(crate) fn answer(&mut self, connection: &Connection) -> Answer {
        self.table.find(connection).map_or(Answer::Other, |number| self.table.entry(number).answer)
    }

    /// How many connections are remembered.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether no connection is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What happened since the table was made.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// How much memory is allocated now, in bytes, without what the allocator adds.
    pub fn memory(&self) -> usize {
        self.table.memory() + self.bytes
    }

    /// How much memory a table with these limits allocates at most, in bytes, without what the
    /// allocator adds: [`bytes`](Limits::bytes), the bytes of one connection more, and about 440
    /// bytes for each connection (rounded up to a power of two).
    pub fn most_memory(limits: &Limits) -> usize {
        Table::<Connection, Tracked>::most_memory(limits.connections.max(1))
            + limits.bytes
            + limits.bytes_per_connection
    }

    fn begin(&mut self, segment: &Segment<'_>, now: Instant) {
        while let Some(number) = self.table.surplus() {
            self.remove(number, |stats| &mut stats.evicted);
        }
        let first = segment.sequence.wrapping_add(1);
        let start = (!self.limits.both_directions).then_some(Start::new(first, None));
        let tracked = Tracked::new(start, true);
        self.table.insert(segment.connection(), tracked, now);
        self.stats.connections += 1;
    }

    /// A SYN of a client that the table knows.
    ///
    /// The server may be in the connection that an earlier SYN has begun, and ignore this one. Then
    /// it would put the bytes to other places than this table. So another SYN passes only while no
    /// segment has been accepted that completes the handshake, or when the server has acknowledged
    /// what was judged: an allowed connection has nothing left to hide. In both cases it begins
    /// nothing before the server has accepted it.
    fn begin_again(&mut self, number: u32, segment: &Segment<'_>, plain: bool, now: Instant) -> Result<(), Reason> {
        let both_directions = self.limits.both_directions;
        let tracked = self.table.entry(number);
        if !plain {
            return Err(Reason::Unacceptable);
        }
        if !segment.payload.is_empty() {
            return Err(Reason::SynData);
        }
        let first = segment.sequence.wrapping_add(1);
        let established = tracked.start.is_some_and(|start| start.established);
        if both_directions && (!established || tracked.state == (State::Allowed { settled: true })) {
            tracked.offered = true;
            if self.table.list(number) == List::Empty {
                self.table.renew(number, List::Empty, now);
            }
            return Ok(());
        }
        match (tracked.state, tracked.start) {
            (State::Undecided, Some(start)) if start.first == first => Ok(()),
            _ => Err(Reason::OtherStart),
        }
    }

    /// What a segment of the server proves.
    fn server_segment(&mut self, number: u32, segment: &Segment<'_>, now: Instant) {
        let tracked = self.table.entry(number);
        let (flags, acknowledged) = (segment.flags, segment.acknowledgment);
        if flags.rst || !flags.ack {
            return;
        }
        if flags.syn {
            let server = segment.sequence.wrapping_add(1);
            let same = |start: &Start| start.first == acknowledged && start.server.is_none_or(|known| known == server);
            let is_same = tracked.start.as_ref().is_some_and(same);
            let established = tracked.start.is_some_and(|start| start.established);
            let settled = tracked.state == (State::Allowed { settled: true });
            // The server knows which of several SYNs it has accepted, and when an old connection
            // has ended. All numbers may be those of the last one: with SYN cookies, it repeats its
            // own.
            let begins = tracked.offered || (!is_same && (!established || settled));
            if self.limits.both_directions && begins {
                self.bytes -= tracked.stream.memory();
                // That of the first SYN is counted.
                self.stats.connections += u64::from(tracked.start.is_some() && !is_same);
                let start = Some(Start::new(acknowledged, Some(server)));
                *tracked = Tracked::new(start, false);
                self.table.renew(number, List::Empty, now);
            } else if let Some(start) = tracked.start.as_mut().filter(|_| is_same) {
                start.server = Some(server);
            }
            return;
        }
        let Some(start) = &mut tracked.start else { return };
        let Start { first, server: Some(server), sent, .. } = *start else { return };
        // Late segments of an earlier connection have other numbers, and acknowledge what this
        // client has not sent. The number of a FIN comes after that of the last byte.
        let is_late = segment.sequence.wrapping_sub(server) > 1 << 30;
        if !is_late {
            start.server_sent = start.server_sent.max(end(server, segment));
            let before = tracked.stream.memory();
            tracked.read_answer(segment.sequence.wrapping_sub(server), segment.payload);
            self.bytes = self.bytes - before + tracked.stream.memory();
        }
        let Some(start) = &mut tracked.start else { return };
        let received = acknowledged.wrapping_sub(first);
        if is_late || received > sent {
            return;
        }
        start.arrived |= received > 0;
        let judged = tracked.stream.numbers();
        if tracked.state == (State::Allowed { settled: false }) && received >= judged {
            tracked.state = State::Allowed { settled: true };
            self.bytes -= tracked.stream.memory();
            tracked.stream = Stream::default();
        }
    }

    /// A segment without SYN of a client that the table knows.
    fn client_segment(&mut self, number: u32, segment: &Segment<'_>, now: Instant) -> Progress<'_> {
        let most = self.limits.bytes_per_connection;
        let tracked = self.table.entry(number);
        if tracked.state == State::Denied {
            return Progress::Denied;
        }
        let Some(start) = &mut tracked.start else { return Progress::Drop(Reason::Unconfirmed) };
        // The server drops segments without ACK, except resets.
        let carries = !segment.payload.is_empty() || segment.flags.fin;
        if !segment.flags.ack && (carries || !segment.flags.rst) {
            return Progress::Drop(Reason::Unacceptable);
        }
        // With SYN cookies, a server may have offered several connections, of which the
        // acknowledgement chooses one. Until the server has acknowledged bytes of this connection,
        // it may take any segment that fits another offer for the end of that handshake.
        let settled = tracked.state == (State::Allowed { settled: true });
        if let (Some(server), true, false) = (start.server, segment.flags.ack, settled) {
            if segment.acknowledgment.wrapping_sub(server) > start.server_sent {
                return Progress::Drop(Reason::Unacceptable);
            }
        }
        if self.limits.both_directions && !start.arrived {
            let offset = segment.sequence.wrapping_sub(start.first);
            if (1..=COOKIE_STEPS).contains(&offset) || (1..=COOKIE_STEPS).contains(&offset.wrapping_neg()) {
                return Progress::Drop(Reason::Unacceptable);
            }
        }
        if segment.flags.ack && !segment.flags.rst {
            start.established = true;
            // What was offered before is void.
            if !settled {
                tracked.offered = false;
            }
        }
        if let State::Allowed { settled } = tracked.state {
            if let Err(reason) = tracked.stream.check(start.first, segment) {
                self.stats.conflicts += u64::from(reason == Reason::Conflict);
                return Progress::Drop(reason);
            }
            start.sent = start.sent.max(end(start.first, segment));
            self.table.renew(number, List::Used, now);
            return Progress::Allowed { settled };
        }
        let before = tracked.stream.memory();
        let added = match tracked.stream.add(start.first, segment, most) {
            Ok(Some(added)) => added,
            Ok(None) => return Progress::NoData,
            Err(reason) => {
                self.stats.conflicts += u64::from(reason == Reason::Conflict);
                return Progress::Drop(reason);
            }
        };
        start.sent = start.sent.max(end(start.first, segment));
        self.bytes = self.bytes - before + tracked.stream.memory();
        if self.table.list(number) == List::Empty {
            self.table.renew(number, List::Used, now);
        }
        self.evict(number);
        let bytes = self.table.entry(number).stream.bytes();
        Progress::Bytes(Prefix { bytes, full: added.full, ended: added.ended })
    }

    /// Removes the oldest connections with bytes, but not this one.
    fn evict(&mut self, spared: u32) {
        while self.bytes > self.limits.bytes {
            let Some(number) = self.table.oldest_but(List::Used, spared) else { break };
            self.remove(number, |stats| &mut stats.evicted);
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some(number) = self.table.expired(now, self.limits.lifetime) {
            self.remove(number, |stats| &mut stats.expired);
        }
    }

    fn remove(&mut self, number: u32, counter: fn(&mut Stats) -> &mut u64) {
        let Some(tracked) = self.table.remove(number) else { return };
        self.bytes -= tracked.stream.memory();
        if tracked.state == State::Undecided {
            *counter(&mut self.stats) += 1;
        }
    }
}

/// How many bytes the client has sent up to the end of this segment, a FIN counted as one.
fn end(first: u32, segment: &Segment<'_>) -> u32 {
    let end = segment.sequence.wrapping_sub(first).wrapping_add(segment.payload.len() as u32);
    let end = end.wrapping_add(segment.flags.fin.into());
    // Numbers from before the first byte.
    if end as i32 >= 0 { end } else { 0 }
}

#[cfg(test)]
mod tests;
