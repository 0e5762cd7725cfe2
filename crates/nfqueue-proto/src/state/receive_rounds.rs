//! The rounds of receiving: what one round leaves for the next ones.

use std::time::Instant;

#[derive(Debug)]
pub(super) struct ReceiveRounds {
    /// The number of rounds so far.
    rounds: u64,
    /// Packet messages whose id could not be read, since the last id that could.
    unknown: u32,
    /// An episode of loss to the receive buffer has not ended.
    losing: bool,
    /// Packets were missing in the last round.
    lossy: bool,
    /// When to look for unread packets, and `rounds` when the socket became readable.
    look: Option<(Instant, u64)>,
}

impl ReceiveRounds {
    pub(super) fn new() -> Self {
        Self { rounds: 0, unknown: 0, losing: false, lossy: false, look: None }
    }

    /// Continues where another process has stopped.
    pub(super) fn continue_after(&mut self, unknown: u32) {
        self.unknown = unknown;
    }

    pub(super) fn id_is_unknown(&mut self) {
        self.unknown = self.unknown.saturating_add(1);
    }

    pub(super) fn id_was_read(&mut self) {
        self.unknown = 0;
    }

    /// Packet messages whose id could not be read, since the last id that could. Their ids are in
    /// the next gap.
    pub(super) fn unknown(&self) -> u32 {
        self.unknown
    }

    /// A round has ended. `lossy`: packets were missing. Returns whether an episode of loss begins.
    pub(super) fn round_ended(&mut self, lossy: bool) -> bool {
        self.rounds += 1;
        self.lossy = lossy;
        let begins = lossy && !self.losing;
        self.losing |= lossy;
        begins
    }

    /// The socket was found empty. That ends an episode of loss, unless the last round belongs to
    /// it.
    pub(super) fn emptied(&mut self) {
        self.rounds += 1;
        self.losing &= self.lossy;
    }

    /// The socket has become readable. Unread packets are looked for at this time.
    pub(super) fn readable(&mut self, look: Instant) {
        self.look = Some((look, self.rounds));
    }

    /// When to look for unread packets.
    pub(super) fn look_due(&self) -> Option<Instant> {
        self.look.map(|(at, _)| at)
    }

    /// The time to look for unread packets, if it has come. Returns whether there may be some: a
    /// thread that has received since the socket became readable handles the rest as well.
    pub(super) fn take_look(&mut self, now: Instant) -> Option<bool> {
        let (_, rounds) = self.look.take_if(|(at, _)| *at <= now)?;
        Some(rounds == self.rounds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_episode_of_loss_is_reported_once_and_ends_with_an_empty_socket() {
        let mut rounds = ReceiveRounds::new();
        assert!(!rounds.round_ended(false));
        assert!(rounds.round_ended(true));
        assert!(!rounds.round_ended(true));
        rounds.emptied();
        assert!(!rounds.round_ended(true), "the socket was empty at the end of a lossy round");
        assert!(!rounds.round_ended(false));
        rounds.emptied();
        assert!(rounds.round_ended(true));
    }

    #[test]
    fn unread_packets_are_looked_for_unless_a_thread_has_received() {
        let (mut rounds, now) = (ReceiveRounds::new(), Instant::now());
        rounds.readable(now);
        assert_eq!((rounds.look_due(), rounds.take_look(now)), (Some(now), Some(true)));
        rounds.readable(now);
        rounds.emptied();
        assert_eq!((rounds.take_look(now), rounds.take_look(now)), (Some(false), None));
    }
}
