//! The kernel's replies, and the errors that are reported.

use rustix::io::Errno;

use super::{Awaited, Carried, Clock, Machine, Notice, ReportKind, flush::FlushReason, outstanding::Replied};
use crate::{
    types::{Error, ErrorKind, PacketId},
    wire::{Refused, Reply},
};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// The kernel replied to one of our messages.
    pub fn replied(&mut self, reply: Reply) {
        let awaited = match self.outstanding.replied(reply.sequence, reply.error) {
            Replied::Inherited => return self.inherited_reply(&reply),
            Replied::Nothing => return,
            Replied::Discarded(verdict) => return self.refused_before(verdict),
            Replied::Message(awaited) => awaited,
        };
        let failed = reply.error.map(|errno| reply_error(errno, &reply));
        match awaited {
            Some(Awaited::Config { change, waiter, operation }) => {
                if failed.is_none() {
                    self.limits = self.limits.after(change);
                }
                let result = failed.map_or(Ok(()), |error| Err(error.with_operation(operation)));
                self.notices.push(Notice::Reply(waiter, result));
            }
            Some(Awaited::Verdict { id, waiter }) => {
                let result = match failed {
                    None => Ok(()),
                    Some(error) => {
                        self.not_taken(&reply, Some(id));
                        Err(error.with_packet(PacketId::new(id)))
                    }
                };
                self.notices.push(Notice::Reply(waiter, result));
            }
            None => {
                let Some(error) = failed else { return };
                if self.not_taken(&reply, None) {
                    let error = match reply.refused {
                        Refused::Verdict { id, .. } | Refused::Batch { max: id } => {
                            error.with_packet(PacketId::new(id))
                        }
                        Refused::Other => error,
                    };
                    self.report(error);
                }
            }
        }
    }

    /// The kernel replied to a message of the process that had the queue before. That process has
    /// counted the packet as decided, or as refused and decided again.
    fn inherited_reply(&mut self, reply: &Reply) {
        // Except if it lacked the capability at that time and has not read this reply.
        let (Some(Errno::PERM), Refused::Verdict { id, .. }) = (reply.error, reply.refused) else { return };
        if self.ledger.reopen(id) {
            self.counters.received.packets += 1;
            self.decide_again(id);
            self.ask_policy(FlushReason::Verdict);
        }
    }

    /// Counts a verdict that the kernel did not take. Returns whether to report that to its owner.
    pub(super) fn not_taken(&mut self, reply: &Reply, confirmed: Option<u32>) -> bool {
        let (action, mut count, id) = match reply.refused {
            Refused::Verdict { id, action } => (action, 1, Some(id)),
            Refused::Batch { .. } => match self.outstanding.take_batch(reply.sequence) {
                Some((action, count)) => (Some(action), count, None),
                None => (None, 1, None),
            },
            Refused::Other => (None, 1, confirmed),
        };
        if reply.error == Some(Errno::PERM) {
            // The thread had the capability shortly after, or the capability has no effect here:
            // what was executed is not known any more.
            self.outstanding.trust_only_replies();
            self.ledger.forbid_batches();
            self.missing_permission();
            if let (Some(action), Some(id)) = (action, id) {
                if self.ledger.reopen(id) {
                    self.counters.uncount_decided(action, 1);
                    self.decide_again(id);
                }
            }
            return true;
        }
        if reply.error == Some(Errno::NOENT) {
            // They were sent twice.
            match id {
                Some(id) if self.outstanding.has_gone(id) => return false,
                Some(_) => {}
                None => count -= self.outstanding.have_gone(count),
            }
        }
        if let Some(action) = action {
            self.counters.uncount_decided(action, count);
        }
        if reply.error == Some(Errno::NOENT) {
            // The interface went down, a hook was unregistered, or the queue was unbound: the
            // packets left the queue without a verdict.
            self.counters.sent.gone_at_least += count;
            if self.outstanding.count_dropped(count) {
                self.note(ReportKind::Dropped, count, id);
            }
            return false;
        }
        self.counters.sent.refused += count;
        true
    }

    pub(super) fn push_refusal(&mut self, error: Error) {
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.pop_front();
            self.counters.sent.refusals_unread += 1;
        }
        self.refusals.push_back(error);
        self.effects.wake_refusals = true;
    }

    /// The oldest unread refusal.
    pub fn next_refusal(&mut self) -> Option<Error> {
        self.refusals.pop_front()
    }

    /// Reports a verdict for a packet that had already been decided.
    pub fn report_late(&mut self, id: u32) {
        self.push_refusal(Error::new(ErrorKind::Expired, "submit verdict").with_packet(PacketId::new(id)));
    }

    /// Reports a verdict that could not be carried out as it was given.
    pub fn report(&mut self, error: Error) {
        self.counters.sent.refusals += 1;
        self.note(ReportKind::Refused, 1, error.packet_id().map(PacketId::get));
        self.push_refusal(error);
    }

    /// The queue cannot be used any more.
    pub fn fail(&mut self, error: Error) {
        if self.failure.is_none() && !self.life.has_ended() {
            self.note(ReportKind::Failed, 1, None);
            self.failure = Some(error.fatal());
            self.effects.wake_stream = true;
            self.effects.wake_waiting = true;
        }
    }

    /// Whether the queue has failed and the error has not been taken.
    pub fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// The error with which the stream ends, for the first caller.
    pub fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }
}

/// The number of unread refusals that are kept. Then the oldest are discarded and counted.
const MAX_REFUSALS: usize = 1024;

/// What the kernel's reply says.
fn reply_error(errno: Errno, reply: &Reply) -> Error {
    let error = Error::os("send verdict", errno.into());
    let error = match (errno, reply.refused) {
        (Errno::NOENT, Refused::Verdict { .. } | Refused::Batch { .. }) => error.with_kind(ErrorKind::PacketGone),
        _ => error,
    };
    match &reply.text {
        Some(text) => error.with_detail(text.to_string()),
        None => error,
    }
}
