//! Busy polling: whether an empty queue is polled again or the stream sleeps. Pure: the time is
//! handed in.

use std::time::{Duration, Instant};

/// Decides whether an empty stream is polled again at once or sleeps.
///
/// Sleeping and waking up delays the next packet by about 10 µs on an idle CPU of a virtual
/// machine. So while the average time until the next packet is shorter than the limit, the stream
/// is polled until a packet arrives or the limit is over.
#[derive(Debug)]
pub(super) struct BusyPoll {
    limit: Duration,
    /// The average time without packets, over about the last eight times. A long time counts as
    /// four limits.
    mean: Duration,
    empty_since: Option<Instant>,
}

impl BusyPoll {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, mean: Duration::MAX, empty_since: None }
    }

    /// The stream is empty. Returns whether to poll again instead of sleeping. Reads the clock only
    /// if it is needed.
    pub(super) fn empty(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let now = now();
        let since = *self.empty_since.get_or_insert(now);
        // Whether packets follow closely, and the limit is not over.
        self.mean < self.limit && now.saturating_duration_since(since) < self.limit
    }

    /// Packets have been received. Reads the clock only if it is needed.
    pub(super) fn arrived(&mut self, now: impl FnOnce() -> Instant) {
        if let Some(since) = self.empty_since.take() {
            let most = self.limit * 4;
            let pause = now().saturating_duration_since(since).min(most);
            self.mean = (self.mean.min(most) * 7 + pause) / 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(20);

    /// Simulates packets after these pauses; returns after how many of them the stream would have
    /// polled.
    fn awake(busy: &mut BusyPoll, now: &mut Instant, pauses: &[u64]) -> usize {
        let awake = pauses.iter().filter(|pause| {
            let awake = busy.empty(|| *now);
            *now += Duration::from_micros(**pause);
            busy.arrived(|| *now);
            awake
        });
        awake.count()
    }

    #[test]
    fn it_polls_only_while_packets_follow_closely() {
        let (mut busy, mut now) = (BusyPoll::new(LIMIT), Instant::now());
        assert_eq!(awake(&mut busy, &mut now, &[1000; 100]), 0);
        // Some short pauses do not start it.
        assert_eq!(awake(&mut busy, &mut now, &[5; 8]), 0);
        assert!(awake(&mut busy, &mut now, &[5; 100]) > 90);
        // One long pause does not end it, several do.
        assert!(awake(&mut busy, &mut now, &[1_000_000, 5, 5, 5]) >= 3);
        assert!(awake(&mut busy, &mut now, &[1000; 100]) < 5);
    }

    #[test]
    fn it_sleeps_when_the_limit_is_over() {
        let (mut busy, mut now) = (BusyPoll::new(LIMIT), Instant::now());
        awake(&mut busy, &mut now, &[1; 100]);
        assert!(busy.empty(|| now));
        assert!(busy.empty(|| now + LIMIT / 2));
        assert!(!busy.empty(|| now + LIMIT));
    }

    #[test]
    fn a_limit_of_zero_disables_it() {
        let (mut busy, mut now) = (BusyPoll::new(Duration::ZERO), Instant::now());
        assert_eq!(awake(&mut busy, &mut now, &[0; 100]), 0);
    }
}
