//! The end of a queue, from the first wish to the unbinding.

use std::time::Instant;

use super::{Carried, Clock, Event, Life, Limit, Machine, Permission};
use crate::{Action, Error, ErrorKind};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Where packets have a deadline, somebody must look for those that lie unread.
    pub(crate) fn bound(&mut self) {
        self.todo.watch = self.rules.deadline.is_some();
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Begins the end: from now on no packet is handed out. True if it is the caller who goes on with it; false if it has
    /// begun already.
    pub(crate) fn begin_close(&mut self, action: Action, limit: Limit) -> bool {
        match &mut self.life {
            life @ Life::Open => {
                *life = Life::Stopping { action, limit };
                self.todo.wake_stream = true;
            }
            Life::Stopping { limit: old, .. } | Life::Waiting { limit: old, .. } => {
                // Begun by a drop, which waits for ever; or by somebody who has more time.
                *old = old.tighten(limit);
                let now = self.clock.now();
                self.end_wait(now);
                self.wish_again(now);
                return false;
            }
            Life::Unbinding { .. } | Life::Closed => return false,
        }
        if let Limit::At(at) = limit {
            self.wish(at);
        }
        true
    }

    /// The kernel has been told to queue nothing, or could not be; all that was queued has been received.
    ///
    /// `capable` tells of the thread that has tried, as below.
    pub(crate) fn stopped(&mut self, result: Result<(), Error>, capable: bool) {
        match (result, self.life) {
            // A thread of the runtime may have the capability that this one lacks.
            (Err(error), Life::Stopping { limit, .. }) if !capable && self.may_be_permitted_later(&error, limit) => {
                self.close_error.get_or_insert(error);
                self.undrained = true;
                return self.await_permission(limit);
            }
            (Err(error), _) => drop(self.close_error.get_or_insert(error)),
            (Ok(()), _) => {}
        }
        if let Life::Stopping { action, limit } = self.life {
            self.life = Life::Waiting { action, limit };
        }
        if self.ledger.gathered() > 0 {
            self.request_flush();
        }
        self.look_for_the_end();
    }

    /// Whether a thread with the capability may yet do what this one could not.
    fn may_be_permitted_later(&self, error: &Error, limit: Limit) -> bool {
        error.kind() == ErrorKind::NotPermitted && !self.is_forbidden(limit)
    }

    fn await_permission(&mut self, limit: Limit) {
        self.missing_permission();
        if limit == Limit::Over {
            self.look_for_permission(self.clock.now());
        }
    }

    /// Whether nobody is waited for who has the capability.
    fn is_forbidden(&self, limit: Limit) -> bool {
        match self.permission {
            Permission::Held => false,
            Permission::Missing { confirmed, .. } => confirmed && limit == Limit::Over,
            Permission::Lost => true,
        }
    }

    /// Whether the time of the end is over, so that no runtime is waited for.
    pub(super) fn is_overdue(&self) -> bool {
        match self.life {
            Life::Stopping { limit, .. } | Life::Waiting { limit, .. } | Life::Unbinding { limit, .. } => {
                limit == Limit::Over
            }
            Life::Open | Life::Closed => false,
        }
    }

    /// The queue is not stopped any more, for that has been tried for long enough.
    pub(super) fn give_up_draining(&mut self) {
        if let (true, Life::Stopping { action, limit }) = (std::mem::take(&mut self.undrained), self.life) {
            self.life = Life::Waiting { action, limit };
        }
    }

    /// Goes on with an end that the capability was missing for.
    pub(super) fn end_if_permitted(&mut self) {
        if let (true, Life::Stopping { action, .. }) = (std::mem::take(&mut self.undrained), self.life) {
            self.todo.drain = Some(action);
        }
        self.todo.unbind |= std::mem::take(&mut self.unbind_later);
        self.look_for_the_end();
    }

    /// Waits for owed verdicts no longer, where that time has come.
    pub(super) fn end_wait(&mut self, now: Instant) {
        let (action, limit) = match &mut self.life {
            Life::Stopping { action, limit } | Life::Waiting { action, limit } => (*action, limit),
            _ => return,
        };
        if !matches!(limit, Limit::At(at) if *at <= now) {
            return;
        }
        *limit = Limit::Over;
        self.look_for_permission(now);
        let ids = self.ledger.undecided_ids();
        let left = ids.len() + self.ledger.gathered();
        self.answer_for(ids.into_iter(), action);
        if left > 0 {
            let detail = format!("{left} packets were still undecided when the time was over");
            let error = Error::new(ErrorKind::TimedOut, format!("close queue {}", self.rules.queue));
            self.close_error.get_or_insert_with(|| error.with_detail(detail));
            self.request_flush();
        }
        self.look_for_the_end();
    }

    /// Has the queue unbound once nothing is owed.
    pub(super) fn look_for_the_end(&mut self) {
        let Life::Waiting { action, limit } = self.life else { return };
        let sent = self.ledger.gathered() == 0 && !self.sending && self.permission == Permission::Held;
        // What cannot be sent is not waited for beyond the time. That some thread lacks the capability says nothing of others.
        let hopeless = !self.sending && (self.is_forbidden(limit) || limit == Limit::Over && self.retry.is_some());
        if self.ledger.undecided() == 0 && (sent || hopeless) {
            self.life = Life::Unbinding { action, limit };
            self.todo.unbind = true;
        }
    }

    /// The queue has been unbound, or could not be. Tells whether that is the end, or is tried again.
    pub(crate) fn unbound(&mut self, result: Result<(), Error>, capable: bool) -> bool {
        if let (Err(error), Life::Unbinding { action, limit }) = (&result, self.life)
            && !capable
            && self.may_be_permitted_later(error, limit)
        {
            self.life = Life::Waiting { action, limit };
            self.await_permission(limit);
            return false;
        }
        if self.life == Life::Closed {
            return false;
        }
        self.life = Life::Closed;
        if let Err(error) = result {
            self.unbind_later = error.kind() == ErrorKind::NotPermitted && self.permission != Permission::Lost;
            self.close_error.get_or_insert(error);
            if self.unbind_later {
                self.missing_permission();
            }
        }
        self.todo.wake_stream = true;
        self.todo.wake_waiting = true;
        self.todo.wake_refusals = true;
        for report in self.reports.rest(self.clock.now()) {
            self.events.push(Event::Report(report));
        }
        self.todo.call_driver = true;
        true
    }

    /// The error of the end, for the first who asks.
    pub(crate) fn take_close_error(&mut self) -> Option<Error> {
        self.close_error.take()
    }
}
