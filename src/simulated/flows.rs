//! What the rules of a `Divert` with flow marks do, as a pure model: the time is handed in. The
//! names of its chains stand beside what is taken from them (`divert/flows.rs`).

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use super::tuple::{DCCP, ICMP, ICMPV6, Part, SCTP, Seen, TCP, Tuple, UDP, UDP_LITE, look};
use crate::types::{
    FlowMarks, Hook,
    flow_codes::{self, FlowCodes},
};

/// The rules of a table, with what they remember, and connection tracking as far as they need it.
#[derive(Debug, Default)]
pub(super) struct Flows {
    /// The queues that the rules send packets to.
    queues: BTreeMap<u16, FlowCodes>,
    /// The confirmed entries, by the tuples of their first packets.
    entries: HashMap<Tuple, Entry>,
    /// Denied connections, until when. Those that are rejected are remembered apart.
    dropped: Memory,
    rejected: Memory,
    /// Connections that have just been denied by their first packet.
    recent: Memory,
    /// Connections of the other side beside denied ones.
    beside: Memory,
    last_id: u64,
}

/// An entry of connection tracking.
#[derive(Debug)]
struct Entry {
    id: u64,
    mark: Mark,
    /// A first packet has begun it.
    begun: bool,
    /// IPS_SEEN_REPLY
    answered: bool,
    /// The answer to the first packet has come.
    met: bool,
    /// IPS_ASSURED
    assured: bool,
    confirmed_at: Duration,
    expires_at: Duration,
}

/// The values of [`FlowMarks`](crate::FlowMarks).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mark {
    #[default]
    None,
    Accepting,
    Accepted,
    BegunAgain,
    Denied,
}

/// A packet that the rules see, with its connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlowPacket {
    seen: Option<Seen>,
    /// `None` if it belongs to no connection (`INVALID`, `UNTRACKED`).
    connection: Option<Connection>,
    can_reject: bool,
    codes: FlowCodes,
    /// The priority while a code has its place.
    priority: u32,
}

/// The entry that a packet belongs to.
#[derive(Debug, Clone, Copy)]
struct Connection {
    id: u64,
    original: Tuple,
    /// The mark of an entry that no packet has confirmed.
    mark: Mark,
    is_new: bool,
    /// Of the side that has not begun the connection.
    is_reply: bool,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChainVerdict {
    Accepted,
    Dropped,
    /// Dropped, and the kernel has replied to the sender.
    Rejected,
}

impl FlowPacket {
    /// Whether the rules read this priority as a verdict that denies.
    pub(super) fn denied_by(&self, priority: u32) -> bool {
        self.codes.has(priority) && flow_codes::denies(priority)
    }

    /// The priority of a packet that was dropped, as it was without a code.
    pub(super) fn own_priority(&self, priority: u32) -> u32 {
        if self.codes.has(priority) { self.priority } else { priority }
    }

    fn is_first(&self) -> bool {
        self.seen.is_some_and(|seen| seen.part == Part::First)
    }

    fn is_error(&self) -> bool {
        self.seen.is_some_and(|seen| seen.part == Part::Error)
    }

    fn reject(&self) -> ChainVerdict {
        let gets_replies = self.seen.is_none_or(|seen| seen.gets_replies);
        if self.can_reject && gets_replies { ChainVerdict::Rejected } else { ChainVerdict::Dropped }
    }
}

// What the model calls.

impl Flows {
    /// A queue has been bound, with flow marks or without.
    pub(super) fn bound(&mut self, queue: u16, marks: Option<FlowMarks>) {
        match marks {
            Some(marks) => self.queues.insert(queue, FlowCodes::of(marks)),
            None => self.queues.remove(&queue),
        };
    }

    /// The codes of the rules that send packets to this queue, if such rules do.
    pub(super) fn codes(&self, queue: u16) -> Option<FlowCodes> {
        self.queues.get(&queue).copied()
    }

