//! The table of QUIC clients.

use std::{collections::HashMap, time::Instant};

use super::{
    crypto::{Crypto, Refused},
    keys::{Keys, Opened},
    packet::{Initial, LONGEST_ID, Packet, crypto_frames},
};
use crate::{
    connections::Stats,
    limits::{Limits, MOST_BYTES},
    name::Parsed,
    progress::{Decision, Reason},
    reader::Reader,
    segment::{Connection, Datagram},
    server_names::{Hint, Seen},
    table::{List, Table},
    tls,
};

/// Decides QUIC connections by the server names in their ClientHellos.
///
/// Give it the datagrams of clients only: packets of servers have keys of their own, and are
/// dropped.
///
/// ```
/// use std::time::Instant;
/// use nfqueue_inspect::{Decision, Limits, quic::QuicNames};
///
/// let mut names = QuicNames::new(Limits::default());
/// # let packet = [0; 20];
/// let hint = names.push(Instant::now(), &packet, |_connection, seen| {
///     let forbidden = seen.name().is_some_and(|name| name.is_in("forbidden.example"));
///     if forbidden || seen.is_doubtful() { Decision::Deny } else { Decision::Allow }
/// });
/// let accept = hint.may_pass();
/// # assert!(!accept);
/// ```
#[derive(Debug)]
pub struct QuicNames {
    limits: Limits,
    table: Table<Connection, Client>,
    /// The entry that a stream's connection ID belongs to. Servers know connections by their IDs,
    /// also if a part of the hello comes from another port, or to another address of the server.
    owners: HashMap<Id, u32>,
    /// What the entries have allocated.
    bytes: usize,
    stats: Stats,
}

/// The streams of a pair of ports.
#[derive(Debug, Default)]
struct Client {
    streams: Vec<Stream>,
}

/// A connection ID, and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Id([u8; LONGEST_ID], u8);

impl Id {
    fn new(bytes: &[u8]) -> Self {
        let mut id = [0; LONGEST_ID];
        id[..bytes.len()].copy_from_slice(bytes);
        Self(id, bytes.len() as u8)
    }
}

/// The stream of an attempt to connect.
#[derive(Debug)]
struct Stream {
    /// The Destination Connection ID of its first packet, from which its keys follow.
    id: Id,
    since: Instant,
    crypto: Crypto,
    largest: Option<u64>,
    /// How many bytes the hellos have that were allowed. After a HelloRetryRequest there is a
    /// second one, whose name some servers take: OpenSSL, GnuTLS.
    judged: usize,
    /// Something was allowed that cannot be read. What follows is not read either.
    unread: bool,
    /// `None`: undecided.
    decision: Option<Decision>,
}

/// More attempts on one pair of ports within the lifetime are dropped.
const MOST_STREAMS: usize = 16;

impl QuicNames {
    /// Without connections. Of the limits, `connections` are pairs of addresses and ports.
    pub fn new(limits: Limits) -> Self {
        let bytes_per_connection = limits.bytes_per_connection.clamp(1, MOST_BYTES);
        let limits = Limits { bytes_per_connection, ..limits };
        Self {
            limits,
            table: Table::new(limits.connections),
            owners: HashMap::new(),
            bytes: 0,
            stats: Stats::default(),
        }
    }

    /// What to do with a packet of a client, which begins with its IP header.
    ///
    /// `decide` is called once for each ClientHello.
    pub fn push(&mut self, now: Instant, packet: &[u8], decide: impl FnMut(&Connection, &Seen) -> Decision) -> Hint {
        match Datagram::parse(packet) {
            Ok(datagram) => self.push_datagram(now, &datagram, decide),
            Err(unparsed) => Hint::Unparsed(unparsed),
        }
    }

