//! What the machine asks for.

use std::time::Instant;

use super::{
    Carried,
    flush::{FlushContext, FlushPolicy},
    reports::Report,
};
use crate::types::{Action, Error};

/// What the caller must do once it has released the lock.
#[derive(Debug)]
pub struct Effects {
    /// Send all gathered verdicts.
    pub flush: bool,
    /// Wake the driver task.
    pub call_driver: bool,
    /// When to call [`Machine::fire`](super::Machine::fire).
    pub timer: Option<Alarm>,
    /// Call a custom policy and return it by [`policy_decided`](super::Machine::policy_decided).
    pub ask: Option<Box<(FlushPolicy, FlushContext)>>,
    /// Receive: packets may have been unread for some time.
    pub look: bool,
    /// Have [`readable`](super::Machine::readable) called when the socket is readable.
    pub watch: bool,
    /// Unbind the queue.
    pub unbind: bool,
    /// Stop the queue again, with this action: the capability was missing before.
    pub drain: Option<Action>,
    /// Check whether the calling thread has the capability. Otherwise the driver does that: there
    /// is none, or it does not run.
    pub probe: bool,
    /// Wake the task that reads packets.
    pub wake_stream: bool,
    /// Tasks that wait for a flush or for the end of the shutdown.
    pub wake_waiting: bool,
    /// Wake the tasks that read refusals.
    pub wake_refusals: bool,
}

impl Effects {
    pub(super) const NOTHING: Self = Self {
        flush: false,
        call_driver: false,
        timer: None,
        ask: None,
        look: false,
        watch: false,
        unbind: false,
        drain: None,
        probe: false,
        wake_stream: false,
        wake_waiting: false,
        wake_refusals: false,
    };

    /// Every task looks whether what it waits for has happened.
    pub(super) fn wake_all(&mut self) {
        self.wake_stream = true;
        self.wake_waiting = true;
        self.wake_refusals = true;
        self.call_driver = true;
    }

    pub(super) fn is_nothing(&self) -> bool {
        let flags = [self.flush, self.call_driver, self.look, self.watch, self.unbind, self.probe];
        let wakes = [self.wake_stream, self.wake_waiting, self.wake_refusals];
        !flags.contains(&true)
            && !wakes.contains(&true)
            && self.timer.is_none()
            && self.ask.is_none()
            && self.drain.is_none()
    }
}

/// When [`Machine::fire`](super::Machine::fire) is to be called next. `None`: it need not be
/// called. Of two alarms, the one with the higher number counts: the threads that set them may
/// overtake each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Alarm {
    /// The time. `None`: no call is needed.
    pub at: Option<Instant>,
    /// Grows with every change.
    pub number: u64,
}

/// What the caller must deliver once it has released the lock.
#[derive(Debug)]
pub enum Notice<E: Carried> {
    /// The result for a waiter: the kernel has replied, or no reply will come.
    Reply(E::Waiter, Result<(), Error>),
    /// To be logged.
    Report(Report),
    /// It is not needed any more. Dropping it may run users' code.
    Spent(E),
}
