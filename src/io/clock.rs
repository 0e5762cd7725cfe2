//! The clock of a queue: that of the system, or that of a kernel in memory.

use std::{sync::Arc, time::Instant};

use crate::state::Clock;

/// Something with a timer.
pub(crate) trait TimerTarget: Send + Sync {
    /// The time has been reached. May be called early.
    fn fire(self: Arc<Self>);
    /// The descriptor that was given to be watched is readable.
    fn readable(self: Arc<Self>);
}

/// The clock of a queue.
#[derive(Debug, Clone)]
pub(crate) enum QueueClock {
    System,
    #[cfg(feature = "test-util")]
    Memory(Arc<MemoryClock>),
}

impl Clock for QueueClock {
    #[inline]
    fn now(&self) -> Instant {
        match self {
            Self::System => Instant::now(),
            #[cfg(feature = "test-util")]
            Self::Memory(clock) => clock.now(),
        }
    }
}

impl QueueClock {
    /// Whether time passes only when a test moves the clock.
    #[inline]
    pub(super) fn stands_still(&self) -> bool {
        match self {
            Self::System => false,
            #[cfg(feature = "test-util")]
            Self::Memory(clock) => clock.stands_still(),
        }
    }
}

#[cfg(feature = "test-util")]
pub(crate) use memory::{MemoryClock, MemoryTimer};

#[cfg(feature = "test-util")]
mod memory {
    use std::{
        os::fd::OwnedFd,
        sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
        thread::{self, ThreadId},
        time::{Duration, Instant},
    };

    use rustix::{
        event::{PollFd, PollFlags, poll},
        time::Timespec,
    };

    use super::TimerTarget;

    /// A clock that runs with the system's until it is moved for the first time. From then on it
    /// stands still except when it is moved.
    ///
    /// While it runs, the timer thread does what is due. When it stands still, the timer thread has
    /// no part: what is due is done by the thread that moves the clock or sets the timer. So a
    /// history on one thread does not depend on when the system runs another one.
    #[derive(Debug, Default)]
    pub(crate) struct MemoryClock(Mutex<State>);

    #[derive(Debug, Default)]
    struct State {
        /// The time, once the clock has been moved.
        stopped: Option<Instant>,
        /// Where the moves that have begun will end. Those of several threads add up.
        target: Option<Instant>,
        timers: Vec<Weak<MemoryTimer>>,
    }

    impl MemoryClock {
        fn state(&self) -> MutexGuard<'_, State> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn now(&self) -> Instant {
            self.state().stopped.unwrap_or_else(Instant::now)
        }

        pub(crate) fn stands_still(&self) -> bool {
            self.state().stopped.is_some()
        }

        /// A timer on this clock.
        pub(crate) fn timer(self: &Arc<Self>, target: Weak<dyn TimerTarget>) -> Arc<MemoryTimer> {
            let timer = Arc::new(MemoryTimer {
                clock: Arc::clone(self),
                target,
                alarm: Mutex::default(),
                calling: Mutex::default(),
                caller: Mutex::default(),
            });
            let mut state = self.state();
            state.timers.retain(|timer| timer.strong_count() > 0);
            state.timers.push(Arc::downgrade(&timer));
            timer
        }

        /// Moves the clock. What becomes due on the way is done at its time, in order, before this
        /// returns. The caller must hold no lock of a queue.
        pub(crate) fn advance(&self, by: Duration) {
            let mut state = self.state();
            let begin = Some(*state.stopped.get_or_insert_with(Instant::now)).max(state.target);
            let end = begin.and_then(|begin| begin.checked_add(by)).or(begin);
            state.target = end;
            drop(state);
            loop {
                // The thread that watches descriptors may not have noticed yet.
                self.timers().iter().for_each(|timer| timer.report_readable());
                let timers = self.timers();
                let next = timers.iter().filter_map(|timer| Some((timer.at()?, timer))).min_by_key(|(at, _)| *at);
                let next = next.filter(|(at, _)| Some(*at) <= end);
                let mut state = self.state();
                let before = state.stopped;
                state.stopped = before.max(next.map_or(end, |(at, _)| Some(at)));
                let moved = state.stopped > before;
                drop(state);
                match next {
                    Some((_, timer)) => timer.fire_if_due(),
                    // Another thread may have set a timer between the search and this move: it has
                    // seen the time before. So the search is repeated once the clock is at the end.
                    None if moved => {}
                    None => break,
                }
            }
        }

        /// The next time at which something is due.
        #[cfg(test)]
        pub(crate) fn next(&self) -> Option<Instant> {
            self.timers().iter().filter_map(|timer| timer.at()).min()
        }

