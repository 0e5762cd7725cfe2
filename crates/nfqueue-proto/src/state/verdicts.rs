//! Decisions, and when the policy sends them.

use super::{
    Carried, Clock, Decision, Machine, ReportKind,
    flush::{FlushContext, FlushDecision, FlushPolicy, FlushReason},
    gathering::Next,
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
            Ok(()) => {
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
        self.ledger.detach(id);
    }

    /// Decides a packet for its owner. Returns whether it was still undecided.
    pub(super) fn decide_in_place(&mut self, id: u32, action: Action) -> bool {
        let decided = self.ledger.decide(id, plain(action)).is_ok();
        self.counters.decided.unanswered += u64::from(decided);
        decided
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
            return self.rounds.is_under_way().then_some(self.rounds.last());
        }
        self.request_flush();
        Some(self.rounds.last() + 1)
    }

    /// Requests the flush that was requested while the send lock was held for another purpose.
    pub fn flush_if_wanted(&mut self) {
        self.effects.flush |= self.rounds.is_wanted();
    }

    /// Whether this round of sending, from [`flush`](Self::flush), has ended.
    pub fn has_ended(&self, round: u64) -> bool {
        self.rounds.has_ended(round)
    }

    /// Asks the policy what to do with the gathered verdicts.
    pub fn ask_policy(&mut self, reason: FlushReason) {
        let gathered = self.ledger.gathered();
        if gathered == 0 {
            return;
        }
        let undecided = self.ledger.undecided();
        let closing_settled = !self.life.is_open() && undecided == 0;
        if !self.gathering.is_driven() || closing_settled || self.life.is_handing_over() {
            return self.request_flush();
        }
        let next = self.gathering.ask(gathered, undecided, reason, || self.clock.now());
        self.follow(next);
    }

    fn follow(&mut self, next: Next) {
        match next {
            Next::Flush => self.request_flush(),
            Next::Wait { until, call_driver } => {
                self.effects.call_driver |= call_driver;
                self.set_timer(until);
            }
            Next::Ask(ask) => self.effects.ask = Some(ask),
            Next::Nothing => {}
        }
    }

    /// A custom policy has decided.
    pub fn policy_decided(&mut self, policy: FlushPolicy, decision: FlushDecision, context: &FlushContext) {
        self.gathering.put_policy(policy);
        if self.ledger.gathered() > 0 {
            let next = self.gathering.apply(decision, context, || self.clock.now());
            self.follow(next);
        }
        if let Some(reason) = self.gathering.take_ask_again() {
            self.ask_policy(reason);
        }
    }

    /// A custom policy has panicked. The default policy replaces it.
    pub fn policy_panicked(&mut self) {
        self.note(ReportKind::PolicyPanicked, 1, None);
        self.gathering.replace_policy();
        self.flush();
    }

    /// The runtime has run the tasks that were ready.
    pub fn tasks_ran(&mut self) {
        if self.gathering.tasks_ran() {
            self.ask_policy(FlushReason::TasksRan);
        }
    }

    /// Whether the driver is to call [`tasks_ran`](Self::tasks_ran).
    pub fn wants_tasks_ran(&self) -> bool {
        self.gathering.waits_for_tasks()
    }

    /// The stream was polled and the socket was found empty.
    pub fn stream_empty(&mut self) {
        self.ask_policy(FlushReason::SocketEmpty);
    }

    /// The driver task has started or ended.
    pub fn set_driven(&mut self, driven: bool) {
        self.gathering.set_driven(driven);
        if !driven {
            self.ask_policy(FlushReason::Verdict);
        }
    }
}
