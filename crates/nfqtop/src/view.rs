//! Rates, fill and trouble: from two snapshots to what is shown. Time is handed in.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet, VecDeque},
};

use crate::{
    advice::{Advice, STUCK_AFTER, Severity},
    kernel::QueueLine,
    rules::{Rule, RuleSet},
    snapshot::{Holder, Snapshot, Unreadable},
};

/// NFQNL_QMAX_DEFAULT
const DEFAULT_MAX_LENGTH: u32 = 1024;
/// Of its maximum length, in per cent.
const FILLING: u32 = 75;
/// Refreshes that the sparklines show at most.
const SAMPLES: usize = 60;

/// What is shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    pub(crate) unix_time: f64,
    /// Between the two snapshots; `None` after the first one.
    pub(crate) seconds: Option<f64>,
    /// The worst first.
    pub(crate) rows: Vec<Row>,
    /// Rules that belong to no row: they compute the number of the queue, or the queues cannot be
    /// read.
    pub(crate) other_rules: Vec<Rule>,
    pub(crate) unreadable: Vec<Unreadable>,
    pub(crate) queues_readable: bool,
}

/// A queue that is bound, or numbers that are not and to which rules lead.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) first: u16,
    /// The same as `first`, except for numbers that are not bound.
    pub(crate) last: u16,
    pub(crate) bound: Option<Bound>,
    /// `None` if no rules can be read.
    pub(crate) rules: Option<Vec<Rule>>,
    /// The worst first.
    pub(crate) advice: Vec<Advice>,
}

#[derive(Debug, Clone)]
pub(crate) struct Bound {
    pub(crate) line: QueueLine,
    pub(crate) holders: Vec<Holder>,
    /// Bytes in the socket's receive buffer, if known.
    pub(crate) unread: Option<u32>,
    pub(crate) limit: Limit,
    pub(crate) rates: Option<Rates>,
    /// Packets a second of the last refreshes, the newest last.
    pub(crate) rate_samples: VecDeque<u64>,
    pub(crate) length_samples: VecDeque<u64>,
}

/// Packets a second.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Rates {
    /// Those that got an id: all but those that found the queue full.
    pub(crate) arrived: f64,
    /// Those that left the queue: decided, or flushed by the kernel.
    pub(crate) left: f64,
    pub(crate) queue_dropped: f64,
    pub(crate) user_dropped: f64,
}

/// How long a queue may be. The kernel does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Nothing is known: the kernel's default.
    Default,
    /// The length at which packets were refused while none left.
    Seen(u32),
    /// It has been longer than the default.
    AtLeast(u32),
}

impl Limit {
    pub(crate) fn packets(self) -> u32 {
        match self {
            Self::Default => DEFAULT_MAX_LENGTH,
            Self::Seen(packets) | Self::AtLeast(packets) => packets,
        }
    }

    pub(crate) fn source(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Seen(_) => "seen",
            Self::AtLeast(_) => "at_least",
        }
    }
}

impl Bound {
    /// Per cent of the limit.
    pub(crate) fn fill(&self) -> u32 {
        match (self.line.length, self.limit.packets()) {
            (0, 0) => 100,
            (length, limit) => (u64::from(length) * 100 / u64::from(limit.max(1))) as u32,
        }
    }
}

impl Row {
    pub(crate) fn severity(&self) -> Option<Severity> {
        self.advice.first().map(Advice::severity)
    }

    pub(crate) fn label(&self) -> &'static str {
        match self.advice.first() {
            Some(advice) => advice.label(),
            None if self.bound.as_ref().is_some_and(|bound| bound.rates.is_none()) => "...",
            None => "ok",
        }
    }
}

/// What is remembered from one refresh to the next.
#[derive(Debug, Default)]
pub(crate) struct History {
    at: Option<f64>,
    queues: HashMap<u16, Past>,
}

#[derive(Debug)]
struct Past {
    line: QueueLine,
    limit: Limit,
    /// When a packet left it last, or the queue was seen first or empty.
    moved: f64,
    rate_samples: VecDeque<u64>,
    length_samples: VecDeque<u64>,
}

