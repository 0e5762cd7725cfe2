//! Receiving: datagrams become packets that wait to be taken from the stream, and answers for those who await them.

use std::{collections::VecDeque, io, ops::Range, time::Instant};

use super::{
    busy_poll::BusyPoll,
    shared::{Core, Phase, Shared, lock},
};
use crate::{
    Error, ErrorKind, PacketId,
    packet::Arrived,
    socket::{Memory, Received},
    wire::{Answer, Message, Messages, PacketMessage},
};

#[derive(Debug)]
pub(super) struct Inbox {
    memory: Memory,
    /// Received and not yet taken from the stream.
    pub(super) packets: VecDeque<Arrived>,
    /// Packets of the datagram at hand that are not alone in it, with the place of each body.
    found: Vec<(Range<usize>, PacketMessage)>,
    /// Ids of packets that could not be understood.
    bad: Vec<Option<u32>>,
    pub(super) busy_poll: BusyPoll,
}

/// Datagrams received in one go. What one poll brings waits in the inbox, so more would only make packets wait there
/// rather than in the kernel; 64 is where packing verdicts has won nearly all it can.
pub(super) const RECEIVE_BATCH: usize = 64;

impl Inbox {
    pub(super) fn new(payload: usize, busy_poll: BusyPoll) -> Self {
        let memory = Memory::new(payload);
        Self { memory, packets: VecDeque::new(), found: Vec::new(), bad: Vec::new(), busy_poll }
    }
}

impl Inbox {
    /// Makes room for messages with payloads of up to so many bytes.
    pub(super) fn set_payload(&mut self, payload: usize) {
        self.memory.set_payload(payload);
    }
}

impl Shared {
    /// Receives up to `most` datagrams; true when the socket has been found empty.
    ///
    /// # Errors
    /// The socket is of no further use.
    pub(super) fn receive(&self, inbox: &mut Inbox, most: usize) -> io::Result<bool> {
        let already = inbox.packets.len();
        let mut received = Batch::default();
        let result = self.receive_batch(inbox, most, &mut received);
        if received.is_empty() {
            // The common end of a burst: the one fact to note is that there is no more.
            let mut core = self.core();
            core.backlog = false;
            core.losing &= !(core.lossless && matches!(result, Ok(true)));
            return result;
        }
        let mut core = self.core();
        // Nobody knows yet whether more has come than the one asked for.
        core.backlog = most > 1 && !matches!(result, Ok(true));
        let lost_before = core.counters.lost;
        self.arrived(&mut core, inbox, already);
        core.counters.bytes += received.bytes;
        core.counters.overruns += received.overruns;
        let lossless = received.overruns == 0 && core.counters.lost == lost_before;
        core.episode(lossless, matches!(result, Ok(true)));
        for answer in received.answers {
            core.answered(answer);
        }
        for id in inbox.bad.drain(..) {
            self.malformed(&mut core, id);
        }
        result
    }

    fn receive_batch(&self, inbox: &mut Inbox, most: usize, received: &mut Batch) -> io::Result<bool> {
        for _ in 0..most {
            match self.socket.receive(&mut inbox.memory)? {
                Received::Empty => return Ok(true),
                Received::Overrun => received.overruns += 1,
                Received::Datagram | Received::Truncated => {
                    received.datagrams += 1;
                    received.bytes += inbox.memory.received().len() as u64;
                    inbox.take_apart(received);
                }
            }
        }
        Ok(false)
    }

    /// Enters what has come since the inbox held `already` packets.
    fn arrived(&self, core: &mut Core, inbox: &mut Inbox, already: usize) {
        let Some(first) = inbox.packets.get(already).map(|packet| packet.id) else { return };
        let now = Instant::now();
        inbox.busy_poll.arrived(now);
        let oldest = core.ledger.oldest();
        core.arrivals.arrived(first, oldest, now);
        for packet in inbox.packets.range(already..) {
            let lost = core.ledger.arrive(packet.id, packet.bytes.len() as u32);
            core.counters.received += 1;
            if lost > 0 {
                core.counters.lost += u64::from(lost);
                core.counters.gaps += 1;
            }
            if let Some((after, _)) = self.settings.deadline {
                core.deadlines.arrived(packet.id, 1, now, after);
            }
        }
        let in_flight = core.ledger.undecided() + core.ledger.gathered();
        core.fill.look(in_flight);
        core.counters.most_in_flight = core.counters.most_in_flight.max(in_flight);
        let fate = match core.phase {
            Phase::Open => None,
            Phase::Draining { fate, .. } => Some(fate),
            Phase::Unbinding | Phase::Closed => Some(self.settings.on_unanswered),
        };
        if let Some(fate) = fate {
            for packet in inbox.packets.drain(already..) {
                let _ = core.decide_unanswered(packet.id, fate);
            }
        } else if core.deadlines.next().is_some_and(|next| core.alarm.is_none_or(|alarm| next < alarm)) {
            self.signal.notify_one();
        }
    }

    /// A packet that cannot be shown to anybody must still be answered.
    fn malformed(&self, core: &mut Core, id: Option<u32>) {
        let mut error = Error::new(ErrorKind::Malformed, "receive packet");
        if let Some(id) = id {
            core.ledger.arrive(id, 0);
            let _ = core.decide_unanswered(id, self.settings.on_unanswered);
            error = error.with_packet(PacketId(id));
        }
        core.counters.malformed += 1;
        core.error(error);
    }

    /// Receives until the socket has been found empty, and wakes the stream if that brought packets for it.
    ///
    /// Bounded: the kernel queues no more than `max_len` packets that nobody decides, and answers only what was asked.
    pub(super) fn receive_all(&self) -> io::Result<()> {
        let max_len = self.core().limits.max_len as usize;
        for _ in 0..=(max_len / RECEIVE_BATCH + 4) * 4 {
            let mut inbox = lock(&self.inbox);
            let empty = self.receive(&mut inbox, RECEIVE_BATCH)?;
            if !inbox.packets.is_empty() {
                self.core().wake_stream();
            }
            if empty {
                break;
            }
        }
        Ok(())
    }
}

/// What a round of receiving brought beside packets.
#[derive(Default)]
struct Batch {
    datagrams: usize,
    bytes: u64,
    overruns: u64,
    /// Answers are rare: one for each error, and for each message that asked for one.
    answers: Vec<Answer>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.datagrams == 0 && self.overruns == 0
    }
}

impl Inbox {
    /// Takes the datagram just received apart.
    fn take_apart(&mut self, received: &mut Batch) {
        let datagram = self.memory.received();
        let mut messages = Messages::new(datagram);
        while let Some(message) = messages.next() {
            match message {
                Message::Packet { packet, body } => {
                    let start = body.as_ptr() as usize - datagram.as_ptr() as usize;
                    let body = start..start + body.len();
                    if self.found.is_empty() && messages.is_at_end() {
                        // One packet is one datagram, so this is the way they all go.
                        self.packets.push_back(Arrived::new(self.memory.take(), body, &packet));
                        return;
                    }
                    self.found.push((body, packet));
                }
                Message::Answer(answer) => received.answers.push(answer),
                Message::BadPacket(bad) => self.bad.push(bad.id),
                Message::Unknown => self.bad.push(None),
            }
        }
        if !self.found.is_empty() {
            let bytes = self.memory.take();
            self.packets.extend(self.found.drain(..).map(|(body, packet)| Arrived::new(bytes.clone(), body, &packet)));
        }
    }
}
