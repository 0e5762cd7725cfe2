//! One-way latency, from the sender's system call to the arrival at the receiving socket.

use std::time::Duration;

use super::{
    busy::BusyThread,
    consumer::{Contender, Job, Running},
    floor,
    measure::{Moment, other_sleeps},
    options::Scale,
    ours,
    paced::Paced,
    peers,
    summary::{Book, percentile},
    support,
    traffic::divert,
};
use tokio_nfqueue::{Hook, Protocol, Stats};

pub const RATES: [u64; 3] = [1_000, 20_000, 100_000];
/// Rates of the sweep of the adaptive policy.
pub const SWEEP: [u64; 12] =
    [100, 300, 1_000, 3_000, 10_000, 20_000, 30_000, 50_000, 100_000, 200_000, 300_000, 400_000];
pub const NO_QUEUE: &str = "no queue";
pub const MEDIAN: &str = "p50 µs";
pub const P99: &str = "p99 µs";
pub const P999: &str = "p99.9 µs";
pub const LOST: &str = "lost %";
pub const CPU: &str = "CPU ns/packet";
pub const BATCH: &str = "verdicts/send";
pub const SWEEP_SECTION: &str = "adaptive sweep";

/// All contenders; `None` is traffic without a queue. Contenders that busy-poll are left out if the
/// time between packets is longer than their limit: there they do the same as the defaults.
pub fn contenders(rate: u64) -> impl Iterator<Item = Option<Contender>> {
    let busy_polls = ours::BUSY_POLL_LIMIT > Duration::from_secs(1) / rate as u32;
    [
        (None, true),
        (Some(floor::ONE), true),
        (Some(ours::ACCEPT_ALL), true),
        (Some(ours::ACCEPT_NEXT), true),
        (Some(ours::BUSY_POLL), busy_polls),
        (Some(ours::ACCEPT_ALL_TWO), true),
        (Some(ours::BUSY_POLL_TWO), busy_polls),
        (Some(peers::NFQ), true),
        (Some(peers::NFQ_CHANNEL), true),
    ]
    .into_iter()
    .filter_map(|(contender, wanted)| wanted.then_some(contender))
}

pub fn section(rate: u64) -> String {
    format!("latency at {rate}/s")
}

/// A contender at one rate; `None` is traffic without a queue.
pub fn measure(contender: Option<&Contender>, rate: u64, scale: &Scale, book: &mut Book) {
    let outcome = run(contender, rate, scale, Host::Idle);
    let name = contender.map_or(NO_QUEUE, |contender| contender.name);
    note(book, &section(rate), name, &outcome);
}

/// This crate at one rate of the sweep. The figures are recorded under the rate.
pub fn sweep(contender: &Contender, rate: u64, scale: &Scale, book: &mut Book) {
    let outcome = run(Some(contender), rate, scale, Host::Idle);
    let name = rate.to_string();
    note(book, SWEEP_SECTION, &name, &outcome);
    if let Some(stats) = outcome.stats {
        book.note(SWEEP_SECTION, &name, BATCH, per_send(&stats));
    }
}

/// Verdicts per send, on average.
pub fn per_send(stats: &Stats) -> f64 {
    stats.decided.accepted as f64 / stats.sent.sends.max(1) as f64
}

/// Other load on the processors, besides sender and consumer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Host {
    Idle,
    /// Two processors and a third thread that never sleeps.
    Busy,
}

pub struct Outcome {
    queued: bool,
    sent: u64,
    lost: u64,
    /// Sorted, in microseconds.
    latencies: Vec<f64>,
    /// CPU time of the consumer: of all threads except the sender's and the busy one.
    cpu: Duration,
    /// Wake-ups per second of threads that are neither the sender's nor the consumer's.
    pub other_wake_ups: f64,
    stats: Option<Stats>,
}

pub fn note(book: &mut Book, section: &str, name: &str, outcome: &Outcome) {
    for (figure, percent) in [(MEDIAN, 50.0), (P99, 99.0), (P999, 99.9)] {
        // If all are lost, the round still counts: figures are compared round by round.
        let latency =
            if outcome.latencies.is_empty() { f64::INFINITY } else { percentile(&outcome.latencies, percent) };
        book.note(section, name, figure, latency);
    }
    if outcome.queued {
        let decided = (outcome.sent - outcome.lost).max(1);
        book.note(section, name, CPU, outcome.cpu.as_nanos() as f64 / decided as f64);
    }
    book.note(section, name, LOST, outcome.lost as f64 * 100.0 / outcome.sent.max(1) as f64);
}

pub fn run(contender: Option<&Contender>, rate: u64, scale: &Scale, host: Host) -> Outcome {
    run_then(contender, rate, scale, host, |_| ()).0
}

/// Calls `then` after the measurement, while the contender still runs.
pub fn run_then<T: Send>(
    contender: Option<&Contender>,
    rate: u64,
    scale: &Scale,
    host: Host,
    then: impl FnOnce(&mut Paced) -> T + Send,
) -> (Outcome, T) {
    support::isolated(|| {
        let busy = (host == Host::Busy).then(BusyThread::start);
        let of_busy = || busy.as_ref().map_or(Duration::ZERO, BusyThread::cpu);
        let queue = contender.map(|contender| {
            let running = Running::start(contender, &Job::default());
            running.go(None);
            (running, divert(Hook::Output, Protocol::Udp, 1))
        });
        let mut paced = Paced::new(rate);
        paced.run(scale.warm_up);
        let (sleeps, busy_before, start) = (other_sleeps(), of_busy(), Moment::now());
        let sent = paced.run(scale.window);
        let cost = start.cost();
        let cpu = cost.cpu().saturating_sub(of_busy() - busy_before);
        let wake_ups = other_sleeps().saturating_sub(sleeps);
        let mut latencies: Vec<f64> = paced.arrivals.iter().map(|arrival| arrival.latency_us()).collect();
        latencies.sort_by(f64::total_cmp);
        let more = then(&mut paced);
        let stats = queue.and_then(|(running, _divert)| running.stop(|| paced.kick()));
        let outcome = Outcome {
            queued: contender.is_some(),
            sent,
            lost: sent - (latencies.len() as u64).min(sent),
            latencies,
            cpu,
            other_wake_ups: wake_ups as f64 / cost.wall.as_secs_f64(),
            stats,
        };
        (outcome, more)
    })
}
