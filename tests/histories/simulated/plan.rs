//! What a history consists of, drawn from a seed.

use std::time::Duration;

use tokio_nfqueue::{Action, FlushDecision, FlushPolicy, Queue, QueueBuilder};

/// Random numbers that are the same each time (xorshift64*).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    pub(crate) fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }
}

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// The worker threads of a multi-thread runtime; 0 for a current-thread runtime.
    pub(crate) workers: usize,
    /// Whether the history moves the clock; otherwise it runs.
    pub(crate) moves_clock: bool,
    pub(crate) first_id: u32,
    /// The queue of the traffic, and the queue for requeued packets.
    pub(crate) queues: [Settings; 2],
    pub(crate) steps: usize,
    /// Interfaces that go down, hooks that are unregistered, sends that fail, a missing capability.
    pub(crate) faults: bool,
    pub(crate) end: End,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) policy: Policy,
    pub(crate) unanswered: Action,
    pub(crate) deadline: Option<(Duration, Action)>,
    /// `None` for metadata mode.
    pub(crate) copy_range: Option<u32>,
    pub(crate) max_len: u32,
    pub(crate) receive_buffer: Option<usize>,
    pub(crate) fail_open: bool,
    pub(crate) gso: bool,
    pub(crate) busy_poll: Duration,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Policy {
    Immediate,
    Adaptive(Duration),
    Fixed(usize, Duration),
    /// A custom policy, which may panic once.
    Moody(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Close,
    CloseWith(Action),
    CloseWithin(Duration),
    /// The streams are dropped.
    Drop,
    /// The runtime is dropped, with the tasks that hold packets.
    Shutdown,
}

/// The longest delay of any policy.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_millis(2);
/// Rules accept packets with this mark.
pub(crate) const PASS: u32 = 1 << 31;

impl Plan {
    pub(crate) fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        Self {
            seed,
            workers: if random.one_in(5) { 2 } else { 0 },
            moves_clock: !random.one_in(6),
            first_id: if random.one_in(3) { 0_u32.wrapping_sub(random.below(100) as u32) } else { 1 },
            queues: [Settings::draw(random), Settings::draw(random)],
            steps: 20 + random.below(200),
            faults: random.one_in(3),
            end: match random.below(10) {
                0..3 => End::Close,
                3 => End::CloseWith(either(random)),
                4 | 5 => End::CloseWithin(Duration::from_micros(random.below(5000) as u64)),
                6 | 7 => End::Drop,
                _ => End::Shutdown,
            },
        }
    }
}

impl Plan {
    /// Whether times are exact: nothing runs beside the history.
    pub(crate) fn is_exact(&self) -> bool {
        self.workers == 0 && self.moves_clock
    }
}

impl Policy {
    /// For how long a verdict is gathered at most.
    pub(crate) fn longest_delay(self) -> Duration {
        match self {
            Self::Immediate => Duration::ZERO,
            Self::Adaptive(delay) | Self::Fixed(_, delay) => delay,
            Self::Moody(_) => MOODS * 3,
        }
    }
}

/// The unit of delays of a moody policy, which has up to three.
const MOODS: Duration = Duration::from_micros(400);

impl Settings {
    fn draw(random: &mut Random) -> Self {
        let delay = |random: &mut Random| Duration::from_micros(random.below(2000) as u64);
        Self {
            policy: match random.below(5) {
                0 => Policy::Immediate,
                1 | 2 => Policy::Adaptive(delay(random)),
                3 => Policy::Fixed(1 + random.below(40), delay(random)),
                _ => Policy::Moody(random.below(1000) as u64),
            },
            unanswered: either(random),
            deadline: random.one_in(3).then(|| {
                let millis = 1 + random.below(30) as u64;
                let times = if random.one_in(3) { 5 } else { 1 };
                (Duration::from_millis(millis * times), either(random))
            }),
            copy_range: (!random.one_in(5)).then(|| 1 + random.below(2000) as u32),
            max_len: if random.one_in(4) { 1 + random.below(60) as u32 } else { 1024 },
            receive_buffer: random.one_in(4).then(|| 2500 + random.below(20_000)),
            fail_open: random.one_in(4),
            gso: !random.one_in(4),
            busy_poll: if random.one_in(8) { Duration::from_micros(20) } else { Duration::ZERO },
        }
    }

    pub(crate) fn builder(&self, number: u16) -> QueueBuilder {
        let policy = match self.policy {
            Policy::Immediate => FlushPolicy::immediate(),
            Policy::Adaptive(delay) => FlushPolicy::adaptive(delay),
            Policy::Fixed(batch, delay) => FlushPolicy::fixed(batch, delay),
            Policy::Moody(seed) => moody(seed),
        };
        let mut builder = Queue::builder(number)
            .flush_policy(policy)
            .on_unanswered(self.unanswered)
            .fail_open(self.fail_open)
            .gso(self.gso)
            .max_len(self.max_len)
            .busy_poll(self.busy_poll);
        builder = match self.copy_range {
            Some(range) => builder.copy_range(range),
            None => builder.copy_metadata(),
        };
        if let Some((after, action)) = self.deadline {
            builder = builder.deadline(after, action);
        }
        if let Some(bytes) = self.receive_buffer {
            builder = builder.receive_buffer(bytes);
        }
        builder
    }
}

fn either(random: &mut Random) -> Action {
    if random.one_in(2) { Action::Accept } else { Action::Drop }
}

/// A policy that decides at random. Some panic after some calls.
fn moody(seed: u64) -> FlushPolicy {
    let mut random = Random::new(seed);
    let mut panics_after = random.one_in(4).then(|| random.below(50));
    FlushPolicy::custom(move |context| {
        match &mut panics_after {
            Some(0) => std::panic::resume_unwind(Box::new("as intended")),
            Some(left) => *left -= 1,
            None => {}
        }
        match random.below(4) {
            0 if context.gathered > 3 => FlushDecision::Now,
            1 => FlushDecision::AfterReadyTasks,
            mood => FlushDecision::Within(MOODS * mood as u32),
        }
    })
}
