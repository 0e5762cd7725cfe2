//! Verdicts for connections are taken back.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use nfqueue_divert::Divert;
use tokio_nfqueue::{ErrorKind, FlowMarks, Hook, Protocol, Queue, Rule, conntrack::Conntrack, divert::FlowTuple};

use super::{
    DECISIONS, Decision, LOOPBACKS, Talk, bind, builder, come, confirm, pass, queue_is_empty,
    segments::{
        ACK, Hosts, SYN, SYN_ACK, datagram, deny_datagram, echo, from_client, of_protocol, opened, pass_segment,
        queued, segment, tcp, udp,
    },
    table, to_port,
};
use crate::{
    common::{
        lose_connections, next,
        rules::{self, NetfilterProtoFamily, Place},
    },
    support,
};

tests![
    one all_connections_are_forgotten,
    one one_connection_is_forgotten_by_either_direction,
    one connections_without_a_verdict_are_not_forgotten,
    one translated_connections_are_forgotten_by_any_of_their_addresses,
    one echo_requests_are_forgotten_by_their_identifier,
    one a_connection_is_forgotten_by_either_tuple_of_its_entry,
    one connections_of_an_earlier_table_are_new,
    one tables_with_other_marks_do_not_concern_each_other,
    one table_without_flow_marks_has_no_flows,
    one an_accept_is_found_when_its_first_packet_has_passed_the_last_hook,
    one a_translated_connection_is_forgotten_without_its_entry,
    one a_verdict_for_an_older_connection_does_not_accept_after_forgetting,
    one a_forgotten_denial_drops_no_datagram_of_the_other_side,
];

fn rules_of(talks: &[Talk]) -> Vec<Rule> {
    talks.iter().map(|talk| to_port(Hook::Output, talk.port()).to_queue(0)).collect()
}

/// Decides connections at their first and at their second packet.
async fn decide(queue: &mut Queue, talks: &[Talk], decision: Decision) {
    for (talk, first) in talks.iter().zip([true, false].into_iter().cycle()) {
        if !first {
            talk.ask(0);
            pass(queue).await;
            talk.asked(0);
        }
        talk.ask(1);
        confirm(decision.for_flow(next(queue).await)).await.unwrap();
        if decision == Decision::Accept {
            talk.asked(1);
        }
        match decision {
            Decision::Reject => talk.refused("decided"),
            _ => talk.silent(),
        }
    }
}

/// Which connections' next packets come to the queue.
async fn undecided(queue: &mut Queue, talks: &[Talk]) -> Vec<bool> {
    let mut undecided = Vec::new();
    for talk in talks {
        talk.ask(9);
        let packet = queue.try_recv();
        undecided.push(packet.is_ok());
        drop(packet);
        while let Some(_error) = talk.client.take_error().unwrap() {}
        talk.server.set_nonblocking(true).unwrap();
        while talk.server.recv(&mut [0]).is_ok() {}
        talk.server.set_nonblocking(false).unwrap();
    }
    undecided
}

fn four() -> Vec<Talk> {
    [0, 0, 1, 1].map(|index| Talk::loopback(LOOPBACKS[index])).into()
}

async fn all_connections_are_forgotten() {
    for decision in DECISIONS {
        let talks = four();
        let mut queue = bind();
        let divert = table(rules_of(&talks)).install().unwrap();
        decide(&mut queue, &talks, decision).await;
        assert_eq!(undecided(&mut queue, &talks).await, [false; 4], "{decision:?}");
        divert.forget_flows().unwrap();
        assert_eq!(undecided(&mut queue, &talks).await, [true; 4], "{decision:?}");
        // They can be decided again.
        decide(&mut queue, &talks, decision).await;
        assert_eq!(undecided(&mut queue, &talks).await, [false; 4], "{decision:?}");
    }
}

