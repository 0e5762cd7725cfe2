//! Emulates a bad network, as `tc qdisc ... netem` does: packets are delayed, lost, sent twice, and
//! overtake each other. The difference: a function decides for each packet, and may look at it.
//!
//! It makes its own rule. Run it as root, for example for what this host sends to port 53:
//! `cargo run --release --example netem -- --port 53 --delay 100 --jitter 20 --loss 1`
//!
//! What it shows:
//!
//! - A packet waits without a task: it is an entry of a sorted map, and one timer waits for the
//!   first. Packets with the same delay stay in order.
//! - `in_submission_order`: a queue sends the verdicts that it gathers in the order of the packets,
//!   which would undo some of the reordering.
//! - A verdict sends a packet once. The copy is sent by an `Injector`; its mark keeps it out of the
//!   queue. `gso(false)`: otherwise a packet may be a super-packet, which cannot be injected.
//!
//! A rule without protocol, port and interface also matches IPv6 neighbour discovery and loopback.
//! Tokio's timers are precise to a millisecond: a packet is never early, but may be late.
//!
//! It prints `ready` on standard error once queue and rule are there. SIGINT and SIGTERM end it:
//! packets that wait are sent at once, in their order, and it prints one line of statistics.

use std::{collections::BTreeMap, pin::pin, process::ExitCode, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};
use tokio_nfqueue::{
    Action, DetachedPacket, Divert, Error, Hook, Packet, Protocol, Queue, Rule, divert::Match, inject::Injector,
};

/// The mark of copies.
const MARK: u32 = 0x40;

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let mut network = Network::new(&options)?;
    let queue = Queue::builder(Queue::ANY)
        // What is over `limit` must come to this program to be counted.
        .max_len(options.limit.saturating_add(1024))
        .gso(false)
        .in_submission_order()
        .on_unanswered(Action::Accept)
        // It decides each packet on its own, so connections need not be tracked.
        .divert(Divert::builder().rule(options.rule).flow_marks(None));
    let (mut packets, verdicts) = queue.bind().await?.split();
    eprintln!("ready");

    let mut received = Vec::new();
    loop {
        let next = network.waiting.first_key_value().map(|((at, _), _)| *at);
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                for packet in received.drain(..) {
                    network.receive(packet)?;
                }
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            () = &mut end => break,
        }
        network.send(Some(Instant::now()))?;
    }
    network.send(None)?;
    let closed = verdicts.close().await;
    let (stats, Counts { lost, copied, not_delayed, over_limit, failed }) = (verdicts.stats(), network.counts);
    println!(
        "{} packets: {lost} lost, {copied} sent twice, {not_delayed} not delayed, {over_limit} over the limit; \
         {failed} copies failed, {} packets lost unseen",
        stats.received.packets, stats.lost.packets
    );
    closed
}

struct Network {
    effects: Effects,
    limit: usize,
    random: Random,
    /// For copies only, because it needs `CAP_NET_RAW`.
    injector: Option<Injector>,
    /// What waits, by the time when it is sent. Of those with the same time, the first is first.
    waiting: BTreeMap<(Instant, u64), Waiting>,
    number: u64,
    counts: Counts,
}

enum Waiting {
    /// Without its bytes: these are in the kernel.
    Packet(DetachedPacket),
    Copy(Vec<u8>),
}

#[derive(Default)]
struct Counts {
    lost: u64,
    copied: u64,
    not_delayed: u64,
    over_limit: u64,
    failed: u64,
}

impl Network {
    fn new(options: &Options) -> Result<Self, Error> {
        let copies = options.effects.duplicate > 0.0;
        Ok(Self {
            effects: options.effects,
            limit: options.limit as usize,
            random: Random::new(options.seed),
            injector: copies.then(|| Injector::builder().mark(MARK).bind()).transpose()?,
            waiting: BTreeMap::new(),
            number: 0,
            counts: Counts::default(),
        })
    }

    /// What happens to a packet. A policy of your own may look at the packet here.
    fn receive(&mut self, packet: Packet) -> Result<(), Error> {
        if self.random.happens(self.effects.loss) {
            self.counts.lost += 1;
            return packet.drop().submit();
        }
        if self.waiting.len() >= self.limit {
            self.counts.over_limit += 1;
            return packet.drop().submit();
        }
        let copy = self.random.happens(self.effects.duplicate).then(|| packet.payload().to_vec());
        self.wait(Waiting::Packet(packet.detach()));
        if let Some(copy) = copy {
            self.counts.copied += 1;
            self.wait(Waiting::Copy(copy));
        }
        Ok(())
    }

    fn wait(&mut self, what: Waiting) {
        let Effects { delay, jitter, reorder, .. } = self.effects;
        let delay = if self.random.happens(reorder) {
            self.counts.not_delayed += 1;
            Duration::ZERO
        } else {
            (delay + jitter.mul_f64(2.0 * self.random.fraction())).saturating_sub(jitter)
        };
        self.number += 1;
        self.waiting.insert((Instant::now() + delay, self.number), what);
    }

