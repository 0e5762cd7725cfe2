//! The table at the end.

use std::time::Duration;

use tokio_nfqueue::Stats;

use super::flows::{Counts, Flow, Latency, Outcome};

pub(crate) fn print(outcome: &Outcome, counts: &Counts, stats: &Stats) {
    println!();
    println!(
        "{:<26}{:>9}{:>9}{:>10}{:>9}{:>11}{:>7}{:>16}",
        "flow", "sent", "queued", "accepted", "dropped", "rewritten", "lost", "throughput"
    );
    for flow in &outcome.flows {
        let decided = counts.of(flow.flow);
        println!(
            "{:<26}{:>9}{:>9}{:>10}{:>9}{:>11}{:>7}{:>16}",
            flow.flow.name(),
            flow.sent,
            decided.queued,
            decided.accepted,
            decided.dropped,
            decided.rewritten,
            flow.lost,
            // The others are sent at a fixed rate.
            if flow.flow == Flow::Tcp { throughput(flow.bytes, flow.took) } else { "-".to_owned() },
        );
    }
    println!(
        "sent counts datagrams, for TCP the {} KiB writes; queued counts packets as the kernel hands them over.",
        Flow::TCP_WRITE / 1024
    );
    if outcome.flows.iter().any(|flow| flow.flow == Flow::Rewritten) {
        println!(
            "One rewritten datagram more than 1000 was sent first, to see whether this kernel takes rewritten ones."
        );
    }
    for note in &outcome.notes {
        println!("{note}");
    }
    println!();
    println!("one-way latency, UDP       median    90 %    99 %     max");
    latency("without a queue", &outcome.unqueued);
    latency("through the queue", &outcome.queued);
    println!();
    let verdicts = stats.decided.accepted + stats.decided.dropped + stats.decided.repeated + stats.decided.requeued;
    println!(
        "{verdicts} verdicts in {} messages and {} system calls: batching saved {} calls ({:.1} verdicts a call)",
        stats.sent.messages,
        stats.sent.sends,
        verdicts.saturating_sub(stats.sent.sends),
        verdicts as f64 / stats.sent.sends.max(1) as f64,
    );
}

fn throughput(bytes: u64, took: Duration) -> String {
    match bytes as f64 * 8.0 / took.as_secs_f64().max(1e-9) {
        bits if bits >= 1e9 => format!("{:.2} Gbit/s", bits / 1e9),
        bits => format!("{:.2} Mbit/s", bits / 1e6),
    }
}

fn latency(name: &str, latency: &Latency) {
    let [median, ninety, ninety_nine, max] = [0.5, 0.9, 0.99, 1.0].map(|share| latency.percentile(share));
    println!("  {name:<22}{median:>6} µs{ninety:>5} µs{ninety_nine:>5} µs{max:>5} µs");
}
