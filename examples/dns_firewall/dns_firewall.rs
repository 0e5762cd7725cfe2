//! Answers DNS queries for blocked names, and for all names below them, with NXDOMAIN. Other
//! queries are sent to their server, and replies do not come to the queue.
//!
//! It makes its own rules: for UDP to one port, sent by this host, received by it or forwarded. Run
//! it as root: `cargo run --release --example dns_firewall -- example.com example.net`.
//!
//! The queue drops the query, and an `Injector` sends the reply, because that works at every hook
//! (see the table in `guide::replies`). The reply has the mark 0x40: rules of a stateful firewall
//! on this host must accept it, and the rules here exclude it.
//!
//! - It accepts what is no query unchanged: responses, other operations, and datagrams that cannot
//!   be parsed, which contain no name to block. The server refuses those itself.
//! - It does not look at queries over TCP, TLS or HTTPS.
//! - The reply has no SOA record, so resolvers do not cache it (RFC 2308, section 5), and no
//!   signature, so those that validate DNSSEC fail instead. A reply to a query with EDNS has the
//!   error "Blocked" (RFC 8914).
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{collections::HashSet, fs, iter, pin::pin, process::ExitCode};

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode},
    rr::{Name, rdata::opt::EdnsOption},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Action, Divert, Error, Hook, Packet, Protocol, Queue, Rule, divert::Match, inject::Injector};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let injector = Injector::builder().mark(MARK).bind()?;
    let queries =
        |hook| Rule::new(hook).protocol(Protocol::Udp).destination_port(options.port).unless_mark(MARK, u32::MAX);
    let rules = Divert::builder()
        .rule(queries(Hook::Output))
        // What arrives over loopback has passed the output hook.
        .rule(queries(Hook::Input).unless(Match::interface("lo")))
        .rule(queries(Hook::Forward))
        // It decides each query on its own, so connections need not be tracked.
        .flow_marks(None);
    // A reply to a super-packet is impossible.
    let queue = Queue::builder(Queue::ANY).gso(false).on_unanswered(Action::Accept).divert(rules).bind().await?;
    let (mut packets, verdicts) = queue.split();
    eprintln!("ready");

    let mut unanswered = 0_u64;
    let mut received = Vec::new();
    loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
            }
            () = &mut end => break,
        }
        for packet in received.drain(..) {
            let Some(query) = blocked_query(&packet, &options.blocked) else {
                packet.accept().submit()?;
                continue;
            };
            if let Err(error) = reply(&packet, &query, &injector).await {
                // This concerns only one packet.
                if unanswered == 0 {
                    eprintln!("dns_firewall: the first query without a reply: {error}");
                }
                unanswered += 1;
            }
            packet.drop().submit()?;
        }
    }
    let closed = verdicts.close().await;
    let stats = verdicts.stats();
    println!(
        "received {} accepted {} blocked {} unanswered {unanswered} lost {}",
        stats.received.packets, stats.decided.accepted, stats.decided.dropped, stats.lost.packets
    );
    closed
}

/// The query in the packet, if it asks for a blocked name or one below.
fn blocked_query(packet: &Packet, blocked: &HashSet<Name>) -> Option<Message> {
    let message = Message::from_vec(packet.view().ok()?.payload()?).ok()?;
    let is_query = message.metadata.message_type == MessageType::Query && message.metadata.op_code == OpCode::Query;
    // Names are compared without regard to case.
    let is_blocked = |name: &Name| {
        let parent = |name: &Name| (!name.is_root()).then(|| name.base_name());
        iter::successors(Some(name.clone()), parent).any(|name| blocked.contains(&name))
    };
    (is_query && message.queries.iter().any(|query| is_blocked(query.name()))).then_some(message)
}

/// Sends the reply, which seems to come from the server.
async fn reply(packet: &Packet, query: &Message, injector: &Injector) -> Result<(), Box<dyn std::error::Error>> {
    let mut reply = packet.edit()?;
    reply.turn_around()?;
    reply.replace_payload(&nxdomain(query).to_vec()?)?;
    Ok(injector.send(&reply.finish()).await?)
}

/// A response with the id, the question and the flags RD and CD of the query.
fn nxdomain(query: &Message) -> Message {
    let mut response = Message::response(query.metadata.id, query.metadata.op_code);
    response.metadata = Metadata::response_from_request(&query.metadata);
    response.metadata.response_code = ResponseCode::NXDomain;
    // As a resolver that was asked: without RA, a client may ask another server.
    response.metadata.recursion_available = true;
    response.queries.clone_from(&query.queries);
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(1232).set_dnssec_ok(asked.flags().dnssec_ok);
        let [extended_error, blocked] = [15, 15];
        edns.options_mut().insert(EdnsOption::Unknown(extended_error, blocked.to_be_bytes().to_vec()));
        response.set_edns(edns);
    }
    response
}

/// The mark of the replies.
const MARK: u32 = 0x40;

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
            eprintln!("dns_firewall: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dns_firewall: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: dns_firewall [--port P] [--file PATH] [NAME ...]

  NAME         a blocked name, with all names below it
  --file PATH  a file of blocked names, one in a line; # begins a comment
  --port P     the destination port of the queries (default: 53)";

struct Options {
    port: u16,
    blocked: HashSet<Name>,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { port: 53, blocked: HashSet::new() };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("port") => options.port = arguments.value()?.parse()?,
            Long("file") => {
                let path = arguments.value()?.string()?;
                let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
                let names = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
                for text in names.filter(|name| !name.is_empty()) {
                    options.blocked.insert(name(text)?);
                }
            }
            Value(text) => {
                options.blocked.insert(name(&text.string()?)?);
            }
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.blocked.is_empty() { Err("no name is blocked".into()) } else { Ok(Some(options)) }
}

fn name(text: &str) -> Result<Name, String> {
    let mut name = Name::from_utf8(text).map_err(|error| format!("{text:?}: {error}"))?;
    // Names in messages always are.
    name.set_fqdn(true);
    if text.is_empty() { Err("a name is empty".to_owned()) } else { Ok(name) }
}
