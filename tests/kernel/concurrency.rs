//! Many tasks, threads and packets: each packet is decided once, as its owner decided.

use std::{
    future::ready,
    time::{Duration, Instant},
};

use futures::StreamExt;
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::mpsc,
};
use tokio_nfqueue::{FlushPolicy, Packet, Queue, Verdict, VerdictSink, flush::FlushDecision};

use crate::common::{Load, Random, Traffic, account, eventually, hold, many, next, number, soon, start};

tests![
    both eight_tasks_decide_each_packet_once_with_the_default_policy,
    both eight_tasks_decide_each_packet_once_with_the_immediate_policy,
    both eight_tasks_decide_each_packet_once_with_a_fixed_policy,
    both eight_tasks_decide_each_packet_once_with_a_custom_policy,
    both confirm_resolves_in_eight_tasks,
    multi verdicts_are_submitted_in_threads_without_a_runtime,
    both a_packet_that_arrives_while_the_socket_is_found_empty_is_received,
    both recv_is_cancel_safe,
    both recv_many_is_cancel_safe,
    both recv_many_keeps_its_limit,
    both a_busy_polling_stream_lets_other_tasks_run,
    sync a_busy_polling_stream_is_woken_after_block_on_has_returned,
];

async fn eight_tasks_decide_each_packet_once_with_the_default_policy() {
    eight_sinks(FlushPolicy::default(), many(20_000)).await;
}

async fn eight_tasks_decide_each_packet_once_with_the_immediate_policy() {
    eight_sinks(FlushPolicy::immediate(), many(5000)).await;
}

async fn eight_tasks_decide_each_packet_once_with_a_fixed_policy() {
    eight_sinks(FlushPolicy::fixed(20, Duration::from_micros(300)), many(5000)).await;
}

async fn eight_tasks_decide_each_packet_once_with_a_custom_policy() {
    let mut random = Random::new(5);
    let moody = FlushPolicy::custom(move |context| match random.below(4) {
        0 if context.gathered > 3 => FlushDecision::Now,
        1 => FlushDecision::AfterReadyTasks,
        2 if context.waited > Duration::from_millis(1) => FlushDecision::Now,
        mood => FlushDecision::Within(Duration::from_micros(mood as u64 * 100)),
    });
    eight_sinks(moody, many(5000)).await;
}

async fn eight_sinks(policy: FlushPolicy, count: u32) {
    let (queue, _divert) = start(Queue::builder(0).flush_policy(policy));
    let load = Load::start(count);
    let (mut packets, sink) = queue.split();
    let mut channels = Vec::new();
    let mut tasks = Vec::new();
    for seed in 0..8 {
        let (channel, inbox) = mpsc::unbounded_channel();
        channels.push(channel);
        tasks.push(tokio::spawn(decide_at_random(inbox, sink.clone(), load.decide(), Random::new(seed))));
    }
    let reader = tokio::spawn(async move {
        let mut random = Random::new(99);
        for _ in 0..count {
            let packet = next(&mut packets).await;
            channels[random.below(8)].send(packet).unwrap();
        }
        packets
    });
    load.finish(count).await;
    let packets = soon("the reader", reader).await.unwrap();
    for task in tasks {
        soon("a task", task).await.unwrap();
    }
    soon("the flush", sink.flush()).await;

    let stats = sink.stats();
    assert_fields!(stats, received.packets: u64::from(count), held.in_flight: 0);
    assert_eq!((stats.decided.accepted + stats.decided.dropped, stats.decided.unanswered), (count.into(), 0));
    assert_fields!(stats, lost.packets: 0, sent.gone_at_least: 0, decided.late: 0, sent.refused: 0, received.malformed: 0);
    assert_eq!(account(0).unwrap().waiting, 0);
    drop(packets);
}

/// Holds packets for random times, and decides them in random order.
async fn decide_at_random(
    mut inbox: mpsc::UnboundedReceiver<Packet>,
    sink: VerdictSink,
    decide: impl Fn(Packet) -> Verdict,
    mut random: Random,
) {
    let mut held = Vec::new();
    loop {
        let packet = if held.is_empty() {
            inbox.recv().await
        } else {
            match tokio::time::timeout(Duration::from_millis(1), inbox.recv()).await {
                Ok(packet) => packet,
                Err(_) => {
                    decide(held.swap_remove(random.below(held.len()))).submit().unwrap();
                    continue;
                }
            }
        };
        match packet {
            Some(packet) => held.push(packet),
            None => break,
        }
        while held.len() > random.below(20) {
            decide(held.swap_remove(random.below(held.len()))).submit().unwrap();
        }
        match random.below(50) {
            0 => tokio::time::sleep(Duration::from_millis(1)).await,
            1..10 => tokio::task::yield_now().await,
            10 => sink.flush().await,
            _ => {}
        }
    }
    for packet in held {
        decide(packet).submit().unwrap();
    }
}

