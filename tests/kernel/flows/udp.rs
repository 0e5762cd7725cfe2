//! Flows of UDP.

use std::{net::IpAddr, time::Instant};

use nfqueue_divert::Divert;
use tokio_nfqueue::{
    FlowMarks, Hook, Protocol, Queue, Rule,
    divert::{Direction, Match, Priority},
};

use super::{
    CROSSING, DECISIONS, Decision, LOOPBACKS, Talk, bind, confirm, pass, queue_is_empty, refused, sent, table, to_port,
    unlimited_icmp_errors,
};
use crate::{
    common::{
        next,
        rules::{self, NetfilterProtoFamily},
    },
    support::{self, VethOptions},
};

tests![
    one verdict_holds_for_all_later_packets_in_both_directions,
    one verdict_holds_at_every_hook,
    one connections_that_begin_elsewhere,
    one forwarded_connections,
    one connections_with_address_translation,
    one routes_by_the_mark_are_not_disturbed,
    one other_bits_of_both_marks_stay,
    one verdict_of_one_packet_leaves_its_connection_undecided,
    one rejected_packet_is_answered_and_its_connection_goes_on,
    one detached_packets_decide_for_their_connections,
    one rules_before_the_queue_still_hold_for_accepted_connections,
    one rules_behind_the_queue_do_not_see_accepted_connections,
];

/// What happens after a verdict for the connection at its `nth` packet.
async fn decided_at(decision: Decision, nth: u8, talk: &Talk, hook: Hook) {
    let case = format!("{decision:?} at packet {nth} of {:?}, {hook:?}", talk.addresses());
    let mut queue = bind();
    let _divert = table([to_port(hook, talk.port()).to_queue(0)]).install().unwrap();
    for number in 1..nth {
        talk.ask(number);
        pass(&mut queue).await;
        talk.asked(number);
        talk.answer(number);
        talk.answered(number);
    }
    talk.ask(nth);
    let packet = next(&mut queue).await;
    assert_eq!(packet.mark(), 0, "{case}");
    let decided = Instant::now();
    confirm(decision.for_flow(packet)).await.unwrap();
    for number in nth..nth + 5 {
        if number > nth {
            talk.ask(number);
        }
        match decision {
            Decision::Accept => {
                talk.asked(number);
                talk.answer(number);
                talk.answered(number);
            }
            Decision::Drop => {
                talk.answer(number);
                // After a dropped first packet, answers begin a connection of their own later.
                if nth == 1 && decided.elapsed() >= CROSSING {
                    return;
                }
                talk.silent();
            }
            Decision::Reject => talk.refused(&case),
        }
        queue_is_empty(&mut queue);
    }
    if decision == Decision::Reject && nth > 1 {
        talk.server.connect(talk.addresses().0).unwrap();
        sent(|| talk.server.send(&[99]));
        refused(&talk.server, &case);
        talk.silent();
    }
}

async fn verdict_holds_for_all_later_packets_in_both_directions() {
    for decision in DECISIONS {
        for nth in [1, 2, 10] {
            for address in LOOPBACKS {
                decided_at(decision, nth, &Talk::loopback(address), Hook::Output).await;
            }
        }
    }
}

async fn verdict_holds_at_every_hook() {
    for hook in [Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting] {
        for decision in DECISIONS {
            if (hook, decision) == (Hook::Postrouting, Decision::Reject) {
                continue;
            }
            for address in LOOPBACKS {
                decided_at(decision, 2, &Talk::loopback(address), hook).await;
            }
        }
    }
}

async fn connections_that_begin_elsewhere() {
    let peer = support::veth();
    unlimited_icmp_errors();
    let pairs: [(IpAddr, IpAddr); 2] =
        [(peer.far_v4.into(), peer.near_v4.into()), (peer.far_v6.into(), peer.near_v6.into())];
    for (client, server) in pairs {
        for decision in DECISIONS {
            for nth in [1, 2] {
                for hook in [Hook::Prerouting, Hook::Input] {
                    let talk = Talk { client: peer.run(|| support::udp((client, 0))), ..Talk::new(server, server) };
                    talk.client.connect(talk.server.local_addr().unwrap()).unwrap();
                    decided_at(decision, nth, &talk, hook).await;
                }
            }
        }
    }
}

