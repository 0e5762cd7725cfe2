//! Other programs of the host: their routes, marks and chains.

use std::net::IpAddr;

use nfqueue_divert::Divert;
use tokio_nfqueue::{FlowMarks, Hook, Packet, Protocol, Queue, Rule, Verdict, divert::Match};

use super::{DECISIONS, LOOPBACKS, Talk, bind, confirm, pass, queue_is_empty, table, to_port};
use crate::{
    common::{
        next,
        rules::{self, NetfilterProtoFamily, Place},
        soon,
    },
    support,
};

tests![
    one accepted_packets_keep_their_route,
    one a_denied_packet_that_comes_to_its_hook_once_more_is_denied,
    one denied_packets_are_denied_while_another_program_removes_an_earlier_chain,
    one marks_of_other_programs_are_no_verdicts,
    one priorities_of_other_programs_stay,
    one priorities_of_verdicts_reach_the_next_hook,
    one stop_leaves_no_trace_on_the_packet,
    one a_program_with_other_marks_ignores_those_of_its_predecessor,
    one verdicts_hold_at_a_hook_that_new_rules_have_added,
];

/// A VPN's kill switch: what has another mark is unreachable.
async fn accepted_packets_keep_their_route() {
    const MARK: u32 = 1;
    let peer = support::veth();
    support::unreachable_unless_marked(MARK);
    let pairs: [(IpAddr, IpAddr); 2] =
        [(peer.near_v4.into(), peer.far_v4.into()), (peer.near_v6.into(), peer.far_v6.into())];
    for (client, server) in pairs {
        for mark_of_verdict in [false, true] {
            let talk = Talk { client: support::udp((client, 0)), server: peer.run(|| support::udp((server, 0))) };
            support::set_mark(&talk.client, MARK);
            talk.client.connect(talk.server.local_addr().unwrap()).unwrap();
            let mut queue = bind();
            let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
            talk.ask(1);
            let packet = next(&mut queue).await;
            assert_eq!(packet.mark(), MARK);
            let verdict = packet.accept().for_flow();
            let verdict = if mark_of_verdict { verdict.mark(MARK) } else { verdict };
            confirm(verdict).await.unwrap();
            talk.asked(1);
            talk.ask(2);
            talk.asked(2);
            queue_is_empty(&mut queue);
        }
    }
}

/// `nf_reinject` counts hooks, and another program registers one while the packet waits.
async fn a_denied_packet_that_comes_to_its_hook_once_more_is_denied() {
    type Decide = fn(Packet) -> Verdict;
    let cases: [(Decide, bool); 4] = [
        (|packet| packet.drop().for_flow(), true),
        (|packet| packet.reject().for_flow(), true),
        (|packet| packet.reject(), true),
        (|packet| packet.accept().for_flow(), false),
    ];
    let mut tables = 0;
    for (decide, denies) in cases {
        for (hook, number) in [(Hook::Prerouting, 0), (Hook::Input, 1), (Hook::Output, 3)] {
            for priority in [-50, 0] {
                for replaced in [true, false] {
                    let talk = Talk::loopback(LOOPBACKS[0]);
                    let mut queue = bind();
                    let divert = table([to_port(hook, talk.port()).to_queue(0)]).install().unwrap();
                    talk.ask(1);
                    let packet = next(&mut queue).await;
                    tables += 1;
                    let place = Place { hook: number, priority };
                    rules::install_hook(NetfilterProtoFamily::Inet, &format!("other_{tables}"), place).unwrap();
                    if replaced {
                        divert.replace_rules([]).unwrap();
                    }
                    confirm(decide(packet)).await.unwrap();
                    let case = format!("{hook:?} {priority} {replaced}");
                    if denies {
                        while let Some(_error) = talk.client.take_error().unwrap() {}
                        talk.silent();
                        queue_is_empty(&mut queue);
                    } else if replaced {
                        talk.asked(1);
                    } else {
                        // It is as a packet that comes for the first time.
                        let packet = queue.try_recv().expect(&case);
                        assert_eq!(packet.priority(), 0);
                        confirm(packet.accept()).await.unwrap();
                        talk.asked(1);
                    }
                    divert.close().unwrap();
                }
            }
        }
    }
}

