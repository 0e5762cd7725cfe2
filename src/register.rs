//! One of two places with `unsafe` (the other fills receive memory, in `socket::memory`): Tokio asks for a promise that a file descriptor stays open while it is registered.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Types that own their file descriptor: it is open as long as they live, and always the same.
pub(crate) trait Owning: AsRawFd {}

impl Owning for OwnedFd {}
// It closes its descriptor when dropped and not before. (Its `Clone` copies the number; this crate never clones one.)
impl Owning for netlink_sys::Socket {}

/// Registers a descriptor with the current runtime, for reading.
#[allow(unsafe_code)]
pub(crate) fn readable<T: Owning>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: by `Owning`, the descriptor is open and the same until `inner` is dropped, and the `AsyncFd` owns `inner`.
    unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) }.map_err(|error| error.into_parts().1)
}
