//! Messages that have been sent, by their sequence numbers, and what the kernel may still say about
//! them.

use std::{collections::VecDeque, time::Instant};

use rustix::io::Errno;

use super::{
    Carried, Limits, VerdictMessage,
    awaiting::{Awaited, Awaiting, SentBatches, is_after},
    unproven::{Unproven, Verdict},
};
use crate::types::Action;

#[derive(Debug)]
pub(super) struct Outstanding<W> {
    /// The sequence number of the last message. A reply to a later one is not for this queue: some
    /// other process has a copy of the socket.
    sequence: u32,
    /// Replies to messages up to this sequence number are for the process that had the queue
    /// before.
    inherited: Option<u32>,
    /// The datagram that is being sent, by the sequence number of its first message, and whether a
    /// reply has refused it.
    current: Option<(u32, bool)>,
    /// Datagrams that are known to have been refused, by their first messages. The replies to them
    /// bring nothing new.
    known_refused: VecDeque<u32>,
    /// Messages whose replies a task waits for.
    awaiting: Awaiting<W>,
    batches: SentBatches,
    unproven: Unproven,
    /// The kernel refused a datagram although the thread had the capability: only replies show
    /// whether a datagram was executed.
    only_replies_prove: bool,
    /// Verdicts may have been sent for packets that the kernel had released or lost. From then on a
    /// verdict that finds no packet does not prove that the kernel dropped it.
    doubtful: bool,
    /// Packets that the kernel has certainly dropped while they were queued.
    dropped: u64,
}

/// What a reply is about.
#[derive(Debug)]
pub(super) enum Replied<W> {
    /// A message of the process that had the queue before.
    Inherited,
    /// Nothing new, or a message of another process.
    Nothing,
    /// A verdict that the kernel has discarded because the capability was missing.
    Discarded(Verdict),
    Message(Option<Awaited<W>>),
}

/// The number of refused datagrams that are remembered. The kernel sends at most one error for each
/// message of a datagram.
const MAX_KNOWN_REFUSED: usize = 1024;

impl<W> Outstanding<W> {
    pub(super) fn new() -> Self {
        Self {
            sequence: 0,
            inherited: None,
            current: None,
            known_refused: VecDeque::new(),
            awaiting: Awaiting::default(),
            batches: SentBatches::default(),
            unproven: Unproven::default(),
            only_replies_prove: false,
            doubtful: false,
            dropped: 0,
        }
    }

    // Messages.

