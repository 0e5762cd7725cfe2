//! The numbers of a queue for the facade [`metrics`](https://docs.rs/metrics): feature `metrics`.
//!
//! [`QueueMetrics::register`] describes and registers all of them at the program's recorder, such
//! as that of `metrics-exporter-prometheus`. [`update`](QueueMetrics::update) brings them up to
//! date: before each scrape, or by [`run`](QueueMetrics::run) at an interval. A packet costs
//! nothing; one update reads what [`stats`](VerdictSink::stats) and
//! [`kernel_stats`](VerdictSink::kernel_stats) read, and writes about 120 numbers. Without the
//! system calls an update takes 2 µs, and a scrape of the recorder for Prometheus 90 µs (measured:
//! `cargo bench -p tokio-nfqueue-benches --bench simulated -- metrics`, two cores of an EPYC).
//!
//! ```no_run
//! # async fn example(queue: tokio_nfqueue::Queue) {
//! use std::time::Duration;
//! use tokio_nfqueue::metrics::QueueMetrics;
//!
//! // First install the recorder.
//! let metrics = QueueMetrics::register(&queue.sink());
//! tokio::spawn(metrics.run(Duration::from_secs(1)));
//! # }
//! ```
//!
//! The example `prometheus` serves them over HTTP, with a dashboard for Grafana and alerts.
//!
//! Every number has the label `queue`, with the queue's number. Of a queue with several numbers,
//! each has numbers of its own. A counter never falls, also if the queue is bound again by the same
//! program.
//!
//! | name | kind | unit | what |
//! |---|---|---|---|
//! | `nfqueue_verdicts_total` | counter | packets | verdicts sent, by `action`: `accept`, `drop`, `repeat`, `requeue`. One that the kernel refuses later stays counted; see `nfqueue_packets_refused_total` and `nfqueue_packets_gone_total` |
//! | `nfqueue_verdict_wait_seconds` | histogram | seconds | by `action`: how long packets waited from the receiving to the sending of the verdict ([`Waited`](crate::stats::Waited)). As counters `…_bucket`, with the label `le`, and `…_count`, and a gauge `…_sum`, which never falls either: the facade's histograms take single values only |
//! | `nfqueue_packets_received_total` | counter | packets | [`Received::packets`](crate::stats::Received::packets) |
//! | `nfqueue_received_bytes_total` | counter | bytes | [`Received::bytes`](crate::stats::Received::bytes) |
//! | `nfqueue_messages_malformed_total` | counter | messages | [`Received::malformed`](crate::stats::Received::malformed) |
//! | `nfqueue_packets_unanswered_total` | counter | packets | [`Decided::unanswered`](crate::stats::Decided::unanswered) |
//! | `nfqueue_packets_expired_total` | counter | packets | [`Decided::expired`](crate::stats::Decided::expired) |
//! | `nfqueue_verdicts_late_total` | counter | verdicts | [`Decided::late`](crate::stats::Decided::late) |
//! | `nfqueue_packets_handed_over_total` | counter | packets | [`Decided::handed_over`](crate::stats::Decided::handed_over) |
//! | `nfqueue_flushes_total` | counter | rounds | [`Sent::flushes`](crate::stats::Sent::flushes) |
//! | `nfqueue_sends_total` | counter | system calls | [`Sent::sends`](crate::stats::Sent::sends) |
//! | `nfqueue_sends_failed_total` | counter | system calls | [`Sent::failed_sends`](crate::stats::Sent::failed_sends) |
//! | `nfqueue_messages_sent_total` | counter | messages | [`Sent::messages`](crate::stats::Sent::messages) |
//! | `nfqueue_packets_refused_total` | counter | packets | [`Sent::refused`](crate::stats::Sent::refused) |
//! | `nfqueue_packets_gone_total` | counter | packets | [`Sent::gone_at_least`](crate::stats::Sent::gone_at_least): another program's change has made the kernel drop them |
//! | `nfqueue_refusals_total` | counter | verdicts | [`Sent::refusals`](crate::stats::Sent::refusals) |
//! | `nfqueue_refusals_unread_total` | counter | verdicts | [`Sent::refusals_unread`](crate::stats::Sent::refusals_unread) |
//! | `nfqueue_packets_lost_total` | counter | packets | [`Lost::packets`](crate::stats::Lost::packets): the receive buffer was full |
//! | `nfqueue_gaps_total` | counter | gaps | [`Lost::gaps`](crate::stats::Lost::gaps) |
//! | `nfqueue_overrun_episodes_total` | counter | episodes | [`Lost::overrun_episodes`](crate::stats::Lost::overrun_episodes) |
//! | `nfqueue_overruns_total` | counter | errors | [`Lost::overruns`](crate::stats::Lost::overruns) |
//! | `nfqueue_in_flight` | gauge | packets | [`Held::in_flight`](crate::stats::Held::in_flight) |
//! | `nfqueue_in_flight_most` | gauge | packets | [`Held::most_in_flight`](crate::stats::Held::most_in_flight) |
//! | `nfqueue_held_bytes` | gauge | bytes | [`Held::bytes`](crate::stats::Held::bytes) |
//! | `nfqueue_oldest_undecided_seconds` | gauge | seconds | [`Held::oldest_undecided`](crate::stats::Held::oldest_undecided); 0 if there is none |
//! | `nfqueue_queue_max_length` | gauge | packets | [`QueueLimits::max_len`](crate::stats::QueueLimits::max_len) |
//! | `nfqueue_receive_buffer_bytes` | gauge | bytes | [`QueueLimits::receive_buffer`](crate::stats::QueueLimits::receive_buffer) |
//! | `nfqueue_queue_length` | gauge | packets | [`KernelStats::queued`](crate::stats::KernelStats::queued) |
//! | `nfqueue_packets_dropped_total` | counter | packets | dropped by the kernel, by `reason`: `queue_full` ([`KernelStats::dropped_queue`](crate::stats::KernelStats::dropped_queue)), `user` ([`KernelStats::dropped_socket`](crate::stats::KernelStats::dropped_socket)) |
//! | `nfqueue_packets_queued_total` | counter | packets | ids that the kernel has assigned ([`KernelStats::last_id`](crate::stats::KernelStats::last_id)) |
//! | `nfqueue_kernel_counters_readable` | gauge | 0 or 1 | whether the last three could be read: [`VerdictSink::kernel_stats`] says what that needs |
//!
//! `nfqueue_queue_length` and `nfqueue_packets_dropped_total` have the names, with `node_` before
//! them, and the labels that a collector for node_exporter has been proposed with (pull request
//! 3551).

