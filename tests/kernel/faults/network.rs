//! Interfaces that go down and up, and base chains of other programs.

use tokio_nfqueue::{Divert, ErrorKind, Hook, Packet, Protocol, Queue, Rule};

use super::process::{Process, say, wait_for_the_end};
use crate::{
    common::{Traffic, account, eventually, hold, next, number, soon, start},
    support,
};

tests![
    both an_interface_that_goes_down_and_up_costs_only_what_was_queued,
    both a_base_chain_that_another_program_deletes_costs_only_what_was_queued,
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
        queue.sink().flush().await.unwrap();
        for index in 0..DECIDED {
            let mut datagram = [0; 4];
            to.recv(&mut datagram).unwrap();
            assert_eq!(u32::from_be_bytes(datagram), round * 100 + index);
        }
        support::link_down(&peer.near);
        eventually("the kernel has dropped the packets", || account(0).unwrap().waiting == 0).await;
        gone(held).await;
        support::link_up(&peer.near);
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
        queue.sink().flush().await.unwrap();
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
