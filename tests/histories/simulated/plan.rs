//! What a history consists of, drawn from a seed.

use std::time::Duration;

use tokio_nfqueue::Action;

use crate::settings::{DEFAULT_MAX_LEN, Policy, either};
pub(crate) use crate::settings::{LONGEST_DELAY, Settings};
pub(crate) use nfqueue_testbed::random::Random;

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// The worker threads of a multi-thread runtime; 0 for a current-thread runtime.
    pub(crate) workers: usize,
    pub(crate) first_id: u32,
    /// The queue of the traffic, and the queue for requeued packets.
    pub(crate) queues: [Settings; 2],
    pub(crate) steps: usize,
    /// Interfaces that go down, hooks that are unregistered, sends that fail, a missing capability.
    pub(crate) faults: bool,
    pub(crate) end: End,
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

/// Rules accept packets with this mark.
pub(crate) const PASS: u32 = 1 << 31;

impl Plan {
    pub(crate) fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        Self {
            seed,
            workers: if random.one_in(5) { 2 } else { 0 },
            first_id: if random.one_in(3) { 0_u32.wrapping_sub(random.below(100) as u32) } else { 1 },
            queues: [draw(random), draw(random)],
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
    /// Whether nothing runs beside the history: times are exact, and the seed repeats everything.
    pub(crate) fn is_exact(&self) -> bool {
        self.workers == 0
    }
}

fn draw(random: &mut Random) -> Settings {
    Settings {
        policy: Policy::draw(random),
        unanswered: either(random),
        deadline: random.one_in(3).then(|| {
            let millis = 1 + random.below(30) as u64;
            let times = if random.one_in(3) { 5 } else { 1 };
            (Duration::from_millis(millis * times), either(random))
        }),
        copy_range: (!random.one_in(5)).then(|| 1 + random.below(2000) as u32),
        max_len: if random.one_in(4) { 1 + random.below(60) as u32 } else { DEFAULT_MAX_LEN },
        receive_buffer: random.one_in(4).then(|| 2500 + random.below(20_000)),
        fail_open: random.one_in(4),
        gso: !random.one_in(4),
        busy_poll: if random.one_in(8) { Duration::from_micros(20) } else { Duration::ZERO },
    }
}
