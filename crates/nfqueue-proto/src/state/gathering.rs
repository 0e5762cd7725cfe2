//! Verdicts that wait to be sent, and the policy that says when they are.

use std::time::{Duration, Instant};

use super::flush::{FlushContext, FlushDecision, FlushPolicy, FlushReason};

#[derive(Debug)]
pub(super) struct Gathering {
    /// `None` while a custom policy is being called, without the lock.
    policy: Option<FlushPolicy>,
    /// The policy is to be asked once more when the call has returned, and why.
    ask_again: Option<FlushReason>,
    /// Whether there is a driver task. Without one every verdict is sent at once.
    driven: bool,
    /// When the oldest verdict was given.
    oldest: Option<Instant>,
    /// When the verdicts are sent at the latest.
    due: Option<Instant>,
    /// Whether the socket, when it was last read, may have had more packets.
    backlog: bool,
    /// The driver has been woken, to report when the ready tasks have run.
    wait_for_tasks: bool,
    waits: Waits,
}

/// What follows for the gathered verdicts.
#[derive(Debug)]
pub(super) enum Next {
    /// They are sent.
    Flush,
    /// They wait until this time at the latest.
    Wait {
        until: Instant,
        /// The driver is to report when the ready tasks have run.
        call_driver: bool,
    },
    /// A custom policy is to be called, without the lock.
    Ask(Box<(FlushPolicy, FlushContext)>),
    /// A custom policy is being called.
    Nothing,
}

/// How often verdicts have begun to wait lately.
#[derive(Debug, Default)]
struct Waits {
    since: Option<Instant>,
    count: u32,
}

/// A longer delay of a custom policy is shortened to this.
const LONGEST_DELAY: Duration = Duration::from_secs(1);
/// If verdicts wait more often than this in the time in which the timer would fire once, it is not
/// set for each. To set and to clear it takes 0.6 µs where another timer of the processor is
/// nearer, and 3.8 µs in a virtual machine where none is, because the hypervisor sets the
/// processor's timer; an event takes 3 to 6 µs.
const MOST_WAITS: u32 = 1;

impl Gathering {
    pub(super) fn new(policy: FlushPolicy) -> Self {
        Self {
            policy: Some(policy),
            ask_again: None,
            driven: false,
            oldest: None,
            due: None,
            backlog: false,
            wait_for_tasks: false,
            waits: Waits::default(),
        }
    }

    // Asking the policy.

    /// Asks the policy what to do with `gathered` verdicts.
    #[inline]
    pub(super) fn ask(
        &mut self,
        gathered: usize,
        undecided: usize,
        reason: FlushReason,
        now: impl Fn() -> Instant,
    ) -> Next {
        let Some(policy) = &mut self.policy else {
            self.ask_again = Some(reason);
            return Next::Nothing;
        };
        // Reading the clock costs as much as the rest of this function. Between two reads the timer
        // keeps the time limit.
        let custom = policy.is_custom();
        let look = reason != FlushReason::Verdict || custom || gathered % 8 == 0;
        let waited = match self.oldest {
            Some(oldest) if look => now().saturating_duration_since(oldest),
            _ => Duration::ZERO,
        };
        let context = FlushContext { gathered, undecided, backlog: self.backlog, waited, reason };
        if custom {
            if self.oldest.is_none() {
                self.oldest = Some(now());
            }
            // Users' code does not run under the lock.
            return self.policy.take().map_or(Next::Nothing, |policy| Next::Ask(Box::new((policy, context))));
        }
        let decision = policy.decide(&context);
        self.apply(decision, &context, now)
    }

    /// A custom policy has been called.
    pub(super) fn put_policy(&mut self, policy: FlushPolicy) {
        self.policy = Some(policy);
    }

    /// Why a custom policy is to be asked once more, now that the call has returned.
    pub(super) fn take_ask_again(&mut self) -> Option<FlushReason> {
        self.ask_again.take()
    }

