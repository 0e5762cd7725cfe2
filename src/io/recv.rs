//! Receiving: packets go to the stream, and replies to the callers that wait for them.

use std::io;

use super::{
    receiver::{RECEIVE_BATCH, Receiver, Round},
    shared::{Shared, lock},
};
use crate::state::{Arrival, Clock};

impl Shared {
    /// Receives up to `limit` datagrams. Returns true if the socket was found empty. The caller
    /// holds the receive lock, so the effects wait for
    /// [`perform_pending`](Self::perform_pending).
    ///
    /// # Errors
    /// The socket cannot be used any more.
    pub(super) fn receive(&self, receiver: &mut Receiver, limit: usize) -> io::Result<bool> {
        let mut result = self.receive_a_round(receiver, limit);
        while receiver.has_second() && result.is_ok() {
            result = self.receive_a_round(receiver, 0);
        }
        result
    }

    fn receive_a_round(&self, receiver: &mut Receiver, limit: usize) -> io::Result<bool> {
        if self.hold.is_frozen() && !receiver.has_second() {
            // Not `true`: the socket was not found empty.
            return Ok(false);
        }
        let sent = self.last_sent.load();
        let already = receiver.packets.len();
        let mut round = Round::default();
        let result = receiver.receive(&self.socket, limit, &mut round);
        let emptied = matches!(result, Ok(true)).then_some(sent);
        let mut core = self.core();
        let machine = &mut core.machine;
        if round.is_empty() {
            // The usual end of a burst: all there is to note is that the socket was empty.
            if let Some(sent) = emptied {
                machine.socket_empty(sent);
            }
            return result;
        }
        let lost_before = machine.lost();
        if receiver.packets.len() > already {
            receiver.busy_poll.arrived(|| self.clock.now());
            let new = receiver.packets.range(already..);
            if !machine.arrived(new.map(|packet| Arrival { id: packet.id, storage: packet.storage })) {
                round.decided = receiver.packets.split_off(already);
            }
        }
        for id in &round.malformed {
            machine.malformed(*id);
        }
        for reply in round.replies.drain(..) {
            machine.replied(reply);
        }
        machine.end_receive_round(round.bytes, round.charge(), round.overruns, lost_before, emptied);
        if self.settings.deadline.is_some() {
            // What its deadline has decided is not handed out, and its memory is not kept for a
            // stream that no task polls.
            while receiver.packets.front().is_some_and(|packet| !machine.is_undecided(packet.id)) {
                round.decided.extend(receiver.packets.pop_front());
            }
        }
        drop(core);
        result
    }

    /// Receives one round for a caller other than the stream, and wakes the stream if there are
    /// packets for it. Returns true if the socket was found empty. The effects wait for
    /// [`perform_pending`](Self::perform_pending).
    pub(super) fn receive_round(&self) -> io::Result<bool> {
        let mut receiver = lock(&self.receiver);
        let result = self.receive(&mut receiver, RECEIVE_BATCH);
        if !receiver.packets.is_empty() {
            self.core().machine.wake_stream();
        }
        result
    }

    /// Receives until the socket is found empty.
    ///
    /// Bounded: the kernel queues at most `max_len` undecided packets, and replies only
    /// to what was sent.
    pub(super) fn receive_all(&self) -> io::Result<()> {
        let max_len = self.core().machine.limits().max_len as usize;
        for _ in 0..=(max_len / RECEIVE_BATCH + 4) * 4 {
            if self.receive_round()? {
                break;
            }
        }
        Ok(())
    }

    /// Finds out whether the kernel has executed all verdicts that were sent. The caller must hold
    /// no lock.
    pub(super) fn prove_sent(&self) {
        if self.core().machine.has_unproven() {
            let _ = self.receive_all();
            self.perform_pending();
        }
    }

    /// Receives packets that may have been unread for long, so that their deadlines start.
    pub(super) fn receive_unread(&self) {
        if !self.hold.is_held() {
            let _ = self.receive_all();
        }
        self.perform_pending();
    }

    /// Lets the timer thread report when the socket is readable.
    pub(super) fn watch_socket(&self) {
        let Some(timer) = self.timer.get() else { return };
        if let Err(source) = self.socket.watch(timer) {
            self.trace.watch_failed(&source);
        }
    }
}
