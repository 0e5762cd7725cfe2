//! Connections that are denied at their first packet.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use etherparse::{IpNumber, PacketBuilder};
use tokio_nfqueue::{ErrorKind, FlowMarks, Hook, Protocol, Queue, Rule};

use super::{
    CROSSING, LOOPBACKS, Talk, bind, come, confirm, forgetful, pass, queue_is_empty,
    refused::refused,
    segments::{Hosts, echo, forwarded},
    table, to_port, unlimited_icmp_errors,
};
use crate::{
    common::{
        eventually, next,
        rules::{self, Expressions, NetfilterProtoFamily, Place},
    },
    support,
};

tests![
    one other_side_of_a_dropped_connection_is_dropped_too,
    one when_there_is_no_room_the_next_packet_comes_to_the_queue,
    one denied_connection_is_forgotten_after_its_time,
    one verdict_holds_even_if_the_rules_are_removed_before_it,
    one rules_are_replaced_and_verdicts_stay,
    one verdict_for_the_connection_of_a_packet_without_one_holds_for_the_packet,
    one echo_requests_that_another_program_exempts_from_tracking_stay_denied,
    one packets_without_ports_that_another_program_exempts_from_tracking_stay_denied,
    one dccp_that_another_program_exempts_from_tracking_stays_denied,
];

/// Nothing has been received of the client when the server sends.
async fn other_side_of_a_dropped_connection_is_dropped_too() {
    for address in LOOPBACKS {
        let talk = Talk::loopback(address);
        let mut queue = bind();
        let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
        talk.ask(1);
        let denied = Instant::now();
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
        talk.answer(1);
        if denied.elapsed() >= CROSSING {
            return;
        }
        talk.silent();
        queue_is_empty(&mut queue);
    }
}

async fn when_there_is_no_room_the_next_packet_comes_to_the_queue() {
    let talks: Vec<Talk> = (0..3).map(|_| Talk::loopback(LOOPBACKS[0])).collect();
    let mut queue = bind();
    let rules = talks.iter().map(|talk| to_port(Hook::Output, talk.port()).to_queue(0));
    let _divert = table(rules).denied_flows(2, Duration::from_secs(60)).install().unwrap();
    for talk in &talks {
        talk.ask(1);
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
        talk.silent();
    }
    for talk in &talks[..2] {
        talk.ask(2);
        queue_is_empty(&mut queue);
        talk.silent();
    }
    talks[2].ask(2);
    pass(&mut queue).await;
    talks[2].asked(2);
}

async fn denied_connection_is_forgotten_after_its_time() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let rule = to_port(Hook::Output, talk.port()).to_queue(0);
    let _divert = forgetful([rule]).denied_flows(2, Duration::from_millis(50)).install().unwrap();
    talk.ask(1);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    let mut number = 1;
    eventually("a packet comes to the queue", || {
        // Each packet lets the time begin anew.
        std::thread::sleep(Duration::from_millis(100));
        number += 1;
        talk.ask(number);
        queue.try_recv().is_ok()
    })
    .await;
}

async fn verdict_holds_even_if_the_rules_are_removed_before_it() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    talk.ask(2);
    let [first, second] = [next(&mut queue).await, next(&mut queue).await];
    divert.remove_rules().unwrap();
    confirm(first.drop().for_flow()).await.unwrap();
    confirm(second.reject()).await.unwrap();
    talk.refused("after the rules");
    // The rules that applied the verdict to later packets are gone.
    talk.ask(3);
    talk.asked(3);
    queue_is_empty(&mut queue);
}

async fn rules_are_replaced_and_verdicts_stay() {
    let talks: Vec<Talk> = (0..3).map(|_| Talk::loopback(LOOPBACKS[0])).collect();
    let mut queue = bind();
    let rules = |hook| talks.iter().map(move |talk| to_port(hook, talk.port()).to_queue(0)).collect::<Vec<Rule>>();
    let divert = table(rules(Hook::Output)).install().unwrap();
    for talk in &talks {
        talk.ask(1);
    }
    let [accepted, dropped, held] = [next(&mut queue).await, next(&mut queue).await, next(&mut queue).await];
    confirm(accepted.accept().for_flow()).await.unwrap();
    confirm(dropped.drop().for_flow()).await.unwrap();
    talks[0].asked(1);
    divert.replace_rules(rules(Hook::Output).into_iter().map(|rule| rule.bypass(true))).unwrap();
    confirm(held.drop().for_flow()).await.unwrap();
    for _ in 0..2 {
        for talk in &talks {
            talk.ask(2);
        }
        talks[0].asked(2);
        talks.iter().for_each(|talk| talk.silent());
        queue_is_empty(&mut queue);
        // Another hook, whose chains are new.
        let rules = rules(Hook::Input).into_iter().chain(rules(Hook::Output));
        divert.replace_rules(rules).unwrap();
    }
}

/// Connection tracking calls a segment that belongs to no connection invalid.
async fn verdict_for_the_connection_of_a_packet_without_one_holds_for_the_packet() {
    use tokio_nfqueue::{
        Protocol,
        divert::{ConnectionState, Match},
    };

    let mut queue = bind();
    let invalid = Rule::new(Hook::Output)
        .protocol(Protocol::Tcp)
        .when(Match::connection_state([ConnectionState::Invalid]))
        .to_queue(0);
    let arrived = Rule::new(Hook::Input).protocol(Protocol::Tcp).priority(-1).count();
    let divert = table([invalid, arrived]).install().unwrap();
    // SYN with FIN, from port 1 to port 2.
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1];
    packet.extend([0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x03, 1, 0, 0, 0, 0, 0]);
    let socket = support::raw_ipv4();
    for drop in [true, false] {
        support::send_raw_ipv4(&socket, &packet, Ipv4Addr::LOCALHOST).unwrap();
        let packet = next(&mut queue).await;
        let verdict = if drop { packet.drop() } else { packet.accept() };
        refused(confirm(verdict.for_flow()).await, "the packet is of no connection");
        assert_eq!(divert.counters().unwrap()[1].packets, u64::from(!drop));
    }
}

