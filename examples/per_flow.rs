//! Accepts each connection by its first packet: the kernel accepts the rest, which does not come to
//! the queue.
//!
//! It makes its own rules, for UDP and TCP to one port at the output hook. Run it as root:
//! `cargo run --release --example per_flow -- --port 9999`. With `--no-flow` it accepts packet by
//! packet, for comparison.
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{pin::pin, process::ExitCode};

use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Action, Divert, Error, Hook, Protocol, Queue, Rule};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let to_port = |protocol| Rule::new(Hook::Output).protocol(protocol).destination_port(options.port);
    let rules = Divert::builder().rule(to_port(Protocol::Udp)).rule(to_port(Protocol::Tcp));
    let queue = Queue::builder(Queue::ANY).on_unanswered(Action::Accept).divert(rules).bind().await?;
    let (mut packets, verdicts) = queue.split();
    eprintln!("ready");

    let mut received = Vec::new();
    loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    let verdict = packet.accept();
                    let verdict = if options.flow { verdict.for_flow() } else { verdict };
                    verdict.submit()?;
                }
            }
            () = &mut end => break,
        }
    }
    let closed = verdicts.close().await;
    let stats = verdicts.stats();
    println!(
        "received {} accepted {} lost {} gone {} refused {}",
        stats.received.packets,
        stats.decided.accepted,
        stats.lost.packets,
        stats.sent.gone_at_least,
        stats.sent.refused
    );
    closed
}

/// Ends with SIGINT or SIGTERM. The handlers are installed when this returns.
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

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("per_flow: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("per_flow: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: per_flow [--port P] [--no-flow]

  --port P   the destination port of the connections (default: 9999)
  --no-flow  every packet comes to the queue";

struct Options {
    port: u16,
    flow: bool,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { port: 9999, flow: true };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("port") => options.port = arguments.value()?.parse()?,
            Long("no-flow") => options.flow = false,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Some(options))
}
