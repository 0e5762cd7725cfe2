//! What each kind of verdict does to a packet.

use futures::SinkExt;
use tokio_nfqueue::{Action, Changes, Family, Hook, Queue, Vlan};

use crate::{
    common::{self, Divert, Rule, Traffic, divert, hold, next, number, start, udp_in},
    support,
};

tests![
    both accepted_packets_arrive_and_dropped_packets_do_not,
    both a_mark_is_seen_by_a_later_chain,
    one a_mark_is_kept_unless_the_verdict_sets_one,
    one mark_and_priority_are_seen_at_a_later_hook,
    both repeat_with_a_mark_is_not_queued_again,
    one repeat_without_a_mark_is_queued_again,
    one stop_skips_the_later_chains,
    both requeue_sends_the_packet_to_another_queue,
    one requeue_to_an_unbound_queue_drops_or_with_bypass_accepts,
    one a_verdict_returns_all_that_it_changes,
    one a_detached_packet_can_be_decided_like_a_packet,
    one a_verdict_reaches_its_own_queue_through_any_sink,
    one ipv6_packets_are_decided,
];

async fn accepted_packets_arrive_and_dropped_packets_do_not() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for packet in hold(&mut queue, &traffic, 0..100).await {
        let verdict = if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect((0..100).step_by(2)).await;

    let stats = queue.stats();
    assert_fields!(stats, received.packets: 100, decided.accepted: 50, decided.dropped: 50, held.in_flight: 0);
    assert_fields!(stats, lost.packets: 0, decided.unanswered: 0, sent.gone_at_least: 0, sent.refused: 0, decided.late: 0);
    assert_eq!(common::account(0).unwrap().waiting, 0);
}

/// So a function `fn decide(packet: Packet) -> Verdict` can be tested by what it returns.
async fn a_verdict_returns_all_that_it_changes() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(2);
    let mut packets = hold(&mut queue, &traffic, 0..2).await;
    let plain = packets.remove(0).drop();
    assert_eq!((plain.action(), plain.id().get(), plain.queue_number()), (Action::Drop, 1, 0));
    assert_eq!(plain.changes(), Changes::default());
    let vlan = Vlan { protocol: 0x8100, control: 7 };
    let verdict = packets.remove(0).accept().mark(5).priority(6).payload(vec![7; 30]).vlan(vlan);
    let verdict = verdict.layer2_header(vec![8; 14]);
    let changes = verdict.changes();
    assert_fields!(changes, mark: Some(5), priority: Some(6), vlan: Some(vlan));
    assert_eq!(changes.payload.map(|payload| &payload[..]), Some(&[7; 30][..]));
    assert_eq!(changes.layer2_header.map(|header| &header[..]), Some(&[8; 14][..]));
    let expectation = tokio_nfqueue::conntrack::Expectation::tcp(([192, 0, 2, 7], 40_000).into());
    let verdict = verdict.connection_mark(1, 2).connection_labels([3; 16], [4; 16]);
    let timeout = std::time::Duration::from_secs(9);
    let verdict = verdict.connection_timeout(timeout).expectation(expectation.clone());
    let changes = verdict.changes();
    assert_fields!(changes, mark: Some(5), connection_mark: Some((1, 2)));
    assert_fields!(changes, connection_labels: Some(([3; 16], [4; 16])), connection_timeout: Some(timeout));
    assert_eq!(changes.expectation, Some(&expectation));
    // None of these was submitted.
    drop((plain, verdict));
    assert_fields!(queue.stats(), decided.accepted: 0, decided.unanswered: 2);
}

async fn a_mark_is_seen_by_a_later_chain() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let _later = Divert::builder().priority(10).rule(udp_in().mark(0x8000_0017, u32::MAX).drop()).install().unwrap();
    let traffic = Traffic::new(100);
    for packet in hold(&mut queue, &traffic, 0..100).await {
        let verdict = match number(&packet) % 3 {
            0 => packet.accept().mark(0x8000_0017),
            1 => packet.accept().mark(0x17),
            _ => packet.accept(),
        };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect((0..100).filter(|number| number % 3 != 0)).await;
}

async fn a_mark_is_kept_unless_the_verdict_sets_one() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let _later = Divert::builder().priority(10).rule(udp_in().mark(5, u32::MAX).drop()).install().unwrap();
    let traffic = Traffic::new(100);
    support::set_mark(&traffic.sender, 5);
    for packet in hold(&mut queue, &traffic, 0..100).await {
        assert_eq!(packet.mark(), 5);
        let verdict = if number(&packet) < 50 { packet.accept() } else { packet.accept().mark(0) };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(50..100).await;
}

async fn mark_and_priority_are_seen_at_a_later_hook() {
    let mut first = Queue::builder(0).bind().await.unwrap();
    let mut second = Queue::builder(1).bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Output).to_queue(0), Rule::new(Hook::Postrouting).to_queue(1)]);
    let traffic = Traffic::new(1);
    traffic.send([7]);
    let packet = next(&mut first).await;
    assert_eq!((packet.hook(), packet.mark(), packet.priority()), (Hook::Output, 0, 0));
    packet.accept().mark(0x1234).priority(6).submit().unwrap();
    let packet = next(&mut second).await;
    assert_eq!((packet.hook(), packet.mark(), packet.priority()), (Hook::Postrouting, 0x1234, 6));
    packet.accept().submit().unwrap();
    traffic.expect([7]).await;
}

