//! A descriptor for loops that are not Tokio's.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::{EventfdFlags, epoll, eventfd};

/// Readable while the socket is, or while packets have been received by somebody else than the stream.
#[derive(Debug)]
pub(super) struct Foreign {
    /// Of the socket and of `received`.
    epoll: OwnedFd,
    received: OwnedFd,
}

impl Foreign {
    pub(super) fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let received = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [socket, received.as_fd()] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { epoll, received })
    }

    /// Packets have been received.
    pub(super) fn raise(&self) {
        // It fails only when it is readable as it is.
        let _ = rustix::io::write(&self.received, &1_u64.to_ne_bytes());
    }

    /// Somebody is about to look at what has been received.
    pub(super) fn lower(&self) {
        let _ = rustix::io::read(&self.received, &mut [0; 8]);
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
