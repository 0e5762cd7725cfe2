//! Runs a history.

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use futures::FutureExt;
use tokio::{
    runtime::{Builder, Runtime},
    task::{JoinHandle, yield_now},
};
use tokio_nfqueue::{
    Action, DetachedPacket, Error, ErrorKind, Packet, PacketStream, Reconfigure, Verdict, VerdictSink,
    simulated::{Connection, Kernel, TestPacket},
};

use super::{
    Totals,
    plan::{End, LONGEST_DELAY, PASS, Plan, Random},
    records::{self, Done, LONGEST_PLAIN, Place, Records},
};

/// What the tasks and threads of a history share.
struct World {
    kernel: Kernel,
    records: Mutex<Records>,
}

impl World {
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A packet and its owner, who has not decided it.
struct Owned {
    world: Arc<World>,
    place: Place,
    packet: Option<Either>,
}

enum Either {
    Packet(Packet),
    Detached(DetachedPacket),
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(packet) = self.packet.take() {
            self.world.records().set(self.place, Done::Abandoned);
            drop(packet);
        }
    }
}

impl Owned {
    fn detach(&mut self) {
        self.packet = self.packet.take().map(|packet| match packet {
            Either::Packet(packet) => Either::Detached(packet.detach()),
            detached => detached,
        });
    }

    /// Gives a verdict. Returns the verdict, which has been recorded and must be submitted.
    fn verdict(mut self, random: &mut Random) -> Option<Verdict> {
        let action = match random.below(16) {
            0..8 => Action::Accept,
            8..13 => Action::Drop,
            13 => Action::Repeat,
            14 => Action::Requeue { queue: 1, bypass: random.one_in(2) },
            _ => Action::Accept,
        };
        // A packet comes back once from the first queue, and never from the second.
        let action = match action {
            Action::Requeue { .. } if self.place.0 == 1 => Action::Drop,
            action => action,
        };
        let mark = match action {
            Action::Repeat => Some(PASS),
            _ if random.one_in(4) => Some(random.below(1000) as u32),
            _ => None,
        };
        let payload =
            (action == Action::Accept && random.one_in(8)).then(|| datagram(random.below(900), 0).payload().clone());
        let mut verdict = match self.packet.take()? {
            Either::Packet(packet) => packet.decide(action),
            Either::Detached(packet) => packet.decide(action),
        };
        if let Some(mark) = mark {
            verdict = verdict.mark(mark);
        }
        if let Some(payload) = &payload {
            verdict = verdict.payload(payload.clone());
        }
        let at = self.world.kernel.now();
        self.world.records().set(self.place, Done::Gave { action, mark, payload, at });
        Some(verdict)
    }
}

fn datagram(length: usize, serial: usize) -> TestPacket {
    let from = (Ipv4Addr::new(10, 0, 0, 1), 4000);
    let to = (Ipv4Addr::new(10, 0, 0, 2), 53);
    // The number of the packet is its priority, which no verdict changes.
    TestPacket::udp(from.into(), to.into(), &vec![serial as u8; length]).priority(serial as u32 + 1)
}

/// In the system's time: what has not happened by then does not happen. No check depends on less.
const HANGS: Duration = Duration::from_secs(40);

/// A submission whose result comes later.
type Later = JoinHandle<()>;

struct History {
    plan: Plan,
    random: Random,
    world: Arc<World>,
    streams: [Option<PacketStream>; 2],
    sinks: [VerdictSink; 2],
    held: Vec<Owned>,
    tasks: Vec<Later>,
}

pub(crate) fn run(plan: Plan) -> Result<Totals, String> {
    let runtime = match plan.workers {
        0 => Builder::new_current_thread().enable_all().build(),
        workers => Builder::new_multi_thread().worker_threads(workers).enable_all().build(),
    }
    .map_err(|error| error.to_string())?;
    let mut history = runtime.block_on(async { History::begin(plan) }).map_err(|error| error.to_string())?;
    runtime.block_on(history.live());
    history.end(runtime)
}

impl History {
    fn begin(plan: Plan) -> Result<Self, Error> {
        let kernel = Kernel::new();
        kernel.start_ids_at(plan.first_id);
        // From now on time passes when the history says so.
        kernel.advance(Duration::ZERO);
        let bind = |number: u16| kernel.bind(plan.queues[usize::from(number)].builder(number)).map(|q| q.split());
        let ((stream, sink), (other_stream, other_sink)) = (bind(0)?, bind(1)?);
        let mut records = Records::default();
        records.begin = kernel.now();
        let world = Arc::new(World { kernel, records: Mutex::new(records) });
        Ok(Self {
            random: Random::new(plan.seed ^ 0x5555),
            plan,
            world,
            streams: [Some(stream), Some(other_stream)],
            sinks: [sink, other_sink],
            held: Vec::new(),
            tasks: Vec::new(),
        })
    }

