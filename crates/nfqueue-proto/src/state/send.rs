//! Rounds of sending: what leaves the ledger, and what returns because it was refused or not sent.

use rustix::io::Errno;

use super::{
    Awaited, Carried, Change, Clock, Decision, Machine, Notice, Origin, Outbox, Proof, ReportKind, Verdict,
    VerdictMessage, flush::FlushReason, outbox::Stage, permission::missing_capability,
};
use crate::{
    types::{Error, ErrorKind, PacketId},
    wire::verdict::VerdictFields,
};

/// What the thread that sends does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmit {
    /// Receive until the socket is empty.
    Receive,
    /// Send the datagram that [`Outbox::encode`] makes, and report what came of it to
    /// [`Machine::transmitted`].
    Datagram {
        /// How to find out whether it was executed.
        proof: Proof,
        /// The kernel replies also on success. A reply does not fit into a full buffer: receive
        /// some datagrams first.
        acknowledged: bool,
    },
}

/// What came of a datagram.
#[derive(Debug)]
pub enum Outcome {
    /// It was sent, and executed as far as that has been found out.
    Sent,
    /// The kernel discarded it because the capability is missing.
    Refused,
    /// The socket does not send a datagram of this length.
    TooLong(Errno),
    /// A reason that passes: the kernel was out of memory.
    Failed,
    /// The socket cannot be used any more.
    Broken(Error),
}

impl<E: Carried, K: Clock> Machine<E, K> {
    /// What to do next, until everything that was gathered at the first call has been sent. The
    /// caller holds the send lock until `None` ends the round, and then calls
    /// [`send_lock_released`](Self::send_lock_released).
    ///
    /// `is_capable` finds out whether the calling thread has the capability. It is called only if
    /// the capability was missing before.
    pub fn poll_transmit(&mut self, outbox: &mut Outbox<E>, is_capable: impl FnOnce() -> bool) -> Option<Transmit> {
        match outbox.stage {
            // A batch would also decide a packet whose verdict the kernel has discarded.
            Stage::Idle if self.has_unproven() && self.ledger.gathered() > 1 => {
                outbox.stage = Stage::Proven;
                return Some(Transmit::Receive);
            }
            Stage::Idle | Stage::Proven => {
                outbox.stage = Stage::Sending;
                self.begin_round(outbox, is_capable);
            }
            Stage::Sending => {}
        }
        if outbox.choose(self.outstanding.sequence().wrapping_add(1)) {
            return Some(self.begin_send(outbox));
        }
        outbox.stage = Stage::Idle;
        self.end_round();
        None
    }

    /// Every decision becomes a message.
    fn begin_round(&mut self, outbox: &mut Outbox<E>, is_capable: impl FnOnce() -> bool) {
        if self.is_permission_missing() {
            if !is_capable() {
                return self.refuse_gathered();
            }
            self.permitted();
        }
        self.rounds.grant();
        if self.ledger.gathered() == 0 {
            return;
        }
        self.rounds.begin(self.ledger.gathered());
        self.end_waiting();
        let now = self.clock.now();
        let messages =
            outbox.fill(|messages| self.ledger.settle(self.arrivals.rounds(), messages), self.arrivals.waited(now));
        self.counters.sent.flushes += 1;
        self.counters.sent.largest_flush = self.counters.sent.largest_flush.max(messages as u64);
    }

    fn end_round(&mut self) {
        self.rounds.end();
        if self.ledger.gathered() == 0 {
            self.outstanding.all_sent();
        }
    }

    /// The send lock has been released. Returns whether another thread has requested a round while
    /// the lock was taken.
    pub fn send_lock_released(&mut self) -> bool {
        if self.rounds.is_wanted() {
            return true;
        }
        self.effects.wake_waiting = true;
        self.look_for_the_end();
        false
    }

    /// Whether nothing is sent before a pause is over: the kernel was out of memory, or the
    /// capability is missing.
    pub fn sends_later(&self) -> bool {
        self.rounds.retry().is_some() || self.is_permission_missing()
    }

