//! The owners of packets: the readers, tasks and threads that decide them.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures::{FutureExt, SinkExt, StreamExt, executor::block_on};
use tokio::sync::oneshot;
use tokio_nfqueue::{Action, DetachedPacket, Packet, PacketStream, TryRecvError, Verdict, VerdictSink};

use super::{
    plan::{Deed, How, NUMBERED, PASS, Plan, What, Who},
    records::{Done, Records, Response},
};
use crate::common::{Random, without_net_admin};

/// The state that the threads and tasks of a history share.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) sinks: Vec<VerdictSink>,
    records: Mutex<Records>,
    /// The number of packets that the program holds.
    held: AtomicUsize,
    /// Packets that are held until the shutdown begins; `None` from then on.
    kept: Mutex<Option<Vec<Job>>>,
    threads: Mutex<Option<[mpsc::Sender<Job>; 2]>>,
    /// Errors that must not happen.
    errors: Mutex<Vec<String>>,
}

/// A packet and what to do with it.
pub(crate) struct Job {
    packet: Held,
    deed: Deed,
}

/// A held packet. If it is dropped, it is recorded as abandoned.
struct Held {
    // Dropped in this order, so that the record is made after the event.
    what: Option<Waiting>,
    note: Note,
}

enum Waiting {
    Packet(Packet),
    DetachedPacket(DetachedPacket),
}

struct Note {
    world: Arc<World>,
    serial: u32,
    queue: usize,
    time: usize,
}

impl Drop for Note {
    fn drop(&mut self) {
        let mut records = self.world.records();
        if records.done(self.serial, self.time) == Done::Held {
            records.set(self.serial, self.time, Done::Abandoned);
        }
        drop(records);
        self.world.held.fetch_sub(1, SeqCst);
    }
}

impl World {
    pub(crate) fn new(plan: Plan, sinks: Vec<VerdictSink>) -> (Arc<Self>, [JoinHandle<()>; 2]) {
        let (channels, threads) = ([false, true].map(|capless| {
            let (sender, jobs) = mpsc::channel::<Job>();
            let thread = thread::spawn(move || {
                for job in jobs {
                    thread::sleep(job.deed.delay);
                    let give = || block_on(give(job.packet, job.deed));
                    if capless { without_net_admin(give) } else { give() }
                }
            });
            (sender, thread)
        }))
        .into_iter()
        .unzip::<_, _, Vec<_>, Vec<_>>();
        let world = Self {
            plan,
            sinks,
            records: Mutex::new(Records::new()),
            held: AtomicUsize::new(0),
            kept: Mutex::new(Some(Vec::new())),
            threads: Mutex::new(channels.try_into().ok()),
            errors: Mutex::default(),
        };
        (Arc::new(world), threads.try_into().unwrap_or_else(|_| unreachable!("there are two")))
    }

