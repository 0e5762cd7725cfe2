//! When gathered verdicts are sent to the kernel. Pure: knows counts, and the time it is given.

use std::{fmt, time::Duration};

/// When gathered verdicts are sent to the kernel.
///
/// A send costs a system call, and the kernel processes the accepted packets within it. Sending 64
/// verdicts together halves the cost of a packet (see the crate's benchmarks). Waiting for more
/// verdicts adds latency. The policy is asked after each verdict and for each [`FlushReason`].
///
/// The default is [`adaptive`](Self::adaptive) with 500 µs.
#[derive(Clone)]
pub struct FlushPolicy(Kind);

#[derive(Clone)]
enum Kind {
    Immediate,
    Adaptive { max_delay: Duration },
    Fixed { max_batch: usize, max_delay: Duration },
    Custom(Box<dyn CustomPolicy>),
}

/// A closure that can be cloned although it is boxed.
trait CustomPolicy: Send {
    fn decide(&mut self, context: &FlushContext) -> FlushDecision;
    fn clone_box(&self) -> Box<dyn CustomPolicy>;
}

impl<F> CustomPolicy for F
where
    F: FnMut(&FlushContext) -> FlushDecision + Clone + Send + 'static,
{
    fn decide(&mut self, context: &FlushContext) -> FlushDecision {
        self(context)
    }

    fn clone_box(&self) -> Box<dyn CustomPolicy> {
        Box::new(self.clone())
    }
}

impl Clone for Box<dyn CustomPolicy> {
    fn clone(&self) -> Self {
        // Not the box's own method: that would call this one again.
        (**self).clone_box()
    }
}

/// The adaptive policy sends at this number of verdicts even if there are more packets to read.
/// Larger batches save little (64 verdicts: 1122 ns per packet, 16: 1189 ns), while each accepted
/// packet adds about 1.5 µs to the time for which one send occupies the thread.
const ADAPTIVE_BATCH: usize = 64;

/// How long a custom policy waits at most for the runtime to run the tasks that are ready.
const LONGEST_WAIT_FOR_TASKS: Duration = Duration::from_millis(1);

/// A timer event costs about 3 µs. At this interval that is about 1 % of a CPU.
const SHORTEST_LINGER: Duration = Duration::from_micros(250);

/// A longer delay is a mistake rather than a flush policy, and is refused.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// What a policy decides from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlushContext {
    /// Verdicts submitted and not sent yet; at least 1.
    pub gathered: usize,
    /// Packets received and not decided, including those not yet taken from the stream.
    pub undecided: usize,
    /// Whether the socket, when it was last read, may have had more packets. If false, the next
    /// packet has most likely not arrived yet.
    pub backlog: bool,
    /// How long the oldest gathered verdict has waited.
    pub waited: Duration,
    /// Why the policy is asked.
    pub reason: FlushReason,
}

impl FlushContext {
    /// One verdict, nothing undecided; the fields can be changed. Other crates cannot name all
    /// fields.
    #[doc(hidden)]
    pub const fn new(reason: FlushReason) -> Self {
        Self { gathered: 1, undecided: 0, backlog: false, waited: Duration::ZERO, reason }
    }
}

/// Why a policy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FlushReason {
    /// A verdict was submitted.
    Verdict,
    /// The stream was polled and found the socket empty. With
    /// `QueueBuilder::busy_poll` this is repeated while the stream polls.
    SocketEmpty,
    /// The runtime has run every task that was ready, as requested by
    /// [`FlushDecision::AfterReadyTasks`].
    TasksRan,
    /// The delay requested by [`FlushDecision::Within`] is over, or the runtime has not run the
    /// ready tasks in time ([`FlushDecision::AfterReadyTasks`]).
    DelayOver,
}

/// What a policy decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FlushDecision {
    /// Send now, on the calling thread.
    Now,
    /// Ask again, with [`FlushReason::TasksRan`], when the runtime has run the tasks that are ready
    /// now: they may add verdicts. If the runtime does not get to it in time, the policy is asked
    /// with [`FlushReason::DelayOver`]: after `max_delay`, or after 1 ms for a custom policy. For
    /// these two reasons this decision means [`Now`](Self::Now).
    AfterReadyTasks,
    /// Send when the oldest gathered verdict has waited for this time since it was submitted; at
    /// most 1 s. Until then the policy is still asked for each [`FlushReason`]. The crate's own
    /// timer thread keeps the time, not Tokio's timer, whose resolution is 1 ms.
    Within(Duration),
}

