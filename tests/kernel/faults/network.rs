//! Interfaces that go down and up, and base chains of other programs.

use std::time::{Duration, Instant};

use nfqueue_divert::Divert;
use nix::net::if_::InterfaceFlags;
use tokio_nfqueue::{Action, Advice, ErrorKind, FlushPolicy, Hook, Packet, Protocol, Queue, Rule};

use super::process::{Process, in_a_process, say, wait_for_the_end};
use crate::{
    common::{
        DEADLINE, Traffic, account, bind_now, divert, eventually, freed, hold, next, number, soon, start, udp_in,
        without_net_admin,
    },
    promises::{record_all_events, record_events},
    support,
};

tests![
    both an_interface_that_goes_down_and_up_costs_only_what_was_queued,
    both a_base_chain_that_another_program_deletes_costs_only_what_was_queued,
    sync packets_that_the_kernel_drops_while_they_are_queued_are_reported_with_the_likely_cause,
    one late_verdicts_are_not_taken_for_packets_that_the_kernel_dropped,
];

const ROUNDS: u32 = 10;
const DECIDED: u32 = 10;
const HELD: u32 = 7;

async fn an_interface_that_goes_down_and_up_costs_only_what_was_queued() {
    let peer = support::veth();
    let (mut queue, _divert) = start(Queue::builder(0));
    let (from, to) = (peer.run(|| support::udp((peer.far_v4, 0))), support::udp((peer.near_v4, 9000)));
    for round in 0..ROUNDS {
        let mut held = Vec::new();
        for index in 0..DECIDED + HELD {
            from.send_to(&(round * 100 + index).to_be_bytes(), (peer.near_v4, 9000)).unwrap();
            let packet = next(&mut queue).await;
            assert_eq!(number(&packet), round * 100 + index);
            if index < DECIDED {
                packet.accept().submit().unwrap();
            } else {
                held.push(packet);
            }
        }
        queue.sink().flush().await;
        for index in 0..DECIDED {
            let mut datagram = [0; 4];
            to.recv(&mut datagram).unwrap();
            assert_eq!(u32::from_be_bytes(datagram), round * 100 + index);
        }
        support::link_down(&peer.near);
        eventually("the kernel has dropped the packets", || account(0).unwrap().waiting == 0).await;
        gone(held).await;
        support::link_up(&peer.near);
        // The other side learns of it a little later. Until then it may drop what it sends.
        let running = || support::link_flags(&peer.far).contains(InterfaceFlags::IFF_RUNNING);
        peer.run(|| support::wait_until("the far interface runs", running));
    }
    let (stats, kernel) = (queue.stats(), account(0).unwrap());
    assert_fields!(stats, received.packets: u64::from(ROUNDS * (DECIDED + HELD)), held.in_flight: 0, lost.packets: 0);
    assert_fields!(stats, decided.accepted: u64::from(ROUNDS * DECIDED), sent.gone_at_least: u64::from(ROUNDS * HELD));
    assert_fields!(stats, sent.refusals: 0);
    assert_fields!(kernel, queue_full: 0, socket_full: 0, last_id: stats.received.packets);
}

async fn a_base_chain_that_another_program_deletes_costs_only_what_was_queued() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for _ in 0..ROUNDS {
        let (mut other, _) = Process::start("table");
        let mut packets = hold(&mut queue, &traffic, 0..DECIDED + HELD).await;
        let held = packets.split_off(DECIDED as usize);
        packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
        queue.sink().flush().await;
        traffic.expect(0..DECIDED).await;
        other.kill();
        eventually("the kernel has dropped the packets", || account(0).unwrap().waiting == 0).await;
        gone(held).await;
        traffic.expect_nothing();
    }
    let (stats, kernel) = (queue.stats(), account(0).unwrap());
    assert_fields!(stats, received.packets: u64::from(ROUNDS * (DECIDED + HELD)), held.in_flight: 0, lost.packets: 0);
    assert_fields!(stats, decided.accepted: u64::from(ROUNDS * DECIDED), sent.gone_at_least: u64::from(ROUNDS * HELD));
    assert_fields!(stats, sent.refusals: 0);
    assert_fields!(kernel, queue_full: 0, socket_full: 0, last_id: stats.received.packets);
}

