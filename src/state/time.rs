//! What is due: caps, deadlines, pauses, the limit of the end.

use std::time::Instant;

use super::{Carried, Clock, Event, Kind, Life, Limit, Machine, PATIENT_CALLS, PAUSES, Permission, plain};
use crate::{FlushPolicy, Occasion};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// The alarm has rung: does what is due.
    pub(crate) fn fire(&mut self) {
        let now = self.clock.now();
        self.alarm = None;
        let expired = self.expire(now);
        self.end_wait(now);
        match self.permission {
            Permission::Held => {
                if self.retry.is_some_and(|(at, _)| at <= now) {
                    self.request_flush();
                } else if self.due.is_some_and(|due| due <= now) {
                    self.due = None;
                    self.consult(Occasion::Due);
                } else if expired {
                    self.consult(Occasion::Decided);
                }
            }
            Permission::Missing { since, next, pause, calls, confirmed } if next <= now => {
                let pause_after = (pause * 2).min(PAUSES.1);
                self.permission = Permission::Missing {
                    since,
                    next: now + pause,
                    pause: pause_after,
                    calls: calls.saturating_add(1),
                    confirmed,
                };
                self.todo.call_driver = true;
                self.todo.probe = !self.driven || calls >= PATIENT_CALLS || self.is_overdue();
            }
            Permission::Missing { .. } | Permission::Lost => {}
        }
        if let Some((at, receives)) = self.look
            && at <= now
        {
            self.look = None;
            // Whoever has received since looks after the rest as well.
            self.todo.look = receives == self.receives;
            self.todo.watch = true;
        }
        for report in self.reports.due(now) {
            self.events.push(Event::Report(report));
        }
        self.wish_again(now);
    }

    /// Wishes for the next time at which something is due.
    pub(super) fn wish_again(&mut self, now: Instant) {
        let permission = match self.permission {
            Permission::Missing { next, .. } => Some(next),
            _ => None,
        };
        let limit = match self.life {
            Life::Stopping { limit: Limit::At(at), .. } | Life::Waiting { limit: Limit::At(at), .. } => Some(at),
            _ => None,
        };
        let retry = self.retry.filter(|_| self.permission == Permission::Held).map(|(at, _)| at.max(now));
        let due = self.due.filter(|_| self.permission == Permission::Held);
        // While there is traffic the alarm goes on ringing: to be woken by each new verdict would cost its sender more.
        let busy = std::mem::replace(&mut self.rounds_at_alarm, self.rounds_begun) != self.rounds_begun;
        let linger =
            self.policy.as_ref().filter(|_| busy && self.driven).and_then(FlushPolicy::linger).map(|cap| now + cap);
        let wishes = [
            due,
            linger,
            permission,
            limit,
            retry,
            self.deadlines.next(),
            self.look.map(|(at, _)| at),
            self.reports.pending(),
        ];
        if let Some(at) = wishes.into_iter().flatten().min() {
            self.wish(at);
        }
    }

    /// Answers for packets whose deadline has come; tells whether there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let Some((_, action)) = self.rules.deadline else { return false };
        let before = self.counters.expired;
        while let Some((first, last)) = self.deadlines.due(now) {
            for id in self.ledger.undecided_between(first, last) {
                if let Ok(token) = self.ledger.decide(id, plain(action)) {
                    self.held.leave(token);
                    self.counters.expired += 1;
                    self.note(Kind::Expired, 1, Some(id));
                }
            }
        }
        self.counters.expired > before
    }
}
