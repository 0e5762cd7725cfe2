//! Runs one history: traffic, faults, a shutdown, and the comparison of delivered datagrams with
//! the decisions.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures::{FutureExt, executor::block_on};
use nfqueue_divert::Divert;
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
};
use tokio_nfqueue::{
    ErrorKind, Hook, Protocol, Rule, Stats,
    stats::{Number, NumberKind},
};

use super::{
    owners::{World, mark_of, read},
    plan::{End, Fault, PASS, Plan, change},
    records::{Findings, Mark, Totals, imbalance},
};
use crate::{
    common::{
        PATIENCE, PORT, Random, account,
        rules::{NetfilterProtoFamily, Place, install_hook, remove},
        without_net_admin,
    },
    support::{self, Peer},
};

/// How long a thread may be in the kernel. Closing the socket of a table waits for a kernel thread
/// (`nft_rcv_nl_event`, `flush_work`), and deleting a chain for `synchronize_rcu`: more than 40 s
/// beside three busy loops on two CPUs.
const HANGS: Duration = Duration::from_secs(300);

/// Runs the history of a plan.
///
/// # Errors
/// What was wrong.
pub(crate) fn live(plan: Plan) -> Result<Totals, String> {
    let runtime = match plan.workers {
        0 => Builder::new_current_thread(),
        workers => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(workers);
            builder
        }
    }
    .enable_all()
    .build()
    .map_err(|error| error.to_string())?;
    let mut history = History::begin(plan, &runtime);
    runtime.block_on(history.divert())?;
    for round in 0..history.world.plan.rounds.len() - 1 {
        runtime.block_on(history.round(round))?;
    }
    history.end(runtime)
}

struct History {
    world: Arc<World>,
    threads: [JoinHandle<()>; 2],
    peer: Option<Arc<Peer>>,
    divert: Option<Divert>,
    receivers: Vec<UdpSocket>,
    sender: Sender,
    /// Signals that make the readers drop their streams.
    stops: Vec<oneshot::Sender<()>>,
    marks: Vec<Mark>,
    watch: Watch,
}

impl History {
    fn begin(plan: Plan, runtime: &Runtime) -> Self {
        let peer = plan.veth.then(|| Arc::new(support::veth()));
        let receivers = (0..plan.fronts()).map(|front| {
            let socket = support::udp((Ipv4Addr::UNSPECIFIED, PORT + front as u16));
            socket.set_nonblocking(true).expect("set non-blocking");
            socket
        });
        let receivers = receivers.collect();
        let _inside = runtime.enter();
        let queues = plan.queues.iter().enumerate().map(|(number, settings)| {
            let bound = settings.builder(number as u16).bind().now_or_never().expect("bound at once");
            bound.unwrap_or_else(|error| panic!("{settings:?}: {error}"))
        });
        let (streams, sinks): (Vec<_>, Vec<_>) = queues.map(tokio_nfqueue::Queue::split).unzip();
        let sender = Sender::start(peer.clone(), plan.fronts());
        let marks = vec![Mark::default(); plan.queues.len()];
        let reads_refusals = plan.reads_refusals;
        let (world, threads) = World::new(plan, sinks);
        let mut stops = Vec::new();
        for (queue, stream) in streams.into_iter().enumerate() {
            let (stop, stopped) = oneshot::channel();
            stops.push(stop);
            runtime.spawn(read(Arc::clone(&world), queue, stream, stopped));
            if reads_refusals {
                let world = Arc::clone(&world);
                runtime.spawn(async move {
                    let mut refusals = world.sinks[queue].refusals();
                    while let Some(error) = refusals.recv().await {
                        world.refusal(queue, &error);
                    }
                });
            }
        }
        let watch = Watch::start(&world);
        Self { world, threads, peer, divert: None, receivers, sender, stops, marks, watch }
    }

    /// Installs the rules after a first datagram has been delivered.
    async fn divert(&mut self) -> Result<(), String> {
        self.barrier(true).await?;
        let plan = &self.world.plan;
        let rules = (0..plan.fronts()).map(|front| {
            let rule = Rule::new(plan.hook).protocol(Protocol::Udp).destination_port(PORT + front as u16);
            rule.unless_mark(PASS, PASS).to_queue(front as u16).bypass(plan.bypass)
        });
        let divert = Divert::builder().rules(rules).install().map_err(|error| error.to_string())?;
        self.divert = Some(divert);
        Ok(())
    }

