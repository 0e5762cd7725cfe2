//! The adversary: a random walk through everything that may happen to connections and verdicts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
use tokio_nfqueue::{
    Divert, Error, ErrorKind, FlowMarks, FlushDecision, FlushPolicy, Hook, Match, Packet, Protocol, Queue, Rule,
    TryRecvError, Verdict,
};

use super::{
    connection::{Connection, Kind, PATHS, Path},
    model::{ACCEPTED_LOST, Answer, Model, REFUSED, Sent, Side, Time, Violation},
    nat, segment,
    strangers::Stranger,
    world::{Host, SILENT_PORTS, World},
};
use crate::common::{PATIENCE, Random};

/// Connections at a time.
const CONNECTIONS: usize = 12;
/// Packets that wait at a time; fewer than any buffer holds.
const WAITING: usize = 40;
/// How many steps a table exists.
const ROUND: usize = 2000;
/// For how many broken promises of each kind the history is kept.
const KEPT: usize = 3;

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
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) rounds: usize,
    pub(super) connections: usize,
    pub(super) sent: usize,
    pub(super) sent_to_denied: usize,
    pub(super) queued: usize,
    pub(super) verdicts: BTreeMap<&'static str, usize>,
    pub(super) together: usize,
    pub(super) passed_unqueued: usize,
    pub(super) arrived: usize,
    pub(super) strangers: usize,
    pub(super) replaced: usize,
    pub(super) forgotten: usize,
}