    /// What to do with a datagram of a client.
    ///
    /// [`Hint::Allowed`] is never settled: another connection may begin on the same ports.
    pub fn push_datagram(
        &mut self,
        now: Instant,
        datagram: &Datagram<'_>,
        mut decide: impl FnMut(&Connection, &Seen) -> Decision,
    ) -> Hint {
        self.expire(now);
        let connection = datagram.connection();
        let mut packets = Reader::new(datagram.payload);
        let mut hints = Vec::new();
        while !packets.is_empty() {
            let hint = match Packet::next(&mut packets) {
                Some(Packet::Initial(initial)) => self.initial(now, &connection, &initial, &mut decide),
                Some(Packet::Other) => self.other(&connection),
                Some(Packet::UnknownVersion) | None => Hint::Drop(Reason::Unreadable),
            };
            hints.push(hint);
            if matches!(hint, Hint::Drop(_)) {
                break;
            }
        }
        // A datagram reaches the server as a whole, or not at all.
        let worst = hints.into_iter().max_by_key(|hint| match hint {
            Hint::Allowed { .. } => 0,
            Hint::Undecided => 1,
            Hint::Unknown => 2,
            Hint::Denied => 3,
            _ => 4,
        });
        let hint = worst.unwrap_or(Hint::Unknown);
        if let (Hint::Allowed { .. }, Some(number)) = (hint, self.table.find(&connection)) {
            self.table.renew(number, List::Used, now);
        }
        hint
    }

    /// What happened so far. Conflicts are packets with other bytes than earlier ones.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// How much memory is allocated now, in bytes, without what the allocator adds. It is at most
    /// [`Limits::bytes`], the bytes of one pair of ports more (sixteen times
    /// [`Limits::bytes_per_connection`]), and about 400 bytes for each of
    /// [`Limits::connections`].
    pub fn memory(&self) -> usize {
        self.table.memory() + self.bytes
    }

    /// A packet that carries no ClientHello. A server can do nothing with it before it has the
    /// complete hello.
    fn other(&mut self, connection: &Connection) -> Hint {
        let Some(number) = self.table.find(connection) else { return Hint::Unknown };
        let streams = &self.table.entry(number).streams;
        let has = |decision| streams.iter().any(|stream| stream.decision == decision);
        if has(Some(Decision::Allow)) {
            Hint::Allowed { settled: false }
        } else if has(None) {
            Hint::Undecided
        } else {
            Hint::Denied
        }
    }

    fn initial(
        &mut self,
        now: Instant,
        connection: &Connection,
        packet: &Initial<'_>,
        decide: &mut impl FnMut(&Connection, &Seen) -> Decision,
    ) -> Hint {
        let known = self.table.find(connection);
        let (opened, stream) = {
            let streams = known.map_or(&[][..], |number| &self.table.entry(number).streams[..]);
            match open(streams, packet) {
                Some(opened) => opened,
                None => return Hint::Drop(Reason::Unreadable),
            }
        };
        let id = Id::new(packet.connection_id);
        // The server may put together what came from both.
        if stream.is_none() && self.owners.contains_key(&id) {
            return Hint::Drop(Reason::OtherStart);
        }
        let number = known.unwrap_or_else(|| self.begin(connection, now));
        let (lifetime, most) = (self.limits.lifetime, self.limits.bytes_per_connection);
        let client = self.table.entry(number);
        let before = client.memory();
        let index = match stream {
            Some(index) => index,
            None => {
                if let Some(old) = client.make_space(now, lifetime) {
                    self.owners.remove(&old);
                }
                if client.streams.len() == MOST_STREAMS {
                    return Hint::Drop(Reason::OtherStart);
                }
                self.owners.insert(id, number);
                client.begin(id, now)
            }
        };
        let hint = client.streams[index].add(&opened, most, |seen| decide(connection, seen));
        self.bytes = self.bytes - before + client.memory();
        self.stats.conflicts += u64::from(hint == Hint::Drop(Reason::Conflict));
        if self.table.list(number) == List::Empty {
            self.table.renew(number, List::Used, now);
        }
        while self.bytes > self.limits.bytes {
            let Some(oldest) = self.table.oldest_but(List::Used, number) else { break };
            self.remove(oldest, |stats| &mut stats.evicted);
        }
        hint
    }

    fn begin(&mut self, connection: &Connection, now: Instant) -> u32 {
        while let Some(number) = self.table.surplus() {
            self.remove(number, |stats| &mut stats.evicted);
        }
        self.stats.connections += 1;
        self.table.insert(*connection, Client::default(), now)
    }

    fn expire(&mut self, now: Instant) {
        while let Some(number) = self.table.expired(now, self.limits.lifetime) {
            self.remove(number, |stats| &mut stats.expired);
        }
    }

    fn remove(&mut self, number: u32, counter: fn(&mut Stats) -> &mut u64) {
        let Some(client) = self.table.remove(number) else { return };
        self.bytes -= client.memory();
        for stream in &client.streams {
            self.owners.remove(&stream.id);
        }
        if client.streams.iter().any(|stream| stream.decision.is_none()) {
            *counter(&mut self.stats) += 1;
        }
    }
}