impl History {
    pub(crate) fn update(&mut self, snapshot: &Snapshot) -> View {
        let now = snapshot.at.as_secs_f64();
        let seconds = self.at.map(|at| now - at).filter(|seconds| *seconds > 0.0);
        let lines = snapshot.queues.as_deref().unwrap_or_default();
        let rules = snapshot.rules.as_deref();
        let mut rows: Vec<Row> = lines.iter().map(|line| self.bound(line, snapshot, now, seconds)).collect();
        let mut bound: Vec<u16> = lines.iter().map(|line| line.number).collect();
        bound.sort_unstable();
        let unbound = match rules {
            // Without the queues nothing is known about who has bound them.
            Some(rules) if snapshot.queues.is_some() => rules.unbound(&bound),
            _ => Vec::new(),
        };
        rows.extend(unbound.into_iter().filter_map(|range| unbound_row(range, rules?)));
        rows.sort_by_cached_key(trouble);
        let present: HashSet<u16> = bound.into_iter().collect();
        self.queues.retain(|number, _| present.contains(number));
        self.at = Some(now);
        View {
            unix_time: snapshot.unix_time,
            seconds,
            rows,
            other_rules: other_rules(snapshot),
            unreadable: snapshot.unreadable.clone(),
            queues_readable: snapshot.queues.is_some(),
        }
    }

    fn bound(&mut self, line: &QueueLine, snapshot: &Snapshot, now: f64, seconds: Option<f64>) -> Row {
        let new = || Past {
            line: *line,
            limit: Limit::Default,
            moved: now,
            rate_samples: VecDeque::new(),
            length_samples: VecDeque::new(),
        };
        let past = self.queues.entry(line.number).or_insert_with(new);
        let mut rates = None;
        if let Some(change) = seconds.and_then(|seconds| Change::between(&past.line, line, seconds)) {
            past.record(line, &change, now);
            rates = Some(change.rates);
        } else if past.line.port != line.port || past.line.last_id > line.last_id {
            // Another program has bound it, or the same one again.
            *past = new();
        }
        past.line = *line;
        push(&mut past.length_samples, line.length.into());

        let socket = snapshot.sockets.get(&line.port);
        let bound = Bound {
            line: *line,
            holders: socket.and_then(|socket| snapshot.holders.get(&socket.inode)).cloned().unwrap_or_default(),
            unread: socket.map(|socket| socket.unread),
            limit: past.limit,
            rates,
            rate_samples: past.rate_samples.clone(),
            length_samples: past.length_samples.clone(),
        };
        let rules = snapshot.rules.as_deref();
        let advice = advise(&bound, now - past.moved, rules);
        let rules = rules.map(|rules| rules.to(line.number).cloned().collect());
        Row { first: line.number, last: line.number, bound: Some(bound), rules, advice }
    }
}

fn other_rules(snapshot: &Snapshot) -> Vec<Rule> {
    let all = snapshot.rules.iter().flat_map(|rules| &rules.rules);
    all.filter(|rule| rule.queues.is_none() || snapshot.queues.is_none()).cloned().collect()
}

/// Between two lines of the same queue.
struct Change {
    rates: Rates,
    arrived: u32,
    left: u32,
    queue_dropped: u32,
}

impl Change {
    /// `None` if the queue was bound anew in between.
    fn between(before: &QueueLine, now: &QueueLine, seconds: f64) -> Option<Self> {
        // A counter that moved back by less than half of its range was reset.
        let grown = |before: u32, now: u32| Some(now.wrapping_sub(before)).filter(|grown| *grown <= u32::MAX / 2);
        if before.port != now.port {
            return None;
        }
        let arrived = grown(before.last_id, now.last_id)?;
        let queue_dropped = grown(before.queue_dropped, now.queue_dropped)?;
        let user_dropped = grown(before.user_dropped, now.user_dropped)?;
        // The kernel prints the numbers of a line one after another, while packets come and go.
        let left = grown(before.left(), now.left()).unwrap_or(0);
        let rate = |count: u32| f64::from(count) / seconds;
        let rates = Rates {
            arrived: rate(arrived),
            left: rate(left),
            queue_dropped: rate(queue_dropped),
            user_dropped: rate(user_dropped),
        };
        Some(Self { rates, arrived, left, queue_dropped })
    }
}