    pub(crate) fn records(&self) -> MutexGuard<'_, Records> {
        lock(&self.records)
    }

    pub(crate) fn error(&self, error: String) {
        lock(&self.errors).push(error);
    }

    pub(crate) fn errors(&self) -> Vec<String> {
        lock(&self.errors).clone()
    }

    /// The number of packets that the program holds, without the kept ones.
    pub(crate) fn held(&self) -> usize {
        self.held.load(SeqCst) - lock(&self.kept).as_ref().map_or(0, Vec::len)
    }

    /// Lets the threads end when they have finished their jobs.
    pub(crate) fn dismiss_threads(&self) {
        lock(&self.threads).take();
    }

    /// Reads all refusals that are available.
    pub(crate) fn collect_refusals(&self) {
        for queue in 0..self.sinks.len() {
            self.is_closed(queue);
        }
    }

    /// Whether a queue is closed: its `refusals` stream ends then and not before.
    pub(crate) fn is_closed(&self, queue: usize) -> bool {
        let mut refusals = self.sinks[queue].refusals();
        loop {
            match refusals.recv().now_or_never() {
                Some(Some(error)) => self.refusal(queue, &error),
                end => return end.is_some(),
            }
        }
    }

    pub(crate) fn refusal(&self, queue: usize, error: &tokio_nfqueue::Error) {
        match error.packet_id() {
            Some(id) => self.records().report(queue, id.get(), error.kind()),
            None => self.error(format!("queue {queue}: a refusal without a packet: {error}")),
        }
    }

    /// Distributes the kept packets at the shutdown. Without a runtime, threads do the work of
    /// tasks.
    pub(crate) fn release(self: &Arc<Self>, runtime: bool) {
        let kept = lock(&self.kept).take().unwrap_or_default();
        for Job { packet, mut deed } in kept {
            if !runtime {
                deed.who = match deed.who {
                    Who::CaplessThread | Who::CaplessForAWhile => Who::CaplessThread,
                    _ => Who::Thread,
                };
            }
            self.dispatch(packet, deed);
        }
    }

    /// A packet was received from a stream.
    fn take(self: &Arc<Self>, queue: usize, packet: Packet) {
        let Some(serial) = serial(&packet) else {
            return self.error(format!("queue {queue}: a packet without a number: {packet:?}"));
        };
        let mut records = self.records();
        let Some(time) = records.handed_out(serial, queue, packet.id().get()) else {
            drop(records);
            return self.error(format!("queue {queue}: a packet of unknown number {serial}: {packet:?}"));
        };
        let last_round = records.round + 1 == self.plan.rounds.len();
        drop(records);
        self.held.fetch_add(1, SeqCst);
        let deed = self.plan.deed(serial, queue, time);
        let packet =
            Held { what: Some(Waiting::Packet(packet)), note: Note { world: Arc::clone(self), serial, queue, time } };
        let job = Job { packet, deed };
        let job = match &mut *lock(&self.kept) {
            Some(kept) if deed.keep && last_round => {
                kept.push(job);
                None
            }
            _ => Some(job),
        };
        if let Some(Job { packet, deed }) = job {
            self.dispatch(packet, deed);
        }
    }

    fn dispatch(self: &Arc<Self>, mut packet: Held, deed: Deed) {
        if deed.detach {
            packet.detach();
        }
        match deed.who {
            Who::Reader => {
                let give = give(packet, Deed { how: at_once(deed.how), ..deed });
                give.now_or_never().expect("it is done in one go");
            }
            Who::Task => drop(tokio::spawn(async move {
                pause(deed.delay).await;
                give(packet, deed).await;
            })),
            Who::CaplessForAWhile => drop(tokio::spawn(async move {
                pause(deed.delay).await;
                without_net_admin(|| give(packet, deed).now_or_never()).expect("it is done in one go");
            })),
            Who::Thread | Who::CaplessThread => {
                if let Some([thread, capless]) = &*lock(&self.threads) {
                    let thread = if deed.who == Who::Thread { thread } else { capless };
                    thread.send(Job { packet, deed }).unwrap_or_else(|_| unreachable!("threads outlive their work"));
                }
            }
            Who::Panic => drop(tokio::spawn(async move {
                let _packet = packet;
                pause(deed.delay).await;
                std::panic::resume_unwind(Box::new("as intended"));
            })),
            Who::Abort => {
                let task = tokio::spawn(async move {
                    let _packet = packet;
                    std::future::pending::<()>().await;
                });
                tokio::spawn(async move {
                    pause(deed.delay).await;
                    task.abort();
                });
            }
        }
    }
}

impl Held {
    fn detach(&mut self) {
        self.what = self.what.take().map(|what| match what {
            Waiting::Packet(packet) => Waiting::DetachedPacket(packet.detach()),
            ticket @ Waiting::DetachedPacket(_) => ticket,
        });
    }
}

async fn pause(delay: Duration) {
    if delay.is_zero() {
        tokio::task::yield_now().await;
    } else {
        tokio::time::sleep(delay).await;
    }
}

fn at_once(how: How) -> How {
    match how {
        How::Send | How::Confirm => How::Submit,
        how => how,
    }
}

