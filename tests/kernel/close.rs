//! The graceful shutdown of a queue.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use futures::StreamExt;
use tokio_nfqueue::{Action, ErrorKind, Queue};

use crate::{
    common::{
        PATIENCE, PORT, Traffic, account, divert, eventually, freed, hold, next, number, queued, soon, start, udp_in,
    },
    support,
};

tests![
    both close_under_load_loses_no_packet,
    both new_packets_are_dropped_during_close,
    both close_waits_for_owed_verdicts,
    both close_times_out,
    both close_continues_when_nobody_awaits_it,
    one unread_packets_get_the_default_action,
    both close_with_decides_unread_packets,
    both the_stream_ends_after_close,
    both a_waiting_stream_is_woken_by_close,
    both close_may_be_called_several_times,
    one verdicts_after_close_are_late,
    both refusals_end_when_every_packet_of_a_closed_queue_is_decided,
    both a_time_out_of_zero_is_enough_for_packets_that_nobody_has_read,
    sync close_works_in_another_runtime,
];

/// How long the sender sleeps before it checks again whether it may send.
const PAUSE: Duration = Duration::from_micros(50);

/// Sends numbers until it is stopped, at most 100 ahead of the receiver. Returns how many it has
/// sent.
pub(crate) struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
    sender: std::thread::JoinHandle<()>,
    receiver: std::thread::JoinHandle<Vec<u32>>,
}

impl Stream {
    pub(crate) fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, received) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (from, to) = (support::udp((Ipv4Addr::LOCALHOST, 0)), support::udp((Ipv4Addr::LOCALHOST, PORT)));
        let last = u32::MAX.to_be_bytes();
        let receiver = std::thread::spawn({
            let received = Arc::clone(&received);
            move || {
                let mut numbers = Vec::new();
                let mut datagram = [0; 4];
                // An error is the timeout: a datagram was lost, and the numbers show which.
                while to.recv(&mut datagram).is_ok() && datagram != last {
                    numbers.push(u32::from_be_bytes(datagram));
                    received.fetch_add(1, SeqCst);
                }
                numbers
            }
        });
        let sender = std::thread::spawn({
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            move || {
                let mut next = 0_u32;
                let mut patience = std::time::Instant::now() + PATIENCE / 2;
                while !stop.load(SeqCst) && std::time::Instant::now() < patience {
                    if next - received.load(SeqCst) < 100 {
                        from.send_to(&next.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
                        next += 1;
                        sent.store(next, SeqCst);
                        patience = std::time::Instant::now() + PATIENCE / 2;
                    } else {
                        std::thread::sleep(PAUSE);
                    }
                }
                while received.load(SeqCst) < next && std::time::Instant::now() < patience {
                    std::thread::sleep(PAUSE);
                }
                from.send_to(&last, (Ipv4Addr::LOCALHOST, PORT)).unwrap();
            }
        });
        Self { stop, sent, sender, receiver }
    }

    /// Waits until `count` more datagrams have been sent.
    pub(crate) async fn more(&self, count: u32) {
        let until = self.sent.load(SeqCst) + count;
        eventually("traffic flows", || self.sent.load(SeqCst) >= until).await;
    }

    pub(crate) async fn finish(self) -> (u32, Vec<u32>) {
        self.stop.store(true, SeqCst);
        // Both threads end even if datagrams are missing.
        while !self.sender.is_finished() || !self.receiver.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (self.sent.load(SeqCst), self.receiver.join().unwrap())
    }
}

