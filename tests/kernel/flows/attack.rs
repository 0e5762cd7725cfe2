//! Attempts to get a packet through that no verdict allows, or to block connections of others.

use std::{
    net::{IpAddr, SocketAddrV4},
    time::{Duration, Instant},
};

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{Cmp, DataAttribute, Operator, Register};
use nfqueue_divert::Divert;
use tokio_nfqueue::{FlowMarks, Hook, Protocol, Queue, Rule, divert::Match};

use super::{
    DECISIONS, Decision, LOOPBACKS, Talk, bind, confirm, forgetful, pass, queue_is_empty, renewed,
    segments::{
        ACK, Hosts, LAST, RST, SYN, SYN_ACK, accept_in_the_middle, datagram, echo, from_client, opened, pass_segment,
        queued, tcp, udp, unreachable,
    },
    table, to_port,
};
use crate::{
    common::{
        bind_now, many, next,
        rules::{self, Expressions, NetfilterProtoFamily, Place},
    },
    support,
};

tests![
    one a_rejected_packet_does_not_shorten_the_memory_of_a_denial,
    one rejected_packets_leave_room_for_denials,
    one a_syn_on_an_unanswered_connection_inherits_no_accept,
    one a_syn_that_no_rule_queues_inherits_no_accept,
    one a_syn_speaks_not_for_the_older_connection,
    one of_two_syns_the_later_verdict_holds,
    one a_syn_that_conntrack_calls_invalid_ends_the_accept,
    one a_connection_picked_up_in_reverse_passes_no_accept_on,
    one the_reply_to_a_denied_echo_request_is_dropped,
    one an_icmp_error_about_a_denied_first_packet_is_dropped,
    one a_datagram_that_crosses_a_denied_one_opens_nothing,
    one a_segment_that_crosses_a_denied_one_opens_nothing,
    one a_verdict_of_another_table_does_not_accept,
    one a_denial_survives_another_table,
    one a_program_that_restores_marks_restores_no_accept,
    one every_packet_of_a_denied_connection_renews_its_time,
    one all_of_many_denials_are_remembered,
    one verdicts_hold_in_another_queue_and_on_another_round,
    one a_reply_that_a_process_has_made_does_not_pass,
];

async fn a_rejected_packet_does_not_shorten_the_memory_of_a_denial() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    confirm(next(&mut queue).await.reject()).await.unwrap();
    talk.refused("the first");
    talk.ask(2);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    talk.ask(3);
    queue_is_empty(&mut queue);
    talk.silent();
}

async fn rejected_packets_leave_room_for_denials() {
    let talks: Vec<Talk> = (0..2).map(|_| Talk::loopback(LOOPBACKS[0])).collect();
    let mut queue = bind();
    let rules = talks.iter().map(|talk| to_port(Hook::Output, talk.port()).to_queue(0));
    let _divert = table(rules).denied_flows(1, Duration::from_secs(60)).install().unwrap();
    talks[0].ask(1);
    confirm(next(&mut queue).await.reject()).await.unwrap();
    talks[1].ask(1);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    talks[1].ask(2);
    queue_is_empty(&mut queue);
}

/// Connection tracking has picked it up, and has seen no packet of the server.
async fn a_syn_on_an_unanswered_connection_inherits_no_accept() {
    let hosts = Hosts::new();
    for old_first in [true, false] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        hosts.client(ACK, (1001, 5001), b"");
        pass_segment(&mut queue, ACK).await;
        hosts.client(ACK, (1001, 5001), b"request");
        let old = queued(&mut queue, ACK).await;
        hosts.client(SYN, (90_000, 0), b"");
        let new = queued(&mut queue, SYN).await;
        if old_first {
            confirm(old.accept().for_flow()).await.unwrap();
            confirm(new.accept()).await.unwrap();
        } else {
            confirm(new.accept()).await.unwrap();
            confirm(old.accept().for_flow()).await.unwrap();
        }
        hosts.server(SYN_ACK, (70_000, 90_001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        divert.close().unwrap();
    }
}

/// Connection tracking has picked the older connection up.
async fn a_syn_that_no_rule_queues_inherits_no_accept() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = Rule::new(Hook::Forward).protocol(Protocol::Tcp).unless(Match::tcp_syn());
    let _divert = table([rule.to_queue(0)]).install().unwrap();
    hosts.client(ACK, (1001, 5001), b"request");
    confirm(queued(&mut queue, ACK).await.accept().for_flow()).await.unwrap();
    hosts.client(SYN, (90_000, 0), b"");
    assert_eq!(hosts.arrived(), [2, 0]);
    hosts.server(SYN_ACK, (70_000, 90_001), b"");
    pass_segment(&mut queue, SYN_ACK).await;
}

