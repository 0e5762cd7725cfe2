//! Accepts every packet of a queue, out of order: tasks hold packets for random times. Each task
//! decides its own packets through a clone of the sink, whatever order they arrived in.
//!
//! The queue is in the current network namespace. The rules are yours, for example
//! `nft add rule inet filter output udp dport 9000 queue num 0`. Then run, as root:
//! `cargo run --release --example out_of_order -- --queue 0` (`--help` lists the options).
//!
//! It prints `ready` on standard error once the queue is bound. SIGINT and SIGTERM end it: packets
//! that are queued or arrive meanwhile are accepted, and it prints one line of statistics.

use std::{pin::pin, process::ExitCode, time::Duration};

use futures::TryStreamExt;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_nfqueue::{Action, Error, Packet, Queue};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let queue = Queue::builder(options.queue).gso(options.gso).on_unanswered(Action::Accept).bind().await?;
    let (mut packets, verdicts) = queue.split();
    eprintln!("ready");

    let mut tasks = JoinSet::new();
    let holders = start_holders(&mut tasks, options);
    let mut next = 0;
    loop {
        tokio::select! {
            packet = packets.try_next() => {
                // An error here is always fatal: the queue has ended.
                let Some(packet) = packet? else { break };
                next = (next + 1) % holders.len();
                // If that task has ended, this drops the packet, which then gets the default
                // action.
                let _ = holders[next].send(packet);
            }
            () = &mut end => break,
        }
    }
    // Without senders the tasks decide the packets that they hold, and end.
    drop(holders);
    let result = verdicts.close().await;
    tasks.join_all().await;
    let stats = verdicts.stats();
    println!(
        "received {} accepted {} lost {} gone {} refused {} verdict messages {} sends {}",
        stats.received.packets,
        stats.decided.accepted,
        stats.lost.packets,
        stats.sent.gone_at_least,
        stats.sent.refused,
        stats.sent.messages,
        stats.sent.sends
    );
    result
}

/// Holds each packet for a random time and then accepts it.
async fn hold(mut receiver: mpsc::UnboundedReceiver<Packet>, hold_us: u64, mut seed: u64) {
    let mut held: Vec<(Instant, Packet)> = Vec::new();
    loop {
        let soonest = held.iter().map(|(until, _)| *until).min();
        tokio::select! {
            packet = receiver.recv() => match packet {
                Some(packet) => {
                    let hold = Duration::from_micros(random(&mut seed) % (hold_us + 1));
                    held.push((Instant::now() + hold, packet));
                }
                None => break,
            },
            () = sleep_until(soonest.unwrap_or_else(Instant::now)), if soonest.is_some() => {}
        }
        let now = Instant::now();
        while let Some(index) = held.iter().position(|(until, _)| *until <= now) {
            let (_, packet) = held.swap_remove(index);
            let _ = packet.accept().submit();
        }
    }
    for (_, packet) in held {
        let _ = packet.accept().submit();
    }
}

/// Starts the tasks. Their channels are unbounded, but hold no more packets than the kernel's
/// queue.
fn start_holders(tasks: &mut JoinSet<()>, options: Options) -> Vec<mpsc::UnboundedSender<Packet>> {
    let start = |number: usize| {
        let (sender, receiver) = mpsc::unbounded_channel();
        let seed = options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number as u64);
        tasks.spawn(hold(receiver, options.hold_us, seed));
        sender
    };
    (1..=options.tasks).map(start).collect()
}

/// Ends with SIGINT or SIGTERM. The handlers are installed when this returns, so that a signal
/// right after `ready` is not missed.
fn end_signal() -> impl Future<Output = ()> {
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("out_of_order: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("out_of_order: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: out_of_order [--queue N] [--tasks T] [--hold-us H] [--seed S] [--no-gso]

  --queue N    the queue's number (default: 0)
  --tasks T    how many tasks decide packets (default: 8)
  --hold-us H  the longest time that a packet is held, in microseconds (default: 1000)
  --seed S     the seed of the random times (default: 1)
  --no-gso     the kernel splits GSO packets into segments before it queues them";

#[derive(Clone, Copy)]
struct Options {
    queue: u16,
    tasks: usize,
    hold_us: u64,
    seed: u64,
    gso: bool,
}

/// Xorshift64*: the same numbers for the same seed.
fn random(state: &mut u64) -> u64 {
    *state = (*state).max(1);
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { queue: 0, tasks: 8, hold_us: 1000, seed: 1, gso: true };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("queue") => options.queue = arguments.value()?.parse()?,
            Long("tasks") => {
                options.tasks = arguments.value()?.parse_with(|text| match text.parse() {
                    Ok(0) => Err("at least one task is needed".to_owned()),
                    Ok(tasks) => Ok(tasks),
                    Err(error) => Err(format!("{error:#}")),
                })?;
            }
            Long("hold-us") => options.hold_us = arguments.value()?.parse::<u32>()?.into(),
            Long("seed") => options.seed = arguments.value()?.parse()?,
            Long("no-gso") => options.gso = false,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Some(options))
}
