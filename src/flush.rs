//! When gathered verdicts go to the kernel. Pure: knows counts, and the time it is handed.

use std::{fmt, time::Duration};

/// When gathered verdicts are sent.
///
/// One verdict message costs a system call of its own and the kernel's whole way of the packet runs inside it; packing 64
/// halves the cost of a packet (see the crate's benches). Waiting for company costs latency. A policy weighs the two; it
/// is asked after each verdict and at each [`Occasion`].
///
/// The default is [`adaptive`](Self::adaptive) with 500 µs.
pub struct FlushPolicy(Kind);

enum Kind {
    Immediate,
    Adaptive { max_delay: Duration },
    Fixed { max_batch: usize, max_delay: Duration },
    Custom(Box<dyn FlushWhen>),
}

/// An adaptive batch is sent when it has grown to this many verdicts, drained or not: packing more gains little (64
/// packed: 1122 ns a packet, 16: 1189 ns) while each accepted packet adds its way through the stack, some 1.5 µs, to
/// the time one send holds the thread.
const ADAPTIVE_BATCH: usize = 64;

/// How long the end of a scheduler pass is awaited for a user's own policy.
const LONGEST_PASS: Duration = Duration::from_millis(1);

/// A ring costs some 3 µs. At this interval that is a hundredth of a processor.
const SHORTEST_LINGER: Duration = Duration::from_micros(250);

/// A longer delay is no flush policy but a fault; it is refused.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// A user's own flush policy.
///
/// ```
/// use tokio_nfqueue::{Flush, FlushPolicy, FlushWhen, Gathered};
///
/// /// Sends whenever sixteen verdicts are there or nothing more can join them, and after 200 µs at the latest.
/// struct Sixteen;
///
/// impl FlushWhen for Sixteen {
///     fn when(&mut self, gathered: &Gathered) -> Flush {
///         if gathered.decided >= 16 || gathered.undecided == 0 {
///             Flush::Now
///         } else {
///             Flush::Within(std::time::Duration::from_micros(200))
///         }
///     }
/// }
/// let policy = FlushPolicy::custom(Sixteen);
/// # let _ = policy;
/// ```
pub trait FlushWhen: Send + 'static {
    /// Says when the gathered verdicts are sent. It is called on the thread that gives a verdict, on the runtime's, or on the
    /// timer's, under no lock: it may call the queue's functions. A decision that is made meanwhile is asked about when it
    /// has returned. Not called while nothing is gathered.
    ///
    /// If it panics, the default policy takes its place for good, and an event of level ERROR says so.
    fn when(&mut self, gathered: &Gathered) -> Flush;
}

/// What a policy decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gathered {
    /// Verdicts given and not yet sent; at least 1.
    pub decided: usize,
    /// Packets received whose verdict is still owed, those not yet taken from the stream among them.
    pub undecided: usize,
    /// Whether the socket, when last read, had more to give. If not, the next packet has most likely yet to arrive.
    pub backlog: bool,
    /// How long the oldest gathered verdict has waited.
    pub waited: Duration,
    /// What made the queue ask.
    pub occasion: Occasion,
}

/// Why a policy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Occasion {
    /// A verdict was given.
    Decided,
    /// The stream was polled and the socket was found empty; again and again while the stream
    /// [stays awake](crate::QueueBuilder::busy_poll).
    Drained,
    /// The runtime has run every task that was ready, as asked for by [`Flush::AtPassEnd`].
    PassEnd,
    /// The delay asked for by [`Flush::Within`] is over.
    Due,
}

/// A policy's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flush {
    /// Send now, on the calling thread.
    Now,
    /// Ask again when the runtime has run what is ready now: other tasks may add to the batch, and none is waited for. If the
    /// runtime does not come to it in time, the verdicts are sent regardless: after `max_delay`, or after 1 ms if the policy
    /// is of your own.
    AtPassEnd,
    /// Send when the oldest verdict has waited so long, counted from when it was given, 1 s at most; before that ask again
    /// whenever something makes the queue ask, and once more when the delay is over. Kept by a thread of the crate's own, not
    /// by Tokio's timer, whose resolution is 1 ms.
    Within(Duration),
}

