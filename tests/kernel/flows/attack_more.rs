//! Further attempts to get a packet through that no verdict allows, or to block connections of
//! others.

use std::{
    fs,
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use etherparse::{IpNumber, PacketBuilder};
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{DataAttribute, Immediate, Register};
use tokio_nfqueue::{Hook, Protocol, Rule, divert::Match};

use super::{
    CROSSING, LOOPBACKS, Talk, bind, confirm, crossing_is_over, entries_gone, forgetful, pass, queue_is_empty,
    segments::{
        ACK, Hosts, SYN, SYN_ACK, accept_in_the_middle, deny_datagram, forwarded, from_client, opened, pass_segment,
        queued, tcp,
    },
    table, to_port,
};
use crate::common::{
    kernel_release, next,
    rules::{self, Expressions, NetfilterProtoFamily, Place},
};

tests![
    one an_older_segment_does_not_make_a_verdict_for_a_syn_final,
    one an_older_segment_does_not_answer_an_accepted_syn,
    one a_denial_wins_over_an_accepted_syn_of_the_other_side,
    one a_denied_syn_is_not_answered_behind_an_accepted_one,
    one a_denial_wins_over_an_accept_of_a_crossing_segment,
    one a_denied_conversation_stays_denied_when_its_entry_is_gone,
    one a_connection_beside_a_forgotten_denial_can_be_accepted,
    one an_accepted_sctp_association_is_not_the_older_one,
    one a_translated_connection_is_not_the_other_side_of_another,
    one of_two_first_syns_the_later_verdict_holds,
    one a_denial_wins_over_a_syn_that_was_sent_again,
    one a_syn_that_a_rule_accepts_ends_the_accept,
    one a_syn_with_a_high_priority_ends_the_accept,
    one a_connection_beside_a_denial_goes_on_when_its_entry_is_gone,
    one a_replaced_place_denies_what_was_denied_before,
];

/// A segment of the older connection waits, and two SYNs. The last verdict accepts the second SYN
/// alone.
async fn an_older_segment_does_not_make_a_verdict_for_a_syn_final() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1001, 5001), b"request");
    let older = queued(&mut queue, ACK).await;
    hosts.client(SYN, (90_000, 0), b"");
    let for_flow = queued(&mut queue, SYN).await;
    hosts.client(SYN, (95_000, 0), b"");
    let alone = queued(&mut queue, SYN).await;
    confirm(for_flow.accept().for_flow()).await.unwrap();
    confirm(older.accept().for_flow()).await.unwrap();
    confirm(alone.accept()).await.unwrap();
    hosts.arrived();
    // The server answers the one that was accepted alone.
    hosts.server(SYN_ACK, (70_000, 95_001), b"");
    assert_eq!(hosts.arrived(), [0, 0], "the answer has passed");
    pass_segment(&mut queue, SYN_ACK).await;
}

/// "`accept().for_flow()` for a later packet holds for that packet."
async fn an_older_segment_does_not_answer_an_accepted_syn() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1001, 5001), b"request");
    let older = queued(&mut queue, ACK).await;
    hosts.client(SYN, (90_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    confirm(older.accept().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [2, 0]);
    // The server has not answered the SYN.
    hosts.client(ACK, (1008, 5001), b"request");
    assert_eq!(hosts.arrived(), [0, 0], "it has passed");
    pass_segment(&mut queue, ACK).await;
}

/// Both sides begin at once: it is one connection. The SYN of the server is accepted before that of
/// the client is denied.
async fn a_denial_wins_over_an_accepted_syn_of_the_other_side() {
    let hosts = Hosts::new();
    for for_flow in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        let denied = queued(&mut queue, SYN).await;
        hosts.server(SYN, (5000, 0), b"");
        let accepted = queued(&mut queue, SYN).await.accept();
        confirm(if for_flow { accepted.for_flow() } else { accepted }).await.unwrap();
        confirm(denied.drop().for_flow()).await.unwrap();
        assert_eq!(hosts.arrived(), [0, 1]);
        hosts.client(SYN_ACK, (1000, 5001), b"");
        hosts.server(ACK, (5001, 1001), b"data");
        let queued = queue.try_recv();
        assert!(queued.is_err(), "{queued:?} came to the queue, {for_flow}");
        assert_eq!(hosts.arrived(), [0, 0], "{for_flow}");
        divert.close().unwrap();
    }
}

