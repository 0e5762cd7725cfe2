//! Received packets, gaps, and malformed messages.

use std::time::Duration;

use super::{Arrival, Awaited, Carried, Clock, LifeCycle, Machine, Notice, ReportKind, Storage, flush::FlushReason};
use crate::types::{Error, ErrorKind, PacketId};

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Packets were received, in this order. Returns false if they have been decided and must not
    /// be handed out.
    pub fn arrived(&mut self, packets: impl Iterator<Item = Arrival> + Clone) -> bool {
        let Some(Arrival { id: first, .. }) = packets.clone().next() else { return true };
        let (now, oldest) = (self.clock.now(), self.ledger.oldest());
        let mut last = first;
        for Arrival { id, storage } in packets.clone() {
            self.enter(id, storage);
            last = id;
        }
        self.arrivals.arrived(first, last, oldest, now);
        if let Some(at) = self.arrivals.next_deadline() {
            self.set_timer(at);
        }
        let in_flight = self.in_flight();
        self.fill.sample(in_flight);
        self.counters.held.most_in_flight = self.counters.held.most_in_flight.max(in_flight);
        let action = match *self.life {
            LifeCycle::Open | LifeCycle::HandingOver { .. } => return true,
            LifeCycle::Stopping { action, .. } | LifeCycle::Waiting { action, .. } => action,
            LifeCycle::Unbinding { .. } | LifeCycle::Closed(_) => self.settings.on_unanswered,
        };
        for Arrival { id, .. } in packets {
            self.decide_in_place(id, action);
        }
        self.ask_policy(FlushReason::Verdict);
        false
    }

    pub(super) fn enter(&mut self, id: u32, storage: Storage) {
        if self.ledger.is_repeated(id) {
            // It is no further packet, and its memory is not counted.
            self.counters.received.malformed += 1;
            return;
        }
        let missing = self.ledger.arrive(id, storage);
        self.counters.received.packets += 1;
        if missing > 0 {
            self.missing(id.wrapping_sub(missing), missing);
        }
        self.receiving.id_was_read();
    }

    /// Ids are missing: lost to the full receive buffer, or of malformed messages.
    pub(super) fn missing(&mut self, first: u32, count: u32) {
        let mut lost = count;
        if self.receiving.unknown() > 0 {
            if count > WIDEST_SEARCH {
                self.ledger.forbid_batches();
            } else {
                self.outstanding.doubt();
                // It is unknown which of them the kernel still holds, so each gets a message of its
                // own.
                for offset in 0..count {
                    let id = first.wrapping_add(offset);
                    if self.ledger.reopen(id) {
                        self.counters.received.packets += 1;
                        self.decide_in_place(id, self.settings.on_unanswered);
                    }
                }
                self.ask_policy(FlushReason::Verdict);
                lost = 0;
            }
        }
        self.counters.lost.packets += u64::from(lost);
        self.counters.lost.gaps += u64::from(lost > 0);
    }

    /// A packet message was malformed. The packet gets the default action if its id is known. Must
    /// be called after the packets before it have arrived, and before the packets behind it do.
    pub fn malformed(&mut self, id: Option<u32>) {
        self.counters.received.malformed += 1;
        self.note(ReportKind::Malformed, 1, id);
        let mut error = Error::new(ErrorKind::Malformed, "receive packet");
        match id {
            Some(id) => {
                error = error.with_packet(PacketId::new(id));
                self.enter(id, Storage::None);
                self.decide_in_place(id, self.settings.on_unanswered);
                self.ask_policy(FlushReason::Verdict);
            }
            None => self.receiving.id_is_unknown(),
        }
        self.push_refusal(error);
    }

    /// Ends a round of receiving. `bytes` and `overruns` are totals of the round, and `charge` what
    /// the kernel has accounted for it at most, in bytes. With `emptied` the socket was found empty
    /// after every message up to this sequence number had been sent.
    pub fn end_receive_round(
        &mut self,
        bytes: u64,
        charge: usize,
        overruns: u64,
        lost_before: u64,
        emptied: Option<u32>,
    ) {
        self.gathering.read(emptied.is_none());
        self.counters.received.bytes += bytes;
        self.counters.lost.overruns += overruns;
        let lossy = overruns > 0 || self.counters.lost.packets > lost_before;
        self.outstanding.received(charge, lossy);
        if self.receiving.round_ended(lossy) {
            self.counters.lost.overrun_episodes += 1;
            self.note(ReportKind::Lost, self.counters.lost.packets - lost_before, None);
        }
        if let Some(sent) = emptied {
            self.socket_empty(sent);
        }
    }

    /// The socket was found empty after every message up to this sequence number had been sent. A
    /// reply that has not been received by now will not come.
    pub fn socket_empty(&mut self, sent: u32) {
        self.receiving.emptied();
        self.gathering.read(false);
        let again = self.outstanding.emptied(sent);
        self.send_again(again);
        while let Some(awaited) = self.outstanding.take_lost(sent) {
            self.reply_is_lost(awaited);
        }
    }

    pub(super) fn reply_is_lost(&mut self, awaited: Awaited<E::Waiter>) {
        let (waiter, error) = match awaited {
            Awaited::Verdict { id, waiter } => {
                (waiter, Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(PacketId::new(id)))
            }
            Awaited::Config { change, waiter, operation } => {
                // It may have been applied: messages may be as large as either setting allows.
                self.limits.payload = self.limits.payload.max(change.payload.unwrap_or(0));
                (waiter, Error::new(ErrorKind::Unconfirmed, operation))
            }
        };
        self.notices.push(Notice::Reply(waiter, Err(error)));
    }

    /// The streams of refusals may have ended.
    pub fn wake_refusals(&mut self) {
        self.effects.wake_refusals = true;
    }

    /// How many packets have been lost so far.
    pub fn lost(&self) -> u64 {
        self.counters.lost.packets
    }

    /// The socket has become readable. This matters only with a deadline: no task may be reading.
    pub fn readable(&mut self) {
        let Some((after, _)) = self.settings.deadline else { return };
        let at = self.clock.now() + (after / 64).max(SHORTEST_LOOK);
        self.receiving.readable(at);
        self.set_timer(at);
    }
}

/// A wider gap is not searched for packets whose id could not be read.
const WIDEST_SEARCH: u32 = 65_536;
/// The shortest time between two checks for unread packets.
const SHORTEST_LOOK: Duration = Duration::from_micros(200);