async fn close_under_load_loses_no_packet() {
    let stream = Stream::start();
    let mut dropped = 0;
    for round in 0..5 {
        // The queue is bound before the rule is installed and closed while the rule is installed:
        // no other order is without loss.
        let builder = Queue::builder(0).on_unanswered(Action::Accept).close_timeout(PATIENCE);
        let queue = builder.bind().await.unwrap();
        let divert = divert([udp_in().to_queue(0).bypass(true)]);
        let (mut packets, sink) = queue.split();
        let decide = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(packet) = packets.next().await {
                held.push(packet.unwrap());
                if held.len() > 20 {
                    held.swap_remove(held.len() / 2).accept().submit().unwrap();
                }
            }
            // These verdicts are still owed while the queue drains.
            let last = held.pop().unwrap();
            for packet in held {
                tokio::task::yield_now().await;
                packet.accept().submit().unwrap();
            }
            let dropped = account(0).unwrap().queue_full;
            last.accept().submit().unwrap();
            dropped
        });
        stream.more(500 + 7 * round).await;
        soon("the shutdown", sink.close()).await.unwrap();
        assert_eq!(account(0), None);
        dropped += soon("the task's end", decide).await.unwrap();
        // The queue is unbound, and the rule is still installed.
        stream.more(50).await;
        divert.remove_rules().unwrap();
        stream.more(50).await;
        support::drop_now(divert);
        assert!(sink.stats().received.packets > 0);
        assert_eq!(
            (sink.stats().lost.packets, sink.stats().sent.gone_at_least, sink.stats().held.in_flight),
            (0, 0, 0)
        );
    }
    let (sent, received) = stream.finish().await;
    let mut sorted = received;
    sorted.sort_unstable();
    let missing: Vec<u32> = (0..sent).filter(|number| sorted.binary_search(number).is_err()).take(10).collect();
    assert!(
        sorted.iter().copied().eq(0..sent),
        "of {sent} sent are missing {missing:?}, dropped by a full queue {dropped}"
    );
}

async fn new_packets_are_dropped_during_close() {
    let (mut queue, divert) = start(Queue::builder(0).close_timeout(PATIENCE));
    let traffic = Traffic::new(50);
    let mut packets = hold(&mut queue, &traffic, 0..10).await;
    let owed = packets.split_off(8);
    let sink = queue.sink();
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    let closing = tokio::spawn(queue.close());
    eventually("the shutdown has begun", || sink.is_closed()).await;
    traffic.send(10..20);
    // If the kernel has still queued some of these, they are decided before the close completes.
    for packet in owed {
        packet.accept().submit().unwrap();
    }
    soon("the shutdown", closing).await.unwrap().unwrap();
    traffic.send(20..30);
    divert.remove_rules().unwrap();
    traffic.send(30..40);
    traffic.expect((0..10).chain(30..40)).await;
}

async fn close_waits_for_owed_verdicts() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(PATIENCE));
    let traffic = Traffic::new(50);
    let packets = hold(&mut queue, &traffic, 0..10).await;
    let sink = queue.sink();
    let closing = tokio::spawn(queue.close());
    eventually("the shutdown has begun", || sink.is_closed()).await;
    for packet in packets {
        assert!(!closing.is_finished(), "verdicts are still owed");
        assert!(account(0).is_some());
        let verdict = if number(&packet) < 5 { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
    }
    soon("the shutdown", closing).await.unwrap().unwrap();
    assert_eq!(account(0), None);
    traffic.expect(0..5).await;
    assert_eq!(
        (sink.stats().decided.unanswered, sink.stats().decided.late, sink.stats().sent.gone_at_least),
        (0, 0, 0)
    );
}

async fn close_times_out() {
    const TIMEOUT: Duration = Duration::from_millis(50);
    for (action, delivered) in [(Action::Accept, 10), (Action::Drop, 0)] {
        let (mut queue, divert) = start(Queue::builder(0).on_unanswered(action).close_timeout(TIMEOUT));
        let traffic = Traffic::new(50);
        let mut packets = hold(&mut queue, &traffic, 0..10).await;
        let sink = queue.sink();
        let begun = std::time::Instant::now();
        let error = soon("the shutdown", queue.close()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(begun.elapsed() >= TIMEOUT, "not before");
        assert_eq!(account(0), None);
        traffic.expect(0..delivered).await;
        assert_eq!(sink.stats().decided.unanswered, 10);

        let late = packets.remove(0);
        let id = late.id();
        late.accept().submit().unwrap();
        let error = soon("the refusal", sink.refusals().recv()).await.unwrap();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::Expired, Some(id)));
        let error = soon("the reply", packets.remove(0).drop().confirm()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Expired);
        drop(packets);
        traffic.expect_nothing();
        support::drop_now(divert);
    }
}