    async fn live(&mut self) {
        for _ in 0..self.plan.steps {
            match self.random.below(16) {
                0..4 => self.send(),
                4..9 => self.read().await,
                9 | 10 => self.decide_held().await,
                11 => self.advance(Duration::from_micros(self.random.clone().below(12_000) as u64)),
                12 => self.reconfigure().await,
                13 => self.settle().await,
                14 if self.plan.faults => self.fault(),
                _ => yield_now().await,
            }
            self.read_refusals();
            let mut records = self.world.records();
            records.check_held(&self.plan);
            if !records.wrong.is_empty() {
                return;
            }
        }
    }

    fn send(&mut self) {
        let mut packets = Vec::new();
        let begin = self.world.records().packets.len();
        let count = 1 + self.random.below(if self.random.clone().one_in(4) { 40 } else { 6 });
        for serial in begin..begin + count {
            let large = self.random.one_in(12);
            let length = if large { 1400 + self.random.below(4000) } else { self.random.below(1300) };
            let mut packet = datagram(length, serial).unless_mark(PASS, PASS).to_queue(0);
            if large {
                packet = packet.gso(1000);
            }
            if self.random.one_in(10) {
                packet = packet.of_connection(Connection::new(self.random.below(5) as u32));
            }
            packets.push(packet.bypass(serial.is_multiple_of(3)).interface_in(2 + serial as u32 % 2));
        }
        let payloads: Vec<_> = packets.iter().map(|packet| packet.payload().clone()).collect();
        let at = self.world.kernel.now();
        // The records know a packet before anybody can be handed it: under their lock.
        let mut records = self.world.records();
        let sent = self.world.kernel.send_all(packets);
        for (offset, (sent, payload)) in sent.into_iter().zip(payloads).enumerate() {
            let bypass = (begin + offset).is_multiple_of(3);
            records.packets.push(records::Packet { sent, at, bypass, payload });
        }
    }

    /// Takes packets from the streams, and does something with each.
    async fn read(&mut self) {
        for _ in 0..1 + self.random.below(30) {
            let number = usize::from(self.random.one_in(4));
            let Some(stream) = &mut self.streams[number] else { continue };
            match stream.recv().now_or_never() {
                None => {}
                Some(Some(Ok(packet))) => {
                    let place = (number as u16, packet.id().get());
                    let (serial, at) = (packet.priority() as usize - 1, self.world.kernel.now());
                    self.world.records().handed_out(place, serial, at);
                    let packet = Some(Either::Packet(packet));
                    self.dispose(Owned { world: Arc::clone(&self.world), place, packet }).await;
                }
                Some(Some(Err(error))) => {
                    self.world.records().error(format!("queue {number} failed: {error}"));
                    return;
                }
                Some(None) => return,
            }
        }
    }

    /// What happens to a packet that was handed out.
    async fn dispose(&mut self, mut owned: Owned) {
        if self.random.one_in(6) {
            owned.detach();
        }
        let mut random = Random::new(self.plan.seed ^ u64::from(owned.place.1) << 20);
        match self.random.below(20) {
            0..6 => self.submit(owned).await,
            6..10 if self.held.len() < 60 => self.held.push(owned),
            10..14 => self.tasks.push(tokio::spawn(async move {
                for _ in 0..random.below(5) {
                    yield_now().await;
                }
                if let Some(verdict) = owned.verdict(&mut random) {
                    let _ = verdict.submit();
                }
            })),
            14 => drop(owned),
            15 => {
                // The verdict is dropped.
                let (world, place) = (Arc::clone(&owned.world), owned.place);
                let verdict = owned.verdict(&mut random);
                world.records().set(place, Done::Abandoned);
                drop(verdict);
            }
            16 => self.tasks.push(tokio::spawn(async move {
                yield_now().await;
                let _owned = owned;
                std::panic::resume_unwind(Box::new("as intended"));
            })),
            17 => {
                let task = tokio::spawn(async move {
                    let _owned = owned;
                    std::future::pending::<()>().await;
                });
                if random.one_in(2) {
                    yield_now().await;
                }
                task.abort();
                self.tasks.push(task);
            }
            18 => {
                let body = move || owned.verdict(&mut random).map(Verdict::submit);
                let thread = thread::Builder::new().spawn(body);
                let _ = thread.map(|thread| thread.join());
            }
            _ => self.submit(owned).await,
        }
    }

