//! No packet is forgotten: whatever happens to its owner, it gets a verdict.

use std::{
    future::{Future, pending},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    time::{Duration, Instant},
};

use tokio::runtime::{Builder, Runtime};
use tokio_nfqueue::{Action, ErrorKind, Packet, Queue};

use crate::common::{self, DEADLINE, Traffic, eventually, hold, next, number, soon, start};

tests![
    both dropped_packets_get_the_default_action,
    both packets_of_dropped_verdicts_get_the_default_action,
    both dropped_detached_packets_get_the_default_action,
    both packets_of_a_panicking_task_get_the_default_action,
    both packets_of_an_aborted_task_get_the_default_action,
    both packets_dropped_in_another_thread_get_the_default_action,
    one packets_of_a_panicking_thread_get_the_default_action,
    one the_default_action_may_be_a_requeue,
    sync packets_of_a_runtime_that_shuts_down_get_the_default_action,
    sync packets_of_a_multi_thread_runtime_that_shuts_down_get_the_default_action,
    sync packets_that_outlive_the_runtime_can_be_decided,
    both a_deadline_accepts_packets,
    both a_deadline_drops_packets,
    one a_deadline_does_not_change_earlier_verdicts,
    one a_deadline_is_kept_for_packets_that_arrived_at_different_times,
    both a_deadline_is_kept_when_nobody_polls,
    one a_late_verdict_is_reported,
];

const COUNT: u32 = 50;

/// Holds packets, calls `happen` with them, and checks that all have got the default action.
async fn check_default_action<F: Future<Output = ()>>(happen: impl Fn(Vec<Packet>) -> F) {
    for action in [Action::Accept, Action::Drop] {
        // `Drop` is the default.
        let builder = Queue::builder(0);
        let builder = if action == Action::Accept { builder.on_unanswered(action) } else { builder };
        let (mut queue, _divert) = start(builder);
        let traffic = Traffic::new(COUNT);
        let packets = hold(&mut queue, &traffic, 0..COUNT).await;
        traffic.expect_nothing();
        happen(packets).await;
        all_decided(&queue, &traffic, action).await;
        assert_eq!(queue.stats().decided.unanswered, u64::from(COUNT));

        // The queue still works.
        let packet = hold(&mut queue, &traffic, [COUNT]).await.remove(0);
        packet.accept().submit().unwrap();
        traffic.expect([COUNT]).await;
        drop(queue);
        common::freed(0).await;
    }
}

async fn all_decided(queue: &Queue, traffic: &Traffic, action: Action) {
    eventually("all packets are decided", || queue.stats().held.in_flight == 0).await;
    queue.sink().flush().await;
    match action {
        Action::Accept => traffic.expect(0..COUNT).await,
        _ => traffic.expect_nothing(),
    }
    assert_eq!(common::account(0).unwrap().waiting, 0);
}

async fn dropped_packets_get_the_default_action() {
    check_default_action(async |packets| drop(packets)).await;
}

async fn packets_of_dropped_verdicts_get_the_default_action() {
    // The actions of dropped verdicts do not count.
    let decide = |(index, packet): (usize, Packet)| if index % 2 == 0 { packet.accept() } else { packet.drop() };
    check_default_action(async |packets| drop(packets.into_iter().enumerate().map(decide).collect::<Vec<_>>())).await;
}

async fn dropped_detached_packets_get_the_default_action() {
    check_default_action(async |packets| drop(packets.into_iter().map(Packet::detach).collect::<Vec<_>>())).await;
}

async fn packets_of_a_panicking_task_get_the_default_action() {
    check_default_action(async |packets| {
        let task = tokio::spawn(async move {
            tokio::task::yield_now().await;
            let _packets = packets;
            quiet_panic();
        });
        assert!(soon("the panic", task).await.unwrap_err().is_panic());
    })
    .await;
}

async fn packets_of_an_aborted_task_get_the_default_action() {
    check_default_action(async |packets| {
        let (started, running) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let _packets = packets;
            started.send(()).unwrap();
            pending::<()>().await;
        });
        soon("the task", running).await.unwrap();
        task.abort();
        assert!(soon("the abort", task).await.unwrap_err().is_cancelled());
    })
    .await;
}

async fn packets_dropped_in_another_thread_get_the_default_action() {
    check_default_action(async |packets| std::thread::spawn(move || drop(packets)).join().unwrap()).await;
}