async fn repeat_with_a_mark_is_not_queued_again() {
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([udp_in().unless_mark(1, 1).to_queue(0)]);
    let traffic = Traffic::new(50);
    for packet in hold(&mut queue, &traffic, 0..50).await {
        packet.repeat().mark(1).submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(0..50).await;
    assert_eq!(queue.stats().decided.repeated, 50);
    assert_eq!(common::account(0).unwrap().last_id, 50, "none was queued again");
}

async fn repeat_without_a_mark_is_queued_again() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(50);
    let first = hold(&mut queue, &traffic, 0..50).await;
    let ids: Vec<_> = first.iter().map(|packet| packet.id().get()).collect();
    for packet in first {
        packet.repeat().submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect_nothing();
    for expected in 0..50 {
        let packet = next(&mut queue).await;
        assert!(!ids.contains(&packet.id().get()), "a new id");
        assert_eq!(number(&packet), expected);
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(0..50).await;
    assert_eq!(common::account(0).unwrap().last_id, 100);
}

async fn stop_skips_the_later_chains() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let _later = Divert::builder().priority(10).rule(udp_in().drop()).install().unwrap();
    let traffic = Traffic::new(60);
    for packet in hold(&mut queue, &traffic, 0..60).await {
        let verdict = if number(&packet) < 30 { packet.stop() } else { packet.accept() };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(0..30).await;
    assert_eq!(queue.stats().decided.accepted, 60);
}

async fn requeue_sends_the_packet_to_another_queue() {
    // The high byte of the number has bits that a wrong encoding would take for flags.
    const OTHER: u16 = 0x8305;
    let (mut queue, _divert) = start(Queue::builder(0));
    let mut other = Queue::builder(OTHER).bind().await.unwrap();
    let traffic = Traffic::new(60);
    for packet in hold(&mut queue, &traffic, 0..60).await {
        packet.requeue(OTHER).mark(9).submit().unwrap();
    }
    queue.sink().flush().await;
    for expected in 0..60 {
        let packet = next(&mut other).await;
        assert_eq!((number(&packet), packet.mark(), packet.hook()), (expected, 9, Hook::Input));
        let verdict = if expected < 30 { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
    }
    other.sink().flush().await;
    traffic.expect(0..30).await;
    assert_eq!((queue.stats().decided.requeued, other.stats().received.packets), (60, 60));
}

async fn requeue_to_an_unbound_queue_drops_or_with_bypass_accepts() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(60);
    for packet in hold(&mut queue, &traffic, 0..60).await {
        let verdict = if number(&packet) < 30 { packet.requeue(77) } else { packet.requeue_bypass(77) };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(30..60).await;
    assert_eq!(queue.stats().decided.requeued, 60);
}

async fn a_detached_packet_can_be_decided_like_a_packet() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let mut other = Queue::builder(1).bind().await.unwrap();
    let _later = Divert::builder().priority(10).rule(udp_in().mark(9, u32::MAX).drop()).install().unwrap();
    let traffic = Traffic::new(8);
    for (index, packet) in hold(&mut queue, &traffic, 0..8).await.into_iter().enumerate() {
        let id = packet.id();
        let detached = packet.detach();
        assert_eq!(detached.id(), id);
        let verdict = match index {
            0 => detached.accept(),
            1 => detached.drop(),
            2 => detached.stop().mark(9),
            3 => detached.requeue(1),
            4 => detached.requeue(77),
            5 => detached.requeue_bypass(77),
            6 => detached.decide(Action::Accept),
            _ => detached.repeat(),
        };
        assert_eq!(verdict.id(), id);
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect([0, 2, 5, 6]).await;
    let packet = next(&mut other).await;
    assert_eq!(number(&packet), 3);
    let packet = next(&mut queue).await;
    assert_eq!((number(&packet), packet.id().get()), (7, 9));
}

async fn a_verdict_reaches_its_own_queue_through_any_sink() {
    let mut queues = [0, 1].map(|number| common::bind_now(Queue::builder(number)));
    let _divert = divert([
        udp_in().destination_port(common::PORT).to_queue(0),
        udp_in().destination_port(common::PORT + 1).to_queue(1),
    ]);
    let traffic = Traffic::new(2 * common::ROOM);
    let sinks = [queues[1].sink(), queues[0].sink()];
    for (queue, mut sink) in queues.iter_mut().zip(sinks) {
        let base = u32::from(queue.queue_number()) * common::ROOM;
        let mut packets = hold(queue, &traffic, base..base + 2).await.into_iter();
        SinkExt::feed(&mut sink, packets.next().unwrap().accept()).await.unwrap();
        common::soon("the reply", packets.next().unwrap().accept().confirm()).await.unwrap();
    }
    traffic.expect([0, 1, common::ROOM, common::ROOM + 1]).await;
    assert_eq!(queues.map(|queue| (queue.stats().decided.accepted, queue.stats().decided.late)), [(2, 0); 2]);
}

async fn ipv6_packets_are_decided() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let receiver = tokio::net::UdpSocket::bind("[::1]:9000").await.unwrap();
    let sender = tokio::net::UdpSocket::bind("[::1]:0").await.unwrap();
    for number in 0..3_u32 {
        sender.send_to(&number.to_be_bytes(), "[::1]:9000").await.unwrap();
    }
    for expected in 0..3 {
        let packet = next(&mut queue).await;
        assert_eq!((number(&packet), packet.family()), (expected, Family::Ipv6));
        let verdict = if expected == 1 { packet.drop() } else { packet.accept() };
        common::soon("the reply", verdict.confirm()).await.unwrap();
    }
    let mut datagram = [0; 4];
    for expected in [0_u32, 2] {
        common::soon("a datagram", receiver.recv(&mut datagram)).await.unwrap();
        assert_eq!(u32::from_be_bytes(datagram), expected);
    }
}
