//! Rounds of sending: what leaves the ledger, and what comes back because it was refused or not sent.

use std::time::Instant;

use super::{
    Awaited, Carried, Change, Clock, Event, Kind, LASTING, MAX_KNOWN_REFUSED, Machine, NO_TOKEN, Origin, PAUSES,
    Permission, Settlement, missing_capability, plain,
};
use crate::{Error, ErrorKind, PacketId, wire::verdict::Ruling};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Begins a round of sending: every decision becomes a message in `plan`.
    pub(crate) fn begin_round(&mut self, plan: &mut Vec<Settlement<E>>) {
        self.flush_wanted = false;
        if self.ledger.gathered() == 0 {
            return;
        }
        self.rounds_begun += 1;
        self.sending = true;
        self.oldest = None;
        self.due = None;
        let before = plan.len();
        self.leaving = self.ledger.gathered();
        self.ledger.settle(self.arrivals.rounds(), plan);
        self.counters.flushes += 1;
        self.counters.largest_flush = self.counters.largest_flush.max((plan.len() - before) as u64);
    }

    /// The round is over. To be said under the send lock, so that no other has begun.
    pub(crate) fn end_round(&mut self) {
        debug_assert_eq!((self.leaving, self.begun), (0, 0), "every message was sent, refused or given back");
        self.sending = false;
        self.rounds_ended = self.rounds_begun;
    }

    /// The send lock has been released. Tells whether somebody has asked for another round who has found it taken.
    pub(crate) fn send_lock_released(&mut self) -> bool {
        if self.flush_wanted {
            return true;
        }
        self.todo.wake_waiting = true;
        self.look_for_the_end();
        false
    }

    /// Whether the caller must have the capability to begin a round: it has been missed before.
    pub(crate) fn is_permission_missing(&self) -> bool {
        self.permission != Permission::Held
    }

    /// A thread that has the capability is about to send.
    pub(crate) fn permitted(&mut self) {
        if self.permission != Permission::Held {
            self.permission = Permission::Held;
            if self.ledger.gathered() > 0 {
                self.request_flush();
            }
            self.end_if_permitted();
        }
    }

    /// A thread of the runtime, which stands for the process, still has no capability (or the timer's, where none comes).
    pub(crate) fn still_missing(&mut self) {
        let now = self.clock.now();
        if let Permission::Missing { since, calls, confirmed, .. } = &mut self.permission {
            (*calls, *confirmed) = (0, true);
            if now.saturating_duration_since(*since) < LASTING {
                if self.is_overdue() {
                    self.give_up_draining();
                    self.look_for_the_end();
                }
                return;
            }
            self.permission = Permission::Lost;
            let error = Error::new(ErrorKind::NotPermitted, "send verdicts");
            self.fail(error.with_detail("CAP_NET_ADMIN has been lost, and no verdict can be sent without it"));
            self.give_up_draining();
            self.look_for_the_end();
        }
    }

    /// Has the timer's thread look for the capability at once, where it is missing.
    pub(super) fn look_for_permission(&mut self, now: Instant) {
        if let Permission::Missing { next, confirmed, .. } = &mut self.permission {
            (*next, *confirmed) = (now, false);
            self.wish(now);
        }
    }

    /// A thread without the capability wanted to send, which has been missed before: what owners have decided is refused.
    pub(crate) fn refuse_gathered(&mut self) {
        self.flush_wanted = false;
        self.rounds_begun += 1;
        self.oldest = None;
        self.due = None;
        let taken = self.ledger.take_back_gathered();
        self.missing_permission();
        for (id, decision) in taken {
            self.refuse(id, decision.extra, missing_capability());
        }
    }

    /// A datagram is about to be sent. Tells whether only the answers to it will tell what became of it.
    ///
    /// From here on its packets count as decided: answers may be received before the send has returned.
    pub(crate) fn begin_send(&mut self, first: u32, messages: &mut [Settlement<E>]) -> bool {
        self.watched = Some((first, false));
        self.begun = messages.len();
        let mut sequence = first;
        for message in messages {
            let (action, count) = (message.ruling().action, message.count());
            self.counters.decided(action, count as u64);
            self.leaving -= count;
            if let Settlement::Batch { .. } = message {
                self.sent_batches.push(sequence, action, count as u64, self.counters.received);
            }
            if let Settlement::Single { id, decision } = message
                && let Some(waiter) = decision.extra.as_mut().and_then(E::take_waiter)
            {
                self.awaiting.push(sequence, Awaited::Verdict { id: *id, waiter });
            }
            sequence = sequence.wrapping_add(1);
        }
        self.distrust
    }

    /// Whether the datagram that is being sent has been refused, as far as answers have been read.
    pub(crate) fn is_refused(&self) -> bool {
        self.watched.is_some_and(|(_, refused)| refused)
    }

    /// It was not executed: whoever waits for answers to it goes back into its messages. Of these, those beyond the datagram
    /// were not begun. Tells whether the refusal has been read already.
    pub(super) fn end_send(&mut self, first: u32, messages: &mut [Settlement<E>]) -> bool {
        let mut sequence = first;
        for message in messages.iter_mut().take(std::mem::take(&mut self.begun)) {
            let (action, count) = (message.ruling().action, message.count());
            self.counters.taken_back(action, count as u64);
            self.leaving += count;
            if let Settlement::Batch { .. } = message {
                self.sent_batches.take(sequence);
            }
            if let Settlement::Single { decision, .. } = message
                && let Some(extra) = &mut decision.extra
                && let Some(Awaited::Verdict { waiter, .. }) = self.awaiting.remove(sequence)
            {
                extra.put_waiter(waiter);
            }
            sequence = sequence.wrapping_add(1);
        }
        self.watched.take().is_some_and(|(_, refused)| refused)
    }

    /// A configuration message is about to be sent.
    pub(crate) fn await_config(&mut self, sequence: u32, operation: &'static str, change: Change, waiter: E::Waiter) {
        self.awaiting.push(sequence, Awaited::Config { change, waiter, operation });
    }

    /// A datagram has been sent and executed.
    pub(crate) fn sent(&mut self, messages: &[Settlement<E>]) {
        self.counters.sends += 1;
        self.counters.messages += messages.len() as u64;
        self.retry = None;
        self.watched = None;
        self.begun = 0;
        self.sent_batches.expire(self.counters.received, u64::from(self.limits.max_len));
    }

    /// A datagram was refused as a whole for want of the capability. Its packets get the default action when it is back.
    pub(crate) fn refused(&mut self, mut messages: Vec<Settlement<E>>, first: u32) {
        let answer_was_read = self.end_send(first, &mut messages);
        if !answer_was_read {
            if self.known_refused.len() == MAX_KNOWN_REFUSED {
                self.known_refused.pop_front();
            }
            self.known_refused.push_back(first);
        }
        self.counters.sends += 1;
        self.missing_permission();
        let by_queue = |origin, ruling: &Ruling| (origin == Origin::Queue).then_some(ruling.action);
        for message in messages {
            self.leaving -= message.count();
            let ids = self.ledger.ids_of(&message);
            let (mut extra, by_queue) = match message {
                Settlement::Single { decision, .. } => (decision.extra, by_queue(decision.origin, &decision.ruling)),
                Settlement::Batch { ruling, origin, .. } => (None, by_queue(origin, &ruling)),
            };
            for id in ids {
                self.ledger.reopen(id, NO_TOKEN);
                match by_queue {
                    // A default action, or a deadline's: it stays what it was.
                    Some(action) => drop(self.ledger.decide(id, plain(action))),
                    None => self.refuse(id, extra.take(), missing_capability()),
                }
            }
        }
    }

    /// One message that cannot be sent, whatever is tried. Its packets get the default action.
    pub(crate) fn impossible(&mut self, mut message: Settlement<E>, first: u32, error: Error) {
        self.end_send(first, std::slice::from_mut(&mut message));
        self.leaving -= message.count();
        let ids = self.ledger.ids_of(&message);
        if let (Settlement::Single { decision, .. }, [id]) = (message, &ids[..]) {
            self.ledger.reopen(*id, NO_TOKEN);
            self.refuse(*id, decision.extra, error);
        }
    }

    /// Messages were not sent. They are gathered again, and sent later.
    pub(crate) fn unsent(&mut self, mut messages: Vec<Settlement<E>>, first: u32) {
        self.end_send(first, &mut messages);
        for message in messages {
            self.leaving -= message.count();
            self.ledger.unsent(message);
        }
    }

    /// A send has failed for a reason that may pass: the next attempt comes after a pause.
    pub(crate) fn send_failed(&mut self) {
        self.counters.failed_sends += 1;
        self.note(Kind::Unsent, 1, None);
        let pause = self.retry.map_or(PAUSES.0, |(_, pause)| pause);
        let at = self.clock.now() + pause;
        self.retry = Some((at, (pause * 2).min(PAUSES.1)));
        self.wish(at);
    }

    /// A configuration message was not sent.
    pub(crate) fn take_config(&mut self, sequence: u32) -> Option<E::Waiter> {
        match self.awaiting.remove(sequence)? {
            Awaited::Verdict { waiter, .. } | Awaited::Config { waiter, .. } => Some(waiter),
        }
    }

    /// The verdict of a packet was refused. It is told, and the packet gets the default action.
    pub(super) fn refuse(&mut self, id: u32, mut extra: Option<E>, error: Error) {
        let waiter = extra.as_mut().and_then(E::take_waiter);
        self.events.extend(extra.map(Event::Spent));
        let error = error.with_packet(PacketId(id));
        self.counters.refusals += 1;
        self.note(Kind::Refused, 1, Some(id));
        match waiter {
            Some(waiter) => self.events.push(Event::Answer(waiter, Err(error))),
            None => self.tell(error),
        }
        self.decide_again(id);
    }

    pub(super) fn decide_again(&mut self, id: u32) {
        self.decide_in_place(id, self.rules.on_unanswered);
    }

    pub(super) fn missing_permission(&mut self) {
        if self.permission == Permission::Held {
            let now = self.clock.now();
            let next = now + PAUSES.0;
            self.permission = Permission::Missing { since: now, next, pause: PAUSES.0 * 2, calls: 0, confirmed: false };
            self.note(Kind::CapabilityMissing, 1, None);
            self.wish(next);
            self.todo.call_driver = true;
        }
    }
}
