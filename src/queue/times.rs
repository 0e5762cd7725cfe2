//! When packets came. Packets are not stamped one by one: those that came close together share an entry.

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

#[derive(Debug)]
struct DeadlineEntry {
    first: u32,
    count: u32,
    opened: Instant,
    at: Instant,
}

impl Deadlines {
    /// `count` packets with consecutive ids from `first` on have arrived.
    pub(super) fn arrived(&mut self, first: u32, count: u32, now: Instant, after: Duration) {
        match self.entries.back_mut() {
            Some(last) if last.first.wrapping_add(last.count) == first && now - last.opened < after / 64 => {
                last.count += count;
                last.at = now + after;
            }
            _ => self.entries.push_back(DeadlineEntry { first, count, opened: now, at: now + after }),
        }
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.entries.front().map(|entry| entry.at)
    }

    /// The ids whose time has come, removed.
    pub(super) fn due(&mut self, now: Instant) -> Option<impl Iterator<Item = u32> + use<>> {
        if self.next()? > now {
            return None;
        }
        let entry = self.entries.pop_front()?;
        Some((0..entry.count).map(move |offset| entry.first.wrapping_add(offset)))
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
    pub(super) fn age(&self, id: u32) -> Option<Duration> {
        let before = |(first, _): &&(u32, Instant)| first.wrapping_sub(id) as i32 <= 0;
        self.entries.iter().rev().find(before).map(|(_, at)| at.elapsed())
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
            deadlines.arrived(id, 1, start + Duration::from_millis(id.into()), after);
        }
        // 100 ms in pieces of 10 ms: a handful of entries, not a hundred.
        assert!(deadlines.entries.len() <= 11);
        assert!(deadlines.due(start + Duration::from_millis(639)).is_none());
        let mut answered = Vec::new();
        while let Some(ids) = deadlines.due(start + Duration::from_millis(800)) {
            answered.extend(ids);
        }
        assert_eq!(answered, (0..100).collect::<Vec<_>>());
        assert!(deadlines.next().is_none());
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
        assert!(arrivals.age(10_000).is_some());
    }
}