    async fn submit(&mut self, owned: Owned) {
        let (world, place) = (Arc::clone(&self.world), owned.place);
        let Some(verdict) = owned.verdict(&mut self.random) else { return };
        match self.random.below(8) {
            0 => {
                world.records().unheard.insert(place);
                let confirm = verdict.confirm();
                self.tasks.push(tokio::spawn(async move {
                    let result = confirm.await;
                    let mut records = world.records();
                    records.unheard.remove(&place);
                    if let Err(error) = result {
                        records.refusal(place, error.kind());
                    }
                }));
            }
            1 => {
                if let Err(error) = verdict.submit() {
                    world.records().error(format!("{place:?}: {error}"));
                }
                let _ = self.sinks[usize::from(place.0)].flush().await;
            }
            _ => {
                if let Err(error) = verdict.submit() {
                    world.records().error(format!("{place:?}: {error}"));
                }
            }
        }
    }

    async fn decide_held(&mut self) {
        for _ in 0..1 + self.random.below(10) {
            if self.held.is_empty() {
                return;
            }
            let at = self.random.below(self.held.len());
            let owned = self.held.swap_remove(at);
            self.submit(owned).await;
        }
    }

    fn advance(&mut self, by: Duration) {
        self.world.kernel.advance(by);
    }

    async fn reconfigure(&mut self) {
        let number = usize::from(self.random.one_in(2));
        let mut change = Reconfigure::new();
        if self.random.one_in(2) {
            change = match self.random.below(4) {
                0 => change.copy_metadata(),
                _ => change.copy_range(1 + self.random.below(3000) as u32),
            };
        }
        if self.random.one_in(2) {
            change = change.max_len(1 + self.random.below(1000) as u32);
        }
        if self.random.one_in(4) {
            change = change.uid_gid(self.random.one_in(2));
        }
        let result = self.sinks[number].reconfigure(&change);
        let world = Arc::clone(&self.world);
        let small_buffer = self.plan.queues[number].receive_buffer.is_some();
        self.tasks.push(tokio::spawn(async move {
            if let Err(error) = result.await {
                let mut records = world.records();
                let allowed = match error.kind() {
                    ErrorKind::Closed => records.closing.is_some(),
                    ErrorKind::Unconfirmed => small_buffer || records.refused,
                    _ => records.refused,
                };
                if !allowed {
                    records.error(format!("reconfigure: {error}"));
                }
            }
        }));
    }

    /// Lets everything that is due happen, and checks that it has.
    async fn settle(&mut self) {
        for _ in 0..10 {
            yield_now().await;
        }
        if self.plan.workers > 0 {
            // Tasks run on other threads.
            while self.tasks.iter().any(|task| !task.is_finished()) {
                // What was not sent is sent again after a pause; what is refused waits for longer.
                self.world.kernel.advance(Duration::from_millis(1));
                tokio::time::sleep(Duration::from_micros(50)).await;
                if self.world.records().refused {
                    // A task may have noted its verdict and not submitted it.
                    return;
                }
            }
        }
        self.world.kernel.advance(LONGEST_DELAY + Duration::from_micros(1));
        let now = self.world.kernel.now();
        let unsettled = || self.world.records().unsettled(&self.plan, now);
        let mut wrong = unsettled();
        // Another thread may be sending, and the system may run it late. The limit is for a queue
        // that never sends.
        let hangs = Instant::now() + HANGS;
        while self.plan.workers > 0 && !wrong.is_empty() && Instant::now() < hangs {
            thread::sleep(Duration::from_micros(50));
            wrong = unsettled();
        }
        self.world.records().wrong.append(&mut wrong);
    }

    fn fault(&mut self) {
        const EINTR: i32 = 4;
        const ENOMEM: i32 = 12;
        const ENOBUFS: i32 = 105;
        let kernel = &self.world.kernel;
        let mut records = self.world.records();
        records.faults += 1;
        let recovered = kernel.now() + Duration::from_millis(300);
        match self.random.below(8) {
            0 => {
                records.gone = true;
                kernel.take_interface_down(2);
            }
            1 => {
                records.gone = true;
                kernel.unregister_hook();
            }
            2 | 3 => {
                (records.refused, records.disturbed_until) = (true, recovered);
                kernel.fail_sends([EINTR, ENOMEM, ENOBUFS][self.random.below(3)], 1 + self.random.below(20));
            }
            4 => kernel.fail_receives([EINTR, ENOBUFS][self.random.below(2)], 1 + self.random.below(5)),
            5 => {
                (records.refused, records.disturbed_until) = (true, Duration::MAX);
                kernel.set_capable(false);
            }
            _ => {
                records.disturbed_until = recovered;
                kernel.set_capable(true);
            }
        }
    }

