//! The adversary: a random walk through everything that may happen to connections and verdicts.

mod connection;
mod decide;
mod disturb;
mod model;
mod nat;
mod report;
pub(crate) mod segment;
pub(crate) mod strangers;
mod traffic;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, SocketAddr},
    ops::AddAssign,
    time::{Duration, Instant},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{FlowMarks, FlushPolicy, Hook, Packet, Protocol, Queue, Rule, divert::Match, flush::FlushDecision};

use self::{
    connection::{Connection, Kind, PATHS, Path},
    model::{Model, Sent, Side, Time},
    strangers::Stranger,
    world::{Host, SILENT_PORTS, World},
};
use crate::{common::Random, support};

/// Connections at a time.
const CONNECTIONS: usize = 12;
/// Packets that wait at a time; fewer than any buffer holds.
const WAITING: usize = 40;
/// How many steps a table exists.
const ROUND: usize = 2000;
/// How long the round of a soak is at most. It takes some seconds.
const LONGEST_ROUND: Duration = Duration::from_secs(30);

/// A packet in the queue.
struct Waiting {
    number: u32,
    connection: usize,
    hook: Hook,
    packet: Packet,
    /// How many chains had come and gone when it was queued.
    churn: usize,
}

/// What has been tried, for the report.
#[derive(Debug, Clone, Default)]
pub(crate) struct Totals {
    rounds: usize,
    connections: usize,
    sent: usize,
    sent_to_denied: usize,
    queued: usize,
    verdicts: BTreeMap<&'static str, usize>,
    together: usize,
    passed_unqueued: usize,
    arrived: usize,
    strangers: usize,
    replaced: usize,
    forgotten: usize,
}

struct Adversary {
    random: Random,
    world: World,
    /// The kernel has address translation.
    translates: bool,
    queue: Option<Queue>,
    divert: Option<Divert>,
    round: Round,
    strangers: Vec<Stranger>,
    /// One of them has overwritten marks of connections, or packets have come back.
    accepts_lost: bool,
    churn: usize,
    model: Model,
    connections: Vec<Connection>,
    /// Connections of which no more is sent, whose history may be needed.
    retired: BTreeMap<usize, Connection>,
    used: BTreeSet<(bool, [SocketAddr; 2])>,
    ports: u32,
    waiting: Vec<Waiting>,
    /// Packets that were accepted in a way that they must arrive.
    due: Vec<u32>,
    time: Time,
    numbers: u32,
    log: Vec<(Time, String)>,
    totals: Totals,
    broken: BTreeMap<&'static str, (usize, Vec<String>)>,
}

/// What is the same while a table exists.
#[derive(Debug, Clone, Copy)]
struct Round {
    hooks: &'static [Hook],
    priority: i32,
    /// Connection tracking forgets after a second.
    short: bool,
    overwriting: bool,
}

/// At each of these, every packet passes one hook with a queue, and over loopback two.
const HOOKS: [&[Hook]; 3] =
    [&[Hook::Prerouting, Hook::Output], &[Hook::Forward, Hook::Input, Hook::Output], &[Hook::Postrouting, Hook::Input]];

/// Walks for so long in the current network namespace, with a table after the other.
///
/// # Errors
/// Which promises were broken, with what led to it.
// The soak has rounds without the tests.
#[allow(dead_code)]
pub(crate) fn walk(seed: u64, duration: Duration) -> Result<Totals, String> {
    let mut adversary = Adversary::new(seed);
    runtime().block_on(adversary.walk(duration));
    adversary.result()
}

/// Walks from a new table to its end, in the current network namespace. The seed repeats the steps
/// as far as the kernel does, which has a clock.
///
/// # Errors
/// As [`walk`].
// The tests have walks without the soak.
#[allow(dead_code)]
pub(crate) fn round(seed: u64) -> Result<Totals, String> {
    let mut adversary = Adversary::new(seed);
    runtime().block_on(adversary.round(Instant::now() + LONGEST_ROUND));
    adversary.result()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.rounds += other.rounds;
        self.connections += other.connections;
        self.sent += other.sent;
        self.sent_to_denied += other.sent_to_denied;
        self.queued += other.queued;
        for (verdict, count) in other.verdicts {
            *self.verdicts.entry(verdict).or_default() += count;
        }
        self.together += other.together;
        self.passed_unqueued += other.passed_unqueued;
        self.arrived += other.arrived;
        self.strangers += other.strangers;
        self.replaced += other.replaced;
        self.forgotten += other.forgotten;
    }
}

impl Adversary {
    fn new(seed: u64) -> Self {
        let world = World::new();
        let translates = nat::install(&world);
        let round = Round { hooks: HOOKS[0], priority: 0, short: false, overwriting: false };
        Self {
            random: Random::new(seed),
            world,
            translates,
            queue: None,
            divert: None,
            round,
            strangers: Vec::new(),
            accepts_lost: false,
            churn: 0,
            model: Model::default(),
            connections: Vec::new(),
            retired: BTreeMap::new(),
            used: BTreeSet::new(),
            ports: 0,
            waiting: Vec::new(),
            due: Vec::new(),
            time: 0,
            numbers: 0,
            log: Vec::new(),
            totals: Totals::default(),
            broken: BTreeMap::new(),
        }
    }

