//! Accepts every packet of a queue in the present network namespace. The rules are yours, say
//! `nft add rule inet filter output udp dport 9000 queue num 0`.
//!
//! ```text
//! accept_all [--queue N] [--max-len N] [--copy-range BYTES] [--no-gso] [--fail-open] [--threads N]
//! ```
//!
//! Prints `ready` on standard error once the queue is bound. SIGINT and SIGTERM end it: the queue is drained, what arrives
//! meanwhile passes, and one line of statistics is printed.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Action, Error, Queue};

const USAGE: &str =
    "usage: accept_all [--queue N] [--max-len N] [--copy-range BYTES] [--no-gso] [--fail-open] [--threads N]

  --queue N           the queue's number (0)
  --max-len N         packets the kernel queues (1024)
  --copy-range BYTES  bytes of each packet to copy (65531)
  --no-gso            have the kernel cut super-packets into segments
  --fail-open         pass packets unseen when the queue is full
  --threads N         worker threads of the runtime (1)";

struct Options {
    queue: u16,
    max_len: u32,
    copy_range: u32,
    gso: bool,
    fail_open: bool,
    threads: usize,
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
        // On a task, so that a runtime of several threads runs it on one of them.
        let task = runtime.spawn(run(options));
        runtime.block_on(task).map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("accept_all: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Error> {
    // Handlers first: a signal right after `ready` must find them.
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    let (mut packets, verdicts) = Queue::builder(options.queue)
        .max_len(options.max_len)
        .copy_range(options.copy_range)
        .gso(options.gso)
        .fail_open(options.fail_open)
        .on_unanswered(Action::Accept)
        .bind()?
        .split();
    eprintln!("ready");

    let mut received = Vec::new();
    loop {
        tokio::select! {
            // An error here is the end of the queue, nothing less.
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    packet.accept().submit()?;
                }
            }
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    let result = verdicts.close().await;
    let stats = verdicts.stats();
    println!(
        "received {} accepted {} lost {} gone {} refused {} verdict messages {} sends {}",
        stats.received, stats.accepted, stats.lost, stats.gone_at_least, stats.refused, stats.messages, stats.sends
    );
    result
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { queue: 0, max_len: 1024, copy_range: 65_531, gso: true, fail_open: false, threads: 1 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("queue") => options.queue = arguments.value()?.parse()?,
            Long("max-len") => options.max_len = arguments.value()?.parse()?,
            Long("copy-range") => options.copy_range = arguments.value()?.parse()?,
            Long("no-gso") => options.gso = false,
            Long("fail-open") => options.fail_open = true,
            Long("threads") => {
                options.threads = arguments.value()?.parse_with(|text| match text.parse() {
                    Ok(0) => Err("at least one thread is needed".to_owned()),
                    Ok(threads) => Ok(threads),
                    Err(error) => Err(format!("{error}")),
                })?;
            }
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Some(options))
}
