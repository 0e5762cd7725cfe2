//! Looks for a pattern in the first bytes that TCP clients send. A connection without it leaves the
//! queue; one with it is reset.
//!
//! It makes its own rules: for TCP to one port, sent by this host or received by it. On a router,
//! use `Hook::Forward`. Run it as root: `cargo run --release --example ips -- --port 80 --pattern
//! attack`.
//!
//! Only packets from the client to the server come to the queue. They are compared by their
//! sequence numbers relative to the SYN:
//!
//! - A segment after a gap is dropped. TCP sends it again after the missing one, so no byte passes
//!   unseen.
//! - A retransmission with other bytes than the first time is dropped.
//! - When the pattern is found, the client is reset at once, and the server when it next sends.
//!
//! What it does not do:
//!
//! - It judges no connection whose SYN it has not seen, or that is no longer in its table, because
//!   it was the oldest of too many: such connections are accepted.
//! - Bytes after the first ones pass, and bytes from the server. A connection stays in the queue
//!   until its client has sent enough bytes.
//! - Bytes in packets that the server ignores count, for example those with a wrong checksum. Other
//!   bytes in their place are then dropped. Urgent data is not treated specially.
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    pin::pin,
    process::ExitCode,
};

use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Divert, Error, Hook, Packet, Protocol, Queue, Rule, divert::Match, edit::PacketView};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let to_port = |hook| Rule::new(hook).protocol(Protocol::Tcp).destination_port(options.port);
    let rules = Divert::builder()
        .rule(to_port(Hook::Output))
        // What arrives over loopback has passed the output hook.
        .rule(to_port(Hook::Input).unless(Match::interface("lo")));
    let (mut packets, verdicts) = Queue::builder(Queue::ANY).divert(rules).bind().await?.split();
    eprintln!("ready");

    let mut table = Table::new(options);
    let mut received = Vec::new();
    loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    let verdict = match table.judge(&packet) {
                        Judgement::Undecided => packet.accept(),
                        Judgement::OutOfOrder => packet.drop(),
                        Judgement::Clean => packet.accept().for_flow(),
                        Judgement::Bad => packet.reject().for_flow(),
                    };
                    verdict.submit()?;
                }
            }
            () = &mut end => break,
        }
    }
    let closed = verdicts.close().await;
    let stats = verdicts.stats();
    println!(
        "received {} connections {} clean {} bad {} lost {}",
        stats.received.packets, table.connections, table.clean, table.bad, stats.lost.packets
    );
    closed
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judgement {
    Undecided,
    OutOfOrder,
    Clean,
    Bad,
}

/// What is known of the connections, by the addresses of client and server.
struct Table {
    options: Options,
    known: HashMap<(SocketAddr, SocketAddr), Connection>,
    /// The keys of `known`, the oldest first.
    oldest: VecDeque<(SocketAddr, SocketAddr)>,
    connections: u64,
    clean: u64,
    bad: u64,
}

struct Connection {
    /// The sequence number of the first byte.
    first: u32,
    /// The first bytes, without gaps.
    bytes: Vec<u8>,
    /// The client has ended it.
    ended: bool,
    /// Kept because more packets of the connection may be in the queue already.
    decided: Option<Judgement>,
}

impl Table {
    fn new(options: Options) -> Self {
        let (known, oldest) = (HashMap::new(), VecDeque::new());
        Self { options, known, oldest, connections: 0, clean: 0, bad: 0 }
    }

    fn judge(&mut self, packet: &Packet) -> Judgement {
        // A malformed packet gets no further than the receiver's TCP.
        packet.view().ok().and_then(|view| self.judge_segment(view)).unwrap_or(Judgement::Undecided)
    }

    fn judge_segment(&mut self, view: PacketView<'_>) -> Option<Judgement> {
        let (tcp, payload) = (view.tcp()?, view.payload()?);
        let client = SocketAddr::new(view.source_address(), view.source_port()?);
        let server = SocketAddr::new(view.destination_address(), view.destination_port()?);
        let begin = tcp.sequence_number.wrapping_add(tcp.syn.into());
        if tcp.syn {
            self.begin((client, server), begin);
        }
        let Some(connection) = self.known.get_mut(&(client, server)) else { return Some(Judgement::Clean) };
        if connection.decided.is_some() {
            return connection.decided;
        }
        let offset = begin.wrapping_sub(connection.first) as usize;
        let judgement = connection.add(offset, payload, &self.options);
        match judgement {
            Judgement::OutOfOrder => return Some(judgement),
            Judgement::Undecided => {
                connection.ended |= (tcp.fin || tcp.rst) && offset + payload.len() == connection.bytes.len();
                return Some(judgement);
            }
            Judgement::Clean => self.clean += 1,
            Judgement::Bad => self.bad += 1,
        }
        connection.bytes = Vec::new();
        connection.decided = Some(judgement);
        connection.decided
    }

    /// Begins a connection. Within one that is open, the server ignores a SYN, and so does this.
    fn begin(&mut self, key: (SocketAddr, SocketAddr), first: u32) {
        match self.known.get(&key) {
            Some(known) if known.first == first => return,
            Some(known) if !(known.ended || known.decided.is_some() || known.bytes.is_empty()) => return,
            Some(_) => {}
            None => self.oldest.push_back(key),
        }
        self.connections += 1;
        self.known.insert(key, Connection { first, bytes: Vec::new(), ended: false, decided: None });
        if self.oldest.len() > self.options.connections {
            if let Some(oldest) = self.oldest.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }
}

impl Connection {
    /// Adds the payload of a segment, `offset` bytes after the first byte.
    fn add(&mut self, offset: usize, payload: &[u8], options: &Options) -> Judgement {
        if payload.is_empty() {
            return Judgement::Undecided;
        }
        let Some(seen) = self.bytes.get(offset..) else { return Judgement::OutOfOrder };
        let (again, new) = payload.split_at(payload.len().min(seen.len()));
        if !seen.starts_with(again) {
            return Judgement::OutOfOrder;
        }
        let pattern = options.pattern.as_bytes();
        let searched = self.bytes.len().saturating_sub(pattern.len() - 1);
        self.bytes.extend(new.iter().take(options.bytes - self.bytes.len()));
        if self.bytes[searched..].windows(pattern.len()).any(|bytes| bytes == pattern) {
            Judgement::Bad
        } else if self.bytes.len() == options.bytes {
            Judgement::Clean
        } else {
            Judgement::Undecided
        }
    }
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
        Options { connections: 0, .. } => Err("no connection is remembered".into()),
        _ => Ok(Some(options)),
    }
}