async fn one_connection_is_forgotten_by_either_direction() {
    for decision in DECISIONS {
        let talks = four();
        let mut queue = bind();
        let divert = table(rules_of(&talks)).install().unwrap();
        decide(&mut queue, &talks, decision).await;
        for (index, talk) in talks.iter().enumerate() {
            let (client, server) = talk.addresses();
            let tuple = if index % 3 == 0 { FlowTuple::udp(client, server) } else { FlowTuple::udp(server, client) };
            assert!(divert.forget_flow(tuple).unwrap(), "{decision:?} {tuple:?}");
            let expected: Vec<bool> = (0..4).map(|other| other <= index).collect();
            assert_eq!(undecided(&mut queue, &talks).await, expected, "{decision:?} {tuple:?}");
        }
    }
}

async fn connections_without_a_verdict_are_not_forgotten() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let (client, server) = talk.addresses();
    let divert = table(rules_of(std::slice::from_ref(&talk))).install().unwrap();
    talk.ask(1);
    pass(&mut queue).await;
    assert!(!divert.forget_flow(FlowTuple::udp(client, server)).unwrap());
    for address in LOOPBACKS {
        assert!(!divert.forget_flow(FlowTuple::tcp((address, 1), (address, 2))).unwrap());
    }
    let error = divert.forget_flow(FlowTuple::tcp((LOOPBACKS[0], 1), (LOOPBACKS[1], 2))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

/// The destination is translated, and perhaps the source: the queue shows the former.
async fn translated_connections_are_forgotten_by_any_of_their_addresses() {
    for (decision, nth) in DECISIONS.into_iter().flat_map(|decision| [(decision, 1), (decision, 2)]) {
        for masquerade in [false, true] {
            let talk = Talk::loopback(LOOPBACKS[0]);
            let service = support::udp((LOOPBACKS[0], 0)).local_addr().unwrap();
            rules::install_nat(&format!("nat_{}", service.port()), service.port(), talk.port()).unwrap();
            if masquerade {
                rules::install_source_nat(&format!("snat_{}", service.port()), talk.port(), [127, 0, 0, 9].into())
                    .unwrap();
            }
            talk.client.connect(service).unwrap();
            let (client, server) = talk.addresses();
            let mut queue = bind();
            let divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
            let mut tuples = vec![(client, service), (service, client), (client, server), (server, client)];
            if masquerade && nth == 2 {
                let translated = SocketAddr::from(([127, 0, 0, 9], client.port()));
                tuples.extend([(translated, server), (server, translated)]);
            }
            for tuple in tuples {
                let case = format!("{decision:?} {nth} {masquerade} {tuple:?}");
                for _ in 1..nth {
                    talk.ask(1);
                    pass(&mut queue).await;
                }
                talk.ask(2);
                let packet = next(&mut queue).await;
                assert_eq!(packet.payload()[22..24], talk.port().to_be_bytes(), "{case}");
                confirm(decision.for_flow(packet)).await.unwrap();
                talk.ask(3);
                queue_is_empty(&mut queue);
                let (source, destination) = tuple;
                // Not one of the ports that the kernel chooses.
                let other = FlowTuple::udp(source, SocketAddr::new(destination.ip(), 9));
                assert!(!divert.forget_flow(other).unwrap(), "another: {case}");
                assert!(divert.forget_flow(FlowTuple::udp(source, destination)).unwrap(), "this one: {case}");
                assert!(!divert.forget_flow(FlowTuple::udp(source, destination)).unwrap(), "again: {case}");
            }
            rules::remove(NetfilterProtoFamily::IPv4, &format!("nat_{}", service.port())).unwrap();
            if masquerade {
                rules::remove(NetfilterProtoFamily::IPv4, &format!("snat_{}", service.port())).unwrap();
            }
        }
    }
}

async fn echo_requests_are_forgotten_by_their_identifier() {
    let hosts = Hosts::new();
    for decision in DECISIONS {
        let mut queue = bind();
        let divert = table([Rule::new(Hook::Forward).protocol(Protocol::Icmp).to_queue(0)]).install().unwrap();
        let [client, server] = hosts.addresses();
        let ping = || hosts.client.send(&echo(*client.ip(), *server.ip(), false, 7), *server.ip());
        let flow = |source: SocketAddrV4, destination: SocketAddrV4, id| FlowTuple {
            protocol: Protocol::Icmp,
            source: SocketAddrV4::new(*source.ip(), id).into(),
            destination: SocketAddrV4::new(*destination.ip(), 0).into(),
        };
        for (source, destination) in [(client, server), (server, client)] {
            ping();
            confirm(decision.for_flow(next(&mut queue).await)).await.unwrap();
            ping();
            hosts.arrived();
            queue_is_empty(&mut queue);
            assert!(!divert.forget_flow(flow(source, destination, 8)).unwrap());
            assert!(divert.forget_flow(flow(source, destination, 7)).unwrap());
        }
        divert.close().unwrap();
    }
}

async fn a_connection_is_forgotten_by_either_tuple_of_its_entry() {
    let hosts = Hosts::new();
    let mut queue = match builder().conntrack(true).bind().await {
        Ok(queue) => queue,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            return;
        }
    };
    // A redirection: the tuples differ in more than their order.
    let translated = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 4000);
    let arriving = Place { hook: 0, priority: -100 };
    let [_, server] = hosts.addresses();
    rules::install_nat_at("dnat", arriving, translated.port(), (*server.ip(), server.port())).unwrap();
    for decision in DECISIONS {
        for of in [|entry: Conntrack| entry.original, |entry: Conntrack| entry.reply] {
            let mut asked = Vec::new();
            for kind in 0..5 {
                hosts.another_port();
                let [client, server] = hosts.addresses();
                let packet = match kind {
                    0 => segment(client, server, SYN, (1000, 0), b""),
                    1 => datagram(client, server, b"data"),
                    2 => datagram(client, translated, b"data"),
                    3 => echo(*client.ip(), *server.ip(), false, client.port()),
                    _ => of_protocol(47, *client.ip(), *server.ip(), &[0; 8]),
                };
                let to = if kind == 2 { translated } else { server };
                let send = || hosts.client.send(&packet, *to.ip());
                let rule = Rule::new(Hook::Forward).ipv4().to_queue(0);
                let divert = table([rule]).install().unwrap();
                send();
                let packet = next(&mut queue).await;
                let tuple = of(packet.conntrack().expect("an entry")).expect("a tuple");
                confirm(decision.for_flow(packet)).await.unwrap();
                assert!(divert.forget_flow(tuple).unwrap(), "{decision:?} {tuple:?}");
                assert!(!divert.forget_flow(tuple).unwrap(), "{decision:?} {tuple:?}");
                send();
                asked.push(come(&mut queue).await.is_some());
                divert.close().unwrap();
                lose_connections();
            }
            assert_eq!(asked, [true; 5], "{decision:?}: they are still decided");
        }
    }
}

