//! Signals as something to wait for, beside time and keys.

use std::{
    io::{self, Read},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH},
    flag,
    low_level::pipe,
};

#[derive(Debug)]
pub(crate) struct Signals {
    /// A byte for each signal.
    woken: UnixStream,
    end: Arc<AtomicBool>,
}

/// Why a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    Time,
    /// The descriptor can be read.
    Input,
    /// The terminal may have another size.
    Resized,
    /// The program is asked to end.
    End,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        let (woken, wake) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        let end = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            // Before the byte is sent.
            flag::register(signal, Arc::clone(&end))?;
            pipe::register(signal, wake.try_clone()?)?;
        }
        pipe::register(SIGWINCH, wake)?;
        Ok(Self { woken, end })
    }

    /// Waits for a signal, for input if there is a descriptor, and at most until `deadline`, if
    /// there is one.
    pub(crate) fn wait(&mut self, deadline: Option<Instant>, input: Option<impl AsFd>) -> io::Result<Woken> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec::try_from(left).expect("an interval of at most a day"));
            let mut descriptors = vec![PollFd::new(&self.woken, PollFlags::IN)];
            descriptors.extend(input.as_ref().map(|input| PollFd::new(input, PollFlags::IN)));
            let ready = match poll(&mut descriptors, left.as_ref()) {
                Err(Errno::INTR) => continue,
                ready => ready?,
            };
            let is_ready = |index: usize| descriptors.get(index).is_some_and(|one| !one.revents().is_empty());
            let (signalled, readable) = (is_ready(0), is_ready(1));
            if signalled {
                while self.woken.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
            }
            return Ok(match (signalled, readable) {
                _ if self.end.load(Ordering::SeqCst) => Woken::End,
                (_, true) => Woken::Input,
                (true, false) => Woken::Resized,
                (false, false) if ready == 0 => Woken::Time,
                (false, false) => continue,
            });
        }
    }
}
