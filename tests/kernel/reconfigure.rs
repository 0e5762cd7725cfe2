//! Changes to settings while the queue runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use futures::FutureExt;
use tokio_nfqueue::{Error, ErrorKind, FlushPolicy, Queue, Reconfigure};

use crate::common::{
    Load, PATIENCE, Traffic, account, eventually, give_up_capabilities, hold, many, next, number, soon, start,
};

tests![
    one the_copy_range_changes,
    one max_len_changes,
    one the_receive_buffer_does_not_shrink,
    one packets_beyond_a_shorter_max_len_stay_queued,
    one flags_change_independently,
    one an_empty_change_is_no_error,
    one values_beyond_the_limits_are_limited_as_by_the_kernel,
    one an_unsupported_setting_is_named_and_changes_nothing,
    one a_closed_queue_cannot_be_changed,
    one reconfigure_needs_the_capability,
    both a_change_under_load_loses_no_packet,
    multi a_change_during_close_delays_no_verdict,
    one a_receive_buffer_of_default_size_grows,
    one the_receive_buffer_changes,
];

async fn change(queue: &Queue, change: Reconfigure) -> Result<(), Error> {
    soon("the reply", queue.sink().reconfigure(&change)).await
}

/// The copied length of a packet of 128 bytes.
async fn copied(queue: &mut Queue, traffic: &Traffic) -> usize {
    traffic.sender.send_to(&[0; 100], traffic.to(0)).unwrap();
    next(queue).await.payload().len()
}

async fn the_copy_range_changes() {
    let (mut queue, _divert) = start(Queue::builder(0).copy_range(40));
    let traffic = Traffic::new(1);
    assert_eq!(copied(&mut queue, &traffic).await, 40);
    for (to, length) in [
        (Reconfigure::new().copy_range(65_531), 128),
        (Reconfigure::new().copy_metadata(), 0),
        (Reconfigure::new().copy_range(64), 64),
        (Reconfigure::new().max_len(100), 64),
    ] {
        change(&queue, to).await.unwrap();
        assert_eq!(copied(&mut queue, &traffic).await, length);
    }
    // The longest packets are received completely as well.
    change(&queue, Reconfigure::new().copy_range(65_531)).await.unwrap();
    traffic.sender.send_to(&[0; 65_000], traffic.to(0)).unwrap();
    assert_eq!(next(&mut queue).await.payload().len(), 65_028);
    assert_eq!(queue.stats().received.malformed, 0);
}

async fn max_len_changes() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(10));
    let traffic = Traffic::new(200);
    traffic.send(0..20);
    eventually("the queue is full", || account(0).unwrap().queue_full == 10).await;
    change(&queue, Reconfigure::new().max_len(50)).await.unwrap();
    assert_eq!(queue.stats().limits.max_len, 50);
    traffic.send(20..80);
    eventually("the queue is full", || account(0).unwrap().queue_full == 30).await;
    for expected in (0..10).chain(20..60) {
        let packet = next(&mut queue).await;
        assert_eq!(number(&packet), expected);
        packet.accept().submit().unwrap();
    }
    traffic.expect((0..10).chain(20..60)).await;
}

async fn the_receive_buffer_does_not_shrink() {
    let (queue, _divert) = start(Queue::builder(0));
    let before = queue.stats().limits.receive_buffer;
    // The buffer is already large enough for whole packets.
    change(&queue, Reconfigure::new().copy_range(100)).await.unwrap();
    change(&queue, Reconfigure::new().max_len(2000)).await.unwrap();
    assert_eq!(queue.stats().limits.receive_buffer, before);
}

async fn packets_beyond_a_shorter_max_len_stay_queued() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(200);
    let held = hold(&mut queue, &traffic, 0..50).await;
    change(&queue, Reconfigure::new().max_len(5)).await.unwrap();
    traffic.send(50..60);
    eventually("the queue is full", || account(0).unwrap().queue_full == 10).await;
    for packet in held {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..50).await;
    for packet in hold(&mut queue, &traffic, 60..65).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(60..65).await;
}

