//! A timer for one task, in any executor, and the pauses between attempts.

use std::{
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use futures::task::AtomicWaker;

use super::{
    clock::QueueClock,
    timer::{Timer, TimerTarget},
};
use crate::{
    state::{Alarm, Clock},
    types::Error,
};

/// A timer for one task.
#[derive(Debug)]
pub(crate) struct TaskTimer {
    task: Arc<Task>,
    /// Of the last alarm.
    number: AtomicU64,
    timer: Timer,
    pub(crate) clock: QueueClock,
}

#[derive(Debug, Default)]
struct Task {
    waker: AtomicWaker,
}

impl TimerTarget for Task {
    fn fire(self: Arc<Self>) {
        self.waker.wake();
    }

    fn readable(self: Arc<Self>) {}
}

impl TaskTimer {
    pub(crate) fn new(clock: QueueClock) -> io::Result<Self> {
        let task = Arc::new(Task::default());
        let timed: Weak<Task> = Arc::downgrade(&task);
        let timer = Timer::new(timed as Weak<dyn TimerTarget>, &clock)?;
        Ok(Self { timer, task, number: AtomicU64::new(0), clock })
    }

    /// Waits until `at`; indefinitely if it is `None`.
    pub(crate) async fn wait(&self, at: Option<Instant>) {
        std::future::poll_fn(|cx| {
            let Some(at) = at else { return Poll::Pending };
            self.task.waker.register(cx.waker());
            if at <= self.clock.now() {
                return Poll::Ready(());
            }
            let number = self.number.fetch_add(1, Ordering::Relaxed);
            self.timer.set(Alarm { at: Some(at), number });
            Poll::Pending
        })
        .await;
    }
}

/// The pauses between attempts to get what another process has. They grow from 1 to 20 ms: a
/// restart waits for little longer than it must, and waiting for a queue takes 0.9 % of a CPU
/// (measured on a busy machine).
#[derive(Debug)]
pub(crate) struct Pauses {
    timer: TaskTimer,
    next: Duration,
}

impl Pauses {
    pub(crate) fn new(operation: &'static str, clock: QueueClock) -> Result<Self, Error> {
        let timer = TaskTimer::new(clock).map_err(|source| Error::os(operation, source))?;
        Ok(Self { timer, next: Duration::from_millis(1) })
    }

    pub(crate) async fn pause(&mut self) {
        self.timer.wait(Some(self.timer.clock.now() + self.next)).await;
        self.next = (self.next * 2).min(Duration::from_millis(20));
    }
}
