//! The timer thread and its process: signals, and children by `fork`, which have no copy of the
//! thread.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{Ipv4Addr, UdpSocket},
    os::unix::net::UnixDatagram,
    thread,
    time::Duration,
};

use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::SignalFd,
    },
    unistd::Pid,
};
use tokio_nfqueue::{Action, ErrorKind, FlushPolicy, Packet, Queue, QueueBuilder};

use super::process::{in_a_process, in_runtime};
use crate::{
    common::{DEADLINE, PORT, divert, next, number, soon, udp_in},
    support,
};

tests![
    sync the_timer_thread_blocks_the_signals_that_are_sent_to_a_process,
    sync a_queue_that_is_bound_after_a_fork_keeps_its_time_limits,
    sync a_forked_child_that_continues_with_the_queue_keeps_its_time_limits,
    sync forked_processes_have_different_port_ids,
];

fn the_timer_thread_blocks_the_signals_that_are_sent_to_a_process() {
    in_a_process("signals");
}

fn a_queue_that_is_bound_after_a_fork_keeps_its_time_limits() {
    in_a_process("daemon");
}

fn a_forked_child_that_continues_with_the_queue_keeps_its_time_limits() {
    let text = in_a_process("heir");
    assert!(text.contains(KEPT), "the child has failed: {text}");
}

fn forked_processes_have_different_port_ids() {
    in_a_process("siblings");
}

/// What the child prints at its end: no process waits for its exit status.
const KEPT: &str = "every time limit was kept";

/// As a program that reads its signals from a descriptor: it blocks them after `bind`.
pub(super) fn signals() {
    in_runtime(async {
        let _queue = Queue::builder(0).bind().await.unwrap();
        let signals: SigSet = [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGHUP].into_iter().collect();
        signals.thread_block().unwrap();
        let descriptor = SignalFd::new(&signals).unwrap();
        for signal in &signals {
            // If the timer thread did not block it, it would end the process.
            kill(Pid::this(), signal).unwrap();
            let read = descriptor.read_signal().unwrap().unwrap();
            assert_eq!(read.ssi_signo.cast_signed(), signal as i32);
        }
    });
    assert_eq!(threads_that_take_signals(), 1, "that of the program");
}

/// The number of threads of this process that do not block `SIGTERM`, or any other signal that is
/// sent to a process.
fn threads_that_take_signals() -> usize {
    // Those that a thread causes by a fault of its own, those that no thread can block, and the two
    // that the C library needs.
    let exempt = [
        Signal::SIGSEGV as i32,
        Signal::SIGBUS as i32,
        Signal::SIGFPE as i32,
        Signal::SIGILL as i32,
        Signal::SIGTRAP as i32,
        Signal::SIGSYS as i32,
        Signal::SIGKILL as i32,
        Signal::SIGSTOP as i32,
        32,
        33,
    ];
    let exempt = exempt.iter().fold(0_u64, |mask, signal| mask | 1 << (signal - 1));
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let blocked = threads.map(|thread| {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    });
    blocked.filter(|blocked| blocked | exempt != u64::MAX).count()
}

fn timer_thread_sleeps() -> bool {
    let mut threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    let timer = threads.find(|thread| fs::read_to_string(thread.join("comm")).unwrap().trim() == "nfqueue-timer");
    timer.is_some_and(|timer| fs::read_to_string(timer.join("status")).unwrap().contains("State:\tS"))
}

/// A process whose parent has had a queue, in two generations.
pub(super) fn daemon() {
    in_runtime(async { soon("the shutdown", Queue::builder(0).bind().await.unwrap().close()).await.unwrap() });
    let child = || {
        keep_time_limits();
        assert!(support::in_a_fork(keep_time_limits).unwrap());
    };
    assert!(support::in_a_fork(child).unwrap());
    // Its own thread has not been disturbed.
    keep_time_limits();
}

/// Two children and their parent bind a queue, one after the other. With the same port id, the end
/// of one process could remove the queue of the next one.
pub(super) fn siblings() {
    let (sender, receiver) = UnixDatagram::pair().unwrap();
    let report = || {
        in_runtime(async {
            let queue = Queue::builder(0).bind().await.unwrap();
            let port_id = queue.sink().kernel_stats().unwrap().port_id;
            sender.send(&port_id.to_ne_bytes()).unwrap();
            soon("the shutdown", queue.close()).await.unwrap();
        });
    };
    // Now this thread has random keys for all its hash maps, and the children copy them.
    drop(HashMap::<u8, u8>::new());
    for _ in 0..2 {
        assert!(support::in_a_fork(report).unwrap());
    }
    report();
    let port_ids: HashSet<_> = std::iter::repeat_with(|| {
        let mut port_id = [0; 4];
        receiver.recv(&mut port_id).unwrap();
        u32::from_ne_bytes(port_id)
    })
    .take(3)
    .collect();
    assert_eq!(port_ids.len(), 3, "{port_ids:?}");
}

