//! Connection tracking entries of packets, and changes to them in verdicts.
//!
//! On a kernel without the glue between queues and connection tracking
//! (`NETFILTER_NETLINK_GLUE_CT`), each of these tests checks only that such a queue cannot be bound
//! and that a change is refused.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use futures::SinkExt;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{DataAttribute, Immediate, Register};
use tokio_nfqueue::{
    Action, ErrorKind, Packet, Queue, Verdict,
    conntrack::{ConnectionState, Conntrack, Direction, Expectation, FlowTuple},
};

use crate::{
    common::{
        self, Hook, Protocol, Rule, divert, next, number,
        rules::{self, Expressions, NetfilterProtoFamily, Place},
        soon,
    },
    flows::segments::of_protocol,
    support,
};

tests![
    both the_first_packet_has_an_unconfirmed_entry,
    both replies_change_the_state,
    one an_ipv6_entry_is_decoded,
    one the_zone_of_an_entry_is_decoded,
    one protocols_without_ports_have_an_identifier_or_nothing,
    one an_icmp_error_is_related,
    one untracked_packets_have_no_entry,
    both a_connection_mark_is_seen_in_later_packets,
    one a_connection_mark_changes_only_within_its_mask,
    one labels_change_only_within_their_mask,
    one labels_need_a_rule_that_sets_labels,
    one a_timeout_lasts_until_the_next_packet,
    one a_very_long_timeout_is_limited_by_the_kernel,
    one all_changes_work_in_one_verdict,
    one an_expected_connection_is_related,
    one an_expectation_matches_once_unless_it_is_permanent,
    one an_expectation_without_a_helper_is_ignored,
    one a_dropped_packet_leaves_no_entry,
    both a_queue_bound_without_conntrack_refuses_changes,
];

/// Set to 1 if the kernel has the glue, so that binding with conntrack must succeed.
const EXPECTED: &str = "TOKIO_NFQUEUE_EXPECT_CONNTRACK";

/// A queue with conntrack, or `None` on a kernel without it, after a check of the refusal.
async fn with_conntrack(number: u16) -> Option<Queue> {
    match Queue::builder(number).conntrack(true).bind().await {
        Ok(queue) => Some(queue),
        Err(error) => {
            assert!(std::env::var_os(EXPECTED).is_none_or(|value| value != "1"), "{EXPECTED}=1, but {error}");
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("conntrack"), "{error}");
            assert_eq!(support::queue_line(number), None);
            refuses_changes(number).await;
            None
        }
    }
}

/// Binds a queue without conntrack, and checks that it refuses each change.
async fn refuses_changes(number: u16) {
    let mut queue = Queue::builder(number).on_unanswered(Action::Accept).bind().await.unwrap();
    let _divert = divert([udp_out().to_queue(number)]);
    let flow = Pair::new("127.0.0.1");
    let changes: [fn(Verdict) -> Verdict; 4] = [
        |verdict| verdict.connection_mark(1, 1),
        |verdict| verdict.connection_labels([1; 16], [1; 16]),
        |verdict| verdict.connection_timeout(Duration::from_secs(60)),
        |verdict| verdict.expectation(Expectation::udp(LATER)),
    ];
    for (index, change) in (0..).zip(changes) {
        flow.ask(index);
        let packet = next(&mut queue).await;
        assert_eq!((packet.conntrack(), packet.connection_state(), packet.direction()), (None, None, None));
        let id = packet.id();
        let verdict = change(packet.accept());
        let error = match index {
            0 => verdict.submit().unwrap_err(),
            1 => soon("the refusal", verdict.confirm()).await.unwrap_err(),
            _ => soon("the refusal", queue.sink().send(verdict)).await.unwrap_err(),
        };
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::InvalidInput, Some(id)), "{error}");
        assert!(error.to_string().contains("conntrack"), "{error}");
    }
    soon("the flush", queue.sink().flush()).await;
    // Packets with a refused verdict get the default action.
    for index in 0..4 {
        assert_eq!(flow.heard(), index);
    }
}

/// The destination of expected connections.
const LATER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9100);

/// Two sockets on loopback: the client sends requests, the server replies.
struct Pair {
    client: UdpSocket,
    server: UdpSocket,
}

impl Pair {
    fn new(address: &str) -> Self {
        let address: IpAddr = address.parse().unwrap();
        Self { client: support::udp((address, 0)), server: support::udp((address, common::PORT)) }
    }