    /// Whether the last send failed for a reason that does not pass, and no thread is about to
    /// send: a reply that has not come will not come.
    pub fn is_broken(&self) -> bool {
        self.rounds.are_broken()
    }

    /// A thread without the capability was to send, and the capability had been missing before: the
    /// decisions of owners are refused.
    fn refuse_gathered(&mut self) {
        self.rounds.grant();
        self.rounds.skip();
        self.end_waiting();
        let taken = self.ledger.take_back_gathered();
        self.missing_permission();
        for (id, decision) in taken {
            self.refuse(id, decision.extras, missing_capability());
        }
    }

    /// The receive buffer has this size in bytes, as the kernel accounts them.
    pub fn set_receive_buffer(&mut self, bytes: usize) {
        self.outstanding.set_receive_buffer(bytes);
    }

    /// Whether the kernel may have discarded a verdict, and no reply has been read yet.
    pub fn has_unproven(&self) -> bool {
        self.outstanding.has_unproven()
    }

    /// The chosen datagram is about to be sent.
    ///
    /// From now on its packets count as decided, because replies may be received before the send
    /// has returned.
    fn begin_send(&mut self, outbox: &mut Outbox<E>) -> Transmit {
        let (first, messages) = outbox.chosen();
        let proof = self.proof(messages);
        self.outstanding.begin_datagram(first);
        if let (Proof::Later, [VerdictMessage::Single { id, decision }]) = (proof, &*messages) {
            let verdict = Verdict { id: *id, fields: decision.fields, origin: decision.origin };
            if let Some(at) = self.outstanding.prove_later(verdict, || self.clock.now()) {
                self.set_timer(at);
            }
        }
        let mut acknowledged = false;
        for message in messages {
            self.counters.count_decided(message.fields().counted(), message.count() as u64);
            self.rounds.leave(message.count());
            acknowledged |= self.outstanding.begin(message, self.counters.received.packets);
        }
        Transmit::Datagram { proof, acknowledged }
    }

    fn proof(&self, messages: &[VerdictMessage<E>]) -> Proof {
        match messages {
            _ if self.outstanding.only_replies_prove() => Proof::Replies,
            [VerdictMessage::Single { decision, .. }]
                if decision.extras.is_none()
                    && self.life.is_open()
                    && self.gathering.is_driven()
                    && !self.gathering.has_backlog()
                    && self.outstanding.can_defer() =>
            {
                Proof::Later
            }
            _ => Proof::Capability,
        }
    }

    /// The datagram was sent, or not. What was not executed goes back into the ledger, and so does
    /// what stands behind it: a batch would decide its packets as well. Returns the sequence number
    /// of the last message.
    pub fn transmitted(&mut self, outbox: &mut Outbox<E>, outcome: Outcome) -> u32 {
        let refused = self.outstanding.end_datagram();
        self.rounds.tried(matches!(outcome, Outcome::Broken(_)));
        if matches!(outcome, Outcome::Sent) && !refused {
            self.counters.waited.record(
                outbox
                    .chosen_with_times()
                    .map(|(message, waited)| (message.fields().action, waited, message.count() as u64)),
            );
            self.counters.sent.sends += 1;
            self.counters.sent.messages += outbox.sent() as u64;
            self.rounds.succeeded();
            self.outstanding.expire(self.counters.received.packets, u64::from(self.limits.max_len));
            return self.outstanding.sequence();
        }
        let (first, messages) = outbox.chosen();
        for (message, offset) in messages.iter_mut().zip(0..) {
            self.counters.uncount_decided(message.fields().counted(), message.count() as u64);
            self.rounds.come_back(message.count());
            self.outstanding.undo(first.wrapping_add(offset), message);
        }
        let (mut messages, rest) = outbox.take_unsent();
        let again = match outcome {
            Outcome::Sent | Outcome::Refused => {
                if !refused {
                    self.outstanding.expect_refusal(first);
                }
                self.refused(messages.drain(..));
                true
            }
            Outcome::TooLong(errno) if messages.len() == 1 => {
                let error = Error::new(ErrorKind::InvalidInput, "send verdict").with_source(errno.into());
                let bytes = outbox.length();
                let detail = format!("the message of {bytes} bytes is longer than the socket's send buffer allows");
                self.impossible(messages.remove(0), error.with_detail(detail));
                true
            }
            Outcome::TooLong(_) => {
                outbox.shorten();
                true
            }
            Outcome::Failed => {
                self.send_failed();
                false
            }
            Outcome::Broken(error) => {
                self.effects.wake_waiting = true;
                self.fail(error);
                false
            }
        };
        for message in messages.into_iter().chain(rest) {
            self.rounds.leave(message.count());
            self.ledger.unsent(message);
        }
        if again {
            self.flush();
        }
        self.outstanding.sequence()
    }

