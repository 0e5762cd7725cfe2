//! Throughput, with more packets than any contender can decide.

use std::time::{Duration, Instant};

use super::{
    consumer::{Contender, Job, Running},
    latency::per_send,
    measure::Moment,
    options::Scale,
    summary::Book,
    support,
    traffic::{Sender, abyss, divert},
};
use tokio_nfqueue::{Hook, Protocol};

pub const SECTION: &str = "flood";
pub const RATE: &str = "packets/s";
pub const CPU: &str = "CPU ns/packet";
pub const BATCH: &str = "verdicts/send";

/// Bursts between two readings of the clock.
const LOOK: usize = 4;

/// Sends as fast as possible, and records how many packets were decided.
pub fn measure(contender: &Contender, scale: &Scale, book: &mut Book) {
    let (count, cost, stats) = support::isolated(|| {
        let running = Running::start(contender, &Job::default());
        let _abyss = abyss();
        let divert = divert(Hook::Output, Protocol::Udp, contender.queues);
        let mut sender = Sender::new(64);
        running.go(None);
        send_for(&mut sender, scale.warm_up);
        let (start, before) = (Moment::now(), running.count());
        send_for(&mut sender, scale.window);
        let (count, cost) = (running.count() - before, start.cost());
        let stats = running.stop(|| sender.kick());
        drop(divert);
        (count, cost, stats)
    });
    book.note(SECTION, contender.name, RATE, count as f64 / cost.wall.as_secs_f64());
    book.note(SECTION, contender.name, CPU, cost.cpu().as_nanos() as f64 / count.max(1) as f64);
    if let Some(stats) = stats {
        book.note(SECTION, contender.name, BATCH, per_send(&stats));
    }
}

fn send_for(sender: &mut Sender, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        for _ in 0..LOOK {
            sender.burst();
        }
    }
}
