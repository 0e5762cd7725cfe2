//! The kernel's answers, and what is told of them.

use super::{Awaited, Carried, Clock, ENOENT, EPERM, Event, Kind, Life, MAX_REFUSALS, Machine, NO_TOKEN, answer_error};
use crate::{Error, ErrorKind, PacketId, wire::Answer, wire::message::Refused, wire::verdict::action_of};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Takes in the kernel's answer to one of our messages.
    pub(crate) fn answered(&mut self, answer: Answer) {
        let first = answer.sequence;
        if answer.errno == EPERM {
            if let Some(at) = self.known_refused.iter().position(|known| *known == first) {
                self.known_refused.remove(at);
                return;
            }
            if let Some((watched, refused)) = &mut self.watched
                && *watched == first
            {
                *refused = true;
                return;
            }
        }
        let failed = || answer_error(&answer);
        match self.awaiting.remove(answer.sequence) {
            Some(Awaited::Config { change, waiter, operation }) => {
                if answer.errno == 0 {
                    self.limits.max_len = change.max_len.unwrap_or(self.limits.max_len);
                    self.limits.payload = change.payload.unwrap_or(self.limits.payload);
                }
                let result = if answer.errno == 0 { Ok(()) } else { Err(failed().with_operation(operation)) };
                self.events.push(Event::Answer(waiter, result));
            }
            Some(Awaited::Verdict { id, waiter }) => {
                let result = match answer.errno {
                    0 => Ok(()),
                    _ => {
                        self.not_taken(&answer, Some(id));
                        Err(failed().with_packet(PacketId(id)))
                    }
                };
                self.events.push(Event::Answer(waiter, result));
            }
            None if answer.errno != 0 => {
                let told = self.not_taken(&answer, None);
                if told {
                    let error = match answer.refused {
                        Refused::Verdict { id, .. } | Refused::Batch { max: id } => failed().with_packet(PacketId(id)),
                        Refused::Other => failed(),
                    };
                    self.counters.refusals += 1;
                    self.note(Kind::Refused, 1, error.packet_id().map(PacketId::get));
                    self.tell(error);
                }
            }
            None => {}
        }
    }

    /// Books a verdict that the kernel did not take. Tells whether its owner is to be told.
    pub(super) fn not_taken(&mut self, answer: &Answer, confirmed: Option<u32>) -> bool {
        let (action, count, id) = match answer.refused {
            Refused::Verdict { id, word } => (action_of(word), 1, Some(id)),
            Refused::Batch { .. } => match self.sent_batches.take(answer.sequence) {
                Some((action, count)) => (Some(action), count, None),
                None => (None, 1, None),
            },
            Refused::Other => (None, 1, confirmed),
        };
        if answer.errno == EPERM {
            // The capability was there a moment later, or is worth nothing: what was sent cannot be known any more.
            self.distrust = true;
            self.ledger.forbid_batches();
            self.missing_permission();
            if let (Some(action), Some(id)) = (action, id)
                && self.ledger.reopen(id, NO_TOKEN)
            {
                self.counters.taken_back(action, 1);
                self.decide_again(id);
            }
            return true;
        }
        if let Some(action) = action {
            self.counters.taken_back(action, count);
        }
        if answer.errno == ENOENT {
            // Device down, hook unregistered, queue unbound: the packets left without us.
            self.counters.gone_at_least += count;
            return false;
        }
        self.counters.refused += count;
        true
    }

    pub(super) fn tell(&mut self, error: Error) {
        if self.refusals.len() == MAX_REFUSALS {
            self.refusals.pop_front();
            self.counters.refusals_unread += 1;
        }
        self.refusals.push_back(error);
        self.todo.wake_refusals = true;
    }

    /// The oldest refusal that nobody has read.
    pub(crate) fn next_refusal(&mut self) -> Option<Error> {
        self.refusals.pop_front()
    }

    /// A verdict that came too late is told as well.
    pub(crate) fn tell_late(&mut self, id: u32) {
        self.tell(Error::new(ErrorKind::Expired, "submit verdict").with_packet(PacketId(id)));
    }

    /// Something has happened after which the queue is of no use.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.failure.is_none() && self.life == Life::Open {
            self.note(Kind::Failed, 1, None);
            self.failure = Some(error.fatal());
            self.todo.wake_stream = true;
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    pub(crate) fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }
}
