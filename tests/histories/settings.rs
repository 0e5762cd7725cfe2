//! The settings of a queue in a random history.

// The histories against the simulated kernel use another part than those against the real one.
#![allow(dead_code, unreachable_pub)]

use std::time::Duration;

use nfqueue_testbed::random::Random;
use tokio_nfqueue::{Action, FlushPolicy, Queue, QueueBuilder, flush::FlushDecision};

#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub policy: Policy,
    pub unanswered: Action,
    pub deadline: Option<(Duration, Action)>,
    /// `None` for metadata mode.
    pub copy_range: Option<u32>,
    pub max_len: u32,
    pub receive_buffer: Option<usize>,
    pub fail_open: bool,
    pub gso: bool,
    pub busy_poll: Duration,
}

#[derive(Debug, Clone, Copy)]
pub enum Policy {
    Immediate,
    Adaptive(Duration),
    Fixed(usize, Duration),
    /// A custom policy that decides at random, and may panic once.
    Moody {
        seed: u64,
        panics_after: Option<u32>,
    },
}

/// The length of a queue for which nothing is set.
pub const DEFAULT_MAX_LEN: u32 = 1024;
/// The longest delay of any policy.
pub const LONGEST_DELAY: Duration = Duration::from_millis(2);
/// The unit of delays of a moody policy, which has up to three.
const MOODS: Duration = Duration::from_micros(400);

impl Settings {
    pub fn builder(&self, number: u16) -> QueueBuilder {
        let mut builder = Queue::builder(number)
            .flush_policy(self.policy.flush_policy())
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

impl Policy {
    pub fn draw(random: &mut Random) -> Self {
        let delay =
            |random: &mut Random| Duration::from_micros(random.below(LONGEST_DELAY.as_micros() as usize) as u64);
        match random.below(5) {
            0 => Self::Immediate,
            1 | 2 => Self::Adaptive(delay(random)),
            3 => Self::Fixed(1 + random.below(40), delay(random)),
            _ => Self::Moody {
                seed: random.below(1000) as u64,
                panics_after: random.one_in(4).then(|| random.below(50) as u32),
            },
        }
    }

    /// For how long a verdict is gathered at most.
    pub fn longest_delay(self) -> Duration {
        match self {
            Self::Immediate => Duration::ZERO,
            Self::Adaptive(delay) | Self::Fixed(_, delay) => delay,
            Self::Moody { .. } => MOODS * 3,
        }
    }

    fn flush_policy(self) -> FlushPolicy {
        match self {
            Self::Immediate => FlushPolicy::immediate(),
            Self::Adaptive(delay) => FlushPolicy::adaptive(delay),
            Self::Fixed(batch, delay) => FlushPolicy::fixed(batch, delay),
            Self::Moody { seed, panics_after } => moody(Random::new(seed), panics_after),
        }
    }
}

fn moody(mut random: Random, mut panics_after: Option<u32>) -> FlushPolicy {
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

/// Accepts or drops.
pub fn either(random: &mut Random) -> Action {
    if random.one_in(2) { Action::Accept } else { Action::Drop }
}