    /// Continues for so long, and for the time in which it waits for what is lost.
    async fn walk(&mut self, duration: Duration) {
        let mut until = Instant::now() + duration;
        while Instant::now() < until {
            until += self.round(until).await;
        }
    }

    /// From a new table to its end. Returns for how long it has waited for what was accepted.
    async fn round(&mut self, until: Instant) -> Duration {
        self.begin_round().await;
        for _ in 0..ROUND {
            self.step().await;
            if Instant::now() >= until {
                break;
            }
        }
        let waits = Instant::now();
        self.end_round().await;
        waits.elapsed()
    }

    /// What has been tried.
    ///
    /// # Errors
    /// Which promises were broken, with what led to it.
    fn result(self) -> Result<Totals, String> {
        let Self { broken, totals, .. } = self;
        if broken.is_empty() {
            return Ok(totals);
        }
        let mut report = String::new();
        for (promise, (count, _)) in &broken {
            report += &format!("{count:>6} times: {promise}\n");
        }
        for (promise, (_, histories)) in &broken {
            report += &format!("\n{promise}:\n{}\n", histories.join("\n\n"));
        }
        Err(report)
    }

    fn tick(&mut self) -> Time {
        self.time += 1;
        self.time
    }

    fn note(&mut self, text: String) {
        let at = self.tick();
        self.log.push((at, text));
    }

    async fn begin_round(&mut self) {
        self.totals.rounds += 1;
        let random = &mut self.random;
        self.round = Round {
            hooks: HOOKS[random.below(HOOKS.len())],
            priority: [0, 0, -100, 10][random.below(4)],
            short: random.one_in(5),
            overwriting: random.one_in(5),
        };
        let seconds = |name: &str, short, long| {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
            // Root in a user namespace may not.
            fs::write(path, if self.round.short { short } else { long }).ok();
        };
        seconds("udp_timeout", "1", "120");
        seconds("udp_timeout_stream", "1", "120");
        seconds("tcp_timeout_close", "1", "10");
        // So that the table of connections does not fill up.
        seconds("tcp_timeout_established", "60", "120");
        self.note(format!("a new table: {:?}", self.round));
        let marks = FlowMarks::default();
        // Verdicts are sent when the test says so.
        let policy = FlushPolicy::custom(|_| FlushDecision::Within(Duration::from_millis(900)));
        self.queue =
            Some(Queue::builder(0).flow_marks(marks).flush_policy(policy).bind().await.expect("bind the queue"));
        let builder = Divert::builder().flow_marks(marks).priority(self.round.priority);
        self.divert = Some(builder.rules(self.rules(false)).install().expect("install the rules"));
        self.model = Model::default();
        self.accepts_lost = false;
        self.retired.clear();
        // The library's threads were started before, and are not bound.
        support::stay_on_one_cpu();
        self.settle(&PATHS).await;
    }

    /// Decides everything, and removes the table. Nothing is sent meanwhile.
    async fn end_round(&mut self) {
        while !self.waiting.is_empty() {
            let all = 0..self.waiting.len();
            self.decide(all.rev().collect()).await;
        }
        self.await_due().await;
        self.strangers.clear();
        self.connections.clear();
        self.divert = None;
        let queue = self.queue.take().expect("a queue");
        queue.close().await.expect("close the queue");
        self.log.clear();
    }

    /// All rules ask about every packet with a number. `more` makes others of them.
    fn rules(&self, more: bool) -> Vec<Rule> {
        let mut rules = Vec::new();
        for hook in self.round.hooks {
            let rule = || Rule::new(*hook);
            if more {
                rules.push(rule().protocol(Protocol::Udp).count());
            }
            let (v4, v6) = segment::ERROR_TYPES;
            let queued = [
                rule().protocol(Protocol::Tcp),
                rule().protocol(Protocol::Udp),
                rule().when(Match::icmp_type(v4)),
                rule().when(Match::icmpv6_type(v6)),
            ];
            rules.extend(queued.map(|rule| rule.to_queue(0).bypass(more)));
        }
        rules
    }

    async fn step(&mut self) {
        while self.connections.len() < CONNECTIONS {
            self.open();
        }
        match self.random.below(1000) {
            0..4 => self.stranger(),
            4..7 => self.replace(),
            7 => self.forget(),
            8..10 if !self.waiting.is_empty() => self.ambush().await,
            10..300 if !self.waiting.is_empty() => {
                let picks = self.some_waiting();
                self.decide(picks).await;
            }
            _ if self.waiting.len() > WAITING => {
                let all = 0..self.waiting.len();
                self.decide(all.collect()).await;
            }
            _ => self.send().await,
        }
    }