impl FlushPolicy {
    /// Sends every verdict at once, in a message of its own. Lowest latency for a single packet;
    /// highest cost per packet under load.
    pub fn immediate() -> Self {
        Self(Kind::Immediate)
    }

    /// Sends at once when the queue is idle. Under load, gathers verdicts until every received
    /// packet is decided, the runtime has run the tasks that were ready, 64 verdicts are gathered,
    /// or the oldest has waited for `max_delay`, whichever is first. The last limit holds whatever
    /// the runtime's tasks do (see `guide` of tokio-nfqueue).
    ///
    /// `max_delay` may be less than a millisecond. `QueueBuilder::bind` refuses more
    /// than 1 s.
    pub fn adaptive(max_delay: Duration) -> Self {
        Self(Kind::Adaptive { max_delay })
    }

    /// Sends when `max_batch` verdicts are gathered or the oldest has waited for `max_delay`, and
    /// not before.
    ///
    /// `QueueBuilder::bind` refuses a `max_batch` of 0 and a `max_delay` of more
    /// than 1 s.
    pub fn fixed(max_batch: usize, max_delay: Duration) -> Self {
        Self(Kind::Fixed { max_batch, max_delay })
    }

    /// Decides with a closure. Each clone of the policy has a clone of the closure.
    ///
    /// The closure is called on the thread that submits a verdict, on a thread of the runtime, or
    /// on the timer thread. No lock is held: it may call the queue's functions. It is not called
    /// while nothing is gathered, and never twice at the same time; a verdict that is submitted
    /// meanwhile is asked about when the closure has returned.
    ///
    /// If it panics, the default policy replaces it, and an event of level ERROR reports that.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use nfqueue_proto::state::flush::{FlushDecision, FlushPolicy};
    /// // Sends 16 verdicts together, or as soon as none can be added, and after 200 µs at most.
    /// let policy = FlushPolicy::custom(|context| {
    ///     if context.gathered >= 16 || context.undecided == 0 {
    ///         FlushDecision::Now
    ///     } else {
    ///         FlushDecision::Within(Duration::from_micros(200))
    ///     }
    /// });
    /// # let _ = policy;
    /// ```
    pub fn custom(policy: impl FnMut(&FlushContext) -> FlushDecision + Clone + Send + 'static) -> Self {
        Self(Kind::Custom(Box::new(policy)))
    }

    #[doc(hidden)]
    pub fn check(&self) -> Result<(), &'static str> {
        match self.0 {
            Kind::Fixed { max_batch: 0, .. } => Err("max_batch of the flush policy is 0"),
            Kind::Adaptive { max_delay } | Kind::Fixed { max_delay, .. } if max_delay > MAX_DELAY => {
                Err("max_delay of the flush policy is more than 1 s")
            }
            _ => Ok(()),
        }
    }

    /// Whether it is a custom policy, whose run time is not known.
    #[doc(hidden)]
    pub fn is_custom(&self) -> bool {
        matches!(self.0, Kind::Custom(_))
    }

    /// How long a verdict waits at most for the runtime to run the tasks that are ready.
    #[doc(hidden)]
    pub fn cap(&self) -> Duration {
        match self.0 {
            Kind::Immediate => Duration::ZERO,
            Kind::Adaptive { max_delay } | Kind::Fixed { max_delay, .. } => max_delay,
            Kind::Custom(_) => LONGEST_WAIT_FOR_TASKS,
        }
    }

    /// The interval at which the timer fires while verdicts wait again and again, so that it need
    /// not be set for each. `None`: it is set for each.
    #[doc(hidden)]
    pub fn linger(&self) -> Option<Duration> {
        match self.0 {
            Kind::Adaptive { max_delay } | Kind::Fixed { max_delay, .. } if max_delay >= SHORTEST_LINGER => {
                Some(max_delay)
            }
            _ => None,
        }
    }

    #[doc(hidden)]
    pub fn decide(&mut self, context: &FlushContext) -> FlushDecision {
        match &mut self.0 {
            Kind::Immediate => FlushDecision::Now,
            Kind::Adaptive { max_delay } => adaptive(*max_delay, context),
            Kind::Fixed { max_batch, max_delay } => {
                if context.gathered >= *max_batch || context.waited >= *max_delay {
                    FlushDecision::Now
                } else {
                    FlushDecision::Within(*max_delay)
                }
            }
            Kind::Custom(policy) => policy.decide(context),
        }
    }
}