pub(super) struct Adversary {
    random: Random,
    world: World,
    /// The kernel has address translation.
    translates: bool,
    queue: Option<Queue>,
    divert: Option<Divert>,
    round: Round,
    strangers: Vec<Stranger>,
    /// One of them has overwritten marks of connections.
    overwritten: bool,
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
    pub(super) totals: Totals,
    pub(super) broken: BTreeMap<&'static str, (usize, Vec<String>)>,
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

impl Adversary {
    pub(super) fn new(seed: u64) -> Self {
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
            overwritten: false,
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

    /// Goes on for so long, and for the time in which it waits for what is lost.
    pub(super) async fn walk(&mut self, duration: Duration) {
        let mut until = Instant::now() + duration;
        while Instant::now() < until {
            self.begin_round().await;
            for _ in 0..ROUND {
                self.step().await;
                if Instant::now() >= until {
                    break;
                }
            }
            let waits = Instant::now();
            self.end_round().await;
            until += waits.elapsed();
        }
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
        self.note(format!("a new table: {:?}", self.round));
        let marks = FlowMarks::default();
        // Verdicts are sent when the test says so.
        let policy = FlushPolicy::custom(|_| FlushDecision::Within(Duration::from_millis(900)));
        self.queue = Some(Queue::builder(0).flow_marks(marks).flush_policy(policy).bind().expect("bind the queue"));
        let builder = Divert::builder().flow_marks(marks).priority(self.round.priority);
        self.divert = Some(builder.rules(self.rules(false)).install().expect("install the rules"));
        self.model = Model::default();
        self.overwritten = false;
        self.retired.clear();
        stay_on_one_cpu();
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
            8..300 if !self.waiting.is_empty() => {
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
            if ends[0] == ends[1] || !self.used.insert((tcp, ends)) {
                continue;
            }
            break (path, ends, translated);
        };
        self.totals.connections += 1;
        let budget = 4 + self.random.below(30);
        let mut connection = Connection::new(self.totals.connections, path, tcp, ends, budget);
        connection.translated = translated.is_some();
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
            let (side, kind) = self.connections[index].draw(&mut self.random);
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
        let questions = Vec::new();
        self.model.sends(number, Sent { connection: id, side, kind, at, valid, known, questions, arrived: None });
        self.world.send(from, &packet);
        number
    }

    /// Waits until all that was sent has been queued, has arrived, or is lost.
    ///
    /// The kernel handles packets of one CPU, to which this thread is bound, in their order. So what
    /// has not come before a packet that is never queued does not come.
    async fn settle(&mut self, paths: &[Path]) {
        let mut missing = BTreeSet::new();
        for path in paths {
            let [a, b] = path.hosts();
            for (from, to) in [(a, b), (b, a)] {
                for v6 in [false, true] {
                    self.numbers += 1;
                    let packet = segment::sentinel(
                        self.world.address(from, to, v6),
                        self.world.address(to, from, v6),
                        self.numbers,
                    );
                    self.world.send(from, &packet);
                    missing.insert(self.numbers);
                }
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while !missing.is_empty() {
            self.drain().await;
            for number in self.receive() {
                missing.remove(&number);
            }
            assert!(Instant::now() < deadline, "{} sentinels are lost on {paths:?}", missing.len());
        }
        self.drain().await;
        self.receive();
    }

    /// Takes what is in the queue.
    async fn drain(&mut self) {
        let mut others = false;
        loop {
            let packet = match self.queue.as_mut().expect("a queue").try_recv() {
                Ok(packet) => packet,
                Err(TryRecvError::Empty) if others => {
                    others = false;
                    continue;
                }
                Err(TryRecvError::Empty) => return,
                Err(error) => panic!("{error:?}"),
            };
            let at = self.tick();
            let label =
                segment::label(packet.payload()).and_then(|label| Some((label, self.model.sent.get(&label.number)?)));
            let Some((label, sent)) = label else {
                // A reset or an error of the kernel.
                others = true;
                let result = packet.accept().submit();
                self.check(result, None);
                continue;
            };
            let (number, hook, connection) = (label.number, packet.hook(), sent.connection);
            self.totals.queued += 1;
            self.log_of(connection, at, format!("packet {number} is queued at {hook:?}"));
            let strict = !self.overwritten;
            let violation = self.model.queued(number, at, strict);
            self.report(violation);
            self.waiting.push(Waiting { number, connection, hook, packet, churn: self.churn });
        }
    }

    /// Takes what has arrived; returns the numbers.
    fn receive(&mut self) -> Vec<u32> {
        let labels = self.world.arrived();
        for label in &labels {
            let Some(sent) = self.model.sent.get(&label.number) else { continue };
            let (id, side, unqueued) = (sent.connection, sent.side, sent.questions.is_empty());
            let error = sent.kind == Kind::Error;
            let at = self.tick();
            self.totals.arrived += 1;
            self.totals.passed_unqueued += usize::from(unqueued);
            let how = if unqueued { ", unqueued" } else { "" };
            self.log_of(id, at, format!("packet {} arrives{how}", label.number));
            if let Some(connection) = self.connections.iter_mut().find(|connection| connection.id == id)
                && !error
            {
                connection.passed = true;
                if connection.translated && side == 0 {
                    connection.seen[1] = label.from;
                }
            }
            let violation = self.model.arrived(label.number, at);
            self.report(violation);
        }
        labels.into_iter().map(|label| label.number).collect()
    }

    /// Which of the waiting packets are decided next.
    fn some_waiting(&mut self) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.waiting.len()).collect();
        if self.random.one_in(2) {
            let id = self.waiting[self.random.below(all.len())].connection;
            all.retain(|index| self.waiting[*index].connection == id);
        }
        self.random.shuffle(&mut all);
        all.truncate(1 + self.random.below(6));
        all
    }

    fn answer(&mut self, kind: Kind, hook: Hook) -> Answer {
        let opening = matches!(kind, Kind::Syn | Kind::SynAck | Kind::Ack);
        let answer = match self.random.below(100) {
            0..55 if opening => Answer::Accept,
            0..35 => Answer::Accept,
            35..65 => Answer::AcceptFlow,
            65..72 => Answer::Drop,
            72..84 => Answer::DropFlow,
            84..90 => Answer::Reject,
            _ => Answer::RejectFlow,
        };
        match answer {
            Answer::Reject if hook == Hook::Postrouting => Answer::Drop,
            Answer::RejectFlow if hook == Hook::Postrouting => Answer::DropFlow,
            answer => answer,
        }
    }

    /// Decides the waiting packets with these indices, in random order: one by one, or in one
    /// flush.
    async fn decide(&mut self, mut picks: Vec<usize>) {
        picks.sort_unstable_by(|a, b| b.cmp(a));
        let mut picked: Vec<Waiting> = picks.into_iter().map(|index| self.waiting.remove(index)).collect();
        if picked.is_empty() {
            return;
        }
        self.random.shuffle(&mut picked);
        let together = self.random.one_in(2);
        self.totals.together += usize::from(together && picked.len() > 1);
        let mut alone = Vec::new();
        let mut paths: Vec<Path> = Vec::new();
        let mut submitted = Vec::new();
        let mut left = picked.len();
        let same = |a: &Waiting, id| a.connection == id;
        for index in 0..picked.len() {
            let id = picked[index].connection;
            let others = picked.iter().chain(&self.waiting).filter(|other| same(other, id)).count() > 1;
            if !others && picked[index].churn == self.churn {
                alone.push(picked[index].number);
            }
        }
        let ids: Vec<usize> = picked.iter().map(|waiting| waiting.connection).collect();
        for waiting in picked {
            let Waiting { number, connection, hook, packet, .. } = waiting;
            let sent = &self.model.sent[&number];
            let (kind, at) = (sent.kind, self.tick());
            let answer = self.answer(kind, hook);
            left -= 1;
            let how = if together { format!("in a flush with {} more", ids.len() - 1) } else { "alone".to_owned() };
            self.log_of(connection, at, format!("packet {number}: {answer:?}, {how}"));
            *self.totals.verdicts.entry(name(answer)).or_default() += 1;
            paths.extend(self.path_of(connection));
            self.model.answered(number, answer, at);
            submitted.push((number, answer, verdict(packet, answer).confirm()));
            if !together || left == 0 {
                self.queue.as_ref().expect("a queue").flush().await.expect("flush");
                for (number, answer, confirmation) in std::mem::take(&mut submitted) {
                    let result = confirmation.await;
                    self.confirmed(number, answer, result);
                }
            }
        }
        paths.sort_unstable_by_key(|path| *path as u8);
        paths.dedup();
        self.settle(&paths).await;
        alone.retain(|number| !self.is_translated(self.model.sent[number].connection));
        self.due.extend(alone);
    }

    fn confirmed(&mut self, number: u32, answer: Answer, result: Result<(), Error>) {
        let at = self.tick();
        let (kind, connection) = (self.model.sent[&number].kind, self.model.sent[&number].connection);
        match result {
            Ok(()) => self.model.confirmed(number, answer, at),
            // A chain has gone, with the packets that waited.
            Err(error) if error.kind() == ErrorKind::PacketGone => self.model.of(connection).uncertain = true,
            Err(error) if kind == Kind::Error && error.kind() == ErrorKind::InvalidInput => {}
            Err(error) => self.check(Err(error), Some(connection)),
        }
    }

    fn check(&mut self, result: Result<(), Error>, connection: Option<usize>) {
        if let Err(error) = result {
            let connection = connection.unwrap_or_default();
            self.report(Some(Violation { promise: REFUSED, connection, detail: error.to_string() }));
        }
    }

    /// Accepted packets arrive, unless another hook asks about them. Once one is lost, no other is
    /// waited for.
    async fn await_due(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (model, waiting) = (&self.model, &self.waiting);
            let is_due =
                |number: &u32| model.must_arrive(*number) && !waiting.iter().any(|other| other.number == *number);
            self.due.retain(is_due);
            let Some(number) = self.due.first().copied() else { return };
            if self.broken.contains_key(ACCEPTED_LOST) {
                return self.due.clear();
            }
            if Instant::now() > deadline {
                let lost = self.model.lost(number);
                self.report(Some(lost));
            }
            self.drain().await;
            self.receive();
        }
    }

