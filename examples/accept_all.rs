//! Accepts every packet of a queue. The loop receives up to 64 packets in one call and submits
//! their verdicts. The crate sends these together.
//!
//! The queue is in the current network namespace. The rules are yours, for example
//! `nft add rule inet filter output udp dport 9000 queue num 0`. Without nft, run in another
//! terminal: `cargo run -p nfqueue-divert --example rule -- output udp 9000 --queue 0`. As root:
//! `cargo run --release --example accept_all -- --queue 0` (`--help` lists the options).
//!
//! It prints `ready` on standard error once the queue is bound. SIGINT and SIGTERM end it: packets
//! that are queued or arrive meanwhile are accepted, and it prints one line of statistics.

use std::{num::NonZero, pin::pin, process::ExitCode};

use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Action, Error, Queue};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let (mut packets, verdicts) = Queue::builder(options.queue)
        .max_len(options.max_len)
        .copy_range(options.copy_range)
        .gso(options.gso)
        .fail_open(options.fail_open)
        .on_unanswered(Action::Accept)
        .bind()
        .await?
        .split();
    eprintln!("ready");

    let mut received = Vec::new();
    loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                // An error is always fatal: the queue has ended. 0 is its graceful end.
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    packet.accept().submit()?;
                }
            }
            () = &mut end => break,
        }
    }
    let result = verdicts.close().await;
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

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("accept_all: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut runtime = match options.threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if options.threads > 1 {
        runtime.worker_threads(options.threads);
    }
    let result = runtime.enable_all().build().map_err(|error| error.to_string()).and_then(|runtime| {
        // In a task, so that a multi-thread runtime runs it on a worker thread.
        let task = runtime.spawn(run(options));
        runtime.block_on(task).map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("accept_all: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str =
    "usage: accept_all [--queue N] [--max-len N] [--copy-range BYTES] [--no-gso] [--fail-open] [--threads N]

  --queue N           the queue's number (default: 0)
  --max-len N         how many packets the kernel queues (default: 1024)
  --copy-range BYTES  how many bytes of each packet the kernel copies (default: 65531)
  --no-gso            the kernel splits GSO packets into segments before it queues them
  --fail-open         the kernel accepts new packets while the queue is full
  --threads N         worker threads of the runtime (default: 1)";

struct Options {
    queue: u16,
    max_len: u32,
    copy_range: u32,
    gso: bool,
    fail_open: bool,
    threads: usize,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { queue: 0, max_len: 1024, copy_range: 65_531, gso: true, fail_open: false, threads: 1 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("queue") => options.queue = arguments.value()?.parse()?,
            Long("max-len") => options.max_len = arguments.value()?.parse()?,
            Long("copy-range") => options.copy_range = arguments.value()?.parse::<NonZero<u32>>()?.get(),
            Long("no-gso") => options.gso = false,
            Long("fail-open") => options.fail_open = true,
            Long("threads") => {
                options.threads = arguments.value()?.parse_with(|text| match text.parse() {
                    Ok(0) => Err("at least one thread is needed".to_owned()),
                    Ok(threads) => Ok(threads),
                    Err(error) => Err(format!("{error:#}")),
                })?;
            }
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Some(options))
}