    /// Forgets all verdicts (`Divert::forget_flows`).
    pub(super) fn forget(&mut self) {
        self.dropped = Memory::default();
        self.rejected = Memory::default();
        self.recent = Memory::default();
        self.beside = Memory::default();
        for entry in self.entries.values_mut() {
            // Verdicts for packets of an older connection may be on their way.
            entry.mark = match entry.mark {
                Mark::BegunAgain | Mark::Accepting => Mark::BegunAgain,
                _ => Mark::None,
            };
        }
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }

    /// Finds the connection of a packet (`nf_conntrack_in`).
    pub(super) fn track(&mut self, packet: &[u8], hook: u8, codes: FlowCodes, now: Duration) -> FlowPacket {
        let seen = look(packet);
        let connection = seen.and_then(|seen| self.connection(seen, now));
        FlowPacket { seen, connection, can_reject: hook != Hook::Postrouting.number(), codes, priority: 0 }
    }

    /// The rules before the queue. `matches`: whether the user's rule matches. `None` if the packet
    /// is to be queued, with a code in its priority, or passes because no rule matches.
    pub(super) fn before_queue(
        &mut self,
        packet: &mut FlowPacket,
        priority: &mut u32,
        matches: bool,
        now: Duration,
    ) -> Option<ChainVerdict> {
        self.first_rules(packet, priority, now).or_else(|| match matches {
            true => self.queue_rules(packet, priority),
            false => self.last_rules(packet, now),
        })
    }

    /// The rules behind the queue, for a packet that has been accepted so far. `stops`: its verdict
    /// skips them.
    pub(super) fn behind_queue(
        &mut self,
        packet: &mut FlowPacket,
        priority: &mut u32,
        stops: bool,
        now: Duration,
    ) -> ChainVerdict {
        let codes = packet.codes;
        let accepts = *priority & flow_codes::CODE == codes.accepted();
        if !stops {
            let denied = packet.denied_by(*priority);
            let alone = !accepts && *priority & flow_codes::CODE != 0;
            self.passes(packet, alone, denied, now);
        }
        if codes.has(*priority) && !stops {
            if let Some(verdict) = self.denying_verdict(packet, *priority, now) {
                return verdict;
            }
            if accepts {
                self.verdict_accept(packet, now);
            }
            if let Some(connection) = packet.connection {
                if self.is_unconfirmed(connection) {
                    self.recent.forget(connection.original.reversed());
                } else if packet.is_first() && !accepts && self.mark(connection) == Mark::Accepted {
                    self.set_mark(connection, Mark::BegunAgain);
                }
            }
            *priority = codes.original(*priority);
        }
        self.confirm(packet, now);
        ChainVerdict::Accepted
    }
}

// The chains before the queue.

impl Flows {
    fn first_rules(&mut self, packet: &mut FlowPacket, priority: &mut u32, now: Duration) -> Option<ChainVerdict> {
        if packet.codes.has(*priority) {
            // `flow_back`
            if let Some(verdict) = self.denying_verdict(packet, *priority, now) {
                return Some(verdict);
            }
            *priority = packet.codes.original(*priority);
        }
        let Some(connection) = packet.connection else { return self.stray(packet, now) };
        let is_unconfirmed = self.is_unconfirmed(connection);
        if packet.is_first() {
            self.begins(connection);
        }
        let original = connection.original;
        if self.is_denied(original, now) {
            self.set_mark(connection, Mark::Denied);
            return Some(self.denied(packet, original, now));
        }
        if self.is_denied(original.reversed(), now) {
            // `flow_reversed`
            if matches!(self.mark(connection), Mark::Accepting | Mark::Accepted) {
                self.set_mark(connection, Mark::None);
            }
            if packet.is_first() && connection.is_reply {
                return Some(self.denied(packet, original.reversed(), now));
            }
            if self.beside.contains(original, now) {
                self.beside.remember(original, DENIED_FOR, now);
            } else if !packet.is_first() && (!is_unconfirmed || original.has_first_packets()) {
                if !original.has_first_packets() {
                    let memory = match self.rejected.contains(original.reversed(), now) {
                        true => &mut self.rejected,
                        false => &mut self.dropped,
                    };
                    memory.remember(original, DENIED_FOR, now);
                    self.set_mark(connection, Mark::Denied);
                }
                return Some(self.denied(packet, original.reversed(), now));
            }
        }
        match self.mark(connection) {
            Mark::Denied => return Some(self.denied(packet, original, now)),
            Mark::Accepting if packet.seen.is_some_and(|seen| seen.answers) && connection.is_reply => {
                self.set_mark(connection, Mark::Accepted)
            }
            _ => {}
        }
        None
    }

