//! What happens to a queue whose handles are dropped.

use futures::SinkExt;
use tokio_nfqueue::{Action, Packet, Queue};

use crate::{
    common::{Traffic, account, eventually, freed, hold, queued, start},
    support,
};

tests![
    both a_dropped_queue_stays_bound_until_its_packets_are_decided,
    both dropping_the_stream_closes_the_queue,
    one new_packets_after_the_stream_is_dropped_are_accepted_or_dropped,
    both the_stream_works_without_a_sink,
    sync handles_may_be_dropped_outside_of_a_runtime,
];

async fn a_dropped_queue_stays_bound_until_its_packets_are_decided() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(50);
    let mut packets = hold(&mut queue, &traffic, 0..10).await;
    traffic.send(10..20);
    let sink = queue.sink();
    // Decided, but perhaps not sent.
    packets.remove(0).accept().submit().unwrap();
    drop(queue);
    traffic.expect([0]).await;
    traffic.send(20..30);
    let last = packets.pop().unwrap();
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    traffic.expect(1..9).await;
    assert!(account(0).is_some(), "one is still owed");
    last.accept().submit().unwrap();
    traffic.expect([9]).await;
    eventually("the queue is unbound", || account(0).is_none()).await;
    assert_eq!((sink.stats().held.in_flight, sink.stats().sent.gone_at_least), (0, 0));
}

async fn dropping_the_stream_closes_the_queue() {
    let (queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(50);
    let (mut packets, sink) = queue.split();
    let held = hold(&mut packets, &traffic, 0..10).await;
    drop(packets);
    assert!(sink.is_closed());
    // Detached packets alone keep the queue bound.
    let detached: Vec<_> = held.into_iter().map(Packet::detach).collect();
    let other = Queue::builder(1).bind().await.unwrap();
    drop(sink);
    for packet in detached {
        assert!(account(0).is_some());
        // The sink of any queue can be used.
        SinkExt::feed(&mut other.sink(), packet.accept()).await.unwrap();
    }
    traffic.expect(0..10).await;
    eventually("the queue is unbound", || account(0).is_none()).await;
}

async fn new_packets_after_the_stream_is_dropped_are_accepted_or_dropped() {
    for (action, delivered) in [(Action::Accept, 0..60), (Action::Drop, 0..10)] {
        let (queue, divert) = start(Queue::builder(0).on_unanswered(action));
        let traffic = Traffic::new(60);
        let (mut packets, _sink) = queue.split();
        let held = hold(&mut packets, &traffic, 0..10).await;
        traffic.send(10..30);
        drop(packets);
        traffic.send(30..60);
        for packet in held {
            packet.accept().submit().unwrap();
        }
        traffic.expect(delivered).await;
        eventually("the queue is unbound", || account(0).is_none()).await;
        support::drop_now(divert);
    }
}

async fn the_stream_works_without_a_sink() {
    let (queue, _divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
    let traffic = Traffic::new(60);
    let (mut packets, sink) = queue.split();
    drop(sink.clone());
    drop(sink);
    for packet in hold(&mut packets, &traffic, 0..50).await {
        drop(packet);
    }
    traffic.expect(0..50).await;
}

fn handles_may_be_dropped_outside_of_a_runtime() {
    for order in 0..3 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (queue, divert, traffic, packets) = runtime.block_on(async {
            let (mut queue, divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
            let traffic = Traffic::new(50);
            let packets = hold(&mut queue, &traffic, 0..10).await;
            traffic.send(10..20);
            queued(0, 20);
            (queue, divert, traffic, packets)
        });
        let verdict: Vec<_> = packets.into_iter().map(Packet::accept).collect();
        let sink = queue.sink();
        match order {
            0 => drop((queue, sink, verdict)),
            1 => drop((verdict, sink, queue)),
            // The runtime has ended.
            _ => {
                let outside = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                drop(runtime);
                drop((sink, queue, verdict));
                outside.block_on(freed(0));
                let mut delivered = traffic.delivered();
                delivered.sort_unstable();
                assert!(delivered.into_iter().eq(0..20));
                support::drop_now(divert);
                continue;
            }
        }
        // The driver task takes part in the shutdown, so the runtime must run.
        runtime.block_on(async {
            traffic.expect(0..20).await;
            eventually("the queue is unbound", || account(0).is_none()).await;
        });
        support::drop_now(divert);
    }
}