/// Of packets and of connections: whatever has not exactly the value of a verdict.
async fn marks_of_other_programs_are_no_verdicts() {
    let marks = FlowMarks::default();
    let foreign =
        [0x4000_0000, 0x6000_0000, 0x2000_0000, 0xa000_0000, 0x6d6f_6c65, 0xf41, 0xffff_0000, 1, 2, 0x10, 0x1000];
    for mark in foreign {
        for verdict in [false, true] {
            let talk = Talk::loopback(LOOPBACKS[0]);
            support::set_mark(&talk.client, mark);
            let before = Rule::new(Hook::Output).priority(-10).protocol(Protocol::Udp);
            let before = before.destination_port(talk.port()).set_connection_mark(mark, u32::MAX);
            let behind = Rule::new(Hook::Postrouting).when(Match::mark(mark, u32::MAX)).count();
            let others = Divert::builder().rules([before, behind]).install().unwrap();
            let mut queue = bind();
            let rules = if verdict { vec![to_port(Hook::Output, talk.port()).to_queue(0)] } else { vec![] };
            let divert = table(rules).chain(Hook::Output, None).install().unwrap();
            for number in 0..3 {
                talk.ask(number);
                if verdict {
                    let packet = next(&mut queue).await;
                    assert_eq!(packet.mark(), mark);
                    confirm(packet.accept()).await.unwrap();
                }
                talk.asked(number);
                queue_is_empty(&mut queue);
            }
            assert_eq!(others.counters().unwrap()[1].packets, 3, "{mark:#x}");
            // They are not cleared either.
            divert.forget_flows().unwrap();
            others.close().unwrap();
            divert.close().unwrap();
        }
    }
    assert!(foreign.iter().all(|mark| (marks.mask() & mark).count_ones() < 2));
}

async fn priorities_of_other_programs_stay() {
    for (priority, for_flow) in [(0, true), (6, true), (0x0001_0010, true), (0x00ff_ffff, true), (0x8001_0010, false)] {
        let talk = Talk::loopback(LOOPBACKS[0]);
        support::set_priority(&talk.client, priority);
        let mut queue = bind();
        let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
        // At the next hook.
        let mut later = Queue::builder(1).bind().await.unwrap();
        let _later = crate::common::divert([to_port(Hook::Postrouting, talk.port()).to_queue(1)]);
        for number in 0..3 {
            talk.ask(number);
            if number < 2 {
                let packet = next(&mut queue).await;
                assert_eq!(packet.priority(), priority);
                let verdict = packet.accept();
                let verdict = if number == 1 { verdict.for_flow() } else { verdict };
                assert_eq!(confirm(verdict).await.is_ok(), for_flow || number == 0);
            } else if for_flow {
                queue_is_empty(&mut queue);
            } else {
                // No connection can be accepted by such a packet.
                pass(&mut queue).await;
            }
            let packet = next(&mut later).await;
            assert_eq!(packet.priority(), priority);
            confirm(packet.accept()).await.unwrap();
            talk.asked(number);
        }
    }
}

async fn priorities_of_verdicts_reach_the_next_hook() {
    type Decide = fn(Packet) -> Verdict;
    let decisions: [Decide; 4] = [
        |packet| packet.accept(),
        |packet| packet.detach().accept(),
        |packet| packet.stop(),
        |packet| packet.accept().for_flow(),
    ];
    for (decide, priority) in decisions.iter().flat_map(|decide| [0, 5, 0x00ff_ffff].map(|priority| (decide, priority)))
    {
        let talk = Talk::loopback(LOOPBACKS[0]);
        support::set_priority(&talk.client, 6);
        let mut queue = bind();
        let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
        let mut later = Queue::builder(1).bind().await.unwrap();
        let _later = crate::common::divert([to_port(Hook::Postrouting, talk.port()).to_queue(1)]);
        talk.ask(1);
        confirm(decide(next(&mut queue).await).priority(priority)).await.unwrap();
        let packet = next(&mut later).await;
        assert_eq!(packet.priority(), priority);
        confirm(packet.accept()).await.unwrap();
        talk.asked(1);
    }
}