/// Opens a packet with the keys of one of the streams, whose index is returned, or with those of
/// its own connection ID. A server that knows the stream uses the former, another one the latter.
/// If both fit, the packet has two contents.
fn open(streams: &[Stream], packet: &Initial<'_>) -> Option<(Opened, Option<usize>)> {
    let attempt = |stream: &Stream| Keys::of_client(packet.version, stream.id()).open(packet, stream.largest);
    if let Some(index) = streams.iter().position(|stream| stream.id() == packet.connection_id) {
        return Some((attempt(&streams[index])?, Some(index)));
    }
    let own = Keys::of_client(packet.version, packet.connection_id).open(packet, None);
    let others = streams.iter().enumerate().filter_map(|(index, stream)| Some((attempt(stream)?, Some(index))));
    let mut found = own.map(|opened| (opened, None)).into_iter().chain(others);
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

impl Client {
    fn memory(&self) -> usize {
        // A hash table has up to four places for an entry, and a byte of control for each.
        let owners = self.streams.len() * 4 * (size_of::<(Id, u32)>() + 1);
        let streams = self.streams.capacity() * size_of::<Stream>() + owners;
        streams + self.streams.iter().map(|stream| stream.crypto.memory()).sum::<usize>()
    }

    /// Removes a stream that is old, if there are too many.
    fn make_space(&mut self, now: Instant, lifetime: std::time::Duration) -> Option<Id> {
        if self.streams.len() < MOST_STREAMS {
            return None;
        }
        let is_old = |stream: &Stream| now.saturating_duration_since(stream.since) >= lifetime;
        let old = self.streams.iter().position(is_old)?;
        Some(self.streams.remove(old).id)
    }

    /// Adds a stream. There must be space.
    fn begin(&mut self, id: Id, now: Instant) -> usize {
        self.streams.push(Stream {
            id,
            since: now,
            crypto: Crypto::default(),
            largest: None,
            judged: 0,
            unread: false,
            decision: None,
        });
        self.streams.len() - 1
    }
}

impl Stream {
    fn id(&self) -> &[u8] {
        &self.id.0[..usize::from(self.id.1)]
    }

    fn add(&mut self, opened: &Opened, most: usize, mut decide: impl FnMut(&Seen) -> Decision) -> Hint {
        self.largest = self.largest.max(Some(opened.number));
        if self.decision == Some(Decision::Deny) {
            return Hint::Denied;
        }
        let mut added = Ok(());
        let read = crypto_frames(&opened.frames, |offset, piece| {
            if added.is_ok() {
                added =
                    if self.unread { self.crypto.check(offset, piece) } else { self.crypto.add(offset, piece, most) };
            }
        });
        match (read, added) {
            (None, _) => return Hint::Drop(Reason::Unreadable),
            (_, Err(Refused::Drop(reason))) => return Hint::Drop(reason),
            (_, Err(Refused::TooLong)) => return self.decide(&Seen::TooLong, decide),
            (_, Ok(())) if self.unread => return Hint::Allowed { settled: false },
            (_, Ok(())) => {}
        }
        // An Initial packet of a client has nothing but hellos.
        loop {
            let rest = &self.crypto.prefix()[self.judged..];
            let seen = match tls::client_hello(rest) {
                Parsed::NeedMore if rest.is_empty() && self.decision.is_some() => break,
                Parsed::NeedMore => return Hint::Undecided,
                Parsed::Found(hello) => {
                    self.judged += tls::length(rest);
                    Seen::Quic(hello)
                }
                Parsed::Unreadable(fault) => Seen::Unreadable(fault),
                Parsed::OtherProtocol => Seen::Other,
            };
            let hint = self.decide(&seen, &mut decide);
            if self.unread || hint == Hint::Denied {
                return hint;
            }
        }
        Hint::Allowed { settled: false }
    }

    fn decide(&mut self, seen: &Seen, mut decide: impl FnMut(&Seen) -> Decision) -> Hint {
        let decision = decide(seen);
        self.decision = Some(decision);
        match decision {
            Decision::Allow => {
                self.unread = !matches!(seen, Seen::Quic(_));
                Hint::Allowed { settled: false }
            }
            Decision::Deny => {
                self.crypto = Crypto::default();
                Hint::Denied
            }
        }
    }
}
