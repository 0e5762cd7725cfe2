//! Whether the kernel has executed a datagram: it discards those of a sender without the
//! capability, and its reply may not fit into the receive buffer (`nfnetlink_rcv`,
//! `netlink_ack`).
//!
//! To ask the kernel for the capability after each send costs a system call. A single verdict at a
//! low rate does without: the reply would be in the receive buffer before the send has returned. So
//! when the socket has been read empty, and the buffer cannot have been full meanwhile, there was
//! none. If the buffer may have been full, the verdict is sent again: the kernel then finds no
//! packet, unless it had discarded the first one. If no task reads the socket, the timer thread
//! does after [`LONGEST`].

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{awaiting::is_after, ledger::Origin};
use crate::wire::verdict::VerdictFields;

/// How it is found out whether a datagram was executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// The sender asks for the capability.
    Capability,
    /// By the replies, which the sender reads at once.
    Replies,
    /// By the absence of a reply when the socket is read empty next.
    Later,
}

/// A verdict that may have been discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) id: u32,
    pub(super) fields: VerdictFields,
    pub(super) origin: Origin,
}

#[derive(Debug)]
struct Entry {
    sequence: u32,
    verdict: Verdict,
    /// The buffer may have been full since it was sent.
    in_doubt: bool,
}

/// Verdicts that may have been discarded, and how full the receive buffer can have been.
#[derive(Debug, Default)]
pub(super) struct Unproven {
    entries: VecDeque<Entry>,
    /// The receive buffer in bytes, as the kernel accounts them.
    size: usize,
    /// The smallest that it has been since the socket was found empty last, or since there were no
    /// entries.
    buffer: usize,
    /// When to read the socket, and the oldest entry at the time when that was decided.
    look: Option<(Instant, u32)>,
    /// What has been received since the socket was found empty last, at most, as the kernel
    /// accounts it.
    received: usize,
    /// Packets whose verdicts are sent again. The kernel may have none of them.
    again: VecDeque<u32>,
    /// The message with or before which all of `again` were sent, once they were.
    again_until: Option<u32>,
}

/// In a smaller buffer than this, a few packets cast doubt.
const SMALLEST_BUFFER: usize = 64 * 1024;
/// After this time the socket is read for a proof, also if no task has read it.
pub(super) const LONGEST: Duration = Duration::from_millis(250);
/// More verdicts than this do not wait for their proof.
const MOST: usize = 8;
/// The number of packets in `again`.
const MOST_AGAIN: usize = 64;

impl Unproven {
    pub(super) fn set_receive_buffer(&mut self, bytes: usize) {
        self.size = bytes;
        self.buffer = if self.entries.is_empty() { bytes } else { self.buffer.min(bytes) };
    }

    /// Whether a single verdict need not be proven at once.
    pub(super) fn can_defer(&self) -> bool {
        self.buffer >= SMALLEST_BUFFER && self.entries.len() < MOST && self.is_certain() && self.again.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A verdict is about to be sent, in a datagram of its own.
    pub(super) fn begin(&mut self, sequence: u32, verdict: Verdict, now: impl FnOnce() -> Instant) {
        if self.look.is_none() {
            self.look = Some((now() + LONGEST, sequence));
        }
        self.entries.push_back(Entry { sequence, verdict, in_doubt: false });
    }

    /// When [`look`](Self::look) is to be called.
    pub(super) fn due(&self) -> Option<Instant> {
        self.look.map(|(at, _)| at)
    }

    /// Whether the socket must be read now: no task has for long.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        let Some((_, oldest)) = self.look.take_if(|(at, _)| *at <= now) else { return false };
        let Some(first) = self.entries.front() else { return false };
        self.look = Some((now + LONGEST, first.sequence));
        first.sequence == oldest
    }

    /// The message with this number was not sent, or the kernel has replied to it. Returns its
    /// verdict.
    pub(super) fn replied(&mut self, sequence: u32) -> Option<Verdict> {
        let at = self.entries.iter().position(|entry| entry.sequence == sequence)?;
        self.entries.remove(at).map(|entry| entry.verdict)
    }

    /// Datagrams have been received, which took at most so many bytes of the buffer. `lost`: some
    /// did not fit.
    pub(super) fn received(&mut self, bytes: usize, lost: bool) {
        self.received = if lost { usize::MAX } else { self.received.saturating_add(bytes) };
    }

    /// Whether the buffer cannot have been full since the socket was found empty last. Half of it
    /// is left for a message that is not counted yet.
    fn is_certain(&self) -> bool {
        self.received < self.buffer / 2
    }

