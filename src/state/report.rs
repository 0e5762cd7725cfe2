//! What is worth a line in a log, and how often.

use std::time::{Duration, Instant};

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Packets were lost to a full receive buffer; told once for each episode.
    Lost,
    /// Packets were dropped by whoever held them, and got the default action.
    Unanswered,
    /// Packets got the action of their deadline.
    Expired,
    /// Verdicts came for packets that had been answered for.
    Late,
    /// The kernel refused verdicts.
    Refused,
    /// Messages of the kernel's could not be understood.
    Malformed,
    /// A send failed and is repeated.
    Unsent,
    /// The capability is missing.
    CapabilityMissing,
    /// The user's policy has panicked.
    PolicyPanicked,
    /// The queue is of no more use.
    Failed,
}

const KINDS: usize = 10;

/// A line for a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) kind: Kind,
    /// Of packets, verdicts or messages since the last report of this kind.
    pub(crate) count: u64,
    /// The first of them, where it concerns a packet.
    pub(crate) packet: Option<u32>,
}

/// One report of a kind in this time, with the number of what it sums up.
const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Reports {
    entries: [Entry; KINDS],
}

#[derive(Debug, Default, Clone, Copy)]
struct Entry {
    kind: Option<Kind>,
    count: u64,
    packet: Option<u32>,
    last: Option<Instant>,
}

impl Entry {
    fn take(&mut self, now: Instant) -> Option<Report> {
        let report = Report { kind: self.kind?, count: self.count, packet: self.packet.take() };
        (self.count, self.last) = (0, Some(now));
        Some(report)
    }
}

impl Reports {
    /// Something has happened. Gives a report if it is time for one; otherwise it is summed up with what follows.
    pub(super) fn note(&mut self, kind: Kind, count: u64, packet: Option<u32>, now: Instant) -> Option<Report> {
        let entry = &mut self.entries[kind as usize];
        entry.kind = Some(kind);
        entry.count += count;
        entry.packet = entry.packet.or(packet);
        if entry.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            return None;
        }
        entry.take(now)
    }

    /// When the next of what is summed up can be told.
    pub(super) fn pending(&self) -> Option<Instant> {
        let waiting = self.entries.iter().filter(|entry| entry.count > 0);
        waiting.filter_map(|entry| entry.last).min().map(|last| last + INTERVAL)
    }

    /// What is to be told by now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Report> {
        let late = |entry: &&mut Entry| {
            entry.count > 0 && entry.last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL)
        };
        self.entries.iter_mut().filter(late).filter_map(|entry| entry.take(now)).collect()
    }

    /// All that is left, at the end.
    pub(super) fn rest(&mut self, now: Instant) -> Vec<Report> {
        self.entries.iter_mut().filter(|entry| entry.count > 0).filter_map(|entry| entry.take(now)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_one_report_in_an_interval() {
        let (mut reports, start) = (Reports::default(), Instant::now());
        let first = reports.note(Kind::Refused, 1, Some(5), start).unwrap();
        assert_eq!(first, Report { kind: Kind::Refused, count: 1, packet: Some(5) });
        for id in 6..100 {
            assert_eq!(reports.note(Kind::Refused, 1, Some(id), start), None);
        }
        // Another kind has its own interval.
        assert!(reports.note(Kind::Late, 1, None, start).is_some());
        assert_eq!(reports.pending(), Some(start + INTERVAL));
        assert_eq!(reports.due(start), []);
        let rest = Report { kind: Kind::Refused, count: 94, packet: Some(6) };
        assert_eq!(reports.due(start + INTERVAL), [rest]);
        assert_eq!(reports.pending(), None);
        assert_eq!(reports.rest(start + INTERVAL), []);
    }
}
