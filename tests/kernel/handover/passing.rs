//! What the successor gets.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, StreamExt, TryStreamExt, stream::FusedStream};
use tokio::sync::Notify;
use tokio_nfqueue::{Action, ErrorKind, Queue, Reconfigure, Stats, TryRecvError, handover::Takeover};

use super::{ENOUGH, connection, pass_on, start_with_rules, take_over};
use crate::{
    common::{
        DEADLINE, Load, PORT, Traffic, account, divert, eventually, hold, many, next, number, queued, soon, start,
        udp_in,
    },
    support,
};

tests![
    both the_successor_goes_on_with_what_is_unread,
    both owed_verdicts_are_awaited,
    both undecided_packets_get_the_default_action_at_the_limit,
    both hand_overs_under_load_lose_no_packet_and_decide_none_twice,
    both the_queue_here_ends_when_it_has_been_handed_over,
    both a_waiting_stream_ends_when_the_queue_has_been_handed_over,
    both acknowledgements_are_not_mixed_up,
    both deadlines_hold_after_a_hand_over,
    both deadlines_do_not_decide_while_the_queue_is_on_its_way,
    both lost_packets_are_counted_by_the_successor,
    both several_queues_are_handed_over_together,
    both descriptors_can_be_kept_in_any_order,
    both a_queue_in_another_namespace_stays_there,
    one the_counters_are_never_those_of_a_queue_in_another_namespace,
    both the_settings_of_the_kernel_go_along,
    one try_recv_and_its_descriptor_stop_and_go_on,
];

/// What was received is accounted for, here or by the successor.
fn adds_up(stats: &Stats) {
    let (decided, sent) = (stats.decided, stats.sent);
    let sum = decided.accepted
        + decided.dropped
        + decided.repeated
        + decided.requeued
        + decided.handed_over
        + sent.refused
        + sent.gone_at_least
        + stats.held.in_flight as u64;
    assert_eq!(stats.received.packets, sum, "{stats:?}");
}

async fn the_successor_goes_on_with_what_is_unread() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..50);
    // Reading these brings others into this process, which are not handed out.
    for expected in 0..3 {
        let packet = next(&mut queue).await;
        assert_eq!(number(&packet), expected);
        packet.accept().submit().unwrap();
    }
    // These stay in the socket.
    traffic.send(50..80);
    let sink = queue.sink();
    let mut successor = pass_on(&sink, Queue::builder(0)).await;
    for expected in 3..80 {
        let packet = next(&mut successor).await;
        assert_eq!(number(&packet), expected);
        assert_eq!(packet.id().get(), expected + 1);
        packet.accept().submit().unwrap();
    }
    traffic.send(80..100);
    for _ in 80..100 {
        next(&mut successor).await.accept().submit().unwrap();
    }
    traffic.expect(0..100).await;
    let (before, after) = (sink.stats(), successor.stats());
    adds_up(&before);
    adds_up(&after);
    assert_eq!(before.decided.accepted, 3);
    assert_eq!(before.received.packets, 3 + before.decided.handed_over);
    assert_eq!((after.received.packets, after.decided.accepted, after.lost.packets), (97, 97, 0));
    assert_eq!((before.sent.gone_at_least, after.sent.gone_at_least), (0, 0));
    soon("the shutdown", successor.close()).await.unwrap();
    assert_eq!(account(0), None);
}

async fn owed_verdicts_are_awaited() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let mut held = hold(&mut queue, &traffic, 0..10).await;
    traffic.send(10..20);
    let sink = queue.sink();
    let mut handing_over = pin!(sink.hand_over(ENOUGH));
    while let Some(packet) = held.pop() {
        assert!(futures::poll!(&mut handing_over).is_pending(), "verdicts are owed");
        assert!(matches!(queue.try_recv(), Err(TryRecvError::Empty)), "nothing is handed out any more");
        packet.accept().submit().unwrap();
    }
    let handover = soon("the hand-over", handing_over).await.unwrap();
    assert_eq!(handover.unanswered(), 0);
    traffic.expect(0..10).await;
    let (here, there) = connection();
    let (sent, successor) = tokio::join!(handover.send(here, ENOUGH), take_over(there, Queue::builder(0)));
    sent.unwrap();
    let mut successor = successor.unwrap();
    for _ in 10..20 {
        next(&mut successor).await.accept().submit().unwrap();
    }
    traffic.expect(10..20).await;
}