    /// `flow_begins`
    fn begins(&mut self, connection: Connection) {
        if !self.is_unconfirmed(connection) && self.mark(connection) != Mark::Denied {
            self.set_mark(connection, Mark::BegunAgain);
        }
    }

    /// `flow_stray`
    fn stray(&mut self, packet: &FlowPacket, now: Duration) -> Option<ChainVerdict> {
        let Seen { tuple, part, .. } = packet.seen?;
        // `flow_stray_icmp`
        if matches!(part, Part::Error | Part::Reply) {
            let sees = part == Part::Reply || tuple.has_ports();
            let denied = sees && (self.is_denied(tuple, now) || self.is_denied(tuple.reversed(), now));
            return denied.then_some(ChainVerdict::Dropped);
        }
        let of_other_side = part != Part::First && tuple.has_first_packets();
        for (tuple, counts) in [(tuple, true), (tuple.reversed(), of_other_side)] {
            if counts && self.is_denied(tuple, now) {
                return Some(self.denied(packet, tuple, now));
            }
        }
        None
    }

    /// `flow_denied`, `flow_reversed_denied`
    fn denied(&mut self, packet: &FlowPacket, original: Tuple, now: Duration) -> ChainVerdict {
        let reversed = original.reversed();
        let is_confirmed = packet.connection.is_some_and(|connection| !self.is_unconfirmed(connection));
        let is_rejected = self.rejected.contains(original, now);
        let memory = if is_rejected { &mut self.rejected } else { &mut self.dropped };
        memory.remember(original, DENIED_FOR, now);
        if is_confirmed && !original.has_first_packets() {
            memory.remember(reversed, DENIED_FOR, now);
        }
        for memory in [&mut self.dropped, &mut self.rejected] {
            if !original.has_first_packets() && memory.contains(reversed, now) {
                memory.remember(reversed, DENIED_FOR, now);
            }
        }
        if is_rejected { packet.reject() } else { ChainVerdict::Dropped }
    }

    /// `to_queue_N`
    fn queue_rules(&mut self, packet: &mut FlowPacket, priority: &mut u32) -> Option<ChainVerdict> {
        let hides_addresses = packet.seen.is_some_and(|seen| seen.hides_addresses);
        if !hides_addresses && packet.connection.is_some_and(|connection| self.mark(connection) == Mark::Accepted) {
            return Some(ChainVerdict::Accepted);
        }
        packet.priority = *priority;
        if *priority & flow_codes::CODE == 0 {
            let has_connection = packet.connection.is_some() && !packet.is_error();
            *priority |= if has_connection { packet.codes.queued() } else { packet.codes.alone() };
        }
        None
    }

    /// `flow_crossed`: no rule has decided about the packet.
    fn last_rules(&self, packet: &FlowPacket, now: Duration) -> Option<ChainVerdict> {
        let connection = packet.connection.filter(|connection| self.is_unconfirmed(*connection))?;
        let crossed = !packet.is_first() && self.recent.contains(connection.original.reversed(), now);
        crossed.then_some(ChainVerdict::Dropped)
    }
}

// The chains behind the queue.

impl Flows {
    /// `flow_alone`, `flow_beside`
    fn passes(&mut self, packet: &mut FlowPacket, alone: bool, denied: bool, now: Duration) {
        let Some(connection) = packet.connection else { return };
        if packet.is_first() && alone && self.mark(connection) == Mark::Accepting {
            self.mark_packet(packet, Mark::BegunAgain);
        }
        let original = connection.original;
        let begins = !connection.is_reply && (packet.is_first() || !original.has_first_packets());
        let may_begin = self.is_unconfirmed(connection) || self.mark(connection) == Mark::BegunAgain;
        // Without first packets, the denied connection's other side is remembered as denied too.
        let own = packet.is_first() || !self.is_denied(original, now);
        if begins && own && may_begin && !denied && self.is_denied(original.reversed(), now) {
            self.beside.remember(original, DENIED_FOR, now);
        }
    }