    fn ask(&self, number: u32) {
        self.client.send_to(&number.to_be_bytes(), self.server.local_addr().unwrap()).unwrap();
    }

    fn reply(&self, number: u32) {
        self.server.send_to(&number.to_be_bytes(), self.client.local_addr().unwrap()).unwrap();
    }

    /// The next number that the server receives.
    fn heard(&self) -> u32 {
        let mut datagram = [0; 4];
        self.server.recv(&mut datagram).expect("a question");
        u32::from_be_bytes(datagram)
    }

    #[track_caller]
    fn assert_is(&self, entry: &Conntrack) {
        let (client, server) = (self.client.local_addr().unwrap(), self.server.local_addr().unwrap());
        assert_eq!(entry.original, Some(FlowTuple::udp(client, server)));
        assert_eq!(entry.reply, Some(FlowTuple::udp(server, client)));
    }
}

/// At the output hook a packet is seen before its entry is confirmed.
fn udp_out() -> Rule {
    Rule::new(Hook::Output).protocol(Protocol::Udp)
}

#[track_caller]
fn assert_is(packet: &Packet, state: ConnectionState, direction: Direction) {
    assert_eq!((packet.connection_state(), packet.direction()), (Some(state), Some(direction)));
}

/// The next packet, and its entry.
async fn entry(queue: &mut Queue) -> (Packet, Conntrack) {
    let packet = next(queue).await;
    let entry = packet.conntrack().expect("a connection tracking entry");
    (packet, entry)
}

/// The entry's mark. For an entry without one, some kernels send 0 and others send nothing.
fn mark(entry: &Conntrack) -> u32 {
    entry.mark.unwrap_or(0)
}

/// Submits a verdict and waits until the kernel has acknowledged it.
async fn give(verdict: Verdict) {
    soon("the reply of the kernel", verdict.confirm()).await.unwrap();
}

async fn the_first_packet_has_an_unconfirmed_entry() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    pair.ask(1);
    let (packet, first) = entry(&mut queue).await;
    assert_is(&packet, ConnectionState::New, Direction::Original);
    pair.assert_is(&first);
    let status = first.status.unwrap();
    assert!(!status.is_confirmed() && !status.has_seen_reply() && !status.is_assured() && !status.is_expected());
    assert!(!status.is_source_nat() && !status.is_destination_nat());
    assert_eq!((mark(&first), first.labels, first.zone), (0, None, None));
    assert!(first.id.is_some());
    give(packet.accept()).await;
    assert_eq!(pair.heard(), 1);

    pair.ask(2);
    let (packet, second) = entry(&mut queue).await;
    // The server has not replied yet.
    assert_is(&packet, ConnectionState::New, Direction::Original);
    pair.assert_is(&second);
    assert!(second.status.unwrap().is_confirmed());
    assert_eq!(second.id, first.id);
    let timeout = second.timeout.unwrap();
    assert!(timeout > Duration::ZERO && timeout <= Duration::from_secs(30), "{timeout:?}");
    packet.accept().submit().unwrap();
}

async fn replies_change_the_state() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    pair.ask(1);
    let (packet, first) = entry(&mut queue).await;
    give(packet.accept()).await;
    pair.reply(2);
    let (packet, second) = entry(&mut queue).await;
    assert_is(&packet, ConnectionState::Established, Direction::Reply);
    // The directions of the entry are those of the connection, not of the packet.
    pair.assert_is(&second);
    assert!(second.status.unwrap().has_seen_reply());
    give(packet.accept()).await;
    pair.ask(3);
    let (packet, third) = entry(&mut queue).await;
    assert_is(&packet, ConnectionState::Established, Direction::Original);
    pair.assert_is(&third);
    let status = third.status.unwrap();
    assert!(status.has_seen_reply() && status.is_confirmed());
    // Contains SEEN_REPLY and CONFIRMED.
    assert_eq!(status.bits() & 0b1010, 0b1010);
    assert_eq!((second.id, third.id), (first.id, first.id));
    packet.accept().submit().unwrap();

    // Another flow has another entry.
    let other = support::udp("127.0.0.1:0");
    other.send_to(&[0; 4], pair.server.local_addr().unwrap()).unwrap();
    let (packet, fourth) = entry(&mut queue).await;
    assert_is(&packet, ConnectionState::New, Direction::Original);
    assert_eq!(fourth.original.unwrap().source, other.local_addr().unwrap());
    assert_ne!(fourth.id, first.id);
    packet.accept().submit().unwrap();
}

