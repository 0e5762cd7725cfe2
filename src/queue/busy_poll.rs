//! Staying awake between packets that come close together. Pure: knows the times it is handed.

use std::time::{Duration, Instant};

/// Decides whether the stream, having nothing to hand out, is worth looking at again at once, or may sleep.
///
/// To sleep and be woken costs the waiting packet more than to be looked for: on a virtual machine's idle processor some
/// 10 µs. So while packets come on average sooner than the limit after the stream has run dry, it is polled again
/// until one comes or the limit is over.
#[derive(Debug)]
pub(super) struct BusyPoll {
    limit: Duration,
    /// How long the stream was dry, on average of about the last eight times. A long time counts as four limits.
    mean: Duration,
    dry_since: Option<Instant>,
}

/// At a pause of this length between packets nothing is gained by taking several at once.
const TRICKLE: Duration = Duration::from_micros(100);

impl BusyPoll {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, mean: Duration::MAX, dry_since: None }
    }

    /// The stream is dry; tells whether to look again rather than sleep.
    pub(super) fn dry(&mut self, now: Instant) -> bool {
        let since = *self.dry_since.get_or_insert(now);
        // Whether packets come close enough together, and whether there is hope yet.
        self.mean < self.limit && now.saturating_duration_since(since) < self.limit
    }

    /// Whether the stream has been dry for so long that traffic is a trickle.
    pub(super) fn is_long_dry(&self, now: Instant) -> bool {
        self.dry_since.is_some_and(|since| now.saturating_duration_since(since) >= TRICKLE)
    }

    /// Packets have come. Reads the clock where it matters.
    pub(super) fn arrived(&mut self, now: impl FnOnce() -> Instant) {
        if let Some(since) = self.dry_since.take()
            && !self.limit.is_zero()
        {
            let most = self.limit * 4;
            let dry = now().saturating_duration_since(since).min(most);
            self.mean = (self.mean.min(most) * 7 + dry) / 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(20);

    /// Lets packets come after such pauses, and tells after how many of them the stream would have stayed awake.
    fn awake(busy: &mut BusyPoll, now: &mut Instant, pauses: &[u64]) -> usize {
        let awake = pauses.iter().filter(|pause| {
            let awake = busy.dry(*now);
            *now += Duration::from_micros(**pause);
            busy.arrived(|| *now);
            awake
        });
        awake.count()
    }

    #[test]
    fn it_stays_awake_only_where_packets_come_close_together() {
        let (mut busy, mut now) = (BusyPoll::new(LIMIT), Instant::now());
        assert_eq!(awake(&mut busy, &mut now, &[1000; 100]), 0);
        // A few short pauses are no trend yet.
        assert_eq!(awake(&mut busy, &mut now, &[5; 8]), 0);
        assert!(awake(&mut busy, &mut now, &[5; 100]) > 90);
        // One long pause does not end it, several do.
        assert!(awake(&mut busy, &mut now, &[1_000_000, 5, 5, 5]) >= 3);
        assert!(awake(&mut busy, &mut now, &[1000; 100]) < 5);
    }

    #[test]
    fn it_gives_up_when_the_limit_is_over() {
        let (mut busy, mut now) = (BusyPoll::new(LIMIT), Instant::now());
        awake(&mut busy, &mut now, &[1; 100]);
        assert!(busy.dry(now));
        assert!(busy.dry(now + LIMIT / 2));
        assert!(!busy.dry(now + LIMIT));
    }

    #[test]
    fn a_trickle_is_told_by_the_pause_alone() {
        let (mut busy, start) = (BusyPoll::new(LIMIT), Instant::now());
        assert!(!busy.is_long_dry(start));
        busy.dry(start);
        assert!(!busy.is_long_dry(start + TRICKLE / 2));
        assert!(busy.is_long_dry(start + TRICKLE));
        busy.arrived(|| start + TRICKLE);
        assert!(!busy.is_long_dry(start + 2 * TRICKLE));
    }

    #[test]
    fn a_limit_of_zero_turns_it_off() {
        let (mut busy, mut now) = (BusyPoll::new(Duration::ZERO), Instant::now());
        assert_eq!(awake(&mut busy, &mut now, &[0; 100]), 0);
    }
}
