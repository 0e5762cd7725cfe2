//! Several numbers as one queue, and free numbers.

use std::{collections::BTreeSet, time::Duration};

use futures::{FutureExt, SinkExt, StreamExt, TryStreamExt, stream::FusedStream};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::time::timeout;
use tokio_nfqueue::{Action, ErrorKind, PacketStream, Queue, QueueBuilder, Reconfigure, TryRecvError};

use crate::{
    common::{
        self, DEADLINE, Load, PATIENCE, Traffic, account, bind_now, divert, eventually, many, next, number, soon,
        udp_in,
    },
    support,
};

tests![
    both balanced_traffic_arrives_in_one_stream,
    both a_group_under_load_decides_each_packet_once,
    one no_queue_is_starved,
    one all_queues_are_bound_or_none,
    sync an_empty_range_is_refused,
    one a_queue_can_be_divided_into_a_stream_for_each_number,
    one any_is_the_first_free_number,
    one any_of_several_is_the_first_range_that_is_free,
    one a_default_requeue_to_a_number_of_the_queue_is_refused,
    both close_closes_all_queues,
    one refusals_of_all_queues_are_one_stream,
    both forward_ends_when_the_group_is_closed,
    one dropping_a_group_closes_all_queues,
    one a_group_continues_after_one_of_its_queues_is_closed,
    one all_methods_concern_all_numbers,
];

async fn refusals_of_all_queues_are_one_stream() {
    let mut group = group(|builder| builder.deadline(DEADLINE, Action::Drop));
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(40);
    let (mut packets, mut sent) = (Vec::new(), 0);
    for number in 0..40 {
        let packet = loop {
            traffic.send_from_many([number]);
            sent += 1;
            // It is not handed out if its deadline comes first.
            if let Ok(packet) = timeout(DEADLINE * 2, next(&mut group)).await {
                break packet;
            }
        };
        packets.push(packet);
    }
    let sink = group.sink();
    eventually("the deadlines", || sink.stats().decided.expired == sent).await;
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

fn group(builder: impl Fn(QueueBuilder) -> QueueBuilder) -> Queue {
    bind_now(builder(Queue::builder(0..4)))
}

async fn balanced_traffic_arrives_in_one_stream() {
    let mut group = group(|builder| builder);
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(100);
    traffic.send_from_many(0..100);
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        let packet = next(&mut group).await;
        seen.insert(packet.queue_number());
        let verdict = if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
    }
    soon("the flush", group.sink().flush()).await;
    traffic.expect((0..100).step_by(2)).await;
    assert!(seen.len() > 1 && seen.iter().all(|queue| *queue < 4), "{seen:?}");
    assert_eq!(group.stats().received.packets, 100);
    let each: Vec<_> = group.sink().each().map(|sink| (sink.queue_number(), sink.stats().received.packets)).collect();
    assert_eq!(each.iter().map(|(_, received)| received).sum::<u64>(), 100);
    assert!(each.iter().map(|(queue, _)| *queue).eq(0..4));
}

async fn a_group_under_load_decides_each_packet_once() {
    const COUNT: u32 = many(5000);
    let (mut packets, sink) = group(|builder| builder).split();
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let load = Load::start(COUNT);
    let decide = load.decide();
    for _ in 0..COUNT {
        let packet = next(&mut packets).await;
        decide(packet).submit().unwrap();
    }
    load.finish(COUNT).await;
    let stats = sink.stats();
    assert_eq!((stats.lost.packets, stats.sent.gone_at_least, stats.decided.unanswered), (0, 0, 0));
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
    let error = Queue::builder(0..=3).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(error.to_string().contains("queue 2"), "{error}");
    eventually("the others are free", || [0, 1, 3].into_iter().all(|queue| account(queue).is_none())).await;
    support::drop_now(taken);
    group(|builder| builder);
}

fn an_empty_range_is_refused() {
    #[expect(clippy::reversed_empty_ranges, reason = "it is to be refused")]
    let empty = 3..=2;
    // This is checked first: there is no runtime here.
    let error = Queue::builder(empty).bind().now_or_never().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(error.to_string(), "bind no queue from 3: invalid value: the range is empty");
}