/// Does the job, and records it.
async fn give(mut held: Held, deed: Deed) {
    let Some(what) = held.what.take() else { return };
    let Note { world, serial, queue, time } = &held.note;
    let verdict = match deed.what {
        What::DropPacket => return drop(what),
        What::DropVerdict => return drop(what.decide(Action::Accept)),
        What::Accept => what.decide(Action::Accept),
        What::AcceptMarked => what.decide(Action::Accept).mark(mark_of(*serial) | PASS >> 1).priority(*serial),
        What::Drop => what.decide(Action::Drop),
        What::Repeat => what.decide(Action::Repeat).mark(mark_of(*serial) | PASS),
        What::Requeue { bypass } => what.decide(Action::Requeue { queue: world.plan.side() as u16, bypass }),
    };
    let action = verdict.action();
    let at = Instant::now();
    let note = |response| world.records().set(*serial, *time, Done::Gave(action, response, at));
    note(Response::InRefusals);
    let mut sink = world.sinks[*queue].clone();
    let result = match deed.how {
        How::Submit => verdict.submit(),
        How::SubmitToSink => verdict.submit(),
        How::Feed => sink.feed(verdict).await,
        How::Send => sink.send(verdict).await,
        How::ConfirmNotAwaited => {
            note(Response::NotAwaited);
            drop(verdict.confirm());
            Ok(())
        }
        How::Confirm => {
            // Until the result is known.
            note(Response::NotAwaited);
            let response = verdict.confirm().await;
            note(Response::Confirmed(response.map_err(|error| error.kind())));
            Ok(())
        }
    };
    if let Err(error) = result {
        world.error(format!("number {serial}: {error}"));
    }
}

impl Waiting {
    fn decide(self, action: Action) -> Verdict {
        match self {
            Self::Packet(packet) => packet.decide(action),
            Self::DetachedPacket(ticket) => ticket.decide(action),
        }
    }
}

/// Reads a stream in every possible way, until it ends or is to be dropped.
pub(crate) async fn read(world: Arc<World>, queue: usize, mut stream: PacketStream, mut stop: oneshot::Receiver<()>) {
    let mut random = world.plan.random(1000 + queue as u64);
    let mut packets = Vec::new();
    loop {
        if world.plan.pauses && random.one_in(40) {
            pause(Duration::from_micros(random.below(30_000) as u64)).await;
        }
        let goes_on = tokio::select! {
            biased;
            _ = &mut stop => return,
            result = receive(&mut stream, &mut packets, &mut random) => result,
        };
        for packet in packets.drain(..) {
            world.take(queue, packet);
        }
        match goes_on {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                world.error(format!("queue {queue}: the stream failed: {error}"));
                break;
            }
        }
    }
    if stream.next().await.is_some() {
        world.error(format!("queue {queue}: the stream continues after its end"));
    }
}

/// Returns false when the queue is closed.
async fn receive(
    stream: &mut PacketStream,
    packets: &mut Vec<Packet>,
    random: &mut Random,
) -> Result<bool, tokio_nfqueue::Error> {
    match random.below(4) {
        0 => match stream.try_recv() {
            Ok(packet) => {
                packets.push(packet);
                return Ok(true);
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Closed) => return Ok(false),
            Err(TryRecvError::Failed(error)) => return Err(error),
        },
        1 => return Ok(stream.recv_many(packets, 1 + random.below(70)).await? > 0),
        _ => {}
    }
    let packet = stream.recv().await.transpose()?;
    let goes_on = packet.is_some();
    packets.extend(packet);
    Ok(goes_on)
}

/// The number of a packet: in its payload, or in its mark if the payload was not copied.
fn serial(packet: &Packet) -> Option<u32> {
    let payload = packet.payload();
    if payload.is_empty() {
        return (packet.mark() & NUMBERED_MARK != 0).then_some(packet.mark() & (NUMBERED_MARK - 1));
    }
    payload[..NUMBERED as usize].last_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// The mark of a datagram that is sent over loopback.
pub(crate) fn mark_of(serial: u32) -> u32 {
    serial | NUMBERED_MARK
}

/// Marks with this bit contain a number.
const NUMBERED_MARK: u32 = 1 << 24;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