/// The older connection continues: its server answers the SYN with an ACK.
async fn a_syn_speaks_not_for_the_older_connection() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(SYN, (90_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.server(ACK, (5001, 1001), b"");
    pass_segment(&mut queue, ACK).await;
    hosts.client(ACK, (1001, 5001), b"request");
    pass_segment(&mut queue, ACK).await;
}

async fn of_two_syns_the_later_verdict_holds() {
    let hosts = Hosts::new();
    for numbers in [[2000, 3000], [3000, 2000]] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        pass_segment(&mut queue, SYN).await;
        hosts.client(SYN, (numbers[0], 0), b"");
        let alone = queued(&mut queue, SYN).await;
        hosts.client(SYN, (numbers[1], 0), b"");
        let for_flow = queued(&mut queue, SYN).await;
        confirm(for_flow.accept().for_flow()).await.unwrap();
        confirm(alone.accept()).await.unwrap();
        // The server answers the one that was accepted alone.
        hosts.server(SYN_ACK, (5000, numbers[0] + 1), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        divert.close().unwrap();
    }
}

/// Connection tracking has no entry any more, and calls it invalid.
async fn the_reply_to_a_denied_echo_request_is_dropped() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses().map(|address| *address.ip());
    let mut queue = bind();
    let rule = Rule::new(Hook::Forward).unless(Match::protocol(Protocol::Other(LAST))).to_queue(0);
    let _divert = table([rule]).install().unwrap();
    hosts.client.send(&echo(client, server, false, 7), server);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    hosts.client.send(&echo(client, server, false, 7), server);
    queue_is_empty(&mut queue);
    hosts.server.send(&echo(server, client, true, 7), client);
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

async fn an_icmp_error_about_a_denied_first_packet_is_dropped() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.client(ACK, (1001, 5001), b"data");
    confirm(queued(&mut queue, ACK).await.drop().for_flow()).await.unwrap();
    hosts.error();
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// No rule asks about the server's packets.
async fn a_datagram_that_crosses_a_denied_one_opens_nothing() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = from_client(&hosts, Protocol::Udp);
    let _divert = table([rule.to_queue(0)]).install().unwrap();
    hosts.datagram(true);
    let denied = next(&mut queue).await;
    hosts.datagram(false);
    // It arrives before the denial.
    assert_eq!(hosts.arrived(), [0, 1]);
    confirm(denied.drop().for_flow()).await.unwrap();
    for _ in 0..3 {
        hosts.datagram(false);
    }
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// Connection tracking has lost the entry of a connection, and both sides send.
async fn a_segment_that_crosses_a_denied_one_opens_nothing() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = from_client(&hosts, Protocol::Tcp);
    let _divert = table([rule.to_queue(0)]).install().unwrap();
    hosts.client(ACK, (1001, 5001), b"bad");
    let denied = queued(&mut queue, ACK).await;
    hosts.server(ACK, (5001, 1001), b"data");
    // It arrives before the denial.
    assert_eq!(hosts.arrived(), [0, 1]);
    confirm(denied.drop().for_flow()).await.unwrap();
    hosts.server(ACK, (5005, 1001), b"data");
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// The client may answer it.
async fn a_syn_that_conntrack_calls_invalid_ends_the_accept() {
    let hosts = Hosts::new();
    for asked in [true, false] {
        hosts.another_port();
        let mut queue = bind();
        let rule = if asked { tcp() } else { tcp().unless(Match::tcp_syn()) };
        let divert = table([rule]).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        if asked {
            pass_segment(&mut queue, SYN).await;
        }
        hosts.server(SYN_ACK, (5000, 1001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.client(ACK, (1001, 5001), b"request");
        confirm(queued(&mut queue, ACK).await.accept().for_flow()).await.unwrap();
        hosts.server(ACK, (5001, 1008), b"response");
        queue_is_empty(&mut queue);
        hosts.server(SYN, (5009, 0), b"");
        if asked {
            pass_segment(&mut queue, SYN).await;
        }
        hosts.client(SYN_ACK, (1007, 5010), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.server(ACK, (5010, 1008), b"data");
        pass_segment(&mut queue, ACK).await;
        divert.close().unwrap();
    }
}

/// Connection tracking has seen the server's data first. Then the server resets, and the client
/// begins anew.
async fn a_connection_picked_up_in_reverse_passes_no_accept_on() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    accept_in_the_middle(&mut queue, || hosts.server(ACK, (5001, 1001), b"data")).await;
    hosts.client(ACK, (1001, 5005), b"data");
    hosts.server(RST, (5005, 0), b"");
    assert_eq!(hosts.arrived(), [1, 3]);
    queue_is_empty(&mut queue);
    hosts.client(SYN, (1005, 0), b"");
    pass_segment(&mut queue, SYN).await;
    hosts.server(SYN_ACK, (5005, 1006), b"");
    pass_segment(&mut queue, SYN_ACK).await;
    hosts.client(ACK, (1006, 5006), b"request");
    pass_segment(&mut queue, ACK).await;
}

/// The marks of two tables.
const TABLES: [[FlowMarks; 2]; 2] =
    [[FlowMarks::new(0x1012), FlowMarks::new(0x0007_0000)], [FlowMarks::new(0x38), FlowMarks::new(0x3800)]];

/// A table with flow marks at `Output`.
fn marking_table(queue: u16, marks: FlowMarks, port: u16) -> (Queue, Divert) {
    let rule = to_port(Hook::Output, port).to_queue(queue);
    let queue = bind_now(Queue::builder(queue).flow_marks(marks));
    (queue, table([rule]).flow_marks(marks).install().unwrap())
}

/// It is installed while a packet waits, which then continues behind the other table's first chain
/// (`nf_reinject` counts hooks).
async fn a_verdict_of_another_table_does_not_accept() {
    for ([marks, other_marks], for_flow) in TABLES.into_iter().flat_map(|marks| [(marks, false), (marks, true)]) {
        let talk = Talk::loopback(LOOPBACKS[0]);
        let (mut queue, divert) = marking_table(0, marks, talk.port());
        talk.ask(1);
        let verdict = next(&mut queue).await.accept();
        let (mut other, other_divert) = marking_table(1, other_marks, talk.port());
        confirm(if for_flow { verdict.for_flow() } else { verdict }).await.unwrap();
        while let Ok(packet) = queue.try_recv() {
            confirm(packet.accept()).await.unwrap();
        }
        talk.asked(1);
        talk.ask(2);
        // The owner of the other table has not yet seen any packet.
        let seen = tokio::time::timeout(Duration::from_secs(5), pass(&mut other)).await;
        assert!(seen.is_ok(), "{marks:?} {for_flow}");
        divert.close().unwrap();
        other_divert.close().unwrap();
    }
}

/// The packet meets the other table, which was installed while it waited, and is denied behind it.
async fn a_denial_survives_another_table() {
    for [marks, other_marks] in TABLES {
        let talk = Talk::loopback(LOOPBACKS[0]);
        let (mut queue, _divert) = marking_table(0, marks, talk.port());
        talk.ask(1);
        let packet = next(&mut queue).await;
        let (mut others, other) = marking_table(1, other_marks, talk.port());
        confirm(packet.drop().for_flow()).await.unwrap();
        pass(&mut others).await;
        other.close().unwrap();
        talk.ask(2);
        queue_is_empty(&mut queue);
        talk.silent();
    }
}

/// Connection marks are copied to packets when they arrive, and back when they leave, if they are
/// not 0.
fn restore_marks() {
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let other = |name: &str, attributes| Expressions::Other { expression_type: name.to_owned(), attributes };
    const MARK: u32 = 3;
    const DESTINATION: u16 = 1;
    const KEY: u16 = 2;
    let restore = vec![
        other("ct", vec![number(DESTINATION, 1), number(KEY, MARK)]),
        other("meta", vec![number(KEY, MARK), number(3, 1)]),
    ];
    let save = vec![
        other("meta", vec![number(DESTINATION, 1), number(KEY, MARK)]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(Operator::NotEqual),
            Cmp::Data(DataAttribute::Value(vec![0; 4])),
        ]),
        other("ct", vec![number(KEY, MARK), number(4, 1)]),
    ];
    for (name, hook, expressions) in [("restore", 0, restore), ("save", 4, save)] {
        let place = Place { hook, priority: -150 };
        rules::install(NetfilterProtoFamily::Inet, name, Some(place), expressions).unwrap();
    }
}

async fn a_program_that_restores_marks_restores_no_accept() {
    let hosts = Hosts::new();
    restore_marks();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1001, 5001), b"request");
    confirm(queued(&mut queue, ACK).await.accept().for_flow()).await.unwrap();
    hosts.server(ACK, (5001, 1008), b"response");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [1, 1]);
    hosts.client(SYN, (90_000, 0), b"");
    pass_segment(&mut queue, SYN).await;
    hosts.server(SYN_ACK, (70_000, 90_001), b"");
    pass_segment(&mut queue, SYN_ACK).await;
}

