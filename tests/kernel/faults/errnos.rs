//! Errors that a socket can report, and ids at their limit, in a simulated kernel.

use std::{net::SocketAddr, time::Duration};

use futures::FutureExt;
use tokio_nfqueue::{
    Action, Packet, PacketId, Queue,
    simulated::{self, Cause, Kernel, Sent, TestPacket},
};

use crate::common::{Random, next, soon};

tests![
    one every_errno_of_a_send_ends_the_queue_with_a_reason_or_costs_nothing,
    one every_errno_of_a_receive_ends_the_queue_with_a_reason_or_costs_nothing,
    both ids_beyond_the_largest_are_decided_in_any_order,
    one losses_across_the_largest_id_are_counted_exactly,
];

/// The errnos of Linux: EHWPOISON is the last one.
const ERRNOS: std::ops::RangeInclusive<i32> = 1..=133;
const COUNT: usize = 20;
/// How often in a row a system call fails.
const TIMES: [usize; 3] = [1, 5, 40];

fn packets(count: usize) -> impl Iterator<Item = TestPacket> {
    let [from, to] = ["10.0.0.1:1000", "10.0.0.2:2000"].map(|address| address.parse::<SocketAddr>().unwrap());
    (0..count as u32).map(move |number| TestPacket::udp(from, to, &number.to_be_bytes()))
}

/// What a fault has led to.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The stream ended with the errno.
    Reason,
    /// The queue continues. The kernel has got this number of verdicts as they were submitted.
    GoesOn(usize),
}

/// A queue in which `inject` makes `times` system calls fail, while it has owed verdicts, and
/// unread packets.
async fn suffer(errno: i32, times: usize, inject: fn(&Kernel, i32, usize)) -> End {
    let (kernel, mut queue) = simulated::queue(Queue::builder(0).close_timeout(Duration::from_millis(1))).unwrap();
    let mut refusals = queue.sink().refusals();
    let mut sent = kernel.send_all(packets(COUNT));
    let mut held = Vec::new();
    for _ in 0..COUNT {
        held.push(next(&mut queue).await);
    }
    sent.extend(kernel.send_all(packets(COUNT)));
    let mut random = Random::new(errno as u64);
    random.shuffle(&mut held);
    inject(&kernel, errno, times);
    let confirmed = held.pop().unwrap();
    let unconfirmed = confirmed.id();
    let confirm = tokio::spawn(confirmed.decide(wanted(unconfirmed)).confirm());
    held.into_iter().for_each(decide);
    let mut end = None;
    let what = format!("packets or outcomes, errno {errno}, {times} times");
    while end.is_none() && sent.iter().any(Sent::is_waiting) {
        tokio::select! {
            biased;
            item = soon(&what, queue.recv()) => match item.expect("a reason before the end") {
                Ok(packet) => decide(packet),
                Err(error) => end = Some(error),
            },
            // A verdict that was refused is followed by the default action.
            () = soon(&what, async { for sent in &sent { sent.outcome().await; } }) => {}
        }
    }
    if let (None, Some(Some(Err(error)))) = (&end, queue.recv().now_or_never()) {
        // Later attempts succeeded before the stream was asked.
        end = Some(error);
    }
    let ended = end.is_some();
    if let Some(error) = end {
        assert_eq!(error.raw_os_error(), Some(errno), "{error}");
        assert!(soon("the end", queue.recv()).await.is_none(), "the reason is the last item");
    }
    let closed = soon(&format!("the shutdown, {what}"), queue.close()).await;
    let confirmation = soon(&format!("the confirmation, {what}"), confirm).await.unwrap();
    assert!(ended || closed.is_ok(), "errno {errno}: {closed:?}");
    let mut refused: Vec<PacketId> =
        std::iter::from_fn(|| refusals.recv().now_or_never().flatten()).filter_map(|error| error.packet_id()).collect();
    refused.extend(confirmation.err().map(|_| unconfirmed));
    // If not even unbinding was possible, the kernel drops what is queued when the socket is
    // closed.
    drop(refusals);
    let mut as_wanted = 0;
    for sent in sent {
        let outcome = soon("the outcome", sent.outcome()).await;
        let id = outcome.id.expect("it was queued");
        assert!(outcome.verdicts <= 1, "errno {errno}, decided twice: {outcome:?}");
        match outcome.action {
            Some(action) if action == wanted(id) => as_wanted += 1,
            // The default action.
            Some(action) => {
                assert!(action == Action::Drop && (ended || refused.contains(&id)), "errno {errno}: {outcome:?}")
            }
            None => assert!(ended && outcome.cause == Cause::Unbound, "errno {errno}: {outcome:?}"),
        }
    }
    if ended { End::Reason } else { End::GoesOn(as_wanted) }
}

