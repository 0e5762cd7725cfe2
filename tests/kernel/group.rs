//! Several queues as one.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use futures::{SinkExt, StreamExt, TryStreamExt, stream::FusedStream};
use rustix::event::{PollFd, PollFlags, poll};
use tokio_nfqueue::{Action, ErrorKind, Queue, QueueBuilder, QueueGroup, Reconfigure, TryRecvError};

use crate::{
    common::{self, Load, Traffic, account, divert, eventually, next, number, soon, udp_in},
    support,
};

tests![
    both balanced_traffic_arrives_in_one_stream,
    both a_group_under_load_decides_each_packet_once,
    one no_queue_is_starved,
    one all_queues_are_bound_or_none,
    sync an_empty_range_is_refused,
    one a_group_can_be_split_into_queues_and_collected_again,
    both close_closes_all_queues,
    one refusals_of_all_queues_are_one_stream,
    both forward_ends_when_the_group_is_closed,
    one dropping_a_group_closes_all_queues,
    one a_group_continues_after_one_of_its_queues_is_closed,
    one the_stream_of_an_empty_group_has_ended,
    one a_group_has_the_methods_of_a_queue,
];

async fn refusals_of_all_queues_are_one_stream() {
    let mut group = group(|builder| builder.deadline(Duration::from_millis(500), Action::Drop));
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(40);
    let mut packets = Vec::new();
    for number in 0..40_u32 {
        let sender = support::udp((Ipv4Addr::new(127, 0, 1, number as u8), 0));
        traffic.send_from(&sender, [number]);
        packets.push(next(&mut group).await);
    }
    let sink = group.sink();
    let expired = || sink.stats().map(|(_, stats)| stats.decided.expired).sum::<u64>();
    eventually("the deadlines", || expired() == 40).await;
    let queues: BTreeSet<u16> = packets.iter().map(|packet| packet.queue_number()).collect();
    packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    let mut refusals = sink.refusals();
    for _ in 0..40 {
        let error = soon("a refusal", refusals.next()).await.unwrap();
        assert_eq!(error.kind(), ErrorKind::Expired);
    }
    assert!(queues.len() > 1);
    soon("the shutdown", group.close_within(Duration::from_secs(1))).await.unwrap();
    assert!(soon("the shutdown", refusals.next()).await.is_none());
    traffic.expect_nothing();
}

fn group(builder: impl Fn(QueueBuilder) -> QueueBuilder) -> QueueGroup {
    QueueGroup::bind(0..=3, builder).unwrap()
}

async fn balanced_traffic_arrives_in_one_stream() {
    let mut group = group(|builder| builder);
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(100);
    // The hash covers the addresses, and its seed is random, so many addresses are needed to reach
    // two queues for sure.
    for number in 0..100_u32 {
        let sender = support::udp((Ipv4Addr::new(127, 0, 1, number as u8), 0));
        traffic.send_from(&sender, [number]);
    }
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        let packet = next(&mut group).await;
        seen.insert(packet.queue_number());
        let verdict = if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() };
        group.sink().submit(verdict).unwrap();
    }
    soon("the flush", group.sink().flush()).await.unwrap();
    traffic.expect((0..100).step_by(2)).await;
    assert!(seen.len() > 1 && seen.iter().all(|queue| *queue < 4), "{seen:?}");
    let received: Vec<_> = group.sink().stats().map(|(queue, stats)| (queue, stats.received.packets)).collect();
    assert_eq!(received.iter().map(|(_, received)| received).sum::<u64>(), 100);
    assert!(received.iter().map(|(queue, _)| *queue).eq(0..4));
}

async fn a_group_under_load_decides_each_packet_once() {
    const COUNT: u32 = 5000;
    let (mut packets, sink) = group(|builder| builder).split();
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let load = Load::start(COUNT);
    let decide = load.decide();
    for _ in 0..COUNT {
        let packet = next(&mut packets).await;
        sink.submit(decide(packet)).unwrap();
    }
    load.finish(COUNT).await;
    assert!(
        sink.stats()
            .all(|(_, stats)| (stats.lost.packets, stats.sent.gone_at_least, stats.decided.unanswered) == (0, 0, 0))
    );
}