fn adaptive(max_delay: Duration, context: &FlushContext) -> FlushDecision {
    let full = context.gathered >= ADAPTIVE_BATCH || context.waited >= max_delay;
    // No other verdict can come soon: nothing is undecided, and the socket was empty.
    let complete = context.undecided == 0 && !context.backlog;
    let no_task_ready = context.reason == FlushReason::TasksRan && !context.backlog;
    if full || complete || no_task_ready {
        FlushDecision::Now
    } else if context.backlog {
        FlushDecision::Within(max_delay)
    } else {
        FlushDecision::AfterReadyTasks
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

    fn context(gathered: usize, undecided: usize, backlog: bool, waited: u64, reason: FlushReason) -> FlushContext {
        FlushContext { gathered, undecided, backlog, waited: Duration::from_micros(waited), reason }
    }

    #[test]
    fn adaptive_sends_at_once_when_idle() {
        let mut policy = FlushPolicy::adaptive(CAP);
        assert_eq!(policy.decide(&context(1, 0, false, 0, FlushReason::Verdict)), FlushDecision::Now);
    }

    #[test]
    fn adaptive_gathers_while_there_is_more_to_read_but_not_beyond_the_cap() {
        let mut policy = FlushPolicy::adaptive(CAP);
        assert_eq!(policy.decide(&context(1, 63, true, 0, FlushReason::Verdict)), FlushDecision::Within(CAP));
        assert_eq!(policy.decide(&context(1, 0, true, 0, FlushReason::Verdict)), FlushDecision::Within(CAP));
        assert_eq!(policy.decide(&context(1, 63, true, 100, FlushReason::Verdict)), FlushDecision::Now);
        assert_eq!(policy.decide(&context(64, 63, true, 0, FlushReason::Verdict)), FlushDecision::Now);
        assert_eq!(policy.decide(&context(2, 63, true, 100, FlushReason::DelayOver)), FlushDecision::Now);
    }

    #[test]
    fn adaptive_waits_for_ready_tasks_only() {
        let mut policy = FlushPolicy::adaptive(CAP);
        assert_eq!(policy.decide(&context(1, 7, false, 0, FlushReason::Verdict)), FlushDecision::AfterReadyTasks);
        assert_eq!(policy.decide(&context(3, 5, false, 0, FlushReason::TasksRan)), FlushDecision::Now);
        assert_eq!(policy.decide(&context(3, 5, false, 0, FlushReason::SocketEmpty)), FlushDecision::AfterReadyTasks);
        assert_eq!(policy.decide(&context(3, 0, false, 0, FlushReason::SocketEmpty)), FlushDecision::Now);
        assert_eq!(policy.decide(&context(3, 5, true, 0, FlushReason::TasksRan)), FlushDecision::Within(CAP));
    }

    #[test]
    fn fixed_waits_for_its_batch_or_its_delay() {
        let mut policy = FlushPolicy::fixed(3, CAP);
        assert_eq!(policy.decide(&context(2, 0, false, 99, FlushReason::SocketEmpty)), FlushDecision::Within(CAP));
        assert_eq!(policy.decide(&context(3, 9, true, 0, FlushReason::Verdict)), FlushDecision::Now);
        assert_eq!(policy.decide(&context(1, 0, false, 100, FlushReason::DelayOver)), FlushDecision::Now);
    }

    #[test]
    fn the_time_limit_holds_for_any_counts() {
        for mut policy in [FlushPolicy::immediate(), FlushPolicy::adaptive(CAP), FlushPolicy::fixed(1000, CAP)] {
            for undecided in [0, 1, 100_000] {
                for backlog in [false, true] {
                    for reason in
                        [FlushReason::Verdict, FlushReason::SocketEmpty, FlushReason::TasksRan, FlushReason::DelayOver]
                    {
                        assert_eq!(policy.decide(&context(1, undecided, backlog, 100, reason)), FlushDecision::Now);
                    }
                }
            }
        }
    }

    #[test]
    fn invalid_values_are_refused() {
        assert!(FlushPolicy::fixed(0, CAP).check().is_err());
        assert!(FlushPolicy::adaptive(Duration::from_secs(2)).check().is_err());
        assert!(FlushPolicy::default().check().is_ok());
    }
}