async fn a_queue_can_be_divided_into_a_stream_for_each_number() {
    let (packets, sink) = group(|builder| builder.on_unanswered(Action::Accept)).split();
    assert_eq!((packets.queue_numbers(), sink.queue_numbers()), (0..=3, 0..=3));
    let _divert = divert([udp_in().to_queue(2)]);
    let traffic = Traffic::new(100);
    let mut streams = packets.into_each();
    assert!(streams.iter().map(PacketStream::queue_number).eq(0..4));
    traffic.send(0..10);
    for _ in 0..10 {
        next(&mut streams[2]).await.accept().submit().unwrap();
    }
    traffic.expect(0..10).await;
    // Each stream closes its own number.
    drop(streams.remove(1));
    eventually("one is unbound", || account(1).is_none()).await;
    traffic.send([10]);
    next(&mut streams[1]).await.accept().submit().unwrap();
    traffic.expect([10]).await;
    assert!(!sink.is_closed());
    drop(streams);
    eventually("the others are unbound", || (0..4).all(|queue| account(queue).is_none())).await;
    assert!(sink.is_closed());
}

async fn any_is_the_first_free_number() {
    let _taken = support::RawQueue::bind(0).unwrap();
    let _own = Queue::builder(1).bind().await.unwrap();
    let queue = Queue::builder(Queue::ANY).bind().await.unwrap();
    assert_eq!(queue.queue_number(), 2);
    soon("the shutdown", queue.close()).await.unwrap();
    assert_eq!(Queue::builder(Queue::ANY).bind_when_free().await.unwrap().queue_number(), 2);
}

async fn any_of_several_is_the_first_range_that_is_free() {
    let _one = Queue::builder(1).bind().await.unwrap();
    let _four = Queue::builder(4).bind().await.unwrap();
    let three = Queue::builder(Queue::any(3)).bind().await.unwrap();
    assert_eq!(three.queue_numbers(), 5..=7);
    let two = Queue::builder(Queue::any(2)).bind().await.unwrap();
    assert_eq!(two.queue_numbers(), 2..=3);
    // What was bound on the way is free again.
    eventually("0 is free", || account(0).is_none()).await;
    let error = Queue::builder(Queue::any(u16::MAX)).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(error.to_string().starts_with("bind 65535 free queues in a row"), "{error}");
}

async fn a_default_requeue_to_a_number_of_the_queue_is_refused() {
    let requeue = |queue| Action::Requeue { queue, bypass: false };
    for builder in
        [Queue::builder(0..4).on_unanswered(requeue(3)), Queue::builder(Queue::ANY).on_unanswered(requeue(0))]
    {
        assert_eq!(builder.bind().await.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    Queue::builder(0..4).on_unanswered(requeue(4)).bind().await.unwrap();
}

async fn close_closes_all_queues() {
    let (mut packets, sink) = group(|builder| builder.on_unanswered(Action::Accept).close_timeout(PATIENCE)).split();
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let traffic = Traffic::new(100);
    traffic.send(0..20);
    let held = next(&mut packets).await;
    let closing = tokio::spawn({
        let sink = sink.clone();
        async move { sink.close().await }
    });
    eventually("the shutdown has begun", || sink.is_closed()).await;
    held.accept().submit().unwrap();
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
    soon("the end of one", sink.each().next().unwrap().close()).await.unwrap();
    traffic.send([0]);
    let packet = next(&mut packets).await;
    soon("the reply", packet.accept().confirm()).await.unwrap();
    traffic.expect([0]).await;
    assert!(!packets.is_terminated());
}

async fn all_methods_concern_all_numbers() {
    let mut group = group(|builder| builder);
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let change = Reconfigure::new().copy_range(100).max_len(40);
    soon("the change", group.sink().reconfigure(&change)).await.unwrap();
    assert!(group.sink().each().all(|sink| sink.kernel_stats().unwrap().copy_range == 100));
    assert!(matches!(group.try_recv(), Err(TryRecvError::Empty)));
    let traffic = Traffic::new(40);
    traffic.send_from_many(0..40);
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
    assert_eq!(group.sink().kernel_stats().unwrap().queued, 40);
    // All queued packets have been received.
    assert!(matches!(group.try_recv(), Err(TryRecvError::Empty)));
    let last = packets.pop().unwrap();
    packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    soon("the confirmation", last.accept().confirm()).await.unwrap();
    soon("the flush", group.sink().flush()).await;
    let stats = group.stats();
    assert_eq!((stats.decided.accepted, stats.limits.max_len), (40, 160));
    assert_eq!(group.sink().advice(), []);
    assert!(!group.is_closed());
    let sink = group.sink();
    let wrong = soon("the refusal", sink.close_with(Action::Requeue { queue: 2, bypass: false })).await;
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(!sink.is_closed(), "an action that one queue refuses closes none");
    soon("the shutdown", group.close_with(Action::Accept)).await.unwrap();
    assert!(sink.is_closed());
    traffic.expect(0..40).await;
}
