//! What a queue has counted.

use std::{iter::Sum, ops::Sub, time::Duration};

use super::{Action, Waited};

/// A snapshot of a queue's counters, in groups.
///
/// Counters start at `QueueBuilder::bind` and count packets unless their
/// documentation says otherwise. In every snapshot these numbers add up:
/// `received.packets == decided.accepted + decided.dropped + decided.repeated + decided.requeued +
/// decided.handed_over + sent.refused + sent.gone_at_least + held.in_flight`.
///
/// `later - earlier` is what has happened in between: counters are subtracted; what is not a
/// counter ([`held`](Self::held), [`limits`](Self::limits), [`Sent::largest_flush`]) is that of
/// the later snapshot. [`iter`](Self::iter) lists all numbers with their names.
///
/// ```
/// # struct VerdictSink;
/// # impl VerdictSink { fn stats(&self) -> nfqueue_proto::types::Stats { Default::default() } }
/// # let sink = VerdictSink;
/// let before = sink.stats();
/// // ...
/// let since = sink.stats() - before;
/// println!("{} packets, {} lost", since.received.packets, since.lost.packets);
/// for number in since.iter() {
///     println!("{} {}", number.name, number.value);
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// What the kernel has sent.
    pub received: Received,
    /// Packets that were decided, by the verdict that the kernel has taken or by its origin.
    pub decided: Decided,
    /// How verdicts were sent, and what the kernel did not take.
    pub sent: Sent,
    /// Packets lost before they were received.
    pub lost: Lost,
    /// Packets that wait for their verdicts now.
    pub held: Held,
    /// The limits that are in force now.
    pub limits: QueueLimits,
    /// How long packets waited for their verdicts.
    pub waited: Waited,
}

/// A number of [`Stats`] or of the kernel, for metrics and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Number {
    /// Its name, such as `received.packets`.
    pub name: &'static str,
    /// What it is.
    pub kind: NumberKind,
    /// Its value.
    pub value: u64,
    /// What it counts, in one sentence.
    pub help: &'static str,
}

/// What a [`Number`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NumberKind {
    /// It counts events. (Of a batch of verdicts that turn out to have found no packet, the packets
    /// are counted again as [`Sent::gone_at_least`], and the others fall by as many. Those of
    /// [`Decided`] also fall when a verdict is sent again, because it could not be sent, or was or
    /// may have been refused for want of the capability: its packet is in flight again.)
    Counter,
    /// A level, which rises and falls.
    Gauge,
}

impl Number {
    #[doc(hidden)]
    pub const fn counter(name: &'static str, value: u64, help: &'static str) -> Self {
        Self { name, kind: NumberKind::Counter, value, help }
    }

    #[doc(hidden)]
    pub const fn gauge(name: &'static str, value: u64, help: &'static str) -> Self {
        Self { name, kind: NumberKind::Gauge, value, help }
    }
}

/// What the kernel has sent: [`Stats::received`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Received {
    /// Packets.
    pub packets: u64,
    /// Bytes, including metadata and netlink headers.
    pub bytes: u64,
    /// Messages that could not be parsed.
    pub malformed: u64,
}

/// Packets that were decided: [`Stats::decided`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Decided {
    /// Accepted or stopped: the verdict was sent, and the kernel has not reported that it found no
    /// packet.
    pub accepted: u64,
    /// Dropped, also by a verdict that rejects them or denies their connections (`guide::flows` of
    /// tokio-nfqueue); counted like `accepted`.
    pub dropped: u64,
    /// Sent through the hook again; counted like `accepted`.
    pub repeated: u64,
    /// Sent to another queue; counted like `accepted`.
    pub requeued: u64,
    /// Got the default action: packets and verdicts that were dropped, packets that were unread
    /// when the queue closed, and packets whose verdict was refused. These packets are also counted
    /// by their action.
    pub unanswered: u64,
    /// Decided by their `QueueBuilder::deadline`. These packets are also counted
    /// by their action.
    pub expired: u64,
    /// Verdicts for packets that had already been decided by a deadline or a closing queue.
    pub late: u64,
    /// Not decided here: received, not handed out, and passed on to a successor that took the queue
    /// over (`VerdictSink::hand_over`).
    pub handed_over: u64,
}

