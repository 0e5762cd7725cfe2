//! What needs `unsafe`.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

/// Makes a netlink socket of a descriptor. The caller has checked that it is one.
#[allow(unsafe_code)]
pub(crate) fn netlink_socket(fd: OwnedFd) -> netlink_sys::Socket {
    // SAFETY: the descriptor is open, and it has no other owner: it comes from an `OwnedFd`
    // that gives it up here.
    unsafe { netlink_sys::Socket::from_raw_fd(fd.into_raw_fd()) }
}
