//! The timers of all queues, on one thread.
//!
//! A promise with a time limit must hold whatever the tasks of a runtime do: a worker may be busy
//! for long, and a current-thread runtime may be outside of `block_on`, or may have ended. So this
//! thread does what is due if no other has done it by then. There is one thread for the process.
//! The first queue starts it, and it sleeps while nothing is due.
//!
//! A child by `fork` has no copy of the thread. The first use of a timer there starts another one,
//! with descriptors of its own: those that it has inherited are its parent's as well. Nor does it
//! touch the parent's locks, one of which the thread may have held.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, epoll, poll},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

#[cfg(feature = "test-util")]
use super::clock::MemoryTimer;
pub(crate) use super::clock::TimerTarget;
use super::{clock::QueueClock, sys};
use crate::state::Alarm;

/// One timer.
#[derive(Debug)]
pub(crate) struct Timer {
    timed: Timed,
    key: u64,
    /// The process whose thread has watched this timer's descriptor: [`sys::process`], or 0.
    watched_in: AtomicUsize,
    /// For a clock that is not the system's.
    #[cfg(feature = "test-util")]
    memory: Option<Arc<MemoryTimer>>,
}

impl Timer {
    /// Starts the thread, if this is the first timer.
    ///
    /// # Errors
    /// The system cannot create a thread or a descriptor.
    pub(crate) fn new(timed: Weak<dyn TimerTarget>, clock: &QueueClock) -> io::Result<Self> {
        #[cfg(feature = "test-util")]
        let (timed, memory) = match clock {
            QueueClock::System => (timed, None),
            QueueClock::Memory(clock) => {
                let timer = clock.timer(timed);
                let timed: Weak<MemoryTimer> = Arc::downgrade(&timer);
                (timed as Weak<dyn TimerTarget>, Some(timer))
            }
        };
        #[cfg(not(feature = "test-util"))]
        let QueueClock::System = clock;
        static NEXT_KEY: AtomicUsize = AtomicUsize::new(0);
        let timer = Self {
            timed: Timed(timed),
            key: NEXT_KEY.fetch_add(1, Ordering::Relaxed) as u64,
            watched_in: AtomicUsize::new(0),
            #[cfg(feature = "test-util")]
            memory,
        };
        TimerThread::get()?.state().entry(&timer);
        Ok(timer)
    }

    /// Has [`TimerTarget::fire`] called at this time, or not at all.
    pub(crate) fn set(&self, alarm: Alarm) {
        #[cfg(feature = "test-util")]
        let alarm = match &self.memory {
            None => alarm,
            Some(memory) => match memory.set(alarm) {
                Some(alarm) => alarm,
                None => return,
            },
        };
        let thread = match TimerThread::get() {
            Ok(thread) => thread,
            Err(error) => {
                // Only in a child by `fork`. The next timer that is set tries again.
                tracing::error!(target: "tokio_nfqueue", %error, "the timer thread cannot be started");
                return;
            }
        };
        let mut state = thread.state();
        let entry = state.entry(self);
        if entry.number > alarm.number {
            return;
        }
        entry.number = alarm.number;
        let before = std::mem::replace(&mut entry.at, alarm.at);
        if let Some(before) = before {
            state.order.remove(&(before, self.key));
        }
        if let Some(at) = alarm.at {
            state.order.insert((at, self.key));
        }
        thread.program(&mut state);
    }

    /// Also lets the clock of a kernel in memory report when the descriptor is readable.
    #[cfg(feature = "test-util")]
    pub(crate) fn watch_in_memory(&self, fd: Arc<OwnedFd>) {
        if let Some(memory) = &self.memory {
            memory.watch(fd);
        }
    }

    /// Has [`TimerTarget::readable`] called once, as soon as the descriptor is readable: always the
    /// same descriptor.
    pub(crate) fn watch(&self, fd: impl AsFd) -> io::Result<()> {
        #[cfg(feature = "test-util")]
        if self.memory.as_ref().is_some_and(|memory| memory.stands_still()) {
            return Ok(());
        }
        let thread = TimerThread::get()?;
        thread.state().entry(self);
        let (data, flags) = (epoll::EventData::new_u64(self.key), epoll::EventFlags::IN | epoll::EventFlags::ONESHOT);
        let process = sys::process();
        if self.watched_in.swap(process, Ordering::Relaxed) == process {
            epoll::modify(&thread.epoll, fd, data, flags)?;
        } else {
            epoll::add(&thread.epoll, fd, data, flags)?;
        }
        Ok(())
    }