    /// The default policy replaces a custom one that has not returned.
    pub(super) fn replace_policy(&mut self) {
        (self.policy, self.ask_again) = (Some(FlushPolicy::default()), None);
    }

    /// Whether a custom policy is being called.
    pub(super) fn is_being_asked(&self) -> bool {
        self.policy.is_none()
    }

    /// What follows from a decision of the policy.
    pub(super) fn apply(&mut self, decision: FlushDecision, context: &FlushContext, now: impl Fn() -> Instant) -> Next {
        let mut call_driver = false;
        let delay = match decision {
            FlushDecision::Now => return Next::Flush,
            // The ready tasks have run, or will not run in time. A policy that waits for them again
            // has nothing else to wait for.
            FlushDecision::AfterReadyTasks
                if matches!(context.reason, FlushReason::TasksRan | FlushReason::DelayOver) =>
            {
                return Next::Flush;
            }
            FlushDecision::AfterReadyTasks => {
                call_driver = !std::mem::replace(&mut self.wait_for_tasks, true);
                self.policy.as_ref().map_or(LONGEST_DELAY, FlushPolicy::cap)
            }
            // The delay is over. To wait again would repeat the question endlessly.
            FlushDecision::Within(delay) if context.waited >= delay.min(LONGEST_DELAY) => return Next::Flush,
            FlushDecision::Within(delay) => delay.min(LONGEST_DELAY),
        };
        // Only a custom policy changes its delay while verdicts wait.
        if let Some(until) = self.due.filter(|_| self.policy.as_ref().is_some_and(|policy| !policy.is_custom())) {
            return Next::Wait { until, call_driver };
        }
        let oldest = match self.oldest {
            Some(oldest) => oldest,
            None => *self.oldest.insert(now()),
        };
        if self.due.is_none() {
            let period = self.policy.as_ref().and_then(FlushPolicy::linger).unwrap_or_default();
            self.waits.add(oldest, period);
        }
        let until = self.due.map_or(oldest + delay, |earlier| earlier.min(oldest + delay));
        self.due = Some(until);
        Next::Wait { until, call_driver }
    }

    // Waiting.

    /// When the verdicts are sent at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether the time is over; only once.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// The verdicts that waited are being sent. Returns until when they would have waited, if the
    /// timer is not to be woken for that: unless it happens so often that it costs less than to
    /// clear the timer.
    pub(super) fn end_waiting(&mut self) -> Option<Instant> {
        self.oldest = None;
        self.due.take().filter(|_| self.waits.count <= MOST_WAITS)
    }

    /// How long the timer keeps firing while verdicts wait again and again: one event in a period
    /// costs less than to set and to clear it for each wait.
    pub(super) fn take_linger(&mut self) -> Option<Duration> {
        let waits = std::mem::take(&mut self.waits).count;
        self.policy.as_ref().filter(|_| waits > MOST_WAITS && self.driven).and_then(FlushPolicy::linger)
    }

    // The driver, and the socket.

    pub(super) fn set_driven(&mut self, driven: bool) {
        self.driven = driven;
        self.wait_for_tasks &= driven;
    }

    pub(super) fn is_driven(&self) -> bool {
        self.driven
    }

    pub(super) fn waits_for_tasks(&self) -> bool {
        self.wait_for_tasks
    }

    /// The ready tasks have run. Returns whether the verdicts have waited for that.
    pub(super) fn tasks_ran(&mut self) -> bool {
        std::mem::take(&mut self.wait_for_tasks)
    }

    /// The socket was read. `backlog`: it may have more packets.
    pub(super) fn read(&mut self, backlog: bool) {
        self.backlog = backlog;
    }

    pub(super) fn has_backlog(&self) -> bool {
        self.backlog
    }
}

impl Waits {
    /// Verdicts begin to wait. Waits longer ago than `period` do not count.
    fn add(&mut self, now: Instant, period: Duration) {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > period) {
            *self = Self { since: Some(now), count: 0 };
        }
        self.count = self.count.saturating_add(1);
    }
}