async fn stop_leaves_no_trace_on_the_packet() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    let mut later = Queue::builder(1).bind().await.unwrap();
    let _later = crate::common::divert([to_port(Hook::Postrouting, talk.port()).to_queue(1)]);
    talk.ask(1);
    confirm(next(&mut queue).await.stop()).await.unwrap();
    let packet = next(&mut later).await;
    assert_eq!((packet.mark(), packet.priority()), (0, 0));
    confirm(packet.accept()).await.unwrap();
    talk.asked(1);
}

async fn a_program_with_other_marks_ignores_those_of_its_predecessor() {
    let other = FlowMarks::new(0x7000_0000);
    for (before, after) in [(FlowMarks::default(), other), (other, FlowMarks::default())] {
        let talk = Talk::loopback(LOOPBACKS[0]);
        for (marks, number) in [(before, 1), (after, 2)] {
            let mut queue = Queue::builder(0).flow_marks(marks).bind().await.unwrap();
            let rule = to_port(Hook::Output, talk.port()).to_queue(0);
            let divert = Divert::builder().flow_marks(marks).rule(rule).install().unwrap();
            talk.ask(number);
            confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
            talk.asked(number);
            divert.close().unwrap();
            queue.close().await.unwrap();
        }
    }
}

/// Before, only packets of the other direction were looked at there.
async fn verdicts_hold_at_a_hook_that_new_rules_have_added() {
    for hooks in [[Hook::Output, Hook::Input], [Hook::Input, Hook::Output]] {
        for decision in DECISIONS {
            let talk = Talk::loopback(LOOPBACKS[0]);
            let mut queue = bind();
            let divert = table([to_port(hooks[0], 1).to_queue(0)]).install().unwrap();
            divert.replace_rules([to_port(hooks[1], talk.port()).to_queue(0)]).unwrap();
            talk.obeys(decision, &mut queue).await;
            divert.close().unwrap();
        }
    }
}

/// The kernel first forgets the hook, and then drops what is queued. A verdict between the two
/// continues behind the next chain.
async fn denied_packets_are_denied_while_another_program_removes_an_earlier_chain() {
    const PACKETS: u16 = 900;
    let place = || Place { hook: 3, priority: -10 };
    let server = support::udp((LOOPBACKS[0], 0));
    let clients: Vec<_> = (0..PACKETS).map(|_| support::udp((LOOPBACKS[0], 0))).collect();
    for round in 0..30 {
        let mut queue = bind();
        let port = server.local_addr().unwrap().port();
        let _divert = table([to_port(Hook::Output, port).to_queue(0)]).install().unwrap();
        rules::install_hook(NetfilterProtoFamily::Inet, "other", place()).unwrap();
        clients.iter().for_each(|client| drop(client.send_to(&[0], server.local_addr().unwrap())));
        let mut waiting = Vec::new();
        for _ in &clients {
            waiting.push(next(&mut queue).await);
        }
        let removal =
            support::Namespace::current().spawn(move || rules::remove(NetfilterProtoFamily::Inet, "other").unwrap());
        for packet in waiting {
            let verdict = if round % 2 == 0 { packet.drop().for_flow() } else { packet.reject().for_flow() };
            verdict.submit().unwrap();
            tokio::task::yield_now().await;
        }
        removal.join().unwrap();
        soon("the last verdict", queue.sink().flush()).await;
        server.set_nonblocking(true).unwrap();
        let passed = std::iter::from_fn(|| server.recv(&mut [0]).ok()).count();
        server.set_nonblocking(false).unwrap();
        assert_eq!(passed, 0, "round {round}");
    }
}