    /// The sequence number of the last message.
    pub(super) fn sequence(&self) -> u32 {
        self.sequence
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Continues behind the messages of another process.
    pub(super) fn continue_after(&mut self, sequence: u32) {
        self.sequence = sequence;
        self.inherited = Some(sequence);
    }

    /// A datagram with this first message is about to be sent. Its messages follow.
    pub(super) fn begin_datagram(&mut self, first: u32) {
        self.current = Some((first, false));
    }

    /// A message is about to be sent, when so many packets have been received. Returns whether a
    /// task waits for the reply.
    pub(super) fn begin<E: Carried<Waiter = W>>(&mut self, message: &mut VerdictMessage<E>, received: u64) -> bool {
        let sequence = self.next_sequence();
        match message {
            VerdictMessage::Batch { fields, count, .. } => {
                self.batches.push(sequence, fields.counted(), *count as u64, received);
                false
            }
            VerdictMessage::Single { id, decision } => match decision.extras.as_mut().and_then(E::take_waiter) {
                Some(waiter) => {
                    self.awaiting.push(sequence, Awaited::Verdict { id: *id, waiter });
                    true
                }
                None => false,
            },
        }
    }

    /// The verdict that is alone in the datagram is not proven at once. Returns when the socket is
    /// to be read for the proof.
    pub(super) fn prove_later(&mut self, verdict: Verdict, now: impl FnOnce() -> Instant) -> Option<Instant> {
        let (first, _) = self.current?;
        self.unproven.begin(first, verdict, now);
        self.unproven.due()
    }

    /// The datagram has been sent, or not. Returns whether a reply has refused it.
    pub(super) fn end_datagram(&mut self) -> bool {
        self.current.take().is_some_and(|(_, refused)| refused)
    }

    /// The message with this number was not executed: the waiter is put back into it.
    pub(super) fn undo<E: Carried<Waiter = W>>(&mut self, sequence: u32, message: &mut VerdictMessage<E>) {
        self.unproven.replied(sequence);
        match message {
            VerdictMessage::Batch { .. } => drop(self.batches.take(sequence)),
            VerdictMessage::Single { decision, .. } => {
                let Some(extras) = &mut decision.extras else { return };
                if let Some(Awaited::Verdict { waiter, .. }) = self.awaiting.remove(sequence) {
                    extras.put_waiter(waiter);
                }
            }
        }
    }

    /// A configuration message is about to be sent. Returns its sequence number.
    pub(super) fn begin_config(&mut self, config: Awaited<W>) -> u32 {
        let sequence = self.next_sequence();
        self.awaiting.push(sequence, config);
        sequence
    }

    /// The datagram with this first message is known to have been refused.
    pub(super) fn expect_refusal(&mut self, first: u32) {
        if self.known_refused.len() == MAX_KNOWN_REFUSED {
            self.known_refused.pop_front();
        }
        self.known_refused.push_back(first);
    }

    /// Everything that was gathered has been sent.
    pub(super) fn all_sent(&mut self) {
        self.unproven.all_sent(self.sequence);
    }

    // Replies.

    /// The kernel replied to the message with this number.
    pub(super) fn replied(&mut self, sequence: u32, error: Option<Errno>) -> Replied<W> {
        if self.inherited.is_some_and(|last| !is_after(sequence, last)) {
            return Replied::Inherited;
        }
        if is_after(sequence, self.sequence) {
            return Replied::Nothing;
        }
        let forbidden = error == Some(Errno::PERM);
        if forbidden {
            if let Some(at) = self.known_refused.iter().position(|known| *known == sequence) {
                self.known_refused.remove(at);
                return Replied::Nothing;
            }
            if let Some((_, refused)) = self.current.as_mut().filter(|(first, _)| *first == sequence) {
                *refused = true;
                return Replied::Nothing;
            }
        }
        // Another error proves that it was executed.
        match self.unproven.replied(sequence) {
            Some(verdict) if forbidden => Replied::Discarded(verdict),
            _ => Replied::Message(self.awaiting.remove(sequence)),
        }
    }

    /// What the batch with this number decided.
    pub(super) fn take_batch(&mut self, sequence: u32) -> Option<(Action, u64)> {
        self.batches.take(sequence)
    }

    /// No reply to the configuration message with this number will come: it was not sent.
    pub(super) fn take(&mut self, sequence: u32) -> Option<Awaited<W>> {
        self.awaiting.remove(sequence)
    }

    /// A message whose reply will not come: the socket was found empty after every message up to
    /// `sent` had been sent.
    pub(super) fn take_lost(&mut self, sent: u32) -> Option<Awaited<W>> {
        self.awaiting.pop_sent(sent)
    }

    /// A message whose reply a task waits for.
    pub(super) fn take_any(&mut self) -> Option<Awaited<W>> {
        self.awaiting.pop_any()
    }

    /// See [`Awaiting::highest_limits`].
    pub(super) fn highest_limits(&self, present: Limits) -> Limits {
        self.awaiting.highest_limits(present)
    }

    /// Whether replies matter to this process: a task waits for one, or the capability was
    /// missing, so that only this process can interpret them.
    pub(super) fn awaits_replies(&self) -> bool {
        !self.awaiting.is_empty() || !self.known_refused.is_empty() || self.only_replies_prove
    }

    // Proofs.

    pub(super) fn set_receive_buffer(&mut self, bytes: usize) {
        self.unproven.set_receive_buffer(bytes);
    }

    /// Datagrams have been received, which took at most so many bytes of the buffer. `lost`: some
    /// did not fit.
    pub(super) fn received(&mut self, bytes: usize, lost: bool) {
        self.unproven.received(bytes, lost);
    }

    /// The socket was found empty after every message up to this sequence number had been sent.
    /// Returns verdicts that must be sent again.
    pub(super) fn emptied(&mut self, sent: u32) -> Vec<Verdict> {
        self.inherited = None;
        self.batches.forget(sent);
        self.unproven.emptied(sent)
    }

    /// So many packets have been received in all, and at most `max_len` are queued.
    pub(super) fn expire(&mut self, received: u64, max_len: u64) {
        self.batches.expire(received, max_len);
    }

    /// Whether the kernel may have discarded a verdict, and no reply has been read yet.
    pub(super) fn has_unproven(&self) -> bool {
        !self.unproven.is_empty()
    }

    /// Whether a verdict need not be proven at once.
    pub(super) fn can_defer(&self) -> bool {
        self.unproven.can_defer()
    }

    /// When the socket is to be read for a proof.
    pub(super) fn due(&self) -> Option<Instant> {
        self.unproven.due()
    }

    /// Whether the socket is to be read for a proof now.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        self.unproven.look(now)
    }

    // Doubts.

    /// What was executed is not known any more: the kernel refused a datagram although the thread
    /// had the capability.
    pub(super) fn trust_only_replies(&mut self) {
        (self.only_replies_prove, self.doubtful) = (true, true);
    }

    /// Whether only replies show whether a datagram was executed.
    pub(super) fn only_replies_prove(&self) -> bool {
        self.only_replies_prove
    }

    /// Verdicts are sent for packets that the kernel may not have.
    pub(super) fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// A verdict has found no packet. Returns whether it was sent again.
    pub(super) fn has_gone(&mut self, id: u32) -> bool {
        self.unproven.has_gone(id)
    }

    /// A batch has found none of its packets. Returns how many of them were decided before.
    pub(super) fn have_gone(&self, count: u64) -> u64 {
        self.unproven.have_gone(count)
    }

    /// Verdicts have found no packets. Returns whether this proves that the kernel dropped them.
    pub(super) fn count_dropped(&mut self, packets: u64) -> bool {
        if !self.doubtful {
            self.dropped += packets;
        }
        !self.doubtful
    }

    /// See [`Machine::dropped_while_queued`](super::Machine::dropped_while_queued).
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether a reply has refused the datagram that is being sent.
    #[cfg(test)]
    pub(super) fn is_refused(&self) -> bool {
        self.current.is_some_and(|(_, refused)| refused)
    }
}
