//! When packets arrived, approximately, and when their deadlines are. Packets have no timestamps:
//! those that arrived close together share an entry.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

#[derive(Debug)]
pub(super) struct Arrivals {
    /// The first id of a round of receiving, and the time. Both increase.
    entries: VecDeque<(u32, Instant)>,
    /// `None` if packets have no deadline.
    deadlines: Option<Deadlines>,
}

/// At this number of entries every second one is removed. The remaining ones give an age to within
/// 1/64.
const MOST_ARRIVALS: usize = 128;

impl Arrivals {
    /// With the deadline of each packet, after its arrival.
    pub(super) fn new(deadline: Option<Duration>) -> Self {
        Self { entries: VecDeque::new(), deadlines: deadline.map(Deadlines::new) }
    }

    /// Packets with ids from `first` to `last` have arrived now, after all earlier ones. Ids before
    /// `oldest` are not needed any more.
    pub(super) fn arrived(&mut self, first: u32, last: u32, oldest: u32, now: Instant) {
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
        if let Some(deadlines) = &mut self.deadlines {
            deadlines.arrived(first, last, now);
        }
    }

    /// When the next deadline is reached.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.as_ref()?.next()
    }

    /// Removes the next packets whose deadline has been reached; returns their first and last id.
    pub(super) fn take_expired(&mut self, now: Instant) -> Option<(u32, u32)> {
        self.deadlines.as_mut()?.due(now)
    }

    /// How long ago the packet `id` arrived.
    pub(super) fn age(&self, id: u32, now: Instant) -> Option<Duration> {
        let before = |(first, _): &&(u32, Instant)| first.wrapping_sub(id) as i32 <= 0;
        self.entries.iter().rev().find(before).map(|(_, at)| now.saturating_duration_since(*at))
    }

    /// How long the packet of an id has waited. Of one that is older than what is stored, at least.
    pub(super) fn waited(&self, now: Instant) -> impl FnMut(u32) -> Duration {
        // Ids near each other are of the same round: its first id, the number of its ids, its age.
        let mut round = (0, 0, Duration::ZERO);
        move |id| {
            let (first, count, age) = round;
            if id.wrapping_sub(first) < count {
                return age;
            }
            let mut next = None;
            for (first, at) in self.entries.iter().rev() {
                if first.wrapping_sub(id) as i32 <= 0 {
                    let count = next.map_or(1 << 31, |next: u32| next.wrapping_sub(*first));
                    round = (*first, count, now.saturating_duration_since(*at));
                    return round.2;
                }
                next = Some(*first);
            }
            self.entries.front().map(|(_, at)| now.saturating_duration_since(*at)).unwrap_or_default()
        }
    }

    /// The first id of each round of receiving, oldest first, as far as they are stored.
    pub(super) fn rounds(&self) -> impl Iterator<Item = u32> {
        self.entries.iter().map(|(first, _)| *first)
    }
}

/// Deadlines of packets. Packets that arrived close together share an entry, so that a deadline of
/// seconds does not need thousands of entries. Because of that a packet is decided up to 1/64 of
/// the deadline late.
#[derive(Debug)]
struct Deadlines {
    /// How long after its arrival a packet is decided.
    after: Duration,
    entries: VecDeque<DeadlineEntry>,
}

/// All ids from the first to the last, including those that never arrived.
#[derive(Debug)]
struct DeadlineEntry {
    first: u32,
    last: u32,
    opened: Instant,
    /// `None` if the time is beyond the range of the clock.
    at: Option<Instant>,
}

impl Deadlines {
    fn new(after: Duration) -> Self {
        Self { after, entries: VecDeque::new() }
    }

    fn arrived(&mut self, first: u32, last: u32, now: Instant) {
        let at = now.checked_add(self.after);
        match self.entries.back_mut() {
            Some(entry) if now.saturating_duration_since(entry.opened) < self.after / 64 => {
                entry.last = last;
                entry.at = at;
            }
            _ => self.entries.push_back(DeadlineEntry { first, last, opened: now, at }),
        }
    }

    fn next(&self) -> Option<Instant> {
        self.entries.front()?.at
    }

    fn due(&mut self, now: Instant) -> Option<(u32, u32)> {
        if self.next()? > now {
            return None;
        }
        self.entries.pop_front().map(|entry| (entry.first, entry.last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_expire_when_due_and_not_before() {
        let start = Instant::now();
        let after = Duration::from_millis(640);
        let mut deadlines = Deadlines::new(after);
        for id in 0..100 {
            // With gaps: every second id never arrives.
            deadlines.arrived(2 * id, 2 * id, start + Duration::from_millis(id.into()));
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
        let mut deadlines = Deadlines::new(Duration::MAX);
        deadlines.arrived(1, 5, Instant::now());
        assert!(deadlines.next().is_none());
        assert!(deadlines.due(Instant::now()).is_none());
    }

    #[test]
    fn each_packet_has_waited_since_its_round_in_any_order() {
        let start = Instant::now();
        let mut arrivals = Arrivals::new(None);
        let base = u32::MAX - 25;
        for round in 0..5u32 {
            let first = base.wrapping_add(10 * round);
            arrivals.arrived(first, first.wrapping_add(9), base, start + Duration::from_millis(round.into()));
        }
        let now = start + Duration::from_millis(10);
        let mut waited = arrivals.waited(now);
        for turn in 0..200 {
            let id = turn * 7 % 50;
            let expected = Duration::from_millis(10 - u64::from(id) / 10);
            assert_eq!(waited(base.wrapping_add(id)), expected, "{id}");
            // An older packet waits at least as long as the oldest round.
            assert_eq!(waited(base.wrapping_sub(1 + id)), Duration::from_millis(10));
        }
    }

    #[test]
    fn arrivals_stay_few_and_remember_the_oldest() {
        let start = Instant::now();
        let mut arrivals = Arrivals::new(None);
        for id in 1..10_000u32 {
            arrivals.arrived(id, id, 1, start + Duration::from_nanos(id.into()));
        }
        assert!(arrivals.entries.len() <= MOST_ARRIVALS);
        assert_eq!(arrivals.entries[0].0, 1);
        arrivals.arrived(10_000, 10_000, 9_999, start);
        assert!(arrivals.entries.len() <= 2);
        assert!(arrivals.age(10_000, start).is_some());
    }
}