/// The same, and only SYNs come to the queue.
async fn a_denied_syn_is_not_answered_behind_an_accepted_one() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let syn = forwarded(Protocol::Tcp).when(Match::tcp_syn());
    let _divert = table([syn.to_queue(0)]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    let denied = queued(&mut queue, SYN).await;
    hosts.server(SYN, (5000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    confirm(denied.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.client(SYN_ACK, (1000, 5001), b"");
    hosts.server(ACK, (5001, 1001), b"");
    hosts.client(ACK, (1001, 5001), b"bad");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// Connection tracking has lost the entry of a connection, and both sides send.
async fn a_denial_wins_over_an_accept_of_a_crossing_segment() {
    let hosts = Hosts::new();
    for accept_first in [true, false] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        hosts.client(ACK, (1001, 5001), b"bad");
        let denied = queued(&mut queue, ACK).await;
        hosts.server(ACK, (5001, 1001), b"data");
        let accepted = queued(&mut queue, ACK).await;
        if accept_first {
            confirm(accepted.accept()).await.unwrap();
            confirm(denied.drop().for_flow()).await.unwrap();
        } else {
            confirm(denied.drop().for_flow()).await.unwrap();
            confirm(accepted.accept()).await.unwrap();
        }
        assert_eq!(hosts.arrived()[0], 0);
        hosts.client(ACK, (1001, 5005), b"bad");
        hosts.server(ACK, (5005, 1001), b"data");
        let queued = queue.try_recv();
        assert!(queued.is_err(), "{queued:?} came to the queue, {accept_first}");
        assert_eq!(hosts.arrived(), [0, 0], "{accept_first}");
        divert.close().unwrap();
    }
}

/// Only the client's datagrams come to the queue.
async fn a_denied_conversation_stays_denied_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = from_client(&hosts, Protocol::Udp);
    let _divert = table([rule.to_queue(0)]).install().unwrap();
    hosts.datagram(true);
    pass(&mut queue).await;
    hosts.datagram(false);
    assert_eq!(hosts.arrived(), [1, 1]);
    deny_datagram(&hosts, &mut queue).await;
    hosts.datagram(false);
    assert_eq!(hosts.arrived(), [0, 0]);
    entries_gone().await;
    hosts.datagram(false);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// "Later packets of such a connection come to the queue, and cannot leave it, while the denial is
/// remembered."
async fn a_connection_beside_a_forgotten_denial_can_be_accepted() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = forwarded(Protocol::Udp).to_queue(0);
    let _divert = forgetful([rule]).denied_flows(10, Duration::from_millis(300)).install().unwrap();
    deny_datagram(&hosts, &mut queue).await;
    hosts.datagram(false);
    pass(&mut queue).await;
    // The client's denial is forgotten.
    crossing_is_over().await;
    hosts.datagram(false);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.datagram(false);
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 3]);
}

fn packet(protocol: u8, from: SocketAddrV4, to: SocketAddrV4, rest: &[u8]) -> Vec<u8> {
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let builder = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, IpNumber(protocol), &[&ports, rest].concat()).unwrap();
    bytes
}

pub(super) const SCTP: u8 = 132;
pub(super) const INIT: u8 = 1;
pub(super) const INIT_ACK: u8 = 2;
pub(super) const COOKIE_ECHO: u8 = 10;
pub(super) const COOKIE_ACK: u8 = 11;

/// One side sends a packet with this verification tag and one chunk.
pub(super) fn sctp(hosts: &Hosts, of_client: bool, tag: u32, kind: u8, body: &[u8]) {
    let [client, server] = hosts.addresses();
    let (side, from, to) = if of_client { (&hosts.client, client, server) } else { (&hosts.server, server, client) };
    let length = 4 + body.len() as u16;
    let mut rest = [tag.to_be_bytes(), [0; 4]].concat();
    rest.extend([kind, if kind == 0 { 3 } else { 0 }]);
    rest.extend(length.to_be_bytes());
    rest.extend(body);
    side.send(&packet(SCTP, from, to, &rest), *to.ip());
}