impl Past {
    fn record(&mut self, line: &QueueLine, change: &Change, now: f64) {
        push(&mut self.rate_samples, change.rates.arrived.round() as u64);
        // Those that came to an empty queue may have come just now.
        if change.left > 0 || self.line.length == 0 || line.length == 0 {
            self.moved = now;
        }
        let is_full = change.queue_dropped > 0 && change.left == 0 && change.arrived == 0;
        if is_full {
            self.limit = Limit::Seen(line.length);
        } else if line.length > self.limit.packets() {
            self.limit = Limit::AtLeast(line.length);
        }
    }
}

fn push(samples: &mut VecDeque<u64>, sample: u64) {
    samples.push_back(sample);
    if samples.len() > SAMPLES {
        samples.pop_front();
    }
}

/// `idle`: for how long no packet has left the queue while some waited, in seconds.
fn advise(bound: &Bound, idle: f64, rules: Option<&RuleSet>) -> Vec<Advice> {
    let line = &bound.line;
    let mut advice = Vec::new();
    let rates = bound.rates.unwrap_or_default();
    let stuck = line.length > 0 && idle >= STUCK_AFTER;
    let stopped = stuck && bound.holders.first().is_some_and(Holder::is_stopped);
    if stuck {
        let holder = bound.holders.first().cloned();
        advice.push(Advice::Stuck { waiting: line.length, seconds: idle, unread: bound.unread, holder });
    }
    if line.copy == crate::kernel::Copy::None {
        advice.push(Advice::NoCopyMode);
    }
    if rates.queue_dropped > 0.0 {
        advice.push(Advice::Full { rate: rates.queue_dropped, length: line.length, stopped });
    }
    if rates.user_dropped > 0.0 {
        advice.push(Advice::BufferLoss { rate: rates.user_dropped, stopped });
    }
    let (percent, known) = (bound.fill(), !matches!(bound.limit, Limit::AtLeast(_)));
    if percent >= FILLING && known && rates.queue_dropped == 0.0 {
        let assumed = bound.limit == Limit::Default;
        advice.push(Advice::Filling { length: line.length, percent, assumed });
    }
    let (full, buffer) = (line.queue_dropped, line.user_dropped);
    if rates.queue_dropped + rates.user_dropped == 0.0 && (full > 0 || buffer > 0) {
        advice.push(Advice::LostBefore { full, buffer });
    }
    // Packets may also come from a program that has requeued them: then they arrive.
    if let (Some(rules), Some(rates)) = (rules, bound.rates)
        && rates.arrived + rates.queue_dropped == 0.0
        && !rules.any_computed()
        && rules.to(line.number).next().is_none()
    {
        advice.push(Advice::NoRule { incomplete: !rules.complete });
    }
    advice.sort_by_key(Advice::rank);
    advice
}

/// Of numbers that no program has bound.
fn unbound_row((first, last): (u16, u16), rules: &RuleSet) -> Option<Row> {
    let rules: Vec<Rule> = rules.to(first).cloned().collect();
    let rate = |bypass| {
        // What a rule counts goes to all of its queues.
        let mut alone = rules.iter().filter(|rule| rule.bypass == bypass && rule.queues == Some((first, last)));
        let rate: f64 = alone.clone().filter_map(|rule| rule.rate).sum();
        alone.any(|rule| rule.rate.is_some()).then_some(rate)
    };
    let drops = rules.iter().any(|rule| !rule.bypass);
    let advice = if drops { Advice::Unbound { rate: rate(false) } } else { Advice::Bypassed { rate: rate(true) } };
    Some(Row { first, last, bound: None, rules: Some(rules), advice: vec![advice] })
}

