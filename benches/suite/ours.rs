//! This crate, used as its documentation shows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::select_all};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::{
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    task::{JoinSet, yield_now},
};
use tokio_nfqueue::{
    FlushPolicy, Packet, PacketStream, Queue, QueueBuilder, Stats, TryRecvError, Verdict, VerdictSink,
};

use super::{
    consumer::{Consumer, Contender, Job, Runner, Threads, Until, WHOLE},
    paced,
    summary::Random,
};

pub const ACCEPT_ALL: Contender =
    contender("this crate: accept all", |job| Ours::bind(job, Way::AcceptAll, Threads::One));
pub const ACCEPT_NEXT: Contender =
    contender("this crate: accept all, by next()", |job| Ours::bind(job, Way::AcceptNext, Threads::One));
pub const BUSY_POLL: Contender = contender("this crate: accept all, busy_poll(30 µs)", |job| {
    Ours::bind(&Job { busy_poll: Some(BUSY_POLL_LIMIT), ..*job }, Way::AcceptAll, Threads::One)
});
pub const BUSY_POLL_TWO: Contender = contender("this crate: accept all, 2 threads, busy_poll(30 µs)", |job| {
    Ours::bind(&Job { busy_poll: Some(BUSY_POLL_LIMIT), ..*job }, Way::AcceptAll, Threads::Two)
});
pub const ACCEPT_ALL_TWO: Contender =
    contender("this crate: accept all, 2 threads", |job| Ours::bind(job, Way::AcceptAll, Threads::Two));
pub const EIGHT_TASKS: Contender =
    contender("this crate: eight tasks, any order", |job| Ours::bind(job, Way::EightTasks, Threads::One));
pub const EIGHT_TASKS_TWO: Contender =
    contender("this crate: eight tasks, 2 threads", |job| Ours::bind(job, Way::EightTasks, Threads::Two));
pub const MIXED: Contender = contender("this crate: mixed verdicts", |job| Ours::bind(job, Way::Mixed, Threads::One));
pub const REWRITE: Contender =
    contender("this crate: payloads rewritten", |job| Ours::bind(job, Way::Rewrite, Threads::One));
pub const CONFIRM: Contender = contender("this crate: confirm", |job| Ours::bind(job, Way::Confirm, Threads::One));
pub const METADATA: Contender = contender("this crate: metadata only", |job| {
    Ours::bind(&Job { copy_range: 0, ..*job }, Way::AcceptAll, Threads::One)
});
pub const FOUR_QUEUES: Contender = Contender {
    queues: 4,
    ..contender("this crate: four queues balanced", |job| Ours::bind(job, Way::FourQueues, Threads::One))
};
pub const TIMED: Contender =
    contender("this crate: eight tasks, timed", |job| Ours::bind(job, Way::Timed, Threads::One));
pub const ALL: [Contender; 10] = [
    ACCEPT_ALL,
    ACCEPT_NEXT,
    ACCEPT_ALL_TWO,
    EIGHT_TASKS,
    EIGHT_TASKS_TWO,
    MIXED,
    REWRITE,
    CONFIRM,
    METADATA,
    FOUR_QUEUES,
];

const fn contender(name: &'static str, make: fn(&Job) -> Box<dyn Consumer>) -> Contender {
    Contender { name, make, queues: 1 }
}

/// A way of receiving, on each runtime.
macro_rules! on_both {
    ($name:literal, |$job:ident, $threads:ident| $make:expr) => {
        [
            contender(concat!($name, ", current_thread"), |$job| {
                let $threads = Threads::One;
                $make
            }),
            contender(concat!($name, ", multi_thread"), |$job| {
                let $threads = Threads::Two;
                $make
            }),
        ]
    };
}

pub const RECV: [Contender; 2] = on_both!("recv", |job, threads| Ours::bind(job, Way::Recv, threads));
pub const RECV_MANY: [Contender; 2] = on_both!("recv_many", |job, threads| Ours::bind(job, Way::AcceptAll, threads));
/// The other ways of receiving.
pub const OTHER_WAYS: [[Contender; 2]; 5] = [
    on_both!("stream", |job, threads| Ours::bind(job, Way::AcceptNext, threads)),
    on_both!("a task a packet", |job, threads| Ours::bind(job, Way::TaskAPacket, threads)),
    on_both!("one of four numbers", |job, threads| Grouped::bind(job, threads)),
    on_both!("recv, FlushPolicy::immediate", |job, threads| {
        Ours::bind(&Job { max_delay: Some(Duration::ZERO), ..*job }, Way::Recv, threads)
    }),
    on_both!("recv, adaptive(100 ms)", |job, threads| {
        Ours::bind(&Job { max_delay: Some(Duration::from_millis(100)), ..*job }, Way::Recv, threads)
    }),
];
pub const POLL: Contender = contender("try_recv, poll(2)", |job| Ours::bind(job, Way::Poll, Threads::One));

/// The limit of the contenders that busy-poll. By default none does.
pub const BUSY_POLL_LIMIT: Duration = Duration::from_micros(30);

