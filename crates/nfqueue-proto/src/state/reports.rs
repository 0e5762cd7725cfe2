//! Which events are logged, and how often.

use std::time::{Duration, Instant};

/// The kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportKind {
    /// Packets were lost because the receive buffer was full; reported once for each episode.
    Lost,
    /// The owners of packets dropped them, and they got the default action.
    Unanswered,
    /// Packets were decided by their deadline.
    Expired,
    /// Verdicts were submitted for packets that had already been decided.
    Late,
    /// The kernel dropped packets while they were queued.
    Dropped,
    /// The kernel refused verdicts.
    Refused,
    /// Messages from the kernel could not be parsed.
    Malformed,
    /// A send failed; it is tried again.
    Unsent,
    /// The capability is missing.
    CapabilityMissing,
    /// A custom policy has panicked.
    PolicyPanicked,
    /// The queue cannot be used any more.
    Failed,
}

const KINDS: usize = 11;

/// A log event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// What has happened.
    pub kind: ReportKind,
    /// Packets, verdicts or messages since the last report of this kind.
    pub count: u64,
    /// The first packet's id, if it concerns packets.
    pub packet: Option<u32>,
}

/// The shortest time between two reports of one kind.
const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Reports {
    entries: [Entry; KINDS],
}

#[derive(Debug, Default, Clone, Copy)]
struct Entry {
    kind: Option<ReportKind>,
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
    /// Counts an event. Returns a report if it is time for one; otherwise the event is part of the
    /// next report.
    pub(super) fn note(&mut self, kind: ReportKind, count: u64, packet: Option<u32>, now: Instant) -> Option<Report> {
        let entry = &mut self.entries[kind as usize];
        entry.kind = Some(kind);
        entry.count += count;
        entry.packet = entry.packet.or(packet);
        if entry.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            return None;
        }
        entry.take(now)
    }

    /// When the next report is due.
    pub(super) fn pending(&self) -> Option<Instant> {
        let waiting = self.entries.iter().filter(|entry| entry.count > 0);
        waiting.filter_map(|entry| entry.last).min().map(|last| last + INTERVAL)
    }

    /// The reports that are due.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Report> {
        let late = |entry: &&mut Entry| {
            entry.count > 0 && entry.last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL)
        };
        self.entries.iter_mut().filter(late).filter_map(|entry| entry.take(now)).collect()
    }

    /// The remaining reports, at the end.
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
        let first = reports.note(ReportKind::Refused, 1, Some(5), start).unwrap();
        assert_eq!(first, Report { kind: ReportKind::Refused, count: 1, packet: Some(5) });
        for id in 6..100 {
            assert_eq!(reports.note(ReportKind::Refused, 1, Some(id), start), None);
        }
        // Another kind has its own interval.
        assert!(reports.note(ReportKind::Late, 1, None, start).is_some());
        assert_eq!(reports.pending(), Some(start + INTERVAL));
        assert_eq!(reports.due(start), []);
        let rest = Report { kind: ReportKind::Refused, count: 94, packet: Some(6) };
        assert_eq!(reports.due(start + INTERVAL), [rest]);
        assert_eq!(reports.pending(), None);
        assert_eq!(reports.rest(start + INTERVAL), []);
    }
}
