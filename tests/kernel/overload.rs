//! More packets than the queue or the receive buffer can hold: counted exactly, and never an error.

use std::{net::Ipv4Addr, sync::mpsc::TryRecvError};

use tokio_nfqueue::{Action, Packet, Queue, QueueBuilder};

use crate::{
    common::{self, Account, Traffic, account, eventually, freed, hold, next, number, soon, start},
    support,
};

tests![
    both packets_lost_to_a_full_receive_buffer_are_counted,
    both a_full_receive_buffer_accepts_packets_with_fail_open,
    one losses_between_reads_are_counted_exactly,
    both a_full_queue_drops_packets,
    both a_full_queue_accepts_packets_with_fail_open,
    both losses_of_a_flood_are_counted_exactly,
    both a_flood_with_fail_open_drops_nothing,
    one confirm_works_with_a_full_receive_buffer,
    both close_works_with_a_full_receive_buffer,
    one short_copies_need_less_receive_buffer,
];

/// Space for about fifty small packets.
const SMALL: usize = 40_000;

fn small() -> QueueBuilder {
    Queue::builder(0).receive_buffer(SMALL).max_len(5000)
}

/// Sends more packets than fit, and waits until the kernel has processed all, which takes `ids`
/// ids.
async fn flood(traffic: &Traffic, numbers: impl Iterator<Item = u32>, ids: u64) -> Account {
    traffic.send(numbers);
    eventually("the kernel has seen all packets", || account(0).unwrap().last_id == ids).await;
    account(0).unwrap()
}

/// Takes all packets that the kernel has queued, besides those that are held already.
async fn take_all(queue: &mut Queue, held: &mut Vec<Packet>) {
    while (held.len() as u64) < account(0).unwrap().waiting {
        held.push(next(queue).await);
    }
}

async fn accept_all(queue: &Queue, held: Vec<Packet>) -> Vec<u32> {
    let numbers = held.iter().map(number).collect();
    for packet in held {
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    numbers
}

async fn packets_lost_to_a_full_receive_buffer_are_counted() {
    let (mut queue, _divert) = start(small());
    let traffic = Traffic::new(1000);
    let after = flood(&traffic, 0..1000, 1000).await;
    assert!(after.socket_full > 0, "an overload: {after:?}");
    assert_eq!(after.waiting + after.socket_full, 1000);

    let mut held = Vec::new();
    take_all(&mut queue, &mut held).await;
    assert_eq!(held.len() as u64, 1000 - after.socket_full);
    let seen = accept_all(&queue, held).await;
    traffic.expect(seen).await;

    // The last loss is found when the next packet is received.
    for packet in hold(&mut queue, &traffic, 1000..1010).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(1000..1010).await;
    let stats = queue.stats();
    assert_fields!(stats, lost.packets: after.socket_full, received.packets: 1010 - after.socket_full);
    assert!(stats.lost.gaps >= 1 && stats.lost.overrun_episodes >= 1, "{stats:?}");
    assert_eq!(account(0).unwrap().socket_full, after.socket_full, "nothing was lost afterwards");
}

async fn a_full_receive_buffer_accepts_packets_with_fail_open() {
    let (mut queue, _divert) = start(small().fail_open(true));
    let traffic = Traffic::new(1000);
    let after = flood(&traffic, 0..1000, 1000).await;
    assert!(after.waiting < 1000, "an overload: {after:?}");
    let mut held = Vec::new();
    take_all(&mut queue, &mut held).await;
    let seen: Vec<u32> = held.iter().map(number).collect();
    traffic.expect((0..1000).filter(|number| !seen.contains(number))).await;
    accept_all(&queue, held).await;
    traffic.expect(seen).await;

    for packet in hold(&mut queue, &traffic, 1000..1010).await {
        packet.drop().submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect_nothing();
    assert_eq!(queue.stats().lost.packets, 1000 - after.waiting, "what passed unseen");
}

async fn losses_between_reads_are_counted_exactly() {
    let (mut queue, _divert) = start(small());
    let traffic = Traffic::new(2000);
    let mut held = Vec::new();
    for round in 0..10 {
        let numbers = round * 200..(round + 1) * 200;
        flood(&traffic, numbers, (u64::from(round) + 1) * 200).await;
        // Only some, so that the next round finds little space.
        for _ in 0..10 {
            held.push(next(&mut queue).await);
        }
    }
    take_all(&mut queue, &mut held).await;
    held.append(&mut hold(&mut queue, &traffic, [2000]).await);
    assert!(held.is_sorted_by_key(|packet| packet.id().get()));
    let stats = queue.stats();
    assert_eq!(stats.lost.packets, account(0).unwrap().socket_full);
    assert_eq!((stats.received.packets + stats.lost.packets, stats.received.packets), (2001, held.len() as u64));
    assert!(stats.lost.gaps > 1, "{stats:?}");
    assert_eq!(queue.stats().held.in_flight, held.len());
    let seen = accept_all(&queue, held).await;
    traffic.expect(seen).await;
    assert_eq!((queue.stats().sent.gone_at_least, account(0).unwrap().waiting), (0, 0), "gaps owe nothing");
}

async fn a_full_queue_drops_packets() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(50));
    let traffic = Traffic::new(300);
    let after = flood(&traffic, 0..300, 50).await;
    eventually("the kernel has seen all packets", || account(0).unwrap().queue_full == 250).await;
    assert_eq!(after.waiting, 50);
    let mut held = Vec::new();
    take_all(&mut queue, &mut held).await;
    let seen = accept_all(&queue, held).await;
    assert!(seen.iter().copied().eq(0..50));
    traffic.expect(0..50).await;

    for packet in hold(&mut queue, &traffic, 300..340).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(300..340).await;
    assert_eq!((queue.stats().lost.packets, queue.stats().lost.overrun_episodes), (0, 0), "they took no id");
}