/// How verdicts were sent: [`Stats::sent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Sent {
    /// How often gathered verdicts were sent.
    pub flushes: u64,
    /// Verdict messages of the largest flush.
    pub largest_flush: u64,
    /// System calls that sent verdicts.
    pub sends: u64,
    /// Sends that failed, whose verdicts were sent again later.
    pub failed_sends: u64,
    /// Verdict messages, single and batch.
    pub messages: u64,
    /// Packets whose verdict the kernel refused for a reason that no other verdict would change.
    /// The kernel has released the packet.
    pub refused: u64,
    /// Packets that had left the queue before their verdict arrived: their interface went down, or
    /// a hook was unregistered.
    ///
    /// If a hook is unregistered, the kernel drops every packet of the queue; these are counted
    /// exactly if they had been received. Otherwise this is a lower bound: for a single verdict the
    /// kernel reports whether it found the packet, for a batch only whether it found any. If an
    /// interface goes down, packets of another interface in the same batch hide those that are
    /// gone; then `accepted` and the like are too high by the same number.
    pub gone_at_least: u64,
    /// Verdicts that were refused. Each is reported by `VerdictSink::refusals`
    /// or by `Verdict::confirm`. If the capability was missing, the packet stays
    /// in flight and gets the default action as soon as that can be sent.
    pub refusals: u64,
    /// Refusals that were discarded unread, because there were too many.
    pub refusals_unread: u64,
}

/// Packets lost before they were received: [`Stats::lost`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Lost {
    /// Packets lost because the socket's receive buffer was full. This is exact: the kernel assigns
    /// ids before it delivers, so a gap in the ids is the number of lost packets. With fail-open
    /// these packets were accepted unseen; without it they were dropped.
    ///
    /// A gap is found when the next packet is received. Packets lost behind the last received
    /// packet are not counted until then.
    ///
    /// Packets that found the *queue* full get no id and do not count here;
    /// `KernelStats::dropped_queue` counts them.
    pub packets: u64,
    /// How often packets were missing between two received packets.
    pub gaps: u64,
    /// Episodes of loss. An episode starts with a lost packet and ends when the receive buffer has
    /// been read empty.
    pub overrun_episodes: u64,
    /// ENOBUFS errors. They are rare, because the socket disables them (`NETLINK_NO_ENOBUFS`).
    pub overruns: u64,
}

/// Packets that wait for their verdicts: [`Stats::held`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Held {
    /// Packets received whose verdict has not been sent, or was refused.
    pub in_flight: usize,
    /// The largest `in_flight` so far.
    pub most_in_flight: usize,
    /// `in_flight` at the times when packets were received: minimum, mean and maximum.
    pub fill: Fill,
    /// Bytes of memory that undecided packets keep alive: the whole of each buffer that contains
    /// one (see `Packet::payload_bytes`). Detached (`Packet::detach`)
    /// packets keep none.
    pub bytes: usize,
    /// How long the oldest undecided packet has been in this process, to within a 64th.
    pub oldest_undecided: Option<Duration>,
}

/// The limits in force: [`Stats::limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct QueueLimits {
    /// How many packets the kernel queues at most.
    pub max_len: u32,
    /// The size of the socket's receive buffer in bytes, as the kernel accounts them.
    pub receive_buffer: usize,
}

/// Minimum, mean and maximum of a number. All are zero before the first sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Fill {
    /// The minimum.
    pub min: usize,
    /// The mean, rounded down.
    pub mean: usize,
    /// The maximum.
    pub max: usize,
}