/// `notrack`
fn exempt_from_tracking() {
    let notrack = Expressions::Other { expression_type: "notrack".to_owned(), attributes: Vec::new() };
    let place = Place { hook: 0, priority: -300 };
    rules::install(NetfilterProtoFamily::Inet, "exempt", Some(place), vec![notrack]).unwrap();
}

/// The code of an echo request or reply is 0, but connection tracking takes any.
fn with_code(mut packet: Vec<u8>, code: u8) -> Vec<u8> {
    let checksum = u16::from_be_bytes([packet[22], packet[23]]);
    packet[21] = code;
    packet[22..24].copy_from_slice(&(checksum - u16::from(code)).to_be_bytes());
    packet
}

async fn echo_requests_that_another_program_exempts_from_tracking_stay_denied() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses().map(|address| *address.ip());
    let mut queue = bind();
    let rule = Rule::new(Hook::Forward).protocol(Protocol::Icmp).source_address(server, 32).to_queue(0);
    let _divert = table([rule]).install().unwrap();
    let ping = |id, code| {
        hosts.client.send(&with_code(echo(client, server, false, id), code), server);
        hosts.server.send(&with_code(echo(server, client, true, id), code), client);
    };
    for (id, code) in [(7, 0), (9, 1)] {
        ping(id, code);
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
        assert_eq!(hosts.arrived(), [1, 0]);
    }
    exempt_from_tracking();
    ping(7, 0);
    ping(9, 1);
    assert_eq!(hosts.arrived(), [0, 0]);
    // Another one is not denied.
    ping(8, 0);
    pass(&mut queue).await;
    assert_eq!(hosts.arrived(), [1, 1]);
}

async fn packets_without_ports_that_another_program_exempts_from_tracking_stay_denied() {
    const GRE: u8 = 47;
    const ESP: u8 = 50;
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses().map(|address| *address.ip());
    let packet = |from: Ipv4Addr, to: Ipv4Addr, protocol: u8| {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64);
        builder.write(&mut packet, IpNumber(protocol), &[0, 0, 1, 1, 0, 0, 0, 1, 9, 9, 9, 9]).unwrap();
        packet
    };
    unlimited_icmp_errors();
    let (mut dropped, mut rejected) =
        (bind(), Queue::builder(1).flow_marks(FlowMarks::default()).bind().await.unwrap());
    let rule = |protocol| Rule::new(Hook::Forward).protocol(Protocol::Other(protocol));
    let _divert = table([rule(ESP).to_queue(0), rule(GRE).to_queue(1)]).install().unwrap();
    let send = || {
        hosts.client.send(&packet(client, server, ESP), server);
        hosts.client.send(&packet(client, server, GRE), server);
    };
    send();
    confirm(next(&mut dropped).await.drop().for_flow()).await.unwrap();
    confirm(next(&mut rejected).await.reject().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 1]);
    exempt_from_tracking();
    send();
    assert_eq!(hosts.arrived(), [0, 1]);
    // Another protocol, and protocols whose packets have ports.
    for protocol in [94, 17, 136] {
        hosts.client.send(&packet(client, server, protocol), server);
    }
    assert_eq!(hosts.arrived(), [3, 0]);
    queue_is_empty(&mut dropped);
    queue_is_empty(&mut rejected);
}

/// "As all others", where connection tracking knows no DCCP.
async fn dccp_that_another_program_exempts_from_tracking_stays_denied() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let mut arrived = Vec::new();
    for (name, protocol) in [("a", 252), ("b", 33)] {
        let send = |kind: u8| {
            let ports = [client.port().to_be_bytes(), server.port().to_be_bytes()].concat();
            let mut bytes = Vec::new();
            let rest = [&ports[..], &[6, 0, 0, 0, kind << 1 | 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
            let builder = PacketBuilder::ipv4(client.ip().octets(), server.ip().octets(), 64);
            builder.write(&mut bytes, IpNumber(protocol), &rest).unwrap();
            hosts.client.send(&bytes, *server.ip());
        };
        let mut queue = bind();
        let divert = table([forwarded(Protocol::Other(protocol)).to_queue(0)]).install().unwrap();
        send(0);
        let denied = confirm(next(&mut queue).await.drop().for_flow()).await;
        if protocol == 33 && denied.as_ref().is_err_and(|error| error.kind() == ErrorKind::InvalidInput) {
            // This kernel tracks DCCP: a packet without a
            // checksum is of no connection.
            arrived.push((false, hosts.arrived()));
            continue;
        }
        denied.unwrap();
        send(2);
        queue_is_empty(&mut queue);
        let untracked = Expressions::Other { expression_type: "notrack".to_owned(), attributes: Vec::new() };
        let place = Place { hook: 0, priority: -300 };
        rules::install(NetfilterProtoFamily::Inet, name, Some(place), vec![untracked]).unwrap();
        send(2);
        let asked = come(&mut queue).await.is_some();
        arrived.push((asked, hosts.arrived()));
        rules::remove(NetfilterProtoFamily::Inet, name).unwrap();
        divert.close().unwrap();
    }
    assert_eq!(arrived, [(false, [0, 0]); 2]);
}