/// What [`TIMED`] records of each packet, by the packet's number.
pub static SUBMITTED: [Submitted; 1 << 16] = [const { Submitted::new() }; 1 << 16];

#[derive(Debug)]
pub struct Submitted {
    /// Nanoseconds of the real-time clock.
    pub at: AtomicU64,
    /// The number of flushes before this verdict. The next flush sends it.
    pub flushes: AtomicU64,
}

impl Submitted {
    const fn new() -> Self {
        Self { at: AtomicU64::new(0), flushes: AtomicU64::new(0) }
    }
}

/// The most packets received in one call.
const MANY: usize = 64;
const TASKS: usize = 8;
/// Packets that a task holds.
const HELD: usize = 256 / TASKS;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    AcceptAll,
    AcceptNext,
    Recv,
    TaskAPacket,
    Poll,
    EightTasks,
    Timed,
    Mixed,
    Rewrite,
    Confirm,
    FourQueues,
}

type Halves = Vec<(PacketStream, VerdictSink)>;

struct Ours {
    way: Way,
    /// The queues, while no task uses them. Dropped before the runtime.
    halves: Option<Halves>,
    runner: Runner,
}

impl Ours {
    fn bind(job: &Job, way: Way, threads: Threads) -> Box<dyn Consumer> {
        let runner = Runner::new(threads);
        let inside = runner.runtime.enter();
        let queues = if way == Way::FourQueues { 4 } else { 1 };
        let halves = (0..queues).map(|number| bind(settings(Queue::builder(number), job)).split()).collect();
        drop(inside);
        Box::new(Self { way, halves: Some(halves), runner })
    }
}

fn bind(builder: QueueBuilder) -> Queue {
    builder.bind().now_or_never().expect("at once").expect("bind a queue")
}

fn settings(builder: QueueBuilder, job: &Job) -> QueueBuilder {
    let builder = builder.max_len(job.max_len).receive_buffer(job.receive_buffer).gso(job.gso);
    let builder = match job.copy_range {
        0 => builder.copy_metadata(),
        WHOLE => builder,
        range => builder.copy_range(range),
    };
    let builder = match job.busy_poll {
        Some(limit) => builder.busy_poll(limit),
        None => builder,
    };
    match job.max_delay {
        Some(Duration::ZERO) => builder.flush_policy(FlushPolicy::immediate()),
        Some(delay) => builder.flush_policy(FlushPolicy::adaptive(delay)),
        None => builder,
    }
}

impl Consumer for Ours {
    fn consume(&mut self, until: &Arc<Until>) {
        let mut halves = self.halves.take().expect("no task uses them");
        if self.way == Way::Poll {
            poll_loop(&mut halves[0], until);
        }
        self.halves = Some(self.runner.run(work(self.way, halves, Arc::clone(until))));
    }

    fn stats(&self) -> Option<Stats> {
        self.halves.as_ref().map(|halves| halves[0].1.stats())
    }
}

/// Decides packets, each of which comes from a new future.
macro_rules! one_by_one {
    ($until:expr, $receive:expr, $decide:expr) => {
        while !$until.over() {
            $decide($receive.await.expect("the queue is open").expect("receive"));
            $until.received(1);
        }
    };
}

/// Several queues as one, of which one gets all packets.
struct Grouped {
    /// While no task uses it. Dropped before the runtime.
    queues: Option<Queue>,
    runner: Runner,
}

impl Grouped {
    fn bind(job: &Job, threads: Threads) -> Box<dyn Consumer> {
        let runner = Runner::new(threads);
        let inside = runner.runtime.enter();
        let queues = bind(settings(Queue::builder(0..=3), job));
        drop(inside);
        Box::new(Self { queues: Some(queues), runner })
    }
}

impl Consumer for Grouped {
    fn consume(&mut self, until: &Arc<Until>) {
        let (mut queues, until) = (self.queues.take().expect("no task uses them"), Arc::clone(until));
        self.queues = Some(self.runner.run(async move {
            one_by_one!(until, queues.recv(), |packet| submit(packet, &until));
            queues.sink().flush().await;
            queues
        }));
    }
}

async fn work(way: Way, mut halves: Halves, until: Arc<Until>) -> Halves {
    if way == Way::FourQueues {
        four_queues(&mut halves, &until).await;
    }
    for (packets, verdicts) in &mut halves {
        match way {
            Way::AcceptAll => accept_all(packets, &until).await,
            Way::AcceptNext => one_by_one!(until, packets.next(), |packet| submit(packet, &until)),
            Way::Recv => one_by_one!(until, packets.recv(), |packet| submit(packet, &until)),
            Way::TaskAPacket => task_a_packet(packets, &until).await,
            Way::EightTasks => eight_tasks(packets, verdicts, &until, |_, _| ()).await,
            Way::Timed => eight_tasks(packets, verdicts, &until, note_time).await,
            Way::Mixed => mixed(packets, &until).await,
            Way::Rewrite => each(packets, &until, rewritten).await,
            Way::Confirm => confirm(packets, &until).await,
            Way::FourQueues | Way::Poll => {}
        }
        verdicts.flush().await;
    }
    halves
}