    fn is_translated(&self, id: usize) -> bool {
        self.connections.iter().chain(self.retired.values()).any(|other| other.id == id && other.translated)
    }

    /// Another program's table comes or goes.
    fn stranger(&mut self) {
        if self.strangers.len() > 2 || (!self.strangers.is_empty() && self.random.one_in(2)) {
            let index = self.random.below(self.strangers.len());
            let stranger = self.strangers.remove(index);
            self.note(format!("goes: {}", stranger.what));
            drop(stranger);
        } else {
            self.totals.strangers += 1;
            let number = self.totals.strangers as u32;
            let stranger = Stranger::new(&mut self.random, number, self.round.hooks, self.round.overwriting);
            self.note(format!("comes: {}", stranger.what));
            self.overwritten |= stranger.overwrites;
            self.strangers.push(stranger);
        }
        self.churn += 1;
    }

    /// Other rules, which ask about the same packets.
    fn replace(&mut self) {
        self.totals.replaced += 1;
        let rules = self.rules(self.random.clone().one_in(2));
        self.random.below(2);
        self.note("the rules are replaced".to_owned());
        self.churn += 1;
        self.divert.as_ref().expect("a table").replace_rules(rules).expect("replace the rules");
    }

    fn forget(&mut self) {
        self.totals.forgotten += 1;
        self.note("all flows are forgotten".to_owned());
        self.divert.as_ref().expect("a table").forget_flows().expect("forget all flows");
        self.model.forget();
    }