async fn close_continues_when_nobody_awaits_it() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(PATIENCE));
    let traffic = Traffic::new(50);
    let packets = hold(&mut queue, &traffic, 0..10).await;
    assert!(futures::poll!(std::pin::pin!(queue.close())).is_pending());
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    eventually("the queue is unbound", || account(0).is_none()).await;
    traffic.expect(0..10).await;
}

async fn unread_packets_get_the_default_action() {
    for (action, delivered) in [(Action::Accept, 50), (Action::Drop, 0)] {
        for drop_it in [false, true] {
            let (mut queue, divert) = start(Queue::builder(0).on_unanswered(action));
            let traffic = Traffic::new(60);
            // One is taken, so that others have been received with it; the rest is still in the
            // socket.
            traffic.send(0..25);
            let first = next(&mut queue).await;
            traffic.send(25..50);
            queued(0, 50);
            let sink = queue.sink();
            drop(first);
            if drop_it {
                drop(queue);
                // The timer thread may be sending, and then ends it.
                freed(0).await;
            } else {
                soon("the shutdown", queue.close()).await.unwrap();
                assert_eq!(account(0), None);
            }
            traffic.expect(0..delivered).await;
            assert_eq!((sink.stats().decided.unanswered, sink.stats().received.packets), (50, 50));
            support::drop_now(divert);
        }
    }
}

async fn close_with_decides_unread_packets() {
    for (action, other, delivered) in [(Action::Accept, Action::Drop, 0), (Action::Drop, Action::Accept, 50)] {
        let (mut queue, divert) = start(Queue::builder(0).on_unanswered(action).close_timeout(PATIENCE));
        let traffic = Traffic::new(60);
        traffic.send(0..50);
        queued(0, 50);
        let last = next(&mut queue).await;
        let sink = queue.sink();
        let closing = tokio::spawn(queue.close_with(other));
        eventually("the shutdown has begun", || sink.is_closed()).await;
        last.decide(other).submit().unwrap();
        soon("the shutdown", closing).await.unwrap().unwrap();
        traffic.expect(0..delivered).await;
        support::drop_now(divert);
    }
}

async fn the_stream_ends_after_close() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(50);
    traffic.send(0..20);
    queued(0, 20);
    let packet = next(&mut queue).await;
    let (mut packets, sink) = queue.split();
    packet.accept().submit().unwrap();
    soon("the shutdown", sink.close()).await.unwrap();
    for _ in 0..3 {
        assert!(soon("the end of the stream", packets.recv()).await.is_none());
        assert_eq!(soon("the end of the stream", packets.recv_many(&mut Vec::new(), 10)).await.unwrap(), 0);
    }
    assert!(futures::stream::FusedStream::is_terminated(&packets));
    traffic.expect([0]).await;
}

async fn a_waiting_stream_is_woken_by_close() {
    let (queue, _divert) = start(Queue::builder(0));
    let (mut packets, sink) = queue.split();
    let waiting = tokio::spawn(async move { packets.next().await.is_none() });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    soon("the shutdown", sink.close()).await.unwrap();
    assert!(soon("the stream's end", waiting).await.unwrap());
}

async fn close_may_be_called_several_times() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(PATIENCE));
    let traffic = Traffic::new(1);
    let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
    let sink = queue.sink();
    let closings: Vec<_> =
        (0..4).map(|_| sink.clone()).map(|sink| tokio::spawn(async move { sink.close().await })).collect();
    eventually("the shutdown has begun", || sink.is_closed()).await;
    packet.accept().submit().unwrap();
    for closing in closings {
        soon("the shutdown", closing).await.unwrap().unwrap();
    }
    soon("the shutdown", sink.close()).await.unwrap();
    soon("the shutdown", sink.close_with(Action::Accept)).await.unwrap();
    soon("the shutdown", queue.close()).await.unwrap();
    assert!(sink.is_closed());
    soon("a flush", sink.flush()).await;
    traffic.expect([0]).await;
}

