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
                self.events.push(Event::WakeStream);
            }
            Life::Stopping { limit: old, .. } | Life::Waiting { limit: old, .. } => {
                // Begun by a drop, which waits for ever; or by somebody who has more time.
                *old = old.tighten(limit);
                let now = self.clock.now();
                self.end_wait(now);
                self.wish_again(now);
                return false;
            }
            Life::Unbinding | Life::Closed => return false,
        }
        if let Limit::At(at) = limit {
            self.wish(at);
        }
        true
    }

    /// The kernel has been told to queue nothing, or could not be; all that was queued has been received.
    pub(crate) fn stopped(&mut self, result: Result<(), Error>) {
        if let Life::Stopping { action, limit } = self.life {
            self.life = Life::Waiting { action, limit };
        }
        if let Err(error) = result {
            self.close_error.get_or_insert(error);
        }
        if self.ledger.gathered() > 0 {
            self.request_flush();
        }
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
        let Life::Waiting { limit, .. } = self.life else { return };
        let sent = self.ledger.gathered() == 0 && !self.sending;
        // What cannot be sent is not waited for beyond the time.
        let hopeless = !self.sending
            && (self.permission == Permission::Lost
                || limit == Limit::Over && (self.permission != Permission::Held || self.retry.is_some()));
        if self.ledger.undecided() == 0 && (sent || hopeless) {
            self.life = Life::Unbinding;
            self.todo.unbind = true;
        }
    }

    /// The queue has been unbound, or could not be.
    pub(crate) fn unbound(&mut self, result: Result<(), Error>) {
        self.life = Life::Closed;
        if let Err(error) = result {
            self.close_error.get_or_insert(error);
        }
        self.events.extend([Event::WakeStream, Event::WakeWaiting, Event::WakeRefusals]);
        for report in self.reports.rest(self.clock.now()) {
            self.events.push(Event::Report(report));
        }
        self.todo.call_driver = true;
    }

    /// The error of the end, for the first who asks.
    pub(crate) fn take_close_error(&mut self) -> Option<Error> {
        self.close_error.take()
    }
}
