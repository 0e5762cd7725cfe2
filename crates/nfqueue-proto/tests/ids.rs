//! Billions of packet ids through the machine, beside the kernel's side of a queue: ids wrap at
//! 2^32, and nothing may grow, be forgotten, or be decided by a message that is not its own.
//!
//! `NFQUEUE_IDS` is the number of ids of the long test, 10 000 000 000 by default:
//! `cargo test --release -p nfqueue-proto --test ids -- --ignored --nocapture`.

use std::{
    cell::Cell,
    fs,
    ops::Range,
    rc::Rc,
    time::{Duration, Instant},
};

use nfqueue_proto::{
    state::{
        Arrival, Carried, Clock, Decision, Effects, FixedSettings, Limits, Machine, Notice, Origin, Outbox, Outcome,
        Storage, Transmit, flush::FlushPolicy,
    },
    types::Action,
    wire::verdict::{Attachments, VerdictFields},
};

/// Packets of a round of receiving.
const ROUND: u32 = 64;
/// The kernel's limit on packets in a queue.
const MAX_LEN: u32 = 65_536;
/// SO_SNDBUF of a new socket, less what is not free.
const MAX_SEND: usize = 212_992 - 32;
/// The time between two rounds.
const PAUSE: Duration = Duration::from_micros(50);

#[derive(Debug, Clone)]
struct SteadyClock(Rc<Cell<Instant>>);

impl Clock for SteadyClock {
    fn now(&self) -> Instant {
        self.0.get()
    }
}

#[derive(Debug)]
struct NoExtras;

impl Carried for NoExtras {
    type Waiter = ();

    fn attachments(&self) -> Attachments<'_> {
        Attachments::default()
    }

    fn is_acknowledged(&self) -> bool {
        false
    }

    fn take_waiter(&mut self) -> Option<()> {
        None
    }

    fn put_waiter(&mut self, (): ()) {}
}

/// What the kernel knows of a packet. It is an error to decide one that its owner has not decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queued {
    No,
    Undecided,
    /// With the verdict word.
    Decided(u8),
}

/// The queue in the kernel. The ids of the packets that wait span less than the ring is long,
/// except for one packet that is held for longer.
struct Kernel {
    ring: Vec<Queued>,
    /// No packet of the ring before this id waits.
    oldest: u32,
    /// The id of the next packet.
    next: u32,
    waiting: u32,
    decided: u64,
    held: Option<(u32, Queued)>,
    batches: u64,
    singles: u64,
}

impl Kernel {
    fn new() -> Self {
        let ring = vec![Queued::No; 1 << 17];
        Self { ring, oldest: 1, next: 1, waiting: 0, decided: 0, held: None, batches: 0, singles: 0 }
    }

    fn slot(&mut self, id: u32) -> &mut Queued {
        match &mut self.held {
            Some((held, queued)) if *held == id => queued,
            _ => &mut self.ring[id as usize % (1 << 17)],
        }
    }

    /// Queues packets. Returns their ids.
    fn queue(&mut self, count: u32) -> Range<u64> {
        let first = self.next;
        for _ in 0..count {
            let id = self.next;
            self.next = id.wrapping_add(1);
            assert_eq!(std::mem::replace(&mut self.ring[id as usize % (1 << 17)], Queued::Undecided), Queued::No);
        }
        self.waiting += count;
        u64::from(first)..u64::from(first) + u64::from(count)
    }

    /// These packets do not fit into the socket: their ids are taken, and they do not wait.
    fn lose(&mut self, count: u32) {
        if self.oldest == self.next {
            self.oldest = self.oldest.wrapping_add(count);
        }
        self.next = self.next.wrapping_add(count);
    }

    /// Moves an undecided packet out of the ring: it stays for longer than the ring is long.
    fn hold(&mut self, id: u32) {
        assert_eq!(self.held, None);
        let queued = std::mem::replace(self.slot(id), Queued::No);
        assert_eq!(queued, Queued::Undecided);
        self.held = Some((id, queued));
    }