async fn flags_change_independently() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(1));
    let traffic = Traffic::new(100);
    let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
    change(&queue, Reconfigure::new().fail_open(true)).await.unwrap();
    traffic.send(1..10);
    traffic.expect(1..10).await;
    // A change of another flag leaves it on.
    change(&queue, Reconfigure::new().uid_gid(true)).await.unwrap();
    change(&queue, Reconfigure::new().gso(false)).await.unwrap();
    traffic.send(10..20);
    traffic.expect(10..20).await;
    change(&queue, Reconfigure::new().uid_gid(false).fail_open(false)).await.unwrap();
    traffic.send(20..30);
    eventually("packets are dropped again", || account(0).unwrap().queue_full == 10).await;
    drop(packet);
    queue.sink().flush().await;
    traffic.expect_nothing();
}

async fn an_empty_change_is_no_error() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(7).copy_range(33));
    change(&queue, Reconfigure::new()).await.unwrap();
    assert_eq!(queue.stats().limits.max_len, 7);
    assert_eq!(copied(&mut queue, &Traffic::new(1)).await, 33);
}

async fn values_beyond_the_limits_are_limited_as_by_the_kernel() {
    for (bytes, copied) in [(0, 65_531), (65_531, 65_531), (0xffff, 65_531)] {
        let queue = Queue::builder(0).max_len(0).copy_range(bytes).bind().await.unwrap();
        assert_eq!(queue.sink().kernel_stats().unwrap().copy_range, copied);
        assert_eq!(queue.stats().limits.max_len, 1);
        change(&queue, Reconfigure::new().max_len(7).copy_range(33)).await.unwrap();
        change(&queue, Reconfigure::new().max_len(0).copy_range(bytes)).await.unwrap();
        assert_eq!(queue.sink().kernel_stats().unwrap().copy_range, copied);
        assert_eq!(queue.stats().limits.max_len, 1);
        soon("the shutdown", queue.close()).await.unwrap();
    }
}

async fn an_unsupported_setting_is_named_and_changes_nothing() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(7).copy_range(33));
    let conntrack = Reconfigure::new().conntrack(true).max_len(100).copy_range(100);
    if let Err(error) = change(&queue, conntrack).await {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("conntrack"), "{error}");
        assert_eq!(queue.stats().limits.max_len, 7);
        assert_eq!(copied(&mut queue, &Traffic::new(1)).await, 33, "nothing is half applied");
    }
}

async fn a_closed_queue_cannot_be_changed() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(PATIENCE));
    let traffic = Traffic::new(1);
    let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
    let sink = queue.sink();
    let closing = tokio::spawn(queue.close());
    eventually("the shutdown has begun", || sink.is_closed()).await;
    // A longer queue would queue packets that are not read.
    let error = sink.reconfigure(&Reconfigure::new().max_len(100)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    packet.accept().submit().unwrap();
    soon("the shutdown", closing).await.unwrap().unwrap();
    let error = sink.reconfigure(&Reconfigure::new().max_len(100)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
}

/// A change holds the send lock for a short time. A thread that submits meanwhile leaves its
/// verdict to the holder.
async fn a_change_during_close_delays_no_verdict() {
    const COUNT: u32 = 2000;
    let (mut queue, _divert) = start(Queue::builder(0).max_len(COUNT).flush_policy(FlushPolicy::immediate()));
    let traffic = Traffic::new(COUNT);
    let packets = hold(&mut queue, &traffic, 0..COUNT).await;
    let sink = queue.sink();
    let closing = tokio::spawn(queue.close_within(Duration::MAX));
    eventually("the shutdown has begun", || sink.stats().limits.max_len == 0).await;
    let over = Arc::new(AtomicBool::new(false));
    let changing = std::thread::spawn({
        let (sink, over) = (sink.clone(), Arc::clone(&over));
        move || {
            while !over.load(SeqCst) {
                let refused = sink.reconfigure(&Reconfigure::new()).now_or_never().expect("no wait").unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Closed);
            }
        }
    });
    for packet in packets {
        let number = number(&packet);
        packet.accept().submit().unwrap();
        traffic.expect([number]).await;
    }
    soon("the shutdown", closing).await.unwrap().unwrap();
    over.store(true, SeqCst);
    changing.join().unwrap();
}

