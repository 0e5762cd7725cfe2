//! What is received: packets, gaps, and messages that cannot be understood.

use super::{
    Arrival, Awaited, Carried, Clock, Event, Kind, Life, Machine, NO_TOKEN, Place, SHORTEST_LOOK, WIDEST_SEARCH,
};
use crate::{Error, ErrorKind, Occasion, PacketId};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Takes in packets, in the order they were received. False if they have been answered for and are not to be handed
    /// out.
    pub(crate) fn arrived(&mut self, packets: impl Iterator<Item = Arrival> + Clone) -> bool {
        let Some(Arrival { id: first, .. }) = packets.clone().next() else { return true };
        let now = self.clock.now();
        self.arrivals.arrived(first, self.ledger.oldest(), now);
        let mut last = first;
        for Arrival { id, place } in packets.clone() {
            self.enter(id, place);
            last = id;
        }
        if let Some((after, _)) = self.rules.deadline {
            self.deadlines.arrived(first, last, now, after);
            if let Some(at) = self.deadlines.next() {
                self.wish(at);
            }
        }
        let in_flight = self.in_flight();
        self.fill.look(in_flight);
        self.counters.most_in_flight = self.counters.most_in_flight.max(in_flight);
        let action = match self.life {
            Life::Open => return true,
            Life::Stopping { action, .. } | Life::Waiting { action, .. } => action,
            Life::Unbinding { .. } | Life::Closed => self.rules.on_unanswered,
        };
        for Arrival { id, .. } in packets {
            self.decide_in_place(id, action);
        }
        false
    }

    pub(super) fn enter(&mut self, id: u32, place: Place) {
        let token = self.held.enter(place);
        let missing = self.ledger.arrive(id, token);
        self.counters.received += 1;
        if missing > 0 {
            self.missing(id.wrapping_sub(missing), missing);
        }
        self.unknown = 0;
    }

    /// Ids that never came: lost to the receive buffer, or among them some whose message could not be understood.
    pub(super) fn missing(&mut self, first: u32, count: u32) {
        let mut lost = count;
        if self.unknown > 0 {
            if count > WIDEST_SEARCH {
                self.ledger.forbid_batches();
            } else {
                // Which of them the kernel still holds is not known, so each gets a message of its own.
                for offset in 0..count {
                    let id = first.wrapping_add(offset);
                    if self.ledger.reopen(id, NO_TOKEN) {
                        self.counters.received += 1;
                        self.decide_in_place(id, self.rules.on_unanswered);
                    }
                }
                lost = 0;
            }
        }
        self.counters.lost += u64::from(lost);
        self.counters.gaps += u64::from(lost > 0);
    }

    /// A packet that cannot be shown to anybody. It is answered for, if it is known which. To be said after all that came
    /// before it has arrived, and before what came after it does.
    pub(crate) fn malformed(&mut self, id: Option<u32>) {
        self.counters.malformed += 1;
        self.note(Kind::Malformed, 1, id);
        let mut error = Error::new(ErrorKind::Malformed, "receive packet");
        match id {
            Some(id) => {
                error = error.with_packet(PacketId(id));
                self.enter(id, Place::Nowhere);
                self.decide_in_place(id, self.rules.on_unanswered);
                self.consult(Occasion::Decided);
            }
            None => self.unknown += 1,
        }
        self.tell(error);
    }

    /// A round of receiving is over. `bytes` and `overruns` are what it brought beside what was taken in one by one;
    /// with `emptied`, there was nothing more, after every message up to the one of this sequence number had been sent.
    pub(crate) fn received(&mut self, bytes: u64, overruns: u64, lost_before: u64, emptied: Option<u32>, more: bool) {
        self.receives += 1;
        self.backlog = more && emptied.is_none();
        self.counters.bytes += bytes;
        self.counters.overruns += overruns;
        self.lossless = overruns == 0 && self.counters.lost == lost_before;
        if !self.lossless && !self.losing {
            self.losing = true;
            self.counters.overrun_episodes += 1;
            self.note(Kind::Lost, self.counters.lost - lost_before, None);
        }
        if let Some(sent) = emptied {
            self.emptied(sent);
        }
    }

    /// The socket was found empty, after every message up to the one of this sequence number had been sent. An answer
    /// that has not come by now will not come.
    pub(crate) fn emptied(&mut self, sent: u32) {
        self.receives += 1;
        self.backlog = false;
        if self.lossless {
            self.losing = false;
        }
        self.sent_batches.forget(sent);
        while let Some(awaited) = self.awaiting.pop_sent(sent) {
            let (waiter, error) = match awaited {
                Awaited::Verdict { id, waiter } => {
                    (waiter, Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(PacketId(id)))
                }
                Awaited::Config { change, waiter, operation } => {
                    // It may have been applied: what the kernel sends may be as large as either says.
                    self.limits.payload = self.limits.payload.max(change.payload.unwrap_or(0));
                    (waiter, Error::new(ErrorKind::Unconfirmed, operation))
                }
            };
            self.events.push(Event::Answer(waiter, Err(error)));
        }
    }

    /// How many packets have been lost so far.
    pub(crate) fn lost(&self) -> u64 {
        self.counters.lost
    }

    /// The socket has become readable. Only asked for where packets have a deadline: nobody else may be reading.
    pub(crate) fn readable(&mut self) {
        let Some((after, _)) = self.rules.deadline else { return };
        let at = self.clock.now() + (after / 64).max(SHORTEST_LOOK);
        self.look = Some((at, self.receives));
        self.wish(at);
    }
}
