//! Verdicts for connections, on both kernels: what comes to the queue, what arrives at the two
//! sides, and which verdicts are refused must be the same.

use std::{
    fs,
    future::Future,
    net::{Ipv4Addr, SocketAddrV4},
    pin::Pin,
};

use etherparse::PacketBuilder;
use libtest_mimic::Trial;
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    FlowMarks, Hook, Packet, Protocol, Queue, Rule, Verdict,
    divert::Match,
    simulated::{self, Kernel, Sent, TestPacket},
};

use crate::{
    common,
    flows::{
        segments::{ACK, Hosts, LAST, RST, RST_ACK, SYN, SYN_ACK, datagram, echo, segment, unreachable},
        unlimited_icmp_errors,
    },
    support::{self, random::Random},
};

type Scenario = for<'a> fn(&'a mut Script) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        const ALL: &[(&str, Scenario)] = &[$((stringify!($name), |script| Box::pin($name(script)))),*];
    };
}

scenarios![
    an_accept_for_the_flow,
    a_denial_for_the_flow,
    a_denial_of_the_first_packet,
    a_rejected_packet,
    two_first_packets,
    two_first_packets_of_both_sides,
    two_packets_of_a_known_connection,
    a_syn_on_an_accepted_connection,
    two_syns_on_a_known_connection,
    a_verdict_for_the_older_connection,
    a_verdict_before_the_connection_is_established,
    a_verdict_in_the_middle_of_a_connection,
    an_icmp_error_about_a_connection,
    an_echo,
    a_protocol_without_ports,
    random_packets_and_verdicts,
];

pub(crate) fn tests() -> impl Iterator<Item = Trial> {
    ALL.iter().map(|(name, scenario)| {
        let name = common::test_name(module_path!(), &format!("flows::{name}"));
        support::test(&name, move || async move {
            let expected = run(World::simulated(), *scenario).await;
            let seen = run(World::real(), *scenario).await;
            for (number, (real, simulated)) in seen.iter().zip(&expected).enumerate() {
                assert_eq!(
                    real,
                    simulated,
                    "step {number}; real left, simulated right; before: {:#?}",
                    &seen[..number]
                );
            }
            assert_eq!(seen.len(), expected.len());
        })
    })
}

async fn run(world: World, scenario: Scenario) -> Vec<String> {
    let mut script = Script { world, client_port: 40_000, waiting: Vec::new(), seen: Vec::new() };
    scenario(&mut script).await;
    script.seen
}

/// Two hosts with this one between them, and a queue at the forward hook.
enum World {
    Simulated { kernel: Kernel, queue: Queue, sent: Vec<(bool, Sent)> },
    Real { hosts: Box<Hosts>, queue: Queue, _divert: Box<Divert> },
}

impl World {
    fn simulated() -> Self {
        let (kernel, queue) = simulated::queue(Queue::builder(0).flow_marks(FlowMarks::default())).unwrap();
        Self::Simulated { kernel, queue, sent: Vec::new() }
    }

    fn real() -> Self {
        let hosts = Box::new(Hosts::new());
        unlimited_icmp_errors();
        // On a slow machine, entries must not end within a scenario.
        for name in ["udp_timeout", "udp_timeout_stream"] {
            fs::write(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"), "600").unwrap();
        }
        let marks = FlowMarks::default();
        let queue = common::bind_now(Queue::builder(0).flow_marks(marks));
        let rule = Rule::new(Hook::Forward).unless(Match::protocol(Protocol::Other(LAST)));
        let divert = Divert::builder().flow_marks(marks).rule(rule.to_queue(0)).install().unwrap();
        Self::Real { hosts, queue, _divert: Box::new(divert) }
    }

    fn queue(&mut self) -> &mut Queue {
        match self {
            Self::Simulated { queue, .. } | Self::Real { queue, .. } => queue,
        }
    }

    /// The addresses of the client and of the server.
    fn addresses(&self) -> [Ipv4Addr; 2] {
        match self {
            Self::Simulated { .. } => [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 1, 1)],
            Self::Real { hosts, .. } => [hosts.client.address(), hosts.server.address()],
        }
    }