    /// A new connection, between ports that none has had.
    fn open(&mut self) {
        let tcp = self.random.one_in(2);
        let (path, ends, translated) = loop {
            let path = PATHS[self.random.below(4)];
            let v6 = self.random.one_in(2);
            self.ports += 1;
            let fresh = 1024 + (self.ports % 60_000) as u16;
            let silent = SILENT_PORTS.start + self.random.below(SILENT_PORTS.len()) as u16;
            let other = SILENT_PORTS.start + self.random.below(SILENT_PORTS.len()) as u16;
            let address = |host, neighbour| self.world.address(host, neighbour, v6);
            let [a, b] = path.hosts();
            let ends = match path {
                Path::Forward => [(address(a, b), fresh), (address(b, a), silent)],
                Path::Inbound => [(address(a, b), fresh), (address(b, a), silent)],
                Path::Outbound => [(address(a, b), silent), (address(b, a), fresh)],
                Path::Loopback if v6 => [(address(a, b), silent), (address(b, a), other)],
                Path::Loopback => {
                    let a = Ipv4Addr::new(127, 1, (self.ports >> 8) as u8, self.ports as u8);
                    [(a.into(), silent), (address(Host::This, Host::This), other)]
                }
            };
            let mut ends = ends.map(SocketAddr::from);
            let mut translated = None;
            if path == Path::Forward && self.translates && self.random.one_in(4) {
                let (end, instead) = nat::end(&self.world, v6, &mut self.random);
                (ends[1], translated) = (end, Some(instead));
            }
            // In either direction.
            let pair = [ends[0].min(ends[1]), ends[0].max(ends[1])];
            if ends[0] == ends[1] || !self.used.insert((tcp, pair)) {
                continue;
            }
            break (path, ends, translated);
        };
        self.totals.connections += 1;
        let budget = 4 + self.random.below(30);
        let mut connection = Connection::new(self.totals.connections, path, tcp, ends, budget);
        connection.translated = translated.is_some();
        self.model.of(connection.id).translated = translated.is_some();
        connection.seen[0] = translated;
        let protocol = if tcp { "TCP" } else { "UDP" };
        let about = format!("{protocol} {path:?} {} and {}, translated: {:?}", ends[0], ends[1], connection.seen[0]);
        let at = self.tick();
        connection.log.push((at, about));
        self.connections.push(connection);
    }

    /// Sends one packet, or several at once, of a connection.
    async fn send(&mut self) {
        let index = self.random.below(self.connections.len());
        let count = if self.random.one_in(4) { 2 + self.random.below(3) } else { 1 };
        let Connection { id, path, .. } = self.connections[index];
        let mut numbers = Vec::new();
        for _ in 0..count {
            let denied = self.model.has_denial(id);
            let (side, kind) = self.connections[index].draw(denied, &mut self.random);
            if self.connections[index].can_send(side) {
                numbers.push(self.send_one(index, side, kind));
            }
        }
        self.settle(&[path]).await;
        for number in &numbers {
            let lost = self.model.settled(*number);
            self.report(lost);
        }
        if self.random.below(10) < 7 {
            let of_connection = |waiting: &Waiting| waiting.connection == id;
            let picks = (0..self.waiting.len()).filter(|index| of_connection(&self.waiting[*index])).collect();
            self.decide(picks).await;
        }
        if let Some(index) = self.connections.iter().position(|connection| connection.id == id) {
            let connection = &mut self.connections[index];
            connection.budget = connection.budget.saturating_sub(1);
            if connection.budget == 0 {
                self.retire(id);
            }
        }
    }

    fn send_one(&mut self, index: usize, side: Side, kind: Kind) -> u32 {
        self.numbers += 1;
        let (number, at) = (self.numbers, self.tick());
        let connection = &mut self.connections[index];
        let known = connection.is_known() && !self.round.short;
        let (packet, valid) = connection.packet(side, kind, number, &mut self.random);
        connection.log.push((at, format!("side {side} sends {kind:?}, packet {number}")));
        let (id, from) = (connection.id, connection.path.hosts()[side]);
        self.totals.sent += 1;
        self.totals.sent_to_denied += usize::from(self.model.has_denial(id));
        let loopback = connection.path == Path::Loopback;
        let (questions, arrived) = (Vec::new(), None);
        self.model.sends(number, Sent { connection: id, side, kind, at, valid, known, loopback, questions, arrived });
        self.world.send(from, &packet);
        number
    }

    fn is_translated(&self, id: usize) -> bool {
        self.connections.iter().chain(self.retired.values()).any(|other| other.id == id && other.translated)
    }

    fn path_of(&self, id: usize) -> Option<Path> {
        self.connections.iter().chain(self.retired.values()).find(|other| other.id == id).map(|other| other.path)
    }

    fn retire(&mut self, id: usize) {
        if let Some(index) = self.connections.iter().position(|connection| connection.id == id) {
            self.retired.insert(id, self.connections.remove(index));
        }
    }
}