impl FlushPolicy {
    /// Every verdict is sent at once, by itself. Lowest latency for a single packet; highest cost per packet under load.
    pub fn immediate() -> Self {
        Self(Kind::Immediate)
    }

    /// At once when the queue is idle; under load gathered until every packet at hand is decided, the runtime has run
    /// what was ready, 64 verdicts are there, or the oldest has waited `max_delay`, whichever is first. The last holds whatever
    /// the runtime's tasks do (see [`guide`](crate::guide#threads-and-runtimes)).
    ///
    /// `max_delay` may be shorter than a millisecond; more than 1 s is refused by [`bind`](crate::QueueBuilder::bind).
    pub fn adaptive(max_delay: Duration) -> Self {
        Self(Kind::Adaptive { max_delay })
    }

    /// Gathered until `max_batch` verdicts are there or the oldest has waited `max_delay`; never sooner by itself.
    ///
    /// A `max_batch` of 0 or a `max_delay` of more than 1 s is refused by [`bind`](crate::QueueBuilder::bind).
    pub fn fixed(max_batch: usize, max_delay: Duration) -> Self {
        Self(Kind::Fixed { max_batch, max_delay })
    }

    /// A policy of the user's own.
    pub fn custom(policy: impl FlushWhen) -> Self {
        Self(Kind::Custom(Box::new(policy)))
    }

    pub(crate) fn check(&self) -> Result<(), &'static str> {
        match self.0 {
            Kind::Fixed { max_batch: 0, .. } => Err("max_batch of the flush policy is 0"),
            Kind::Adaptive { max_delay } | Kind::Fixed { max_delay, .. } if max_delay > MAX_DELAY => {
                Err("max_delay of the flush policy is more than 1 s")
            }
            _ => Ok(()),
        }
    }

    /// Whether it is a user's own, and may do what it likes with the time.
    pub(crate) fn is_custom(&self) -> bool {
        matches!(self.0, Kind::Custom(_))
    }

    /// How long a verdict waits for the end of a scheduler pass that does not come.
    pub(crate) fn cap(&self) -> Duration {
        match self.0 {
            Kind::Immediate => Duration::ZERO,
            Kind::Adaptive { max_delay } | Kind::Fixed { max_delay, .. } => max_delay,
            Kind::Custom(_) => LONGEST_PASS,
        }
    }

    /// At what interval the alarm goes on ringing while there is traffic, so that it need not be set for each verdict.
    pub(crate) fn linger(&self) -> Option<Duration> {
        match self.0 {
            Kind::Adaptive { max_delay } | Kind::Fixed { max_delay, .. } if max_delay >= SHORTEST_LINGER => {
                Some(max_delay)
            }
            _ => None,
        }
    }

    pub(crate) fn when(&mut self, gathered: &Gathered) -> Flush {
        match &mut self.0 {
            Kind::Immediate => Flush::Now,
            Kind::Adaptive { max_delay } => adaptive(*max_delay, gathered),
            Kind::Fixed { max_batch, max_delay } => {
                if gathered.decided >= *max_batch || gathered.waited >= *max_delay {
                    Flush::Now
                } else {
                    Flush::Within(*max_delay)
                }
            }
            Kind::Custom(policy) => policy.when(gathered),
        }
    }
}

fn adaptive(max_delay: Duration, gathered: &Gathered) -> Flush {
    let full = gathered.decided >= ADAPTIVE_BATCH || gathered.waited >= max_delay;
    // Nothing can join them: nothing is undecided, and the socket was empty.
    let alone = gathered.undecided == 0 && !gathered.backlog;
    let nobody_else_ready = gathered.occasion == Occasion::PassEnd && !gathered.backlog;
    if full || alone || nobody_else_ready {
        Flush::Now
    } else if gathered.backlog {
        Flush::Within(max_delay)
    } else {
        Flush::AtPassEnd
    }
}

