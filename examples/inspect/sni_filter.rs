//! Blocks TLS and QUIC by the server's name, which the client sends in its first bytes. A blocked
//! connection is reset before the server gets the name. The others leave the queue.
//!
//! Run it as root: `cargo run --release --example sni_filter -- --block example.com`. Then
//! `curl https://www.example.com/` says "Connection reset by peer". It makes its own rules, for
//! what this host sends. On a router, `--clients eth1` filters what the hosts behind this interface
//! send, and `--client 192.0.2.7` what the host with this address sends.
//!
//! Both directions of TCP come to the queue, because the packets of servers prove what they have
//! received: `nfqueue_inspect` then promises that a server gets the bytes that were judged,
//! whatever the client does with segments. A segment after a gap is dropped, and TCP sends it again
//! after the missing one. A retransmission with other bytes than the first time is dropped.
//!
//! | the client sends | it gets |
//! |---|---|
//! | a hello with a blocked name, or one below it, also the second hello that a server has asked for | a reset, as does the server when it next sends |
//! | a hello that cannot be read, or that is cut off | the same |
//! | HTTP without TLS | the same for a blocked host |
//! | a hello without a name, or another protocol | its connection: there is no name to block |
//! | TCP with several paths (MPTCP) | no answer: it sends the SYN again without |
//! | TCP that began before this program did, or has sent no hello for ten minutes | a reset: what was sent is unknown |
//! | QUIC with a blocked name, or of another version than 1 and 2 | an ICMP error, or nothing: it takes TCP then, some clients only after their own time-out |
//! | other UDP to this port, also QUIC that began before | the same |
//!
//! What it does not do:
//!
//! - With an encrypted hello (ECH) it sees the name of the provider only, and blocks by that. The
//!   keys for it come from DNS: to prevent it, filter HTTPS records there.
//! - On a router, servers must be behind another interface than their clients.
//! - Packets of QUIC clients do not leave the queue: the next connection may use the same ports.
//! - It does not know servers by their addresses. A client may reach one under another name.
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{
    net::IpAddr,
    pin::pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use nfqueue_inspect::{Connection, Decision, Hint, Limits, Name, Seen, ServerNames, Unparsed, quic::QuicNames};
use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{
    Divert, Error, Hook, Packet, Protocol, Queue, Rule, Verdict,
    divert::{DivertBuilder, Match},
};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    // Datagrams are judged one by one, not as the kernel has put them together.
    let queue = Queue::builder(Queue::ANY).gso(false).divert(rules(&options)).bind().await?;
    let (mut packets, verdicts) = queue.split();
    eprintln!("ready");

    let mut filter = Filter::new(options.blocked);
    let mut received = Vec::new();
    loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    filter.decide(packet).submit()?;
                }
            }
            () = &mut end => break,
        }
    }
    let closed = verdicts.close().await;
    let stats = verdicts.stats();
    println!(
        "received {} allowed {} blocked {} lost {}",
        stats.received.packets, filter.allowed, filter.blocked, stats.lost.packets
    );
    closed
}

/// TCP in both directions, and QUIC from clients.
fn rules(options: &Options) -> DivertBuilder {
    let forwarded = || Rule::new(Hook::Forward);
    // What clients send, and what servers send to them, not to others: connections whose clients'
    // packets do not come are unknown, and would be reset.
    let directions = match &options.clients {
        Clients::ThisHost => vec![(Rule::new(Hook::Output), Rule::new(Hook::Input))],
        Clients::Behind(interface) => {
            let server = forwarded().when(Match::output_interface(interface));
            // Servers are not behind the interface, so clients cannot send packets in their names.
            vec![(forwarded().interface(interface), server.unless(Match::input_interface(interface)))]
        }
        Clients::Hosts(addresses) => {
            let of_host = |&address: &IpAddr| {
                let length = if address.is_ipv4() { 32 } else { 128 };
                (forwarded().source_address(address, length), forwarded().destination_address(address, length))
            };
            addresses.iter().map(of_host).collect()
        }
    };
    Divert::builder().rules(directions.into_iter().flat_map(|(client, server)| {
        [
            client.clone().protocol(Protocol::Tcp).destination_port(options.port),
            server.protocol(Protocol::Tcp).source_port(options.port),
            client.protocol(Protocol::Udp).destination_port(options.port),
        ]
    }))
}