/// A client behind this host, which forwards to a server behind it.
async fn forwarded_connections() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    unlimited_icmp_errors();
    left.route_through_near();
    right.route_through_near();
    let pairs: [(IpAddr, IpAddr); 2] =
        [(left.far_v4.into(), right.far_v4.into()), (left.far_v6.into(), right.far_v6.into())];
    for (client, server) in pairs {
        for decision in DECISIONS {
            for nth in [1, 2] {
                for hook in [Hook::Prerouting, Hook::Forward, Hook::Postrouting] {
                    if (hook, decision) == (Hook::Postrouting, Decision::Reject) {
                        continue;
                    }
                    let talk = Talk {
                        client: left.run(|| support::udp((client, 0))),
                        server: right.run(|| support::udp((server, 0))),
                    };
                    talk.client.connect(talk.server.local_addr().unwrap()).unwrap();
                    decided_at(decision, nth, &talk, hook).await;
                }
            }
        }
    }
}

async fn connections_with_address_translation() {
    for hook in [Hook::Output, Hook::Input, Hook::Prerouting] {
        for decision in DECISIONS {
            for nth in [1, 2] {
                let talk = Talk::loopback(LOOPBACKS[0]);
                // The client talks to another port than the server has.
                let service = support::udp((LOOPBACKS[0], 0)).local_addr().unwrap();
                let name = format!("nat_{}", service.port());
                rules::install_nat(&name, service.port(), talk.port()).unwrap();
                talk.client.connect(service).unwrap();
                decided_at(decision, nth, &talk, hook).await;
                rules::remove(NetfilterProtoFamily::IPv4, &name).unwrap();
            }
        }
    }
}

/// Two ways to one address, one of them for a mark: the first packet must not lose its way.
async fn routes_by_the_mark_are_not_disturbed() {
    const MARK: u32 = 0x77;
    let [plain, marked] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    for (target, gateways) in [
        (IpAddr::from([192, 0, 2, 1]), [plain.far_v4, marked.far_v4].map(IpAddr::from)),
        (IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]), [plain.far_v6, marked.far_v6].map(IpAddr::from)),
    ] {
        support::default_route(gateways[0]);
        support::marked_route(MARK, gateways[1]);
        let prefix = if target.is_ipv4() { 32 } else { 128 };
        let [straight, detour] = [&plain, &marked].map(|peer| {
            peer.run(|| {
                support::add_address("lo", target, prefix);
                support::udp((target, 9000))
            })
        });
        let unspecified = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let client = support::udp_marked(unspecified, MARK);
        let mut queue = bind();
        let _divert = table([to_port(Hook::Output, 9000).to_queue(0)]).install().unwrap();
        for number in 0..4_u8 {
            client.send_to(&[number], (target, 9000)).unwrap();
            match number {
                0 => pass(&mut queue).await,
                1 => confirm(next(&mut queue).await.accept().for_flow()).await.unwrap(),
                _ => queue_is_empty(&mut queue),
            }
            let mut received = [9];
            detour.recv(&mut received).unwrap();
            assert_eq!(received, [number]);
        }
        straight.set_nonblocking(true).unwrap();
        assert!(straight.recv(&mut [0]).is_err());
    }
}

