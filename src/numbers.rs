//! The numbers of a queue.

use std::{
    fmt,
    ops::{Range, RangeInclusive},
};

/// Which numbers to bind: see [`Queue::builder`](crate::Queue::builder).
///
/// | value | numbers |
/// |---|---|
/// | `7` | this one |
/// | `0..4`, `0..=3` | these, as a rule with `queue num 0-3` (queue-balance) feeds them |
/// | [`Queue::ANY`](crate::Queue::ANY) | the first that no socket has bound |
/// | [`Queue::any(4)`](crate::Queue::any) | the first four in a row that no socket has bound |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueNumbers(Numbers);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Numbers {
    Of { first: u16, count: u32 },
    Any { count: u32 },
}

/// How many numbers there are.
const ALL: u32 = 1 << 16;

impl QueueNumbers {
    /// Free numbers in a row.
    pub(crate) const fn any(count: u16) -> Self {
        Self(Numbers::Any { count: count as u32 })
    }

    /// The ranges to try, in turn.
    pub(crate) fn candidates(&self) -> Candidates {
        match self.0 {
            Numbers::Of { first, count } => Candidates { first: first.into(), count, any: false },
            Numbers::Any { count } => Candidates { first: 0, count, any: true },
        }
    }

    /// Whether there is such a range.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        match self.0 {
            Numbers::Of { count: 0, .. } => Err("the range is empty"),
            Numbers::Any { count: 0 } => Err("no queue is wanted"),
            _ => Ok(()),
        }
    }

    /// The numbers, as far as they are known before they are bound.
    pub(crate) fn known(&self) -> impl Iterator<Item = u16> + use<> {
        let known = (!self.is_any()).then(|| self.candidates().numbers());
        known.into_iter().flatten()
    }

    /// Whether any free numbers will do.
    pub(crate) fn is_any(&self) -> bool {
        matches!(self.0, Numbers::Any { .. })
    }
}

/// For messages: "queue 3", "queues 0 to 3", "a free queue".
impl fmt::Display for QueueNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Numbers::Of { first, count: 1 } => write!(f, "queue {first}"),
            Numbers::Of { first, count: 0 } => write!(f, "no queue from {first}"),
            Numbers::Of { first, count } => write!(f, "queues {first} to {}", u32::from(first) + count - 1),
            Numbers::Any { count: 1 } => f.write_str("a free queue"),
            Numbers::Any { count } => write!(f, "{count} free queues in a row"),
        }
    }
}

impl From<u16> for QueueNumbers {
    fn from(number: u16) -> Self {
        Self(Numbers::Of { first: number, count: 1 })
    }
}

impl From<Range<u16>> for QueueNumbers {
    fn from(range: Range<u16>) -> Self {
        Self(Numbers::Of { first: range.start, count: u32::from(range.end.saturating_sub(range.start)) })
    }
}

impl From<RangeInclusive<u16>> for QueueNumbers {
    fn from(range: RangeInclusive<u16>) -> Self {
        let (first, last) = (*range.start(), *range.end());
        let count = if range.is_empty() { 0 } else { u32::from(last) - u32::from(first) + 1 };
        Self(Numbers::Of { first, count })
    }
}

/// Ranges of numbers to try: one, or one after the other until all of a range will do.
#[derive(Debug, Clone)]
pub(crate) struct Candidates {
    first: u32,
    count: u32,
    any: bool,
}

impl Candidates {
    /// The numbers to try now.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u16> + use<> {
        (self.first..self.first + self.count).map(|number| number as u16)
    }

    /// The first and the last of them.
    pub(crate) fn range(&self) -> RangeInclusive<u16> {
        self.first as u16..=(self.first + self.count - 1) as u16
    }

    /// This number will not do. `None` if there is nothing else to try.
    #[must_use]
    pub(crate) fn skip(&mut self, number: u16) -> Option<()> {
        self.first = u32::from(number) + 1;
        (self.any && self.first + self.count <= ALL).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(of: impl Into<QueueNumbers>) -> Vec<u16> {
        of.into().candidates().numbers().collect()
    }

    #[test]
    fn numbers_ranges_and_counts_name_queues() {
        assert_eq!(numbers(7), [7]);
        assert_eq!(numbers(0..3), [0, 1, 2]);
        assert_eq!(numbers(65_534..=65_535), [65_534, 65_535]);
        assert_eq!(numbers(0..=u16::MAX).len(), 65_536);
        assert_eq!(numbers(QueueNumbers::any(2)), [0, 1]);
        assert_eq!(numbers(QueueNumbers::any(1)), [0]);
        #[expect(clippy::reversed_empty_ranges, reason = "it is to be refused")]
        for empty in [QueueNumbers::from(3..3), (3..=2).into(), QueueNumbers::any(0)] {
            assert!(empty.check().is_err(), "{empty}");
        }
    }

    #[test]
    fn a_bound_number_is_skipped() {
        let mut candidates = QueueNumbers::any(3).candidates();
        candidates.skip(1).unwrap();
        assert_eq!(candidates.range(), 2..=4);
        candidates.skip(65_532).unwrap();
        assert_eq!(candidates.range(), 65_533..=65_535);
        assert_eq!(candidates.skip(65_533), None);
    }

    #[test]
    fn no_number_is_skipped_if_only_these_will_do() {
        assert_eq!(QueueNumbers::from(0..4).candidates().skip(0), None);
    }
}
