//! The statistics of a queue and of the kernel.

use std::time::{Duration, Instant};

use tokio_nfqueue::{Advice, ErrorKind, Queue};

use crate::{
    common::{Traffic, account, eventually, hold, next, soon, start},
    support,
};

tests![
    one a_difference_counts_what_happened_between_two_snapshots,
    one each_verdict_is_counted,
    one held_packets_are_reported,
    one kernel_stats_reports_the_counters_of_the_kernel,
    one kernel_stats_reads_the_namespace_of_the_queue,
    one a_full_queue_gives_advice,
    one a_full_receive_buffer_gives_advice,
];

async fn each_verdict_is_counted() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let sink = queue.sink();
    let none = queue.stats();
    assert_fields!(none, received.packets: 0, sent.sends: 0, held.fill: tokio_nfqueue::stats::Fill::default(), held.in_flight: 0);
    for (index, packet) in hold(&mut queue, &traffic, 0..16).await.into_iter().enumerate() {
        match index {
            0..=4 => packet.accept().submit().unwrap(),
            5 => packet.stop().submit().unwrap(),
            6..=8 => packet.drop().submit().unwrap(),
            9 | 10 => packet.requeue(9).submit().unwrap(),
            11 => packet.requeue_bypass(9).submit().unwrap(),
            12 => packet.repeat().submit().unwrap(),
            _ => drop(packet),
        }
    }
    // The repeated one comes again.
    next(&mut queue).await.accept().submit().unwrap();
    soon("the flush", sink.flush()).await;
    let stats = sink.stats();
    assert_fields!(stats, decided.accepted: 6 + 1, decided.dropped: 3 + 3, decided.requeued: 3, decided.repeated: 1);
    assert_fields!(stats, decided.unanswered: 3, decided.expired: 0, decided.late: 0, held.in_flight: 0);
    assert!(
        stats.sent.messages >= stats.sent.sends && stats.sent.sends >= stats.sent.flushes && stats.sent.flushes > 0,
        "{stats:?}"
    );
    assert!(stats.sent.largest_flush >= 1 && stats.sent.largest_flush <= stats.sent.messages);
    // Each message had at least the 32 bytes of the packet.
    assert!(stats.received.packets == 17 && stats.received.bytes >= 17 * 32, "{stats:?}");
    assert_fields!(stats, limits.max_len: 1024, held.most_in_flight: 16);
}

async fn held_packets_are_reported() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let before = Instant::now();
    assert_eq!((queue.stats().held.bytes, queue.stats().held.oldest_undecided), (0, None));
    let mut held = hold(&mut queue, &traffic, 0..10).await;
    let ten = queue.stats();
    // They share a buffer, which is counted as a whole.
    assert_eq!(ten.held.bytes, 8 * 1024);
    assert_eq!(ten.held.in_flight, 10);
    eventually("they grow old", || queue.stats().held.oldest_undecided > Some(Duration::from_millis(5))).await;
    let age = queue.stats().held.oldest_undecided.unwrap();
    assert!(before.elapsed() >= age, "no older than the test");
    held.append(&mut hold(&mut queue, &traffic, 10..100).await);
    let hundred = queue.stats();
    assert!(hundred.held.bytes > ten.held.bytes);
    assert!(hundred.held.fill.max >= 11);
    assert!(hundred.held.fill.min <= hundred.held.fill.mean && hundred.held.fill.mean <= hundred.held.fill.max);
    // One held packet keeps the whole buffer. A detached packet keeps none.
    let last = held.pop().unwrap();
    for packet in held {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..99).await;
    assert_eq!((queue.stats().held.bytes, queue.stats().held.in_flight), (8 * 1024, 1));
    let last = last.detach();
    assert_eq!((queue.stats().held.bytes, queue.stats().held.in_flight), (0, 1));
    last.accept().submit().unwrap();
    traffic.expect([99]).await;
    assert_eq!((queue.stats().held.bytes, queue.stats().held.oldest_undecided), (0, None));
}

async fn kernel_stats_reports_the_counters_of_the_kernel() {
    let (mut queue, _divert) = start(Queue::builder(5).copy_range(77).max_len(10));
    let traffic = Traffic::new(100);
    traffic.send(0..15);
    eventually("the queue is full", || account(5).unwrap().queue_full == 5).await;
    let kernel = queue.sink().kernel_stats().unwrap();
    let line = support::queue_line(5).unwrap();
    assert_eq!(u64::from(kernel.port_id), line[1]);
    assert_fields!(kernel, queued: 10, copy_range: 77, last_id: 10);
    assert_fields!(kernel, dropped_queue: 5, dropped_socket: 0);
    for _ in 0..10 {
        let packet = next(&mut queue).await;
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..10).await;
    let sink = queue.sink();
    assert_eq!(sink.kernel_stats().unwrap().queued, 0);
    soon("the shutdown", queue.close()).await.unwrap();
    assert_eq!(sink.kernel_stats().unwrap_err().kind(), ErrorKind::Closed);
}

async fn kernel_stats_reads_the_namespace_of_the_queue() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let packets = hold(&mut queue, &traffic, 0..3).await;
    let sink = queue.sink();
    let elsewhere = support::Namespace::new();
    let kernel = elsewhere.run(|| {
        assert_eq!(account(0), None);
        sink.kernel_stats().unwrap()
    });
    assert_fields!(kernel, queued: 3, last_id: 3);
    drop(packets);
}

async fn a_full_queue_gives_advice() {
    let (queue, _divert) = start(Queue::builder(0).max_len(10));
    let traffic = Traffic::new(100);
    assert_eq!(queue.sink().advice(), []);
    traffic.send(0..10);
    eventually("all is queued", || account(0).unwrap().waiting == 10).await;
    assert_eq!(queue.sink().advice(), []);
    traffic.send(10..15);
    eventually("the queue is full", || account(0).unwrap().queue_full == 5).await;
    assert_eq!(queue.sink().advice(), [Advice::RaiseMaxLen { dropped: 5, now: 10, to: 20 }]);
}

async fn a_full_receive_buffer_gives_advice() {
    let (mut queue, _divert) = start(Queue::builder(0).receive_buffer(40_000).max_len(5000));
    let traffic = Traffic::new(1);
    for number in 0..200_u32 {
        traffic.sender.send_to(&number.to_be_bytes(), traffic.to(0)).unwrap();
    }
    eventually("all is dealt with", || account(0).unwrap().last_id == 200).await;
    let lost = account(0).unwrap().socket_full;
    for _ in 0..200 - lost {
        drop(next(&mut queue).await);
    }
    // The next packet shows the gap.
    drop(hold(&mut queue, &traffic, [0]).await);
    match queue.sink().advice()[..] {
        [Advice::RaiseReceiveBuffer { lost: advised, now, to, .. }] => {
            assert_eq!((advised, now), (lost, queue.stats().limits.receive_buffer));
            assert!(to > now);
        }
        ref other => panic!("{other:?}"),
    }
}

async fn a_difference_counts_what_happened_between_two_snapshots() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(20);
    for packet in hold(&mut queue, &traffic, 0..5).await {
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    let before = queue.stats();
    let held = hold(&mut queue, &traffic, 5..12).await;
    let since = queue.stats() - before;
    assert_fields!(since, received.packets: 7, decided.accepted: 0, held.in_flight: 7, limits.max_len: 1024);
    let named: std::collections::BTreeMap<_, _> = since.iter().map(|number| (number.name, number.value)).collect();
    assert_eq!((named["received.packets"], named["held.in_flight"]), (7, 7));
    assert!(named.contains_key("held.oldest_undecided_us"));
    drop(held);
}