    /// Sends the datagrams of a round, causes its faults, waits until everything is decided, and
    /// compares.
    async fn round(&mut self, number: usize) -> Result<(), String> {
        self.begin_round(number);
        let rest = self.start_round(number);
        self.until("the round's traffic and faults are over", || {
            rest.iter().all(JoinHandle::is_finished) && self.sender.is_idle()
        })
        .await?;
        self.joined(rest)?;
        self.barrier(false).await?;
        self.compare(|history, findings| {
            let world = &history.world;
            let mut marks = Vec::new();
            for (queue, sink) in world.sinks.iter().enumerate() {
                let (records, before) = (world.records(), &history.marks[queue]);
                let stats = sink.stats();
                let kernel = account(queue as u16);
                marks.push(records.check_round(&world.plan, queue, before, &stats, kernel, findings));
            }
            if world.held() > 0 {
                findings.sums += 1;
                findings.text += "  packets are held\n";
            }
            if findings.none() {
                history.marks = marks;
            }
        })
        .await
    }

    fn begin_round(&self, number: usize) {
        self.world.records().round = number;
    }

    /// Starts the traffic and the faults of a round.
    fn start_round(&self, number: usize) -> Vec<JoinHandle<()>> {
        let world = &self.world;
        let round = world.plan.rounds[number];
        let mut random = world.plan.random(2000 + number as u64);
        for burst in 0..(round.packets as usize * world.plan.fronts()).div_ceil(round.burst) {
            let left = round.packets as usize * world.plan.fronts() - burst * round.burst;
            let pause = Duration::from_micros(if random.one_in(3) { random.below(3000) as u64 } else { 0 });
            let datagrams = (0..left.min(round.burst)).map(|_| {
                // At most 1280 bytes of buffer each, so that a round fits in a receiver's buffer.
                let length = if random.one_in(4) { 4 + random.below(400) } else { 4 };
                (world.records().next(false), length)
            });
            self.sender.send(Burst { datagrams: datagrams.collect(), pause });
        }
        let mut threads = Vec::new();
        if let Some(fault) = round.fault {
            let (plan_hook, peer) = (world.plan.hook, self.peer.clone());
            let times = 1 + random.below(3);
            let mut random = world.plan.random(3000 + number as u64);
            threads.push(thread::spawn(move || {
                for _ in 0..times {
                    thread::sleep(Duration::from_micros(random.below(8000) as u64));
                    cause(fault, plan_hook, peer.as_deref(), &mut random);
                }
            }));
        }
        for index in 0..round.reconfigurers as u64 {
            let world = Arc::clone(world);
            let mut random = world.plan.random(4000 + number as u64 * 10 + index);
            threads.push(thread::spawn(move || reconfigure(&world, &mut random)));
        }
        threads
    }