    fn settle(&mut self, id: u32, word: u8, what: &str) {
        let queued = std::mem::replace(self.slot(id), Queued::No);
        assert_eq!(queued, Queued::Decided(word), "id {id}, decided by {what}");
        if self.held.is_some_and(|(held, _)| held == id) {
            self.held = None;
        }
        self.waiting -= 1;
        self.decided += 1;
    }

    /// Executes a datagram of verdicts without attachments.
    fn execute(&mut self, datagram: &[u8]) {
        let messages = datagram.chunks_exact(32);
        assert!(messages.remainder().is_empty());
        for message in messages {
            assert_eq!(message[..4], 32_u32.to_ne_bytes());
            let word = |at: usize| u32::from_be_bytes(message[at..at + 4].try_into().expect("four bytes"));
            let (word, id) = (word(24) as u8, word(28));
            match u16::from_ne_bytes([message[4], message[5]]) {
                // NFQNL_MSG_VERDICT
                0x0301 => {
                    self.singles += 1;
                    self.settle(id, word, "a message of its own");
                }
                // NFQNL_MSG_VERDICT_BATCH: nfq_id_after
                0x0303 => {
                    self.batches += 1;
                    if let Some((held, _)) = self.held.filter(|(held, _)| held.wrapping_sub(id) as i32 <= 0) {
                        self.settle(held, word, "a batch");
                    }
                    while self.oldest.wrapping_sub(id) as i32 <= 0 {
                        if *self.slot(self.oldest) != Queued::No {
                            self.settle(self.oldest, word, "a batch");
                        }
                        self.oldest = self.oldest.wrapping_add(1);
                    }
                }
                kind => panic!("a message of kind {kind:#x}"),
            }
        }
        while self.oldest != self.next && self.ring[self.oldest as usize % (1 << 17)] == Queued::No {
            self.oldest = self.oldest.wrapping_add(1);
        }
    }
}

struct World {
    machine: Machine<NoExtras, SteadyClock>,
    outbox: Outbox<NoExtras>,
    clock: SteadyClock,
    kernel: Kernel,
    alarm: Option<Instant>,
    sent: u32,
    random: u64,
    lost: u64,
    /// Received and undecided, in any order.
    owned: Vec<u32>,
}

impl World {
    fn new() -> Self {
        let clock = SteadyClock(Rc::new(Cell::new(Instant::now())));
        let settings =
            FixedSettings { queue: 0, on_unanswered: Action::Drop, deadline: None, in_submission_order: false };
        let limits = Limits { max_len: MAX_LEN, payload: 65_531 };
        let policy = FlushPolicy::adaptive(Duration::from_micros(500));
        let mut machine = Machine::new(settings, policy, limits, 1, clock.clone());
        machine.set_receive_buffer(64 << 20);
        machine.bound();
        machine.set_driven(true);
        Self {
            machine,
            outbox: Outbox::new(0, MAX_SEND),
            clock,
            kernel: Kernel::new(),
            alarm: None,
            sent: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            lost: 0,
            owned: Vec::new(),
        }
    }

