//! Handing the queue over to another process, and continuing where another process has stopped.
//!
//! | step | here |
//! |---|---|
//! | nothing is handed out any more; verdicts are awaited | [`Machine::begin_hand_over`] |
//! | the time is over: what is owed gets the default action | [`Machine::give_up_owed`] |
//! | nothing is owed and everything is sent: the socket is not touched any more | [`Machine::freeze`] |
//! | the successor has taken it | [`Machine::release`] |
//! | the successor has not taken it | [`Machine::resume`] |
//!
//! A successor begins frozen, with [`Machine::inherit`], and is resumed when it has taken the queue
//! over.

use std::{collections::HashSet, time::Instant};

use super::{Arrival, Binding, Carried, Clock, LifeCycle, Machine, WaitLimit, ledger::Ledger};
use crate::types::Error;

/// How far a queue has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The packet id that is expected next.
    pub next: u32,
    /// Whether batches are allowed.
    pub batches: bool,
    /// Packets whose id could not be read, since the last one whose id could.
    pub unknown: u32,
    /// The sequence number of the last message to the kernel.
    pub sequence: u32,
}

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Begins to hand the queue over: from now on no packet is handed out. Returns false if the
    /// queue is not open.
    pub fn begin_hand_over(&mut self, limit: WaitLimit) -> bool {
        if !self.life.is_open() || self.failure.is_some() {
            return false;
        }
        self.life.set(LifeCycle::HandingOver { frozen: false, limit, then: None });
        if let WaitLimit::At(at) = limit {
            self.set_timer(at);
        }
        self.flush();
        true
    }

    /// How many packets have been handed out and are undecided. `unread` are those that have been
    /// received and not handed out.
    pub fn owed(&self, unread: impl Iterator<Item = u32>) -> usize {
        let unread = unread.filter(|id| self.ledger.is_undecided(*id)).count();
        self.ledger.undecided().saturating_sub(unread)
    }

    /// Whether the time for verdicts that are owed is over.
    pub fn is_hand_over_due(&self) -> bool {
        matches!(*self.life, LifeCycle::HandingOver { limit: WaitLimit::Over, .. })
    }

    /// Stops waiting for verdicts if the time is over.
    pub(super) fn end_hand_over_wait(&mut self, now: Instant) {
        match *self.life {
            LifeCycle::HandingOver { frozen, limit: WaitLimit::At(at), then } if at <= now => {
                self.life.set(LifeCycle::HandingOver { frozen, limit: WaitLimit::Over, then });
                self.effects.wake_waiting = true;
            }
            _ => {}
        }
    }

    /// Decides what was handed out and is undecided, with the action of the shutdown if one was
    /// requested meanwhile. Returns the number of packets.
    pub fn give_up_owed(&mut self, unread: &HashSet<u32>) -> usize {
        let mut ids = self.ledger.undecided_ids();
        ids.retain(|id| !unread.contains(id));
        let action = match *self.life {
            LifeCycle::HandingOver { then: Some((action, _)), .. } => action,
            _ => self.settings.on_unanswered,
        };
        let count = ids.len();
        self.decide_unread(ids.into_iter(), action);
        if count > 0 {
            self.request_flush();
        }
        count
    }

    /// Whether every decision has been sent. The caller holds the send lock.
    pub fn is_all_sent(&self) -> bool {
        self.ledger.gathered() == 0 && !self.rounds.is_under_way()
    }

    /// Whether replies of the kernel matter to this process: a task waits for one, or the
    /// capability was missing, so that only this process can interpret them.
    pub fn awaits_replies(&self) -> bool {
        self.outstanding.awaits_replies()
    }

    /// From now on the socket is not touched: the position is that of the successor as well.
    /// Tasks that wait for a reply get an error.
    pub fn freeze(&mut self) -> Position {
        if let LifeCycle::HandingOver { limit, then, .. } = *self.life {
            self.life.set(LifeCycle::HandingOver { frozen: true, limit, then });
        }
        self.abandon_replies();
        Position {
            next: self.ledger.next(),
            batches: self.ledger.allows_batches(),
            unknown: self.receiving.unknown(),
            sequence: self.outstanding.sequence(),
        }
    }

    fn abandon_replies(&mut self) {
        while let Some(awaited) = self.outstanding.take_any() {
            self.reply_is_lost(awaited);
        }
    }

    /// The successor has not taken the queue over: it continues as before. If it was closed
    /// meanwhile, the shutdown begins.
    pub fn resume(&mut self) {
        let LifeCycle::HandingOver { then, .. } = *self.life else { return };
        self.life.set(LifeCycle::Open);
        self.effects.wake_stream = true;
        self.effects.wake_waiting = true;
        if let Some((action, limit)) = then {
            self.begin_close(action, limit);
            self.effects.drain = Some(action);
        }
        self.effects.watch |= self.settings.deadline.is_some();
        self.flush();
        self.rearm_timer(self.clock.now());
    }

    /// The successor has taken the queue over. Here it is closed, without being unbound.
    pub fn release(&mut self) {
        if !self.life.is_handing_over() {
            return;
        }
        self.life.set(LifeCycle::Closed(Binding::HandedOver));
        self.abandon_replies();
        self.counters.decided.handed_over += self.ledger.undecided() as u64;
        self.ledger = Ledger::new(self.ledger.next());
        self.closed();
    }

    /// Begins, frozen, where another process has stopped. `unread` are the packets that it had
    /// received and not handed out.
    pub fn inherit(&mut self, position: Position, unread: impl Iterator<Item = Arrival>) {
        self.life.set(LifeCycle::HandingOver { frozen: true, limit: WaitLimit::Over, then: None });
        let mut ends: Option<(u32, u32)> = None;
        for Arrival { id, storage } in unread {
            if self.ledger.is_repeated(id) {
                continue;
            }
            // A packet that is missing in between is not lost: the other process has decided it.
            self.ledger.arrive(id, storage);
            self.counters.received.packets += 1;
            ends = Some((ends.map_or(id, |(first, _)| first), id));
        }
        if let Some((first, last)) = ends {
            self.arrivals.arrived(first, last, self.ledger.oldest(), self.clock.now());
        }
        self.ledger.skip_to(position.next);
        if !position.batches {
            self.ledger.forbid_batches();
        }
        self.receiving.continue_after(position.unknown);
        self.outstanding.continue_after(position.sequence);
    }

    /// Why the queue cannot be handed over, if it has failed.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }
}