async fn an_ipv6_entry_is_decoded() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("::1");
    pair.ask(1);
    let (packet, entry) = entry(&mut queue).await;
    pair.assert_is(&entry);
    give(packet.accept().connection_mark(6, 6)).await;
    assert_eq!(pair.heard(), 1);
}

async fn the_zone_of_an_entry_is_decoded() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    install("zoned", Some(BEFORE_TRACKING), vec![immediate(5_u16.to_ne_bytes().to_vec()), ct(SOURCE, ZONE)]);
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    pair.ask(1);
    let (packet, entry) = entry(&mut queue).await;
    assert_eq!(entry.zone, Some(5));
    pair.assert_is(&entry);
    give(packet.accept()).await;
}

async fn protocols_without_ports_have_an_identifier_or_nothing() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let [v4, v6] = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    // Without the key of PPTP, GRE has no ports. The last is for experiments (RFC 3692).
    let others = [47, 253].map(Protocol::Other);
    let protocols = [Protocol::Icmp, Protocol::Icmpv6].into_iter().chain(others);
    let _divert = divert(protocols.map(|protocol| Rule::new(Hook::Output).protocol(protocol).to_queue(0)));
    let is = |entry: Conntrack, protocol, address, port| {
        let [source, destination] = [port, 0].map(|port| SocketAddr::new(address, port));
        let tuple = Some(FlowTuple { protocol, source, destination });
        assert_eq!((entry.original, entry.reply), (tuple, tuple));
    };
    for (address, protocol) in [(v4, Protocol::Icmp), (v6, Protocol::Icmpv6)] {
        support::ping(address, Duration::from_millis(1));
        let (packet, request) = entry(&mut queue).await;
        is(request, protocol, address, u16::from_be_bytes(*b"nf"));
        give(packet.accept()).await;
        // The directions are those of the connection, not of the packet.
        let (packet, reply) = entry(&mut queue).await;
        assert_is(&packet, ConnectionState::Established, Direction::Reply);
        is(reply, protocol, address, u16::from_be_bytes(*b"nf"));
        give(packet.accept()).await;
    }
    for protocol in others {
        let bytes = of_protocol(protocol.number(), Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, &[0; 8]);
        support::send_raw_ipv4(&support::raw_ipv4(), &bytes, Ipv4Addr::LOCALHOST).unwrap();
        let (packet, entry) = entry(&mut queue).await;
        is(entry, protocol, v4, 0);
        give(packet.drop()).await;
    }
}

async fn an_icmp_error_is_related() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([Rule::new(Hook::Output).protocol(Protocol::Icmp).to_queue(0)]);
    let client = support::udp("127.0.0.1:0");
    let unbound = SocketAddr::from(([127, 0, 0, 1], 9999));
    client.send_to(b"hello?", unbound).unwrap();
    // Port unreachable.
    let (packet, entry) = entry(&mut queue).await;
    assert_is(&packet, ConnectionState::Related, Direction::Reply);
    assert_eq!(entry.original, Some(FlowTuple::udp(client.local_addr().unwrap(), unbound)));
    packet.accept().submit().unwrap();
}

async fn untracked_packets_have_no_entry() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    for turn in 0..2 {
        pair.ask(turn);
        let packet = next(&mut queue).await;
        assert_eq!((packet.conntrack(), packet.connection_state(), packet.direction()), (None, None, None), "{turn}");
        // A program cannot know beforehand whether a packet has an entry, so this is no error.
        give(packet.accept().connection_mark(1, 1)).await;
        assert_eq!(pair.heard(), turn);
        if turn == 0 {
            // At first there is no connection tracking. Now there is, but these packets are exempt.
            track();
            let notrack = Expressions::Other { expression_type: "notrack".to_owned(), attributes: Vec::new() };
            install("exempt", Some(BEFORE_TRACKING), vec![notrack]);
        }
    }
}

