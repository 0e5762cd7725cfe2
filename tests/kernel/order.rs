//! Many packets at once, decided in any order and with any mixture of verdicts.

use std::time::Duration;

use tokio_nfqueue::{FlushPolicy, Packet, Queue, Verdict};

use crate::common::{self, Divert, Random, Traffic, hold, next, number, start, udp_in};

tests![
    both each_packet_is_decided_once_in_order,
    both each_packet_is_decided_once_in_reverse_order,
    both each_packet_is_decided_once_in_random_order,
    both each_packet_is_decided_once_in_random_order_and_several_flushes,
    both one_flush_sends_every_kind_of_verdict,
    one one_flush_releases_packets_in_the_order_of_their_ids,
    both in_submission_order_packets_are_released_in_the_order_of_their_verdicts,
    one immediate_releases_packets_in_the_order_of_their_verdicts,
    one a_flush_after_each_verdict_keeps_the_order_of_the_verdicts,
    one no_batch_decides_a_held_packet,
];

const MANY: u32 = 1000;

async fn each_packet_is_decided_once_in_order() {
    thousand(|_| {}, usize::MAX).await;
}

async fn each_packet_is_decided_once_in_reverse_order() {
    thousand(<[Packet]>::reverse, usize::MAX).await;
}

async fn each_packet_is_decided_once_in_random_order() {
    thousand(|packets| Random::new(1).shuffle(packets), usize::MAX).await;
}

async fn each_packet_is_decided_once_in_random_order_and_several_flushes() {
    thousand(|packets| Random::new(2).shuffle(packets), 13).await;
}

/// Decides a thousand held packets in the given order, and flushes after every `portion`.
async fn thousand(order: impl FnOnce(&mut [Packet]), portion: usize) {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(MANY);
    let mut packets = hold(&mut queue, &traffic, 0..MANY).await;
    assert_eq!(queue.stats().held.in_flight, MANY as usize);
    assert_eq!(common::account(0).unwrap().waiting, u64::from(MANY));
    order(&mut packets);
    for (index, packet) in packets.into_iter().enumerate() {
        accept_the_even(packet).submit().unwrap();
        if (index + 1) % portion == 0 {
            queue.sink().flush().await;
        }
    }
    queue.sink().flush().await;
    traffic.expect((0..MANY).step_by(2)).await;

    let stats = queue.stats();
    assert_fields!(stats, decided.accepted: 500, decided.dropped: 500, held.in_flight: 0);
    // Each packet was decided once.
    assert_fields!(stats, sent.gone_at_least: 0, sent.refused: 0, decided.late: 0);
    assert_eq!(stats.held.most_in_flight, MANY as usize);
    assert_eq!(common::account(0).unwrap().waiting, 0);
}

fn accept_the_even(packet: Packet) -> Verdict {
    if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() }
}

