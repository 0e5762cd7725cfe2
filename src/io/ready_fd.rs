//! Descriptors for event loops other than Tokio's.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use rustix::event::{EventfdFlags, epoll, eventfd};

/// Readable while the socket is readable, and after the stream would have been woken for another
/// reason: packets that another task has received, or the end of the stream.
#[derive(Debug)]
pub(super) struct ReadyFd {
    /// Contains the socket and `received`.
    epoll: OwnedFd,
    received: OwnedFd,
    /// Whether `received` is readable. Only its changes cost a system call.
    raised: Mutex<bool>,
}

impl ReadyFd {
    pub(super) fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let received = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [socket, received.as_fd()] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { epoll, received, raised: Mutex::new(false) })
    }

    /// There are packets, or the stream has ended.
    pub(super) fn raise(&self) {
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *raised, true) {
            // It fails only if it is readable anyway.
            let _ = rustix::io::write(&self.received, &1_u64.to_ne_bytes());
        }
    }

    /// There are no packets. Whether the stream has ended is still to be checked.
    pub(super) fn lower(&self) {
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *raised) {
            let _ = rustix::io::read(&self.received, &mut [0; 8]);
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Readable while one of several descriptors is.
#[derive(Debug)]
pub(crate) struct AnyReadyFd(OwnedFd);

impl AnyReadyFd {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    pub(crate) fn add(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