use std::{borrow::Cow, fmt, sync::Mutex, time::Duration};

use metrics::{Counter, Gauge, SharedString, Unit, counter, describe_counter, describe_gauge, gauge};

use crate::{
    VerdictSink,
    stats::{Histogram, KernelStats},
    types::Stats,
};

/// The numbers of a queue, registered at the program's recorder. See the [module](self).
#[must_use = "the numbers stay as they are without `update` or `run`"]
pub struct QueueMetrics {
    queues: Vec<(VerdictSink, Mutex<Series>)>,
}

impl QueueMetrics {
    /// Describes and registers the numbers of a queue at the recorder that is installed: the local
    /// one of the thread (`metrics::with_local_recorder`), or the global one. If there is none,
    /// they go nowhere.
    pub fn register(sink: &VerdictSink) -> Self {
        describe();
        let series = |sink: VerdictSink| {
            let series = Series::new(sink.queue_number());
            (sink, Mutex::new(series))
        };
        Self { queues: sink.each().map(series).collect() }
    }

    /// Brings the numbers up to date. It makes one or two system calls for each number of the
    /// queue, and does not wait.
    pub fn update(&self) {
        for (sink, series) in &self.queues {
            let (stats, kernel) = (sink.stats(), sink.kernel_stats().ok());
            series.lock().unwrap_or_else(std::sync::PoisonError::into_inner).update(&stats, kernel);
        }
    }

    /// Calls [`update`](Self::update) at this interval, and once more when the queue is closed;
    /// then it ends.
    ///
    /// # Panics
    ///
    /// If the interval is zero, or outside of a runtime with time enabled.
    ///
    /// # Cancel safety
    /// If the future is dropped, the numbers stay as they are.
    pub async fn run(self, interval: Duration) {
        let mut interval = tokio::time::interval(interval);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let closed = self.queues.iter().all(|(sink, _)| sink.is_closed() && sink.stats().held.in_flight == 0);
            self.update();
            if closed {
                return;
            }
        }
    }
}

