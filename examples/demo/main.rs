//! All of the crate at work: a TCP transfer, a UDP flow, a blocked port and a rewritten payload go
//! from one network namespace to another, through a queue. Four tasks decide the packets out of
//! order. A table at the end counts what happened to them.
//!
//! The namespaces are the demo's own. It needs no set-up, and changes no rule of yours. Run it as
//! root or as an ordinary user: `cargo run --release --example demo`

use std::{process::ExitCode, sync::Arc, time::Duration};

use nfqueue_testbed as testbed;
use tokio::{
    sync::mpsc,
    time::{Instant, interval},
};
use tokio_nfqueue::{Divert, Error, ErrorKind, Packet, PacketStream, Queue, Stats, VerdictSink};

use self::flows::{Counts, Flow, Flows, Outcome};

mod flows;
mod report;
mod rewrite;

/// The main loop: packets, a timer and Ctrl-C in one `select!`. Returns whether Ctrl-C ended it.
async fn decide(mut packets: PacketStream, verdicts: VerdictSink, counts: Arc<Counts>) -> bool {
    let tasks: Vec<_> = (0..TASKS).map(|_| spawn_task(Arc::clone(&counts))).collect();
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
                    // One task gets all of the TCP stream, to keep its order. The rest is spread.
                    let task = if flow == Some(Flow::Tcp) { 0 } else { next = (next + 1) % TASKS; next };
                    // If that task has ended, this drops the packet: it gets the default action.
                    let _ = tasks[task].send((flow, packet));
                }
                Some(Err(error)) => eprintln!("demo: {error}"),
                None => return false,
            },
            _ = progress.tick() => {
                let Stats { received, held, .. } = verdicts.stats();
                let (received, in_flight) = (received.packets, held.in_flight);
                eprintln!("{:>3} s: {received} packets queued, {in_flight} in flight", started.elapsed().as_secs());
            }
            _ = tokio::signal::ctrl_c() => {
                let _ = verdicts.close().await;
                return true;
            }
        }
    }
}

/// A task that decides the packets it is sent.
fn spawn_task(counts: Arc<Counts>) -> mpsc::UnboundedSender<(Option<Flow>, Packet)> {
    // Unbounded, but it holds no more packets than the kernel's queue.
    let (sender, mut receiver) = mpsc::unbounded_channel::<(Option<Flow>, Packet)>();
    tokio::spawn(async move {
        while let Some((flow, packet)) = receiver.recv().await {
            // A wait of varying length, so that packets of different tasks overtake each other.
            for _ in 0..packet.id().get() % 3 {
                tokio::task::yield_now().await;
            }
            let verdict = match flow {
                Some(Flow::Blocked) => packet.drop(),
                Some(Flow::Rewritten) => match rewrite::rewritten(&packet) {
                    Ok(payload) => packet.accept().payload(payload),
                    Err(error) => {
                        eprintln!("demo: {error:#}");
                        packet.drop()
                    }
                },
                _ => packet.accept(),
            };
            counts.decided(flow, &verdict);
            if let Err(error) = verdict.submit() {
                eprintln!("demo: {error:#}");
            }
        }
    });
    sender
}

async fn run() -> Result<(), String> {
    // First of all, so that a missing privilege or kernel feature is reported at once.
    let queue = Queue::builder(0).bind().await.map_err(explain)?;
    let peer = testbed::veth();
    let flows = Flows::start(&peer).map_err(|error| format!("cannot open the demo's sockets: {error}"))?;

    eprintln!("one-way latency without a queue ...");
    let unqueued = flows.latency(2_000).await;

    let divert = Divert::install(&Divert::builder().rules(flows::rules(&peer))).await.map_err(explain)?;
    let (packets, verdicts) = queue.split();
    let counts = Arc::new(Counts::default());
    let decide = tokio::spawn(decide(packets, verdicts.clone(), Arc::clone(&counts)));

    let outcome = flows.run(&counts, unqueued).await?;
    divert.remove_rules().await.map_err(explain)?;
    verdicts.close().await.map_err(explain)?;
    let interrupted = decide.await.map_err(|error| format!("the deciding task failed: {error}"))?;
    divert.close().await.map_err(explain)?;
    if interrupted {
        return Err("interrupted".to_owned());
    }
    report::print(&outcome, &counts, &verdicts.stats());
    check(&outcome, &verdicts.stats())?;
    println!("\nAll is well: no packet was lost, and the kernel took every verdict.");
    Ok(())
}

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
    // Before any other thread starts: an ordinary user becomes root of a user namespace.
    testbed::enter()?;
    testbed::isolated(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| format!("cannot start a runtime: {error}"))?;
        runtime.block_on(run())
    })
}

/// How many tasks decide packets.
const TASKS: usize = 4;

/// The demo fails if a packet is lost or a verdict is refused.
fn check(outcome: &Outcome, stats: &Stats) -> Result<(), String> {
    let lost: u64 = outcome.flows.iter().map(|flow| flow.lost).sum();
    if lost > 0 || stats.sent.refused > 0 {
        return Err(format!("{lost} packets were lost and {} verdicts refused", stats.sent.refused));
    }
    Ok(())
}

fn explain(error: Error) -> String {
    match error.kind() {
        ErrorKind::Unsupported => format!("this kernel has no NFQUEUE, or not all of it: {error}"),
        _ => error.to_string(),
    }
}