/// Also packets that connection tracking calls invalid.
async fn every_packet_of_a_denied_connection_renews_its_time() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = forgetful([tcp()]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    let first = queued(&mut queue, SYN).await;
    let denied = Instant::now();
    confirm(first.drop().for_flow()).await.unwrap();
    let mut number = 0;
    let send = || {
        number += 1;
        if number <= 10 { hosts.server(SYN_ACK, (5000, 1001), b"") } else { hosts.client(SYN, (1000, 0), b"") }
    };
    renewed(&mut queue, denied, 11, send).await;
}

async fn all_of_many_denials_are_remembered() {
    let hosts = Hosts::new();
    let mut queue = bind();
    // The default.
    let _divert = table([udp()]).denied_flows(65_535, Duration::from_secs(600)).install().unwrap();
    let [client, server] = hosts.addresses();
    let send = |port| hosts.client.datagram(SocketAddrV4::new(*client.ip(), port), server);
    let ports = 10_000..10_000 + many(10_000) as u16;
    for port in ports.clone() {
        send(port);
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    }
    for port in ports {
        send(port);
        queue_is_empty(&mut queue);
    }
}

/// A datagram is rejected with its connection. Then a process sends an ICMP error about it. If
/// `late`, it closes the socket while the error waits in the queue of another program.
async fn replied(late: bool) {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let mut other = Queue::builder(1).bind().await.unwrap();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    pass(&mut queue).await;
    talk.asked(1);
    talk.ask(2);
    confirm(next(&mut queue).await.reject().for_flow()).await.unwrap();
    talk.refused("the datagram");
    let [IpAddr::V4(from), IpAddr::V4(to)] = [talk.addresses().1.ip(), talk.addresses().0.ip()] else { panic!() };
    let (client, server) = talk.addresses();
    let quoted = datagram(SocketAddrV4::new(to, client.port()), SocketAddrV4::new(from, server.port()), b"data");
    let error = unreachable(SocketAddrV4::new(from, 0), SocketAddrV4::new(to, 0), &quoted);
    let socket = support::raw_ipv4();
    if late {
        let rule = Rule::new(Hook::Output).priority(-10).protocol(Protocol::Icmp).to_queue(1);
        let _other = crate::common::divert([rule]);
        support::send_raw_ipv4(&socket, &error, to).unwrap();
        let packet = next(&mut other).await;
        drop(socket);
        confirm(packet.accept()).await.unwrap();
    } else {
        let _ = support::send_raw_ipv4(&socket, &error, to);
    }
    talk.silent();
}

async fn a_reply_that_a_process_has_made_does_not_pass() {
    replied(false).await;
}

/// The packet is passed on to another queue, or traverses the hook once more.
async fn verdicts_hold_in_another_queue_and_on_another_round() {
    for requeued in [true, false] {
        for decision in DECISIONS {
            let talk = Talk::loopback(LOOPBACKS[0]);
            let mut queue = bind();
            let mut second = Queue::builder(1).flow_marks(FlowMarks::default()).bind().await.unwrap();
            let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
            talk.ask(1);
            let first = next(&mut queue).await;
            let packet = if requeued {
                confirm(first.requeue(1)).await.unwrap();
                next(&mut second).await
            } else {
                confirm(first.repeat()).await.unwrap();
                next(&mut queue).await
            };
            confirm(decision.for_flow(packet)).await.unwrap();
            if decision == Decision::Accept {
                talk.asked(1);
            }
            while let Some(_error) = talk.client.take_error().unwrap() {}
            talk.ask(2);
            if decision == Decision::Accept {
                talk.asked(2);
            }
            while let Some(_error) = talk.client.take_error().unwrap() {}
            talk.silent();
            queue_is_empty(&mut queue);
            queue_is_empty(&mut second);
        }
    }
}
