//! The time from `submit` to the send of the verdict, which `max_delay` limits.

use std::{collections::HashMap, sync::atomic::Ordering::Relaxed, time::Duration};

use super::{
    consumer::{Job, Running},
    options::Scale,
    ours::{SUBMITTED, TIMED},
    paced::Paced,
    summary::{Book, percentile},
    support,
    traffic::divert,
};
use tokio_nfqueue::{Hook, Protocol};

pub const SECTION: &str = "verdict waits";
pub const CAPS: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(1)];
pub const RATES: [u64; 2] = [20_000, 100_000];
pub const MEDIAN: &str = "p50 µs";
pub const P99: &str = "p99 µs";
pub const P999: &str = "p99.9 µs";
pub const MOST: &str = "max µs";

pub fn name(cap: Duration, rate: u64) -> String {
    format!("max_delay {cap:?}, {rate}/s")
}

/// Eight tasks decide in any order, at a steady rate. The end of a wait is the start of the send
/// that carries the verdict. It is taken as the arrival of the first packet of that send, so it
/// includes the time of one packet in the kernel.
pub fn measure(cap: Duration, rate: u64, scale: &Scale, book: &mut Book) {
    let waits = support::isolated(|| {
        let running = Running::start(&TIMED, &Job { max_delay: Some(cap), ..Job::default() });
        running.go(None);
        let divert = divert(Hook::Output, Protocol::Udp, 1);
        let mut paced = Paced::new(rate);
        paced.run(scale.window);
        let submitted: Vec<_> = paced
            .arrivals
            .iter()
            .map(|arrival| {
                let slot = &SUBMITTED[arrival.number as usize % SUBMITTED.len()];
                (slot.at.load(Relaxed), slot.flushes.load(Relaxed))
            })
            .collect();
        let mut begun = HashMap::new();
        for ((_, flushes), arrival) in submitted.iter().zip(&paced.arrivals) {
            let first = begun.entry(*flushes).or_insert(u64::MAX);
            *first = arrival.arrived.min(*first);
        }
        let wait = |(at, flushes): &(u64, u64)| begun[flushes].saturating_sub(*at) as f64 / 1000.0;
        let mut waits: Vec<f64> = submitted.iter().map(wait).collect();
        running.stop(|| paced.kick());
        drop(divert);
        waits.sort_by(f64::total_cmp);
        waits
    });
    if waits.is_empty() {
        return;
    }
    for (figure, percent) in [(MEDIAN, 50.0), (P99, 99.0), (P999, 99.9), (MOST, 100.0)] {
        book.note(SECTION, &name(cap, rate), figure, percentile(&waits, percent));
    }
}