/// The body of INIT and INIT ACK.
pub(super) fn initiation(tag: u32) -> Vec<u8> {
    [tag.to_be_bytes(), 65_535_u32.to_be_bytes(), [0, 1, 0, 1], 1_u32.to_be_bytes()].concat()
}

/// The client begins anew on the same ports, while data of the older association is on its way.
async fn an_accepted_sctp_association_is_not_the_older_one() {
    let hosts = Hosts::new();
    // The packets have no checksums.
    fs::write("/proc/sys/net/netfilter/nf_conntrack_checksum", "0").unwrap();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Other(SCTP)).to_queue(0)]).install().unwrap();
    let (mine, yours) = (0x1111, 0x2222);
    sctp(&hosts, true, 0, INIT, &initiation(mine));
    confirm(next(&mut queue).await.accept()).await.unwrap();
    sctp(&hosts, false, mine, INIT_ACK, &initiation(yours));
    confirm(next(&mut queue).await.accept()).await.unwrap();
    sctp(&hosts, true, yours, COOKIE_ECHO, b"cook");
    confirm(next(&mut queue).await.accept()).await.unwrap();
    sctp(&hosts, false, mine, COOKIE_ACK, b"");
    confirm(next(&mut queue).await.accept()).await.unwrap();
    let data = [&[0; 12][..], b"data"].concat();
    sctp(&hosts, true, yours, 0, &data);
    confirm(next(&mut queue).await.accept()).await.unwrap();
    assert_eq!(hosts.arrived(), [3, 2]);
    sctp(&hosts, true, 0, INIT, &initiation(0x3333));
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    sctp(&hosts, true, yours, 0, &data);
    assert_eq!(hosts.arrived(), [1, 0]);
    confirm(next(&mut queue).await.drop()).await.unwrap();
}

/// The client's address is translated, so that connection tracking has an entry of its own for what
/// the server sends to the client's true address.
async fn a_translated_connection_is_not_the_other_side_of_another() {
    let hosts = Hosts::new();
    let [_, server] = hosts.addresses();
    rules::install_source_nat("snat", server.port(), std::net::Ipv4Addr::new(198, 51, 100, 1)).unwrap();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Udp).to_queue(0)]).install().unwrap();
    hosts.datagram(true);
    pass(&mut queue).await;
    hosts.datagram(false);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.datagram(false);
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [1, 2]);
    deny_datagram(&hosts, &mut queue).await;
    hosts.datagram(false);
    while let Ok(packet) = queue.try_recv() {
        confirm(packet.accept()).await.unwrap();
    }
    assert_eq!(hosts.arrived(), [0, 1]);
}

/// Connection tracking knows nothing of the connection yet.
async fn of_two_first_syns_the_later_verdict_holds() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    let for_flow = queued(&mut queue, SYN).await;
    hosts.client(SYN, (2000, 0), b"");
    let alone = queued(&mut queue, SYN).await;
    confirm(for_flow.accept().for_flow()).await.unwrap();
    confirm(alone.accept()).await.unwrap();
    // Of two entries the kernel keeps the first. Newer ones drop the packet of the other.
    let [at_server, at_client] = hosts.arrived();
    assert_eq!((at_server, at_client), (if kernel_release() >= (6, 12) { 1 } else { 2 }, 0));
    // The server answers the one that was accepted alone.
    hosts.server(SYN_ACK, (5000, 2001), b"");
    pass_segment(&mut queue, SYN_ACK).await;
}

/// The SYN of the server is accepted twice, alone.
async fn a_denial_wins_over_a_syn_that_was_sent_again() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    let denied = queued(&mut queue, SYN).await;
    for _ in 0..2 {
        hosts.server(SYN, (5000, 0), b"");
        pass_segment(&mut queue, SYN).await;
    }
    confirm(denied.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 2]);
    hosts.client(SYN_ACK, (1000, 5001), b"");
    hosts.server(ACK, (5001, 1001), b"data");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// A connection that is accepted, and a SYN of the server, which connection tracking calls invalid.
