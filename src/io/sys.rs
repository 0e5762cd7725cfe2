//! All `unsafe` code: the conditions that the crates for system calls leave to the caller.

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::BytesMut;
use rustix::{
    fs::fstatfs,
    io::Errno,
    ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous},
    net::{RecvFlags, recv, sockopt::socket_type},
    thread::{CapabilitySet, capabilities},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Types that own their file descriptor: it is open while they exist, and does not change.
pub(crate) trait Owning: AsRawFd {}

// It closes its descriptor when it is dropped, and not before. (Its `Clone` copies the number; this
// crate never clones one.)
impl Owning for netlink_sys::Socket {}

// It contains an `OwnedFd` that it gives away only by value.
#[cfg(feature = "inject")]
impl Owning for socket2::Socket {}

/// Registers a descriptor with the current runtime. Returns `None` if the runtime has no I/O
/// driver.
#[allow(unsafe_code)]
pub(crate) fn register<T: Owning>(inner: T, interest: Interest) -> Option<io::Result<AsyncFd<T>>> {
    // Tokio has no function to ask whether there is a driver; it panics.
    let registered = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: by `Owning`, the descriptor is open and the same until `inner` is dropped, and
        // the `AsyncFd` owns `inner`.
        unsafe { AsyncFd::register_with_interest(inner, interest) }
    }));
    Some(registered.ok()?.map_err(|error| error.into_parts().1))
}

/// Whether the calling thread has an effective `CAP_NET_ADMIN` in its own user namespace; `None` if
/// the thread may not ask. A seccomp filter can refuse the call.
pub(crate) fn has_net_admin() -> Option<bool> {
    let sets = capabilities(None).ok()?;
    Some(sets.effective.contains(CapabilitySet::NET_ADMIN))
}

/// The user namespace that owns the calling thread's network namespace, as far as the thread can
/// find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Initial,
    /// The thread's own user namespace, or a child of it.
    Own,
    /// Another user namespace, in which the thread has no capabilities; or unknown.
    Foreign,
}

/// The owner of the calling thread's network namespace, in which the socket was opened.
pub(crate) fn network_owner(socket: impl AsFd) -> Owner {
    match std::fs::File::open("/proc/thread-self/ns/net") {
        Ok(namespace) => network_owner_of(namespace),
        // Without /proc. The kernel refuses this unless the thread has `CAP_NET_ADMIN` there.
        Err(_) => network_namespace_of(socket).map_or(Owner::Foreign, network_owner_of),
    }
}

/// The owner of a network namespace, which is given by its file.
pub(crate) fn network_owner_of(namespace: impl AsFd) -> Owner {
    // linux/proc_ns.h: PROC_USER_INIT_INO.
    const INITIAL: u64 = 0xEFFF_FFFD;
    // ns_get_owner returns EPERM unless it is the caller's own user namespace or a child.
    match user_namespace_of(namespace).and_then(rustix::fs::fstat) {
        Ok(stat) if stat.st_ino == INITIAL => Owner::Initial,
        Ok(_) => Owner::Own,
        Err(_) => Owner::Foreign,
    }
}

/// The user namespace that owns another namespace, which is given by a file in `/proc/*/ns`.
/// `ENOTTY` if it is another file.
#[allow(unsafe_code)]
fn user_namespace_of(namespace: impl AsFd) -> rustix::io::Result<OwnedFd> {
    // linux/nsfs.h: NS_GET_USERNS.
    const GET_USER_NAMESPACE: Opcode = opcode::none(0xb7, 1);
    // linux/magic.h: NSFS_MAGIC.
    const NAMESPACES: u32 = 0x6e73_6673;
    // Called once: `as_fd` need not return the same descriptor every time.
    let namespace = namespace.as_fd();
    // The command is one of nsfs. For another file it may mean anything.
    if fstatfs(namespace)?.f_type as u32 != NAMESPACES {
        return Err(Errno::NOTTY);
    }
    // SAFETY: for a file of nsfs, `ns_ioctl` (fs/nsfs.c) takes no argument and returns a new
    // descriptor.
    unsafe { ioctl(namespace, NewDescriptor(GET_USER_NAMESPACE)) }
}

/// A new descriptor of a socket's network namespace. `ENOTSOCK` if `socket` is something else.
#[allow(unsafe_code)]
pub(crate) fn network_namespace_of(socket: impl AsFd) -> rustix::io::Result<OwnedFd> {
    // uapi/linux/sockios.h: SIOCGSKNS.
    const GET_NETWORK_NAMESPACE: Opcode = 0x894c;
    // Called once: `as_fd` need not return the same descriptor every time.
    let socket = socket.as_fd();
    // The command is one of sockets. For another file it may mean anything.
    socket_type(socket)?;
    // SAFETY: for a socket, `sock_ioctl` (net/socket.c) takes no argument and returns a new
    // descriptor.
    unsafe { ioctl(socket, NewDescriptor(GET_NETWORK_NAMESPACE)) }
}

/// An ioctl that takes no argument and returns a new descriptor. The caller ensures that.
struct NewDescriptor(Opcode);

