//! Sleeping, in any executor.

use std::{
    io,
    sync::{Arc, Weak},
    task::Poll,
    time::{Duration, Instant},
};

use futures::task::AtomicWaker;

use super::{
    clock::QueueClock,
    timer::{Timer, TimerTarget},
};
use crate::{state::Clock, types::Error};

/// A timer for one task.
#[derive(Debug)]
pub(crate) struct Ticks {
    alarm: Arc<Alarm>,
    timer: Timer,
    pub(crate) clock: QueueClock,
}

#[derive(Debug, Default)]
struct Alarm {
    waker: AtomicWaker,
}

impl TimerTarget for Alarm {
    fn fire(self: Arc<Self>) {
        self.waker.wake();
    }

    fn readable(self: Arc<Self>) {}
}

impl Ticks {
    pub(crate) fn new(clock: QueueClock) -> io::Result<Self> {
        let alarm = Arc::new(Alarm::default());
        let timed: Weak<Alarm> = Arc::downgrade(&alarm);
        Ok(Self { timer: Timer::new(timed as Weak<dyn TimerTarget>, &clock)?, alarm, clock })
    }

    /// Waits until `at`; for ever if it is `None`.
    pub(crate) async fn wait(&self, at: Option<Instant>) {
        std::future::poll_fn(|cx| {
            let Some(at) = at else { return Poll::Pending };
            self.alarm.waker.register(cx.waker());
            if at <= self.clock.now() {
                return Poll::Ready(());
            }
            self.timer.set(at);
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
    ticks: Ticks,
    next: Duration,
}

impl Pauses {
    pub(crate) fn new(operation: &'static str, clock: QueueClock) -> Result<Self, Error> {
        let ticks = Ticks::new(clock).map_err(|source| Error::os(operation, source))?;
        Ok(Self { ticks, next: Duration::from_millis(1) })
    }

    pub(crate) async fn pause(&mut self) {
        self.ticks.wait(Some(self.ticks.clock.now() + self.next)).await;
        self.next = (self.next * 2).min(Duration::from_millis(20));
    }
}
