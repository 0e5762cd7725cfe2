//! A contender: it binds a queue and decides its packets, on a thread of its own.

use std::{
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::runtime::{Builder, Runtime};
use tokio_nfqueue::Stats;

use super::measure::CONSUMER;

/// A contender and its name.
#[derive(Clone, Copy)]
pub struct Contender {
    pub name: &'static str,
    /// Makes the consumer, on the thread it will run on. The queue is bound when this returns.
    pub make: fn(&Job) -> Box<dyn Consumer>,
    /// How many queues it serves.
    pub queues: u16,
}

/// The settings of the queue, the same for all contenders.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub max_len: u32,
    /// The receive buffer in bytes, as the kernel accounts it.
    pub receive_buffer: usize,
    /// Bytes to copy of each packet.
    pub copy_range: u32,
    /// Whether the kernel queues GSO packets whole.
    pub gso: bool,
    /// The longest delay of the flush policy, for contenders that have one. Zero: the immediate
    /// policy.
    pub max_delay: Option<Duration>,
    /// How long to busy-poll an empty queue, for contenders that can. `None`: their default.
    pub busy_poll: Option<Duration>,
}

pub const WHOLE: u32 = 65_531;

impl Default for Job {
    /// The kernel's default queue length, and a buffer for as many small packets.
    fn default() -> Self {
        Self { max_len: 1024, receive_buffer: 2 << 20, copy_range: WHOLE, gso: false, max_delay: None, busy_poll: None }
    }
}

pub trait Consumer {
    /// Decides packets until [`Until::over`]. All verdicts have been sent when this returns.
    fn consume(&mut self, until: &Arc<Until>);

    fn stats(&self) -> Option<Stats> {
        None
    }
}

/// When to stop, and the progress so far.
#[derive(Debug, Default)]
pub struct Until {
    quota: AtomicU64,
    stop: AtomicBool,
    received: AtomicU64,
    decided: AtomicU64,
}

impl Until {
    /// Whether enough packets have been received. A consumer that waits is woken by another packet
    /// after this becomes true.
    pub fn over(&self) -> bool {
        self.stop.load(Relaxed) || self.received.load(Relaxed) >= self.quota.load(Relaxed)
    }

    pub fn received(&self, packets: usize) {
        self.received.fetch_add(packets as u64, Relaxed);
    }

    pub fn decided(&self, packets: usize) {
        self.decided.fetch_add(packets as u64, Relaxed);
    }

    /// Received and decided.
    pub fn both(&self, packets: usize) {
        self.received(packets);
        self.decided(packets);
    }

    /// Whether all that have been received have been decided.
    pub fn settled(&self) -> bool {
        self.decided.load(Relaxed) >= self.received.load(Relaxed)
    }

    /// How many have been decided so far.
    pub fn count(&self) -> u64 {
        self.decided.load(Relaxed)
    }
}

/// Threads of a Tokio runtime.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threads {
    /// A current-thread runtime.
    One,
    /// A multi-thread runtime with two workers.
    Two,
}

/// A runtime for the loop of a consumer.
pub struct Runner {
    pub runtime: Runtime,
    threads: Threads,
}

impl Runner {
    pub fn new(threads: Threads) -> Self {
        let mut builder = match threads {
            Threads::One => Builder::new_current_thread(),
            Threads::Two => Builder::new_multi_thread(),
        };
        let builder = builder.worker_threads(2).thread_name(CONSUMER).enable_all();
        Self { runtime: builder.build().expect("start a runtime"), threads }
    }

    /// Runs a loop to its end, on a worker if there are workers.
    pub fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        match self.threads {
            Threads::One => self.runtime.block_on(work),
            Threads::Two => self.runtime.block_on(self.runtime.spawn(work)).expect("the task does not panic"),
        }
    }
}

/// A running contender, in the network namespace of the thread that started it.
pub struct Running {
    until: Arc<Until>,
    go: Sender<()>,
    done: Receiver<()>,
    thread: JoinHandle<Option<Stats>>,
}

impl Running {
    /// Returns when the queue is bound.
    pub fn start(contender: &Contender, job: &Job) -> Self {
        let until = Arc::new(Until::default());
        let (go, when_to_go) = channel();
        let (tell, done) = channel();
        let (make, job, shared) = (contender.make, *job, Arc::clone(&until));
        let body = move || {
            let mut consumer = make(&job);
            tell.send(()).ok()?;
            while let Ok(()) = when_to_go.recv() {
                consumer.consume(&shared);
                tell.send(()).ok()?;
            }
            consumer.stats()
        };
        let thread = thread::Builder::new().name(CONSUMER.into()).spawn(body).expect("start a thread");
        let running = Self { until, go, done, thread };
        running.wait()
    }

    /// Starts to decide packets: `quota` of them, or until [`Running::stop`]. Does not wait.
    pub fn go(&self, quota: Option<u64>) {
        self.until.received.store(0, Relaxed);
        self.until.decided.store(0, Relaxed);
        self.until.quota.store(quota.unwrap_or(u64::MAX), Relaxed);
        self.go.send(()).expect("the consumer waits");
    }

    pub fn count(&self) -> u64 {
        self.until.count()
    }

    /// Waits until it has decided its quota.
    pub fn wait(self) -> Self {
        match self.done.recv() {
            Ok(()) => self,
            Err(_) => match self.thread.join() {
                Err(panic) => resume_unwind(panic),
                Ok(_) => unreachable!("the thread sends before it ends"),
            },
        }
    }

    /// Stops it. `kick` sends a packet that wakes it.
    pub fn stop(self, mut kick: impl FnMut()) -> Option<Stats> {
        self.until.stop.store(true, Relaxed);
        while !self.thread.is_finished() && self.done.try_recv().is_err() {
            kick();
            thread::sleep(Duration::from_millis(1));
        }
        self.finish()
    }

    /// Ends its thread and unbinds the queue.
    pub fn finish(self) -> Option<Stats> {
        drop(self.go);
        self.thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}
