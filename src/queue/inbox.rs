//! Receiving: datagrams become packets that wait to be taken from the stream, and answers for those who await them.

use std::{collections::VecDeque, io, ops::Range, sync::atomic::Ordering, time::Instant};

use bytes::Bytes;

use super::{
    busy_poll::BusyPoll,
    shared::{Shared, lock},
};
use crate::{
    packet::Arrived,
    socket::{Memory, Received},
    state::{Arrival, Place},
    wire::{Answer, Message, Messages, PacketMessage},
};

#[derive(Debug)]
pub(super) struct Inbox {
    memory: Memory,
    /// Received and not yet taken from the stream.
    pub(super) packets: VecDeque<Arrived>,
    /// Packets of the datagram at hand that are not alone in it, with the place of each body.
    found: Vec<(Range<usize>, PacketMessage)>,
    pub(super) busy_poll: BusyPoll,
}

/// Datagrams received in one go. What one poll brings waits in the inbox, so more would only make packets wait there
/// rather than in the kernel; 64 is where packing verdicts has won nearly all it can.
pub(super) const RECEIVE_BATCH: usize = 64;

impl Inbox {
    pub(super) fn new(payload: usize, busy_poll: BusyPoll) -> Self {
        Self { memory: Memory::new(payload), packets: VecDeque::new(), found: Vec::new(), busy_poll }
    }

    /// Sees to it that there is room for messages with payloads of up to so many bytes. It never becomes less: the kernel
    /// may still send what it was told before.
    pub(super) fn grow(&mut self, payload: usize) {
        self.memory.grow(payload);
    }
}

impl Shared {
    /// Receives up to `most` datagrams; true when the socket has been found empty. What is to be done then is left to
    /// [`attend`](Self::attend), for the caller holds the inbox.
    ///
    /// # Errors
    /// The socket is of no further use.
    pub(super) fn receive(&self, inbox: &mut Inbox, most: usize) -> io::Result<bool> {
        let sent = self.last_sent.load(Ordering::Acquire);
        let already = inbox.packets.len();
        let mut received = Batch::default();
        let result = self.receive_batch(inbox, most, &mut received);
        let emptied = matches!(result, Ok(true)).then_some(sent);
        let mut core = self.core();
        let machine = &mut core.machine;
        if received.is_empty() {
            // The common end of a burst: the one fact to note is that there is no more.
            if let Some(sent) = emptied {
                machine.emptied(sent);
            }
            return result;
        }
        let lost_before = machine.lost();
        if inbox.packets.len() > already {
            inbox.busy_poll.arrived(Instant::now);
            let arrivals = inbox.packets.range(already..).map(|packet| Arrival { id: packet.id, place: packet.place });
            if !machine.arrived(arrivals) {
                received.answered_for = inbox.packets.split_off(already);
            }
        }
        for id in &received.bad {
            machine.malformed(*id);
        }
        for answer in received.answers.drain(..) {
            machine.answered(answer);
        }
        // Nobody knows yet whether more has come than the one asked for.
        machine.received(received.bytes, received.overruns, lost_before, emptied, most > 1);
        if self.settings.deadline.is_some() {
            // What has been answered for is not handed out, and its memory is not kept for a stream that nobody polls.
            while inbox.packets.front().is_some_and(|packet| !machine.is_undecided(packet.id)) {
                received.answered_for.extend(inbox.packets.pop_front());
            }
        }
        drop(core);
        result
    }

    fn receive_batch(&self, inbox: &mut Inbox, most: usize, received: &mut Batch) -> io::Result<bool> {
        for _ in 0..most {
            match self.socket.receive(&mut inbox.memory)? {
                Received::Empty => return Ok(true),
                Received::Overrun => received.overruns += 1,
                Received::Datagram => {
                    received.datagrams += 1;
                    received.bytes += inbox.memory.received().len() as u64;
                    inbox.take_apart(received);
                    if !received.bad.is_empty() {
                        // The round ends here, so that it is entered between what came before and what comes after: a
                        // packet whose id is not known lies in the next gap of the ids, and no batch may pass it.
                        return Ok(false);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Receives for somebody else than the stream, a round at most, and has the stream woken if that brought packets for
    /// it. True when the socket has been found empty. What is to be done is left to [`attend`](Self::attend).
    pub(super) fn receive_round(&self) -> io::Result<bool> {
        let mut inbox = lock(&self.inbox);
        let result = self.receive(&mut inbox, RECEIVE_BATCH);
        if !inbox.packets.is_empty() {
            self.core().machine.wake_stream();
            if let Some(foreign) = self.foreign.get() {
                foreign.raise();
            }
        }
        result
    }

    /// Receives until the socket has been found empty.
    ///
    /// Bounded: the kernel queues no more than `max_len` packets that nobody decides, and answers only what was asked.
    pub(super) fn receive_all(&self) -> io::Result<()> {
        let max_len = self.core().machine.limits().max_len as usize;
        for _ in 0..=(max_len / RECEIVE_BATCH + 4) * 4 {
            if self.receive_round()? {
                break;
            }
        }
        Ok(())
    }

    /// Receives packets that may have lain unread for long, so that their deadlines begin.
    pub(super) fn look_for_unread(&self) {
        let _ = self.receive_all();
        self.attend();
    }

    /// Has the timer told when the socket is readable.
    pub(super) fn watch_socket(&self) {
        let Some(timer) = self.timer.get() else { return };
        let again = self.watched.swap(true, Ordering::Relaxed);
        if let Err(source) = self.socket.watch(timer, again) {
            tracing::error!(parent: self.trace.span(), error = %source, "deadlines of unread packets are not kept");
        }
    }
}

/// What a round of receiving brought beside packets to hand out.
#[derive(Default)]
struct Batch {
    datagrams: usize,
    bytes: u64,
    overruns: u64,
    /// Answers are rare: one for each error, and for each message that asked for one.
    answers: Vec<Answer>,
    /// Ids of packets that could not be understood.
    bad: Vec<Option<u32>>,
    answered_for: VecDeque<Arrived>,
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
                        let (bytes, place) = self.memory.take();
                        self.packets.push_back(Arrived::new(bytes, body, &packet, place));
                        return;
                    }
                    self.found.push((body, packet));
                }
                Message::Answer(answer) => received.answers.push(answer),
                Message::BadPacket(bad) => received.bad.push(bad.id),
                Message::Unknown => received.bad.push(None),
            }
        }
        if !self.found.is_empty() {
            let (bytes, place): (Bytes, Place) = self.memory.take();
            let found = self.found.drain(..).map(|(body, packet)| Arrived::new(bytes.clone(), body, &packet, place));
            self.packets.extend(found);
        }
    }
}
