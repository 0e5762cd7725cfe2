//! A busy host: sender, consumer and a third busy thread share two processors. To run, a thread
//! must preempt another. Busy polling takes CPU time from the others.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::channel,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::ClockId,
    unistd::Pid,
};

use super::{
    consumer::Contender,
    floor,
    latency::{self, Host},
    options::Scale,
    ours,
    summary::{Book, Random},
};

pub const SECTION: &str = "busy host";
pub const RATES: [u64; 2] = [60_000, 100_000];

/// How many processors the three threads share.
const PROCESSORS: usize = 2;

/// All contenders.
pub fn contenders() -> [Contender; 5] {
    [floor::ONE, floor::ASYNC[0], ours::ACCEPT_ALL, ours::ACCEPT_ALL_TWO, ours::BUSY_POLL]
}

pub fn section(rate: u64) -> String {
    format!("{SECTION} at {rate}/s")
}

pub fn measure(contender: &Contender, rate: u64, scale: &Scale, book: &mut Book) {
    let outcome = latency::run(Some(contender), rate, scale, Host::Busy);
    latency::note(book, &section(rate), contender.name, &outcome);
}

/// The third thread. It computes until this is dropped.
pub struct BusyThread {
    stop: Arc<AtomicBool>,
    clock: ClockId,
    thread: Option<JoinHandle<()>>,
}

impl BusyThread {
    /// Also restricts the calling thread, and all threads that it starts later, to two processors.
    pub fn start() -> Self {
        restrict();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (tell, id) = channel();
        let body = move || {
            tell.send(rustix::thread::gettid()).expect("the parent waits");
            let mut random = Random::new(0);
            while !stopped.load(Relaxed) {
                for _ in 0..1000 {
                    black_box(random.below(1 << 16));
                }
            }
        };
        let thread = thread::Builder::new().name("busy".into()).spawn(body).expect("start a thread");
        let id = id.recv().expect("the thread sends its id").as_raw_nonzero().get();
        Self { stop, clock: clock_of(id), thread: Some(thread) }
    }

    /// Its CPU time so far.
    pub fn cpu(&self) -> Duration {
        self.clock.now().expect("read a thread's clock").into()
    }
}

impl Drop for BusyThread {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // If it has panicked, the panic hook has reported it.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The clock of a thread's CPU time, encoded as by `pthread_getcpuclockid`
/// (include/linux/posix-timers_types.h: CPUCLOCK_PERTHREAD_MASK, CPUCLOCK_SCHED).
pub fn clock_of(thread: i32) -> ClockId {
    const PER_THREAD: i32 = 4;
    const SCHED: i32 = 2;
    ClockId::from_raw((!thread << 3) | PER_THREAD | SCHED)
}

fn restrict() {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).expect("sched_getaffinity");
    let mut few = CpuSet::new();
    let usable = (0..CpuSet::count()).filter(|processor| allowed.is_set(*processor).is_ok_and(|is_set| is_set));
    for processor in usable.take(PROCESSORS) {
        few.set(processor).expect("it was in a set");
    }
    sched_setaffinity(this, &few).expect("sched_setaffinity");
}