/// It has passed, and the client answers it.
async fn syn_ends_accept(
    hosts: &Hosts,
    rules: impl IntoIterator<Item = Rule>,
    syn_is_queued: bool,
    before_syn: impl FnOnce(),
) {
    let mut queue = bind();
    let _divert = table(rules).install().unwrap();
    accept_in_the_middle(&mut queue, || hosts.client(ACK, (1001, 5001), b"request")).await;
    hosts.server(ACK, (5001, 1008), b"response");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [2, 1]);
    before_syn();
    hosts.server(SYN, (5009, 0), b"");
    if syn_is_queued {
        pass_segment(&mut queue, SYN).await;
    }
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.client(SYN_ACK, (1008, 5010), b"");
    pass_segment(&mut queue, SYN_ACK).await;
    assert_eq!(hosts.arrived(), [1, 0]);
    hosts.server(ACK, (5010, 1009), b"data");
    assert_eq!(hosts.arrived(), [0, 0], "a segment of the new connection has passed");
    pass_segment(&mut queue, ACK).await;
}

async fn a_syn_that_a_rule_accepts_ends_the_accept() {
    let hosts = Hosts::new();
    let rules = [forwarded(Protocol::Tcp).when(Match::tcp_syn()).accept(), tcp()];
    syn_ends_accept(&hosts, rules, false, || {}).await;
}

async fn a_syn_with_a_high_priority_ends_the_accept() {
    let hosts = Hosts::new();
    syn_ends_accept(&hosts, [tcp()], true, || set_priority(0x0100_0001)).await;
}

/// As a program does that puts packets into the classes of a queueing discipline.
fn set_priority(priority: u32) {
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let expressions = vec![
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Reg1),
            Immediate::Data(DataAttribute::Value(priority.to_ne_bytes().to_vec())),
        ]),
        // NFTA_META_KEY: NFT_META_PRIORITY, NFTA_META_SREG
        Expressions::Other { expression_type: "meta".to_owned(), attributes: vec![number(2, 2), number(3, 1)] },
    ];
    let place = Place { hook: 2, priority: -150 };
    rules::install(NetfilterProtoFamily::Inet, "classes", Some(place), expressions).unwrap();
}

/// The server's own connection is accepted packet by packet. Connection tracking forgets it while
/// the denial is remembered.
async fn a_connection_beside_a_denial_goes_on_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.drop().for_flow()).await.unwrap();
    hosts.server(SYN, (5000, 0), b"");
    pass_segment(&mut queue, SYN).await;
    hosts.client(SYN_ACK, (7000, 5001), b"");
    pass_segment(&mut queue, SYN_ACK).await;
    hosts.server(ACK, (5001, 7001), b"");
    pass_segment(&mut queue, ACK).await;
    assert_eq!(hosts.arrived(), [1, 2]);
    entries_gone().await;
    hosts.server(ACK, (5001, 7001), b"data");
    pass_segment(&mut queue, ACK).await;
}

/// `Output` and `Input` change their roles: what was denied stays denied, and what begins on the
/// ports of an accepted connection is asked about.
async fn a_replaced_place_denies_what_was_denied_before() {
    let talks: Vec<Talk> = (0..2).map(|_| Talk::loopback(LOOPBACKS[0])).collect();
    let mut queue = bind();
    let rules = |hook| talks.iter().map(move |talk| to_port(hook, talk.port()).to_queue(0)).collect::<Vec<Rule>>();
    let divert = table(rules(Hook::Output)).install().unwrap();
    talks.iter().for_each(|talk| talk.ask(1));
    let denied = Instant::now();
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    confirm(next(&mut queue).await.accept()).await.unwrap();
    talks[1].asked(1);
    for (number, hook) in (2..).zip([Hook::Input, Hook::Postrouting, Hook::Prerouting, Hook::Output, Hook::Input]) {
        divert.replace_rules(rules(hook)).unwrap();
        talks.iter().for_each(|talk| talk.ask(number));
        pass(&mut queue).await;
        talks[1].asked(number);
        queue_is_empty(&mut queue);
        talks[0].silent();
        // What the other side sends later begins a connection of its own.
        talks[0].answer(number);
        if denied.elapsed() >= CROSSING {
            break;
        }
        talks[0].silent();
    }
}