    /// The socket was found empty after every message up to this sequence number had been sent.
    /// Returns verdicts that must be sent again.
    pub(super) fn emptied(&mut self, sent: u32) -> Vec<Verdict> {
        let certain = self.is_certain();
        (self.received, self.buffer) = (0, self.size);
        if self.again_until.take_if(|until| !is_after(*until, sent)).is_some() {
            self.again.clear();
        }
        if self.entries.is_empty() {
            return Vec::new();
        }
        let mut again = Vec::new();
        self.entries.retain_mut(|entry| {
            let doubt = entry.in_doubt || !certain;
            if is_after(entry.sequence, sent) {
                // It was being sent meanwhile.
                entry.in_doubt = doubt;
                return true;
            }
            if doubt {
                again.push(entry.verdict);
            }
            false
        });
        for verdict in &again {
            self.again_until = None;
            if self.again.len() == MOST_AGAIN {
                self.again.pop_front();
            }
            self.again.push_back(verdict.id);
        }
        again
    }

    /// A round of sending has ended, and nothing is left to be sent. `last` is its last message.
    pub(super) fn all_sent(&mut self, last: u32) {
        if !self.again.is_empty() {
            self.again_until = Some(last);
        }
    }

    /// A verdict has found no packet. Returns whether it was sent again.
    pub(super) fn has_gone(&mut self, id: u32) -> bool {
        match self.again.iter().position(|other| *other == id) {
            Some(at) => self.again.remove(at).is_some(),
            None => false,
        }
    }

    /// A batch has found none of its packets. Returns how many of them were decided before.
    pub(super) fn have_gone(&self, count: u64) -> u64 {
        count.min(self.again.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Action;

    const BUFFER: usize = 1 << 20;

    fn verdict(id: u32) -> Verdict {
        Verdict { id, fields: VerdictFields::plain(Action::Accept), origin: Origin::Owner }
    }

    fn unproven() -> Unproven {
        let mut unproven = Unproven::default();
        unproven.set_receive_buffer(BUFFER);
        unproven
    }

    fn begin(unproven: &mut Unproven, sequence: u32, id: u32) {
        unproven.begin(sequence, verdict(id), Instant::now);
    }

    #[test]
    fn the_timer_reads_the_socket_if_no_task_does() {
        let (mut unproven, now) = (unproven(), Instant::now());
        let due = |unproven: &Unproven| unproven.due().unwrap();
        unproven.begin(1, verdict(1), || now);
        assert!(!unproven.look(now) && due(&unproven) == now + LONGEST);
        assert!(unproven.look(now + LONGEST));
        // A task reads.
        unproven.emptied(1);
        unproven.begin(2, verdict(2), || now);
        assert!(!unproven.look(now + 2 * LONGEST));
        assert!(unproven.look(now + 3 * LONGEST));
        unproven.emptied(2);
        assert!(!unproven.look(now + 4 * LONGEST) && unproven.due().is_none());
    }

    #[test]
    fn an_empty_socket_proves_what_was_sent_before() {
        let mut unproven = unproven();
        begin(&mut unproven, u32::MAX, 1);
        begin(&mut unproven, 0, 2);
        unproven.received(1000, false);
        assert_eq!(unproven.emptied(u32::MAX), []);
        assert_eq!(unproven.replied(u32::MAX), None);
        assert_eq!(unproven.replied(0), Some(verdict(2)));
        assert!(unproven.is_empty());
    }

    #[test]
    fn a_buffer_that_may_have_been_full_proves_nothing() {
        for lost in [false, true] {
            let mut unproven = unproven();
            begin(&mut unproven, 1, 1);
            begin(&mut unproven, 2, 2);
            unproven.received(if lost { 1 } else { BUFFER / 2 }, lost);
            assert!(!unproven.can_defer());
            assert_eq!(unproven.emptied(1), [verdict(1)]);
            // The other one was sent while the buffer may have been full.
            assert_eq!(unproven.emptied(2), [verdict(2)]);
            assert!(unproven.has_gone(2) && !unproven.has_gone(2));
            // The reply to the other one has not been received before this number.
            unproven.all_sent(9);
            assert_eq!((unproven.emptied(8), unproven.can_defer()), (Vec::new(), false));
            assert_eq!((unproven.emptied(9), unproven.can_defer()), (Vec::new(), true));
        }
    }

    #[test]
    fn a_buffer_of_another_size_does_not_hide_that_the_one_before_was_full() {
        let mut unproven = unproven();
        begin(&mut unproven, 1, 1);
        unproven.set_receive_buffer(4 * BUFFER);
        unproven.received(BUFFER, false);
        assert_eq!(unproven.emptied(1), [verdict(1)]);
        // From now on the new size counts.
        begin(&mut unproven, 2, 2);
        unproven.received(BUFFER, false);
        assert_eq!(unproven.emptied(2), []);
        begin(&mut unproven, 3, 3);
        unproven.set_receive_buffer(BUFFER);
        unproven.received(BUFFER, false);
        assert_eq!(unproven.emptied(3), [verdict(3)]);
    }

    #[test]
    fn a_small_buffer_is_no_proof() {
        let mut unproven = Unproven::default();
        assert!(!unproven.can_defer());
        unproven.set_receive_buffer(SMALLEST_BUFFER);
        assert!(unproven.can_defer());
        (0..MOST as u32).for_each(|number| begin(&mut unproven, number, number));
        assert!(!unproven.can_defer());
    }
}
