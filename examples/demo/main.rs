//! The whole crate at work, isolated in network namespaces of its own: no set-up, no rule of yours is touched.
//!
//! A TCP transfer, a UDP flow, a blocked port and a rewritten payload go from one namespace to another, through a queue.
//! Four tasks decide the packets out of order. At the end a table tells what became of them.

use std::{process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, interval},
};
use tokio_nfqueue::{Divert, Error, ErrorKind, Packet, PacketStream, Queue, Stats, VerdictSink};

use self::flows::{Counts, Flow, Flows, Outcome};

mod flows;
mod report;
mod rewrite;
#[path = "../../tests/support/mod.rs"]
mod support;

/// Tasks that decide packets.
const TASKS: usize = 4;

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("demo: {sentence}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<(), String> {
    if let Some(argument) = std::env::args().nth(1) {
        return Err(format!("takes no arguments, not even {argument:?}"));
    }
    // While there is one thread: an ordinary user becomes root of a user namespace.
    support::enter()?;
    support::isolated(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| format!("cannot start a runtime: {error}"))?;
        runtime.block_on(run())
    })
}

async fn run() -> Result<(), String> {
    // Checked before anything else is set up, so that what is missing is said first.
    let queue = Queue::builder(0).bind().map_err(explain)?;
    let peer = support::veth();
    let flows = Flows::start(&peer).map_err(|error| format!("cannot open the demo's sockets: {error}"))?;

    eprintln!("one-way latency without a queue ...");
    let unqueued = flows.latency(2_000).await;

    let divert = Divert::builder().rules(flows::rules(&peer)).install().map_err(explain)?;
    let (packets, verdicts) = queue.split();
    let counts = Arc::new(Counts::default());
    let decide = tokio::spawn(decide(packets, verdicts.clone(), Arc::clone(&counts)));

    let outcome = flows.run(&counts, unqueued).await?;
    divert.remove_rules().map_err(explain)?;
    verdicts.close().await.map_err(explain)?;
    let interrupted = decide.await.map_err(|error| format!("the deciding task failed: {error}"))?;
    divert.close().map_err(explain)?;
    if interrupted {
        return Err("interrupted".to_owned());
    }
    report::print(&outcome, &counts, &verdicts.stats());
    check(&outcome, &verdicts.stats())
}

/// The loop that the crate is made for: packets, a timer and Ctrl-C in one `select!`. Tells whether it was Ctrl-C.
async fn decide(mut packets: PacketStream, verdicts: VerdictSink, counts: Arc<Counts>) -> bool {
    let tasks: Vec<_> = (0..TASKS).map(|_| spawn_task(verdicts.clone(), Arc::clone(&counts))).collect();
    let started = Instant::now();
    let mut progress = interval(Duration::from_secs(1));
    progress.tick().await;
    let mut next = 0;
    loop {
        tokio::select! {
            packet = packets.recv() => match packet {
                Some(Ok(packet)) => {
                    let flow = Flow::of(packet.payload());
                    counts.queued(flow);
                    // A TCP stream wants its order kept, so it stays with one task; the others go round.
                    let task = if flow == Some(Flow::Tcp) { 0 } else { next = (next + 1) % TASKS; next };
                    // A task that is gone drops the packet, and so gives it the answer for the unanswered.
                    let _ = tasks[task].send((flow, packet));
                }
                Some(Err(error)) => eprintln!("demo: {error}"),
                None => return false,
            },
            _ = progress.tick() => {
                let Stats { received, in_flight, .. } = verdicts.stats();
                eprintln!("{:>3} s: {received} packets queued, {in_flight} in flight", started.elapsed().as_secs());
            }
            _ = tokio::signal::ctrl_c() => {
                let _ = verdicts.close().await;
                return true;
            }
        }
    }
}

fn spawn_task(verdicts: VerdictSink, counts: Arc<Counts>) -> mpsc::UnboundedSender<(Option<Flow>, Packet)> {
    // Unbounded, yet it holds no more than the kernel's queue does.
    let (sender, mut receiver) = mpsc::unbounded_channel::<(Option<Flow>, Packet)>();
    tokio::spawn(async move {
        while let Some((flow, packet)) = receiver.recv().await {
            // Something to wait for, of varying length: packets of different tasks overtake each other.
            for _ in 0..packet.id().get() % 3 {
                tokio::task::yield_now().await;
            }
            let verdict = match flow {
                Some(Flow::Blocked) => packet.drop(),
                Some(Flow::Rewritten) => match rewrite::rewritten(&packet) {
                    Ok(payload) => packet.accept().payload(payload),
                    Err(error) => {
                        eprintln!("demo: {error}");
                        packet.drop()
                    }
                },
                _ => packet.accept(),
            };
            counts.decided(flow, &verdict);
            if let Err(error) = verdicts.submit(verdict) {
                eprintln!("demo: {error}");
            }
        }
    });
    sender
}

/// The demo has failed if a packet is unaccounted for.
fn check(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    let lost: u64 = outcome.flows.iter().map(|flow| flow.lost).sum();
    if lost > 0 || stats.refused > 0 {
        return Err(format!("{lost} packets were lost and {} verdicts refused", stats.refused));
    }
    Ok(())
}

fn explain(error: Error) -> String {
    match error.kind() {
        ErrorKind::Unsupported => format!("this kernel has no NFQUEUE, or not all of it: {error}"),
        _ => error.to_string(),
    }
}