async fn undecided_packets_get_the_default_action_at_the_limit() {
    for (action, delivered) in [(Action::Accept, 10), (Action::Drop, 0)] {
        let (mut queue, divert) = start(Queue::builder(0).on_unanswered(action));
        let traffic = Traffic::new(100);
        let mut held = hold(&mut queue, &traffic, 0..10).await;
        traffic.send(10..20);
        let sink = queue.sink();
        let begun = Instant::now();
        let limit = Duration::from_millis(30);
        let handover = soon("the hand-over", sink.hand_over(limit)).await.unwrap();
        assert!(begun.elapsed() >= limit);
        assert_eq!((handover.unanswered(), sink.stats().decided.unanswered), (10, 10));
        traffic.expect(0..delivered).await;
        let late = held.pop().unwrap();
        let id = late.id();
        assert!(late.is_expired());
        late.accept().submit().unwrap();
        let error = soon("the refusal", sink.refusals().recv()).await.unwrap();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::Expired, Some(id)));
        drop(held);

        let (here, there) = connection();
        let (sent, successor) = tokio::join!(handover.send(here, ENOUGH), take_over(there, Queue::builder(0)));
        sent.unwrap();
        let mut successor = successor.unwrap();
        for _ in 10..20 {
            next(&mut successor).await.accept().submit().unwrap();
        }
        traffic.expect(10..20).await;
        adds_up(&sink.stats());
        soon("the shutdown", successor.close()).await.unwrap();
        support::drop_now(divert);
    }
}

async fn hand_overs_under_load_lose_no_packet_and_decide_none_twice() {
    const HAND_OVERS: u32 = 2 + many(18);
    // Far more for each than it waits for.
    const COUNT: u32 = HAND_OVERS * 2000;
    let (queue, _divert) = start(Queue::builder(0));
    let load = Load::start(COUNT);
    let mut queue = queue;
    let mut total = (0, 0, 0);
    let mut note = |stats: Stats| {
        adds_up(&stats);
        assert_eq!(stats.lost.packets, 0, "{stats:?}");
        total.0 += stats.received.packets - stats.decided.handed_over;
        total.1 += stats.decided.accepted + stats.decided.dropped;
        total.2 += stats.sent.gone_at_least + stats.sent.refused;
    };
    for _ in 0..HAND_OVERS {
        let sink = queue.sink();
        let stop = Arc::new(Notify::new());
        // It holds packets and decides them out of order, and decides the rest while the hand-over
        // waits.
        let decider = tokio::spawn({
            let (decide, stop) = (load.decide(), Arc::clone(&stop));
            async move {
                let mut held = Vec::new();
                loop {
                    tokio::select! {
                        packet = queue.try_next() => match packet.unwrap() {
                            Some(packet) => held.push(packet),
                            None => return assert_eq!(held.len(), 0),
                        },
                        () = stop.notified() => {
                            for packet in held.drain(..) {
                                decide(packet).submit().unwrap();
                                tokio::task::yield_now().await;
                            }
                        }
                    }
                    if held.len() > 5 {
                        decide(held.swap_remove(held.len() / 2)).submit().unwrap();
                    }
                }
            }
        });
        let so_far = sink.stats().received.packets;
        eventually("traffic flows", || sink.stats().received.packets >= so_far + 100).await;
        let (here, there) = connection();
        let hand_over = async {
            let mut begun = pin!(sink.hand_over(ENOUGH));
            // Packets that come in between are held as well.
            let _ = futures::poll!(&mut begun);
            stop.notify_one();
            let handover = begun.await.unwrap();
            assert_eq!(handover.unanswered(), 0);
            handover.send(here, ENOUGH).await.unwrap();
        };
        let ((), successor) = tokio::join!(hand_over, take_over(there, Queue::builder(0)));
        soon("the end of the stream", decider).await.unwrap();
        note(sink.stats());
        queue = successor.unwrap();
    }
    let sink = queue.sink();
    let decide = load.decide();
    let decider = tokio::spawn(async move {
        while let Some(packet) = queue.try_next().await.unwrap() {
            decide(packet).submit().unwrap();
        }
    });
    load.finish(COUNT).await;
    soon("a flush", sink.flush()).await;
    soon("the shutdown", sink.close()).await.unwrap();
    soon("the end of the stream", decider).await.unwrap();
    note(sink.stats());
    assert_eq!(total, (u64::from(COUNT), u64::from(COUNT), 0));
}