/// Gathered verdicts are sent within this time. It must be longer than a fork takes: the child of a
/// process whose timer thread uses the queue may wait indefinitely.
const MAX_DELAY: Duration = Duration::from_secs(1);
const CLOSE_WITHIN: Duration = Duration::from_millis(50);

fn builder() -> QueueBuilder {
    Queue::builder(0).on_unanswered(Action::Accept).flush_policy(FlushPolicy::fixed(100, MAX_DELAY))
}

/// Numbered datagrams to a receiver that blocks the thread.
struct Numbers {
    sender: UdpSocket,
    receiver: UdpSocket,
}

impl Numbers {
    fn new() -> Self {
        Self { sender: support::udp((Ipv4Addr::LOCALHOST, 0)), receiver: support::udp((Ipv4Addr::LOCALHOST, PORT)) }
    }

    fn send(&self, number: u32) {
        self.sender.send_to(&number.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
    }

    /// Blocks the thread, so that only the timer thread can have the datagram delivered.
    #[track_caller]
    fn receive(&self, expected: u32) {
        let mut datagram = [0; 4];
        self.receiver.recv(&mut datagram).unwrap_or_else(|error| panic!("datagram {expected}: {error}"));
        assert_eq!(u32::from_be_bytes(datagram), expected);
    }
}

async fn take(queue: &mut Queue, numbers: &Numbers, expected: u32) -> Packet {
    numbers.send(expected);
    let packet = next(queue).await;
    assert_eq!(number(&packet), expected);
    packet
}

/// Asserts that a new queue sends gathered verdicts, keeps deadlines and ends `close_within`, while
/// its runtime is blocked.
fn keep_time_limits() {
    in_runtime(async {
        let numbers = Numbers::new();
        let _divert = divert([udp_in().to_queue(0)]);
        let mut queue = builder().bind().await.unwrap();
        take(&mut queue, &numbers, 0).await.accept().submit().unwrap();
        numbers.receive(0);
        let held = take(&mut queue, &numbers, 1).await;
        let error = soon("the shutdown", queue.close_within(CLOSE_WITHIN)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        numbers.receive(1);
        drop(held);

        let mut queue = builder().deadline(DEADLINE, Action::Accept).bind().await.unwrap();
        let held = take(&mut queue, &numbers, 2).await;
        // This one stays unread.
        numbers.send(3);
        numbers.receive(2);
        numbers.receive(3);
        drop(held);
        soon("the shutdown", queue.close()).await.unwrap();
    });
}

/// A daemon that has bound its queue before it forks: it continues in the child.
pub(super) fn heir() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let numbers = Numbers::new();
    let (mut queue, divert, mut held) = runtime.block_on(async {
        let divert = divert([udp_in().to_queue(0)]);
        let mut queue = builder().deadline(DEADLINE, Action::Accept).bind().await.unwrap();
        let mut held = Vec::new();
        for index in 0..3 {
            held.push(take(&mut queue, &numbers, index).await);
        }
        (queue, divert, held)
    });
    // It looks for unread packets some time after they have come: after a 64th of the deadline, or
    // later on a slow machine.
    thread::sleep(DEADLINE / 16);
    support::wait_until("the timer thread sleeps", timer_thread_sleeps);
    held.remove(0).accept().submit().unwrap();
    support::go_on_in_a_fork().unwrap();
    held.remove(0).accept().submit().unwrap();
    numbers.receive(0);
    numbers.receive(1);
    // By their deadlines: one that was held at the fork, and one that stays unread.
    numbers.receive(2);
    numbers.send(3);
    numbers.receive(3);
    runtime.block_on(async {
        let last = take(&mut queue, &numbers, 4).await;
        let error = soon("the shutdown", queue.close_within(CLOSE_WITHIN)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        numbers.receive(4);
        drop(last);
    });
    drop((held, divert));
    eprintln!("{KEPT}");
}