async fn a_connection_mark_is_seen_in_later_packets() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let (pair, other) = (Pair::new("127.0.0.1"), Pair::new("127.0.0.2"));
    pair.ask(1);
    let packet = next(&mut queue).await;
    // The connection's mark, not the packet's.
    give(packet.accept().connection_mark(0xdead_beef, u32::MAX)).await;
    pair.ask(2);
    let (packet, marked) = entry(&mut queue).await;
    assert_eq!((number(&packet), marked.mark, packet.mark()), (2, Some(0xdead_beef), 0));
    packet.accept().submit().unwrap();
    // It applies to both directions.
    pair.reply(3);
    let (packet, marked) = entry(&mut queue).await;
    assert_is(&packet, ConnectionState::Established, Direction::Reply);
    assert_eq!(marked.mark, Some(0xdead_beef));
    packet.accept().submit().unwrap();
    other.ask(4);
    let (packet, unmarked) = entry(&mut queue).await;
    assert_eq!(mark(&unmarked), 0);
    packet.accept().submit().unwrap();
    // The mark is removed.
    pair.ask(5);
    let packet = next(&mut queue).await;
    give(packet.accept().connection_mark(0, u32::MAX)).await;
    pair.ask(6);
    let (packet, unmarked) = entry(&mut queue).await;
    assert_eq!(mark(&unmarked), 0);
    packet.accept().submit().unwrap();
    soon("the flush", queue.sink().flush()).await;
    for number in [1, 2, 5, 6] {
        assert_eq!(pair.heard(), number);
    }
}

async fn a_connection_mark_changes_only_within_its_mask() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    let changes = [
        ((0x1234_5678, u32::MAX), 0x1234_5678),
        ((0x0000_0009, 0x0000_000f), 0x1234_5679),
        ((0x0000_ab00, 0x0000_ff00), 0x1234_ab79),
        ((0, 0x0fff_0000), 0x1000_ab79),
        // Bits outside of the mask are ignored.
        ((0xffff_ffff, 0x0000_00ff), 0x1000_abff),
        ((0xffff_ffff, 0), 0x1000_abff),
    ];
    for ((value, mask), expected) in changes {
        pair.ask(0);
        let packet = next(&mut queue).await;
        give(packet.accept().connection_mark(value, mask)).await;
        pair.ask(0);
        let (packet, entry) = entry(&mut queue).await;
        assert_eq!(entry.mark, Some(expected), "{:#x?} with {value:#x} in {mask:#x}", entry.mark);
        packet.accept().submit().unwrap();
    }
}

async fn labels_change_only_within_their_mask() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track_with_labels();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    let first: [u8; 16] = std::array::from_fn(|index| index as u8 + 1);
    let mut second = first;
    (second[0], second[15]) = (0xf1, 0);
    let mut mask = [0; 16];
    (mask[0], mask[15]) = (0xf0, 0xff);
    let mut value = [0xff; 16];
    value[15] = 0;
    for ((value, mask), expected) in
        [((first, [0xff; 16]), Some(first)), ((value, mask), Some(second)), (([0; 16], [0xff; 16]), None)]
    {
        pair.ask(0);
        let packet = next(&mut queue).await;
        give(packet.accept().connection_labels(value, mask)).await;
        pair.ask(0);
        let (packet, entry) = entry(&mut queue).await;
        assert_eq!(entry.labels, expected);
        packet.accept().submit().unwrap();
    }
}

async fn labels_need_a_rule_that_sets_labels() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    pair.ask(0);
    let packet = next(&mut queue).await;
    // The kernel reports no error, and ignores the mark as well.
    give(packet.accept().connection_labels([1; 16], [0xff; 16]).connection_mark(1, 1)).await;
    pair.ask(0);
    let (packet, entry) = entry(&mut queue).await;
    assert_eq!((entry.labels, mark(&entry)), (None, 0));
    packet.accept().submit().unwrap();
}

async fn a_timeout_lasts_until_the_next_packet() {
    let (Some(mut queue), Some(mut second)) = (with_conntrack(0).await, with_conntrack(1).await) else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    for turn in 0..2 {
        // In the first round the entry is not confirmed.
        pair.ask(turn);
        let (packet, before) = entry(&mut queue).await;
        assert!(before.timeout.is_some_and(|timeout| timeout <= Duration::from_secs(30)), "{turn}: {before:?}");
        assert_eq!(before.status.unwrap().is_confirmed(), turn == 1);
        // The packet does not leave netfilter in between.
        give(packet.requeue(1).connection_timeout(Duration::from_millis(1_000_900))).await;
        let (packet, after) = entry(&mut second).await;
        let timeout = after.timeout.unwrap();
        assert!((Duration::from_secs(900)..=Duration::from_secs(1000)).contains(&timeout), "{turn}: {timeout:?}");
        give(packet.accept()).await;
        assert_eq!(pair.heard(), turn);
    }
    pair.ask(2);
    let (packet, entry) = entry(&mut queue).await;
    assert!(entry.timeout.unwrap() <= Duration::from_secs(30), "{entry:?}");
    packet.accept().submit().unwrap();
}