async fn confirm_resolves_in_eight_tasks() {
    const COUNT: u32 = many(3000);
    let (queue, _divert) = start(Queue::builder(0));
    let load = Load::start(COUNT);
    let (mut packets, sink) = queue.split();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (channel, mut inbox) = mpsc::unbounded_channel();
            let decide = load.decide();
            let task = tokio::spawn(async move {
                while let Some(packet) = inbox.recv().await {
                    soon("the reply", decide(packet).confirm()).await.unwrap();
                }
            });
            (channel, task)
        })
        .collect();
    for index in 0..COUNT as usize {
        tasks[index % 8].0.send(next(&mut packets).await).unwrap();
    }
    for (channel, task) in tasks {
        drop(channel);
        soon("a task", task).await.unwrap();
    }
    load.finish(COUNT).await;
    assert_eq!((sink.stats().sent.gone_at_least, sink.stats().held.in_flight), (0, 0));
}

async fn verdicts_are_submitted_in_threads_without_a_runtime() {
    const COUNT: u32 = many(5000);
    let (queue, _divert) = start(Queue::builder(0));
    let load = Load::start(COUNT);
    let (mut packets, sink) = queue.split();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (channel, inbox) = std::sync::mpsc::channel();
            let decide = load.decide();
            let thread = std::thread::spawn(move || {
                for packet in inbox {
                    decide(packet).submit().unwrap();
                }
            });
            (channel, thread)
        })
        .collect();
    for index in 0..COUNT as usize {
        threads[index % 4].0.send(next(&mut packets).await).unwrap();
    }
    for (channel, thread) in threads {
        drop(channel);
        thread.join().unwrap();
    }
    load.finish(COUNT).await;
    assert_eq!((sink.stats().sent.gone_at_least, sink.stats().decided.late, sink.stats().lost.packets), (0, 0, 0));
}

/// The call that receives the last packet finds the socket empty, and Tokio is told so later.
async fn a_packet_that_arrives_while_the_socket_is_found_empty_is_received() {
    const PAIRS: u32 = many(4000);
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    let (decided, wait) = std::sync::mpsc::channel::<()>();
    let sender = std::thread::spawn({
        let (socket, to) = (traffic.sender.try_clone().unwrap(), traffic.to(0));
        move || {
            for pair in 0..PAIRS {
                let gap = Duration::from_micros(u64::from(pair % 80));
                socket.send_to(&pair.to_be_bytes(), to).unwrap();
                let first = Instant::now();
                while first.elapsed() < gap {}
                socket.send_to(&pair.to_be_bytes(), to).unwrap();
                if wait.recv().is_err() {
                    return;
                }
            }
        }
    });
    for pair in 0..PAIRS {
        for _ in 0..2 {
            let packet = next(&mut queue).await;
            assert_eq!(number(&packet), pair);
            packet.drop().submit().unwrap();
        }
        decided.send(()).unwrap();
    }
    sender.join().unwrap();
}