async fn one_flush_sends_every_kind_of_verdict() {
    let (mut queue, _divert) =
        start(Queue::builder(0).flush_policy(FlushPolicy::fixed(100_000, Duration::from_secs(1))));
    let _later = Divert::builder().priority(10).rule(udp_in().mark(9, u32::MAX).drop()).install().unwrap();
    let mut other = Queue::builder(1).bind().await.unwrap();
    let traffic = Traffic::new(MANY);
    let mut packets = hold(&mut queue, &traffic, 0..MANY).await;
    // Runs of several lengths in the order of the ids, which the ledger sends as batches.
    let kind = |number: u32| (number / 3) % 7;
    let replaces = common::replaces_payloads();
    Random::new(3).shuffle(&mut packets);
    for packet in packets {
        let verdict = match kind(number(&packet)) {
            0 | 1 => packet.accept(),
            2 => packet.drop(),
            3 => packet.accept().mark(9),
            4 => packet.requeue(1),
            5 if replaces => {
                // Unchanged. At the input hook its checksums are complete, or are not checked.
                let payload = whole(&packet);
                packet.accept().payload(payload)
            }
            5 => packet.accept(),
            _ => packet.accept().mark(8).priority(3),
        };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    let requeued: Vec<u32> = (0..MANY).filter(|number| kind(*number) == 4).collect();
    let mut come = Vec::new();
    for _ in &requeued {
        let packet = next(&mut other).await;
        come.push(number(&packet));
        packet.drop().submit().unwrap();
    }
    traffic.expect((0..MANY).filter(|number| !matches!(kind(*number), 2..=4))).await;

    let stats = queue.stats();
    // Not if a second passed between the first submit and the flush, so that the policy has sent
    // some verdicts.
    if stats.sent.flushes == 1 {
        assert_eq!(come, requeued);
        assert!(stats.sent.sends <= 10, "packed: {stats:?}");
        assert!(stats.sent.messages < u64::from(MANY), "batched: {stats:?}");
    }
    come.sort_unstable();
    assert_eq!(come, requeued);
    assert_fields!(stats, sent.gone_at_least: 0, sent.refused: 0, held.in_flight: 0);
}

/// The packet itself, with a UDP checksum of zero, which means none in IPv4.
fn whole(packet: &Packet) -> Vec<u8> {
    let mut payload = packet.payload().to_vec();
    payload[26..28].fill(0);
    payload
}

async fn one_flush_releases_packets_in_the_order_of_their_ids() {
    let (mut queue, _divert) =
        start(Queue::builder(0).flush_policy(FlushPolicy::fixed(100_000, Duration::from_secs(1))));
    let traffic = Traffic::new(100);
    let packets = hold(&mut queue, &traffic, 0..100).await;
    for packet in packets.into_iter().rev() {
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    let delivered = traffic.delivered();
    // Not checked if a second passed between the first submit and the flush, so that the policy has
    // sent some verdicts.
    if queue.stats().sent.flushes == 1 {
        assert_eq!(delivered, Vec::from_iter(0..100));
    }
    assert_eq!(delivered.len(), 100);
}

async fn in_submission_order_packets_are_released_in_the_order_of_their_verdicts() {
    let (mut queue, _divert) = start(Queue::builder(0).in_submission_order());
    let traffic = Traffic::new(200);
    let mut packets = hold(&mut queue, &traffic, 0..200).await;
    Random::new(4).shuffle(&mut packets);
    let order: Vec<u32> = packets.iter().map(number).collect();
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    assert_eq!(traffic.delivered(), order);
    let stats = queue.stats();
    assert!(stats.sent.sends < 100, "packed: {stats:?}");
    // In the order of the ids they share messages.
    let before = queue.stats();
    for packet in hold(&mut queue, &traffic, 0..100).await {
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    assert_eq!(traffic.delivered(), Vec::from_iter(0..100));
    let since = queue.stats() - before;
    assert!(since.sent.messages < 100, "batched: {since:?}");
}

async fn immediate_releases_packets_in_the_order_of_their_verdicts() {
    reversed(FlushPolicy::immediate(), false).await;
}

async fn a_flush_after_each_verdict_keeps_the_order_of_the_verdicts() {
    reversed(FlushPolicy::default(), true).await;
}

async fn reversed(policy: FlushPolicy, flush: bool) {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(policy));
    let traffic = Traffic::new(100);
    for packet in hold(&mut queue, &traffic, 0..100).await.into_iter().rev() {
        packet.accept().submit().unwrap();
        if flush {
            queue.sink().flush().await;
        }
    }
    queue.sink().flush().await;
    assert_eq!(traffic.delivered(), Vec::from_iter((0..100).rev()));
}

async fn no_batch_decides_a_held_packet() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    let mut held = hold(&mut queue, &traffic, [70_000]).await;
    for round in 0..200 {
        let numbers = round * 100..(round + 1) * 100;
        for packet in hold(&mut queue, &traffic, numbers.clone()).await {
            accept_the_even(packet).submit().unwrap();
        }
        queue.sink().flush().await;
        traffic.expect(numbers.step_by(2)).await;
    }
    assert_eq!(common::account(0).unwrap().waiting, 1, "no batch took it along");
    held.remove(0).accept().submit().unwrap();
    traffic.expect([70_000]).await;
}
