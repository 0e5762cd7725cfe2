//! Other NFQUEUE crates.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, RawFd},
    sync::Arc,
    thread,
    time::Duration,
};

use nfq::{Message, Queue, Verdict};
use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBuf, RcvBufForce},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc::unbounded_channel,
};

use super::consumer::{Consumer, Contender, Job, Until};

pub const NFQ: Contender = Contender { name: "nfq", make: |job| Box::new(Blocking(bind(job))), queues: 1 };
pub const NFQ_CHANNEL: Contender =
    Contender { name: "nfq, thread and channel", make: |job| Box::new(ThreadAndChannel::new(job)), queues: 1 };

pub const ALL: [Contender; 2] = [NFQ, NFQ_CHANNEL];

/// How long the thread sleeps when the queue is empty: the shortest time that existing programs
/// use.
const NAP: Duration = Duration::from_millis(1);

/// The loop of the crate's own example.
struct Blocking(Queue);

impl Consumer for Blocking {
    fn consume(&mut self, until: &Arc<Until>) {
        while !until.over() {
            let mut message = self.0.recv().expect("receive");
            message.set_verdict(Verdict::Accept);
            self.0.verdict(message).expect("verdict");
            until.both(1);
        }
    }
}

/// As in Tokio programs: a thread polls the queue and sleeps in between. Channels connect it to the
/// runtime.
struct ThreadAndChannel {
    queue: Queue,
    runtime: Runtime,
}

impl ThreadAndChannel {
    fn new(job: &Job) -> Self {
        let mut queue = bind(job);
        queue.set_nonblocking(true);
        Self { queue, runtime: Builder::new_current_thread().enable_all().build().expect("start a runtime") }
    }
}

impl Consumer for ThreadAndChannel {
    fn consume(&mut self, until: &Arc<Until>) {
        let (to_runtime, mut messages) = unbounded_channel::<Message>();
        let (from_runtime, mut decided) = unbounded_channel::<Message>();
        let queue = &mut self.queue;
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut owed = 0;
                loop {
                    while let Ok(message) = decided.try_recv() {
                        queue.verdict(message).expect("verdict");
                        until.decided(1);
                        owed -= 1;
                    }
                    if until.over() {
                        if owed == 0 {
                            break;
                        }
                        thread::yield_now();
                        continue;
                    }
                    match queue.recv() {
                        Ok(message) => {
                            to_runtime.send(message).expect("the runtime lives");
                            owed += 1;
                            until.received(1);
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => thread::sleep(NAP),
                        Err(error) => panic!("receive: {error}"),
                    }
                }
            });
            self.runtime.block_on(async {
                while let Some(mut message) = messages.recv().await {
                    message.set_verdict(Verdict::Accept);
                    from_runtime.send(message).expect("the thread lives");
                }
            });
        });
    }
}

fn bind(job: &Job) -> Queue {
    let before = descriptors();
    let mut queue = Queue::open().expect("open a queue");
    // The crate does not expose its descriptor. Without a larger buffer it would lose packets that
    // others receive.
    let fd = descriptors().into_iter().find(|fd| !before.contains(fd)).expect("a new descriptor");
    // SAFETY: the queue has just opened it, and lives to the end of this function. No other thread
    // opens descriptors at the same time: there is no traffic yet, and the measuring thread waits.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    grow_receive_buffer(&fd, job.receive_buffer);
    queue.bind(0).expect("bind a queue");
    queue.set_queue_max_len(0, job.max_len).expect("set the queue's length");
    queue.set_copy_range(0, job.copy_range as u16).expect("set the copy range");
    if job.gso {
        queue.set_recv_gso(0, true).expect("enable GSO");
    }
    queue
}

/// Sets a socket's receive buffer to `bytes`, as the kernel accounts them, or to the most that the
/// system allows.
pub fn grow_receive_buffer(socket: &impl AsFd, bytes: usize) {
    let half = bytes / 2;
    if setsockopt(socket, RcvBufForce, &half).is_err() {
        setsockopt(socket, RcvBuf, &half).expect("set SO_RCVBUF");
    }
}

fn descriptors() -> Vec<RawFd> {
    let entries = fs::read_dir("/proc/self/fd").expect("list descriptors");
    let all: Vec<RawFd> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // The descriptor of the listing itself is closed by now.
    all.into_iter().filter(|fd| fs::metadata(format!("/proc/self/fd/{fd}")).is_ok()).collect()
}
