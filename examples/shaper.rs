//! Limits the rate of each source address with a token bucket: so many bytes a second, and so many
//! at once after a pause. What is above the rate waits, and is dropped if too much waits already.
//!
//! It makes its own rule. Run it as root, for example for UDP and TCP to port 53 of this host:
//! `cargo run --release --example shaper -- --port 53 --rate 10000`. On a router, use
//! `--hook forward`.
//!
//! What it shows:
//!
//! - A bucket is one time: when it will be full again. It needs no timer that fills it, and when
//!   that time has come, the source is as one that was never seen, and can be forgotten.
//! - A packet waits without a task: it is an entry of a sorted map, and one timer waits for the
//!   first.
//! - `copy_range`: only the first 40 bytes of a packet come to the program, its addresses.
//!
//! A sender can forge addresses, so everything has a limit:
//!
//! - The table of sources: those for which it has no place share one bucket. Forged sources cannot
//!   take what a source in the table may use. IPv6 sources count by their first 64 bits, because a
//!   host has all the others.
//! - The bytes of a source that wait, and the packets of all sources that wait. The kernel's queue
//!   has further places for packets that need not wait.
//!
//! Bytes are those of IP packets, with their headers. A packet longer than the burst never passes.
//! If the program is late, packets that are due pass together.
//!
//! It prints `ready` on standard error once queue and rule are there. SIGINT and SIGTERM end it:
//! packets that wait pass at once, and it prints one line of statistics.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, interval, sleep_until},
};
use tokio_nfqueue::{Action, DetachedPacket, Divert, Error, Hook, Packet, Protocol, Queue, Rule, divert::Match};

async fn run(options: Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let Options { rule, limits } = options;
    let queue = Queue::builder(Queue::ANY)
        .max_len(limits.packets.saturating_add(1024))
        .copy_range(40)
        // Each segment has its own time.
        .gso(false)
        .in_submission_order()
        .on_unanswered(Action::Accept)
        // It decides each packet on its own, so connections need not be tracked.
        .divert(Divert::builder().rule(rule).flow_marks(None));
    let (mut packets, verdicts) = queue.bind().await?.split();
    eprintln!("ready");

    let mut shaper = Shaper::new(limits);
    let mut second = interval(Duration::from_secs(1));
    let mut received = Vec::new();
    loop {
        let next = shaper.waiting.first_key_value().map(|((at, _), _)| *at);
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
                let now = Instant::now();
                for packet in received.drain(..) {
                    shaper.receive(packet, now)?;
                }
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            now = second.tick() => shaper.buckets.retain(|_, full_at| *full_at > now),
            () = &mut end => break,
        }
        shaper.pass(Some(Instant::now()))?;
    }
    shaper.pass(None)?;
    let closed = verdicts.close().await;
    let (stats, Counts { at_once, waited, dropped, most_sources, shared }) = (verdicts.stats(), shaper.counts);
    println!(
        "{} packets: {at_once} passed at once, {waited} after a wait, {dropped} dropped; at most {most_sources} \
         sources at a time, {shared} packets of further ones; {} packets lost unseen",
        stats.received.packets, stats.lost.packets
    );
    closed
}

struct Shaper {
    limits: Limits,
    /// The time when the bucket of each source is full. Sources that are not here have a full one.
    buckets: HashMap<IpAddr, Instant>,
    /// The bucket of all sources for which the table has no place.
    shared: Instant,
    /// The packets that wait, by the time when they pass. Of one time, the first is first.
    waiting: BTreeMap<(Instant, u64), DetachedPacket>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    at_once: u64,
    waited: u64,
    dropped: u64,
    most_sources: usize,
    shared: u64,
}

impl Shaper {
    fn new(limits: Limits) -> Self {
        let (buckets, waiting) = (HashMap::new(), BTreeMap::new());
        Self { limits, buckets, shared: Instant::now(), waiting, counts: Counts::default() }
    }

    fn receive(&mut self, packet: Packet, now: Instant) -> Result<(), Error> {
        let has_place = (self.waiting.len() as u64) < self.limits.packets.into();
        let limits = self.limits;
        let bytes = packet.original_len().unwrap_or(0) as u64;
        let bucket = self.bucket(packet.addresses().map(|(source, _)| source), now);
        match limits.wait(*bucket, bytes, now) {
            Some(wait) if wait.is_zero() || has_place => {
                *bucket = now.max(*bucket) + limits.time(bytes);
                if wait.is_zero() {
                    self.counts.at_once += 1;
                    return packet.accept().submit();
                }
                self.counts.waited += 1;
                self.waiting.insert((now + wait, self.counts.waited), packet.detach());
                Ok(())
            }
            _ => {
                self.counts.dropped += 1;
                packet.drop().submit()
            }
        }
    }