    /// The kernel refused a datagram because the capability was missing. Its packets get the
    /// default action when the capability is back.
    fn refused(&mut self, messages: impl Iterator<Item = VerdictMessage<E>>) {
        self.counters.sent.sends += 1;
        self.missing_permission();
        let by_queue = |origin, fields: &VerdictFields| (origin == Origin::Queue).then_some(*fields);
        for message in messages {
            self.rounds.leave(message.count());
            let ids = self.ledger.ids_of(&message);
            let (mut extras, by_queue) = match message {
                VerdictMessage::Single { decision, .. } => {
                    (decision.extras, by_queue(decision.origin, &decision.fields))
                }
                VerdictMessage::Batch { fields, origin, .. } => (None, by_queue(origin, &fields)),
            };
            for id in ids {
                self.ledger.reopen(id);
                match by_queue {
                    // The queue's own decision stays the same.
                    Some(fields) => self.decide_as_before(id, fields),
                    None => self.refuse(id, extras.take(), missing_capability()),
                }
            }
        }
    }

    /// A configuration message is about to be sent. Returns its sequence number.
    pub fn await_config(&mut self, operation: &'static str, change: Change, waiter: E::Waiter) -> u32 {
        self.outstanding.begin_config(Awaited::Config { change, waiter, operation })
    }

    /// The kernel has refused a verdict because the capability was missing, as a reply shows only
    /// now.
    pub(super) fn refused_before(&mut self, verdict: Verdict) {
        self.missing_permission();
        if !self.ledger.reopen(verdict.id) {
            return;
        }
        self.counters.uncount_decided(verdict.fields.counted(), 1);
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
            if self.ledger.reopen(id) {
                self.counters.uncount_decided(fields.counted(), 1);
                self.decide_as_before(id, fields);
                self.request_flush();
            }
        }
    }

    fn decide_as_before(&mut self, id: u32, fields: VerdictFields) {
        drop(self.ledger.decide(id, Decision { fields, extras: None, origin: Origin::Queue }));
    }

    /// A message for one packet can never be sent. The packet gets the default action.
    fn impossible(&mut self, message: VerdictMessage<E>, error: Error) {
        self.rounds.leave(message.count());
        let ids = self.ledger.ids_of(&message);
        if let (VerdictMessage::Single { decision, .. }, [id]) = (message, &ids[..]) {
            self.ledger.reopen(*id);
            self.refuse(*id, decision.extras, error);
        }
    }

    /// A send has failed temporarily. The next attempt follows after a pause.
    fn send_failed(&mut self) {
        self.counters.sent.failed_sends += 1;
        self.note(ReportKind::Unsent, 1, None);
        let at = self.rounds.failed(self.clock.now());
        self.set_timer(at);
    }

    /// A configuration message was not sent.
    pub fn take_config(&mut self, sequence: u32) -> Option<E::Waiter> {
        match self.outstanding.take(sequence)? {
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
}
