//! Decisions of owners and of the queue itself, and when the policy wants them sent.

use std::time::Duration;

use super::{Carried, Clock, Decision, Kind, LONGEST_DELAY, Life, Machine, NO_TOKEN, plain};
use crate::{Action, Flush, FlushPolicy, Gathered, Occasion};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Takes an owner's decision; it is sent when the policy says so.
    ///
    /// # Errors
    /// The packet has been answered for.
    pub(crate) fn decide(&mut self, id: u32, decision: Decision<E>) -> Result<(), Decision<E>> {
        match self.ledger.decide(id, decision) {
            Ok(token) => {
                self.held.leave(token);
                self.consult(Occasion::Decided);
                Ok(())
            }
            Err(decision) => {
                self.counters.late += 1;
                self.note(Kind::Late, 1, Some(id));
                Err(decision)
            }
        }
    }

    /// Whoever held a packet has dropped it.
    pub(crate) fn abandon(&mut self, id: u32) {
        if self.decide_in_place(id, self.rules.on_unanswered) {
            self.note(Kind::Unanswered, 1, Some(id));
            self.consult(Occasion::Decided);
        }
    }

    /// Whoever holds a packet has given back its memory.
    pub(crate) fn detached(&mut self, id: u32) {
        if let Some(token) = self.ledger.exchange_token(id, NO_TOKEN) {
            self.held.leave(token);
        }
    }

    /// Answers for a packet in its owner's place; tells whether that was still to be done.
    pub(super) fn decide_in_place(&mut self, id: u32, action: Action) -> bool {
        let Ok(token) = self.ledger.decide(id, plain(action)) else { return false };
        self.held.leave(token);
        self.counters.unanswered += 1;
        true
    }

    /// Answers for packets that nobody will take from the stream.
    pub(crate) fn answer_for(&mut self, ids: impl Iterator<Item = u32>, action: Action) {
        for id in ids {
            self.decide_in_place(id, action);
        }
    }

    pub(crate) fn is_undecided(&self, id: u32) -> bool {
        self.ledger.is_undecided(id)
    }

    /// Sends everything, as soon as the lock is released. Tells the round by whose end that has been done; `None` if
    /// there is nothing to send.
    pub(crate) fn flush(&mut self) -> Option<u64> {
        if self.ledger.gathered() == 0 {
            return self.sending.then_some(self.rounds_begun);
        }
        self.request_flush();
        Some(self.rounds_begun + 1)
    }

    /// Asks for a flush again if somebody has asked while the send lock was held for something else.
    pub(crate) fn flush_if_wanted(&mut self) {
        self.todo.flush |= self.flush_wanted;
    }

    pub(crate) fn has_ended(&self, round: u64) -> bool {
        self.rounds_ended >= round
    }

    /// Asks the policy.
    pub(crate) fn consult(&mut self, occasion: Occasion) {
        let decided = self.ledger.gathered();
        if decided == 0 {
            return;
        }
        let undecided = self.ledger.undecided();
        let last_words = self.life != Life::Open && undecided == 0;
        if !self.driven || last_words {
            return self.request_flush();
        }
        let Some(policy) = &mut self.policy else {
            self.ask_again = Some(occasion);
            return;
        };
        // Reading the clock costs as much as the rest of this. Between two looks the alarm keeps the cap.
        let custom = policy.is_custom();
        let look = occasion != Occasion::Decided || custom || decided.is_multiple_of(8);
        let waited = match self.oldest {
            Some(oldest) if look => self.clock.now().saturating_duration_since(oldest),
            _ => Duration::ZERO,
        };
        let gathered = Gathered { decided, undecided, backlog: self.backlog, waited, occasion };
        if custom {
            if self.oldest.is_none() {
                self.oldest = Some(self.clock.now());
            }
            // A user's code is not run under the lock.
            self.todo.ask = self.policy.take().map(|policy| Box::new((policy, gathered)));
            return;
        }
        let flush = policy.when(&gathered);
        self.follow(flush, &gathered);
    }

    /// The user's policy has been asked, and takes its place again.
    pub(crate) fn asked(&mut self, policy: FlushPolicy, flush: Flush, gathered: &Gathered) {
        self.policy = Some(policy);
        if self.ledger.gathered() > 0 {
            self.follow(flush, gathered);
        }
        if let Some(occasion) = self.ask_again.take() {
            self.consult(occasion);
        }
    }

    /// The user's policy has panicked. The default one takes its place.
    pub(crate) fn policy_panicked(&mut self) {
        self.note(Kind::PolicyPanicked, 1, None);
        self.policy = Some(FlushPolicy::default());
        self.ask_again = None;
        if self.ledger.gathered() > 0 {
            self.request_flush();
        }
    }

    pub(super) fn follow(&mut self, flush: Flush, gathered: &Gathered) {
        let delay = match flush {
            Flush::Now => return self.request_flush(),
            // The pass has ended, or will not end in time; a policy that asks for it once more has nothing else to wait for.
            Flush::AtPassEnd if matches!(gathered.occasion, Occasion::PassEnd | Occasion::Due) => {
                return self.request_flush();
            }
            Flush::AtPassEnd => {
                if !std::mem::replace(&mut self.pass_end, true) {
                    self.todo.call_driver = true;
                }
                self.policy.as_ref().map_or(LONGEST_DELAY, FlushPolicy::cap)
            }
            // The delay is over; waiting on would be asking in a circle.
            Flush::Within(delay) if gathered.waited >= delay.min(LONGEST_DELAY) => return self.request_flush(),
            Flush::Within(delay) => delay.min(LONGEST_DELAY),
        };
        let oldest = match self.oldest {
            Some(oldest) => oldest,
            None => *self.oldest.insert(self.clock.now()),
        };
        let due = self.due.map_or(oldest + delay, |earlier| earlier.min(oldest + delay));
        self.due = Some(due);
        self.wish(due);
    }

    /// The runtime has run what was ready.
    pub(crate) fn pass_ended(&mut self) {
        if std::mem::take(&mut self.pass_end) {
            self.consult(Occasion::PassEnd);
        }
    }

    pub(crate) fn wants_pass_end(&self) -> bool {
        self.pass_end
    }

    /// The stream was polled and the socket was found empty.
    pub(crate) fn drained(&mut self) {
        self.consult(Occasion::Drained);
    }

    /// There is, or there is no more, a task in a runtime.
    pub(crate) fn set_driven(&mut self, driven: bool) {
        self.driven = driven;
        if !driven {
            self.pass_end = false;
            self.consult(Occasion::Decided);
        }
    }
}