fn wanted(id: PacketId) -> Action {
    if id.get().is_multiple_of(3) { Action::Drop } else { Action::Accept }
}

fn decide(packet: Packet) {
    let action = wanted(packet.id());
    packet.decide(action).submit().unwrap();
}

/// EINTR, EAGAIN, ENOMEM, ENOBUFS: the next attempt may succeed.
const TEMPORARY: [i32; 4] = [4, 11, 12, 105];

async fn every_errno_of_a_send_ends_the_queue_with_a_reason_or_costs_nothing() {
    const EPERM: i32 = 1;
    const EMSGSIZE: i32 = 90;
    for errno in ERRNOS {
        for times in TIMES {
            let end = suffer(errno, times, Kernel::fail_sends).await;
            match (errno, end) {
                // These verdicts are refused, and the packets get the default action.
                (EPERM | EMSGSIZE, End::GoesOn(_)) => {}
                (_, End::GoesOn(decided)) if TEMPORARY.contains(&errno) => assert_eq!(decided, 2 * COUNT, "{errno}"),
                (_, End::Reason) if !TEMPORARY.contains(&errno) && errno != EMSGSIZE => {}
                (_, end) => panic!("errno {errno}, {times} times: {end:?}"),
            }
        }
    }
}

async fn every_errno_of_a_receive_ends_the_queue_with_a_reason_or_costs_nothing() {
    // For a receive, ENOMEM is no reason that passes. EAGAIN says, falsely here, that the socket is
    // empty.
    const ENOMEM: i32 = 12;
    for errno in ERRNOS {
        for times in TIMES {
            let end = suffer(errno, times, Kernel::fail_receives).await;
            let is_temporary = TEMPORARY.contains(&errno) && errno != ENOMEM;
            match end {
                // The thread that sends verdicts also receives, to make room, and leaves errors to
                // others. So a few errors may not reach the stream.
                End::GoesOn(decided) if is_temporary || times < 40 => assert_eq!(decided, 2 * COUNT, "{errno}"),
                End::Reason if !is_temporary => {}
                end => panic!("errno {errno}, {times} times: {end:?}"),
            }
        }
    }
}

async fn ids_beyond_the_largest_are_decided_in_any_order() {
    const PACKETS: usize = 3000;
    let kernel = Kernel::new();
    kernel.start_ids_at(u32::MAX - 1000);
    let mut queue = kernel.bind(Queue::builder(0).max_len(4000)).unwrap();
    let sent = kernel.send_all(packets(PACKETS));
    let mut random = Random::new(32);
    let mut held = Vec::new();
    for _ in 0..PACKETS {
        held.push(next(&mut queue).await);
        if held.len() > 700 {
            decide(held.swap_remove(random.below(700)));
        }
    }
    random.shuffle(&mut held);
    held.into_iter().for_each(decide);
    queue.sink().flush().await;
    for sent in sent {
        let outcome = sent.try_outcome().expect("it is decided");
        assert_eq!((outcome.action, outcome.verdicts), (Some(wanted(outcome.id.unwrap())), 1));
    }
    let (stats, last_id) = (queue.stats(), queue.sink().kernel_stats().unwrap().last_id);
    assert_fields!(stats, received.packets: PACKETS as u64, lost.packets: 0, sent.gone_at_least: 0, held.in_flight: 0);
    assert_eq!(last_id, 1998);
}

async fn losses_across_the_largest_id_are_counted_exactly() {
    let kernel = Kernel::new();
    kernel.start_ids_at(u32::MAX - 100);
    let mut queue = kernel.bind(Queue::builder(0).max_len(4000).receive_buffer(40_000)).unwrap();
    let mut sent = kernel.send_all(packets(500));
    let lost = u64::from(queue.sink().kernel_stats().unwrap().dropped_socket);
    assert!(lost > 300, "the gap begins before the largest id, and ends behind it: {lost}");
    let first = next(&mut queue).await;
    let mut held = vec![first];
    sent.extend(kernel.send_all(packets(1)));
    while held.len() < 501 - lost as usize {
        held.push(next(&mut queue).await);
    }
    held.into_iter().for_each(decide);
    queue.sink().flush().await;
    assert!(sent.iter().all(|sent| !sent.is_waiting()));
    let stats = queue.stats();
    assert_fields!(stats, lost.packets: lost, received.packets: 501 - lost, sent.gone_at_least: 0, held.in_flight: 0);
}
