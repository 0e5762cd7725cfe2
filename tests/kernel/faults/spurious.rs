//! EAGAIN from a receive although packets wait in the socket.
//!
//! The kernel does not do this: `__skb_try_recv_datagram` returns EAGAIN only after it has found
//! the receive queue empty under the lock of that queue, under which `netlink_sendskb` appends a
//! message, and each message that is appended is an event for epoll (`sk_data_ready`). If
//! `recvmmsg` returns fewer messages than it was asked for, the socket was empty as well:
//! `do_recvmmsg` keeps any other error for the next call. So the crate may wait for the next event
//! after EAGAIN, and after a short count.
//!
//! A seccomp filter, or a kernel with a mistake, can lie. Registered as edge-triggered, the socket
//! then causes no event before the next message. These tests show that the lie costs nothing but
//! time: the packets wait at most until the next packet, a confirmation, the deadline, a
//! `try_recv` or the end of the queue, and none is lost.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use futures::FutureExt;
use nix::libc::{self, EAGAIN};
use tokio_nfqueue::{Action, Packet, Queue, QueueBuilder, TryRecvError};

use super::{
    process::{in_a_process, in_runtime},
    seccomp::RECVMMSG,
};
use crate::{
    common::{DEADLINE, Traffic, account, descriptor_of, divert, eventually, freed, next, number, soon, udp_in},
    support,
};

tests![
    sync packets_behind_a_false_eagain_wait_at_most_for_the_next_event,
    sync packets_behind_a_false_eagain_are_decided_by_their_deadline,
    sync with_a_deadline_the_timer_hands_over_packets_behind_a_false_eagain,
];

/// How the modes of these processes begin. A thread can have one such filter.
pub(super) const MODE: &str = "false eagain";

fn packets_behind_a_false_eagain_wait_at_most_for_the_next_event() {
    deceived("event");
}

fn packets_behind_a_false_eagain_are_decided_by_their_deadline() {
    deceived("deadline");
}

fn with_a_deadline_the_timer_hands_over_packets_behind_a_false_eagain() {
    deceived("timer");
}

fn deceived(mode: &str) {
    if cfg!(target_arch = "x86") {
        return eprintln!("not tried: the call is `socketcall`, whose descriptor a filter does not see");
    }
    in_a_process(&format!("{MODE} {mode}"));
}

pub(super) fn child(mode: &str) {
    match mode.strip_prefix(MODE).map(str::trim) {
        Some("event") => in_runtime(events()),
        Some("deadline") => in_runtime(deadline()),
        Some("timer") => in_runtime(timer()),
        _ => panic!("{mode:?}"),
    }
}

/// A queue whose receives say EAGAIN when the test wants it.
struct Liar {
    queue: Queue,
    lies: Arc<AtomicUsize>,
}

impl Liar {
    /// The queue's socket is registered with the runtime, and was found empty.
    async fn new(builder: QueueBuilder) -> Self {
        let mut queue = builder.bind().await.unwrap();
        let lies = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&lies);
        let answer = move || left.try_update(SeqCst, SeqCst, |left| left.checked_sub(1)).ok().map(|_| EAGAIN);
        support::answer_calls([RECVMMSG, libc::SYS_recvfrom], descriptor_of(0), answer).unwrap();
        assert!(queue.recv().now_or_never().is_none());
        Self { queue, lies }
    }

    /// Sends packets, and lets the stream find the socket empty, falsely; `times` receives will be
    /// denied. Returns the packets that have come nevertheless: the timer may have read them.
    async fn deceive(&mut self, traffic: &Traffic, numbers: Range<u32>, times: usize) -> Vec<Packet> {
        self.prove_verdicts().await;
        self.lies.store(times, SeqCst);
        traffic.send(numbers);
        let mut come = Vec::new();
        // The first lie clears the readiness: a further one is for the receive that the next packet
        // causes.
        while self.lies.load(SeqCst) == times && come.is_empty() {
            come.extend(self.queue.recv().now_or_never().map(|item| item.unwrap().unwrap()));
            tokio::task::yield_now().await;
        }
        come
    }

    /// The socket is found empty, which proves the verdicts before: for that alone the timer thread
    /// would read it soon.
    async fn prove_verdicts(&mut self) {
        // The runtime notices old events, and `recv` clears them.
        tokio::task::yield_now().await;
        assert!(self.queue.recv().now_or_never().is_none());
        assert!(matches!(self.queue.try_recv(), Err(TryRecvError::Empty)));
    }

    /// As `deceive`, without a deadline. `count` packets are in the queue then.
    async fn hide(&mut self, traffic: &Traffic, numbers: Range<u32>, times: usize, count: u64) {
        let come = self.deceive(traffic, numbers, times).await;
        assert!(come.is_empty(), "the socket says that it is empty");
        assert!(self.queue.recv().now_or_never().is_none(), "there is no event");
        assert_eq!(account(0).unwrap().waiting, count, "nothing is lost");
        traffic.expect_nothing();
    }
}