async fn a_full_queue_accepts_packets_with_fail_open() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(50).fail_open(true));
    let traffic = Traffic::new(300);
    traffic.send(0..300);
    traffic.expect(50..300).await;
    let mut held = Vec::new();
    take_all(&mut queue, &mut held).await;
    assert_eq!(held.len(), 50);
    accept_all(&queue, held).await;
    traffic.expect(0..50).await;

    for packet in hold(&mut queue, &traffic, 300..340).await {
        packet.drop().submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect_nothing();
    let after = account(0).unwrap();
    assert_eq!((after.queue_full, after.socket_full, queue.stats().lost.packets), (0, 0, 0));
}

const FLOOD: u32 = 20_000;

/// A thread that sends as fast as it can, without regard to the receiver's buffer.
fn flooder() -> std::sync::mpsc::Receiver<()> {
    let (done, end) = std::sync::mpsc::channel();
    let sender = support::udp((Ipv4Addr::LOCALHOST, 0));
    std::thread::spawn(move || {
        for number in 0..FLOOD {
            sender.send_to(&number.to_be_bytes(), (Ipv4Addr::LOCALHOST, common::PORT)).unwrap();
        }
        drop(done);
    });
    end
}

/// Receives during a flood, and drops all packets; returns their number.
async fn survive(queue: &mut Queue, end: std::sync::mpsc::Receiver<()>) -> u64 {
    let mut seen = 0;
    loop {
        let over = end.try_recv() == Err(TryRecvError::Disconnected);
        if over && account(0).unwrap().waiting == 0 {
            return seen;
        }
        // The loop also ends without a packet: the last ones may have been lost.
        let packet = tokio::time::timeout(std::time::Duration::from_millis(1), queue.recv()).await;
        if let Ok(packet) = packet {
            let packet = packet.expect("the stream goes on").expect("no error");
            packet.drop().submit().unwrap();
            seen += 1;
        }
    }
}

