//! From verdict messages to datagrams. The thread that sends has the outbox for itself: messages
//! are encoded without the lock of the machine.

use std::time::Duration;

use super::{Carried, VerdictMessage};
use crate::wire::verdict::{self, Attachments};

/// The messages of a round of sending, and the datagram that is made of the next of them.
#[derive(Debug)]
pub struct Outbox<E> {
    queue: u16,
    /// The longest datagram that the socket sends, in bytes.
    max_send: usize,
    pub(super) stage: Stage,
    /// Those of the round; kept for its memory.
    messages: Vec<VerdictMessage<E>>,
    /// How long the packets of each message have waited.
    waited: Vec<Duration>,
    /// The messages before this one have been sent.
    begin: usize,
    /// The messages from `begin` to here are those of the datagram.
    end: usize,
    /// The sequence number of the datagram's first message.
    first: u32,
    /// The length of the datagram in bytes.
    length: usize,
    datagram: Vec<u8>,
}

/// How far a round of sending is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Idle,
    /// The socket has been read empty for this round.
    Proven,
    Sending,
}

impl<E: Carried> Outbox<E> {
    /// `max_send` is the longest datagram that the socket sends, in bytes.
    pub fn new(queue: u16, max_send: usize) -> Self {
        Self {
            queue,
            max_send,
            stage: Stage::Idle,
            messages: Vec::new(),
            waited: Vec::new(),
            begin: 0,
            end: 0,
            first: 0,
            length: 0,
            datagram: Vec::new(),
        }
    }

    /// The messages of a new round are stored by `settle`, and how long the packets of each have
    /// waited is found by `waited`, from the id of the first one. Returns the number of the
    /// messages.
    pub(super) fn fill(
        &mut self,
        settle: impl FnOnce(&mut Vec<VerdictMessage<E>>),
        mut waited: impl FnMut(u32) -> Duration,
    ) -> usize {
        settle(&mut self.messages);
        self.waited.extend(self.messages.iter().map(|message| waited(message.first())));
        self.messages.len()
    }

    /// Chooses the next messages for a datagram: as many as fit, and at least one. Returns false if
    /// none is left.
    pub(super) fn choose(&mut self, first: u32) -> bool {
        (self.first, self.length) = (first, 0);
        for message in &self.messages[self.begin..] {
            let length = verdict::length(message.fields(), &attachments(message));
            if self.length > 0 && self.length + length > self.max_send {
                break;
            }
            self.length += length;
            self.end += 1;
        }
        self.end > self.begin
    }

    /// The messages of the datagram, and the sequence number of the first one.
    pub(super) fn chosen(&mut self) -> (u32, &mut [VerdictMessage<E>]) {
        (self.first, &mut self.messages[self.begin..self.end])
    }

    /// The length of the datagram in bytes.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Encodes the datagram. This may take longer than the lock of the machine should be held.
    pub fn encode(&mut self) -> &[u8] {
        self.datagram.clear();
        let mut sequence = self.first;
        for message in &self.messages[self.begin..self.end] {
            match message {
                VerdictMessage::Batch { max, fields, .. } => {
                    verdict::encode_batch(&mut self.datagram, sequence, self.queue, *max, fields);
                }
                VerdictMessage::Single { id, decision } => {
                    let tag = (sequence, decision.extras.as_ref().is_some_and(Carried::is_acknowledged));
                    let (fields, attachments) = (&decision.fields, attachments(message));
                    verdict::encode_single(&mut self.datagram, tag, self.queue, *id, fields, &attachments);
                }
            }
            sequence = sequence.wrapping_add(1);
        }
        debug_assert_eq!(self.datagram.len(), self.length);
        &self.datagram
    }

    /// The messages of the datagram, and how long the packets of each have waited.
    pub(super) fn chosen_with_times(&self) -> impl Iterator<Item = (&VerdictMessage<E>, Duration)> {
        let range = self.begin..self.end;
        self.messages[range.clone()].iter().zip(self.waited[range].iter().copied())
    }

    /// The datagram has been sent. Returns the number of its messages.
    pub(super) fn sent(&mut self) -> usize {
        let count = self.end - self.begin;
        self.begin = self.end;
        count
    }

    /// Removes what has not been sent: the messages of the datagram, and those behind it.
    pub(super) fn take_unsent(&mut self) -> (Vec<VerdictMessage<E>>, Vec<VerdictMessage<E>>) {
        let rest = self.messages.split_off(self.end);
        self.end = self.begin;
        self.waited.truncate(self.begin);
        (self.messages.split_off(self.begin), rest)
    }

    /// The socket does not send a datagram of this length any more: its send buffer has been
    /// reduced (it may be shared with another process).
    pub(super) fn shorten(&mut self) {
        self.max_send = self.length / 2;
    }

    #[cfg(test)]
    pub(super) fn set_max_send(&mut self, bytes: usize) {
        self.max_send = bytes;
    }

    /// Ends a round: removes its messages. What they carried is to be dropped without a lock.
    pub fn take_spent(&mut self) -> Vec<E> {
        (self.begin, self.end) = (0, 0);
        self.waited.clear();
        let spent = self.messages.drain(..).filter_map(|message| match message {
            VerdictMessage::Single { decision, .. } => decision.extras,
            VerdictMessage::Batch { .. } => None,
        });
        spent.collect()
    }
}

fn attachments<E: Carried>(message: &VerdictMessage<E>) -> Attachments<'_> {
    match message {
        VerdictMessage::Single { decision, .. } => {
            decision.extras.as_ref().map_or_else(Attachments::default, Carried::attachments)
        }
        VerdictMessage::Batch { .. } => Attachments::default(),
    }
}