    /// The verdicts that deny.
    fn denying_verdict(&mut self, packet: &FlowPacket, priority: u32, now: Duration) -> Option<ChainVerdict> {
        let codes = packet.codes;
        let is_confirmed = packet.connection.is_some_and(|connection| !self.is_unconfirmed(connection));
        let (memory, verdict) = match priority {
            code if code == codes.dropped() => (&mut self.dropped, ChainVerdict::Dropped),
            code if code == codes.rejected() => (&mut self.rejected, packet.reject()),
            code if code == codes.rejected_packet() => return Some(packet.reject()),
            _ => return None,
        };
        if let Some(connection) = packet.connection {
            self.beside.forget(connection.original.reversed());
            memory.remember(connection.original, DENIED_FOR, now);
            if is_confirmed && !connection.original.has_first_packets() {
                memory.remember(connection.original.reversed(), DENIED_FOR, now);
            }
            if self.is_unconfirmed(connection) {
                self.recent.remember(connection.original, RECENT, now);
            }
            self.set_mark(connection, Mark::Denied);
        }
        Some(verdict)
    }

    /// `flow_verdict_accept`, `flow_save`
    fn verdict_accept(&mut self, packet: &mut FlowPacket, now: Duration) {
        let Some(connection) = packet.connection else { return };
        let mark = self.mark(connection);
        let original = connection.original;
        // A denial wins, whichever comes first.
        if mark == Mark::Denied || self.is_denied(original, now) || self.is_denied(original.reversed(), now) {
            return;
        }
        let is_first = packet.is_first();
        if original.has_first_packets() && !is_first && self.may_be_late(packet, connection) {
            return;
        }
        let mark = match mark {
            _ if is_first => Mark::Accepting,
            Mark::BegunAgain | Mark::Accepting => return,
            _ => Mark::Accepted,
        };
        self.mark_packet(packet, mark);
    }

    /// Whether a packet that is no first one may be of an older connection: as far as connection
    /// tracking knows, its connection is not established.
    fn may_be_late(&self, packet: &FlowPacket, connection: Connection) -> bool {
        let Some(entry) = self.entry(connection) else { return self.is_unconfirmed(connection) };
        let answers = packet.seen.is_some_and(|seen| seen.answers);
        let begins = !entry.assured && (entry.answered || connection.original.protocol == SCTP);
        begins && !answers
    }

    fn is_denied(&self, tuple: Tuple, now: Duration) -> bool {
        self.dropped.contains(tuple, now) || self.rejected.contains(tuple, now)
    }
}

// Connection tracking.

impl Flows {
    fn connection(&mut self, seen: Seen, now: Duration) -> Option<Connection> {
        let Seen { tuple, part, answers, .. } = seen;
        let found = self.find(tuple, now).map(|original| (original, original != tuple || part == Part::Reply));
        if let Some((original, is_reply)) = found {
            let entry = self.entries.get_mut(&original)?;
            if part != Part::Error {
                // Of TCP: `TCP_CONNTRACK_ESTABLISHED` after it, and a reply before.
                entry.assured |= match tuple.protocol {
                    SCTP => is_reply && !answers,
                    _ => entry.answered && part == Part::Any && (!entry.begun || (entry.met && !is_reply)),
                };
                entry.answered |= is_reply;
                entry.met |= is_reply && answers;
                entry.expires_at = now + idle_time(original, entry, now);
            }
            return Some(Connection { id: entry.id, original, mark: Mark::None, is_new: false, is_reply });
        }
        matches!(part, Part::First | Part::Any).then(|| {
            self.last_id += 1;
            Connection { id: self.last_id, original: tuple, mark: Mark::None, is_new: true, is_reply: false }
        })
    }

