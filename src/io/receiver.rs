//! From the socket to packets that wait for the stream. What the receive lock protects.

use std::{collections::VecDeque, io};

use super::{
    buffers::BufferPool,
    busy_poll::BusyPoll,
    raw_packet::RawPacket,
    socket::{Few, Received, Socket},
};
use crate::wire::{Message, Messages, PacketMessage, Reply};

/// Datagrams received in one round. The packets of a round wait in this process instead of in the
/// kernel, so a longer round saves nothing: with 64 verdicts in one send the cost of a packet is
/// already near its minimum.
pub(super) const RECEIVE_BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct Receiver {
    buffers: BufferPool,
    /// Received and not yet taken from the stream.
    pub(super) packets: VecDeque<RawPacket>,
    /// Packets of a datagram that contains several messages.
    found: Vec<PacketMessage>,
    pub(super) busy_poll: BusyPoll,
    /// The last datagram came alone: most likely, so will the next one.
    alone: bool,
    /// The second of two datagrams is in its buffer: the first one ended its round.
    second_waits: bool,
}

/// What a round of receiving brought besides packets for the stream.
#[derive(Default)]
pub(super) struct Round {
    datagrams: usize,
    pub(super) bytes: u64,
    pub(super) overruns: u64,
    /// Replies are rare: one for each error, and one for each message that asked for it.
    pub(super) replies: Vec<Reply>,
    /// Ids of packets whose messages were malformed, where they could be read.
    pub(super) malformed: Vec<Option<u32>>,
    /// Packets that are decided already, to be dropped without the lock of the state.
    pub(super) decided: VecDeque<RawPacket>,
}

impl Round {
    /// What the kernel has accounted for the datagrams at most, in bytes: it rounds the length of a
    /// buffer up to twice as much, and adds less than 1 KiB of its own (`skb->truesize`).
    pub(super) fn charge(&self) -> usize {
        4 * self.bytes as usize + 2048 * self.datagrams
    }

    pub(super) fn is_empty(&self) -> bool {
        self.datagrams == 0 && self.overruns == 0
    }
}

impl Receiver {
    /// For payloads of up to `payload` bytes.
    pub(super) fn new(payload: usize, busy_poll: BusyPoll) -> Self {
        Self {
            buffers: BufferPool::new(payload),
            packets: VecDeque::new(),
            found: Vec::new(),
            busy_poll,
            alone: true,
            second_waits: false,
        }
    }

    /// Makes room for payloads of up to `payload` bytes. It never shrinks: the kernel may still
    /// send messages of the earlier size.
    pub(super) fn grow(&mut self, payload: usize) {
        self.buffers.grow(payload);
    }

    /// The longest payload for which there is room, in bytes.
    pub(super) fn payload(&self) -> usize {
        self.buffers.payload()
    }

    /// Receives up to `limit` datagrams. Returns true if the socket was found empty.
    ///
    /// # Errors
    /// The socket cannot be used any more.
    pub(super) fn receive(&mut self, socket: &Socket, limit: usize, round: &mut Round) -> io::Result<bool> {
        if std::mem::take(&mut self.second_waits) {
            self.buffers.turn_to_second();
            if !self.received(round) {
                return Ok(false);
            }
        } else if self.alone && limit > 0 {
            match socket.receive_two(&mut self.buffers)? {
                Few::Empty => return Ok(true),
                Few::Overrun => round.overruns += 1,
                Few::Datagrams { two, emptied } => {
                    self.alone = !two;
                    if !self.received(round) {
                        self.second_waits = two;
                        return Ok(false);
                    }
                    if two {
                        self.buffers.turn_to_second();
                        if !self.received(round) {
                            return Ok(false);
                        }
                    }
                    if emptied {
                        return Ok(true);
                    }
                }
            }
        }
        for _ in 0..limit {
            match socket.receive(&mut self.buffers)? {
                Received::Empty => {
                    self.alone = round.datagrams <= 1;
                    return Ok(true);
                }
                Received::Overrun => round.overruns += 1,
                Received::Datagram => {
                    if !self.received(round) {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Whether a datagram has been received, but is in no round yet.
    pub(super) fn has_second(&self) -> bool {
        self.second_waits
    }

    /// Takes the datagram just received. Returns false if the round ends here, so that the state
    /// learns of a malformed message after the packets before and before the packets behind: a
    /// packet without an id lies in the next gap of the ids, and no batch may cover it.
    fn received(&mut self, round: &mut Round) -> bool {
        round.datagrams += 1;
        round.bytes += self.buffers.received().len() as u64;
        self.parse_datagram(round);
        round.malformed.is_empty()
    }

    /// Splits the datagram just received into messages.
    fn parse_datagram(&mut self, round: &mut Round) {
        let mut messages = Messages::new(self.buffers.received());
        while let Some(message) = messages.next() {
            match message {
                // The usual case: one packet is one datagram.
                Message::Packet(packet) if self.found.is_empty() && messages.is_at_end() => {
                    let (bytes, storage) = self.buffers.take();
                    self.packets.push_back(RawPacket::new(bytes, &packet, storage));
                    return;
                }
                Message::Packet(packet) => self.found.push(packet),
                Message::Reply(reply) => round.replies.push(reply),
                Message::BadPacket(bad) => round.malformed.push(bad.id),
                Message::Unknown => round.malformed.push(None),
            }
        }
        if !self.found.is_empty() {
            let (bytes, storage) = self.buffers.take();
            let packets = self.found.drain(..).map(|packet| RawPacket::new(bytes.clone(), &packet, storage));
            self.packets.extend(packets);
        }
    }
}