impl Default for FlushPolicy {
    fn default() -> Self {
        Self::adaptive(Duration::from_micros(500))
    }
}

impl fmt::Debug for FlushPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Immediate => f.write_str("immediate"),
            Kind::Adaptive { max_delay } => write!(f, "adaptive({max_delay:?})"),
            Kind::Fixed { max_batch, max_delay } => write!(f, "fixed({max_batch}, {max_delay:?})"),
            Kind::Custom(_) => f.write_str("custom"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: Duration = Duration::from_micros(100);

    fn gathered(decided: usize, undecided: usize, backlog: bool, waited: u64, occasion: Occasion) -> Gathered {
        Gathered { decided, undecided, backlog, waited: Duration::from_micros(waited), occasion }
    }

    #[test]
    fn adaptive_sends_at_once_when_idle() {
        let mut policy = FlushPolicy::adaptive(CAP);
        assert_eq!(policy.when(&gathered(1, 0, false, 0, Occasion::Decided)), Flush::Now);
    }

    #[test]
    fn adaptive_gathers_while_there_is_more_but_never_past_the_cap() {
        let mut policy = FlushPolicy::adaptive(CAP);
        assert_eq!(policy.when(&gathered(1, 63, true, 0, Occasion::Decided)), Flush::Within(CAP));
        assert_eq!(policy.when(&gathered(1, 0, true, 0, Occasion::Decided)), Flush::Within(CAP));
        assert_eq!(policy.when(&gathered(1, 63, true, 100, Occasion::Decided)), Flush::Now);
        assert_eq!(policy.when(&gathered(64, 63, true, 0, Occasion::Decided)), Flush::Now);
        assert_eq!(policy.when(&gathered(2, 63, true, 100, Occasion::Due)), Flush::Now);
    }

    #[test]
    fn adaptive_waits_for_ready_tasks_and_for_no_other() {
        let mut policy = FlushPolicy::adaptive(CAP);
        assert_eq!(policy.when(&gathered(1, 7, false, 0, Occasion::Decided)), Flush::AtPassEnd);
        assert_eq!(policy.when(&gathered(3, 5, false, 0, Occasion::PassEnd)), Flush::Now);
        assert_eq!(policy.when(&gathered(3, 5, false, 0, Occasion::Drained)), Flush::AtPassEnd);
        assert_eq!(policy.when(&gathered(3, 0, false, 0, Occasion::Drained)), Flush::Now);
        assert_eq!(policy.when(&gathered(3, 5, true, 0, Occasion::PassEnd)), Flush::Within(CAP));
    }

    #[test]
    fn fixed_waits_for_its_batch_or_its_delay() {
        let mut policy = FlushPolicy::fixed(3, CAP);
        assert_eq!(policy.when(&gathered(2, 0, false, 99, Occasion::Drained)), Flush::Within(CAP));
        assert_eq!(policy.when(&gathered(3, 9, true, 0, Occasion::Decided)), Flush::Now);
        assert_eq!(policy.when(&gathered(1, 0, false, 100, Occasion::Due)), Flush::Now);
    }

    #[test]
    fn whatever_the_counts_the_cap_holds() {
        for mut policy in [FlushPolicy::immediate(), FlushPolicy::adaptive(CAP), FlushPolicy::fixed(1000, CAP)] {
            for undecided in [0, 1, 100_000] {
                for backlog in [false, true] {
                    for occasion in [Occasion::Decided, Occasion::Drained, Occasion::PassEnd, Occasion::Due] {
                        assert_eq!(policy.when(&gathered(1, undecided, backlog, 100, occasion)), Flush::Now);
                    }
                }
            }
        }
    }

    #[test]
    fn bad_values_are_named() {
        assert!(FlushPolicy::fixed(0, CAP).check().is_err());
        assert!(FlushPolicy::adaptive(Duration::from_secs(2)).check().is_err());
        assert!(FlushPolicy::default().check().is_ok());
    }
}
