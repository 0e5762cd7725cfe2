//! Accepts every packet of a queue, out of order: tasks hold packets for random times and decide each by itself.
//!
//! ```text
//! out_of_order [--queue N] [--tasks T] [--hold-us H] [--seed S]
//! ```
//!
//! Prints `ready` on standard error once the queue is bound. SIGINT and SIGTERM end it: the queue is drained, what arrives
//! meanwhile passes, and one line of statistics is printed.

use std::{process::ExitCode, time::Duration};

use futures::TryStreamExt;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_nfqueue::{Action, Error, Packet, Queue, VerdictSink};

const USAGE: &str = "usage: out_of_order [--queue N] [--tasks T] [--hold-us H] [--seed S]

  --queue N    the queue's number (0)
  --tasks T    tasks that decide packets (8)
  --hold-us H  the longest time a packet is held, in microseconds (1000)
  --seed S     where the random holds start (1)";

#[derive(Clone, Copy)]
struct Options {
    queue: u16,
    tasks: usize,
    hold_us: u64,
    seed: u64,
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
            eprintln!("out_of_order: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Error> {
    // Handlers first: a signal right after `ready` must find them.
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    let (mut packets, verdicts) = Queue::builder(options.queue).on_unanswered(Action::Accept).bind()?.split();
    eprintln!("ready");

    // Unbounded, yet they hold no more than the kernel's queue does.
    let (holders, receivers): (Vec<_>, Vec<_>) = (0..options.tasks).map(|_| mpsc::unbounded_channel()).unzip();
    let mut tasks = JoinSet::new();
    for (receiver, number) in receivers.into_iter().zip(1..) {
        let seed = options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number);
        tasks.spawn(hold(receiver, verdicts.clone(), options.hold_us, seed));
    }
    let mut next = 0;
    loop {
        tokio::select! {
            packet = packets.try_next() => {
                // An error here is the end of the queue, nothing less.
                let Some(packet) = packet? else { break };
                next = (next + 1) % holders.len();
                // A task that is gone drops the packet, which then gets the default action.
                let _ = holders[next].send(packet);
            }
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    // The tasks decide what they hold, and end.
    drop(holders);
    let result = verdicts.close().await;
    tasks.join_all().await;
    let stats = verdicts.stats();
    println!(
        "received {} accepted {} lost {} gone {} refused {} verdict messages {} sends {}",
        stats.received, stats.accepted, stats.lost, stats.gone_at_least, stats.refused, stats.messages, stats.sends
    );
    result
}

/// Holds each packet for a random time and accepts it then, whatever came before it.
async fn hold(mut receiver: mpsc::UnboundedReceiver<Packet>, verdicts: VerdictSink, hold_us: u64, mut seed: u64) {
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
        for (_, packet) in held.extract_if(.., |(until, _)| *until <= now) {
            let _ = verdicts.submit(packet.accept());
        }
    }
    for (_, packet) in held {
        let _ = verdicts.submit(packet.accept());
    }
}

/// Xorshift64*: good enough for holds, and the same for the same seed.
fn random(state: &mut u64) -> u64 {
    *state = (*state).max(1);
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { queue: 0, tasks: 8, hold_us: 1000, seed: 1 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("queue") => options.queue = arguments.value()?.parse()?,
            Long("tasks") => {
                options.tasks = arguments.value()?.parse_with(|text| match text.parse() {
                    Ok(0) => Err("at least one task is needed".to_owned()),
                    Ok(tasks) => Ok(tasks),
                    Err(error) => Err(format!("{error}")),
                })?;
            }
            Long("hold-us") => options.hold_us = arguments.value()?.parse::<u32>()?.into(),
            Long("seed") => options.seed = arguments.value()?.parse()?,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Some(options))
}
