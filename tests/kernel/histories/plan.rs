//! The plan of a history. It is drawn from a seed, so the same seed gives the same plan, whatever
//! the order in which threads run.

use std::time::Duration;

use tokio_nfqueue::{Hook, Reconfigure};

use crate::{
    settings::{DEFAULT_MAX_LEN, Policy, Settings, either},
    support::random::Random,
};

/// The kinds of faults in the histories of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// No faults: every number adds up exactly.
    Calm,
    /// Threads without the capability or with a temporarily missing one, unregistered hooks,
    /// interfaces that go down.
    Faulty,
    /// As either of these, but short and closed under load.
    Closing,
}

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// The worker threads of a multi-thread runtime; 0 for a current-thread runtime.
    pub(crate) workers: usize,
    /// Whether datagrams come from another namespace over a pair of interfaces, or over loopback.
    pub(crate) veth: bool,
    pub(crate) hook: Hook,
    /// Whether the rules accept packets while a queue is not bound.
    pub(crate) bypass: bool,
    /// Each queue but the last gets the traffic of a port. The last gets requeued packets.
    pub(crate) queues: Vec<Settings>,
    pub(crate) rounds: Vec<Round>,
    pub(crate) end: End,
    /// Some verdicts are submitted without `CAP_NET_ADMIN`.
    pub(crate) capless: bool,
    /// Streams are sometimes not polled for a while.
    pub(crate) pauses: bool,
    /// Refusals are read continuously, not only before a comparison.
    pub(crate) reads_refusals: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// Numbered datagrams for each receiver.
    pub(crate) packets: u32,
    /// The number of datagrams between two pauses of the sender.
    pub(crate) burst: usize,
    pub(crate) fault: Option<Fault>,
    /// Threads that change settings.
    pub(crate) reconfigurers: usize,
}

/// Events that affect packets without their owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another program's base chain is added and removed at a hook that the packets do not
    /// traverse. All queued packets are dropped.
    UnusedHook,
    /// The same at the queue's own hook, after the rules.
    HookBehind,
    /// The same before the rules: packets that are held when the chain is added are queued again
    /// after they have been accepted.
    HookBefore,
    /// The receiving interface goes down and up again.
    Flap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Close,
    CloseWithin(Duration),
    /// The streams are dropped.
    Drop,
    /// The runtime is dropped, with the tasks that hold packets.
    Shutdown,
    /// As `CloseWithin`, by a thread without the capability.
    CloseWithoutCapability(Duration),
}

/// What is done with one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deed {
    pub(crate) who: Who,
    /// How long the packet is held.
    pub(crate) delay: Duration,
    pub(crate) detach: bool,
    pub(crate) what: What,
    pub(crate) how: How,
    /// In the last round: the packet is held until the shutdown begins.
    pub(crate) keep: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Reader,
    Task,
    /// A task that temporarily lowers its thread's capability.
    CaplessForAWhile,
    Thread,
    CaplessThread,
    /// A task that panics.
    Panic,
    /// A task that is aborted.
    Abort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Accept,
    AcceptMarked,
    Drop,
    Repeat,
    Requeue { bypass: bool },
    DropPacket,
    DropVerdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Submit,
    SubmitToSink,
    Feed,
    Send,
    Confirm,
    /// The confirmation is not awaited.
    ConfirmNotAwaited,
}

impl How {
    /// Whether it completes without an await.
    fn at_once(self) -> bool {
        matches!(self, Self::Submit | Self::SubmitToSink | Self::Feed | Self::ConfirmNotAwaited)
    }
}

/// The mark that the rules do not queue.
pub(crate) const PASS: u32 = 1 << 31;
/// The length of the headers and the number, which a copy range must include.
pub(crate) const NUMBERED: u32 = 32;

impl Plan {
    pub(crate) fn new(profile: Profile, seed: u64) -> Self {
        let random = &mut Random::new(mix(seed, profile as u64, 1));
        let faulty = match profile {
            Profile::Calm => false,
            Profile::Faulty => true,
            Profile::Closing => random.below(2) == 0,
        };
        let veth = random.one_in(4);
        let hook = match random.below(8) {
            5 if !veth => Hook::Output,
            6 => Hook::Prerouting,
            7 if !veth => Hook::Postrouting,
            _ => Hook::Input,
        };
        let bypass = random.one_in(2);
        let fronts = 1 + random.below(3);
        let queues = (0..=fronts).map(|_| settings(random, veth)).collect();
        let rounds = if profile == Profile::Closing { 1 } else { 1 + random.below(4) };
        let rounds = (0..rounds).map(|_| Round::draw(random, faulty, veth)).collect();
        let end = match random.below(if faulty { 18 } else { 16 }) {
            0..4 => End::Close,
            4..8 => End::CloseWithin(Duration::from_micros(random.below(8000) as u64)),
            8..12 => End::Drop,
            12..16 => End::Shutdown,
            _ => End::CloseWithoutCapability(Duration::from_micros(random.below(8000) as u64)),
        };
        Self {
            seed,
            workers: [0, 0, 2, 3, 4][random.below(5)],
            veth,
            hook,
            bypass,
            queues,
            rounds,
            end,
            capless: faulty && random.below(3) > 0,
            pauses: random.one_in(2),
            reads_refusals: random.one_in(2),
        }
    }

