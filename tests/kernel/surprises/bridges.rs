//! Broadcast through a bridge, in the rules for IP (`br_netfilter`).

use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    Hook, Protocol, Queue, Rule,
    divert::{ConnectionState, Match},
};

use crate::{
    common::{PORT, next},
    support::{Bridge, Frame, wait_until},
};

tests![one the_first_broadcast_of_a_tracked_connection_through_a_bridge_is_lost];

const BROADCAST: [u8; 6] = [0xff; 6];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

fn frame(from: [u8; 6], to: [u8; 6], port: u16, number: u8) -> Frame {
    let address = match to {
        BROADCAST => [192, 0, 2, 255],
        GROUP => [224, 0, 0, 1],
        _ => [192, 0, 2, 2],
    };
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(from, to)
        .ipv4([192, 0, 2, 1], address, 64)
        .udp(port, PORT)
        .write(&mut bytes, &[number])
        .unwrap();
    Frame { tag: None, bytes }
}

/// The first packets of connections, and where they come to the queue.
async fn the_first_broadcast_of_a_tracked_connection_through_a_bridge_is_lost() {
    let bridge = Bridge::new();
    if std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").ok().as_deref() != Some("1\n") {
        return eprintln!("not tried, for there is no br_netfilter at work");
    }
    let [from, to] = &bridge.ends;
    let unicast = to.socket.address();
    let udp = |hook| Rule::new(hook).protocol(Protocol::Udp);
    let groups = [(Ipv4Addr::new(192, 0, 2, 255).into(), 32), (Ipv4Addr::new(224, 0, 0, 0).into(), 4)];
    // Whether connections are tracked, the rule, and what becomes of broadcast and multicast.
    let cases = [
        (true, udp(Hook::Forward), Outcome::Lost),
        (false, udp(Hook::Forward), Outcome::Queued),
        (true, udp(Hook::Prerouting), Outcome::Queued),
        (true, udp(Hook::Forward).unless(Match::destination_addresses(groups)), Outcome::Unseen),
    ];
    for (port, (tracked, rule, outcome)) in (1..).zip(cases) {
        let tracking = Rule::new(Hook::Forward).when(Match::connection_state([ConnectionState::New])).count();
        let rules = [tracked.then_some(tracking), Some(rule.to_queue(0))];
        let divert = Divert::builder().rules(rules.into_iter().flatten()).install().unwrap();
        let mut queue = Queue::builder(0).bind().await.unwrap();
        for destination in [BROADCAST, GROUP, unicast] {
            for number in 0..3 {
                // The first packet of the connection is lost, before it comes to the queue.
                let outcome = match outcome {
                    _ if destination == unicast => Outcome::Queued,
                    Outcome::Lost if number > 0 => Outcome::Queued,
                    outcome => outcome,
                };
                from.socket.send(&frame(from.socket.address(), destination, port, number));
                if outcome == Outcome::Queued {
                    let packet = next(&mut queue).await;
                    assert_eq!(packet.payload().last(), Some(&number));
                    packet.accept().confirm().await.unwrap();
                }
                let case = format!("tracked: {tracked}, to {destination:x?}, packet {number}");
                let (mut arrived, expected) = (0, usize::from(outcome != Outcome::Lost));
                wait_until("it arrives", || {
                    arrived += std::iter::from_fn(|| to.socket.arrived()).count();
                    arrived >= expected
                });
                assert_eq!(arrived, expected, "{case}");
                assert!(queue.try_recv().is_err(), "{case}");
            }
        }
        queue.close().await.unwrap();
        divert.close().unwrap();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Queued,
    /// It arrives without having been queued.
    Unseen,
    Lost,
}