impl fmt::Debug for QueueMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueMetrics")
            .field("queues", &self.queues.iter().map(|(sink, _)| sink.queue_number()).collect::<Vec<_>>())
            .finish()
    }
}

/// A number of [`Stats`] or [`KernelStats`]: its name there, its own name, its unit and its help.
struct Metric {
    of: &'static str,
    name: &'static str,
    unit: Unit,
    help: &'static str,
}

const fn metric(of: &'static str, name: &'static str, unit: Unit, help: &'static str) -> Metric {
    Metric { of, name, unit, help }
}

/// Of [`Stats`].
const COUNTERS: &[Metric] = &[
    metric("received.packets", "nfqueue_packets_received_total", Unit::Count, "Packets received."),
    metric("received.bytes", "nfqueue_received_bytes_total", Unit::Bytes, "Bytes received, with metadata."),
    metric("received.malformed", "nfqueue_messages_malformed_total", Unit::Count, "Messages that could not be parsed."),
    metric(
        "decided.unanswered",
        "nfqueue_packets_unanswered_total",
        Unit::Count,
        "Packets that got the default action.",
    ),
    metric("decided.expired", "nfqueue_packets_expired_total", Unit::Count, "Packets decided by their deadline."),
    metric(
        "decided.late",
        "nfqueue_verdicts_late_total",
        Unit::Count,
        "Verdicts for packets that were decided before.",
    ),
    metric(
        "decided.handed_over",
        "nfqueue_packets_handed_over_total",
        Unit::Count,
        "Unread packets left to a successor.",
    ),
    metric("sent.flushes", "nfqueue_flushes_total", Unit::Count, "Rounds in which verdicts were sent."),
    metric("sent.sends", "nfqueue_sends_total", Unit::Count, "System calls that sent verdicts."),
    metric("sent.failed_sends", "nfqueue_sends_failed_total", Unit::Count, "Sends that failed and were repeated."),
    metric("sent.messages", "nfqueue_messages_sent_total", Unit::Count, "Verdict messages, single and batch."),
    metric("sent.refused", "nfqueue_packets_refused_total", Unit::Count, "Packets whose verdict was refused for good."),
    metric(
        "sent.gone_at_least",
        "nfqueue_packets_gone_total",
        Unit::Count,
        "Packets that had left the queue before their verdict, at least.",
    ),
    metric("sent.refusals", "nfqueue_refusals_total", Unit::Count, "Verdicts that were refused."),
    metric("sent.refusals_unread", "nfqueue_refusals_unread_total", Unit::Count, "Refusals discarded unread."),
    metric("lost.packets", "nfqueue_packets_lost_total", Unit::Count, "Packets that found the receive buffer full."),
    metric("lost.gaps", "nfqueue_gaps_total", Unit::Count, "Gaps between the ids of received packets."),
    metric("lost.overrun_episodes", "nfqueue_overrun_episodes_total", Unit::Count, "Episodes of loss."),
    metric("lost.overruns", "nfqueue_overruns_total", Unit::Count, "ENOBUFS errors."),
];

/// Of [`Stats`].
const GAUGES: &[Metric] = &[
    metric("held.in_flight", "nfqueue_in_flight", Unit::Count, "Packets received whose verdict has not been sent."),
    metric("held.most_in_flight", "nfqueue_in_flight_most", Unit::Count, "The largest number in flight so far."),
    metric("held.bytes", "nfqueue_held_bytes", Unit::Bytes, "Memory that undecided packets keep."),
    metric("limits.max_len", "nfqueue_queue_max_length", Unit::Count, "Packets that the kernel queues at most."),
    metric("limits.receive_buffer_bytes", "nfqueue_receive_buffer_bytes", Unit::Bytes, "Size of the receive buffer."),
];