fn numbers(packets: &[Packet]) -> Vec<u32> {
    packets.iter().map(number).collect()
}

async fn take(queue: &mut Queue, count: usize) -> Vec<Packet> {
    let mut packets = Vec::new();
    for _ in 0..count {
        packets.push(next(queue).await);
    }
    packets
}

async fn accept(queue: &mut Queue, traffic: &Traffic, expected: Range<u32>) {
    let packets = take(queue, expected.len()).await;
    assert!(numbers(&packets).into_iter().eq(expected.clone()), "in order: {:?}", numbers(&packets));
    packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    traffic.expect(expected).await;
}

async fn events() {
    let traffic = Traffic::new(200);
    // Until the next packet, after one lie and after two.
    let mut liar = Liar::new(Queue::builder(0)).await;
    let _divert = divert([udp_in().to_queue(0)]);
    liar.hide(&traffic, 0..3, 1, 3).await;
    traffic.send([3]);
    accept(&mut liar.queue, &traffic, 0..4).await;
    liar.hide(&traffic, 4..7, 2, 3).await;
    traffic.send([7]);
    eventually("the second lie", || {
        assert!(liar.queue.recv().now_or_never().is_none());
        liar.lies.load(SeqCst) == 0
    })
    .await;
    traffic.send([8]);
    accept(&mut liar.queue, &traffic, 4..9).await;

    // Until a confirmation: reading the kernel's reply also reads the packets, and wakes the
    // stream.
    traffic.send([9]);
    let held = take(&mut liar.queue, 1).await.remove(0);
    liar.hide(&traffic, 10..13, 1, 4).await;
    soon("the confirmation", held.accept().confirm()).await.unwrap();
    traffic.expect([9]).await;
    accept(&mut liar.queue, &traffic, 10..13).await;

    // `try_recv` waits for no event.
    liar.prove_verdicts().await;
    liar.lies.store(1, SeqCst);
    traffic.send([13]);
    assert!(matches!(liar.queue.try_recv(), Err(TryRecvError::Empty)));
    let packet = liar.queue.try_recv().unwrap();
    assert_eq!(number(&packet), 13);
    packet.accept().submit().unwrap();
    traffic.expect([13]).await;

    // Until the queue is closed.
    liar.hide(&traffic, 14..17, 1, 3).await;
    let sink = liar.queue.sink();
    soon("the shutdown", sink.close_with(Action::Accept)).await.unwrap();
    traffic.expect(14..17).await;
    assert_fields!(sink.stats(), received.packets: 17, decided.accepted: 17, lost.packets: 0, held.in_flight: 0);
    freed(0).await;
}

/// The timer has a descriptor of its own for unread packets. No task polls the stream.
async fn deadline() {
    let traffic = Traffic::new(3);
    let mut liar = Liar::new(Queue::builder(0).deadline(DEADLINE, Action::Accept)).await;
    let _divert = divert([udp_in().to_queue(0)]);
    let held = liar.deceive(&traffic, 0..3, 1).await;
    traffic.expect(0..3).await;
    drop(held);
    assert_fields!(liar.queue.stats(), received.packets: 3, decided.expired: 3, lost.packets: 0);
}

async fn timer() {
    let traffic = Traffic::new(3);
    let mut liar = Liar::new(Queue::builder(0).deadline(10 * DEADLINE, Action::Drop)).await;
    let _divert = divert([udp_in().to_queue(0)]);
    let come = liar.deceive(&traffic, 0..3, 1).await;
    let rest = take(&mut liar.queue, 3 - come.len()).await;
    come.into_iter().chain(rest).for_each(|packet| packet.accept().submit().unwrap());
    traffic.expect(0..3).await;
    let stats = liar.queue.stats();
    assert_fields!(stats, received.packets: 3, decided.accepted: 3, decided.expired: 0, lost.packets: 0);
}