    /// Sends one more datagram to each queue, repeatedly, until it has arrived. What the same
    /// thread has sent before on the same CPU has then arrived at the queues. With `direct`, no
    /// queue is in the way.
    async fn barrier(&self, direct: bool) -> Result<(), String> {
        const PAUSE: Duration = Duration::from_millis(20);
        let fronts = self.world.plan.fronts();
        let mut sent: Vec<Vec<u32>> = vec![Vec::new(); fronts];
        let mut next = Instant::now();
        let deadline = next + PATIENCE;
        loop {
            self.receive();
            let missing: Vec<usize> = {
                let records = self.world.records();
                let through = |serials: &Vec<u32>| {
                    serials.last().is_some_and(|serial| match direct {
                        true => records.was_delivered(*serial),
                        // With fail-open it may be delivered without being queued, and then the
                        // queue does not know what was lost before it.
                        false => records.was_handed_out(*serial),
                    })
                };
                (0..fronts).filter(|front| !through(&sent[*front])).collect()
            };
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("nothing comes through the queues {missing:?}; {}", self.state()));
            }
            if Instant::now() >= next && self.sender.is_idle() {
                // One for each port, so that all ports get new numbers.
                for _ in 0..fronts {
                    let serial = self.world.records().next(direct);
                    sent[self.world.plan.front(serial)].push(serial);
                    self.sender.send(Burst { datagrams: vec![(serial, 4)], pause: Duration::ZERO });
                }
                next = Instant::now() + PAUSE;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until the comparison finds nothing wrong.
    async fn compare(&mut self, check: impl Fn(&mut Self, &mut Findings)) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.receive();
            self.world.collect_refusals();
            let mut findings = self.world.records().judge(&self.world.plan);
            check(self, &mut findings);
            if let Some(error) = self.world.errors().first() {
                return Err(format!("{error}; {}", self.state()));
            }
            if findings.none() {
                return Ok(());
            }
            if findings.twice > 0 || Instant::now() > deadline {
                let Findings { wrong, forgotten, twice, sums, text } = findings;
                return Err(format!(
                    "{wrong} wrong, {forgotten} forgotten, {twice} twice, {sums} sums:\n{text}{}",
                    self.state()
                ));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Reads the delivered datagrams.
    fn receive(&self) {
        let mut datagram = [0; 512];
        for receiver in &self.receivers {
            while let Ok(length) = receiver.recv(&mut datagram) {
                let serial = u32::from_be_bytes(*datagram[..length].first_chunk().expect("a number"));
                if !self.world.records().deliver(serial) {
                    self.world.error(format!("a datagram of unknown number {serial}"));
                }
            }
        }
        for serial in self.sender.failed.try_iter_all() {
            self.world.records().datagrams[serial as usize].unsent = true;
        }
    }

    async fn until(&self, what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
        let deadline = Instant::now() + HANGS;
        while !condition() {
            self.receive();
            if Instant::now() > deadline {
                return Err(format!("waited {HANGS:?} in vain until {what}; {}", self.state()));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    fn joined(&self, threads: Vec<JoinHandle<()>>) -> Result<(), String> {
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked".to_owned())?;
        }
        Ok(())
    }

    fn state(&self) -> String {
        let world = &self.world;
        let mut text = format!("held {}, errors {:?}\n", world.held(), world.errors());
        for (queue, sink) in world.sinks.iter().enumerate() {
            text += &format!("  queue {queue}: {:?}\n    {:?}\n", account(queue as u16), sink.stats());
        }
        text
    }

    /// The last round, the shutdown in the middle of it, and the last comparison.
    fn end(mut self, runtime: Runtime) -> Result<Totals, String> {
        let number = self.world.plan.rounds.len() - 1;
        self.begin_round(number);
        let already = self.sender.sent();
        let rest = self.start_round(number);
        let mut random = self.world.plan.random(5000);
        let total = self.world.plan.rounds[number].packets as usize * self.world.plan.fronts();
        let begin = random.below(total + 1) as u32 + already;
        runtime.block_on(async {
            self.until("the end's time has come", || self.sender.sent() >= begin || self.sender.is_idle()).await
        })?;
        self.world.records().shutting_down = true;
        let fronts = self.world.plan.fronts();
        let outside = Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
        let mut runtime = Some(runtime);
        let end = self.world.plan.end;
        match end {
            End::Shutdown => {
                drop(runtime.take());
                self.world.release(false);
            }
            End::Close | End::CloseWithin(_) | End::Drop | End::CloseWithoutCapability(_) => {
                let inside = runtime.as_ref().expect("it is taken by a shutdown alone");
                inside.block_on(async {
                    self.begin_end(end, 0..fronts);
                    self.world.release(true);
                    self.until("the queues with traffic are closed", || {
                        (0..fronts).all(|queue| self.world.is_closed(queue))
                    })
                    .await?;
                    self.begin_end(end, fronts..fronts + 1);
                    self.until("the last queue is closed", || self.world.is_closed(fronts)).await
                })?;
            }
        }
        // A current-thread runtime runs its tasks only while it is driven.
        let driver = runtime.as_ref().unwrap_or(&outside);
        driver.block_on(async {
            self.until("the round's traffic and faults are over", || {
                rest.iter().all(JoinHandle::is_finished) && self.sender.is_idle()
            })
            .await?;
            self.until("nothing is held", || self.world.held() == 0).await
        })?;
        self.joined(rest)?;
        self.world.dismiss_threads();
        let finish = async {
            if !matches!(end, End::CloseWithoutCapability(_)) {
                self.until("the queues are free", || (0..=fronts).all(|queue| account(queue as u16).is_none())).await?;
            }
            self.divert.as_ref().map_or(Ok(()), Divert::remove_rules).map_err(|error| error.to_string())?;
            self.barrier(true).await?;
            self.compare(|history, findings| {
                let world = &history.world;
                let records = world.records();
                for (queue, sink) in world.sinks.iter().enumerate() {
                    let (stats, before) = (sink.stats(), &history.marks[queue]);
                    records.check_end(&world.plan, queue, &stats, findings);
                    records.check_passing(&world.plan, queue, before, &stats, findings);
                }
            })
            .await
        };
        driver.block_on(finish)?;
        drop(runtime);
        self.conclude(outside)
    }

    /// Begins the shutdown of some queues.
    fn begin_end(&mut self, end: End, queues: std::ops::Range<usize>) {
        for queue in queues.clone() {
            let (world, sink) = (Arc::clone(&self.world), self.world.sinks[queue].clone());
            let closed = move |result: Result<(), tokio_nfqueue::Error>, allowed: &[ErrorKind]| {
                if let Err(error) = result
                    && !allowed.contains(&error.kind())
                {
                    world.error(format!("queue {queue}: {error}"));
                }
            };
            match end {
                End::Close => drop(tokio::spawn(async move { closed(sink.close_within(HANGS).await, &[]) })),
                End::CloseWithin(timeout) => drop(tokio::spawn(async move {
                    closed(sink.close_within(timeout).await, &[ErrorKind::TimedOut]);
                })),
                End::CloseWithoutCapability(timeout) => {
                    self.world.records().unsendable = true;
                    drop(thread::spawn(move || {
                        let result = without_net_admin(|| block_on(sink.close_within(timeout)));
                        closed(result, &[ErrorKind::TimedOut, ErrorKind::NotPermitted]);
                    }));
                }
                End::Drop | End::Shutdown => {}
            }
        }
        if end == End::Drop {
            // The readers of the first queues are first.
            let count = queues.len();
            for stop in self.stops.drain(..count) {
                let _ = stop.send(());
            }
        }
    }

    /// Drops everything, and checks that nothing is left.
    fn conclude(self, outside: Runtime) -> Result<Totals, String> {
        let Self { world, threads, divert, watch, .. } = self;
        watch.stop()?;
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked".to_owned())?;
        }
        let overflows = receive_errors();
        if overflows > 0 {
            return Err(format!("the test is at fault: {overflows} datagrams found no room at their receivers"));
        }
        let totals = world.records().totals(&world.plan);
        let queues = world.sinks.len();
        let errors = world.errors();
        if let Some(error) = errors.first() {
            return Err(error.clone());
        }
        let weak = Arc::downgrade(&world);
        drop(world);
        outside.block_on(async {
            let deadline = Instant::now() + PATIENCE;
            while (0..queues).any(|queue| account(queue as u16).is_some()) {
                if Instant::now() > deadline {
                    return Err(format!(
                        "a queue is bound although every handle is gone ({} are not)",
                        weak.strong_count()
                    ));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        })?;
        drop(divert);
        Ok(totals)
    }
}

/// Causes a fault.
fn cause(fault: Fault, hook: Hook, peer: Option<&Peer>, random: &mut Random) {
    const OTHER: &str = "other";
    let number = match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Output => 3,
        _ => 4,
    };
    let place = match fault {
        Fault::UnusedHook => Place { hook: 2, priority: 0 },
        Fault::HookBehind => Place { hook: number, priority: 10 },
        Fault::HookBefore => Place { hook: number, priority: -10 },
        Fault::Flap => {
            let Some(peer) = peer else { return };
            support::link_down(&peer.near);
            thread::sleep(Duration::from_micros(random.below(2000) as u64));
            support::link_up(&peer.near);
            return;
        }
    };
    install_hook(NetfilterProtoFamily::Inet, OTHER, place).expect("add a base chain");
    thread::sleep(Duration::from_micros(random.below(8000) as u64));
    remove(NetfilterProtoFamily::Inet, OTHER).expect("remove a table");
}

/// Changes settings at random times, sometimes without the capability.
fn reconfigure(world: &World, random: &mut Random) {
    for _ in 0..1 + random.below(10) {
        thread::sleep(Duration::from_micros(random.below(3000) as u64));
        let queue = random.below(world.sinks.len());
        let change = change(random, world.plan.veth);
        let capless = world.plan.capless && random.one_in(3);
        let send = || block_on(world.sinks[queue].reconfigure(&change));
        let result = if capless { without_net_admin(send) } else { send() };
        match result {
            Ok(()) => {
                if capless {
                    world.error(format!("queue {queue}: reconfigured without the capability"));
                }
            }
            Err(error) => {
                let allowed = match error.kind() {
                    ErrorKind::Closed => world.records().shutting_down,
                    ErrorKind::NotPermitted => capless,
                    ErrorKind::Unconfirmed => world.plan.queues[queue].receive_buffer.is_some(),
                    _ => false,
                };
                if !allowed {
                    world.error(format!("queue {queue}: {error}"));
                }
            }
        }
    }
}

/// Reads the statistics continuously: they add up in every snapshot.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

impl Watch {
    fn start(world: &Arc<World>) -> Self {
        let (stop, sinks) = (Arc::new(AtomicBool::new(false)), world.sinks.clone());
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut before = vec![Stats::default(); sinks.len()];
                while !stop.load(SeqCst) {
                    for (queue, sink) in sinks.iter().enumerate() {
                        let stats = sink.stats();
                        if let Some(wrong) = imbalance(&stats) {
                            return Err(format!("queue {queue}: {wrong}"));
                        }
                        let old = std::mem::replace(&mut before[queue], stats);
                        if let Some(name) = fallen(&old, &stats) {
                            return Err(format!("queue {queue}: the counter {name} has fallen: {old:?}, {stats:?}"));
                        }
                    }
                    thread::sleep(Duration::from_micros(500));
                }
                Ok(())
            }
        });
        Self { stop, thread }
    }

    fn stop(self) -> Result<(), String> {
        self.stop.store(true, SeqCst);
        self.thread.join().unwrap_or_else(|_| Err("the watch panicked".to_owned()))
    }
}

/// A counter that has fallen and may not. Those of the actions may: when packets turn out to have
/// gone, and when a verdict is sent again.
fn fallen(before: &Stats, after: &Stats) -> Option<&'static str> {
    const OF_ACTIONS: [&str; 4] = ["decided.accepted", "decided.dropped", "decided.repeated", "decided.requeued"];
    let fell = |(before, after): &(Number, Number)| {
        let counts = after.kind == NumberKind::Counter && !OF_ACTIONS.contains(&after.name);
        counts && before.value > after.value
    };
    before.iter().zip(after.iter()).find(fell).map(|(_, after)| after.name)
}