const VERDICTS: &str = "nfqueue_verdicts_total";
const WAIT: [&str; 3] =
    ["nfqueue_verdict_wait_seconds_bucket", "nfqueue_verdict_wait_seconds_sum", "nfqueue_verdict_wait_seconds_count"];
const OLDEST: &str = "nfqueue_oldest_undecided_seconds";
const LENGTH: &str = "nfqueue_queue_length";
const DROPPED: &str = "nfqueue_packets_dropped_total";
const QUEUED: &str = "nfqueue_packets_queued_total";
const READABLE: &str = "nfqueue_kernel_counters_readable";

fn describe() {
    for Metric { name, unit, help, .. } in COUNTERS {
        describe_counter!(*name, *unit, *help);
    }
    for Metric { name, unit, help, .. } in GAUGES {
        describe_gauge!(*name, *unit, *help);
    }
    let [bucket, sum, count] = WAIT;
    describe_counter!(VERDICTS, Unit::Count, "Verdicts sent, by action.");
    describe_counter!(bucket, Unit::Count, "Verdicts whose packets waited no longer than this, by action.");
    describe_gauge!(sum, Unit::Seconds, "How long packets waited for their verdicts, by action.");
    describe_counter!(count, Unit::Count, "Verdicts sent, by action.");
    describe_gauge!(OLDEST, Unit::Seconds, "How long the oldest undecided packet has been in this process.");
    describe_gauge!(LENGTH, Unit::Count, "Packets that wait for a verdict in the kernel.");
    describe_counter!(DROPPED, Unit::Count, "Packets that the kernel dropped, by reason.");
    describe_counter!(QUEUED, Unit::Count, "Ids that the kernel has assigned.");
    describe_gauge!(READABLE, "Whether the kernel's counters can be read.");
}

/// A number of the recorder that only rises, and its last value here.
struct Rising {
    counter: Counter,
    last: u64,
}

impl Rising {
    fn new(name: &'static str, labels: &[(&'static str, SharedString)]) -> Self {
        Self { counter: counter!(name, labels), last: 0 }
    }

    fn rise(&mut self, value: u64) {
        self.counter.increment(value.saturating_sub(self.last));
        self.last = self.last.max(value);
    }

    /// To the value of a counter that wraps at 2³².
    fn rise_wrapping(&mut self, value: u32) {
        let more = value.wrapping_sub(self.last as u32);
        self.rise(self.last + u64::from(more));
    }
}

/// The numbers for one action.
struct Waits {
    verdicts: Rising,
    buckets: Vec<(Option<Duration>, Rising)>,
    /// The facade's counters are whole numbers.
    seconds: Gauge,
    last_sum: Duration,
    count: Rising,
}

impl Waits {
    fn new(queue: &SharedString, action: &'static str) -> Self {
        let labels = [("queue", queue.clone()), ("action", action.into())];
        let [bucket, sum, count] = WAIT;
        let of_bucket = |end: Option<Duration>| {
            let le: SharedString = end.map_or(Cow::Borrowed("+Inf"), |end| end.as_secs_f64().to_string().into()).into();
            let [queue, action] = labels.clone();
            (end, Rising::new(bucket, &[queue, action, ("le", le)]))
        };
        Self {
            verdicts: Rising::new(VERDICTS, &labels),
            buckets: ends().map(of_bucket).collect(),
            seconds: gauge!(sum, &labels),
            last_sum: Duration::ZERO,
            count: Rising::new(count, &labels),
        }
    }

    fn update(&mut self, waited: &Histogram) {
        let mut below = 0;
        let mut ends = self.buckets.iter_mut().peekable();
        for (end, count) in waited.buckets() {
            below += count;
            if let Some((_, series)) = ends.next_if(|(wanted, _)| *wanted == end) {
                series.rise(below);
            }
        }
        self.verdicts.rise(waited.count());
        self.seconds.increment(waited.sum().saturating_sub(self.last_sum).as_secs_f64());
        self.last_sum = waited.sum();
        self.count.rise(waited.count());
    }
}

/// The ends of the buckets: every fourth of the histogram's, so that a queue has 64 numbers for
/// them and not 256. The last one is infinite.
fn ends() -> impl Iterator<Item = Option<Duration>> {
    let buckets = Histogram::default().buckets();
    buckets.map(|(end, _)| end).enumerate().filter(|(index, end)| index % 4 == 0 || end.is_none()).map(|(_, end)| end)
}