async fn verdicts_after_close_are_late() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(Duration::from_millis(1)));
    let traffic = Traffic::new(4);
    let packets = hold(&mut queue, &traffic, 0..4).await;
    let sink = queue.sink();
    soon("the shutdown", queue.close()).await.unwrap_err();
    let mut refusals = sink.refusals();
    for packet in packets {
        let error = match number(&packet) {
            0 => {
                packet.accept().submit().unwrap();
                soon("the refusal", refusals.recv()).await.unwrap()
            }
            1 => {
                packet.detach().drop().submit().unwrap();
                soon("the refusal", refusals.recv()).await.unwrap()
            }
            2 => soon("the reply", packet.accept().confirm()).await.unwrap_err(),
            _ => return drop((packet, sink)),
        };
        assert_eq!(error.kind(), ErrorKind::Expired, "{error}");
    }
}

async fn refusals_end_when_every_packet_of_a_closed_queue_is_decided() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(Duration::from_millis(1)));
    let traffic = Traffic::new(6);
    let mut packets = hold(&mut queue, &traffic, 0..6).await;
    let sink = queue.sink();
    let mut refusals = sink.refusals();
    soon("the shutdown", queue.close()).await.unwrap_err();
    // Read from before and after the late verdicts, in one task and in another.
    assert!(futures::poll!(std::pin::pin!(refusals.recv())).is_pending());
    let reading = tokio::spawn(async move {
        let mut kinds = Vec::new();
        while let Some(error) = refusals.recv().await {
            kinds.push((error.kind(), error.packet_id()));
        }
        kinds
    });
    let mut expected = Vec::new();
    for packet in packets.split_off(3) {
        tokio::task::yield_now().await;
        expected.push((ErrorKind::Expired, Some(packet.id())));
        packet.accept().submit().unwrap();
    }
    // These are no refusals: the owner drops one, detaches and drops one, and is told of the third.
    drop(packets.remove(0));
    drop(packets.remove(0).detach());
    assert!(!reading.is_finished(), "a packet is still held");
    soon("the reply", packets.remove(0).accept().confirm()).await.unwrap_err();
    assert_eq!(soon("the end of the refusals", reading).await.unwrap(), expected);
    assert!(soon("the end of the refusals", sink.refusals().recv()).await.is_none());
}

async fn a_time_out_of_zero_is_enough_for_packets_that_nobody_has_read() {
    let traffic = Traffic::new(50);
    for round in 0..40 {
        let (mut queue, divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
        traffic.send(0..25);
        // In every second round some have been received with the first one.
        if round % 2 == 0 {
            next(&mut queue).await.accept().submit().unwrap();
        }
        traffic.send(25..50);
        queued(0, 50);
        let sink = queue.sink();
        let closings = futures::future::join(sink.close_within(Duration::ZERO), queue.close_within(Duration::ZERO));
        let results = soon("the shutdown", closings).await;
        assert!(results.0.is_ok() && results.1.is_ok(), "round {round}: {results:?}");
        assert_fields!(sink.stats(), received.packets: 50, decided.accepted: 50, lost.packets: 0);
        traffic.expect(0..50).await;
        support::drop_now(divert);
    }
}

fn close_works_in_another_runtime() {
    let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let own = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for own_is_gone in [false, true] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let traffic = own.block_on(async { Traffic::new(50) });
        let (queue, divert, packet) = runtime.block_on(async {
            let (mut queue, divert) = start(Queue::builder(0));
            let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
            (queue, divert, packet)
        });
        if own_is_gone {
            drop(runtime);
        }
        packet.accept().submit().unwrap();
        other.block_on(soon("the shutdown", queue.close())).unwrap();
        assert_eq!(account(0), None);
        own.block_on(traffic.expect([0]));
        support::drop_now(divert);
    }
}
