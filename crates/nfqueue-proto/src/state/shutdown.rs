//! The graceful shutdown of a queue, from the request to the unbinding.

use std::time::Instant;

use super::{Binding, Carried, Clock, Hold, LifeCycle, Machine, Notice, WaitLimit};
use crate::types::{Action, Error, ErrorKind};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// With a deadline, the timer thread looks for unread packets.
    pub fn bound(&mut self) {
        self.effects.watch = self.settings.deadline.is_some();
    }

    /// Where the queue is in its life cycle.
    pub fn life(&self) -> LifeCycle {
        *self.life
    }

    /// What of the life cycle is read without the machine's lock.
    pub fn hold(&self) -> &Hold {
        self.life.hold()
    }

    /// Begins the shutdown: from now on no packet is handed out. Returns true if the caller must
    /// stop the queue; false if the shutdown had begun before.
    pub fn begin_close(&mut self, action: Action, limit: WaitLimit) -> bool {
        match *self.life {
            LifeCycle::Open => {
                self.life.set(LifeCycle::Stopping { action, limit, failed: false });
                self.effects.wake_stream = true;
                if let WaitLimit::At(at) = limit {
                    self.set_timer(at);
                }
                return true;
            }
            // It was begun by a drop, which waits without limit, or by a caller with a longer
            // time-out.
            LifeCycle::Stopping { action, limit: old, failed } => {
                self.life.set(LifeCycle::Stopping { action, limit: old.tighten(limit), failed });
            }
            LifeCycle::Waiting { action, limit: old } => {
                self.life.set(LifeCycle::Waiting { action, limit: old.tighten(limit) });
            }
            LifeCycle::HandingOver { frozen, limit: wait, then } => {
                let (action, limit) = then.map_or((action, limit), |(action, old)| (action, old.tighten(limit)));
                // The hand-over waits no longer for verdicts than the shutdown would.
                let wait = if frozen { wait } else { wait.tighten(limit) };
                self.life.set(LifeCycle::HandingOver { frozen, limit: wait, then: Some((action, limit)) });
                if frozen {
                    return false;
                }
                self.end_hand_over_wait(self.clock.now());
            }
            LifeCycle::Unbinding { .. } | LifeCycle::Closed(_) => return false,
        }
        // Also if the time is over already: the timer decides what has not been handed out.
        self.rearm_timer(self.clock.now());
        false
    }

    /// The kernel queues no more packets, or the request failed. All that was queued has been
    /// received.
    ///
    /// `capable` is whether the thread that tried has the capability.
    pub fn stopped(&mut self, result: Result<(), Error>, capable: bool) {
        match (result, *self.life) {
            // A thread of the runtime may have the capability that this one lacks.
            (Err(error), LifeCycle::Stopping { action, limit, .. })
                if !capable && self.may_be_permitted_later(&error, limit) =>
            {
                self.close_error.get_or_insert(error);
                self.life.set(LifeCycle::Stopping { action, limit, failed: true });
                return self.await_permission(limit);
            }
            (Err(error), _) => drop(self.close_error.get_or_insert(error)),
            (Ok(()), _) => {}
        }
        if let LifeCycle::Stopping { action, limit, .. } = *self.life {
            self.life.set(LifeCycle::Waiting { action, limit });
        }
        self.flush();
        self.look_for_the_end();
    }

    /// Whether a thread with the capability may later do what this thread could not.
    fn may_be_permitted_later(&self, error: &Error, limit: WaitLimit) -> bool {
        error.kind() == ErrorKind::NotPermitted && !self.is_forbidden(limit)
    }

    fn await_permission(&mut self, limit: WaitLimit) {
        self.missing_permission();
        if limit == WaitLimit::Over {
            self.look_for_permission(self.clock.now());
        }
    }

    /// Whether no thread with the capability is awaited any more.
    fn is_forbidden(&self, limit: WaitLimit) -> bool {
        self.permission.is_lost() || self.permission.is_denied() && limit == WaitLimit::Over
    }

    /// Whether the time-out is over, so that no runtime is awaited.
    pub(super) fn is_overdue(&self) -> bool {
        match *self.life {
            LifeCycle::Stopping { limit, .. }
            | LifeCycle::Waiting { limit, .. }
            | LifeCycle::Unbinding { limit, .. } => limit == WaitLimit::Over,
            LifeCycle::Open | LifeCycle::HandingOver { .. } | LifeCycle::Closed(_) => false,
        }
    }

    /// Stops trying to stop the queue.
    pub(super) fn give_up_draining(&mut self) {
        if let LifeCycle::Stopping { action, limit, failed: true } = *self.life {
            self.life.set(LifeCycle::Waiting { action, limit });
        }
    }

    /// Continues a shutdown for which the capability was missing.
    pub(super) fn end_if_permitted(&mut self) {
        match *self.life {
            LifeCycle::Stopping { action, limit, failed: true } => {
                self.life.set(LifeCycle::Stopping { action, limit, failed: false });
                self.effects.drain = Some(action);
            }
            LifeCycle::Closed(Binding::StillBound) => {
                self.life.set(LifeCycle::Closed(Binding::Unbound));
                self.effects.unbind = true;
            }
            _ => {}
        }
        self.look_for_the_end();
    }

    /// The action for packets that were not handed out, if the time-out is over while the queue is
    /// being stopped. They are to be decided before [`fire`](Self::fire) ends the wait: no task
    /// owes their verdicts.
    pub fn overdue_while_stopping(&self) -> Option<Action> {
        match *self.life {
            LifeCycle::Stopping { action, limit: WaitLimit::At(at), .. } if at <= self.clock.now() => Some(action),
            _ => None,
        }
    }

    /// Stops waiting for verdicts if the time-out is over.
    pub(super) fn end_wait(&mut self, now: Instant) {
        let action = match *self.life {
            LifeCycle::Stopping { action, limit: WaitLimit::At(at), failed } if at <= now => {
                self.life.set(LifeCycle::Stopping { action, limit: WaitLimit::Over, failed });
                action
            }
            LifeCycle::Waiting { action, limit: WaitLimit::At(at) } if at <= now => {
                self.life.set(LifeCycle::Waiting { action, limit: WaitLimit::Over });
                action
            }
            _ => return,
        };
        self.look_for_permission(now);
        let ids = self.ledger.undecided_ids();
        let owed = ids.len();
        self.decide_unread(ids.into_iter(), action);
        if owed > 0 {
            self.timed_out(format!("{owed} packets were still undecided after the time-out"));
        }
        self.flush();
        self.look_for_the_end();
    }

    fn timed_out(&mut self, detail: String) {
        let error = Error::new(ErrorKind::TimedOut, format!("close queue {}", self.settings.queue));
        self.close_error.get_or_insert_with(|| error.with_detail(detail));
    }

    /// Lets the queue be unbound if nothing is owed any more.
    pub(super) fn look_for_the_end(&mut self) {
        let LifeCycle::Waiting { action, limit } = *self.life else { return };
        let sent = self.is_all_sent() && self.permission.is_held();
        // What cannot be sent is not awaited beyond the time-out. That one thread lacks the
        // capability says nothing about other threads.
        let cannot_be_sent = !self.rounds.is_under_way()
            && (self.is_forbidden(limit)
                || self.is_broken()
                || limit == WaitLimit::Over && self.rounds.retry().is_some());
        if self.ledger.undecided() == 0 && (sent || cannot_be_sent) {
            let unsent = self.ledger.gathered();
            if unsent > 0 && limit == WaitLimit::Over {
                self.timed_out(format!("{unsent} verdicts could not be sent before the time-out"));
            }
            self.life.set(LifeCycle::Unbinding { action, limit });
            self.effects.unbind = true;
        }
    }

    /// The queue has been unbound, or could not be. Returns true if this is the end, false if it is
    /// tried again.
    pub fn unbound(&mut self, result: Result<(), Error>, capable: bool) -> bool {
        match (&result, *self.life) {
            (Err(error), LifeCycle::Unbinding { action, limit })
                if !capable && self.may_be_permitted_later(error, limit) =>
            {
                self.life.set(LifeCycle::Waiting { action, limit });
                self.await_permission(limit);
                return false;
            }
            _ => {}
        }
        if self.life.is_closed() {
            return false;
        }
        self.life.set(LifeCycle::Closed(Binding::Unbound));
        if let Err(error) = result {
            if error.kind() == ErrorKind::NotPermitted && !self.permission.is_lost() {
                self.life.set(LifeCycle::Closed(Binding::StillBound));
                self.missing_permission();
            }
            self.close_error.get_or_insert(error);
        }
        self.closed();
        true
    }

    /// Nothing is sent or received any more.
    pub(super) fn closed(&mut self) {
        self.effects.wake_all();
        self.notices.extend(self.reports.rest(self.clock.now()).into_iter().map(Notice::Report));
    }

    /// The error of the shutdown, for the first caller that asks.
    pub fn take_close_error(&mut self) -> Option<Error> {
        self.close_error.take()
    }
}