// SAFETY: there is no argument, so none is written to, and what is returned belongs to the caller.
#[allow(unsafe_code)]
unsafe impl Ioctl for NewDescriptor {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.0
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(descriptor: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the call has succeeded, and its result is a new descriptor without an owner.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}

/// Makes a netlink socket of a descriptor. The caller has checked that it is one.
#[allow(unsafe_code)]
pub(crate) fn netlink_socket(fd: OwnedFd) -> netlink_sys::Socket {
    // SAFETY: the descriptor is open, and it has no other owner: the `OwnedFd` from which it comes
    // gives it up here.
    unsafe { netlink_sys::Socket::from_raw_fd(fd.into_raw_fd()) }
}

/// Receives one datagram into `buffer`, replacing its content, up to its capacity. Returns the full
/// length of the datagram.
///
/// It makes the system call directly: `recv` of the C library is a thread cancellation point, which
/// costs about 40 ns.
#[allow(unsafe_code)]
pub(crate) fn receive(socket: impl AsFd, buffer: &mut BytesMut) -> rustix::io::Result<usize> {
    buffer.clear();
    let ((received, _), length) = recv(socket, buffer.spare_capacity_mut(), RecvFlags::TRUNC)?;
    let received = received.len();
    // SAFETY: `buffer` was empty, so its spare capacity begins where it begins, and `recv` has
    // filled that much of it.
    unsafe { buffer.set_len(received) };
    Ok(length)
}

/// Receives up to two datagrams, as [`receive`] does each. Returns how many there were, at least
/// one. If there was only one, the socket was empty after it: the kernel looks for the second one
/// without waiting, and this socket has no other errors (`do_recvmmsg` would keep one for the next
/// call).
#[allow(unsafe_code)]
pub(crate) fn receive_two(socket: impl AsFd, buffers: [&mut BytesMut; 2]) -> rustix::io::Result<usize> {
    // SAFETY: both are plain data, for which zeros are valid.
    let (mut headers, mut vectors): ([libc::mmsghdr; 2], [libc::iovec; 2]) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    let mut buffers = buffers;
    for ((header, vector), buffer) in headers.iter_mut().zip(&mut vectors).zip(&mut buffers) {
        buffer.clear();
        let spare = buffer.spare_capacity_mut();
        (vector.iov_base, vector.iov_len) = (spare.as_mut_ptr().cast(), spare.len());
        (header.msg_hdr.msg_iov, header.msg_hdr.msg_iovlen) = (&raw mut *vector, 1);
    }
    let flags = (libc::MSG_TRUNC | libc::MSG_DONTWAIT) as _;
    // SAFETY: the descriptor is open for as long as it is borrowed. The headers refer to vectors,
    // and these to spare capacity of the buffers, all of which exist until the call returns.
    let count =
        unsafe { libc::recvmmsg(socket.as_fd().as_raw_fd(), headers.as_mut_ptr(), 2, flags, std::ptr::null_mut()) };
    let count = usize::try_from(count).map_err(|_| last_error())?;
    for (header, buffer) in headers.iter().zip(&mut buffers).take(count) {
        let received = (header.msg_len as usize).min(buffer.capacity());
        // SAFETY: the buffer was empty, so its spare capacity began where it begins, and the kernel
        // has filled that much of it: the length of the datagram, or all of it.
        unsafe { buffer.set_len(received) };
    }
    Ok(count)
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A number for this process: a child that it makes by `fork` or `clone` has another one, for as
/// long as it has a copy of this program's memory.
#[inline]
pub(crate) fn process() -> usize {
    match NUMBER.get() {
        Some(Some(number)) if number.load(Ordering::Relaxed) != 0 => number.load(Ordering::Relaxed),
        _ => number_process(),
    }
}

static NUMBER: OnceLock<Option<&'static AtomicUsize>> = OnceLock::new();

#[cold]
fn number_process() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    match NUMBER.get_or_init(wiped_on_fork) {
        Some(number) => {
            // A child's numbers begin after those that its ancestors have used.
            let new = NEXT.fetch_add(1, Ordering::Relaxed);
            match number.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => new,
                Err(number) => number,
            }
        }
        // Not as good: a child in another pid namespace may have the same id.
        None => std::process::id() as usize,
    }
}

/// A number that the kernel sets to 0 in a child process; `None` before Linux 4.14.
#[allow(unsafe_code)]
fn wiped_on_fork() -> Option<&'static AtomicUsize> {
    // The kernel maps and clears whole pages.
    const LENGTH: usize = size_of::<AtomicUsize>();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: without an address, it is a new mapping, which no other code uses.
    let page = unsafe { mmap_anonymous(std::ptr::null_mut(), LENGTH, protection, MapFlags::PRIVATE) }.ok()?;
    // SAFETY: the mapping is the one that was just made, and nothing refers to it yet.
    unsafe { madvise(page, LENGTH, Advice::LinuxWipeOnFork) }.ok()?;
    // SAFETY: the page is aligned, readable and writable, is never unmapped, and contains zeros,
    // which are valid for an `AtomicUsize`. That a child finds zeros again is no write in this
    // process.
    Some(unsafe { &*page.cast::<AtomicUsize>() })
}

/// Runs `body` while the calling thread blocks all signals, so that a thread that it starts blocks
/// them from its first instruction. Otherwise a signal that all other threads block, to read it
/// from a `signalfd`, would be delivered to that thread.
///
/// Signals that report a fault of the thread itself are not blocked: the kernel would end the
/// process instead of calling their handlers.
#[allow(unsafe_code)]
pub(crate) fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    const OF_FAULTS: [libc::c_int; 6] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];
    /// Restores the mask when it is dropped.
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: it reads a set that the C library has filled.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
        }
    }
    // The C library's function leaves out the two signals that the library itself needs, with which
    // it lets all threads call `setuid` and the like.
    //
    // SAFETY: a `sigset_t` is plain data, for which zeros are valid. Each function writes one set,
    // which exists, and the signals are valid.
    let before = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        for signal in OF_FAULTS {
            libc::sigdelset(&raw mut all, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
        before
    };
    let _restore = Restore(before);
    body()
}