/// What the kernel does when the process is killed: the socket that owns the table is closed.
async fn connections_of_an_earlier_table_are_new() {
    for decision in DECISIONS {
        let talks = four();
        let mut queue = bind();
        let divert = table(rules_of(&talks)).install().unwrap();
        decide(&mut queue, &talks, decision).await;
        support::drop_now((divert, queue));
        // Nothing is left.
        talks[1].ask(2);
        talks[1].asked(2);
        let mut queue = bind();
        let _divert = table(rules_of(&talks)).install().unwrap();
        assert_eq!(undecided(&mut queue, &talks).await, [true; 4], "{decision:?}");
    }
}

async fn tables_with_other_marks_do_not_concern_each_other() {
    let talks = four();
    let other = FlowMarks::new(0x700);
    let mut queue = bind();
    let _divert = table(rules_of(&talks)).install().unwrap();
    decide(&mut queue, &talks, Decision::Accept).await;
    let mut second_queue = Queue::builder(1).flow_marks(other).bind().await.unwrap();
    let second_rules = talks.iter().map(|talk| to_port(Hook::Input, talk.port()).to_queue(1));
    let second = Divert::builder().flow_marks(other).rules(second_rules).install().unwrap();
    for talk in &talks {
        talk.ask(3);
        confirm(next(&mut second_queue).await.accept().for_flow()).await.unwrap();
        talk.asked(3);
    }
    second.forget_flows().unwrap();
    for talk in &talks {
        talk.ask(4);
        queue_is_empty(&mut queue);
        pass(&mut second_queue).await;
        talk.asked(4);
    }
}

