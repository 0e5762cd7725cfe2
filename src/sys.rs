//! All there is of `unsafe`: what the crates that make the system calls ask the caller to promise.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use bytes::BytesMut;
use rustix::net::{RecvFlags, recv};
use tokio::io::{Interest, unix::AsyncFd};

/// Types that own their file descriptor: it is open as long as they live, and always the same.
pub(crate) trait Owning: AsRawFd {}

impl Owning for OwnedFd {}
// It closes its descriptor when dropped and not before. (Its `Clone` copies the number; this crate never clones one.)
impl Owning for netlink_sys::Socket {}

/// Registers a descriptor with the current runtime, for reading.
#[allow(unsafe_code)]
pub(crate) fn register<T: Owning>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: by `Owning`, the descriptor is open and the same until `inner` is dropped, and the `AsyncFd` owns `inner`.
    unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) }.map_err(|error| error.into_parts().1)
}

/// Receives one datagram in place of what `room` holds, as much of it as there is capacity for, and tells the datagram's own
/// length.
///
/// By the system call itself: the C library's `recv` is a point where a thread can be cancelled, and preparing for that
/// takes some 40 ns.
#[allow(unsafe_code)]
pub(crate) fn receive(socket: impl AsFd, room: &mut BytesMut) -> rustix::io::Result<usize> {
    room.clear();
    let ((received, _), length) = recv(socket, room.spare_capacity_mut(), RecvFlags::TRUNC)?;
    let received = received.len();
    // SAFETY: `room` was empty, so its spare capacity begins where it begins, and `recv` has filled that much of it.
    unsafe { room.set_len(received) };
    Ok(length)
}
