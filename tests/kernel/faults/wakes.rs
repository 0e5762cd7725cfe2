//! How often threads wake at everyday rates. In a process of its own, in which no other test uses
//! the threads.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use nfqueue_divert::Divert;
use tokio::runtime::{Builder, Runtime};
use tokio_nfqueue::{Queue, TryRecvError};

use super::process::in_a_process;
use crate::{
    common::{Traffic, divert, next, start, udp_in},
    support,
};

tests![
    sync no_thread_wakes_for_a_verdict_that_has_been_sent,
    sync a_queue_that_only_try_recv_reads_does_not_wake_the_runtime,
];

pub(super) const MODE: &str = "wakes";
const COUNT: u32 = 1500;
/// Each thread wakes a few times to start. One spare wake-up a burst would be 300.
const FEW: u64 = 100;

fn no_thread_wakes_for_a_verdict_that_has_been_sent() {
    for case in ["one by one", "in bursts"] {
        in_a_process(&format!("{MODE} {case}"));
    }
}

fn a_queue_that_only_try_recv_reads_does_not_wake_the_runtime() {
    in_a_process(&format!("{MODE} try_recv"));
}

pub(super) fn child(mode: &str) {
    match mode.strip_prefix(MODE).map(str::trim) {
        Some("one by one") => received(1),
        Some("in bursts") => received(5),
        Some("try_recv") => try_received(),
        _ => panic!("{mode:?}"),
    }
}

/// How often the threads with this name have slept. A thread gives itself its name when it begins.
fn sleeps(name: &str) -> u64 {
    let mut slept = None;
    support::wait_until("a thread with this name", || {
        slept = sleeps_of_named(name);
        slept.is_some()
    });
    slept.unwrap()
}

fn sleeps_of_named(name: &str) -> Option<u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
    let count = |status: String| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    };
    named.map(|task| count(fs::read_to_string(task.join("status")).unwrap())).reduce(|one, other| one + other)
}

fn received(burst: u32) {
    super::process::in_runtime(async {
        let (mut queue, _divert) = start(Queue::builder(0));
        let traffic = Traffic::new(COUNT);
        let (before, began) = (sleeps("nfqueue-timer"), Instant::now());
        for first in (0..COUNT).step_by(burst as usize) {
            traffic.send(first..first + burst);
            for _ in 0..burst {
                next(&mut queue).await.accept().submit().unwrap();
            }
            traffic.expect(first..first + burst).await;
            // Verdicts of one burst wait, but not again and again.
            if burst > 1 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        let slept = sleeps("nfqueue-timer") - before;
        // It looks four times a second whether verdicts have been executed.
        let few = FEW + 4 * began.elapsed().as_secs();
        assert!(slept < few, "the timer thread has slept {slept} times for {COUNT} packets");
    });
}

fn try_received() {
    let quiet = Builder::new_multi_thread().worker_threads(1).thread_name("quiet").enable_all().build().unwrap();
    let outside = Builder::new_current_thread().enable_all().build().unwrap();
    let traffic = outside.block_on(async { Traffic::new(COUNT) });
    let (mut queue, _divert) = bound(&quiet);
    let before = sleeps("quiet");
    for number in 0..COUNT {
        traffic.send([number]);
        support::wait_until("a packet", || match queue.try_recv() {
            Ok(packet) => {
                packet.accept().submit().unwrap();
                true
            }
            Err(TryRecvError::Empty) => {
                thread::sleep(Duration::from_micros(50));
                false
            }
            Err(error) => panic!("{error}"),
        });
        outside.block_on(traffic.expect([number]));
    }
    let slept = sleeps("quiet") - before;
    assert!(slept < FEW, "the runtime has slept {slept} times for {COUNT} packets");
}

fn bound(runtime: &Runtime) -> (Queue, Divert) {
    let divert = divert([udp_in().to_queue(0)]);
    (runtime.block_on(async { Queue::builder(0).bind().await.unwrap() }), divert)
}