    /// Ends a [`watch`](Self::watch), if there is one. Closing the descriptor does not suffice if
    /// another process has a copy.
    pub(crate) fn unwatch(&self, fd: impl AsFd) {
        if let Some(thread) = TimerThread::started() {
            let _ = epoll::delete(&thread.epoll, fd);
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(thread) = TimerThread::started() else { return };
        let mut state = thread.state();
        let entry = state.timers.remove(&self.key);
        if let Some(Entry { at: Some(at), .. }) = entry {
            state.order.remove(&(at, self.key));
            thread.program(&mut state);
        }
    }
}

/// What a timer calls.
#[derive(Clone)]
struct Timed(Weak<dyn TimerTarget>);

impl std::fmt::Debug for Timed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Timed")
    }
}

#[derive(Debug)]
struct TimerThread {
    state: Mutex<State>,
    /// Readable when the first time has been reached. To set it does not wake the thread, as it
    /// would to change the time for which the thread sleeps.
    alarm: OwnedFd,
    /// The descriptors that are watched.
    epoll: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    timers: HashMap<u64, Entry>,
    order: BTreeSet<(Instant, u64)>,
    /// The time to which the alarm is set.
    programmed: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    timed: Timed,
    at: Option<Instant>,
    /// That of the last [`Alarm`].
    number: u64,
}

impl State {
    /// The entry of a timer. There may be none yet if the timer was made before a `fork`.
    fn entry(&mut self, timer: &Timer) -> &mut Entry {
        self.timers.entry(timer.key).or_insert_with(|| Entry { timed: timer.timed.clone(), at: None, number: 0 })
    }

    /// The timers that a child process has inherited.
    fn inherited(mut self) -> Self {
        Self { timers: std::mem::take(&mut self.timers), order: std::mem::take(&mut self.order), ..Self::default() }
    }
}

/// The thread of a process, and those of its descendants that have inherited this from it. Each
/// process finds its own without a lock, which another thread might hold at the time of a `fork`.
#[derive(Debug)]
struct Generation {
    process: usize,
    thread: Arc<TimerThread>,
    next: OnceLock<Box<Generation>>,
}

static FIRST: OnceLock<Box<Generation>> = OnceLock::new();

/// The generation of this process if it has one, and otherwise the last one before it and where it
/// belongs.
fn find(
    process: usize,
) -> Result<&'static Generation, (Option<&'static Generation>, &'static OnceLock<Box<Generation>>)> {
    let (mut place, mut last) = (&FIRST, None);
    while let Some(generation) = place.get() {
        if generation.process == process {
            return Ok(generation);
        }
        (place, last) = (&generation.next, Some(&**generation));
    }
    Err((last, place))
}

