//! When packets came, and when they are answered for. Packets are not stamped one by one: those that came close together
//! share an entry.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// When which packets are answered for. Packets that came close together share an entry, so that a deadline of seconds
/// does not keep an entry for each of thousands of receives; an answer comes up to a 64th of the deadline late for it.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    entries: VecDeque<DeadlineEntry>,
}

/// All ids from the first to the last, those that never came among them.
#[derive(Debug)]
struct DeadlineEntry {
    first: u32,
    last: u32,
    opened: Instant,
    /// `None` if the time is too far for the clock.
    at: Option<Instant>,
}

impl Deadlines {
    /// Packets with ids from `first` to `last` have arrived, behind all before.
    pub(super) fn arrived(&mut self, first: u32, last: u32, now: Instant, after: Duration) {
        let at = now.checked_add(after);
        match self.entries.back_mut() {
            Some(entry) if now.saturating_duration_since(entry.opened) < after / 64 => {
                entry.last = last;
                entry.at = at;
            }
            _ => self.entries.push_back(DeadlineEntry { first, last, opened: now, at }),
        }
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.entries.front()?.at
    }

    /// The first and last id of packets whose time has come, removed.
    pub(super) fn due(&mut self, now: Instant) -> Option<(u32, u32)> {
        if self.next()? > now {
            return None;
        }
        self.entries.pop_front().map(|entry| (entry.first, entry.last))
    }
}

/// When the packets in flight came, coarsely.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// The first id of a round of receiving, and its time. In the order of both.
    entries: VecDeque<(u32, Instant)>,
}

/// When there are so many entries, every second one goes. What is left tells an age to within a 64th.
const MOST_ARRIVALS: usize = 128;

impl Arrivals {
    /// Packets from `first` on came now. Nothing before `oldest` is of interest any more.
    pub(super) fn arrived(&mut self, first: u32, oldest: u32, now: Instant) {
        while self.entries.get(1).is_some_and(|(second, _)| second.wrapping_sub(oldest) as i32 <= 0) {
            self.entries.pop_front();
        }
        if self.entries.len() >= MOST_ARRIVALS {
            let mut keep = false;
            self.entries.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.entries.push_back((first, now));
    }

    /// How long ago the packet `id` came.
    pub(super) fn age(&self, id: u32, now: Instant) -> Option<Duration> {
        let before = |(first, _): &&(u32, Instant)| first.wrapping_sub(id) as i32 <= 0;
        self.entries.iter().rev().find(before).map(|(_, at)| now.saturating_duration_since(*at))
    }

    /// The first id of each round of receiving, oldest first, as far as they are remembered.
    pub(super) fn rounds(&self) -> impl Iterator<Item = u32> {
        self.entries.iter().map(|(first, _)| *first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_when_due_and_not_before() {
        let start = Instant::now();
        let after = Duration::from_millis(640);
        let mut deadlines = Deadlines::default();
        for id in 0..100 {
            // With gaps: every second id never comes.
            deadlines.arrived(2 * id, 2 * id, start + Duration::from_millis(id.into()), after);
        }
        // 100 ms in pieces of 10 ms: a handful of entries, not a hundred.
        assert!(deadlines.entries.len() <= 11);
        assert!(deadlines.due(start + Duration::from_millis(639)).is_none());
        let mut answered = Vec::new();
        while let Some((first, last)) = deadlines.due(start + Duration::from_millis(800)) {
            answered.extend((first..=last).filter(|id| id % 2 == 0));
        }
        assert_eq!(answered, (0..100).map(|id| 2 * id).collect::<Vec<_>>());
        assert!(deadlines.next().is_none());
    }

    #[test]
    fn a_deadline_beyond_the_clock_never_comes() {
        let mut deadlines = Deadlines::default();
        deadlines.arrived(1, 5, Instant::now(), Duration::MAX);
        assert!(deadlines.next().is_none());
        assert!(deadlines.due(Instant::now()).is_none());
    }

    #[test]
    fn arrivals_stay_few_and_remember_the_oldest() {
        let start = Instant::now();
        let mut arrivals = Arrivals::default();
        for id in 1..10_000u32 {
            arrivals.arrived(id, 1, start + Duration::from_nanos(id.into()));
        }
        assert!(arrivals.entries.len() <= MOST_ARRIVALS);
        assert_eq!(arrivals.entries[0].0, 1);
        arrivals.arrived(10_000, 9_999, start);
        assert!(arrivals.entries.len() <= 2);
        assert!(arrivals.age(10_000, start).is_some());
    }
}
