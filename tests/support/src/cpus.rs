//! On which CPUs a thread runs.
//!
//! Each CPU has a queue of the packets that arrive (`enqueue_to_backlog`). So the packets of one
//! thread stay in order on one CPU, and may overtake each other when it has been moved to another.

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Calls `body` on each CPU on which the calling thread may run, with its number. Then the thread
/// may run on all of these again.
pub fn on_each_cpu(mut body: impl FnMut(usize)) {
    let allowed = sched_getaffinity(None).expect("read the CPUs of a thread");
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
        stay_on(cpu);
        body(cpu);
    }
    sched_setaffinity(None, &allowed).expect("release the thread");
}

/// Binds the calling thread to the CPU on which it runs.
pub fn stay_on_one_cpu() {
    stay_on(sched_getcpu());
}

fn stay_on(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).expect("bind the thread to a CPU");
}