impl Stats {
    /// All numbers with their names, such as `received.packets`, their kind and a line of help.
    /// Times are in microseconds, sizes in bytes, as the names say. A time that does not exist is
    /// left out. Of [`waited`](Self::waited), it has the quantiles over all actions.
    pub fn iter(&self) -> impl Iterator<Item = Number> + use<> {
        let Self { received, decided, sent, lost, held, limits, waited } = *self;
        let waited = waited.all();
        let (counter, gauge) = (Number::counter, Number::gauge);
        let numbers = [
            counter("received.packets", received.packets, "Packets received."),
            counter("received.bytes", received.bytes, "Bytes received, with metadata and netlink headers."),
            counter("received.malformed", received.malformed, "Messages that could not be parsed."),
            counter("decided.accepted", decided.accepted, "Packets accepted or stopped."),
            counter("decided.dropped", decided.dropped, "Packets dropped."),
            counter("decided.repeated", decided.repeated, "Packets sent through the hook again."),
            counter("decided.requeued", decided.requeued, "Packets sent to another queue."),
            counter("decided.unanswered", decided.unanswered, "Packets that got the default action."),
            counter("decided.expired", decided.expired, "Packets decided by their deadline."),
            counter("decided.late", decided.late, "Verdicts for packets that had already been decided."),
            counter("decided.handed_over", decided.handed_over, "Unread packets passed on to a successor."),
            counter("sent.flushes", sent.flushes, "Rounds in which gathered verdicts were sent."),
            gauge("sent.largest_flush", sent.largest_flush, "Verdict messages of the largest round."),
            counter("sent.sends", sent.sends, "System calls that sent verdicts."),
            counter("sent.failed_sends", sent.failed_sends, "Sends that failed and were repeated."),
            counter("sent.messages", sent.messages, "Verdict messages, single and batch."),
            counter("sent.refused", sent.refused, "Packets whose verdict the kernel refused for good."),
            counter(
                "sent.gone_at_least",
                sent.gone_at_least,
                "Packets that had left the queue before their verdict, at least.",
            ),
            counter("sent.refusals", sent.refusals, "Verdicts that were refused."),
            counter("sent.refusals_unread", sent.refusals_unread, "Refusals discarded unread."),
            counter("lost.packets", lost.packets, "Packets that found the receive buffer full."),
            counter("lost.gaps", lost.gaps, "Gaps between the ids of received packets."),
            counter("lost.overrun_episodes", lost.overrun_episodes, "Episodes of loss."),
            counter("lost.overruns", lost.overruns, "ENOBUFS errors."),
            gauge("held.in_flight", held.in_flight as u64, "Packets received whose verdict has not been sent."),
            gauge("held.most_in_flight", held.most_in_flight as u64, "The largest number of packets in flight."),
            gauge("held.fill_min", held.fill.min as u64, "Packets in flight when packets were received: minimum."),
            gauge("held.fill_mean", held.fill.mean as u64, "Packets in flight when packets were received: mean."),
            gauge("held.fill_max", held.fill.max as u64, "Packets in flight when packets were received: maximum."),
            gauge("held.bytes", held.bytes as u64, "Bytes of memory that undecided packets keep."),
            gauge("limits.max_len", limits.max_len.into(), "Packets that the kernel queues at most."),
            gauge(
                "limits.receive_buffer_bytes",
                limits.receive_buffer as u64,
                "Size of the receive buffer, as the kernel accounts it.",
            ),
        ];
        let times = [
            ("waited.p50_us", waited.quantile(0.5), "Half of the packets waited no longer in this process."),
            ("waited.p99_us", waited.quantile(0.99), "99 % of the packets waited no longer in this process."),
            ("waited.max_us", waited.quantile(1.0), "The longest time that a packet waited in this process."),
            (
                "held.oldest_undecided_us",
                held.oldest_undecided,
                "How long the oldest undecided packet has been in this process.",
            ),
        ];
        let times = times.into_iter().filter_map(move |(name, time, help)| {
            let microseconds = u64::try_from(time?.as_micros()).unwrap_or(u64::MAX);
            Some(gauge(name, microseconds, help))
        });
        numbers.into_iter().chain(times)
    }

    fn decided_as(&mut self, action: Action) -> &mut u64 {
        match action {
            Action::Drop => &mut self.decided.dropped,
            Action::Repeat => &mut self.decided.repeated,
            Action::Requeue { .. } => &mut self.decided.requeued,
            Action::Accept | Action::Stop => &mut self.decided.accepted,
        }
    }

    #[doc(hidden)]
    pub fn count_decided(&mut self, action: Action, packets: u64) {
        *self.decided_as(action) += packets;
    }

    /// The kernel has not taken verdicts that were counted as taken.
    #[doc(hidden)]
    pub fn uncount_decided(&mut self, action: Action, packets: u64) {
        let count = self.decided_as(action);
        *count = count.saturating_sub(packets);
    }
}

/// What has happened between two snapshots of the same queue; see [`Stats`]. Saturates at zero.
impl Sub for Stats {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        macro_rules! difference {
            ($group:ident: $($field:ident)*) => {
                { let mut group = self.$group;
                  $(group.$field = group.$field.saturating_sub(earlier.$group.$field);)*
                  group }
            };
        }
        Self {
            received: difference!(received: packets bytes malformed),
            decided: difference!(decided: accepted dropped repeated requeued unanswered expired late handed_over),
            sent: difference!(sent: flushes sends failed_sends messages refused gone_at_least refusals refusals_unread),
            lost: difference!(lost: packets gaps overrun_episodes overruns),
            held: self.held,
            limits: self.limits,
            waited: self.waited - earlier.waited,
        }
    }
}