async fn no_queue_is_starved() {
    let mut group = group(|builder| builder);
    let port = |queue: u16| udp_in().destination_port(common::PORT + queue).to_queue(queue);
    let _divert = divert((0..4).map(port));
    let traffic = Traffic::new(4 * common::ROOM);
    // One queue has many packets and another few, all before any is read.
    traffic.send(0..200);
    traffic.send([600, 601, 602]);
    eventually("all is queued", || account(0).unwrap().waiting == 200 && account(3).unwrap().waiting == 3).await;
    let mut queues = Vec::new();
    for _ in 0..203 {
        queues.push(next(&mut group).await.queue_number());
    }
    let last = queues.iter().rposition(|queue| *queue == 3).unwrap();
    // The runtime may notice one queue later than the other, but not after all its packets.
    assert!(last < 202, "the short queue came last: {queues:?}");
}

async fn all_queues_are_bound_or_none() {
    let taken = support::RawQueue::bind(2).unwrap();
    let error = QueueGroup::bind(0..=3, |builder| builder).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(error.to_string().contains("queue 2"), "{error}");
    eventually("the others are free", || [0, 1, 3].into_iter().all(|queue| account(queue).is_none())).await;
    drop(taken);
    group(|builder| builder);
}

fn an_empty_range_is_refused() {
    #[expect(clippy::reversed_empty_ranges, reason = "it is to be refused")]
    let empty = 3..=2;
    // This is checked first: there is no runtime here.
    let error = QueueGroup::bind(empty, |_| panic!("settings of no queue")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(error.to_string(), "bind queue group 3..=2: invalid value: the range is empty");
}

async fn a_group_can_be_split_into_queues_and_collected_again() {
    let group = group(|builder| builder);
    let _divert = divert([udp_in().to_queue(2)]);
    let traffic = Traffic::new(100);
    let mut queues = group.into_queues();
    assert!(queues.iter().map(Queue::queue_number).eq(0..4));
    for packet in common::hold(&mut queues[2], &traffic, 0..10).await {
        queues[2].sink().submit(packet.accept()).unwrap();
    }
    traffic.expect(0..10).await;
    // Queues of any numbers, in any order, can be collected into a group.
    let mut group: QueueGroup = queues.into_iter().rev().chain([Queue::builder(77).bind().unwrap()]).collect();
    traffic.send([10]);
    let packet = next(&mut group).await;
    soon("the reply", group.sink().confirm(packet.accept())).await.unwrap();
    traffic.expect([10]).await;
    let numbers: Vec<_> = group.sink().queues().iter().map(|sink| sink.queue_number()).collect();
    assert_eq!(numbers, [3, 2, 1, 0, 77]);
}

async fn close_closes_all_queues() {
    let (mut packets, sink) = group(|builder| builder.on_unanswered(Action::Accept)).split();
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(100);
    traffic.send(0..20);
    let held = next(&mut packets).await;
    let closing = tokio::spawn({
        let sink = sink.clone();
        async move { sink.close().await }
    });
    eventually("the shutdown has begun", || sink.queues().iter().all(|sink| sink.is_closed())).await;
    sink.submit(held.accept()).unwrap();
    soon("the shutdown", closing).await.unwrap().unwrap();
    assert!((0..4).all(|queue| account(queue).is_none()));
    assert!(soon("the end of the stream", packets.recv()).await.is_none() && packets.is_terminated());
    traffic.expect(0..20).await;
}

async fn forward_ends_when_the_group_is_closed() {
    let (packets, sink) = group(|builder| builder).split();
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(100);
    let forwarding = tokio::spawn(packets.map_ok(tokio_nfqueue::Packet::accept).forward(sink.clone()));
    traffic.send(0..50);
    traffic.expect(0..50).await;
    soon("the shutdown", sink.close()).await.unwrap();
    soon("the forward's end", forwarding).await.unwrap().unwrap();

    let mut closed = sink.clone();
    soon("the close", SinkExt::close(&mut closed)).await.unwrap();
}

async fn dropping_a_group_closes_all_queues() {
    let mut group = group(|builder| builder.on_unanswered(Action::Accept));
    let divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(100);
    traffic.send(0..20);
    let held = next(&mut group).await;
    drop(group);
    drop(held);
    traffic.expect(0..20).await;
    eventually("the queue is unbound", || (0..4).all(|queue| account(queue).is_none())).await;
    drop(divert);
}

async fn a_group_continues_after_one_of_its_queues_is_closed() {
    let (mut packets, sink) = group(|builder| builder).split();
    let _divert = divert([udp_in().to_queue(1)]);
    let traffic = Traffic::new(100);
    soon("the end of one", sink.queues()[0].close()).await.unwrap();
    traffic.send([0]);
    let packet = next(&mut packets).await;
    soon("the reply", sink.confirm(packet.accept())).await.unwrap();
    traffic.expect([0]).await;
    assert!(!packets.is_terminated());
}

async fn the_stream_of_an_empty_group_has_ended() {
    let mut none: QueueGroup = std::iter::empty().collect();
    assert!(none.is_terminated());
    assert!(soon("the end of the stream", none.recv()).await.is_none());
    soon("the shutdown", none.close()).await.unwrap();
}

/// Each method of a queue works for all queues of a group.
async fn a_group_has_the_methods_of_a_queue() {
    let mut group = group(|builder| builder);
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let change = Reconfigure::new().copy_range(100).max_len(40);
    soon("the change", group.reconfigure(&change)).await.unwrap();
    let kernel = group.kernel_stats().unwrap();
    assert_eq!(
        kernel.iter().map(|(queue, stats)| (*queue, stats.copy_range)).collect::<Vec<_>>(),
        [(0, 100), (1, 100), (2, 100), (3, 100)]
    );
    assert!(matches!(group.try_recv(), Err(TryRecvError::Empty)));
    let traffic = Traffic::new(40);
    for number in 0..40_u32 {
        let sender = support::udp((Ipv4Addr::new(127, 0, 1, number as u8), 0));
        traffic.send_from(&sender, [number]);
    }
    {
        let mut fds = [PollFd::from_borrowed_fd(group.readable_fd().unwrap(), PollFlags::IN)];
        assert_eq!(poll(&mut fds, None), Ok(1));
    }
    let mut packets = vec![group.try_recv().unwrap()];
    let mut limit = 10;
    while packets.len() < 40 {
        let before = packets.len();
        let count = soon("packets", group.recv_many(&mut packets, limit)).await.unwrap();
        assert_eq!(packets.len() - before, count);
        assert!((1..=limit).contains(&count), "{count}");
        limit += 1;
    }
    // All queued packets have been received.
    assert!(matches!(group.try_recv(), Err(TryRecvError::Empty)));
    let last = packets.pop().unwrap();
    packets.into_iter().for_each(|packet| group.submit(packet.accept()).unwrap());
    soon("the confirmation", group.confirm(last.accept())).await.unwrap();
    soon("the flush", group.flush()).await.unwrap();
    assert_eq!(group.stats().map(|(_, stats)| stats.decided.accepted).sum::<u64>(), 40);
    let mut watch = group.watch(Duration::from_millis(1)).unwrap();
    let (queue, stats) = soon("statistics", watch.next()).await.unwrap();
    assert!(queue < 4 && stats.limits.max_len == 40, "{queue} {stats:?}");
    assert_eq!(group.advice(), []);
    assert!(!group.is_closed());
    let sink = group.sink();
    let wrong = soon("the refusal", sink.close_with(Action::Requeue { queue: 2, bypass: false })).await;
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(!sink.is_closed(), "an action that one queue refuses closes none");
    soon("the shutdown", group.close_with(Action::Accept)).await.unwrap();
    assert!(sink.is_closed());
    traffic.expect(0..40).await;
}
