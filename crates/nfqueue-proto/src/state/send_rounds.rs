//! The rounds of sending: whether one is under way or wanted, and when to try again after a
//! failure. There is at most one at a time, under the send lock.

use std::time::{Duration, Instant};

use super::PAUSES;

#[derive(Debug, Default)]
pub(super) struct SendRounds {
    /// Everything is to be sent. The thread that has the send lock does it.
    wanted: bool,
    under_way: bool,
    started: u64,
    ended: u64,
    /// Packets whose verdicts have left the ledger, but are not in the datagram being sent.
    leaving: usize,
    /// When to send again after a failure, and the pause after the next failure.
    retry: Option<(Instant, Duration)>,
    /// The last send failed for a reason that does not pass.
    broken: bool,
}

impl SendRounds {
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// A round begins, also one that finds nothing to send.
    pub(super) fn grant(&mut self) {
        self.wanted = false;
    }

    /// A round with verdicts for so many packets begins.
    pub(super) fn begin(&mut self, packets: usize) {
        self.started += 1;
        self.under_way = true;
        self.leaving = packets;
    }

    /// A round that sends nothing.
    pub(super) fn skip(&mut self) {
        self.started += 1;
    }

    pub(super) fn end(&mut self) {
        debug_assert_eq!(self.leaving, 0, "every message was sent, refused or given back");
        self.under_way = false;
        self.ended = self.started;
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// The number of the last round that has begun.
    pub(super) fn last(&self) -> u64 {
        self.started
    }

    pub(super) fn has_ended(&self, round: u64) -> bool {
        self.ended >= round
    }

    /// A message for so many packets is in the datagram being sent, or in the ledger again.
    pub(super) fn leave(&mut self, packets: usize) {
        self.leaving -= packets;
    }

    /// A message is not in the datagram any more.
    pub(super) fn come_back(&mut self, packets: usize) {
        self.leaving += packets;
    }

    pub(super) fn leaving(&self) -> usize {
        self.leaving
    }

    /// A send was tried. `broken`: it failed for a reason that does not pass.
    pub(super) fn tried(&mut self, broken: bool) {
        self.broken = broken;
    }

    pub(super) fn succeeded(&mut self) {
        self.retry = None;
    }

    /// A send has failed temporarily. Returns when to try again.
    pub(super) fn failed(&mut self, now: Instant) -> Instant {
        let pause = self.retry.map_or(PAUSES.0, |(_, pause)| pause);
        let at = now + pause;
        self.retry = Some((at, (pause * 2).min(PAUSES.1)));
        at
    }

    /// When to try again after a failure.
    pub(super) fn retry(&self) -> Option<Instant> {
        self.retry.map(|(at, _)| at)
    }

    /// Whether the last send failed for a reason that does not pass, and no thread will send soon.
    pub(super) fn are_broken(&self) -> bool {
        self.broken && !self.under_way && !self.wanted
    }
}
