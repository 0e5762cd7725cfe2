//! Rules that send packets to queues: what nf_tables and the old iptables say about them. Bytes or
//! text in, values out.

mod legacy;
mod nft;

use std::{fmt, time::Duration};

pub(crate) use self::{legacy::parse as legacy, nft::rule as nft};

/// A rule that sends packets to a queue.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Rule {
    /// `nft`, or the old iptables that has it.
    pub(crate) source: &'static str,
    /// As nft calls it: `inet`, `ip`, `ip6`, `bridge`, `netdev`.
    pub(crate) family: &'static str,
    pub(crate) table: String,
    pub(crate) chain: String,
    /// nft's number of the rule.
    pub(crate) handle: Option<u64>,
    /// The rule as text, of the old iptables.
    pub(crate) text: Option<String>,
    /// The first and the last queue. `None` if the number is computed for each packet (a map, an
    /// expression).
    pub(crate) queues: Option<(u16, u16)>,
    /// Packets are accepted while no program has bound the queue. Otherwise they are dropped.
    pub(crate) bypass: bool,
    /// The queue is chosen by the CPU, not by the packet's addresses.
    pub(crate) fanout: bool,
    pub(crate) counter: Option<Counter>,
    /// Packets a second since the rules were read before.
    pub(crate) rate: Option<f64>,
}

/// What a rule has counted before its packets went to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counter {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Rule {
    pub(crate) fn sends_to(&self, queue: u16) -> bool {
        self.queues.is_some_and(|(first, last)| (first..=last).contains(&queue))
    }

    fn is_same(&self, other: &Self) -> bool {
        self.source == other.source
            && self.family == other.family
            && self.table == other.table
            && self.chain == other.chain
            && self.handle == other.handle
            && self.text == other.text
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.text, self.handle) {
            (Some(text), _) => write!(f, "{} -t {} {text}", self.source, self.table)?,
            (None, Some(handle)) => {
                write!(f, "{} {} {} {} handle {handle}", self.source, self.family, self.table, self.chain)?;
            }
            (None, None) => write!(f, "{} {} {} {}", self.source, self.family, self.table, self.chain)?,
        }
        match self.queues {
            None => f.write_str(", to a computed queue")?,
            Some((first, last)) if first == last => write!(f, ", to {first}")?,
            Some((first, last)) => write!(f, ", to {first}-{last}")?,
        }
        if self.bypass {
            f.write_str(" bypass")?;
        }
        if self.fanout {
            f.write_str(" fanout")?;
        }
        match self.counter {
            Some(counter) => write!(f, ": {} packets, {} bytes", counter.packets, counter.bytes)?,
            None => f.write_str(": no counter")?,
        }
        match self.rate {
            Some(rate) => write!(f, ", {rate:.0}/s"),
            None => Ok(()),
        }
    }
}

/// All that could be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct RuleSet {
    pub(crate) rules: Vec<Rule>,
    /// Nothing was unreadable.
    pub(crate) complete: bool,
    /// When it was read.
    pub(crate) at: Duration,
}

impl RuleSet {
    /// Compares the counters with those of an earlier reading.
    pub(crate) fn set_rates(&mut self, earlier: &Self) {
        let seconds = self.at.saturating_sub(earlier.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let mut rest = earlier.rules.iter();
        for rule in &mut self.rules {
            // Mostly the same rules in the same order.
            let before = match rest.clone().next() {
                Some(before) if before.is_same(rule) => rest.next(),
                _ => earlier.rules.iter().find(|before| before.is_same(rule)),
            };
            if let (Some(now), Some(before)) = (rule.counter, before.and_then(|rule| rule.counter)) {
                // A counter that was reset says nothing.
                rule.rate = now.packets.checked_sub(before.packets).map(|packets| packets as f64 / seconds);
            }
        }
    }

    /// The rules that send to a queue.
    pub(crate) fn to(&self, queue: u16) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(move |rule| rule.sends_to(queue))
    }

    /// Whether a rule computes the queue, so that it may be any.
    pub(crate) fn any_computed(&self) -> bool {
        self.rules.iter().any(|rule| rule.queues.is_none())
    }

    /// The numbers that rules name and that are not `bound` (sorted), as ranges to which the same
    /// rules lead.
    pub(crate) fn unbound(&self, bound: &[u16]) -> Vec<(u16, u16)> {
        // Where something changes: a range begins or has ended.
        let mut borders: Vec<u32> =
            self.rules.iter().filter_map(|rule| rule.queues).flat_map(|(a, b)| [a.into(), u32::from(b) + 1]).collect();
        borders.extend(bound.iter().flat_map(|&queue| [queue.into(), u32::from(queue) + 1]));
        borders.sort_unstable();
        borders.dedup();
        let mut ranges = Vec::new();
        for pair in borders.windows(2) {
            let (Ok(first), Ok(last)) = (u16::try_from(pair[0]), u16::try_from(pair[1] - 1)) else { continue };
            if bound.binary_search(&first).is_err() && self.to(first).next().is_some() {
                ranges.push((first, last));
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(first: u16, last: u16, packets: u64) -> Rule {
        let counter = Some(Counter { packets, bytes: 0 });
        Rule { source: "nft", queues: Some((first, last)), handle: Some(first.into()), counter, ..Rule::default() }
    }

    #[test]
    fn a_range_names_several_queues_and_those_not_bound_are_ranges() {
        let rules = RuleSet { rules: vec![rule(0, 9, 0), rule(8, 12, 0)], ..RuleSet::default() };
        assert_eq!(rules.unbound(&[0, 3, 20]), [(1, 2), (4, 7), (8, 9), (10, 12)]);
        assert_eq!(rules.to(8).count(), 2);
        let all = RuleSet { rules: vec![rule(0, u16::MAX, 0)], ..RuleSet::default() };
        assert_eq!(all.unbound(&[]), [(0, u16::MAX)]);
        assert_eq!(all.unbound(&[u16::MAX]), [(0, u16::MAX - 1)]);
    }

    #[test]
    fn rates_of_rules_come_from_their_counters() {
        let before = RuleSet { rules: vec![rule(0, 0, 10), rule(1, 1, 50)], ..RuleSet::default() };
        let mut now = RuleSet {
            rules: vec![rule(1, 1, 40), rule(2, 2, 9), rule(0, 0, 30)],
            at: Duration::from_secs(2),
            complete: true,
        };
        now.set_rates(&before);
        let rates: Vec<_> = now.rules.iter().map(|rule| rule.rate).collect();
        assert_eq!(rates, [None, None, Some(10.0)], "reset, new, counted");
    }

    #[test]
    fn a_rule_is_described_in_a_line() {
        let mut rule = rule(4, 7, 3);
        (rule.family, rule.table, rule.chain) = ("inet", "filter".into(), "output".into());
        rule.bypass = true;
        assert_eq!(rule.to_string(), "nft inet filter output handle 4, to 4-7 bypass: 3 packets, 0 bytes");
    }
}
