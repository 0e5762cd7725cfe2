//! What is due at a time: flushes, deadlines, retries, the time-out of the shutdown.

use std::time::Instant;

use super::{
    Carried, Clock, LifeCycle, Machine, Notice, ReportKind, WaitLimit,
    flush::{FlushPolicy, FlushReason},
    plain,
};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// The timer has fired: does what is due.
    pub fn fire(&mut self) {
        let now = self.clock.now();
        self.alarm.at = None;
        let expired = self.expire(now);
        self.end_wait(now);
        self.end_hand_over_wait(now);
        if self.permission.is_held() {
            if self.rounds.retry().is_some_and(|at| at <= now) {
                self.request_flush();
            } else if self.gathering.take_due(now) {
                self.ask_policy(FlushReason::DelayOver);
            } else if expired {
                self.ask_policy(FlushReason::Verdict);
            }
        } else if let Some(driver_is_late) = self.permission.fire(now) {
            self.effects.call_driver = true;
            self.effects.probe = !self.gathering.is_driven() || driver_is_late || self.is_overdue();
        }
        if let Some(unread) = self.receiving.take_look(now) {
            self.effects.look = unread;
            self.effects.watch = true;
        }
        self.effects.look |= self.outstanding.look(now);
        for report in self.reports.due(now) {
            self.notices.push(Notice::Report(report));
        }
        self.rearm_timer(now);
    }

    /// This is a child process: the threads that were to carry out effects have stayed in the
    /// parent, and so has the timer thread. Doing a step twice does no harm.
    pub fn forked(&mut self) {
        if self.gathering.is_being_asked() {
            self.gathering.put_policy(FlushPolicy::default());
        }
        self.flush();
        match *self.life {
            LifeCycle::Open => self.effects.watch |= self.settings.deadline.is_some(),
            LifeCycle::Stopping { action, failed: false, .. } => self.effects.drain = Some(action),
            LifeCycle::Unbinding { .. } => self.effects.unbind = true,
            LifeCycle::Stopping { failed: true, .. }
            | LifeCycle::Waiting { .. }
            | LifeCycle::HandingOver { .. }
            | LifeCycle::Closed(_) => {}
        }
        self.effects.wake_all();
        self.alarm.at = None;
        self.rearm_timer(self.clock.now());
    }

    /// Sets the timer for the next time at which something is due.
    pub(super) fn rearm_timer(&mut self, now: Instant) {
        let linger = self.gathering.take_linger().map(|period| now + period);
        if let Some(at) = self.next_due(now).into_iter().chain(linger).min() {
            self.set_timer(at);
        }
    }

    /// The next time at which something is due.
    fn next_due(&self, now: Instant) -> Option<Instant> {
        let limit = match *self.life {
            LifeCycle::Stopping { limit: WaitLimit::At(at), .. }
            | LifeCycle::Waiting { limit: WaitLimit::At(at), .. }
            | LifeCycle::HandingOver { limit: WaitLimit::At(at), .. } => Some(at),
            _ => None,
        };
        let retry = self.rounds.retry().filter(|_| self.permission.is_held()).map(|at| at.max(now));
        let due = self.gathering.due().filter(|_| self.permission.is_held());
        let times = [
            due,
            self.permission.due(),
            limit,
            retry,
            self.arrivals.next_deadline().filter(|_| !self.life.is_frozen()),
            self.receiving.look_due(),
            self.outstanding.due(),
            self.reports.pending(),
        ];
        times.into_iter().flatten().min()
    }

    /// The verdicts that waited are being sent. The timer thread is not woken for them, unless that
    /// happens so often that it costs less than to keep it from that.
    pub(super) fn end_waiting(&mut self) {
        let due = self.gathering.end_waiting();
        if due.is_some() && self.alarm.at == due {
            self.change_timer(self.next_due(self.clock.now()));
        }
    }

    /// Decides packets whose deadline has been reached. Returns whether there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let Some((_, action)) = self.settings.deadline.filter(|_| !self.life.is_frozen()) else { return false };
        let before = self.counters.decided.expired;
        while let Some((first, last)) = self.arrivals.take_expired(now) {
            for id in self.ledger.undecided_between(first, last) {
                if self.ledger.decide(id, plain(action)).is_ok() {
                    self.counters.decided.expired += 1;
                    self.note(ReportKind::Expired, 1, Some(id));
                }
            }
        }
        self.counters.decided.expired > before
    }
}