async fn other_bits_of_both_marks_stay() {
    let marks = FlowMarks::new(0x0007_0000);
    for decision in [None, Some(Decision::Accept)] {
        let talk = Talk::loopback(LOOPBACKS[0]);
        support::set_mark(&talk.client, 0x1008_0001);
        let mut queue = Queue::builder(0).flow_marks(marks).bind().await.unwrap();
        let before = Rule::new(Hook::Output).priority(-10).set_connection_mark(0x8010_0042, u32::MAX);
        let behind = |condition| {
            let rule = Rule::new(Hook::Postrouting).protocol(Protocol::Udp);
            rule.destination_port(talk.port()).when(condition).count()
        };
        let rules = Divert::builder().rule(before).rule(behind(Match::mark(0x1008_0001, u32::MAX)));
        let accepted = 0x8010_0042 | if decision.is_some() { marks.accepted() } else { 0 };
        let others = rules.rule(behind(Match::connection_mark(accepted, u32::MAX))).install().unwrap();
        let _divert =
            Divert::builder().flow_marks(marks).rule(to_port(Hook::Output, talk.port()).to_queue(0)).install().unwrap();
        talk.ask(1);
        let packet = next(&mut queue).await;
        assert_eq!(packet.mark(), 0x1008_0001);
        let verdict = packet.accept();
        confirm(if decision.is_some() { verdict.for_flow() } else { verdict }).await.unwrap();
        talk.asked(1);
        let counts: Vec<u64> = others.counters().unwrap().iter().map(|counter| counter.packets).collect();
        assert_eq!(counts, [1, 1, 1], "{decision:?}");
    }
    // A verdict may set the others.
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = Queue::builder(0).flow_marks(marks).bind().await.unwrap();
    let rule = Rule::new(Hook::Postrouting).when(Match::mark(0x77, u32::MAX)).count();
    let others = Divert::builder().rule(rule).install().unwrap();
    let rule = to_port(Hook::Output, talk.port()).to_queue(0);
    let _divert = Divert::builder().flow_marks(marks).rule(rule).install().unwrap();
    talk.ask(1);
    confirm(next(&mut queue).await.accept().mark(0x77)).await.unwrap();
    talk.asked(1);
    talk.ask(2);
    confirm(next(&mut queue).await.accept().mark(0x77).for_flow()).await.unwrap();
    talk.asked(2);
    assert_eq!(others.counters().unwrap()[0].packets, 2);
}

async fn verdict_of_one_packet_leaves_its_connection_undecided() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    pass(&mut queue).await;
    talk.asked(1);
    talk.ask(2);
    confirm(next(&mut queue).await.drop()).await.unwrap();
    talk.silent();
    talk.ask(3);
    pass(&mut queue).await;
    talk.asked(3);
}

async fn rejected_packet_is_answered_and_its_connection_goes_on() {
    for address in LOOPBACKS {
        for hook in [Hook::Prerouting, Hook::Input, Hook::Output] {
            let talk = Talk::loopback(address);
            let mut queue = bind();
            let _divert = table([to_port(hook, talk.port()).to_queue(0)]).install().unwrap();
            for number in [1, 2] {
                talk.ask(number);
                confirm(next(&mut queue).await.reject()).await.unwrap();
                talk.refused(&format!("{hook:?}"));
            }
            talk.ask(3);
            pass(&mut queue).await;
            talk.asked(3);
            talk.answer(3);
            talk.answered(3);
        }
    }
}

async fn detached_packets_decide_for_their_connections() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    let detached = next(&mut queue).await.detach();
    confirm(detached.reject()).await.unwrap();
    talk.refused("detached");
    talk.ask(2);
    let detached = next(&mut queue).await.detach();
    confirm(detached.accept().for_flow()).await.unwrap();
    talk.asked(2);
    talk.ask(3);
    talk.asked(3);
    queue_is_empty(&mut queue);
}

async fn rules_before_the_queue_still_hold_for_accepted_connections() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let marked = to_port(Hook::Output, talk.port()).mark(7, 0xff);
    let divert = table([marked.drop(), to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    talk.asked(1);
    support::set_mark(&talk.client, 7);
    talk.ask(2);
    talk.silent();
    support::set_mark(&talk.client, 0);
    talk.ask(3);
    talk.asked(3);
    queue_is_empty(&mut queue);
    let counts: Vec<u64> = divert.counters().unwrap().iter().map(|counter| counter.packets).collect();
    assert_eq!(counts, [1, 2]);
}

async fn rules_behind_the_queue_do_not_see_accepted_connections() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let last = Rule::new(Hook::Output).when(Match::direction(Direction::Original)).priority(Priority::FILTER).drop();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0), last]).install().unwrap();
    talk.ask(1);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    talk.asked(1);
    talk.ask(2);
    talk.asked(2);
}
