//! Looks for a pattern in the first bytes that TCP clients send. A connection without it leaves the
//! queue; one with it is reset.
//!
//! It makes its own rules: for TCP to and from one port, sent by this host or received by it. On a
//! router, use `Hook::Forward`. Run it as root: `cargo run --release --example ips -- --port 80
//! --pattern attack`.
//!
//! The bytes come from `nfqueue_inspect::Connections`, which says of each segment whether it may
//! reach the server. Packets of servers come to the queue, too: they prove which bytes have
//! arrived, so a connection leaves the queue only when no others can take their place.
//!
//! - A segment after a gap is dropped. TCP sends it again after the missing one, so no byte passes
//!   unseen.
//! - A retransmission with other bytes than the first time is dropped.
//! - Nothing passes behind the end of a client's stream, in case that the server has ignored that.
//! - A client that wants several paths (MPTCP) has no answer until it tries without.
//! - When the pattern is found, the client is reset at once, and the server when it next sends.
//!
//! What it does not do:
//!
//! - It judges no connection whose SYN it has not seen, or that is no longer in its table, because
//!   it was the oldest of too many, or undecided for an hour: such connections are accepted.
//! - Bytes after the first ones pass, and bytes from the server. A connection stays in the queue
//!   until its client has sent enough bytes, or has ended its stream.
//! - A client that resets an undecided connection cannot use its port again while the table has the
//!   connection: the server may have ignored the reset.
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{
    pin::pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use nfqueue_inspect::{Connections, Decision, Limits, Progress, Segment};
use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Divert, Error, Hook, Packet, Protocol, Queue, Rule, Verdict, divert::Match};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let output = Rule::new(Hook::Output).protocol(Protocol::Tcp);
    // What arrives over loopback has passed the output hook.
    let input = Rule::new(Hook::Input).protocol(Protocol::Tcp).unless(Match::interface("lo"));
    let rules = Divert::builder()
        .rule(output.clone().destination_port(options.port))
        .rule(output.source_port(options.port))
        .rule(input.clone().destination_port(options.port))
        .rule(input.source_port(options.port));
    let (mut packets, verdicts) = Queue::builder(Queue::ANY).divert(rules).bind().await?.split();
    eprintln!("ready");

    let mut search = Search::new(options);
    let mut received = Vec::new();
    loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    search.decide(packet).submit()?;
                }
            }
            () = &mut end => break,
        }
    }
    let closed = verdicts.close().await;
    let (stats, connections) = (verdicts.stats(), search.connections.stats().connections);
    println!(
        "received {} connections {connections} clean {} bad {} lost {}",
        stats.received.packets, search.clean, search.bad, stats.lost.packets
    );
    closed
}

struct Search {
    pattern: Vec<u8>,
    /// How many bytes of a client are searched.
    bytes: usize,
    connections: Connections,
    clean: u64,
    bad: u64,
}

impl Search {
    fn new(options: Options) -> Self {
        let Options { pattern, bytes, connections, .. } = options;
        let limits = Limits::default()
            .both_directions(true)
            .connections(connections)
            .bytes_per_connection(bytes)
            .bytes(connections.saturating_mul(bytes))
            .lifetime(LIFETIME);
        Self { pattern: pattern.into(), bytes, connections: Connections::new(limits), clean: 0, bad: 0 }
    }

    fn decide(&mut self, packet: Packet) -> Verdict {
        let now = Instant::now();
        let Ok(segment) = Segment::parse(packet.payload()) else { return packet.drop() };
        let first = match self.connections.push(now, &segment) {
            Progress::Bytes(first) => first,
            Progress::NoData | Progress::Allowed { settled: false } => return packet.accept(),
            Progress::Allowed { settled: true } | Progress::Unknown => return packet.accept().for_flow(),
            Progress::Denied => return packet.reject().for_flow(),
            // Not what the server may get.
            _ => return packet.drop(),
        };
        // The pattern may have begun in earlier segments.
        let searched = first.bytes.len().saturating_sub(segment.payload.len() + self.pattern.len() - 1);
        let is_bad = first.bytes[searched..].windows(self.pattern.len()).any(|bytes| bytes == self.pattern);
        let is_complete = first.bytes.len() == self.bytes;
        if !(is_bad || is_complete || first.ended) {
            return packet.accept();
        }
        self.bad += u64::from(is_bad);
        self.clean += u64::from(is_complete && !is_bad);
        let decision = if is_bad { Decision::Deny } else { Decision::Allow };
        self.connections.decide(now, &segment.connection(), decision);
        if is_bad { packet.reject().for_flow() } else { packet.accept() }
    }
}

/// A client that waits for longer is no longer judged.
const LIFETIME: Duration = Duration::from_secs(3600);

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
            eprintln!("ips: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ips: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: ips --pattern TEXT [--port P] [--bytes N] [--connections N]

  --pattern TEXT   what clients must not send
  --port P         the destination port of the connections (default: 80)
  --bytes N        how many first bytes of a client are searched (default: 4096)
  --connections N  how many connections are remembered, N bytes each (default: 4096)";

/// More are not stored by `nfqueue_inspect`.
const MOST_BYTES: usize = 1 << 20;

struct Options {
    pattern: String,
    port: u16,
    bytes: usize,
    connections: usize,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { pattern: String::new(), port: 80, bytes: 4096, connections: 4096 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("pattern") => options.pattern = arguments.value()?.string()?,
            Long("port") => options.port = arguments.value()?.parse()?,
            Long("bytes") => options.bytes = arguments.value()?.parse()?,
            Long("connections") => options.connections = arguments.value()?.parse()?,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    match &options {
        Options { pattern, .. } if pattern.is_empty() => Err("there is no pattern".into()),
        Options { pattern, bytes, .. } if pattern.len() > *bytes => {
            Err("the pattern is longer than the bytes that are searched".into())
        }
        Options { bytes, .. } if *bytes > MOST_BYTES => Err("more than 1 MiB cannot be searched".into()),
        Options { connections: 0, .. } => Err("no connection is remembered".into()),
        _ => Ok(Some(options)),
    }
}