async fn table_without_flow_marks_has_no_flows() {
    let divert = crate::common::divert([Rule::new(Hook::Input).count()]);
    let error = divert.forget_flows().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("no flow marks"), "{error}");
}

/// The packet waits in another queue; until then connection tracking shows no entry.
async fn an_accept_is_found_when_its_first_packet_has_passed_the_last_hook() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let (client, server) = talk.addresses();
    let mut queue = bind();
    let divert = table(rules_of(std::slice::from_ref(&talk))).install().unwrap();
    let mut later = Queue::builder(1).bind().await.unwrap();
    let other = crate::common::divert([to_port(Hook::Postrouting, talk.port()).to_queue(1)]);
    talk.ask(1);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    let waits = next(&mut later).await;
    assert!(!divert.forget_flow(FlowTuple::udp(client, server)).unwrap());
    confirm(waits.accept()).await.unwrap();
    talk.asked(1);
    assert!(divert.forget_flow(FlowTuple::udp(client, server)).unwrap());
    other.close().unwrap();
    talk.ask(2);
    pass(&mut queue).await;
    talk.asked(2);
}

/// The connection is named as before the translation, and conntrack has lost it.
async fn a_translated_connection_is_forgotten_without_its_entry() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let service = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), server.port());
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, server.port(), (*server.ip(), server.port())).unwrap();
    let mut asked = Vec::new();
    for [name, other] in [[client, server], [client, service], [service, client]] {
        let mut queue = bind();
        let divert = table([udp()]).install().unwrap();
        hosts.client.datagram(client, service);
        pass(&mut queue).await;
        hosts.server.datagram(server, client);
        pass(&mut queue).await;
        hosts.client.datagram(client, service);
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
        lose_connections();
        assert!(divert.forget_flow(FlowTuple::udp(SocketAddr::from(name), SocketAddr::from(other))).unwrap());
        hosts.server.datagram(server, client);
        asked.push(come(&mut queue).await.is_some());
        divert.close().unwrap();
        lose_connections();
    }
    assert_eq!(asked, [true; 3], "the server's datagram is still denied");
}

/// "If a SYN comes while conntrack has an entry with its addresses and ports, only a verdict for a
/// SYN can accept the connection." Not if the flows are forgotten between.
async fn a_verdict_for_an_older_connection_does_not_accept_after_forgetting() {
    let hosts = Hosts::new();
    for forget in [None, Some(false), Some(true)] {
        hosts.another_port();
        let [client, server] = hosts.addresses();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        opened(&hosts, &mut queue).await;
        hosts.client(ACK, (1001, 5001), b"request");
        let older = queued(&mut queue, ACK).await;
        hosts.client(SYN, (90_000, 0), b"");
        pass_segment(&mut queue, SYN).await;
        match forget {
            None => {}
            Some(false) => divert.forget_flows().unwrap(),
            Some(true) => drop(divert.forget_flow(FlowTuple::tcp(client, server)).unwrap()),
        }
        confirm(older.accept().for_flow()).await.unwrap();
        hosts.server(SYN_ACK, (7000, 90_001), b"");
        let asked = come(&mut queue).await;
        assert!(asked.is_some(), "{forget:?}: the new connection is accepted");
        drop(asked);
        divert.close().unwrap();
        hosts.arrived();
    }
}

/// No rule asks about it.
async fn a_forgotten_denial_drops_no_datagram_of_the_other_side() {
    let hosts = Hosts::new();
    let mut arrived = Vec::new();
    for all in [true, false] {
        hosts.another_port();
        let [client, server] = hosts.addresses();
        let mut queue = bind();
        let rule = from_client(&hosts, Protocol::Udp).to_queue(0);
        let divert = table([rule]).install().unwrap();
        deny_datagram(&hosts, &mut queue).await;
        if all {
            divert.forget_flows().unwrap();
        } else {
            assert!(divert.forget_flow(FlowTuple::udp(client, server)).unwrap());
        }
        hosts.datagram(false);
        arrived.push(hosts.arrived());
        divert.close().unwrap();
    }
    assert_eq!(arrived, [[0, 1]; 2]);
}