    /// xorshift64
    fn random(&mut self, below: u32) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (((self.random >> 32) * u64::from(below)) >> 32) as u32
    }

    /// As `Shared::perform` does it.
    fn perform(&mut self) {
        while self.machine.has_effects() {
            let Effects { flush, timer, look, unbind, probe, drain, .. } = self.machine.take_effects();
            assert!(!unbind && !probe && drain.is_none());
            if let Some(alarm) = timer {
                self.alarm = alarm.at;
            }
            for notice in self.machine.take_notices() {
                assert!(matches!(notice, Notice::Report(_)));
            }
            if look {
                self.machine.end_receive_round(0, 0, 0, self.lost, Some(self.sent));
            }
            if flush {
                self.flush();
            }
        }
    }

    fn flush(&mut self) {
        loop {
            while let Some(transmit) = self.machine.poll_transmit(&mut self.outbox, || true) {
                match transmit {
                    Transmit::Receive => self.machine.end_receive_round(0, 0, 0, self.lost, Some(self.sent)),
                    Transmit::Datagram { .. } => {
                        self.kernel.execute(self.outbox.encode());
                        self.sent = self.machine.transmitted(&mut self.outbox, Outcome::Sent);
                    }
                }
            }
            self.outbox.take_spent();
            if !self.machine.send_lock_released() {
                return;
            }
        }
    }

    fn receive(&mut self, count: u32) {
        let lost_before = self.machine.lost();
        let ids = self.kernel.queue(count);
        let arrivals = ids.clone().map(|id| Arrival { id: id as u32, storage: Storage::None });
        assert!(self.machine.arrived(arrivals), "the queue is open");
        self.owned.extend(ids.map(|id| id as u32));
        self.machine.end_receive_round(u64::from(count) * 128, 832 * count as usize, 0, lost_before, Some(self.sent));
    }

    fn decide(&mut self, id: u32, action: Action) {
        let word = if action == Action::Accept { 1 } else { 0 };
        let queued = std::mem::replace(self.kernel.slot(id), Queued::Decided(word));
        assert_eq!(queued, Queued::Undecided, "id {id}");
        let decision = Decision { fields: VerdictFields::plain(action), extras: None, origin: Origin::Owner };
        assert!(self.machine.decide(id, decision).is_ok(), "id {id} can be decided");
    }

    /// A round: packets come, some are lost, and some or all are decided.
    fn round(&mut self) {
        self.clock.0.set(self.clock.now() + PAUSE);
        if self.alarm.is_some_and(|at| at <= self.clock.now()) {
            self.alarm = None;
            self.machine.fire();
            self.perform();
        }
        match self.random(4096) {
            0 => {
                // Also gaps that are wider than the ledger's ring.
                let count = if self.random(16) == 0 { 20_000 } else { 1 + self.random(200) };
                self.kernel.lose(count);
                self.lost += u64::from(count);
            }
            // Packets wait for their owners.
            1 => (0..self.random(40)).for_each(|_| self.receive(ROUND)),
            _ => {}
        }
        self.receive(ROUND);
        match self.random(8) {
            // In any order, each with a verdict of its own; the rest later.
            0 => {
                for _ in 0..self.random(ROUND) {
                    let at = self.random(self.owned.len() as u32) as usize;
                    let id = self.owned.swap_remove(at);
                    let action = if self.random(2) == 0 { Action::Accept } else { Action::Drop };
                    self.decide(id, action);
                }
            }
            // All, in runs.
            1 => {
                let mut action = Action::Accept;
                for id in std::mem::take(&mut self.owned) {
                    if self.random(8) == 0 {
                        action = if action == Action::Accept { Action::Drop } else { Action::Accept };
                    }
                    self.decide(id, action);
                }
            }
            // All alike.
            _ => {
                let mut owned = std::mem::take(&mut self.owned);
                owned.iter().for_each(|id| self.decide(*id, Action::Accept));
                owned.clear();
                self.owned = owned;
            }
        }
        self.machine.stream_empty();
        self.perform();
    }

    /// Until so many ids have been given.
    fn run(&mut self, ids: u64, mut each_billion: impl FnMut(&Self, u64)) {
        let (mut told, mut given) = (0, 0_u64);
        while given < ids {
            let before = self.kernel.next;
            self.round();
            given += u64::from(self.kernel.next.wrapping_sub(before));
            if given / 1_000_000_000 > told {
                told = given / 1_000_000_000;
                each_billion(self, given);
            }
        }
        each_billion(self, given);
    }

    /// What is left is decided, and both sides agree.
    fn end(mut self, ids: u64) {
        std::mem::take(&mut self.owned).into_iter().for_each(|id| self.decide(id, Action::Accept));
        self.machine.flush();
        self.perform();
        assert_eq!((self.kernel.waiting, self.kernel.held), (0, None));
        let stats = self.machine.stats();
        assert_eq!(stats.lost.packets, self.lost);
        assert_eq!(stats.received.packets, self.kernel.decided);
        assert_eq!(stats.decided.accepted + stats.decided.dropped, self.kernel.decided);
        assert_eq!((stats.held.in_flight, stats.held.bytes, stats.sent.gone_at_least), (0, 0, 0));
        assert!(self.kernel.decided + self.lost >= ids, "{} decided, {} lost", self.kernel.decided, self.lost);
        assert_eq!(self.kernel.next, 1_u32.wrapping_add((self.kernel.decided + self.lost) as u32));
        assert!(self.kernel.batches > 0 && self.kernel.singles > 0);
    }
}