async fn the_queue_here_ends_when_it_has_been_handed_over() {
    let (queue, _divert) = start(Queue::builder(0));
    let (mut packets, sink) = queue.split();
    let mut successor = pass_on(&sink, Queue::builder(0)).await;
    assert!(soon("the end of the stream", packets.next()).await.is_none());
    assert!(packets.is_terminated() && sink.is_closed());
    assert!(soon("the end of the refusals", sink.refusals().recv()).await.is_none());
    assert_eq!(sink.hand_over(ENOUGH).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(sink.reconfigure(&Reconfigure::new().max_len(5)).await.unwrap_err().kind(), ErrorKind::Closed);
    soon("a flush", sink.flush()).await;
    soon("a shutdown without effect", sink.close()).await.unwrap();
    drop((packets, sink));
    let traffic = Traffic::new(10);
    traffic.send(0..10);
    for _ in 0..10 {
        next(&mut successor).await.accept().submit().unwrap();
    }
    traffic.expect(0..10).await;
}

async fn a_waiting_stream_ends_when_the_queue_has_been_handed_over() {
    let (queue, _divert) = start(Queue::builder(0));
    let (mut packets, sink) = queue.split();
    let waiting = tokio::spawn(async move { packets.next().await.is_none() });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    let _successor = pass_on(&sink, Queue::builder(0)).await;
    assert!(soon("the stream's end", waiting).await.unwrap());
}

async fn acknowledgements_are_not_mixed_up() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let mut held = hold(&mut queue, &traffic, 0..5).await;
    let sink = queue.sink();
    // Its reply waits in the socket, behind packets.
    let confirmed = held.pop().unwrap().accept().confirm();
    traffic.send(5..30);
    for packet in held {
        packet.accept().submit().unwrap();
    }
    let handover = soon("the hand-over", sink.hand_over(ENOUGH)).await.unwrap();
    soon("the reply", confirmed).await.expect("the kernel has acknowledged it");
    let (here, there) = connection();
    let (sent, successor) = tokio::join!(handover.send(here, ENOUGH), take_over(there, Queue::builder(0)));
    sent.unwrap();
    let mut successor = successor.unwrap();
    for _ in 5..30 {
        let packet = next(&mut successor).await;
        soon("the reply", packet.accept().confirm()).await.unwrap();
    }
    traffic.expect(0..30).await;

    // The errors of verdicts that this process has sent are not the successor's: here the packets
    // are gone, and the kernel says so after the last time that this process has read.
    let held = hold(&mut successor, &traffic, 30..40).await;
    support::drop_now(divert([udp_in().mark(1, 1).to_queue(9)]));
    assert_eq!(account(0).unwrap().waiting, 0, "a hook was unregistered");
    for packet in held {
        packet.accept().submit().unwrap();
    }
    let sink = successor.sink();
    let third = pass_on(&sink, Queue::builder(0)).await;
    assert!(third.sink().refusals().recv().now_or_never().is_none());
    adds_up(&third.stats());
    let before = third.stats();
    assert_eq!((before.sent.gone_at_least, before.sent.refusals), (0, 0));
}

/// Sends 40 packets and accepts the first one. Returns whether that was before the deadline, which
/// may decide all of them otherwise.
async fn accept_the_first(queue: &mut Queue, traffic: &Traffic) -> bool {
    let begun = Instant::now();
    traffic.send(0..40);
    if let Ok(Some(first)) = tokio::time::timeout(DEADLINE * 2, queue.next()).await {
        first.unwrap().accept().submit().unwrap();
    }
    begun.elapsed() < DEADLINE
}

async fn deadlines_hold_after_a_hand_over() {
    let deadline = || Queue::builder(0).deadline(DEADLINE, Action::Accept);
    let (mut queue, _divert) = start(deadline());
    let traffic = Traffic::new(100);
    let in_time = accept_the_first(&mut queue, &traffic).await;
    let sink = queue.sink();
    let successor = pass_on(&sink, deadline()).await;
    traffic.send(40..60);
    // No task polls the stream.
    traffic.expect(0..60).await;
    let (before, after) = (sink.stats().decided, successor.stats().decided);
    let expired = before.expired + after.expired;
    assert!(expired == 59 || expired == 60 && !in_time, "{expired}");
    adds_up(&sink.stats());
    adds_up(&successor.stats());
}

async fn deadlines_do_not_decide_while_the_queue_is_on_its_way() {
    let (mut queue, _divert) = start(Queue::builder(0).deadline(DEADLINE, Action::Drop));
    let traffic = Traffic::new(100);
    let in_time = accept_the_first(&mut queue, &traffic).await;
    let sink = queue.sink();
    let handover = soon("the hand-over", sink.hand_over(ENOUGH)).await.unwrap();
    let (here, there) = connection();
    let (sent, mut successor) = tokio::join!(handover.send(here, ENOUGH), async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let successor = Queue::builder(0).take_over(&mut takeover).unwrap();
        // Longer than the deadline of the predecessor.
        tokio::time::sleep(DEADLINE * 2).await;
        takeover.accept().await.unwrap();
        successor
    });
    sent.unwrap();
    let decided = sink.stats().decided;
    assert!(decided.accepted == 1 || !in_time, "{decided:?}");
    let rest = 40 - decided.accepted - decided.expired;
    for _ in 0..rest {
        next(&mut successor).await.accept().submit().unwrap();
    }
    soon("the flush", successor.sink().flush()).await;
    assert_eq!(successor.stats().sent.gone_at_least, 0, "each packet was still there");
    assert_eq!(traffic.delivered().len() as u64, decided.accepted + rest);
}