    fn send(&mut self, of_client: bool, packet: Vec<u8>) {
        let [client, server] = self.addresses();
        match self {
            Self::Simulated { kernel, sent, .. } => {
                sent.push((of_client, kernel.send(TestPacket::raw(packet).hook(Hook::Forward))));
            }
            Self::Real { hosts, .. } if of_client => hosts.client.send(&packet, server),
            Self::Real { hosts, .. } => hosts.server.send(&packet, client),
        }
    }

    /// The numbers of packets that have arrived at the server and at the client since the last
    /// call.
    fn arrived(&mut self) -> [u64; 2] {
        match self {
            Self::Simulated { sent, .. } => {
                let mut arrived = [0, 0];
                sent.retain(|(of_client, sent)| {
                    let Some(outcome) = sent.try_outcome() else { return true };
                    let at_client = if outcome.accepted { !of_client } else { *of_client };
                    arrived[usize::from(at_client)] += u64::from(outcome.accepted || outcome.rejected);
                    false
                });
                arrived
            }
            Self::Real { hosts, .. } => hosts.arrived(),
        }
    }
}

/// A world, and a record of what was seen.
struct Script {
    world: World,
    client_port: u16,
    waiting: Vec<Packet>,
    seen: Vec<String>,
}

type Decide = fn(Packet) -> Verdict;

const ACCEPT: Decide = |packet| packet.accept();
const DROP: Decide = |packet| packet.drop();
const REJECT: Decide = |packet| packet.reject();
const ACCEPT_FLOW: Decide = |packet| packet.accept().for_flow();
const DROP_FLOW: Decide = |packet| packet.drop().for_flow();
const REJECT_FLOW: Decide = |packet| packet.reject().for_flow();
const ACCEPTS: [Decide; 2] = [ACCEPT, ACCEPT_FLOW];
const DENIALS: [Decide; 2] = [DROP_FLOW, REJECT_FLOW];

impl Script {
    fn addresses(&self) -> [SocketAddrV4; 2] {
        let [client, server] = self.world.addresses();
        [SocketAddrV4::new(client, self.client_port), SocketAddrV4::new(server, 80)]
    }

    /// The addresses of sender and receiver.
    fn from(&self, of_client: bool) -> [SocketAddrV4; 2] {
        let [client, server] = self.addresses();
        if of_client { [client, server] } else { [server, client] }
    }

    /// A client sends a segment with these flags, numbers and data.
    fn client(&mut self, flags: u8, numbers: (u32, u32), data: &[u8]) {
        let [from, to] = self.from(true);
        self.send(true, segment(from, to, flags, numbers, data));
    }

    fn server(&mut self, flags: u8, numbers: (u32, u32), data: &[u8]) {
        let [from, to] = self.from(false);
        self.send(false, segment(from, to, flags, numbers, data));
    }

    fn datagram(&mut self, of_client: bool) {
        let [from, to] = self.from(of_client);
        self.send(of_client, datagram(from, to, b"data"));
    }

    fn echo(&mut self, of_client: bool, reply: bool, id: u16) {
        let [from, to] = self.from(of_client);
        self.send(of_client, echo(*from.ip(), *to.ip(), reply, id));
    }