impl TimerThread {
    /// That of this process, if it has been started.
    fn started() -> Option<&'static Self> {
        find(sys::process()).ok().map(|generation| &*generation.thread)
    }

    /// That of this process.
    fn get() -> io::Result<&'static Self> {
        match Self::started() {
            Some(thread) => Ok(thread),
            None => Self::start(),
        }
    }

    #[cold]
    fn start() -> io::Result<&'static Self> {
        static STARTING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let process = sys::process();
        let (last, place) = match find(process) {
            Ok(generation) => return Ok(&generation.thread),
            Err(end) => end,
        };
        let new = Arc::new(Self {
            state: Mutex::default(),
            alarm: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        });
        {
            // The thread waits for this lock.
            let mut state = new.state();
            let runner = Arc::clone(&new);
            let builder = thread::Builder::new().name("nfqueue-timer".to_owned());
            sys::with_signals_blocked(|| builder.spawn(move || runner.run()))?;
            // If the parent's thread held the lock, each timer comes when it is set again.
            if let Some(mut inherited) = last.and_then(|last| last.thread.state.try_lock().ok()) {
                *state = std::mem::take(&mut *inherited).inherited();
                new.program(&mut state);
            }
        }
        let generation = Generation { process, thread: new, next: OnceLock::new() };
        Ok(&place.get_or_init(|| Box::new(generation)).thread)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the alarm to the first time, if it is set to another one.
    fn program(&self, state: &mut State) {
        let first = state.order.first().map(|(at, _)| *at);
        if state.programmed == first {
            return;
        }
        state.programmed = first;
        let until = first.map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1)));
        // Zero clears it.
        let until = until.unwrap_or_default();
        let value = Timespec { tv_sec: until.as_secs() as _, tv_nsec: until.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // It fails only for values out of range.
        if let Err(error) = timerfd_settime(&self.alarm, TimerfdTimerFlags::empty(), &once) {
            tracing::error!(target: "tokio_nfqueue", %error, "the timer cannot be set");
        }
    }

    fn run(&self) {
        loop {
            while let Some(timed) = self.due() {
                guard(|| timed.fire());
            }
            if let Err(error) = self.sleep() {
                // The thread must not end: no time limit would hold.
                tracing::error!(target: "tokio_nfqueue", %error, "the timer thread cannot sleep");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// The next target whose time has been reached. Its timer is no longer set.
    fn due(&self) -> Option<Arc<dyn TimerTarget>> {
        loop {
            let mut state = self.state();
            let Some((_, key)) = state.order.first().copied().filter(|(at, _)| *at <= Instant::now()) else {
                self.program(&mut state);
                return None;
            };
            state.order.pop_first();
            let entry = state.timers.get_mut(&key)?;
            entry.at = None;
            let timed = entry.timed.0.upgrade();
            drop(state);
            if timed.is_some() {
                return timed;
            }
        }
    }

    /// Until the alarm, or until a watched descriptor is readable.
    fn sleep(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.alarm, PollFlags::IN), PollFd::new(&self.epoll, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            result => result?,
        };
        let [alarm, watched] = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        if alarm {
            self.clear_alarm()?;
            // It may have come early, by the clock that this process reads.
            self.state().programmed = None;
        }
        if watched {
            self.tell_readable()?;
        }
        Ok(())
    }

    fn clear_alarm(&self) -> io::Result<()> {
        match rustix::io::read(&self.alarm, &mut [0; 8]) {
            // A thread that sets it meanwhile makes it readable again.
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn tell_readable(&self) -> io::Result<()> {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 64];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let (events, _) = epoll::wait(&self.epoll, &mut events, Some(&now))?;
        for event in events {
            let timed = self.state().timers.get(&event.data.u64()).and_then(|entry| entry.timed.0.upgrade());
            if let Some(timed) = timed {
                guard(|| timed.readable());
            }
        }
        Ok(())
    }
}

/// Wakers and subscribers are users' code. If it panics, the panic hook has reported that; the
/// other queues need this thread.
fn guard(body: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(body));
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::AtomicU64,
        mpsc::{Sender, channel},
    };

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[derive(Debug)]
    struct Probe(Mutex<Sender<&'static str>>);

    impl TimerTarget for Probe {
        fn fire(self: Arc<Self>) {
            self.0.lock().unwrap().send("fire").unwrap();
        }

        fn readable(self: Arc<Self>) {
            self.0.lock().unwrap().send("readable").unwrap();
            panic!("a panic of a user's code: the thread continues");
        }
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    fn set(timer: &Timer, at: Option<Instant>) {
        static NUMBER: AtomicU64 = AtomicU64::new(2);
        timer.set(Alarm { at, number: NUMBER.fetch_add(1, Ordering::Relaxed) });
    }

    #[test]
    fn timers_fire_not_before_their_time_and_again_when_set_again() {
        let (sender, receiver) = channel();
        let probe = Arc::new(Probe(Mutex::new(sender)));
        let timed: Weak<dyn TimerTarget> = Arc::downgrade(&probe) as _;
        let timer = Timer::new(timed, &QueueClock::System).unwrap();
        for _ in 0..3 {
            let at = Instant::now() + Duration::from_micros(300);
            for time in [None, Some(at + Duration::from_secs(1000)), Some(at)] {
                set(&timer, time);
            }
            // One that has been overtaken.
            timer.set(Alarm { at: Some(at + Duration::from_secs(1)), number: 1 });
            assert_eq!(receiver.recv_timeout(PATIENCE), Ok("fire"));
            assert!(Instant::now() >= at);
        }
        set(&timer, Some(Instant::now() - Duration::from_millis(1)));
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("fire"));
        // One that is cleared does not fire; the next one does.
        set(&timer, Some(Instant::now() + Duration::from_secs(1)));
        set(&timer, None);
        let at = Instant::now() + Duration::from_secs(2);
        set(&timer, Some(at));
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("fire"));
        assert!(Instant::now() >= at);
    }

    /// The clock that the alarm follows may be ahead of the one that this process reads, on another
    /// CPU of a virtual machine for example.
    #[test]
    fn an_alarm_that_comes_early_is_set_again() {
        let (sender, receiver) = channel();
        let probe = Arc::new(Probe(Mutex::new(sender)));
        let timed: Weak<dyn TimerTarget> = Arc::downgrade(&probe) as _;
        let timer = Timer::new(timed, &QueueClock::System).unwrap();
        let at = Instant::now() + Duration::from_millis(200);
        set(&timer, Some(at));
        let soon = Timespec { tv_sec: 0, tv_nsec: 1 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: soon };
        let thread = TimerThread::get().unwrap();
        timerfd_settime(&thread.alarm, TimerfdTimerFlags::empty(), &once).unwrap();
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("fire"));
        assert!(Instant::now() >= at);
    }

    #[test]
    fn each_watch_reports_a_readable_descriptor_once() {
        let (sender, receiver) = channel();
        let probe = Arc::new(Probe(Mutex::new(sender)));
        let timed: Weak<dyn TimerTarget> = Arc::downgrade(&probe) as _;
        let timer = Timer::new(timed, &QueueClock::System).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        timer.watch(&event).unwrap();
        rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("readable"));
        timer.watch(&event).unwrap();
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("readable"));
        // It is not watched any more: the next call is that of the timer itself.
        set(&timer, Some(Instant::now() + Duration::from_millis(20)));
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("fire"));
    }
}