async fn lost_packets_are_counted_by_the_successor() {
    let (queue, _divert) = start(Queue::builder(0).receive_buffer(1));
    let sink = queue.sink();
    let traffic = Traffic::new(100);
    let handover = soon("the hand-over", sink.hand_over(ENOUGH)).await.unwrap();
    // More than the smallest receive buffer holds.
    traffic.send(0..20);
    queued(0, 20);
    let account = account(0).unwrap();
    assert!(account.socket_full > 0);
    let (here, there) = connection();
    let (sent, successor) = tokio::join!(handover.send(here, ENOUGH), take_over(there, Queue::builder(0)));
    sent.unwrap();
    let mut successor = successor.unwrap();
    for _ in 0..account.waiting {
        next(&mut successor).await.accept().submit().unwrap();
    }
    // A gap is found when the next packet is received.
    traffic.send([99]);
    assert_eq!(number(&next(&mut successor).await), 99);
    assert_eq!(successor.stats().lost.packets, account.socket_full);
}

async fn several_queues_are_handed_over_together() {
    let group = Queue::builder(0..=2).bind().await.unwrap();
    let rules = (0..=2).map(|queue| udp_in().destination_port(PORT + queue).to_queue(queue));
    let _divert = divert(rules);
    let traffic = Traffic::new(600);
    let numbers = || (0..600).step_by(20);
    traffic.send(numbers());
    let sink = group.sink();
    let all = soon("the hand-over", group.hand_over(ENOUGH)).await.unwrap();
    drop(group);
    let (here, there) = connection();
    let (sent, mut group) = tokio::join!(all.send(here, ENOUGH), async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        assert_eq!(takeover.queues(), [0, 1, 2]);
        let group = Queue::builder(0..=2).take_over(&mut takeover);
        takeover.accept().await.unwrap();
        group.unwrap()
    });
    sent.unwrap();
    assert!(sink.is_closed());
    for _ in numbers() {
        let packet = soon("a packet", group.recv()).await.unwrap().unwrap();
        packet.accept().submit().unwrap();
    }
    traffic.expect(numbers()).await;
}

async fn descriptors_can_be_kept_in_any_order() {
    let (mut queue, divert) = start_with_rules(Queue::builder(0)).await;
    let traffic = Traffic::new(100);
    traffic.send(0..20);
    next(&mut queue).await.accept().submit().unwrap();
    let sink = queue.sink();
    let handover = sink.hand_over(ENOUGH).await.unwrap().with_divert(&divert).await.unwrap();
    let mut kept: Vec<OwnedFd> = handover.descriptors().unwrap();
    handover.release();
    drop((queue, sink, divert));
    // No process has the queue, and the kernel keeps the packets.
    traffic.send(20..40);
    queued(0, 40);
    assert_eq!(account(0).unwrap().waiting, 39);
    for round in 0..2 {
        kept.rotate_left(1);
        // A process that fails before it has accepted changes nothing.
        let copies: Vec<OwnedFd> = kept.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let mut takeover = Takeover::from_descriptors(copies).unwrap();
        let unused = Queue::builder(0).take_over(&mut takeover).unwrap();
        assert_eq!(takeover.accept().await.unwrap_err().kind(), ErrorKind::InvalidInput, "round {round}: the table");
        drop(unused);
        assert_eq!(account(0).unwrap().waiting, 39);
    }
    kept.reverse();
    let mut takeover = Takeover::from_descriptors(kept).unwrap();
    let mut successor = Queue::builder(0).take_over(&mut takeover).unwrap();
    let divert = takeover.take_divert().unwrap().unwrap();
    soon("the takeover", takeover.accept()).await.unwrap();
    for _ in 1..40 {
        next(&mut successor).await.accept().submit().unwrap();
    }
    traffic.expect(0..40).await;
    assert_eq!(successor.sink().kernel_stats().unwrap().last_id, 40, "the kernel's table went along");
    divert.remove_rules().await.unwrap();
    soon("the shutdown", successor.close()).await.unwrap();
    divert.close().await.unwrap();
}