    /// Of a protocol without ports.
    fn tunnelled(&mut self, of_client: bool) {
        let [from, to] = self.from(of_client);
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64);
        builder.write(&mut bytes, 94.into(), b"data").unwrap();
        self.send(of_client, bytes);
    }

    /// The server sends an ICMP error about a segment or a datagram of the client.
    fn error(&mut self, about: fn([SocketAddrV4; 2]) -> Vec<u8>) {
        let [client, server] = self.from(true);
        let quoted = about([client, server]);
        self.send(false, unreachable(server, client, &quoted[..28]));
    }

    fn send(&mut self, of_client: bool, packet: Vec<u8>) {
        self.world.send(of_client, packet);
    }

    /// Records what has arrived, and what has come to the queue.
    fn look(&mut self) {
        let arrived = self.world.arrived();
        let [client, _] = self.world.addresses();
        let queued = std::iter::from_fn(|| self.world.queue().try_recv().ok());
        let queued: Vec<Packet> = queued.collect();
        let describe = |packet: &Packet| {
            let payload = packet.payload();
            let of_client = payload[12..16] == client.octets();
            let flags = if payload[9] == 6 { payload[33] } else { 0 };
            format!("protocol {} flags {flags:#x} of client {of_client} priority {}", payload[9], packet.priority())
        };
        let described: Vec<String> = queued.iter().map(describe).collect();
        self.seen.push(format!("arrived {arrived:?}, queued {described:?}"));
        self.waiting.extend(queued);
    }

    /// Decides a packet that waits.
    async fn decide(&mut self, index: usize, decide: Decide) {
        if index >= self.waiting.len() {
            return self.seen.push("no such packet".to_owned());
        }
        let verdict = decide(self.waiting.remove(index));
        let result = verdict.confirm().await.map_err(|error| error.kind());
        self.seen.push(format!("{result:?}"));
        self.look();
    }

    /// Records what becomes of the packets so far: each is decided in the same way.
    async fn all(&mut self, decide: Decide) {
        self.look();
        while !self.waiting.is_empty() {
            self.decide(0, decide).await;
        }
    }

    /// A TCP connection, whose packets are accepted one by one.
    async fn open(&mut self) {
        self.client(SYN, (1000, 0), b"");
        self.all(ACCEPT).await;
        self.server(SYN_ACK, (5000, 1001), b"");
        self.all(ACCEPT).await;
        self.client(ACK, (1001, 5001), b"");
        self.all(ACCEPT).await;
    }

    /// Data in both directions.
    async fn data(&mut self) {
        self.client(ACK, (1001, 5001), b"request");
        self.all(ACCEPT).await;
        self.server(ACK, (5001, 1001), b"response");
        self.all(ACCEPT).await;
    }
}

async fn an_accept_for_the_flow(script: &mut Script) {
    script.client(SYN, (1000, 0), b"");
    script.all(ACCEPT_FLOW).await;
    script.server(SYN_ACK, (5000, 1001), b"");
    script.client(ACK, (1001, 5001), b"");
    script.data().await;
    for of_client in [true, true, false, true] {
        script.datagram(of_client);
        script.all(ACCEPT_FLOW).await;
    }
}

/// By each of the first packets but the SYN; a server that sends before the third packet.
async fn a_verdict_before_the_connection_is_established(script: &mut Script) {
    for accepted_by in 0..4 {
        script.client_port += 1;
        script.client(SYN, (1000, 0), b"");
        script.all(ACCEPT).await;
        for packet in 0..5 {
            match packet {
                0 => script.server(SYN_ACK, (5000, 1001), b""),
                1 => script.server(ACK, (5001, 1001), b"early"),
                2 => script.client(ACK, (1001, 5006), b""),
                3 => script.client(ACK, (1001, 5006), b"request"),
                _ => script.server(ACK, (5006, 1008), b"response"),
            }
            script.all(if packet == accepted_by { ACCEPT_FLOW } else { ACCEPT }).await;
        }
    }
}

async fn a_verdict_in_the_middle_of_a_connection(script: &mut Script) {
    for accepted_by in 0..5 {
        script.client_port += 1;
        for packet in 0..6 {
            match packet {
                0 | 3 => script.client(ACK, (1001, 5001), b""),
                1 => script.client(ACK, (1001, 5001), b"request"),
                2 => script.server(ACK, (5001, 1008), b""),
                4 => script.server(ACK, (5001, 1008), b"response"),
                _ => script.client(ACK, (1008, 5009), b""),
            }
            script.all(if packet == accepted_by { ACCEPT_FLOW } else { ACCEPT }).await;
        }
    }
}

async fn a_denial_for_the_flow(script: &mut Script) {
    for deny in DENIALS {
        script.client_port += 1;
        script.open().await;
        script.client(ACK, (1001, 5001), b"bad");
        script.all(deny).await;
        script.data().await;
        script.client(RST, (1001, 0), b"");
        script.client(SYN, (1001, 0), b"");
        script.all(ACCEPT).await;
        script.data().await;
    }
}

