//! Messages whose replies matter, by their sequence numbers.

use std::collections::VecDeque;

use super::{Change, Limits};
use crate::types::Action;

/// A message whose reply a task waits for.
#[derive(Debug)]
pub(super) enum Awaited<W> {
    Verdict { id: u32, waiter: W },
    Config { change: Change, waiter: W, operation: &'static str },
}

/// One table for verdicts and configuration, in the order of the sequence numbers.
#[derive(Debug)]
pub(super) struct Awaiting<W> {
    entries: VecDeque<(u32, Awaited<W>)>,
}

impl<W> Default for Awaiting<W> {
    fn default() -> Self {
        Self { entries: VecDeque::new() }
    }
}

impl<W> Awaiting<W> {
    /// A message with this number is about to be sent. Numbers come in order.
    pub(super) fn push(&mut self, sequence: u32, awaited: Awaited<W>) {
        self.entries.push_back((sequence, awaited));
    }

    pub(super) fn remove(&mut self, sequence: u32) -> Option<Awaited<W>> {
        // Replies come in the order of the messages, so it is usually the first entry.
        let at = self.entries.iter().position(|(other, _)| *other == sequence)?;
        self.entries.remove(at).map(|(_, awaited)| awaited)
    }

    /// The limits after the awaited changes. Of several changes, any may be refused: then the
    /// highest value of each limit.
    pub(super) fn highest_limits(&self, present: Limits) -> Limits {
        let mut after = self.entries.iter().filter_map(|(_, awaited)| match awaited {
            Awaited::Config { change, .. } => Some(present.after(*change)),
            Awaited::Verdict { .. } => None,
        });
        let Some(first) = after.next() else { return present };
        match after.next() {
            None => first,
            Some(second) => [present, second].into_iter().chain(after).fold(first, Limits::highest),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The oldest entry.
    pub(super) fn pop_any(&mut self) -> Option<Awaited<W>> {
        self.entries.pop_front().map(|(_, awaited)| awaited)
    }

    /// The oldest entry, if its message was sent with or before the message with this number.
    pub(super) fn pop_sent(&mut self, sent: u32) -> Option<Awaited<W>> {
        let (first, _) = self.entries.front()?;
        if is_after(*first, sent) {
            return None;
        }
        self.entries.pop_front().map(|(_, awaited)| awaited)
    }
}

/// How many packets each batch decided. The kernel's reply to a batch that found no packet does not
/// contain that.
#[derive(Debug, Default)]
pub(super) struct SentBatches {
    entries: VecDeque<SentBatch>,
}

#[derive(Debug)]
struct SentBatch {
    sequence: u32,
    action: Action,
    count: u64,
    /// The number of packets that had been received when it was sent.
    received: u64,
}

impl SentBatches {
    pub(super) fn push(&mut self, sequence: u32, action: Action, count: u64, received: u64) {
        self.entries.push_back(SentBatch { sequence, action, count, received });
    }

    /// What a batch decided. Called when the kernel has refused it, which happens at most once.
    pub(super) fn take(&mut self, sequence: u32) -> Option<(Action, u64)> {
        let at = self.entries.iter().position(|entry| entry.sequence == sequence)?;
        self.entries.remove(at).map(|entry| (entry.action, entry.count))
    }

    /// Every reply to messages up to this number has been read.
    pub(super) fn forget(&mut self, sent: u32) {
        while self.entries.front().is_some_and(|entry| !is_after(entry.sequence, sent)) {
            self.entries.pop_front();
        }
    }

    /// In the socket, replies are between packets, in their order. When a whole queue of packets
    /// has been received since, no earlier reply is left.
    pub(super) fn expire(&mut self, received: u64, max_len: u64) {
        const SPARE: u64 = 64;
        while self.entries.front().is_some_and(|entry| received - entry.received > max_len + SPARE) {
            self.entries.pop_front();
        }
    }
}

/// Sequence numbers wrap.
pub(super) fn is_after(sequence: u32, other: u32) -> bool {
    sequence != other && sequence.wrapping_sub(other) <= u32::MAX / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two changes at a time: one of the length, one of the copy range.
    #[test]
    fn buffer_has_room_for_any_of_several_changes() {
        let present = Limits { max_len: 10, payload: 100 };
        let mut awaiting = Awaiting::default();
        assert_eq!(awaiting.highest_limits(present), present);
        let change =
            |max_len, payload| Awaited::Config { change: Change { max_len, payload }, waiter: (), operation: "test" };
        awaiting.push(1, change(Some(50), Some(20)));
        assert_eq!(awaiting.highest_limits(present), Limits { max_len: 50, payload: 20 });
        awaiting.push(2, Awaited::Verdict { id: 1, waiter: () });
        awaiting.push(3, change(None, Some(1000)));
        assert_eq!(awaiting.highest_limits(present), Limits { max_len: 50, payload: 1000 });
        awaiting.remove(1);
        assert_eq!(awaiting.highest_limits(present), Limits { max_len: 10, payload: 1000 });
    }

    #[test]
    fn later_messages_still_wait_for_their_replies_across_the_wrap() {
        let mut awaiting = Awaiting::default();
        for number in [u32::MAX - 1, u32::MAX, 0, 1] {
            awaiting.push(number, Awaited::Verdict { id: number, waiter: number });
        }
        assert!(matches!(awaiting.remove(u32::MAX), Some(Awaited::Verdict { waiter: u32::MAX, .. })));
        let lost: Vec<u32> = std::iter::from_fn(|| awaiting.pop_sent(0))
            .map(|awaited| match awaited {
                Awaited::Verdict { waiter, .. } | Awaited::Config { waiter, .. } => waiter,
            })
            .collect();
        assert_eq!(lost, [u32::MAX - 1, 0]);
        assert!(awaiting.remove(1).is_some());
        assert!(awaiting.remove(1).is_none());
    }

    #[test]
    fn batches_are_kept_while_their_replies_may_arrive() {
        let mut batches = SentBatches::default();
        for number in 0..10 {
            batches.push(number, Action::Drop, 5, u64::from(number));
        }
        assert_eq!(batches.take(3), Some((Action::Drop, 5)));
        assert_eq!(batches.take(3), None);
        batches.forget(1);
        assert_eq!(batches.take(1), None);
        batches.expire(4 + 100 + 64, 100);
        assert_eq!(batches.take(2), None);
        assert!(batches.take(4).is_some());
    }
}
