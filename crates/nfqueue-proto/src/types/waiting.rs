//! How long packets have waited for their verdicts.

use std::{fmt, ops::Sub, time::Duration};

use super::Action;

/// How long packets waited in this process, from the receiving to the sending of their verdict:
/// [`Stats::waited`](super::Stats::waited). By the action of the verdict.
///
/// A verdict is counted when it has been sent. One that the kernel refuses later, or for which it
/// finds no packet, stays counted, and is counted again if it is sent again: these numbers never
/// fall. Packets are received together and verdicts sent together, so each is timed by its
/// receiving and its sending, to within a 64th.
///
/// The time that a packet has waited in the kernel before is not contained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Waited {
    /// Accepted or stopped.
    pub accepted: Histogram,
    /// Dropped.
    pub dropped: Histogram,
    /// Sent through the hook again.
    pub repeated: Histogram,
    /// Sent to another queue.
    pub requeued: Histogram,
}

impl Waited {
    /// Those of all actions as one.
    pub fn all(&self) -> Histogram {
        self.by_action().into_iter().fold(Histogram::default(), |sum, (_, one)| sum.and(one))
    }

    /// Each with the name of its action.
    pub fn by_action(&self) -> [(&'static str, Histogram); 4] {
        let Self { accepted, dropped, repeated, requeued } = *self;
        [("accept", accepted), ("drop", dropped), ("repeat", repeated), ("requeue", requeued)]
    }

    /// Numbers of packets that have waited for a time before a verdict.
    #[doc(hidden)]
    pub fn record(&mut self, packets: impl Iterator<Item = (Action, Duration, u64)>) {
        // Neighbours are mostly equal, and the search for a bucket costs more than the comparison.
        let (mut action, mut time, mut count) = (Action::Accept, Duration::ZERO, 0);
        for (next_action, next_time, packets) in packets {
            if (next_action, next_time) != (action, time) {
                self.record_one(action, time, std::mem::take(&mut count));
                (action, time) = (next_action, next_time);
            }
            count += packets;
        }
        self.record_one(action, time, count);
    }

    fn record_one(&mut self, action: Action, waited: Duration, packets: u64) {
        if packets == 0 {
            return;
        }
        let histogram = match action {
            Action::Drop => &mut self.dropped,
            Action::Repeat => &mut self.repeated,
            Action::Requeue { .. } => &mut self.requeued,
            Action::Accept | Action::Stop => &mut self.accepted,
        };
        histogram.record(waited, packets);
    }

    pub(super) fn and(&self, other: &Self) -> Self {
        Self {
            accepted: self.accepted.and(other.accepted),
            dropped: self.dropped.and(other.dropped),
            repeated: self.repeated.and(other.repeated),
            requeued: self.requeued.and(other.requeued),
        }
    }
}

impl Sub for Waited {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            accepted: self.accepted - earlier.accepted,
            dropped: self.dropped - earlier.dropped,
            repeated: self.repeated - earlier.repeated,
            requeued: self.requeued - earlier.requeued,
        }
    }
}

/// Times in buckets that grow: 1, 1.5, 2, 3, 4, 6, 8 µs and so on to 36 minutes, and one for longer
/// times. It has a fixed size of about 0.5 KiB.
///
/// `later - earlier` has the times in between. Its [`max`](Self::max) is that of `later`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    nanoseconds: u128,
    max: Duration,
}

const BUCKETS: usize = 64;

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, nanoseconds: 0, max: Duration::ZERO }
    }
}

impl Histogram {
    /// How many times.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their sum.
    pub fn sum(&self) -> Duration {
        let seconds = u64::try_from(self.nanoseconds / 1_000_000_000).unwrap_or(u64::MAX);
        Duration::new(seconds, (self.nanoseconds % 1_000_000_000) as u32)
    }