async fn a_very_long_timeout_is_limited_by_the_kernel() {
    let (Some(mut queue), Some(mut second)) = (with_conntrack(0).await, with_conntrack(1).await) else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    pair.ask(0);
    let packet = next(&mut queue).await;
    give(packet.requeue(1).connection_timeout(Duration::MAX)).await;
    let (packet, entry) = entry(&mut second).await;
    // The kernel limits it to 2³¹ − 1 ticks: 24 days at 1000 ticks per second.
    assert!(entry.timeout.unwrap() > Duration::from_secs(24 * 86_400), "{entry:?}");
    give(packet.accept()).await;
    assert_eq!(pair.heard(), 0);
}

async fn all_changes_work_in_one_verdict() {
    let (Some(mut queue), Some(mut second)) = (with_conntrack(0).await, with_conntrack(1).await) else { return };
    track_with_labels();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    pair.ask(7);
    let (packet, before) = entry(&mut queue).await;
    let payload = packet.payload().to_vec();
    let verdict = packet
        .requeue(1)
        .mark(3)
        .connection_mark(4, 0xff)
        .connection_labels([5; 16], [0xff; 16])
        .connection_timeout(Duration::from_secs(600));
    give(verdict).await;
    let (packet, after) = entry(&mut second).await;
    assert_eq!((packet.mark(), after.mark, after.labels), (3, Some(4), Some([5; 16])));
    assert!(after.timeout.unwrap() > Duration::from_secs(500));
    assert_eq!((after.id, packet.payload().to_vec()), (before.id, payload));
    give(packet.accept()).await;
    assert_eq!(pair.heard(), 7);
}

/// Sends a request, and adds an expectation to its connection. Returns the entry of the connection.
async fn expect(queue: &mut Queue, pair: &Pair, expectation: Expectation) -> Conntrack {
    pair.ask(0);
    let (packet, first) = entry(queue).await;
    give(packet.accept().expectation(expectation)).await;
    assert_eq!(pair.heard(), 0);
    first
}

/// Sends a packet to the expected destination. Returns its state and its entry.
async fn follow(queue: &mut Queue, from: &UdpSocket) -> (ConnectionState, Conntrack) {
    from.send_to(&[0; 4], LATER).unwrap();
    let (packet, entry) = entry(queue).await;
    let state = packet.connection_state().unwrap();
    assert_eq!(packet.direction(), Some(Direction::Original));
    give(packet.accept()).await;
    (state, entry)
}

async fn an_expected_connection_is_related() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    assist();
    let _divert = divert([udp_out().to_queue(0)]);
    let _later = support::udp(LATER);
    let (pair, source) = (Pair::new("127.0.0.1"), support::udp("127.0.0.1:0"));
    let (state, entry) = follow(&mut queue, &source).await;
    assert_eq!((state, entry.master), (ConnectionState::New, None), "before");

    // Each of the wrong sources differs in one thing: the source port or the source address.
    let [right, other] = ["127.0.0.1:0"; 2].map(support::udp);
    let port = right.local_addr().unwrap().port();
    let elsewhere = support::udp(("127.0.0.2", port));
    let expectation = Expectation::udp(LATER).source_address(Ipv4Addr::LOCALHOST.into()).source_port(port);
    let first = expect(&mut queue, &pair, expectation).await;
    assert_eq!((first.helper.as_deref(), first.master), (Some(HELPER), None));
    for from in [other, elsewhere] {
        let (state, entry) = follow(&mut queue, &from).await;
        assert_eq!((state, entry.master), (ConnectionState::New, None));
        assert!(!entry.status.unwrap().is_expected());
    }
    let (state, entry) = follow(&mut queue, &right).await;
    assert_eq!((state, entry.master), (ConnectionState::Related, first.original));
    assert!(entry.status.unwrap().is_expected());
}

