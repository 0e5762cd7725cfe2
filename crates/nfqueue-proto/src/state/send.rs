//! Rounds of sending: what leaves the ledger, and what returns because it was refused or not sent.

use std::time::Instant;

use super::{
    Awaited, Carried, Change, Clock, Decision, LASTING, MAX_KNOWN_REFUSED, Machine, NO_TOKEN, Notice, Origin, PAUSES,
    Permission, Proof, ReportKind, Verdict, VerdictMessage, flush::FlushReason, missing_capability,
};
use crate::{
    types::{Error, ErrorKind, PacketId},
    wire::verdict::VerdictFields,
};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Begins a round of sending: every decision becomes a message, appended to `plan`.
    pub fn begin_round(&mut self, plan: &mut Vec<VerdictMessage<E>>) {
        self.sending.wanted = false;
        if self.ledger.gathered() == 0 {
            return;
        }
        self.sending.rounds_started += 1;
        self.sending.under_way = true;
        self.end_waiting();
        let before = plan.len();
        self.sending.leaving = self.ledger.gathered();
        self.ledger.settle(self.arrivals.rounds(), plan);
        self.counters.sent.flushes += 1;
        self.counters.sent.largest_flush = self.counters.sent.largest_flush.max((plan.len() - before) as u64);
    }

    /// Ends the round. The caller still holds the send lock, so no other round has begun.
    pub fn end_round(&mut self) {
        debug_assert_eq!(
            (self.sending.leaving, self.sending.begun),
            (0, 0),
            "every message was sent, refused or given back"
        );
        self.sending.under_way = false;
        self.sending.rounds_ended = self.sending.rounds_started;
        if self.ledger.gathered() == 0 {
            self.sending.unproven.all_sent(self.sending.last);
        }
    }

    /// The send lock has been released. Returns whether another thread has requested a round while
    /// the lock was taken.
    pub fn send_lock_released(&mut self) -> bool {
        if self.sending.wanted {
            return true;
        }
        self.effects.wake_waiting = true;
        self.look_for_the_end();
        false
    }

    /// Whether nothing is sent before a pause is over: the kernel was out of memory, or the
    /// capability is missing.
    pub fn sends_later(&self) -> bool {
        self.sending.retry.is_some() || self.is_permission_missing()
    }

    /// Whether the last send failed for a reason that does not pass, and nobody is about to send: a
    /// reply that has not come will not come.
    pub fn is_broken(&self) -> bool {
        self.sending.broken && !self.sending.under_way && !self.sending.wanted
    }

    /// Messages cannot be sent, and the reason does not pass by itself. The queue ends.
    pub fn broken(&mut self, error: Error) {
        self.sending.broken = true;
        self.effects.wake_waiting = true;
        self.fail(error);
    }

    /// Whether the capability was missing before, so that the caller must have it to begin a round.
    pub fn is_permission_missing(&self) -> bool {
        self.permission != Permission::Held
    }

    /// The calling thread has the capability.
    pub fn permitted(&mut self) {
        if self.permission != Permission::Held {
            self.permission = Permission::Held;
            if self.ledger.gathered() > 0 {
                self.request_flush();
            }
            self.end_if_permitted();
        }
    }

    /// A thread of the runtime, which represents the process, still lacks the capability. If there
    /// is no such thread, the timer thread reports this.
    pub fn still_missing(&mut self) {
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
            self.fail(error.with_detail(
                "CAP_NET_ADMIN has been lost, and no verdict can be sent without it; start again with it",
            ));
            self.give_up_draining();
            self.look_for_the_end();
        }
    }

    /// Lets the timer thread check for the capability at once, if it is missing.
    pub(super) fn look_for_permission(&mut self, now: Instant) {
        if let Permission::Missing { next, confirmed, .. } = &mut self.permission {
            (*next, *confirmed) = (now, false);
            self.set_timer(now);
        }
    }

    /// A thread without the capability was to send, and the capability had been missing before: the
    /// decisions of owners are refused.
    pub fn refuse_gathered(&mut self) {
        self.sending.wanted = false;
        self.sending.rounds_started += 1;
        self.end_waiting();
        let taken = self.ledger.take_back_gathered();
        self.missing_permission();
        for (id, decision) in taken {
            self.refuse(id, decision.extras, missing_capability());
        }
    }

    /// The receive buffer has this size in bytes, as the kernel accounts them.
    pub fn set_receive_buffer(&mut self, bytes: usize) {
        self.sending.unproven.set_receive_buffer(bytes);
    }

    /// Whether the caller must receive until the socket is empty before it begins a round: a batch
    /// would also decide a packet whose verdict the kernel has discarded.
    pub fn must_prove(&self) -> bool {
        self.has_unproven() && self.ledger.gathered() > 1
    }

    /// Whether the kernel may have discarded a verdict, and no reply has been read yet.
    pub fn has_unproven(&self) -> bool {
        !self.sending.unproven.is_empty()
    }

    /// Begins to send a datagram. Returns how to find out whether it was executed.
    ///
    /// From now on its packets count as decided, because replies may be received before the send
    /// has returned.
    pub fn begin_send(&mut self, first: u32, messages: &mut [VerdictMessage<E>]) -> Proof {
        let proof = self.proof(messages);
        if let (Proof::Later, [VerdictMessage::Single { id, decision }]) = (proof, &*messages) {
            let verdict = Verdict { id: *id, fields: decision.fields, origin: decision.origin };
            self.sending.unproven.begin(first, verdict, || self.clock.now());
            if let Some(at) = self.sending.unproven.due() {
                self.set_timer(at);
            }
        }
        self.sending.watched = Some((first, false));
        self.sending.begun = messages.len();
        let mut sequence = first;
        for message in messages {
            let (action, count) = (message.fields().action, message.count());
            self.counters.count_decided(action, count as u64);
            self.sending.leaving -= count;
            if let VerdictMessage::Batch { .. } = message {
                self.sending.batches.push(sequence, action, count as u64, self.counters.received.packets);
            }
            if let VerdictMessage::Single { id, decision } = message {
                if let Some(waiter) = decision.extras.as_mut().and_then(E::take_waiter) {
                    self.awaiting.push(sequence, Awaited::Verdict { id: *id, waiter });
                }
            }
            self.sending.last = Some(sequence);
            sequence = sequence.wrapping_add(1);
        }
        proof
    }

    fn proof(&self, messages: &[VerdictMessage<E>]) -> Proof {
        match messages {
            _ if self.sending.distrust => Proof::Replies,
            [VerdictMessage::Single { decision, .. }]
                if decision.extras.is_none()
                    && self.life.is_open()
                    && self.gathering.driven
                    && !self.gathering.backlog
                    && self.sending.unproven.can_defer() =>
            {
                Proof::Later
            }
            _ => Proof::Capability,
        }
    }

    /// Whether a reply has refused the datagram that is being sent.
    pub fn is_refused(&self) -> bool {
        self.sending.watched.is_some_and(|(_, refused)| refused)
    }

    /// The datagram was not executed: those who wait for replies are put back into its messages.
    /// `messages` may include some that were not in the datagram. Returns whether a reply has
    /// reported the refusal already.
    pub(super) fn end_send(&mut self, first: u32, messages: &mut [VerdictMessage<E>]) -> bool {
        self.sending.unproven.replied(first);
        let mut sequence = first;
        for message in messages.iter_mut().take(std::mem::take(&mut self.sending.begun)) {
            let (action, count) = (message.fields().action, message.count());
            self.counters.uncount_decided(action, count as u64);
            self.sending.leaving += count;
            if let VerdictMessage::Batch { .. } = message {
                self.sending.batches.take(sequence);
            }
            if let VerdictMessage::Single { decision: Decision { extras: Some(extras), .. }, .. } = message {
                if let Some(Awaited::Verdict { waiter, .. }) = self.awaiting.remove(sequence) {
                    extras.put_waiter(waiter);
                }
            }
            sequence = sequence.wrapping_add(1);
        }
        self.sending.watched.take().is_some_and(|(_, refused)| refused)
    }

    /// A configuration message is about to be sent.
    pub fn await_config(&mut self, sequence: u32, operation: &'static str, change: Change, waiter: E::Waiter) {
        self.sending.last = Some(sequence);
        self.awaiting.push(sequence, Awaited::Config { change, waiter, operation });
    }

    /// A datagram has been sent and executed; or the latter is proven later.
    pub fn sent(&mut self, messages: &[VerdictMessage<E>]) {
        self.counters.sent.sends += 1;
        self.counters.sent.messages += messages.len() as u64;
        self.sending.retry = None;
        self.sending.broken = false;
        self.sending.watched = None;
        self.sending.begun = 0;
        self.sending.batches.expire(self.counters.received.packets, u64::from(self.limits.max_len));
    }

    /// The kernel refused a datagram because the capability was missing. Its packets get the
    /// default action when the capability is back.
    pub fn refused(&mut self, mut messages: Vec<VerdictMessage<E>>, first: u32) {
        self.sending.broken = false;
        let answer_was_read = self.end_send(first, &mut messages);
        if !answer_was_read {
            if self.sending.known_refused.len() == MAX_KNOWN_REFUSED {
                self.sending.known_refused.pop_front();
            }
            self.sending.known_refused.push_back(first);
        }
        self.counters.sent.sends += 1;
        self.missing_permission();
        let by_queue = |origin, fields: &VerdictFields| (origin == Origin::Queue).then_some(*fields);
        for message in messages {
            self.sending.leaving -= message.count();
            let ids = self.ledger.ids_of(&message);
            let (mut extras, by_queue) = match message {
                VerdictMessage::Single { decision, .. } => {
                    (decision.extras, by_queue(decision.origin, &decision.fields))
                }
                VerdictMessage::Batch { fields, origin, .. } => (None, by_queue(origin, &fields)),
            };
            for id in ids {
                self.ledger.reopen(id, NO_TOKEN);
                match by_queue {
                    // The queue's own decision stays the same.
                    Some(fields) => self.decide_as_before(id, fields),
                    None => self.refuse(id, extras.take(), missing_capability()),
                }
            }
        }
    }

    /// The kernel has refused a verdict because the capability was missing, as a reply shows only
    /// now.
    pub(super) fn refused_before(&mut self, verdict: Verdict) {
        self.missing_permission();
        if !self.ledger.reopen(verdict.id, NO_TOKEN) {
            return;
        }
        self.counters.uncount_decided(verdict.fields.action, 1);
        match verdict.origin {
            // The queue's own decision stays the same.
            Origin::Queue => self.decide_as_before(verdict.id, verdict.fields),
            Origin::Owner => self.refuse(verdict.id, None, missing_capability()),
        }
        self.ask_policy(FlushReason::Verdict);
    }

    /// The kernel may have refused these verdicts, and its replies may be lost. They are sent
    /// again: if they were executed, the kernel finds no packets. So no refusal is reported if they
    /// are refused now.
    pub(super) fn send_again(&mut self, verdicts: Vec<Verdict>) {
        for Verdict { id, fields, .. } in verdicts {
            if self.ledger.reopen(id, NO_TOKEN) {
                self.counters.uncount_decided(fields.action, 1);
                self.decide_as_before(id, fields);
                self.request_flush();
            }
        }
    }

    fn decide_as_before(&mut self, id: u32, fields: VerdictFields) {
        drop(self.ledger.decide(id, Decision { fields, extras: None, origin: Origin::Queue }));
    }

    /// A message for one packet can never be sent. The packet gets the default action.
    pub fn impossible(&mut self, mut message: VerdictMessage<E>, first: u32, error: Error) {
        self.end_send(first, std::slice::from_mut(&mut message));
        self.sending.leaving -= message.count();
        let ids = self.ledger.ids_of(&message);
        if let (VerdictMessage::Single { decision, .. }, [id]) = (message, &ids[..]) {
            self.ledger.reopen(*id, NO_TOKEN);
            self.refuse(*id, decision.extras, error);
        }
        self.flush();
    }

    /// Messages were not sent. Their decisions are gathered again and sent later.
    pub fn unsent(&mut self, mut messages: Vec<VerdictMessage<E>>, first: u32) {
        self.end_send(first, &mut messages);
        for message in messages {
            self.sending.leaving -= message.count();
            self.ledger.unsent(message);
        }
    }

    /// A send has failed temporarily. The next attempt follows after a pause.
    pub fn send_failed(&mut self) {
        self.sending.broken = false;
        self.counters.sent.failed_sends += 1;
        self.note(ReportKind::Unsent, 1, None);
        let pause = self.sending.retry.map_or(PAUSES.0, |(_, pause)| pause);
        let at = self.clock.now() + pause;
        self.sending.retry = Some((at, (pause * 2).min(PAUSES.1)));
        self.set_timer(at);
    }

    /// A configuration message was not sent.
    pub fn take_config(&mut self, sequence: u32) -> Option<E::Waiter> {
        match self.awaiting.remove(sequence)? {
            Awaited::Verdict { waiter, .. } | Awaited::Config { waiter, .. } => Some(waiter),
        }
    }

    /// Reports a refused verdict. Its packet gets the default action.
    pub(super) fn refuse(&mut self, id: u32, mut extras: Option<E>, error: Error) {
        let waiter = extras.as_mut().and_then(E::take_waiter);
        self.notices.extend(extras.map(Notice::Spent));
        let error = error.with_packet(PacketId::new(id));
        self.counters.sent.refusals += 1;
        self.note(ReportKind::Refused, 1, Some(id));
        match waiter {
            Some(waiter) => self.notices.push(Notice::Reply(waiter, Err(error))),
            None => self.push_refusal(error),
        }
        self.decide_again(id);
    }

    pub(super) fn decide_again(&mut self, id: u32) {
        self.decide_in_place(id, self.settings.on_unanswered);
    }

    pub(super) fn missing_permission(&mut self) {
        if self.permission == Permission::Held {
            let now = self.clock.now();
            let next = now + PAUSES.0;
            self.permission = Permission::Missing { since: now, next, pause: PAUSES.0 * 2, calls: 0, confirmed: false };
            self.note(ReportKind::CapabilityMissing, 1, None);
            self.set_timer(next);
            self.effects.call_driver = true;
        }
    }
}
