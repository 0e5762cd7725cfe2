//! Decisions, and when the policy sends them.

use std::time::Duration;

use super::{
    Carried, Clock, Decision, LONGEST_DELAY, Machine, NO_TOKEN, ReportKind,
    flush::{FlushContext, FlushDecision, FlushPolicy, FlushReason},
    plain,
};
use crate::types::Action;

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Takes the decision of a packet's owner. The policy says when it is sent.
    ///
    /// # Errors
    /// The packet has already been decided.
    pub fn decide(&mut self, id: u32, decision: Decision<E>) -> Result<(), Decision<E>> {
        match self.ledger.decide(id, decision) {
            Ok(token) => {
                self.held.leave(token);
                self.ask_policy(FlushReason::Verdict);
                Ok(())
            }
            Err(decision) => {
                self.counters.decided.late += 1;
                self.note(ReportKind::Late, 1, Some(id));
                Err(decision)
            }
        }
    }

    /// The owner of a packet has dropped it.
    pub fn abandon(&mut self, id: u32) {
        if self.decide_in_place(id, self.settings.on_unanswered) {
            self.note(ReportKind::Unanswered, 1, Some(id));
            self.ask_policy(FlushReason::Verdict);
        }
    }

    /// The owner of a packet has freed its memory.
    pub fn detached(&mut self, id: u32) {
        if let Some(token) = self.ledger.exchange_token(id, NO_TOKEN) {
            self.held.leave(token);
        }
    }

    /// Decides a packet for its owner. Returns whether it was still undecided.
    pub(super) fn decide_in_place(&mut self, id: u32, action: Action) -> bool {
        let Ok(token) = self.ledger.decide(id, plain(action)) else { return false };
        self.held.leave(token);
        self.counters.decided.unanswered += 1;
        true
    }

    /// Decides packets that will not be handed out.
    pub fn decide_unread(&mut self, ids: impl Iterator<Item = u32>, action: Action) {
        for id in ids {
            self.decide_in_place(id, action);
        }
    }

    /// Whether a packet has arrived and is not decided.
    pub fn is_undecided(&self, id: u32) -> bool {
        self.ledger.is_undecided(id)
    }

    /// Sends all gathered verdicts once the lock is released. Returns the number of the round of
    /// sending after which that is done; `None` if there is nothing to send.
    pub fn flush(&mut self) -> Option<u64> {
        if self.ledger.gathered() == 0 {
            return self.sending.under_way.then_some(self.sending.rounds_started);
        }
        self.request_flush();
        Some(self.sending.rounds_started + 1)
    }

    /// Requests the flush that was requested while the send lock was held for another purpose.
    pub fn flush_if_wanted(&mut self) {
        self.effects.flush |= self.sending.wanted;
    }

    /// Whether this round of sending, from [`flush`](Self::flush), has ended.
    pub fn has_ended(&self, round: u64) -> bool {
        self.sending.rounds_ended >= round
    }

    /// Asks the policy what to do with the gathered verdicts.
    pub fn ask_policy(&mut self, reason: FlushReason) {
        let gathered = self.ledger.gathered();
        if gathered == 0 {
            return;
        }
        let undecided = self.ledger.undecided();
        let final_verdicts = !self.life.is_open() && undecided == 0;
        if !self.gathering.driven || final_verdicts || self.life.is_handing_over() {
            return self.request_flush();
        }
        let Some(policy) = &mut self.gathering.policy else {
            self.gathering.ask_again = Some(reason);
            return;
        };
        // Reading the clock costs as much as the rest of this function. Between two reads the timer
        // keeps the time limit.
        let custom = policy.is_custom();
        let look = reason != FlushReason::Verdict || custom || gathered % 8 == 0;
        let waited = match self.gathering.oldest {
            Some(oldest) if look => self.clock.now().saturating_duration_since(oldest),
            _ => Duration::ZERO,
        };
        let context = FlushContext { gathered, undecided, backlog: self.gathering.backlog, waited, reason };
        if custom {
            if self.gathering.oldest.is_none() {
                self.gathering.oldest = Some(self.clock.now());
            }
            // Users' code does not run under the lock.
            self.effects.ask = self.gathering.policy.take().map(|policy| Box::new((policy, context)));
            return;
        }
        let decision = policy.decide(&context);
        self.apply(decision, &context);
    }

    /// A custom policy has decided.
    pub fn policy_decided(&mut self, policy: FlushPolicy, decision: FlushDecision, context: &FlushContext) {
        self.gathering.policy = Some(policy);
        if self.ledger.gathered() > 0 {
            self.apply(decision, context);
        }
        if let Some(reason) = self.gathering.ask_again.take() {
            self.ask_policy(reason);
        }
    }

    /// A custom policy has panicked. The default policy replaces it.
    pub fn policy_panicked(&mut self) {
        self.note(ReportKind::PolicyPanicked, 1, None);
        self.gathering.policy = Some(FlushPolicy::default());
        self.gathering.ask_again = None;
        if self.ledger.gathered() > 0 {
            self.request_flush();
        }
    }

    pub(super) fn apply(&mut self, decision: FlushDecision, context: &FlushContext) {
        let delay = match decision {
            FlushDecision::Now => return self.request_flush(),
            // The ready tasks have run, or will not run in time. A policy that waits for them again
            // has nothing else to wait for.
            FlushDecision::AfterReadyTasks
                if matches!(context.reason, FlushReason::TasksRan | FlushReason::DelayOver) =>
            {
                return self.request_flush();
            }
            FlushDecision::AfterReadyTasks => {
                if !std::mem::replace(&mut self.gathering.wait_for_tasks, true) {
                    self.effects.call_driver = true;
                }
                self.gathering.policy.as_ref().map_or(LONGEST_DELAY, FlushPolicy::cap)
            }
            // The delay is over. To wait again would repeat the question endlessly.
            FlushDecision::Within(delay) if context.waited >= delay.min(LONGEST_DELAY) => return self.request_flush(),
            FlushDecision::Within(delay) => delay.min(LONGEST_DELAY),
        };
        let oldest = match self.gathering.oldest {
            Some(oldest) => oldest,
            None => *self.gathering.oldest.insert(self.clock.now()),
        };
        if self.gathering.due.is_none() {
            let period = self.gathering.policy.as_ref().and_then(FlushPolicy::linger).unwrap_or_default();
            self.gathering.waits.add(oldest, period);
        }
        let due = self.gathering.due.map_or(oldest + delay, |earlier| earlier.min(oldest + delay));
        self.gathering.due = Some(due);
        self.set_timer(due);
    }

    /// The runtime has run the tasks that were ready.
    pub fn tasks_ran(&mut self) {
        if std::mem::take(&mut self.gathering.wait_for_tasks) {
            self.ask_policy(FlushReason::TasksRan);
        }
    }

    /// Whether the driver is to call [`tasks_ran`](Self::tasks_ran).
    pub fn wants_tasks_ran(&self) -> bool {
        self.gathering.wait_for_tasks
    }

    /// The stream was polled and the socket was found empty.
    pub fn stream_empty(&mut self) {
        self.ask_policy(FlushReason::SocketEmpty);
    }

    /// The driver task has started or ended.
    pub fn set_driven(&mut self, driven: bool) {
        self.gathering.driven = driven;
        if !driven {
            self.gathering.wait_for_tasks = false;
            self.ask_policy(FlushReason::Verdict);
        }
    }
}