async fn a_denial_of_the_first_packet(script: &mut Script) {
    for deny in DENIALS {
        script.client_port += 1;
        script.datagram(true);
        script.all(deny).await;
        for of_client in [true, false, true, false, true] {
            script.datagram(of_client);
            script.all(ACCEPT_FLOW).await;
        }
        script.client(SYN, (1000, 0), b"");
        script.all(deny).await;
        for flags in [SYN_ACK, ACK, RST, SYN] {
            script.client(flags, (1000, 0), b"");
            script.all(ACCEPT_FLOW).await;
            script.server(flags, (7000, 0), b"");
            script.all(ACCEPT).await;
        }
    }
}

async fn a_rejected_packet(script: &mut Script) {
    for _ in 0..2 {
        script.datagram(true);
        script.all(REJECT).await;
        script.client(SYN, (1000, 0), b"");
        script.all(REJECT).await;
    }
}

async fn two_first_packets(script: &mut Script) {
    for (accept, deny) in ACCEPTS.into_iter().flat_map(|accept| DENIALS.map(|deny| (accept, deny))) {
        for decisions in [[accept, deny], [deny, accept]] {
            for first in [0, 1] {
                script.client_port += 1;
                script.datagram(true);
                script.datagram(true);
                script.look();
                script.decide(first, decisions[0]).await;
                script.decide(0, decisions[1]).await;
                for of_client in [true, false, true] {
                    script.datagram(of_client);
                    script.all(ACCEPT).await;
                }
            }
        }
    }
    // An older kernel gives the second packet the entry of the first one.
    if common::kernel_release() < (6, 12) {
        return;
    }
    script.client_port += 1;
    script.datagram(true);
    script.datagram(true);
    script.look();
    script.decide(0, ACCEPT).await;
    script.decide(0, ACCEPT_FLOW).await;
    for _ in 0..2 {
        script.datagram(true);
        script.all(ACCEPT_FLOW).await;
    }
}

async fn two_first_packets_of_both_sides(script: &mut Script) {
    for (accept, deny) in ACCEPTS.into_iter().flat_map(|accept| DENIALS.map(|deny| (accept, deny))) {
        for accept_first in [true, false] {
            script.client_port += 1;
            script.datagram(true);
            script.datagram(false);
            script.look();
            if accept_first {
                script.decide(1, accept).await;
                script.decide(0, deny).await;
            } else {
                script.decide(0, deny).await;
                script.decide(0, accept).await;
            }
            for of_client in [true, false, true] {
                script.datagram(of_client);
                script.all(ACCEPT_FLOW).await;
            }
        }
    }
}

async fn two_packets_of_a_known_connection(script: &mut Script) {
    for deny in DENIALS {
        for decisions in [[ACCEPT_FLOW, deny], [deny, ACCEPT_FLOW]] {
            script.client_port += 1;
            script.open().await;
            script.client(ACK, (1001, 5001), b"one");
            script.server(ACK, (5001, 1001), b"two");
            script.look();
            for decide in decisions {
                script.decide(0, decide).await;
            }
            script.data().await;
        }
    }
}

async fn a_syn_on_an_accepted_connection(script: &mut Script) {
    for end in [None, Some(RST), Some(RST_ACK)] {
        for verdicts in [[ACCEPT, ACCEPT_FLOW], [ACCEPT_FLOW, ACCEPT], [ACCEPT, DROP_FLOW], [DROP, ACCEPT]] {
            script.client_port += 1;
            script.client(SYN, (1000, 0), b"");
            script.all(ACCEPT_FLOW).await;
            script.server(SYN_ACK, (5000, 1001), b"");
            script.client(ACK, (1001, 5001), b"");
            script.look();
            if let Some(flags) = end {
                script.server(flags, (5001, 1001), b"");
                script.look();
            }
            script.client(SYN, (90_000, 0), b"");
            script.all(verdicts[0]).await;
            script.server(SYN_ACK, (70_000, 90_001), b"");
            script.all(verdicts[1]).await;
            script.client(ACK, (90_001, 70_001), b"");
            script.all(verdicts[1]).await;
            script.client(ACK, (90_001, 70_001), b"request");
            script.all(verdicts[1]).await;
        }
    }
}

