//! nfnetlink_queue and the socket as a model: what the kernel does with packets and messages.

use std::collections::{BTreeSet, HashMap, VecDeque};

use rustix::io::Errno;

use crate::{
    types::Action,
    wire::{Refused, Reply},
};

/// Random numbers that are the same each time (xorshift64*).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    pub(super) fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }
}

/// What is in the socket's receive buffer.
#[derive(Debug)]
pub(super) enum Datagram {
    /// `readable` is set for a truncated message: its id, if that can be read.
    Packet {
        id: u32,
        readable: Option<Option<u32>>,
    },
    Reply(Reply),
}

/// The queue as the kernel keeps it.
pub(super) struct Kernel {
    pub(super) queued: BTreeSet<u32>,
    pub(super) next_id: u32,
    pub(super) max_len: usize,
    pub(super) fail_open: bool,
    pub(super) socket: VecDeque<Datagram>,
    pub(super) room: usize,
    /// The action of each packet that was decided by a verdict.
    pub(super) actions: HashMap<u32, Action>,
    /// Packets that left the queue without a verdict, or were not queued.
    pub(super) gone: BTreeSet<u32>,
    /// How many were dropped while they were queued.
    pub(super) dropped: u64,
    pub(super) bound: bool,
}

/// A message to the kernel.
pub(super) enum Sent {
    Single { id: u32, action: Action, acknowledge: bool },
    Batch { max: u32, action: Action },
    Length { packets: usize, fail_open: bool },
    Unbind,
}

impl Kernel {
    pub(super) fn packet(&mut self, random: &mut Random) {
        if !self.bound || self.queued.len() >= self.max_len {
            return;
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        if self.socket.len() >= self.room {
            self.gone.insert(id);
            return;
        }
        let readable = random.one_in(200).then(|| random.one_in(2).then_some(id));
        self.socket.push_back(Datagram::Packet { id, readable });
        self.queued.insert(id);
    }

    /// `nfnetlink_rcv`: without the capability there is one reply, and nothing is executed.
    pub(super) fn send(&mut self, first: u32, messages: Vec<Sent>, capable: bool) {
        if !capable {
            let refused = match messages[0] {
                Sent::Single { id, action, .. } => Refused::Verdict { id, action: Some(action) },
                Sent::Batch { max, .. } => Refused::Batch { max },
                Sent::Length { .. } | Sent::Unbind => Refused::Other,
            };
            return self.reply(first, Some(Errno::PERM), refused);
        }
        for (message, sequence) in messages.into_iter().zip((0..).map(|offset| first.wrapping_add(offset))) {
            match message {
                Sent::Single { id, action, acknowledge } => {
                    let refused = Refused::Verdict { id, action: Some(action) };
                    if !self.queued.remove(&id) {
                        self.reply(sequence, Some(Errno::NOENT), refused);
                    } else {
                        self.decided(id, action);
                        if acknowledge {
                            self.reply(sequence, None, Refused::Other);
                        }
                    }
                }
                Sent::Batch { max, action } => {
                    let upto: Vec<u32> =
                        self.queued.iter().copied().filter(|id| id.wrapping_sub(max) as i32 <= 0).collect();
                    if upto.is_empty() {
                        self.reply(sequence, Some(Errno::NOENT), Refused::Batch { max });
                    }
                    for id in upto {
                        self.queued.remove(&id);
                        self.decided(id, action);
                    }
                }
                Sent::Length { packets, fail_open } => {
                    (self.max_len, self.fail_open) = (packets, fail_open);
                    self.reply(sequence, None, Refused::Other);
                }
                Sent::Unbind => {
                    self.bound = false;
                    self.gone.append(&mut self.queued);
                    self.reply(sequence, None, Refused::Other);
                }
            }
        }
    }

    pub(super) fn decided(&mut self, id: u32, action: Action) {
        assert!(self.actions.insert(id, action).is_none(), "packet {id} was decided twice");
    }

    pub(super) fn reply(&mut self, sequence: u32, error: Option<Errno>, refused: Refused) {
        if self.socket.len() < self.room {
            self.socket.push_back(Datagram::Reply(Reply { sequence, error, refused, text: None }));
        }
    }
}