    /// Sends what has waited long enough, or all.
    fn send(&mut self, until: Option<Instant>) -> Result<(), Error> {
        while let Some(first) = self.waiting.first_entry() {
            if until.is_some_and(|until| first.key().0 > until) {
                break;
            }
            match first.remove() {
                Waiting::Packet(packet) => packet.accept().submit()?,
                // It does not wait for the send buffer, because packets would wait with it.
                Waiting::Copy(copy) => {
                    let sent = self.injector.as_ref().map(|injector| injector.try_send(&copy));
                    self.counts.failed += u64::from(!matches!(sent, Some(Ok(()))));
                }
            }
        }
        Ok(())
    }
}

/// Xorshift64*: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to less than 1.
    fn fraction(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        number as f64 / (1_u64 << 53) as f64
    }

    fn happens(&mut self, percent: f64) -> bool {
        self.fraction() * 100.0 < percent
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
            eprintln!("netem: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netem: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: netem [OPTION ...]

Which packets:
  --hook H          output, input or forward (default: output)
  --protocol P      tcp, udp, or the number of another protocol (default: all)
  --port P          TCP or UDP to this destination port
  --interface NAME  the input interface; at the hook output, the output interface

What happens to them:
  --delay MS        how long a packet waits, at most 3600000 (default: 0)
  --jitter MS       up to so much longer or shorter, at random (default: 0)
  --loss P          how many per cent are lost (default: 0)
  --duplicate P     how many per cent are sent twice (default: 0)
  --reorder P       how many per cent are not delayed, and so overtake others (default: 0)
  --limit N         how many packets wait at most; others are dropped (default: 1000)
  --seed N          of the random numbers (default: 1)";

#[derive(Clone, Copy)]
struct Effects {
    delay: Duration,
    jitter: Duration,
    /// In per cent, as the next two.
    loss: f64,
    duplicate: f64,
    reorder: f64,
}

struct Options {
    rule: Rule,
    effects: Effects,
    limit: u32,
    seed: u64,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let (mut hook, mut protocol, mut port, mut interface) = (Hook::Output, None, None, None);
    let (mut limit, mut seed) = (1000, 1);
    let zero = Duration::ZERO;
    let mut effects = Effects { delay: zero, jitter: zero, loss: 0.0, duplicate: 0.0, reorder: 0.0 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("hook") => hook = arguments.value()?.parse_with(parse_hook)?,
            Long("protocol") => protocol = Some(arguments.value()?.parse_with(parse_protocol)?),
            Long("port") => port = Some(arguments.value()?.parse()?),
            Long("interface") => interface = Some(arguments.value()?.string()?),
            Long("delay") => effects.delay = arguments.value()?.parse_with(parse_time)?,
            Long("jitter") => effects.jitter = arguments.value()?.parse_with(parse_time)?,
            Long("loss") => effects.loss = arguments.value()?.parse_with(parse_percent)?,
            Long("duplicate") => effects.duplicate = arguments.value()?.parse_with(parse_percent)?,
            Long("reorder") => effects.reorder = arguments.value()?.parse_with(parse_percent)?,
            Long("limit") => limit = arguments.value()?.parse()?,
            Long("seed") => seed = arguments.value()?.parse()?,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    let mut rule = Rule::new(hook).unless_mark(MARK, u32::MAX);
    rule = match (protocol, port) {
        (None, None) => rule,
        (Some(protocol), None) => rule.protocol(protocol),
        (None, Some(port)) => rule.when(Match::protocols([Protocol::Tcp, Protocol::Udp])).destination_port(port),
        (Some(protocol @ (Protocol::Tcp | Protocol::Udp)), Some(port)) => {
            rule.protocol(protocol).destination_port(port)
        }
        (Some(_), Some(_)) => return Err("only TCP and UDP have ports here".into()),
    };
    if let Some(interface) = interface {
        rule = rule.interface(interface);
    }
    if effects.reorder > 0.0 && effects.delay.is_zero() {
        return Err("--reorder needs a --delay: packets that are not delayed overtake the others".into());
    }
    if limit == 0 {
        return Err("the limit is 0: no packet could pass".into());
    }
    Ok(Some(Options { rule, effects, limit, seed }))
}

fn parse_hook(text: &str) -> Result<Hook, &'static str> {
    match text {
        "output" => Ok(Hook::Output),
        "input" => Ok(Hook::Input),
        "forward" => Ok(Hook::Forward),
        _ => Err("neither output, input nor forward"),
    }
}

fn parse_protocol(text: &str) -> Result<Protocol, &'static str> {
    match text {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => text.parse::<u8>().map(Protocol::from).map_err(|_| "neither tcp, udp nor a number below 256"),
    }
}

fn parse_time(text: &str) -> Result<Duration, &'static str> {
    match text.parse() {
        Ok(milliseconds @ 0..=3_600_000) => Ok(Duration::from_millis(milliseconds)),
        _ => Err("a number of milliseconds from 0 to 3600000 is needed"),
    }
}

fn parse_percent(text: &str) -> Result<f64, &'static str> {
    match text.parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("a number from 0 to 100 is needed"),
    }
}