/// The numbers of one queue number.
struct Series {
    counters: Vec<Rising>,
    gauges: Vec<Gauge>,
    waits: Vec<Waits>,
    oldest: Gauge,
    length: Gauge,
    dropped_queue: Rising,
    dropped_socket: Rising,
    queued: Rising,
    readable: Gauge,
}

impl Series {
    fn new(queue: u16) -> Self {
        let queue: SharedString = queue.to_string().into();
        let labels = [("queue", queue.clone())];
        let dropped =
            |reason: &'static str| Rising::new(DROPPED, &[("queue", queue.clone()), ("reason", reason.into())]);
        let actions = crate::stats::Waited::default().by_action();
        Self {
            counters: COUNTERS.iter().map(|metric| Rising::new(metric.name, &labels)).collect(),
            gauges: GAUGES.iter().map(|metric| gauge!(metric.name, &labels)).collect(),
            waits: actions.into_iter().map(|(action, _)| Waits::new(&queue, action)).collect(),
            oldest: gauge!(OLDEST, &labels),
            length: gauge!(LENGTH, &labels),
            dropped_queue: dropped("queue_full"),
            dropped_socket: dropped("user"),
            queued: Rising::new(QUEUED, &labels),
            readable: gauge!(READABLE, &labels),
        }
    }

    fn update(&mut self, stats: &Stats, kernel: Option<KernelStats>) {
        let numbers: Vec<_> = stats.iter().collect();
        let value = |name| numbers.iter().find(|number| number.name == name).map_or(0, |number| number.value);
        for (series, metric) in self.counters.iter_mut().zip(COUNTERS) {
            series.rise(value(metric.of));
        }
        for (gauge, metric) in self.gauges.iter().zip(GAUGES) {
            gauge.set(value(metric.of) as f64);
        }
        for (waits, (_, waited)) in self.waits.iter_mut().zip(stats.waited.by_action()) {
            waits.update(&waited);
        }
        self.oldest.set(stats.held.oldest_undecided.unwrap_or_default().as_secs_f64());
        self.readable.set(if kernel.is_some() { 1.0 } else { 0.0 });
        if let Some(kernel) = kernel {
            self.length.set(f64::from(kernel.queued));
            self.dropped_queue.rise_wrapping(kernel.dropped_queue);
            self.dropped_socket.rise_wrapping(kernel.dropped_socket);
            self.queued.rise_wrapping(kernel.last_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_of_the_statistics_has_a_name() {
        let mut stats = Stats::default();
        stats.held.oldest_undecided = Some(Duration::from_secs(1));
        let names: Vec<_> = stats.iter().map(|number| number.name).collect();
        let metrics: Vec<_> = COUNTERS.iter().chain(GAUGES).map(|metric| metric.of).collect();
        for of in &metrics {
            assert!(names.contains(of), "{of}");
        }
        // By action, of their own, or what is computed from the others.
        let elsewhere = |name: &str| {
            ["decided.accepted", "decided.dropped", "decided.repeated", "decided.requeued"].contains(&name)
                || ["held.oldest_undecided_us", "sent.largest_flush"].contains(&name)
                || name.starts_with("held.fill_")
                || name.starts_with("waited.")
        };
        for name in names {
            assert!(metrics.contains(&name) != elsewhere(name), "{name}");
        }
    }

    #[test]
    fn a_counter_of_the_kernel_may_wrap() {
        let mut rising = Rising { counter: Counter::noop(), last: 0 };
        rising.rise_wrapping(u32::MAX - 1);
        rising.rise_wrapping(5);
        assert_eq!(rising.last, (1 << 32) + 5);
        rising.rise(3);
        assert_eq!(rising.last, (1 << 32) + 5);
    }

    #[test]
    fn the_buckets_end_with_an_infinite_one() {
        let ends: Vec<_> = ends().collect();
        assert_eq!(
            (ends.len(), ends[0], ends[1]),
            (17, Some(Duration::from_micros(1)), Some(Duration::from_micros(4)))
        );
        assert_eq!(ends[16], None);
    }
}
