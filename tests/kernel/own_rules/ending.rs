//! The ends of a queue with rules.

use std::{collections::HashSet, pin::pin, time::Duration};

use futures::StreamExt;
use tokio_nfqueue::{Action, Divert, ErrorKind, Queue};

use super::{queue, rules, table_exists};
use crate::{
    close::Stream,
    common::{Traffic, account, eventually, freed, hold, next, queued, soon, udp_in},
    support::many,
};

tests![
    both close_under_load_loses_no_packet,
    both close_waits_for_owed_verdicts_with_the_rules_removed,
    both a_dropped_queue_removes_rules_and_table_while_others_run,
    both rules_end_with_the_last_stream,
    both a_close_that_is_not_awaited_goes_on,
    both two_clones_close_at_once,
    both the_port_id_of_a_closed_socket_is_not_used_again,
    both a_time_out_of_close_is_returned_by_it,
    one close_after_the_rules_have_been_closed,
    sync a_queue_is_dropped_outside_a_runtime,
];

async fn close_under_load_loses_no_packet() {
    let stream = Stream::start();
    for round in 0..5 {
        let queue = queue(Divert::builder().table(super::TABLE).rule(udp_in().bypass(true))).bind().await.unwrap();
        let (mut packets, sink) = queue.split();
        let decide = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(packet) = packets.next().await {
                held.push(packet.unwrap());
                if held.len() > 20 {
                    held.swap_remove(held.len() / 2).accept().submit().unwrap();
                }
            }
            for packet in held {
                tokio::task::yield_now().await;
                packet.accept().submit().unwrap();
            }
        });
        stream.more(300 + 7 * round).await;
        soon("the shutdown", sink.close()).await.unwrap();
        assert_eq!((account(0), table_exists()), (None, false));
        soon("the task's end", decide).await.unwrap();
        let stats = sink.stats();
        assert!(stats.received.packets > 0);
        assert_fields!(stats, lost.packets: 0, sent.gone_at_least: 0, held.in_flight: 0);
        stream.more(50).await;
    }
    let (sent, mut received) = stream.finish().await;
    received.sort_unstable();
    assert!(received.iter().copied().eq(0..sent), "of {sent} sent, {} have arrived", received.len());
}

async fn close_waits_for_owed_verdicts_with_the_rules_removed() {
    let mut queue = queue(rules()).bind().await.unwrap();
    let traffic = Traffic::new(20);
    let held = hold(&mut queue, &traffic, 0..5).await;
    let closing = tokio::spawn(queue.close());
    // No packet is sent to the queue any more, whatever the default action.
    let mut sent = 5;
    eventually("packets pass", || {
        traffic.send([sent]);
        sent += 1;
        traffic.delivered() == [sent - 1]
    })
    .await;
    assert!(table_exists() && !closing.is_finished());
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    soon("the shutdown", closing).await.unwrap().unwrap();
    assert_eq!((account(0), table_exists()), (None, false));
}

async fn a_dropped_queue_removes_rules_and_table_while_others_run() {
    let mut queue = queue(rules()).bind().await.unwrap();
    let traffic = Traffic::new(20);
    let held = hold(&mut queue, &traffic, 0..5).await;
    traffic.send(5..10);
    queued(0, 10);
    drop(queue);
    // It has not waited for these.
    assert!(table_exists());
    held.into_iter().for_each(|packet| packet.drop().submit().unwrap());
    freed(0).await;
    eventually("the table is gone", || !table_exists()).await;
    traffic.send(10..20);
    traffic.expect(5..20).await;
}

async fn rules_end_with_the_last_stream() {
    let queue = Queue::builder(0..=1).on_unanswered(Action::Accept).divert(rules()).bind().await.unwrap();
    let (packets, sink) = queue.split();
    let mut streams = packets.into_each();
    drop(streams.pop());
    freed(1).await;
    assert!(table_exists() && account(0).is_some() && !sink.is_closed());
    drop(streams);
    freed(0).await;
    eventually("the table is gone", || !table_exists()).await;
    assert!(sink.is_closed());
}

async fn a_close_that_is_not_awaited_goes_on() {
    let mut queue = queue(rules()).bind().await.unwrap();
    let traffic = Traffic::new(10);
    let held = hold(&mut queue, &traffic, 0..5).await;
    let sink = queue.sink();
    {
        let mut closing = pin!(sink.close());
        assert!(futures::poll!(&mut closing).is_pending());
    }
    eventually("the shutdown has begun", || sink.is_closed()).await;
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    freed(0).await;
    eventually("the table is gone", || !table_exists()).await;
    traffic.expect(0..5).await;
    // That of the stream has nothing left to do.
    drop(queue);
    soon("the shutdown", sink.close()).await.unwrap();
}

async fn two_clones_close_at_once() {
    for _ in 0..5 {
        let mut queue = queue(rules()).bind().await.unwrap();
        let traffic = Traffic::new(10);
        let held = hold(&mut queue, &traffic, 0..5).await;
        let (one, two) = (queue.sink(), queue.sink());
        let closing = [tokio::spawn(async move { one.close().await }), tokio::spawn(async move { two.close().await })];
        tokio::task::yield_now().await;
        held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
        for closing in closing {
            soon("the shutdown", closing).await.unwrap().unwrap();
            assert_eq!((account(0), table_exists()), (None, false));
        }
        traffic.expect(0..5).await;
        assert!(soon("the end", queue.next()).await.is_none());
        soon("the shutdown", queue.close()).await.unwrap();
    }
}

/// As soon as the close of a socket begins, its port id is free for a new socket. Later in the same
/// call (`netlink_release`), the kernel removes all queues and tables of this port id, also those
/// of the new socket.
async fn the_port_id_of_a_closed_socket_is_not_used_again() {
    let mut seen = HashSet::from([std::process::id()]);
    for _ in 0..many(20) {
        let queue = Queue::builder(0).divert(Divert::builder().rule(udp_in())).bind().await.unwrap();
        let divert = queue.divert().unwrap();
        // The name of a table contains the port id of its socket.
        let table = divert.table().rsplit('_').next().unwrap().parse().unwrap();
        for port in [queue.sink().kernel_stats().unwrap().port_id, table] {
            assert!(seen.insert(port), "{port}");
        }
        drop(divert);
        queue.close().await.unwrap();
    }
}

async fn a_time_out_of_close_is_returned_by_it() {
    for round in 0..10 {
        let mut queue = queue(rules()).bind().await.unwrap();
        let traffic = Traffic::new(10);
        let held = hold(&mut queue, &traffic, 0..3).await;
        let result = soon("the shutdown", queue.close_within(Duration::from_millis(round))).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut, "{round}");
        assert_eq!((account(0), table_exists()), (None, false));
        traffic.expect(0..3).await;
        drop(held);
    }
}

async fn close_after_the_rules_have_been_closed() {
    let mut queue = queue(rules()).bind().await.unwrap();
    let traffic = Traffic::new(2);
    traffic.send([0]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([0]).await;
    let divert = queue.divert().unwrap();
    divert.close().await.unwrap();
    assert!(!table_exists());
    assert!(divert.counters().await.is_err());
    soon("the shutdown", queue.close()).await.unwrap();
    divert.close().await.unwrap();
}

fn a_queue_is_dropped_outside_a_runtime() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let queue = runtime.block_on(async { queue(rules()).bind().await }).unwrap();
    drop(runtime);
    drop(queue);
    crate::support::wait_until("the table is gone", || !table_exists() && account(0).is_none());
}