async fn reconfigure_needs_the_capability() {
    let (mut queue, _divert) = start(Queue::builder(0).max_len(7).copy_range(33));
    give_up_capabilities();
    let error = change(&queue, Reconfigure::new().max_len(100).copy_range(100)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
    assert_eq!(queue.stats().limits.max_len, 7);
    assert_eq!(copied(&mut queue, &Traffic::new(1)).await, 33);
}

async fn a_change_under_load_loses_no_packet() {
    const COUNT: u32 = many(5000);
    let (mut queue, _divert) = start(Queue::builder(0));
    let load = Load::start(COUNT);
    let (decide, sink) = (load.decide(), queue.sink());
    for index in 0..COUNT {
        let packet = next(&mut queue).await;
        // By id: a sender that moves to another CPU may overtake its own packets.
        assert_eq!(packet.id().get(), index + 1, "{:?}", sink.stats());
        decide(packet).submit().unwrap();
        if index % 10 == 0 {
            let change = Reconfigure::new().max_len(1000 + index).copy_range(1000 + index).gso(index % 20 == 0);
            let change = change.receive_buffer(300_000 + index as usize * 7 % 100_000);
            sink.reconfigure(&change).await.unwrap();
        }
    }
    load.finish(COUNT).await;
    let stats = queue.stats();
    assert_fields!(stats, lost.packets: 0, received.packets: u64::from(COUNT), sent.gone_at_least: 0);
    assert_eq!((account(0).unwrap().queue_full, account(0).unwrap().socket_full), (0, 0));
}

async fn a_receive_buffer_of_default_size_grows() {
    let (queue, _divert) = start(Queue::builder(0).max_len(10).copy_range(100));
    let before = queue.stats().limits.receive_buffer;
    change(&queue, Reconfigure::new().max_len(100)).await.unwrap();
    // About 80 000 bytes are within the limit of any system.
    assert!(queue.stats().limits.receive_buffer > before);

    let (queue, _divert) = start(Queue::builder(1).receive_buffer(50_000));
    let before = queue.stats().limits.receive_buffer;
    change(&queue, Reconfigure::new().max_len(10_000)).await.unwrap();
    assert_eq!(queue.stats().limits.receive_buffer, before, "what was asked for stays");
}

/// The kernel's limit without privileges, 212 992 bytes and as much again for its own data, is more
/// than any size here.
async fn the_receive_buffer_changes() {
    // About 48 small packets.
    const SMALL: usize = 40_000;
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(200);
    change(&queue, Reconfigure::new().receive_buffer(SMALL)).await.unwrap();
    assert_eq!(queue.stats().limits.receive_buffer, SMALL);
    traffic.send(0..200);
    eventually("the kernel has seen all packets", || account(0).unwrap().last_id == 200).await;
    let lost = account(0).unwrap().socket_full;
    assert!((100..200).contains(&lost), "{lost} are lost");

    // What is in the buffer stays there, whether it becomes larger or smaller.
    change(&queue, Reconfigure::new().receive_buffer(10 * SMALL)).await.unwrap();
    assert_eq!(queue.stats().limits.receive_buffer, 10 * SMALL);
    traffic.send(200..400);
    eventually("the kernel has seen all packets", || account(0).unwrap().last_id == 400).await;
    assert_eq!(account(0).unwrap().socket_full, lost, "all fit");
    change(&queue, Reconfigure::new().receive_buffer(SMALL)).await.unwrap();
    for _ in lost..400 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    assert_eq!((queue.stats().lost.packets, queue.stats().decided.accepted), (lost, 400 - lost));

    // What was asked for stays, and what is refused changes nothing.
    change(&queue, Reconfigure::new().max_len(10_000)).await.unwrap();
    let error = change(&queue, Reconfigure::new().max_len(7).receive_buffer(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let limits = queue.stats().limits;
    assert_eq!((limits.receive_buffer, limits.max_len), (SMALL, 10_000));
}