/// Snapshots of several queues as one. Counters, levels and limits are added;
/// [`Sent::largest_flush`] and [`Held::oldest_undecided`] are the largest. [`Held::most_in_flight`]
/// is an upper bound, as the queues need not have had their most at the same time. The mean of
/// [`Held::fill`] is weighted by the packets received.
impl Sum for Stats {
    fn sum<I: Iterator<Item = Self>>(mut all: I) -> Self {
        let first = all.next().unwrap_or_default();
        all.fold(first, |one, other| {
            macro_rules! sum {
                ($group:ident: $($field:ident)*) => {
                    { let mut group = one.$group;
                      $(group.$field = group.$field.saturating_add(other.$group.$field);)*
                      group }
                };
            }
            let mut sent =
                sum!(sent: flushes sends failed_sends messages refused gone_at_least refusals refusals_unread);
            sent.largest_flush = one.sent.largest_flush.max(other.sent.largest_flush);
            let mut held = sum!(held: in_flight most_in_flight bytes);
            held.oldest_undecided = one.held.oldest_undecided.max(other.held.oldest_undecided);
            held.fill = one.held.fill.and(one.received.packets, other.held.fill, other.received.packets);
            Self {
                received: sum!(received: packets bytes malformed),
                decided: sum!(decided: accepted dropped repeated requeued unanswered expired late handed_over),
                sent,
                lost: sum!(lost: packets gaps overrun_episodes overruns),
                held,
                limits: sum!(limits: max_len receive_buffer),
                waited: one.waited.and(&other.waited),
            }
        })
    }
}

impl Fill {
    /// Of both, with their weights.
    fn and(self, weight: u64, other: Self, of_other: u64) -> Self {
        match (weight, of_other) {
            (_, 0) => self,
            (0, _) => other,
            _ => {
                let sum = self.mean as u128 * u128::from(weight) + other.mean as u128 * u128::from(of_other);
                let mean = (sum / u128::from(weight + of_other)) as usize;
                Self { min: self.min.min(other.min), mean, max: self.max.max(other.max) }
            }
        }
    }
}

/// What [`Fill`] is computed from.
#[derive(Debug, Clone, Copy, Default)]
pub struct FillCounter {
    samples: u64,
    sum: u64,
    min: usize,
    max: usize,
}

impl FillCounter {
    /// Adds a sample.
    pub fn sample(&mut self, number: usize) {
        self.min = if self.samples == 0 { number } else { self.min.min(number) };
        self.max = self.max.max(number);
        self.samples += 1;
        self.sum += number as u64;
    }

    /// Minimum, mean and maximum of the samples.
    pub fn fill(&self) -> Fill {
        let mean = self.sum.checked_div(self.samples).unwrap_or(0) as usize;
        Fill { min: self.min, mean, max: self.max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_subtracts_counters_and_keeps_levels() {
        let mut earlier = Stats::default();
        earlier.received.packets = 5;
        earlier.sent.largest_flush = 9;
        earlier.held.in_flight = 4;
        let mut later = earlier;
        later.received.packets = 12;
        later.decided.accepted = 3;
        later.held.in_flight = 6;
        let since = later - earlier;
        assert_eq!(since.received.packets, 7);
        assert_eq!(since.decided.accepted, 3);
        assert_eq!(since.sent.largest_flush, 9);
        assert_eq!(since.held.in_flight, 6);
        // The wrong way round is no panic.
        assert_eq!((earlier - later).received.packets, 0);
    }

    #[test]
    fn a_sum_adds_what_can_be_added() {
        let mut one = Stats::default();
        one.received.packets = 1;
        one.sent.largest_flush = 5;
        one.held = Held { in_flight: 2, fill: Fill { min: 1, mean: 1, max: 1 }, ..Held::default() };
        one.limits.max_len = 1024;
        let mut other = one;
        other.received.packets = 3;
        other.sent.largest_flush = 4;
        other.held.fill = Fill { min: 4, mean: 5, max: 8 };
        other.held.oldest_undecided = Some(Duration::from_secs(1));
        let sum: Stats = [one, other].into_iter().sum();
        assert_eq!((sum.received.packets, sum.sent.largest_flush, sum.held.in_flight), (4, 5, 4));
        assert_eq!(sum.held.fill, Fill { min: 1, mean: 4, max: 8 });
        assert_eq!((sum.held.oldest_undecided, sum.limits.max_len), (Some(Duration::from_secs(1)), 2048));
        // A queue that has received nothing has no smallest number of packets.
        let sum: Stats = [Stats::default(), other].into_iter().sum();
        assert_eq!(sum.held.fill, other.held.fill);
    }

    #[test]
    fn names_of_numbers_are_unique() {
        let mut stats = Stats::default();
        stats.lost.packets = 3;
        stats.held.oldest_undecided = Some(Duration::from_millis(2));
        let mut names: Vec<&str> = stats.iter().map(|number| number.name).collect();
        let lost = stats.iter().find(|number| number.name == "lost.packets").unwrap();
        assert_eq!((lost.value, lost.kind), (3, NumberKind::Counter));
        let age = stats.iter().last().unwrap();
        assert_eq!((age.name, age.value, age.kind), ("held.oldest_undecided_us", 2000, NumberKind::Gauge));
        assert!(stats.iter().all(|number| number.help.ends_with('.')));
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