/// The event for packets that the kernel has dropped.
const DROPPED: &str = "packets dropped by the kernel while they were queued";

/// In a process of its own: any thread may read the reply, and reports it then.
fn packets_that_the_kernel_drops_while_they_are_queued_are_reported_with_the_likely_cause() {
    in_a_process(EVENTS);
}

/// The mode of that process.
pub(super) const EVENTS: &str = "events";

pub(super) async fn dropped_packets_are_reported() {
    let (events, began) = (record_all_events(), Instant::now());
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::immediate()));
    let traffic = Traffic::new(20);
    for packet in hold(&mut queue, &traffic, 0..5).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..5).await;
    assert_eq!(queue.sink().advice(), []);
    let mut dropped = 0;
    for confirmed in [false, true] {
        let (mut other, _) = Process::start("table");
        let mut held = hold(&mut queue, &traffic, 5..12).await;
        other.kill();
        eventually("the kernel has dropped the packets", || account(0).unwrap().waiting == 0).await;
        if confirmed {
            held.truncate(1);
            dropped += 6;
        }
        dropped += held.len() as u64;
        gone(held).await;
        // The default action of the rest is sent.
        eventually("the replies", || queue.try_recv().is_err() && queue.stats().sent.gone_at_least == dropped).await;
    }
    assert_eq!(queue.sink().advice(), [Advice::DroppedWhileQueued { packets: dropped }]);
    let text = queue.sink().advice()[0].to_string();
    for cause in ["14 packets", "base chain", "iptables", "interface"] {
        assert!(text.contains(cause), "{text}");
    }
    // The first is reported at once, and those after it once a second.
    let events = events.lock().unwrap().clone();
    let reported = events.iter().filter(|event| *event == DROPPED).count() as u64;
    assert!((1..=2 + began.elapsed().as_secs()).contains(&reported), "{events:?}");
}

async fn late_verdicts_are_not_taken_for_packets_that_the_kernel_dropped() {
    let (events, _recording) = record_events();
    let traffic = Traffic::new(20);
    let _divert = divert([udp_in().to_queue(0)]);
    let builder = || Queue::builder(0).flush_policy(FlushPolicy::immediate());
    // Verdicts after the deadline, after close, after a refusal and for packets that were dropped.
    let mut queue = bind_now(builder().deadline(DEADLINE, Action::Drop));
    let held = hold(&mut queue, &traffic, 0..5).await;
    eventually("the deadline", || held.iter().all(|packet| packet.is_expired())).await;
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    let first = queue.sink();
    drop(queue);
    freed(0).await;

    let mut queue = bind_now(builder());
    let mut held = hold(&mut queue, &traffic, 5..10).await;
    without_net_admin(|| held.remove(0).accept().submit().unwrap());
    held.remove(0).accept().submit().unwrap();
    drop(held.remove(0));
    traffic.send(10..12);
    let second = queue.sink();
    soon("the shutdown", queue.close_within(Duration::from_millis(10))).await.unwrap_err();
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());

    let mut queue = bind_now(builder());
    let held = hold(&mut queue, &traffic, 12..15).await;
    let third = queue.sink();
    drop(queue);
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    freed(0).await;
    for sink in [first, second, third] {
        assert_eq!((sink.advice(), sink.stats().sent.gone_at_least), (vec![], 0));
    }
    let events = events.lock().unwrap();
    assert!(!events.iter().any(|event| event == DROPPED), "{events:?}");
    assert!(events.iter().any(|event| event == "verdict too late"), "{events:?}");
}

/// Decides packets that the kernel has dropped. The reply to the last one comes behind all others.
async fn gone(mut packets: Vec<Packet>) {
    let last = packets.pop().unwrap();
    packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    let error = soon("the reply", last.accept().confirm()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PacketGone, "{error}");
}

/// The other program: its table has a base chain at another hook.
pub(super) fn own_a_table() {
    let rule = Rule::new(Hook::Output).protocol(Protocol::Udp).mark(1, 1).accept();
    let _divert = Divert::builder().table("another program's").rule(rule).install().unwrap();
    say("ready");
    wait_for_the_end();
}