async fn packets_of_a_panicking_thread_get_the_default_action() {
    check_default_action(async |packets| {
        let unwound = move || {
            let _packets = packets;
            quiet_panic();
        };
        std::thread::spawn(|| catch_unwind(AssertUnwindSafe(unwound)).unwrap_err()).join().unwrap();
    })
    .await;
}

/// Unwinds without printing a message.
fn quiet_panic() {
    std::panic::resume_unwind(Box::new("as intended"));
}

async fn the_default_action_may_be_a_requeue() {
    let (mut queue, _divert) = start(Queue::builder(0).on_unanswered(Action::Requeue { queue: 1, bypass: false }));
    let mut other = Queue::builder(1).bind().await.unwrap();
    let traffic = Traffic::new(COUNT);
    drop(hold(&mut queue, &traffic, 0..COUNT).await);
    for expected in 0..COUNT {
        let packet = next(&mut other).await;
        assert_eq!(number(&packet), expected);
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..COUNT).await;
}

fn packets_of_a_runtime_that_shuts_down_get_the_default_action() {
    shut_down(|| Builder::new_current_thread().enable_all().build().unwrap());
}

fn packets_of_a_multi_thread_runtime_that_shuts_down_get_the_default_action() {
    shut_down(|| Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap());
}

/// The receivers belong to another runtime than the one that ends; the rules belong to none.
fn shut_down(runtime: impl Fn() -> Runtime) {
    let outside = Builder::new_current_thread().enable_all().build().unwrap();
    for action in [Action::Accept, Action::Drop] {
        let traffic = outside.block_on(async { Traffic::new(COUNT) });
        let inside = runtime();
        let (mut queue, divert) = inside.block_on(async { start(Queue::builder(0).on_unanswered(action)) });
        inside.block_on(async {
            let (started, running) = mpsc::channel();
            for packet in hold(&mut queue, &traffic, 0..COUNT).await {
                let started = started.clone();
                tokio::spawn(async move {
                    let _packet = packet;
                    started.send(()).unwrap();
                    pending::<()>().await;
                });
            }
            let mut count = 0;
            let mut all_run = || {
                count += running.try_iter().count();
                count == COUNT as usize
            };
            eventually("all tasks run", &mut all_run).await;
        });
        // A task owns the stream as well.
        inside.spawn(async move {
            let _queue = queue;
            pending::<()>().await;
        });
        drop(inside);
        match action {
            Action::Accept => outside.block_on(traffic.expect(0..COUNT)),
            _ => traffic.expect_nothing(),
        }
        // Everything is gone, and with it the queue.
        outside.block_on(common::freed(0));
        drop(divert);
    }
}

fn packets_that_outlive_the_runtime_can_be_decided() {
    let outside = Builder::new_current_thread().enable_all().build().unwrap();
    let traffic = outside.block_on(async { Traffic::new(COUNT) });
    let inside = Builder::new_current_thread().enable_all().build().unwrap();
    let (mut queue, divert) = inside.block_on(async { start(Queue::builder(0).on_unanswered(Action::Accept)) });
    let mut packets = inside.block_on(hold(&mut queue, &traffic, 0..COUNT));
    drop(inside);

    // Without a driver task, verdicts are sent at once.
    let sink = queue.sink();
    packets.remove(0).accept().submit().unwrap();
    outside.block_on(traffic.expect([0]));
    packets.remove(0).drop().submit().unwrap();
    outside.block_on(soon("the reply of the kernel", packets.remove(0).accept().confirm())).unwrap();
    outside.block_on(traffic.expect([2]));
    drop(packets.split_off(20));
    outside.block_on(traffic.expect(23..COUNT));

    let error = outside.block_on(soon("the end of the stream", queue.recv())).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoRuntime);
    assert!(outside.block_on(soon("the end of the stream", queue.recv())).is_none());
    drop((queue, sink));
    assert!(common::account(0).is_some(), "packets keep the queue");
    drop(packets);
    outside.block_on(traffic.expect(3..23));
    outside.block_on(common::freed(0));
    drop(divert);
}

async fn a_deadline_accepts_packets() {
    deadline(Action::Accept).await;
}

async fn a_deadline_drops_packets() {
    deadline(Action::Drop).await;
}