async fn two_syns_on_a_known_connection(script: &mut Script) {
    let later: [Decide; 3] =
        [ACCEPT, |packet| packet.accept().priority(0), |packet| packet.accept().priority(0x00ff_ffff)];
    for (decide, answered) in later.iter().flat_map(|decide| [false, true].map(|answered| (decide, answered))) {
        script.client_port += 1;
        script.open().await;
        script.client(SYN, (20_000, 0), b"");
        script.client(SYN, (30_000, 0), b"");
        script.look();
        script.decide(0, ACCEPT_FLOW).await;
        if answered {
            script.server(SYN_ACK, (50_000, 20_001), b"");
            script.look();
        }
        script.decide(0, *decide).await;
        script.server(SYN_ACK, (50_000, 30_001), b"");
        script.all(ACCEPT).await;
        script.client(ACK, (30_001, 50_001), b"request");
        script.all(ACCEPT).await;
    }
}

async fn a_verdict_for_the_older_connection(script: &mut Script) {
    for new_first in [true, false] {
        script.client_port += 1;
        script.open().await;
        script.client(ACK, (1001, 5001), b"request");
        script.look();
        script.server(RST, (5001, 0), b"");
        script.look();
        script.decide(1, ACCEPT).await;
        script.client(SYN, (90_000, 0), b"");
        script.look();
        if new_first {
            script.decide(1, ACCEPT).await;
            script.decide(0, ACCEPT_FLOW).await;
        } else {
            script.decide(0, ACCEPT_FLOW).await;
            script.decide(0, ACCEPT).await;
        }
        script.server(SYN_ACK, (70_000, 90_001), b"");
        script.all(ACCEPT).await;
        script.client(ACK, (90_001, 70_001), b"request");
        script.all(ACCEPT).await;
    }
}

async fn an_icmp_error_about_a_connection(script: &mut Script) {
    let about: fn([SocketAddrV4; 2]) -> Vec<u8> = |[from, to]| segment(from, to, ACK, (1001, 5001), b"data");
    for decide in ACCEPTS.into_iter().chain(DENIALS).chain([REJECT]) {
        script.client_port += 1;
        // About a connection that does not exist.
        script.error(about);
        script.all(decide).await;
        script.open().await;
        script.error(about);
        script.all(decide).await;
        script.data().await;
        script.client(ACK, (1001, 5001), b"last");
        script.all(decide).await;
        script.error(about);
        script.all(decide).await;
        script.data().await;
    }
}

async fn an_echo(script: &mut Script) {
    for (id, decide) in (1..).zip(ACCEPTS.into_iter().chain(DENIALS).chain([REJECT])) {
        for (of_client, reply) in [(true, false), (false, true), (true, false), (false, false), (true, true)] {
            script.echo(of_client, reply, id);
            script.all(decide).await;
        }
    }
}

async fn a_protocol_without_ports(script: &mut Script) {
    for decide in [ACCEPT, ACCEPT_FLOW] {
        for of_client in [true, false, true, false] {
            script.tunnelled(of_client);
            script.all(decide).await;
        }
    }
}

/// Several datagram flows at once. No entry of connection tracking ends within the time of a round.
async fn random_packets_and_verdicts(script: &mut Script) {
    const DECISIONS: [Decide; 7] = [ACCEPT, ACCEPT, DROP, REJECT, ACCEPT_FLOW, DROP_FLOW, REJECT_FLOW];
    const PORTS: usize = 16;
    for round in 0..5 {
        let mut random = Random::new(round as u64);
        for _ in 0..300 {
            if !script.waiting.is_empty() && !random.one_in(3) {
                let index = random.below(script.waiting.len());
                script.decide(index, DECISIONS[random.below(DECISIONS.len())]).await;
                continue;
            }
            script.client_port = (50_000 + round * PORTS + random.below(PORTS)) as u16;
            match random.below(8) {
                0 => script.error(|[from, to]| datagram(from, to, b"data")),
                _ => script.datagram(!random.one_in(3)),
            }
            script.look();
        }
        script.all(ACCEPT).await;
    }
}
