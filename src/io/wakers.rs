//! The tasks that wait for something of a queue. A waker is cloned and dropped without the lock of
//! the state, because both may run users' code.

use std::task::Waker;

use crate::state::Effects;

#[derive(Debug, Default)]
pub(super) struct Wakers {
    /// The task that polls the stream.
    stream: Option<Waker>,
    /// Tasks that wait for a flush or for the end of the shutdown.
    waiting: Vec<Waker>,
    /// Tasks that wait for refusals.
    refusals: Vec<Waker>,
}

impl Wakers {
    /// Whether this task is the one that polls the stream.
    pub(super) fn has_stream(&self, waker: &Waker) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.will_wake(waker))
    }

    /// Wakes this task for the stream, instead of the one that is returned.
    pub(super) fn set_stream(&mut self, waker: Waker) -> Option<Waker> {
        self.stream.replace(waker)
    }

    /// Wakes a task after the next round of sending, or when the queue is closed. Returns the waker
    /// if the task waits already.
    pub(super) fn wait(&mut self, waker: Waker) -> Option<Waker> {
        add(&mut self.waiting, waker)
    }

    /// Wakes a task when there is a refusal, or when there will be no more. Returns the waker if
    /// the task waits already.
    pub(super) fn wait_for_refusals(&mut self, waker: Waker) -> Option<Waker> {
        add(&mut self.refusals, waker)
    }

    /// Removes the wakers of the tasks that these effects wake.
    pub(super) fn take(&mut self, effects: &Effects) -> Vec<Waker> {
        let mut wakers = Vec::new();
        if effects.wake_stream {
            wakers.extend(self.stream.take());
        }
        if effects.wake_waiting {
            wakers.append(&mut self.waiting);
        }
        if effects.wake_refusals {
            wakers.append(&mut self.refusals);
        }
        wakers
    }
}

fn add(wakers: &mut Vec<Waker>, waker: Waker) -> Option<Waker> {
    if wakers.iter().any(|other| other.will_wake(&waker)) {
        return Some(waker);
    }
    wakers.push(waker);
    None
}