async fn recv_is_cancel_safe() {
    const COUNT: u32 = many(5000);
    let (mut queue, _divert) = start(Queue::builder(0));
    let load = Load::start(COUNT);
    let decide = load.decide();
    let sink = queue.sink();
    let (mut received, mut cancelled) = (0_u32, 0_u32);
    while received < COUNT {
        tokio::select! {
            packet = queue.recv() => {
                let packet = packet.unwrap().unwrap();
                // By id, because packets may overtake each other on their way to the queue.
                assert_eq!(packet.id().get(), received + 1, "none is missing");
                received += 1;
                decide(packet).submit().unwrap();
            }
            () = ready(()) => {
                cancelled += 1;
                if cancelled % 8 == 0 {
                    // Otherwise this task would never let the runtime check for I/O.
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    load.finish(COUNT).await;
    assert!(cancelled > 0);
    assert_eq!((sink.stats().decided.unanswered, sink.stats().lost.packets), (0, 0));
}

async fn recv_many_is_cancel_safe() {
    const COUNT: u32 = many(5000);
    let (mut queue, _divert) = start(Queue::builder(0));
    let load = Load::start(COUNT);
    let decide = load.decide();
    let sink = queue.sink();
    let mut packets = Vec::new();
    let (mut received, mut cancelled) = (0, 0_u32);
    while received < COUNT {
        tokio::select! {
            count = queue.recv_many(&mut packets, 7) => assert_eq!(count.unwrap(), packets.len()),
            () = ready(()) => {
                assert!(packets.is_empty(), "a cancelled call has taken nothing");
                cancelled += 1;
                if cancelled % 8 == 0 {
                    tokio::task::yield_now().await;
                }
            }
        }
        for packet in packets.drain(..) {
            assert_eq!(packet.id().get(), received + 1);
            received += 1;
            decide(packet).submit().unwrap();
        }
    }
    load.finish(COUNT).await;
    assert_eq!(sink.stats().decided.unanswered, 0);
}

/// A task in the same runtime that sends the next packet after the last has arrived must not wait
/// for the stream's busy polling.
async fn a_busy_polling_stream_lets_other_tasks_run() {
    const ROUNDS: u32 = 3000;
    let (mut queue, _divert) = start(Queue::builder(0).busy_poll(Duration::from_millis(1)));
    let there = tokio::net::UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
    let here = tokio::net::UdpSocket::bind(("127.0.0.1", 0)).await.unwrap();
    let address = there.local_addr().unwrap();
    let decided = tokio::spawn(async move {
        let mut dry = 0_u32;
        for _ in 0..ROUNDS {
            let packet = std::future::poll_fn(|cx| {
                let polled = queue.poll_next_unpin(cx);
                dry += u32::from(polled.is_pending());
                polled
            });
            let packet = packet.await.unwrap().unwrap();
            packet.accept().submit().unwrap();
        }
        dry
    });
    let play = async {
        for round in 0..ROUNDS {
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
            here.send_to(&round.to_be_bytes(), address).await.unwrap();
            let mut datagram = [0; 4];
            there.recv(&mut datagram).await.unwrap();
            assert_eq!(u32::from_be_bytes(datagram), round);
        }
    };
    let begun = Instant::now();
    soon("the game's end", play).await;
    // With two workers each packet wakes a thread. If that takes a millisecond, the stream sleeps.
    let follow_closely = begun.elapsed() < Duration::from_micros(250) * ROUNDS;
    let dry = soon("the verdicts", decided).await.unwrap();
    // A sleeping stream would have been polled in vain at most once for each packet.
    if follow_closely || Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
        assert!(dry > 2 * ROUNDS, "it slept: {dry} polls found nothing");
    }
}

/// A set of streams polls only streams that have been woken. The runtime may lose a request to be
/// polled again when `block_on` returns, so that request must not be the only wake-up.
fn a_busy_polling_stream_is_woken_after_block_on_has_returned() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let (queue, _divert) = start(Queue::builder(0).busy_poll(Duration::from_millis(1)));
    let mut set = futures::stream::select_all([queue]);
    let traffic = Traffic::new(1);
    for round in 0..100 {
        // The queue is empty; after this poll the stream has decided whether it busy-polls.
        runtime.block_on(std::future::poll_fn(|cx| {
            assert!(set.poll_next_unpin(cx).is_pending(), "{round}");
            std::task::Poll::Ready(())
        }));
        traffic.send([round]);
        let packet = runtime.block_on(soon("the packet", set.next())).unwrap().unwrap();
        assert_eq!(number(&packet), round);
        packet.accept().submit().unwrap();
        runtime.block_on(traffic.expect([round]));
    }
}

async fn recv_many_keeps_its_limit() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(200);
    let mut packets = Vec::new();
    assert_eq!(soon("nothing", queue.recv_many(&mut packets, 0)).await.unwrap(), 0);
    traffic.send(0..100);
    eventually("all are queued", || account(0).unwrap().waiting == 100).await;
    for limit in [1, 2, 10, 64, 1000] {
        let before = packets.len();
        let count = soon("packets", queue.recv_many(&mut packets, limit)).await.unwrap();
        assert!((1..=limit).contains(&count));
        assert_eq!(packets.len(), before + count, "appended");
    }
    // Packets that have been received are returned up to the limit.
    assert!(packets.len() >= 64);
    while packets.len() < 100 {
        soon("packets", queue.recv_many(&mut packets, 1000)).await.unwrap();
    }
    assert!(packets.iter().map(number).eq(0..100));
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..100).await;
    // The same, mixed with single receives.
    traffic.send(100..110);
    let mut packets = vec![next(&mut queue).await];
    packets.push(queue.next().await.unwrap().unwrap());
    while packets.len() < 10 {
        soon("packets", queue.recv_many(&mut packets, 3)).await.unwrap();
    }
    assert!(packets.iter().map(number).eq(100..110));
    drop(hold(&mut queue, &traffic, [150]).await);
}