    fn read_refusals(&mut self) {
        for (queue, sink) in (0..).zip(&self.sinks) {
            // A stream of refusals ends with its queue, but verdicts may still come too late.
            let mut refusals = sink.refusals();
            while let Some(Some(error)) = refusals.recv().now_or_never() {
                let mut records = self.world.records();
                match error.packet_id() {
                    Some(id) => records.refusal((queue, id.get()), error.kind()),
                    None if records.refused => {}
                    None => records.error(format!("queue {queue}: {error}")),
                }
            }
        }
    }

    fn end(mut self, runtime: Runtime) -> Result<Totals, String> {
        self.world.kernel.set_capable(true);
        // The crate tries eight times; then a queue stays bound until its socket is closed.
        const ENOBUFS: i32 = 105;
        self.world.kernel.fail_sends(ENOBUFS, if self.plan.faults { self.random.below(7) } else { 0 });
        let now = self.world.kernel.now();
        self.world.records().closing = Some(now);
        let end = self.plan.end;
        let mut closers = Vec::new();
        if end == End::Shutdown {
            drop(runtime);
            self.streams = [None, None];
            let held = std::mem::take(&mut self.held);
            for owned in held {
                if let Some(verdict) = owned.verdict(&mut self.random) {
                    let _ = verdict.submit();
                }
            }
            return self.conclude(None, closers);
        }
        runtime.block_on(async {
            for sink in self.sinks.clone() {
                let close = async move {
                    match end {
                        End::CloseWith(action) => sink.close_with(action).await,
                        End::CloseWithin(timeout) => sink.close_within(timeout).await,
                        _ => sink.close().await,
                    }
                };
                if end != End::Drop {
                    closers.push(tokio::spawn(close));
                }
            }
            if end == End::Drop {
                self.streams = [None, None];
            }
            while !self.held.is_empty() {
                yield_now().await;
                self.send();
                self.advance(Duration::from_micros(100));
                self.decide_held().await;
                self.read_refusals();
            }
        });
        self.conclude(Some(runtime), closers)
    }

    /// Waits until everything has ended, and checks everything.
    fn conclude(
        mut self,
        runtime: Option<Runtime>,
        closers: Vec<JoinHandle<Result<(), Error>>>,
    ) -> Result<Totals, String> {
        let hangs = Instant::now() + HANGS;
        let wait = |history: &mut Self| {
            match &runtime {
                Some(runtime) => runtime.block_on(async {
                    for _ in 0..20 {
                        yield_now().await;
                    }
                    if history.plan.workers > 0 {
                        tokio::time::sleep(Duration::from_micros(50)).await;
                    }
                }),
                None => thread::sleep(Duration::from_micros(50)),
            }
            history.advance(Duration::from_millis(20));
            history.read_refusals();
        };
        let bound = |history: &Self| [0, 1].into_iter().any(|queue| history.world.kernel.stats(queue).is_some());
        let busy = |history: &Self| history.tasks.iter().any(|task| !task.is_finished());
        // After a shutdown of the runtime, tasks are gone.
        while bound(&self) || runtime.is_some() && (busy(&self) || closers.iter().any(|task| !task.is_finished())) {
            if Instant::now() > hangs {
                let text = self.sinks.iter().map(|sink| format!("\n{:?}", sink.stats())).collect::<String>();
                return Err(format!("it does not end; bound: {}, tasks: {}{text}", bound(&self), busy(&self)));
            }
            wait(&mut self);
        }
        // Refusals of the last sends.
        wait(&mut self);
        for closer in closers {
            if let Some(Ok(Err(error))) = closer.now_or_never()
                && !matches!((error.kind(), self.plan.end), (ErrorKind::TimedOut, End::CloseWithin(_)))
                && !self.world.records().refused
            {
                return Err(format!("close: {error}"));
            }
        }
        let stats = self.sinks.each_ref().map(VerdictSink::stats);
        let mut records = self.world.records();
        let mut totals = records.check_end(&self.plan);
        for (queue, stats) in (0..).zip(&stats) {
            records.check_stats(queue, stats);
            // Tokio drops the tasks of a runtime in an order that depends on all tasks before them.
            if self.plan.end != End::Shutdown {
                records.note(stats);
            }
        }
        totals.digest = self.plan.is_exact().then(|| records.digest());
        match records.wrong.is_empty() {
            true => Ok(totals),
            false => {
                let first: Vec<&str> = records.wrong.iter().take(8).map(String::as_str).collect();
                Err(format!("{} wrong:\n  {}", records.wrong.len(), first.join("\n  ")))
            }
        }
    }
}

const _: () = assert!(LONGEST_PLAIN >= 1300);