/// The worst first; of equal ones the one that loses most, then the longest, then by number.
fn trouble(row: &Row) -> (u8, Reverse<u64>, Reverse<u32>, u16) {
    let Some(rank) = row.advice.first().map(Advice::rank) else {
        // Where nothing is wrong, rows stay in their places.
        return (u8::MAX, Reverse(0), Reverse(0), row.first);
    };
    let lost = match (&row.bound, row.advice.first()) {
        (Some(bound), _) => bound.rates.map_or(0.0, |rates| rates.queue_dropped + rates.user_dropped),
        (None, Some(Advice::Unbound { rate } | Advice::Bypassed { rate })) => rate.unwrap_or(0.0),
        _ => 0.0,
    };
    let length = row.bound.as_ref().map_or(0, |bound| bound.line.length);
    (rank, Reverse(lost as u64), Reverse(length), row.first)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{rc::Rc, time::Duration};

    use super::*;
    use crate::kernel::{Copy, SocketLine};

    pub(crate) fn line(number: u16, length: u32, last_id: u32) -> QueueLine {
        let port = 100 + u32::from(number);
        let (copy, copy_range) = (Copy::Packet, 65_531);
        QueueLine { number, port, length, copy, copy_range, queue_dropped: 0, user_dropped: 0, last_id }
    }

    pub(crate) fn rule(first: u16, last: u16, bypass: bool) -> Rule {
        Rule { source: "nft", queues: Some((first, last)), bypass, ..Rule::default() }
    }

    pub(crate) fn snapshot(seconds: u64, queues: &[QueueLine], rules: Vec<Rule>) -> Snapshot {
        let socket = |line: &QueueLine| {
            (line.port, SocketLine { port: line.port, inode: 1000 + u64::from(line.number), unread: 0 })
        };
        let holder = |line: &QueueLine| {
            let holder = Holder { pid: line.port, name: format!("program{}", line.number), state: None };
            (1000 + u64::from(line.number), vec![holder])
        };
        Snapshot {
            at: Duration::from_secs(seconds),
            queues: Some(queues.to_vec()),
            sockets: queues.iter().map(socket).collect(),
            holders: queues.iter().map(holder).collect(),
            rules: Some(Rc::new(RuleSet { rules, complete: true, at: Duration::ZERO })),
            ..Snapshot::default()
        }
    }

    fn kinds(view: &View) -> Vec<(u16, Vec<&str>)> {
        view.rows.iter().map(|row| (row.first, row.advice.iter().map(Advice::kind).collect())).collect()
    }

    fn all() -> Vec<Rule> {
        vec![rule(0, 9, false)]
    }

    /// Two snapshots, two seconds apart, with a rule to each queue.
    fn view(before: QueueLine, now: QueueLine) -> View {
        let rules = || vec![rule(before.number, before.number, false)];
        let mut history = History::default();
        history.update(&snapshot(0, &[before], rules()));
        history.update(&snapshot(2, &[now], rules()))
    }

    #[test]
    fn rates_are_per_second_and_survive_the_wrap_of_ids() {
        let view = view(line(1, 10, u32::MAX - 4), QueueLine { user_dropped: 2, ..line(1, 5, 15) });
        let rates = view.rows[0].bound.as_ref().unwrap().rates.unwrap();
        let expected = Rates { arrived: 10.0, left: 11.5, queue_dropped: 0.0, user_dropped: 1.0 };
        assert_eq!(rates, expected);
    }

    #[test]
    fn a_queue_that_was_bound_anew_has_no_rates() {
        for now in [line(1, 0, 3), QueueLine { port: 5, ..line(1, 10, 200) }] {
            let view = view(line(1, 10, 100), now);
            assert_eq!(view.rows[0].bound.as_ref().unwrap().rates, None);
            assert_eq!(view.rows[0].advice, []);
        }
    }

    #[test]
    fn a_queue_is_stuck_if_packets_wait_and_none_leaves() {
        assert_eq!(kinds(&view(line(1, 3, 3), line(1, 3, 3))), [(1, vec!["stuck"])]);
        assert_eq!(kinds(&view(line(1, 3, 3), line(1, 5, 5))), [(1, vec!["stuck"])]);
        assert_eq!(kinds(&view(line(1, 3, 3), line(1, 3, 4))), [(1, vec![])], "one has left");
        assert_eq!(kinds(&view(line(1, 0, 3), line(1, 2, 5))), [(1, vec![])], "they have just come");
        // That packets are lost to the buffer decides none of those that wait.
        let lossy = QueueLine { user_dropped: 4, ..line(1, 3, 7) };
        assert_eq!(kinds(&view(line(1, 3, 3), lossy)), [(1, vec!["stuck", "buffer_loss"])]);
    }

    #[test]
    fn a_full_queue_of_a_stopped_process_needs_nothing_but_that_it_continues() {
        let (before, now) = (line(1, 64, 64), QueueLine { queue_dropped: 8, ..line(1, 64, 64) });
        let of_state = |seconds, line, state| {
            let mut snapshot = snapshot(seconds, &[line], all());
            snapshot.holders.values_mut().flatten().for_each(|holder| holder.state = Some(state));
            snapshot
        };
        for (state, is_stopped) in [('S', false), ('T', true)] {
            let mut history = History::default();
            history.update(&of_state(0, before, state));
            let view = history.update(&of_state(2, now, state));
            assert_eq!(view.rows[0].advice[1], Advice::Full { rate: 4.0, length: 64, stopped: is_stopped });
        }
    }

    #[test]
    fn the_worst_is_first() {
        let mut history = History::default();
        let before = [line(0, 0, 0), line(1, 5, 5), line(2, 0, 9), line(3, 100, 300), line(4, 800, 1000)];
        let now = [
            line(0, 0, 10),
            line(1, 5, 5),
            QueueLine { user_dropped: 3, ..line(2, 0, 40) },
            QueueLine { queue_dropped: 7, ..line(3, 100, 500) },
            line(4, 800, 1500),
        ];
        let mut rules = all();
        rules.push(rule(20, 20, true));
        history.update(&snapshot(0, &before, rules.clone()));
        let view = history.update(&snapshot(2, &now, rules));
        let expected = [
            (1, vec!["stuck"]),
            (5, vec!["unbound"]),
            (3, vec!["full"]),
            (2, vec!["buffer_loss"]),
            (4, vec!["filling"]),
            (20, vec!["bypassed"]),
            (0, vec![]),
        ];
        assert_eq!(kinds(&view), expected);
        assert_eq!((view.rows[1].first, view.rows[1].last), (5, 9));
    }

    #[test]
    fn the_maximum_length_is_seen_when_packets_are_refused_and_none_leaves() {
        let full = QueueLine { queue_dropped: 8, ..line(1, 64, 64) };
        let view = view(line(1, 64, 64), full);
        let bound = view.rows[0].bound.as_ref().unwrap();
        assert_eq!((bound.limit, bound.fill()), (Limit::Seen(64), 100));
        assert_eq!(kinds(&view), [(1, vec!["stuck", "full"])]);
    }

    #[test]
    fn a_queue_longer_than_the_default_has_an_unknown_limit() {
        let view = view(line(1, 10, 10), line(1, 3000, 5000));
        let bound = view.rows[0].bound.as_ref().unwrap();
        assert_eq!(bound.limit, Limit::AtLeast(3000));
        assert_eq!(kinds(&view), [(1, vec![])], "it is not called full");
    }

    #[test]
    fn past_losses_stay_known() {
        let lost = QueueLine { queue_dropped: 3, user_dropped: 1, ..line(1, 0, 10) };
        let view = view(lost, QueueLine { last_id: 20, ..lost });
        assert_eq!(view.rows[0].advice, [Advice::LostBefore { full: 3, buffer: 1 }]);
    }

    #[test]
    fn a_queue_without_a_rule_is_named_only_if_nothing_arrives() {
        let mut history = History::default();
        history.update(&snapshot(0, &[line(1, 0, 5), line(2, 0, 5)], vec![]));
        let view = history.update(&snapshot(1, &[line(1, 0, 5), line(2, 0, 9)], vec![]));
        assert_eq!(kinds(&view), [(1, vec!["no_rule"]), (2, vec![])], "2 gets requeued packets");
        let computed = Rule { queues: None, ..rule(0, 0, false) };
        let view = history.update(&snapshot(2, &[line(1, 0, 5), line(2, 0, 9)], vec![computed.clone()]));
        assert_eq!(kinds(&view), [(1, vec![]), (2, vec![])], "the number may be theirs");
        assert_eq!(view.other_rules, [computed]);
    }

    #[test]
    fn without_readable_queues_none_is_called_unbound() {
        let view = History::default().update(&Snapshot { queues: None, ..snapshot(0, &[], all()) });
        assert!(view.rows.is_empty() && !view.queues_readable);
        assert_eq!(view.other_rules, all(), "they are shown");
    }
}