    fn path_of(&self, id: usize) -> Option<Path> {
        self.connections.iter().chain(self.retired.values()).find(|other| other.id == id).map(|other| other.path)
    }

    fn log_of(&mut self, id: usize, at: Time, text: String) {
        let all = self.connections.iter_mut().chain(self.retired.values_mut());
        if let Some(connection) = { all }.find(|other| other.id == id) {
            connection.log.push((at, text));
        }
    }

    fn retire(&mut self, id: usize) {
        if let Some(index) = self.connections.iter().position(|connection| connection.id == id) {
            self.retired.insert(id, self.connections.remove(index));
        }
    }

    fn report(&mut self, violation: Option<Violation>) {
        let Some(Violation { promise, connection, detail }) = violation else { return };
        let history = self.history(connection, &detail);
        let (count, kept) = self.broken.entry(promise).or_default();
        *count += 1;
        if kept.len() < KEPT {
            kept.push(history);
        }
        // What follows from it is not another one.
        self.model.of(connection).uncertain = true;
        self.retire(connection);
    }

    /// What has happened to a connection.
    fn history(&self, id: usize, detail: &str) -> String {
        let all = self.connections.iter().chain(self.retired.values());
        let own = { all }.find(|connection| connection.id == id).map_or(&[][..], |connection| &connection.log);
        let mut events: Vec<&(Time, String)> = own.iter().chain(&self.log).collect();
        events.sort();
        let lines: Vec<String> = events.iter().map(|(at, text)| format!("    {at:>8}  {text}")).collect();
        let present: Vec<&str> = self.strangers.iter().map(|stranger| &*stranger.what).collect();
        format!("  {detail}; connection {id}; strangers: {present:?}\n{}", lines.join("\n"))
    }
}

/// Binds the calling thread to the CPU on which it runs. The library's threads were started before,
/// and are not bound.
fn stay_on_one_cpu() {
    let mut only = CpuSet::new();
    only.set(sched_getcpu());
    sched_setaffinity(None, &only).expect("bind the thread to a CPU");
}

fn verdict(packet: Packet, answer: Answer) -> Verdict {
    match answer {
        Answer::Accept => packet.accept(),
        Answer::AcceptFlow => packet.accept().for_flow(),
        Answer::Drop => packet.drop(),
        Answer::DropFlow => packet.drop().for_flow(),
        Answer::Reject => packet.reject(),
        Answer::RejectFlow => packet.reject().for_flow(),
    }
}

fn name(answer: Answer) -> &'static str {
    match answer {
        Answer::Accept => "accept",
        Answer::AcceptFlow => "accept for flow",
        Answer::Drop => "drop",
        Answer::DropFlow => "drop for flow",
        Answer::Reject => "reject",
        Answer::RejectFlow => "reject for flow",
    }
}