async fn a_queue_in_another_namespace_stays_there() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..20);
    next(&mut queue).await.accept().submit().unwrap();
    let sink = queue.sink();
    let (here, there) = connection();
    let other = support::Namespace::new();
    let handover = sink.hand_over(ENOUGH).await.unwrap();
    let runtime = tokio::runtime::Handle::current();
    let successor = tokio::task::spawn_blocking(move || {
        other.run(move || {
            runtime.block_on(async move {
                let _nothing_here = Queue::builder(0).bind().await.unwrap();
                take_over(there, Queue::builder(0)).await.unwrap()
            })
        })
    });
    let (sent, successor) = tokio::join!(handover.send(here, ENOUGH), successor);
    sent.unwrap();
    let mut successor = successor.unwrap();
    for _ in 1..20 {
        let packet = next(&mut successor).await;
        assert_eq!(packet.interface_name(packet.interface_in().unwrap()).unwrap(), "lo");
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..20).await;
    assert_eq!(successor.sink().kernel_stats().unwrap().last_id, 20);
    soon("the shutdown", successor.close()).await.unwrap();
    assert_eq!(account(0), None);
}

async fn the_counters_are_never_those_of_a_queue_in_another_namespace() {
    let (queue, _divert) = start(Queue::builder(0));
    let handover = queue.sink().hand_over(ENOUGH).await.unwrap();
    let mut kept: Vec<OwnedFd> = handover.descriptors().unwrap();
    let all = kept.len();
    // As if the predecessor had not been allowed to open the file.
    kept.retain(|fd| {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        !path.ends_with("nfnetlink_queue")
    });
    assert_eq!(kept.len(), all - 1);
    handover.release();
    drop(queue);
    let here: Vec<OwnedFd> = kept.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let other = support::Namespace::new();
    let runtime = tokio::runtime::Handle::current();
    let there = tokio::task::spawn_blocking(move || {
        other.run(move || {
            runtime.block_on(async move {
                let _other = Queue::builder(0).bind().await.unwrap();
                let mut takeover = Takeover::from_descriptors(kept).unwrap();
                let successor = Queue::builder(0).take_over(&mut takeover).unwrap();
                successor.sink().kernel_stats().map(|stats| stats.port_id)
            })
        })
    });
    assert_eq!(there.await.unwrap().unwrap_err().kind(), ErrorKind::NotPermitted);
    let mut takeover = Takeover::from_descriptors(here).unwrap();
    let successor = Queue::builder(0).take_over(&mut takeover).unwrap();
    takeover.accept().await.unwrap();
    assert_eq!(successor.sink().kernel_stats().unwrap().queued, 0, "opened where the queue is");
}

async fn the_settings_of_the_kernel_go_along() {
    let (queue, _divert) = start(Queue::builder(0).copy_range(30).max_len(77).receive_buffer(50_000));
    let sink = queue.sink();
    soon("the change", sink.reconfigure(&Reconfigure::new().copy_range(29).max_len(78))).await.unwrap();
    let limits = sink.stats().limits;
    let mut successor = pass_on(&sink, Queue::builder(0)).await;
    assert_eq!(successor.stats().limits, limits);
    assert_eq!(limits.max_len, 78);
    let traffic = Traffic::new(10);
    traffic.send([0]);
    let packet = next(&mut successor).await;
    assert_eq!(packet.payload().len(), 29);
    packet.accept().submit().unwrap();
    let whole = Reconfigure::new().copy_range(65_531).max_len(2048);
    soon("the change", successor.sink().reconfigure(&whole)).await.unwrap();
    assert!(successor.stats().limits.receive_buffer > limits.receive_buffer, "that of a longer queue");
    traffic.send([1]);
    let packet = next(&mut successor).await;
    assert_eq!(number(&packet), 1);
    packet.accept().submit().unwrap();
    traffic.expect(0..2).await;
}

async fn try_recv_and_its_descriptor_stop_and_go_on() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(10);
    traffic.send(0..5);
    next(&mut queue).await.accept().submit().unwrap();
    let handover = queue.sink().hand_over(ENOUGH).await.unwrap();
    assert!(matches!(queue.try_recv(), Err(TryRecvError::Empty)));
    let mut several = Vec::new();
    assert!(queue.recv_many(&mut several, 10).now_or_never().is_none());
    drop(handover);
    let fd = queue.readable_fd().unwrap().try_clone_to_owned().unwrap();
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut poll, Some(&rustix::time::Timespec::default())), Ok(1));
    while let Ok(packet) = queue.try_recv() {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..5).await;
}