struct Filter {
    tcp: ServerNames,
    quic: QuicNames,
    names: Vec<Name>,
    allowed: u64,
    blocked: u64,
}

impl Filter {
    fn new(names: Vec<Name>) -> Self {
        let limits = Limits::default().both_directions(true).lifetime(LIFETIME);
        Self { tcp: ServerNames::new(limits), quic: QuicNames::new(limits), names, allowed: 0, blocked: 0 }
    }

    fn decide(&mut self, packet: Packet) -> Verdict {
        let Self { tcp, quic, names, allowed, blocked } = self;
        let mut judge = |_: &Connection, seen: &Seen| {
            let is_blocked = |name: &Name| names.iter().any(|blocked| name.is_in(blocked.as_str()));
            if seen.is_doubtful() || seen.name().is_some_and(is_blocked) {
                *blocked += 1;
                Decision::Deny
            } else {
                *allowed += 1;
                Decision::Allow
            }
        };
        // Servers are not behind the interface of their client: a client speaks for its server.
        if packet.interface_out().is_some() && packet.interface_in() == packet.interface_out() {
            return packet.drop();
        }
        let now = Instant::now();
        match tcp.push(now, packet.payload(), &mut judge) {
            Hint::Undecided | Hint::Allowed { settled: false } => packet.accept(),
            Hint::Allowed { settled: true } => packet.accept().for_flow(),
            Hint::Denied => packet.reject().for_flow(),
            // The client need not wait until it tries again.
            Hint::Unknown => packet.reject(),
            Hint::Unparsed(Unparsed::OtherProtocol) => match quic.push(now, packet.payload(), judge) {
                hint if hint.may_pass() => packet.accept(),
                // Not for the flow: other connections may use the same ports.
                Hint::Denied | Hint::Unknown => packet.reject(),
                _ => packet.drop(),
            },
            // TCP sends it again if it was honest.
            _ => packet.drop(),
        }
    }
}

/// As long as the kernel remembers a denial. The default is shorter than some connections are idle
/// that cannot leave the queue: those on ports that were used shortly before (`guide::flows`).
const LIFETIME: Duration = Duration::from_secs(600);

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
            eprintln!("sni_filter: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sni_filter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: sni_filter --block NAME ... [--port P] [--clients INTERFACE | --client ADDRESS ...]

  --block NAME         a blocked name, with all names below it
  --port P             the port of the servers, TCP and UDP (default: 443)
  --clients INTERFACE  filter what comes from this interface and is forwarded
  --client ADDRESS     filter what the host with this address sends and is forwarded
                       (default: what the host of the filter sends)";

struct Options {
    blocked: Vec<Name>,
    port: u16,
    clients: Clients,
}

enum Clients {
    ThisHost,
    /// The hosts behind an interface.
    Behind(String),
    Hosts(Vec<IpAddr>),
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { blocked: Vec::new(), port: 443, clients: Clients::ThisHost };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("block") => {
                let text = arguments.value()?.string()?;
                options.blocked.push(Name::new(text.as_bytes()).ok_or(format!("{text:?} is not a name"))?);
            }
            Long("port") => options.port = arguments.value()?.parse()?,
            Long("clients") => match options.clients {
                Clients::ThisHost => options.clients = Clients::Behind(arguments.value()?.string()?),
                _ => return Err("--clients goes with neither --client nor another --clients".into()),
            },
            Long("client") => match &mut options.clients {
                Clients::ThisHost => options.clients = Clients::Hosts(vec![arguments.value()?.parse()?]),
                Clients::Hosts(addresses) => addresses.push(arguments.value()?.parse()?),
                Clients::Behind(_) => return Err("--client does not go with --clients".into()),
            },
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.blocked.is_empty() { Err("no name is blocked".into()) } else { Ok(Some(options)) }
}