    fn bucket(&mut self, source: Option<IpAddr>, now: Instant) -> &mut Instant {
        let source = source.map(|source| match source {
            IpAddr::V4(_) => source,
            IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) & !u128::from(u64::MAX)).into(),
        });
        if let Some(source) = source {
            if self.buckets.len() < self.limits.sources {
                self.buckets.entry(source).or_insert(now);
                self.counts.most_sources = self.counts.most_sources.max(self.buckets.len());
            }
        }
        match source.and_then(|source| self.buckets.get_mut(&source)) {
            Some(bucket) => bucket,
            None => {
                self.counts.shared += 1;
                &mut self.shared
            }
        }
    }

    /// Accepts what has waited long enough, or all.
    fn pass(&mut self, until: Option<Instant>) -> Result<(), Error> {
        while let Some(first) = self.waiting.first_entry() {
            if until.is_some_and(|until| first.key().0 > until) {
                break;
            }
            first.remove().accept().submit()?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Limits {
    /// Bytes in a second.
    rate: u64,
    /// Bytes in a full bucket.
    burst: u64,
    /// Bytes of a source that wait.
    queue: u64,
    /// Packets that wait.
    packets: u32,
    sources: usize,
}

impl Limits {
    /// How long a packet of so many bytes waits, or `None` if it cannot pass.
    fn wait(&self, full_at: Instant, bytes: u64, now: Instant) -> Option<Duration> {
        // The bucket lacks what comes in within this time. It cannot lack more than it holds.
        let lacks = full_at.saturating_duration_since(now) + self.time(bytes);
        let wait = lacks.saturating_sub(self.time(self.burst));
        (bytes <= self.burst && wait <= self.time(self.queue)).then_some(wait)
    }

    /// How long it takes until so many bytes come into a bucket.
    fn time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate as f64)
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
            eprintln!("shaper: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: shaper --rate BYTES [OPTION ...]

  --rate BYTES      how much each source sends in a second
  --burst BYTES     how much it sends at once after a pause (default: 65535)
  --queue BYTES     how much of a source waits at most (default: 65535)
  --packets N       how many packets of all sources wait at most (default: 1000)
  --sources N       how many sources are remembered; further ones share one bucket (default: 65536)

  --hook H          input or forward (default: input)
  --port P          only TCP and UDP to this destination port
  --interface NAME  only what comes in by this interface";

struct Options {
    rule: Rule,
    limits: Limits,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let (mut hook, mut port, mut interface) = (Hook::Input, None, None);
    let mut limits = Limits { rate: 0, burst: 65_535, queue: 65_535, packets: 1000, sources: 65_536 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("rate") => limits.rate = arguments.value()?.parse::<u32>()?.into(),
            Long("burst") => limits.burst = arguments.value()?.parse::<u32>()?.into(),
            Long("queue") => limits.queue = arguments.value()?.parse::<u32>()?.into(),
            Long("packets") => limits.packets = arguments.value()?.parse()?,
            Long("sources") => limits.sources = arguments.value()?.parse()?,
            Long("hook") => hook = arguments.value()?.parse_with(parse_hook)?,
            Long("port") => port = Some(arguments.value()?.parse()?),
            Long("interface") => interface = Some(arguments.value()?.string()?),
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    let mut rule = Rule::new(hook);
    if let Some(port) = port {
        rule = rule.when(Match::protocols([Protocol::Tcp, Protocol::Udp])).destination_port(port);
    }
    if let Some(interface) = interface {
        rule = rule.interface(interface);
    }
    match limits {
        Limits { rate: 0, .. } => Err("there is no rate above 0".into()),
        Limits { burst: 0, .. } => Err("the burst is 0: no packet could pass".into()),
        _ => Ok(Some(Options { rule, limits })),
    }
}

fn parse_hook(text: &str) -> Result<Hook, &'static str> {
    match text {
        "input" => Ok(Hook::Input),
        "forward" => Ok(Hook::Forward),
        _ => Err("neither input nor forward"),
    }
}
