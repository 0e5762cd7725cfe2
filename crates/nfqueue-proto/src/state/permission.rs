//! Whether this process has the capability to send.

use std::time::{Duration, Instant};

use super::{Carried, Clock, Machine, PAUSES, ReportKind};
use crate::types::{Error, ErrorKind};

#[derive(Debug, Default)]
pub(super) struct Permission(State);

#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Held,
    /// A verdict was refused because the capability was missing. The pause between two attempts
    /// grows.
    Missing {
        since: Instant,
        next: Instant,
        pause: Duration,
        /// How often the driver was woken without a reaction.
        calls: u32,
        /// A thread that represents the process has checked, and lacks it.
        confirmed: bool,
    },
    /// It has been missing for `LASTING`, and the stream has ended with an error.
    Lost,
}

/// If the capability is missing for this time, the loss counts as permanent.
const LASTING: Duration = Duration::from_secs(3);
/// After this many wake-ups without a reaction the driver is assumed not to run. Then the timer
/// thread represents the process.
const PATIENT_CALLS: u32 = 10;

impl Permission {
    pub(super) fn is_held(&self) -> bool {
        matches!(self.0, State::Held)
    }

    pub(super) fn is_lost(&self) -> bool {
        matches!(self.0, State::Lost)
    }

    /// Whether a thread that represents the process has found it missing since
    /// [`check_at_once`](Self::check_at_once).
    pub(super) fn is_denied(&self) -> bool {
        matches!(self.0, State::Missing { confirmed: true, .. })
    }

    /// When to check for it again.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.0 {
            State::Missing { next, .. } => Some(next),
            State::Held | State::Lost => None,
        }
    }

    fn missing(&mut self, now: Instant) -> Instant {
        let next = now + PAUSES.0;
        self.0 = State::Missing { since: now, next, pause: PAUSES.0 * 2, calls: 0, confirmed: false };
        next
    }

    /// A thread of the process still lacks it. Returns whether it counts as lost from now on;
    /// `None` if it was not missing.
    fn still_missing(&mut self, now: Instant) -> Option<bool> {
        let State::Missing { since, calls, confirmed, .. } = &mut self.0 else { return None };
        (*calls, *confirmed) = (0, true);
        let lost = now.saturating_duration_since(*since) >= LASTING;
        if lost {
            self.0 = State::Lost;
        }
        Some(lost)
    }

    /// Has the timer thread check for it now. Returns false if it is not missing.
    fn check_at_once(&mut self, now: Instant) -> bool {
        let State::Missing { next, confirmed, .. } = &mut self.0 else { return false };
        (*next, *confirmed) = (now, false);
        true
    }

    /// The time has come to check for it, if it has. Returns whether the driver seems not to run.
    pub(super) fn fire(&mut self, now: Instant) -> Option<bool> {
        let State::Missing { next, pause, calls, .. } = &mut self.0 else { return None };
        if *next > now {
            return None;
        }
        let patient = *calls < PATIENT_CALLS;
        *next = now + *pause;
        *pause = (*pause * 2).min(PAUSES.1);
        *calls = calls.saturating_add(1);
        Some(!patient)
    }
}

impl<E: Carried, K: Clock> Machine<E, K> {
    /// Whether the capability was missing when it was needed last.
    pub fn is_permission_missing(&self) -> bool {
        !self.permission.is_held()
    }

    /// The calling thread has the capability.
    pub fn permitted(&mut self) {
        if !self.permission.is_held() {
            self.permission = Permission::default();
            self.flush();
            self.end_if_permitted();
        }
    }

    /// A thread of the runtime, which represents the process, still lacks the capability. If there
    /// is no such thread, the timer thread reports this.
    pub fn still_missing(&mut self) {
        let Some(lost) = self.permission.still_missing(self.clock.now()) else { return };
        if lost {
            let error = Error::new(ErrorKind::NotPermitted, "send verdicts");
            self.fail(error.with_detail(
                "CAP_NET_ADMIN has been lost, and no verdict can be sent without it; start again with it",
            ));
        }
        if lost || self.is_overdue() {
            self.give_up_draining();
            self.look_for_the_end();
        }
    }

    /// Lets the timer thread check for the capability at once, if it is missing.
    pub(super) fn look_for_permission(&mut self, now: Instant) {
        if self.permission.check_at_once(now) {
            self.set_timer(now);
        }
    }

    pub(super) fn missing_permission(&mut self) {
        if self.permission.is_held() {
            let next = self.permission.missing(self.clock.now());
            self.note(ReportKind::CapabilityMissing, 1, None);
            self.set_timer(next);
            self.effects.call_driver = true;
        }
    }
}

pub(super) fn missing_capability() -> Error {
    Error::new(ErrorKind::NotPermitted, "send verdict").with_detail("CAP_NET_ADMIN is missing")
}