async fn an_expectation_matches_once_unless_it_is_permanent() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    assist();
    let _divert = divert([udp_out().to_queue(0)]);
    let _later = support::udp(LATER);
    let pair = Pair::new("127.0.0.1");
    // At the same time, so that each has a port of its own.
    let sources = ["127.0.0.1:0"; 6].map(support::udp);
    let mut unused = sources.iter();
    use ConnectionState::{New, Related};
    let anyone = Expectation::udp(LATER);
    for (expectation, states) in [
        (anyone.clone().inactive(), [New, New]),
        (anyone.clone().permanent(), [Related, Related]),
        // The helper allows one expectation, so the new one replaces the one before it.
        (anyone, [Related, New]),
    ] {
        expect(&mut queue, &pair, expectation.clone()).await;
        for state in states {
            let (found, _) = follow(&mut queue, unused.next().unwrap()).await;
            assert_eq!(found, state, "{expectation:?}");
        }
    }
}

async fn an_expectation_without_a_helper_is_ignored() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let _later = support::udp(LATER);
    let first = expect(&mut queue, &Pair::new("127.0.0.1"), Expectation::udp(LATER)).await;
    assert_eq!(first.helper, None);
    // The kernel reports no error.
    let (state, _) = follow(&mut queue, &support::udp("127.0.0.1:0")).await;
    assert_eq!(state, ConnectionState::New);

    // An expectation that the kernel would ignore is refused if that is known beforehand.
    let source = support::udp("127.0.0.1:0");
    source.send_to(&[0; 4], LATER).unwrap();
    let verdict = next(&mut queue).await.accept();
    let mixed = Expectation::udp(LATER).source_address(Ipv6Addr::LOCALHOST.into());
    let error = verdict.expectation(mixed).submit().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

async fn a_dropped_packet_leaves_no_entry() {
    let Some(mut queue) = with_conntrack(0).await else { return };
    track();
    let _divert = divert([udp_out().to_queue(0)]);
    let pair = Pair::new("127.0.0.1");
    for turn in 0..2 {
        pair.ask(turn);
        let (packet, entry) = entry(&mut queue).await;
        assert!(!entry.status.unwrap().is_confirmed());
        assert_eq!(mark(&entry), 0);
        give(packet.drop().connection_mark(9, 9)).await;
    }
}

async fn a_queue_bound_without_conntrack_refuses_changes() {
    refuses_changes(0).await;
}

// Rules that `Divert` does not support.

/// enum nft_ct_attributes
const DESTINATION: u16 = 1;
const KEY: u16 = 2;
const SOURCE: u16 = 4;
/// enum nft_ct_keys
const STATE: u32 = 0;
const LABELS: u32 = 13;
const ZONE: u32 = 17;
/// A chain at the output hook, before `NF_IP_PRI_CONNTRACK`, -200.
const BEFORE_TRACKING: i32 = -300;
const AFTER_TRACKING: i32 = -150;

/// Turns on connection tracking in this network namespace: one rule that reads the state suffices.
fn track() {
    install("tracking", None, vec![ct(DESTINATION, STATE)]);
}

/// As [`track`], with space for labels in each entry. The kernel reserves it if a rule sets labels.
fn track_with_labels() {
    install("labelling", None, vec![immediate(vec![0; 16]), ct(SOURCE, LABELS)]);
    track();
}

/// A helper for UDP that ignores packets as short as these.
const HELPER: &str = "tftp";

/// Assigns the helper to new connections, right after their entries have been created.
fn assist() {
    rules::install_helper("assisting", Place { hook: 3, priority: AFTER_TRACKING }, HELPER, 17)
        .unwrap_or_else(|error| panic!("nf_tables refuses a helper: {error}"));
}

/// The `ct` expression, with register 1 as source or destination.
fn ct(direction: u16, key: u32) -> Expressions {
    let attributes = [(direction, 1), (KEY, key)];
    let attributes = attributes.map(|(kind, number)| DefaultNla::new(kind, u32::to_be_bytes(number).to_vec())).to_vec();
    Expressions::Other { expression_type: "ct".to_owned(), attributes }
}

/// Loads a constant into register 1.
fn immediate(value: Vec<u8>) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Reg1),
        Immediate::Data(DataAttribute::Value(value)),
    ])
}

/// Installs a table with one rule and one chain, which has a priority at the output hook or no
/// hook.
fn install(name: &str, priority: Option<i32>, expressions: Vec<Expressions>) {
    // NF_INET_LOCAL_OUT
    let place = priority.map(|priority| Place { hook: 3, priority });
    rules::install(NetfilterProtoFamily::Inet, name, place, expressions)
        .unwrap_or_else(|error| panic!("nf_tables refuses {name}: {error}"));
}