    /// The longest one; zero if there is none.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// A time that this part of all times does not exceed: `0.5` for the median. It is the upper
    /// end of a bucket: at most 1.5 times too long, or 1 µs. `None` if there is no time.
    ///
    /// # Panics
    ///
    /// If the part is not between 0 and 1.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        assert!((0.0..=1.0).contains(&part), "a quantile is between 0 and 1, not {part}");
        if self.count == 0 {
            return None;
        }
        let wanted = ((self.count as f64 * part).ceil() as u64).clamp(1, self.count);
        let mut below = 0;
        let bucket = self.buckets.iter().position(|count| {
            below += count;
            below >= wanted
        });
        Some(bucket.and_then(upper_end).map_or(self.max, |end| end.min(self.max)))
    }

    /// The buckets in order: the longest time that belongs to each, and how many times it has.
    /// `None`: any longer time.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + use<> {
        self.buckets.into_iter().enumerate().map(|(index, count)| (upper_end(index), count))
    }

    fn record(&mut self, time: Duration, times: u64) {
        self.buckets[bucket(time)] += times;
        self.count += times;
        self.nanoseconds += time.as_nanos() * u128::from(times);
        self.max = self.max.max(time);
    }

    fn and(mut self, other: Self) -> Self {
        for (count, more) in self.buckets.iter_mut().zip(other.buckets) {
            *count += more;
        }
        self.count += other.count;
        self.nanoseconds += other.nanoseconds;
        self.max = self.max.max(other.max);
        self
    }
}

/// Saturates at zero.
impl Sub for Histogram {
    type Output = Self;

    fn sub(mut self, earlier: Self) -> Self {
        for (count, less) in self.buckets.iter_mut().zip(earlier.buckets) {
            *count = count.saturating_sub(less);
        }
        self.count = self.count.saturating_sub(earlier.count);
        self.nanoseconds = self.nanoseconds.saturating_sub(earlier.nanoseconds);
        self
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count)
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("max", &self.max)
            .finish()
    }
}

/// The bucket of a time. The ends of the buckets in units of 0.5 µs are 2, 3, 4, 6, 8, 12: powers
/// of two, and what is in the middle of two.
fn bucket(time: Duration) -> usize {
    let units = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).div_ceil(500);
    if units <= 2 {
        return 0;
    }
    let below = units - 1;
    let exponent = below.ilog2() as usize;
    let upper_half = (below >> (exponent - 1)) & 1;
    (2 * exponent - 1 + upper_half as usize).min(BUCKETS - 1)
}

fn upper_end(bucket: usize) -> Option<Duration> {
    let units = if bucket % 2 == 0 { 2_u64 << (bucket / 2) } else { 3_u64 << (bucket / 2) };
    (bucket < BUCKETS - 1).then(|| Duration::from_nanos(units * 500))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_the_first_bucket_that_reaches_it() {
        for nanoseconds in
            (0..200_000).chain((1..44).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + 1]))
        {
            let time = Duration::from_nanos(nanoseconds);
            let index = bucket(time);
            assert!(upper_end(index).is_none_or(|end| time <= end), "{time:?} in {index}");
            assert!(index == 0 || upper_end(index - 1).unwrap() < time, "{time:?} in {index}");
        }
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
        assert_eq!(upper_end(BUCKETS - 2), Some(Duration::from_micros(1 << 31)));
    }

    #[test]
    fn a_quantile_is_no_shorter_than_its_part_of_the_times() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.quantile(0.5), histogram.max()), (None, Duration::ZERO));
        for microseconds in 1..=1000 {
            histogram.record(Duration::from_micros(microseconds), 2);
        }
        assert_eq!((histogram.count(), histogram.max()), (2000, Duration::from_millis(1)));
        assert_eq!(histogram.sum(), Duration::from_micros(1_001_000));
        for (part, exact) in [(0.0, 1), (0.5, 500), (0.99, 990), (1.0, 1000)] {
            let time = histogram.quantile(part).unwrap().as_micros();
            assert!((exact..=exact * 3 / 2).contains(&time), "{part}: {time}");
        }
        assert_eq!(histogram.buckets().map(|(_, count)| count).sum::<u64>(), 2000);
    }

    #[test]
    fn a_difference_has_what_came_later() {
        let mut earlier = Waited::default();
        let (short, long) = (Duration::from_micros(5), Duration::from_millis(5));
        earlier.record([(Action::Drop, short, 1), (Action::Drop, short, 2)].into_iter());
        assert_eq!((earlier.dropped.count(), earlier.all().count()), (3, 3));
        let mut later = earlier;
        later.record([(Action::Drop, long, 1), (Action::Stop, long, 1)].into_iter());
        let since = later - earlier;
        assert_eq!((since.dropped.count(), since.accepted.count(), since.all().count()), (1, 1, 2));
        assert_eq!(since.dropped.sum(), Duration::from_millis(5));
        assert_eq!((earlier - later).all().count(), 0);
    }
}