    /// The number of queues with traffic.
    pub(crate) fn fronts(&self) -> usize {
        self.queues.len() - 1
    }

    /// The queue for requeued packets.
    pub(crate) fn side(&self) -> usize {
        self.queues.len() - 1
    }

    /// The queue that gets the datagram with this number.
    pub(crate) fn front(&self, serial: u32) -> usize {
        serial as usize % self.fronts()
    }

    /// Whether packets may be gone in a round.
    pub(crate) fn is_faulty(&self, round: usize) -> bool {
        self.rounds.get(round).is_some_and(|round| round.fault.is_some())
    }

    /// Whether packets that are accepted may be queued again in a round.
    pub(crate) fn queues_again(&self, round: usize) -> bool {
        self.rounds.get(round).is_some_and(|round| round.fault == Some(Fault::HookBefore))
    }

    /// A random source for one purpose.
    pub(crate) fn random(&self, purpose: u64) -> Random {
        Random::new(mix(self.seed, purpose, 3))
    }

    /// What is done with a packet that is handed out for the `time`-th time.
    pub(crate) fn deed(&self, serial: u32, queue: usize, time: usize) -> Deed {
        let random = &mut Random::new(mix(self.seed, u64::from(serial), 100 + time as u64));
        let capless = self.capless && random.one_in(3);
        let who = match random.below(20) {
            0..6 => Who::Reader,
            6..12 if capless => Who::CaplessForAWhile,
            6..12 => Who::Task,
            12..18 if capless => Who::CaplessThread,
            12..18 => Who::Thread,
            18 => Who::Panic,
            _ => Who::Abort,
        };
        // A packet returns only once.
        let returns = queue != self.side() && time == 0;
        let what = match random.below(20) {
            0..7 => What::Accept,
            7 | 8 => What::AcceptMarked,
            9..13 => What::Drop,
            13 | 14 if returns => What::Repeat,
            15 | 16 if returns => What::Requeue { bypass: random.one_in(2) },
            17 | 18 => What::DropPacket,
            19 => What::DropVerdict,
            _ => What::Accept,
        };
        let how = match random.below(10) {
            0..3 => How::Submit,
            3 | 4 => How::SubmitToSink,
            5 => How::Feed,
            6 => How::Send,
            7 | 8 => How::Confirm,
            _ => How::ConfirmNotAwaited,
        };
        let how = if who == Who::CaplessForAWhile && !how.at_once() { How::Submit } else { how };
        let delay = match random.below(6) {
            0..3 => 0,
            3 | 4 => random.below(1000) as u64,
            _ => random.below(15_000) as u64,
        };
        let threaded = matches!(who, Who::Thread | Who::CaplessThread);
        let delay = Duration::from_micros(if threaded { delay / 16 } else { delay });
        Deed { who, delay, detach: random.one_in(5), what, how, keep: random.one_in(6) }
    }
}

fn settings(random: &mut Random, veth: bool) -> Settings {
    Settings {
        policy: Policy::draw(random),
        unanswered: either(random),
        deadline: random.one_in(3).then(|| (Duration::from_millis(2 + random.below(30) as u64), either(random))),
        copy_range: copy_range(random, veth),
        max_len: if random.one_in(4) { 8 + random.below(60) as u32 } else { DEFAULT_MAX_LEN },
        receive_buffer: random.one_in(4).then(|| 8192 + random.below(40_000)),
        fail_open: random.one_in(8),
        gso: true,
        busy_poll: if random.one_in(5) { Duration::from_micros(50) } else { Duration::ZERO },
    }
}

/// A copy range, or `None` for metadata mode, in which the mark contains the number.
fn copy_range(random: &mut Random, veth: bool) -> Option<u32> {
    match random.below(6) {
        0 if !veth => None,
        0 | 1 => Some(NUMBERED),
        2 => Some(NUMBERED + random.below(300) as u32),
        3 => Some(1500),
        _ => Some(65_531),
    }
}

/// A random change of settings under which packets can still be identified.
pub(crate) fn change(random: &mut Random, veth: bool) -> Reconfigure {
    let mut change = Reconfigure::new();
    if random.one_in(2) {
        change = match copy_range(random, veth) {
            Some(range) => change.copy_range(range),
            None => change.copy_metadata(),
        };
    }
    if random.one_in(3) {
        change = change.max_len(16 + random.below(2000) as u32);
    }
    if random.one_in(3) {
        change = change.gso(random.one_in(2));
    }
    if random.one_in(3) {
        change = change.uid_gid(random.one_in(2));
    }
    change
}

impl Round {
    fn draw(random: &mut Random, faulty: bool, veth: bool) -> Self {
        let fault = match random.below(8) {
            _ if !faulty => None,
            0 => Some(Fault::UnusedHook),
            1 => Some(Fault::HookBehind),
            2 => Some(Fault::HookBefore),
            3..6 if veth => Some(Fault::Flap),
            _ => None,
        };
        let reconfigurers = if random.one_in(3) { 1 + random.below(3) } else { 0 };
        Self { packets: 20 + random.below(110) as u32, burst: 1 + random.below(40), fault, reconfigurers }
    }
}

/// Mixes three numbers into one (splitmix64).
fn mix(one: u64, two: u64, three: u64) -> u64 {
    [two, three].into_iter().fold(one, |state, next| {
        let mut z = (state ^ next.rotate_left(32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}