async fn accept_all(packets: &mut PacketStream, until: &Until) {
    each(packets, until, Packet::accept).await;
}

async fn each(packets: &mut PacketStream, until: &Until, mut decide: impl FnMut(Packet) -> Verdict) {
    let mut received = Vec::with_capacity(MANY);
    while !until.over() {
        let count = packets.recv_many(&mut received, MANY).await.expect("receive");
        for packet in received.drain(..) {
            decide(packet).submit().expect("submit");
        }
        until.both(count);
    }
}

fn submit(packet: Packet, until: &Until) {
    packet.accept().submit().expect("submit");
    until.decided(1);
}

async fn task_a_packet(packets: &mut PacketStream, until: &Arc<Until>) {
    let start = |packet| {
        let until = Arc::clone(until);
        tokio::spawn(async move { submit(packet, &until) });
    };
    one_by_one!(until, packets.recv(), start);
    while !until.settled() {
        yield_now().await;
    }
}

/// As a program without a runtime.
fn poll_loop((packets, _): &mut (PacketStream, VerdictSink), until: &Until) {
    let fd = packets.readable_fd().expect("a descriptor").try_clone_to_owned().expect("duplicate it");
    while !until.over() {
        match packets.try_recv() {
            Ok(packet) => {
                submit(packet, until);
                until.received(1);
            }
            Err(TryRecvError::Empty) => {
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).expect("poll");
            }
            Err(error) => panic!("receive: {error}"),
        }
    }
}

/// Each task holds some packets. When it has more, it decides random ones.
async fn eight_tasks(
    packets: &mut PacketStream,
    verdicts: &VerdictSink,
    until: &Arc<Until>,
    before_deciding: fn(&Packet, &VerdictSink),
) {
    let mut tasks = JoinSet::new();
    let to_tasks: Vec<_> = (0..TASKS as u64)
        .map(|seed| {
            let (to_task, inbox) = unbounded_channel();
            tasks.spawn(task(inbox, verdicts.clone(), Arc::clone(until), seed, before_deciding));
            to_task
        })
        .collect();
    let mut received = Vec::with_capacity(MANY);
    let mut turn = to_tasks.iter().cycle();
    while !until.over() {
        let count = packets.recv_many(&mut received, MANY).await.expect("receive");
        for (packet, to_task) in received.drain(..).zip(&mut turn) {
            to_task.send(packet).expect("the task lives");
        }
        until.received(count);
    }
    drop(to_tasks);
    tasks.join_all().await;
}

async fn task(
    mut inbox: UnboundedReceiver<Packet>,
    verdicts: VerdictSink,
    until: Arc<Until>,
    seed: u64,
    before_deciding: fn(&Packet, &VerdictSink),
) {
    let mut random = Random::new(seed);
    let mut held = Vec::with_capacity(2 * HELD);
    loop {
        let open = inbox.recv_many(&mut held, HELD).await > 0;
        let keep = if open { HELD } else { 0 };
        let before = held.len();
        while held.len() > keep {
            let packet: Packet = held.swap_remove(random.below(held.len()));
            before_deciding(&packet, &verdicts);
            packet.accept().submit().expect("submit");
        }
        until.decided(before - held.len());
        if !open {
            return;
        }
    }
}

fn note_time(packet: &Packet, verdicts: &VerdictSink) {
    // The UDP payload is behind the IP and UDP headers.
    let number = packet.payload().get(28..).and_then(|payload| payload.get(paced::NUMBER)?.first_chunk());
    if let Some(number) = number {
        let slot = &SUBMITTED[u64::from_ne_bytes(*number) as usize % SUBMITTED.len()];
        slot.flushes.store(verdicts.stats().sent.flushes, Relaxed);
        slot.at.store(paced::now(), Relaxed);
    }
}

/// Half of the packets are accepted, a quarter dropped, a quarter marked, in random order.
async fn mixed(packets: &mut PacketStream, until: &Until) {
    let mut random = Random::new(1);
    let decide = |packet: Packet| match random.below(4) {
        0 => packet.drop(),
        1 => packet.accept().mark(7),
        _ => packet.accept(),
    };
    each(packets, until, decide).await;
}

/// Changes one byte of the UDP payload. The checksum is left out, as IPv4 allows.
fn rewritten(packet: Packet) -> Verdict {
    let mut bytes = packet.payload().to_vec();
    bytes[26..28].fill(0);
    *bytes.last_mut().expect("it has a header") ^= 1;
    packet.accept().payload(bytes)
}

async fn confirm(packets: &mut PacketStream, until: &Until) {
    let mut received = Vec::with_capacity(MANY);
    while !until.over() {
        let count = packets.recv_many(&mut received, MANY).await.expect("receive");
        let confirmations: Vec<_> = received.drain(..).map(|packet| packet.accept().confirm()).collect();
        for confirmation in confirmations {
            confirmation.await.expect("the kernel acknowledges");
        }
        until.both(count);
    }
}

async fn four_queues(halves: &mut Halves, until: &Until) {
    let loops = halves.iter_mut().map(|(packets, _)| Box::pin(accept_all(packets, until)));
    // The first loop that sees the end ends all.
    select_all(loops).await;
}