    /// The tuple of the first packet of a connection that is confirmed.
    fn find(&self, tuple: Tuple, now: Duration) -> Option<Tuple> {
        let lives = |tuple: &Tuple| self.entries.get(tuple).is_some_and(|entry| entry.expires_at > now);
        [tuple, tuple.reversed()].into_iter().find(lives)
    }

    fn entry(&self, connection: Connection) -> Option<&Entry> {
        self.entries.get(&connection.original).filter(|entry| entry.id == connection.id)
    }

    fn is_unconfirmed(&self, connection: Connection) -> bool {
        connection.is_new && self.entry(connection).is_none()
    }

    fn mark(&self, connection: Connection) -> Mark {
        self.entry(connection).map_or(connection.mark, |entry| entry.mark)
    }

    /// Sets the mark of the entry that a packet belongs to.
    fn mark_packet(&mut self, packet: &mut FlowPacket, mark: Mark) {
        match &mut packet.connection {
            Some(connection) if self.is_unconfirmed(*connection) => connection.mark = mark,
            Some(connection) => self.set_mark(*connection, mark),
            None => {}
        }
    }

    /// Sets the mark of a confirmed entry. What an entry that is gone would get is lost.
    fn set_mark(&mut self, connection: Connection, mark: Mark) {
        if let Some(entry) = self.entries.get_mut(&connection.original).filter(|entry| entry.id == connection.id) {
            entry.mark = mark;
        }
    }

    /// `__nf_conntrack_confirm`: of several entries with one tuple, the first one remains.
    fn confirm(&mut self, packet: &FlowPacket, now: Duration) {
        let Some(Connection { id, original, mark, is_new: true, .. }) = packet.connection else { return };
        if self.find(original, now).is_some() {
            return;
        }
        if self.entries.len() >= MOST_BEFORE_PURGE && self.entries.len() == self.entries.capacity() {
            self.entries.retain(|_, entry| entry.expires_at > now);
        }
        let begun = packet.is_first();
        let (answered, met, assured) = (false, false, false);
        let mut entry = Entry { id, mark, begun, answered, met, assured, confirmed_at: now, expires_at: now };
        entry.expires_at += idle_time(original, &entry, now);
        self.entries.insert(original, entry);
    }
}

/// For how long an entry is kept after a packet: the defaults of Linux.
fn idle_time(tuple: Tuple, entry: &Entry, now: Duration) -> Duration {
    const DAY: u64 = 86_400;
    /// `stream_ts`: a short exchange is no stream.
    const STREAM: Duration = Duration::from_secs(2);
    let is_stream = entry.answered && now > entry.confirmed_at + STREAM;
    Duration::from_secs(match tuple.protocol {
        TCP => 5 * DAY,
        DCCP => DAY / 2,
        SCTP => 210,
        UDP | UDP_LITE if is_stream => 120,
        UDP | UDP_LITE | ICMP | ICMPV6 => 30,
        _ => 600,
    })
}

/// Tuples, each until a time.
#[derive(Debug, Default)]
struct Memory(HashMap<Tuple, Duration>);

impl Memory {
    fn contains(&self, tuple: Tuple, now: Duration) -> bool {
        self.0.get(&tuple).is_some_and(|until| *until > now)
    }

    fn forget(&mut self, tuple: Tuple) {
        self.0.remove(&tuple);
    }

    fn remember(&mut self, tuple: Tuple, time: Duration, now: Duration) {
        if self.0.len() >= MOST_BEFORE_PURGE && self.0.len() == self.0.capacity() {
            self.0.retain(|_, until| *until > now);
        }
        self.0.insert(tuple, now + time);
    }
}

/// The default of `DivertBuilder::denied_flows`.
const DENIED_FOR: Duration = Duration::from_secs(600);
/// For how long the other side's first packet is taken for a reply to the denied one.
const RECENT: Duration = Duration::from_secs(2);
/// What has expired is removed when a larger map is full.
const MOST_BEFORE_PURGE: usize = 1024;
