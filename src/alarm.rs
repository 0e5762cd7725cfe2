//! A timer finer than Tokio's: a timerfd in the reactor. It needs no time driver in the runtime.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// One alarm, set to the earliest moment asked for.
#[derive(Debug)]
pub(crate) struct Alarm {
    fd: AsyncFd<OwnedFd>,
    set_for: Option<Instant>,
}

impl Alarm {
    /// Must be made within a runtime that has an I/O driver.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { fd: sys::register(fd)?, set_for: None })
    }

    /// Sees to it that the alarm rings at `at` or before. It may ring early, for an earlier wish that has since lapsed:
    /// leaving it set saves a system call each time.
    pub(crate) fn set(&mut self, at: Instant) -> io::Result<()> {
        if self.set_for.is_some_and(|set_for| set_for <= at) {
            return Ok(());
        }
        // Zero would disarm.
        let after = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: after.as_secs() as _, tv_nsec: after.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        rustix::time::timerfd_settime(self.fd.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        self.set_for = Some(at);
        Ok(())
    }

    /// Waits until the alarm rings; for ever if it is not set. Cancel safe.
    pub(crate) async fn rings(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.fd.readable().await?;
            let read = ready.try_io(|fd| rustix::io::read(fd.get_ref(), &mut [0; 8]).map_err(io::Error::from));
            match read {
                Ok(result) => {
                    result?;
                    self.set_for = None;
                    return Ok(());
                }
                // Readiness was stale; it has been cleared.
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn rings_not_before_its_time_and_again_when_set_again() {
        let mut alarm = Alarm::new().unwrap();
        for _ in 0..3 {
            let at = Instant::now() + Duration::from_micros(300);
            alarm.set(at).unwrap();
            alarm.set(at + Duration::from_secs(100)).unwrap();
            alarm.rings().await.unwrap();
            assert!(Instant::now() >= at);
        }
    }

    #[tokio::test]
    async fn a_moment_in_the_past_rings_at_once() {
        let mut alarm = Alarm::new().unwrap();
        alarm.set(Instant::now() - Duration::from_secs(1)).unwrap();
        alarm.rings().await.unwrap();
    }
}