/// Numbers and lengths of datagrams, and a pause.
struct Burst {
    datagrams: Vec<(u32, usize)>,
    pause: Duration,
}

/// A thread that sends datagrams in the given order.
struct Sender {
    bursts: mpsc::Sender<Burst>,
    requested: AtomicU32,
    sent: Arc<AtomicU32>,
    failed: Failed,
}

struct Failed(std::sync::Mutex<mpsc::Receiver<u32>>);

impl Failed {
    fn try_iter_all(&self) -> Vec<u32> {
        super::owners::lock(&self.0).try_iter().collect()
    }
}

impl Sender {
    fn start(peer: Option<Arc<Peer>>, fronts: usize) -> Self {
        let (bursts, inbox) = mpsc::channel::<Burst>();
        let (failures, failed) = mpsc::channel();
        let sent = Arc::new(AtomicU32::new(0));
        let done = Arc::clone(&sent);
        let to = peer.as_ref().map_or(Ipv4Addr::LOCALHOST, |peer| peer.near_v4);
        let marked = peer.is_none();
        let body = move || {
            support::stay_on_one_cpu();
            let socket = support::udp((Ipv4Addr::UNSPECIFIED, 0));
            for Burst { datagrams, pause } in inbox {
                for (serial, length) in datagrams {
                    let mut datagram = serial.to_be_bytes().to_vec();
                    datagram.resize(length, 0);
                    if marked {
                        support::set_mark(&socket, mark_of(serial));
                    }
                    if socket.send_to(&datagram, (to, PORT + (serial as usize % fronts) as u16)).is_err() {
                        let _ = failures.send(serial);
                    }
                    done.fetch_add(1, SeqCst);
                }
                thread::sleep(pause);
            }
        };
        match &peer {
            Some(peer) => drop(peer.spawn(body)),
            None => drop(thread::spawn(body)),
        }
        let failed = Failed(std::sync::Mutex::new(failed));
        Self { bursts, requested: AtomicU32::new(0), sent, failed }
    }

    fn send(&self, burst: Burst) {
        self.requested.fetch_add(burst.datagrams.len() as u32, SeqCst);
        self.bursts.send(burst).expect("the sender lives as long as its channel");
    }

    fn sent(&self) -> u32 {
        self.sent.load(SeqCst)
    }

    fn is_idle(&self) -> bool {
        self.sent() == self.requested.load(SeqCst)
    }
}

/// The number of datagrams that did not fit in their receivers' buffers, in this network namespace.
fn receive_errors() -> u64 {
    crate::common::udp_counter("RcvbufErrors")
}