        fn timers(&self) -> Vec<Arc<MemoryTimer>> {
            self.state().timers.iter().filter_map(Weak::upgrade).collect()
        }
    }

    /// Between the timer thread, which knows only the system's clock, and what has the timer.
    pub(crate) struct MemoryTimer {
        clock: Arc<MemoryClock>,
        target: Weak<dyn TimerTarget>,
        alarm: Mutex<Alarm>,
        /// Held while the target is called, so that the clock does not move on before what was due
        /// has been done, whichever thread does it.
        calling: Mutex<()>,
        /// The thread that holds it: a waker that the target calls may move the clock.
        caller: Mutex<Option<ThreadId>>,
    }

    /// While it exists, no other thread calls the target.
    struct Calling<'a> {
        timer: &'a MemoryTimer,
        _guard: MutexGuard<'a, ()>,
    }

    impl Drop for Calling<'_> {
        fn drop(&mut self) {
            *self.timer.caller() = None;
        }
    }

    #[derive(Debug, Default)]
    struct Alarm {
        at: Option<Instant>,
        number: u64,
        /// The descriptor whose readability has not been reported yet.
        watched: Option<Arc<OwnedFd>>,
    }

    impl MemoryTimer {
        fn alarm(&self) -> MutexGuard<'_, Alarm> {
            self.alarm.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn at(&self) -> Option<Instant> {
            self.alarm().at
        }

        /// Sets the timer. Returns what the timer thread must do, if it must do anything.
        pub(crate) fn set(&self, new: crate::state::Alarm) -> Option<crate::state::Alarm> {
            let mut alarm = self.alarm();
            if alarm.number > new.number {
                return None;
            }
            (alarm.at, alarm.number) = (new.at, new.number);
            drop(alarm);
            if !self.stands_still() {
                return Some(new);
            }
            // What is due already is not left to the next move of the clock.
            self.fire_if_due();
            None
        }

        pub(crate) fn stands_still(&self) -> bool {
            self.clock.stands_still()
        }

        /// The timer thread is going to watch this descriptor.
        pub(crate) fn watch(&self, fd: Arc<OwnedFd>) {
            self.alarm().watched = Some(fd);
        }

        fn caller(&self) -> MutexGuard<'_, Option<ThreadId>> {
            self.caller.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// `None` if this thread is calling the target already.
        fn calling(&self) -> Option<Calling<'_>> {
            let thread = thread::current().id();
            if *self.caller() == Some(thread) {
                return None;
            }
            let guard = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
            *self.caller() = Some(thread);
            Some(Calling { timer: self, _guard: guard })
        }

        /// Fires until nothing is due: the target may set the timer again. While the clock runs,
        /// the timer thread calls again for that.
        fn fire_if_due(&self) {
            loop {
                // A call of the target that sets the timer is followed by another one, here or in
                // `report_readable`.
                let Some(_calling) = self.calling() else { return };
                let now = self.clock.now();
                let due = self.alarm().at.take_if(|at| *at <= now).is_some();
                if let Some(target) = self.target.upgrade().filter(|_| due) {
                    target.fire();
                }
                if !due || !self.stands_still() {
                    return;
                }
            }
        }

        fn report_readable(&self) {
            {
                // A waker that the target calls may move the clock.
                let _calling = self.calling();
                let readable = self.alarm().watched.take_if(|fd| is_readable(fd)).is_some();
                if let Some(target) = self.target.upgrade().filter(|_| readable) {
                    target.readable();
                }
            }
            self.fire_if_due();
        }
    }

    fn is_readable(fd: &OwnedFd) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
    }

    impl TimerTarget for MemoryTimer {
        fn fire(self: Arc<Self>) {
            self.fire_if_due();
        }

        fn readable(self: Arc<Self>) {
            // The thread that moves the clock reports it.
            if self.clock.stands_still() {
                return;
            }
            let _calling = self.calling();
            if self.alarm().watched.take().is_some() {
                if let Some(target) = self.target.upgrade() {
                    target.readable();
                }
            }
        }
    }

    impl std::fmt::Debug for MemoryTimer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.alarm().fmt(f)
        }
    }
}

#[cfg(all(test, feature = "test-util"))]
mod tests {
    use std::{
        sync::{Arc, Weak, mpsc},
        thread,
        time::Duration,
    };

    use super::{super::timer::Timer, *};

    struct Target(mpsc::SyncSender<()>);

    impl TimerTarget for Target {
        fn fire(self: Arc<Self>) {
            let _ = self.0.try_send(());
        }

        fn readable(self: Arc<Self>) {}
    }

    /// If the timer is set before the clock has moved past its time, the mover fires it; otherwise
    /// the timer thread does at once.
    #[test]
    fn a_timer_that_is_set_while_the_clock_moves_is_not_forgotten() {
        const STEP: Duration = Duration::from_secs(1);
        let clock = Arc::new(MemoryClock::default());
        clock.advance(Duration::ZERO);
        let (fired, firing) = mpsc::sync_channel(1);
        let target = Arc::new(Target(fired));
        let weak: Weak<dyn TimerTarget> = Arc::downgrade(&target) as _;
        let timer = Timer::new(weak, &QueueClock::Memory(Arc::clone(&clock))).unwrap();
        let (go, going) = mpsc::channel();
        let (moved, moving) = mpsc::channel();
        let mover = Arc::clone(&clock);
        thread::spawn(move || {
            for () in going {
                mover.advance(STEP);
                moved.send(()).unwrap();
            }
        });
        for round in 0..ROUNDS {
            let at = clock.now() + STEP;
            go.send(()).unwrap();
            // The other thread takes some microseconds to begin.
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_nanos(100 * (round % 400)) {
                std::hint::spin_loop();
            }
            timer.set(crate::state::Alarm { at: Some(at), number: round });
            moving.recv().unwrap();
            firing.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("round {round}"));
        }
    }

    const ROUNDS: u64 = 10_000;
}