/// Resident memory in bytes.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Some rounds before memory is measured: buffers have their size then.
const WARM_UP: u64 = 20_000_000;
/// The machine's buffers may grow once more, with the longest backlog.
const SLACK: u64 = 4 << 20;

/// Millions of ids, and the wrap.
#[test]
fn ids_wrap_and_each_packet_gets_its_own_verdict() {
    let mut world = World::new();
    world.run(300_000, |_, _| {});
    // Close to the wrap. Only ids that were lost are skipped.
    std::mem::take(&mut world.owned).into_iter().for_each(|id| world.decide(id, Action::Accept));
    world.machine.flush();
    world.perform();
    for _ in 0..2 {
        let skipped = (u32::MAX - 500_000 - world.kernel.next).min(u32::MAX / 2 - 1);
        world.kernel.lose(skipped);
        world.lost += u64::from(skipped);
        world.round();
        std::mem::take(&mut world.owned).into_iter().for_each(|id| world.decide(id, Action::Accept));
        world.machine.flush();
        world.perform();
    }
    world.run(1_000_000, |_, _| {});
    assert!(world.kernel.next < 1_000_000, "the ids have wrapped: {}", world.kernel.next);
    world.end(u64::from(u32::MAX));
}

#[test]
#[ignore = "minutes, in release"]
fn ten_billion_ids_leave_nothing_behind() {
    let ids = std::env::var("NFQUEUE_IDS").map_or(10_000_000_000, |text| text.parse().expect("a number"));
    let mut world = World::new();
    world.run(WARM_UP, |_, _| {});
    let (before, start) = (resident(), Instant::now());
    let mut most = 0;
    world.run(ids, |world, given| {
        most = most.max(resident());
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "{given} ids in {seconds:.0} s, {:.1} million a second; {} batches, {} singles; resident {} KiB, before {} KiB",
            given as f64 / seconds / 1e6,
            world.kernel.batches,
            world.kernel.singles,
            resident() / 1024,
            before / 1024,
        );
    });
    world.end(ids);
    assert!(most <= before + SLACK, "resident: {before} bytes before, {most} at most");
}

/// One packet is held while half of all ids, and more, are given to others. As long as it waits no
/// batch may be sent.
#[test]
#[ignore = "minutes, in release"]
fn a_packet_held_for_more_than_half_of_all_ids_is_decided_by_its_own_verdict() {
    let ids = std::env::var("NFQUEUE_IDS").map_or((1 << 31) + 10_000_000, |text| text.parse().expect("a number"));
    let mut world = World::new();
    world.run(WARM_UP, |_, _| {});
    world.receive(1);
    let held = world.owned.pop().expect("a packet");
    world.kernel.hold(held);
    let (before, start) = (resident(), Instant::now());
    let batches = world.kernel.batches;
    world.run(1_000_000, |_, _| {});
    let early = world.kernel.batches - batches;
    world.run(ids, |_, given| eprintln!("{given} ids in {:.0} s", start.elapsed().as_secs_f64()));
    assert_eq!(world.kernel.batches - batches, early, "batches while a packet is held");
    world.decide(held, Action::Drop);
    world.machine.flush();
    world.perform();
    assert_eq!(world.kernel.held, None);
    world.run(1_000_000, |_, _| {});
    assert!(world.kernel.batches > batches + early, "batches again");
    let after = resident();
    eprintln!("resident {} KiB before, {} KiB after", before / 1024, after / 1024);
    world.end(ids);
    assert!(after <= before + SLACK, "resident: {before} bytes before, {after} after");
}
