//! Hand-overs in the histories: to a machine that has only what was passed on, or back.

use std::{collections::HashSet, time::Duration};

use super::{
    super::{Arrival, FixedSettings, Machine, Notice, Storage, WaitLimit, flush::FlushPolicy},
    CAP, World, custom_policy,
};

impl World {
    /// Begins a hand-over, if the queue is open.
    pub(super) fn begin_hand_over(&mut self) {
        if self.machine.life().is_handing_over() {
            return assert!(!self.machine.begin_hand_over(WaitLimit::Never));
        }
        let limit = match self.random.below(3) {
            0 => WaitLimit::At(self.now()),
            1 => WaitLimit::At(self.now() + Duration::from_millis(1 + self.random.below(20) as u64)),
            _ => WaitLimit::Never,
        };
        let began = self.machine.begin_hand_over(limit);
        assert_eq!(began, self.machine.life().is_handing_over());
    }

    /// As `Shared::poll_freeze`, and then the successor takes the queue over or does not. Called
    /// after each event.
    pub(super) fn continue_hand_over(&mut self) {
        if !self.machine.life().is_handing_over() {
            return;
        }
        if self.random.one_in(200) {
            // No task waits for it any more.
            return self.resume();
        }
        let mut looked = false;
        loop {
            let owed = self.machine.owed(self.receiver.iter().copied());
            let due = self.machine.is_hand_over_due();
            if owed > 0 {
                if !due {
                    return;
                }
                let unread: HashSet<u32> = self.receiver.iter().copied().collect();
                for id in self.machine.ledger.undecided_ids() {
                    if !unread.contains(&id) {
                        self.said.entry(id).or_default().default = true;
                    }
                }
                assert_eq!(self.machine.give_up_owed(&unread), owed);
                self.perform();
                continue;
            }
            if !self.machine.is_all_sent() {
                self.machine.flush();
                self.perform();
                if !self.machine.is_all_sent() {
                    // What cannot be sent is not left to the successor.
                    return if due && self.machine.sends_later() {
                        self.resume()
                    };
                }
                continue;
            }
            if self.machine.awaits_replies() && !looked {
                looked = true;
                self.receive(100_000);
                self.perform();
                continue;
            }
            break;
        }
        self.freeze();
    }

    pub(super) fn resume(&mut self) {
        self.machine.resume();
        self.perform();
    }

    fn freeze(&mut self) {
        let position = self.machine.freeze();
        self.perform();
        assert!(self.machine.life().is_frozen());
        // Traffic and time continue, and no process touches the socket.
        let decided = self.kernel.actions.len();
        for _ in 0..self.random.below(20) {
            self.kernel.packet(&mut self.random);
        }
        let waiting = self.kernel.socket.len();
        for _ in 0..self.random.below(4) {
            self.pass_time();
            self.perform();
        }
        assert_eq!((self.kernel.actions.len(), self.kernel.socket.len()), (decided, waiting));
        if self.random.one_in(3) {
            return self.resume();
        }

        self.receiver.retain(|id| self.machine.is_undecided(*id));
        let policy = if self.custom { custom_policy(decided as u64) } else { FlushPolicy::adaptive(CAP) };
        let settings = FixedSettings {
            queue: 0,
            on_unanswered: self.on_unanswered,
            deadline: self.deadline,
            in_submission_order: self.random.one_in(4),
        };
        let first = self.receiver.front().copied().unwrap_or(position.next);
        let mut successor = Machine::new(settings, policy, self.machine.limits(), first, self.clock.clone());
        let storage = Storage::Own { bytes: 100 };
        successor.inherit(position, self.receiver.iter().map(|id| Arrival { id: *id, storage }));
        assert_eq!(successor.ledger.next(), self.machine.ledger.next(), "otherwise packets would seem to be lost");
        assert_eq!(successor.ledger.allows_batches(), self.machine.ledger.allows_batches());
        successor.set_driven(!self.random.one_in(5));

        let mut before = std::mem::replace(&mut self.machine, successor);
        before.release();
        for notice in before.take_notices() {
            if let Notice::Reply(waiter, result) = notice {
                self.replied(waiter, &result);
            }
        }
        let stats = before.stats();
        assert_eq!((stats.held.in_flight, stats.held.bytes), (0, 0));
        assert_eq!(stats.decided.handed_over, self.receiver.len() as u64);
        assert_eq!(stats.received.packets - stats.decided.handed_over, super::taken(&stats));
        assert_eq!(self.machine.stats().received.packets, self.receiver.len() as u64);
        self.alarm = None;
        self.given.clear();
        self.resume();
    }
}