async fn deadline(action: Action) {
    let opposite = if action == Action::Accept { Action::Drop } else { Action::Accept };
    let (mut queue, _divert) = start(Queue::builder(0).deadline(DEADLINE, action).on_unanswered(opposite));
    let traffic = Traffic::new(COUNT);
    let before = Instant::now();
    let packets = hold(&mut queue, &traffic, 0..COUNT).await;
    eventually("the deadline", || queue.stats().decided.expired > 0).await;
    assert!(before.elapsed() >= DEADLINE, "not before");
    all_decided(&queue, &traffic, action).await;
    assert_eq!((queue.stats().decided.expired, queue.stats().decided.unanswered), (COUNT.into(), 0));

    drop(packets);
    queue.sink().flush().await;
    traffic.expect_nothing();
    assert_eq!(queue.stats().decided.unanswered, 0, "the deadline has decided them");
}

async fn a_deadline_does_not_change_earlier_verdicts() {
    let (mut queue, _divert) = start(Queue::builder(0).deadline(DEADLINE, Action::Accept));
    let traffic = Traffic::new(COUNT);
    let mut late = Vec::new();
    for packet in hold(&mut queue, &traffic, 0..COUNT).await {
        if number(&packet).is_multiple_of(5) {
            late.push(packet);
        } else {
            // On a slow machine some of these may be late as well.
            let _ = packet.drop().submit();
        }
    }
    eventually("the deadline", || queue.stats().held.in_flight == 0).await;
    queue.sink().flush().await;
    let delivered = traffic.delivered();
    assert_eq!(delivered.len() as u64, queue.stats().decided.expired);
    assert!((0..COUNT).step_by(5).all(|number| delivered.contains(&number)), "{delivered:?}");
    assert_eq!(queue.stats().decided.dropped + queue.stats().decided.expired, u64::from(COUNT));
}

async fn a_deadline_is_kept_for_packets_that_arrived_at_different_times() {
    let (mut queue, _divert) = start(Queue::builder(0).deadline(DEADLINE, Action::Accept));
    let traffic = Traffic::new(COUNT);
    let mut packets = Vec::new();
    for index in 0..COUNT {
        packets.append(&mut hold(&mut queue, &traffic, [index]).await);
        // Some arrive together, some do not.
        tokio::time::sleep(Duration::from_millis(u64::from(index % 3))).await;
    }
    traffic.expect(0..COUNT).await;
    assert_eq!(queue.stats().decided.expired, u64::from(COUNT));
}

async fn a_deadline_is_kept_when_nobody_polls() {
    let (mut queue, _divert) = start(Queue::builder(0).deadline(DEADLINE, Action::Accept));
    let traffic = Traffic::new(COUNT + 101);
    let first = hold(&mut queue, &traffic, 0..COUNT).await;
    traffic.expect(0..COUNT).await;
    drop(first);
    // Unread packets have deadlines too: the program has stopped polling.
    traffic.send(COUNT..COUNT + 100);
    traffic.expect(COUNT..COUNT + 100).await;
    assert_eq!(queue.stats().decided.expired, u64::from(COUNT) + 100);
    // Packets that a deadline has decided are not handed out.
    traffic.send([COUNT + 100]);
    let packet = next(&mut queue).await;
    assert_eq!(number(&packet), COUNT + 100);
    assert!(!packet.is_expired());
    eventually("the deadline", || packet.is_expired()).await;
}

async fn a_late_verdict_is_reported() {
    let (mut queue, _divert) = start(Queue::builder(0).deadline(DEADLINE, Action::Drop));
    let traffic = Traffic::new(4);
    let packets = hold(&mut queue, &traffic, 0..4).await;
    eventually("the deadline", || queue.stats().decided.expired == 4).await;
    let sink = queue.sink();
    let mut refusals = sink.refusals();
    for (index, packet) in packets.into_iter().enumerate() {
        let id = packet.id();
        assert!(packet.is_expired());
        let result = match index {
            0 => packet.accept().submit(),
            1 => Err(soon("the reply", packet.accept().confirm()).await.unwrap_err()),
            2 => packet.detach().accept().submit(),
            _ => packet.accept().mark(1).submit(),
        };
        let error = match result {
            Ok(()) => soon("the refusal", refusals.recv()).await.unwrap(),
            Err(error) => error,
        };
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::Expired, Some(id)), "{error}");
    }
    sink.flush().await;
    traffic.expect_nothing();
    assert_eq!((sink.stats().decided.late, sink.stats().sent.gone_at_least, sink.stats().held.in_flight), (4, 0, 0));
}