async fn losses_of_a_flood_are_counted_exactly() {
    let (mut queue, _divert) = start(Queue::builder(0).receive_buffer(SMALL).max_len(60));
    let traffic = Traffic::new(1);
    let seen = survive(&mut queue, flooder()).await;
    for packet in hold(&mut queue, &traffic, [7]).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect([7]).await;

    let (stats, after) = (queue.stats(), account(0).unwrap());
    assert_eq!(stats.received.packets, seen + 1);
    assert_eq!(stats.lost.packets, after.socket_full);
    assert_eq!(stats.received.packets + after.socket_full + after.queue_full, u64::from(FLOOD) + 1);
    assert_fields!(stats, held.in_flight: 0, sent.gone_at_least: 0, sent.refused: 0, received.malformed: 0);
}

async fn a_flood_with_fail_open_drops_nothing() {
    let (mut queue, _divert) = start(Queue::builder(0).receive_buffer(SMALL).max_len(60).fail_open(true));
    let traffic = Traffic::new(1);
    let seen = survive(&mut queue, flooder()).await;
    let passed = traffic.delivered().len() as u64;
    let packet = hold(&mut queue, &traffic, [7]).await.remove(0);
    packet.accept().submit().unwrap();
    traffic.expect([7]).await;
    // Packets accepted during the flood may overflow the receiver's own buffer, so fewer may
    // arrive.
    let stats = queue.stats();
    assert!(seen + passed <= FLOOD.into(), "{seen} seen, {passed} passed: none twice");
    assert!(stats.lost.packets <= u64::from(FLOOD) - seen);
    assert_eq!(stats.received.packets, seen + 1);
    let after = account(0).unwrap();
    // The kernel has dropped none.
    assert_fields!(after, socket_full: 0, queue_full: 0);
}

async fn confirm_works_with_a_full_receive_buffer() {
    let (mut queue, _divert) = start(small());
    let traffic = Traffic::new(1000);
    let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
    let after = flood(&traffic, 1..1000, 1000).await;
    assert!(after.socket_full > 0, "an overload: {after:?}");
    soon("the reply", packet.accept().confirm()).await.unwrap();
    traffic.expect([0]).await;
    // Packets that `confirm` has received are returned by the stream.
    let mut held = Vec::new();
    take_all(&mut queue, &mut held).await;
    assert_eq!(held.len() as u64, 999 - after.socket_full);
    let seen = accept_all(&queue, held).await;
    traffic.expect(seen).await;
}

async fn close_works_with_a_full_receive_buffer() {
    let (queue, divert) = start(small().on_unanswered(Action::Accept));
    let traffic = Traffic::new(1000);
    let after = flood(&traffic, 0..1000, 1000).await;
    assert!(after.socket_full > 0, "an overload: {after:?}");
    let sink = queue.sink();
    soon("the shutdown", queue.close()).await.unwrap();
    traffic.expect(0..after.waiting as u32).await;
    assert_eq!(sink.stats().decided.unanswered, after.waiting);
    assert_eq!(account(0), None);
    drop(divert);
}

async fn short_copies_need_less_receive_buffer() {
    // By default, the receive buffer holds `max_len` packets.
    for builder in [Queue::builder(0).copy_range(40), Queue::builder(0).copy_metadata()] {
        let (mut queue, divert) = start(builder.max_len(150).gso(false));
        let traffic = Traffic::new(1);
        let long = [0; 1400];
        for _ in 0..200 {
            traffic.sender.send_to(&long, traffic.to(0)).unwrap();
        }
        eventually("the kernel has seen all packets", || account(0).unwrap().queue_full == 50).await;
        for _ in 0..150 {
            assert!(next(&mut queue).await.payload().len() <= 40);
        }
        assert_eq!((queue.stats().lost.packets, account(0).unwrap().socket_full), (0, 0));
        support::drop_now(divert);
        drop(queue);
        // The timer thread may have it.
        freed(0).await;
    }
}
