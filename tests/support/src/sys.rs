//! The system calls that no library offers safely.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::mpsc::sync_channel,
    thread,
};

use nix::libc;

/// `struct ethtool_value`, uapi/linux/ethtool.h.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// An ethtool command that sets one number.
pub(crate) fn ethtool(interface: &str, command: u32, data: u32) -> io::Result<()> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    // SAFETY: `ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    let mut value = Value { command, data };
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the descriptor is open, `request` is an `ifreq` whose name ends in a NUL and whose
    // data points to a live `ethtool_value`, which is what these commands read and write; both
    // outlive the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a descriptor number refer to another file, as `dup2` does: for the owner of the number,
/// every system call on its file then fails.
pub fn replace_descriptor(number: RawFd, with: impl AsFd) -> io::Result<()> {
    // SAFETY: `dup2` checks both numbers and accesses no memory.
    if unsafe { libc::dup2(with.as_fd().as_raw_fd(), number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a child by `fork` that runs `body`, and waits for its end. Returns whether it has
/// succeeded: `body` has returned.
pub fn in_a_fork(body: impl FnOnce()) -> io::Result<bool> {
    // SAFETY: the C library leaves its own locks (memory, streams) free in the child. The callers
    // fork while no other thread of their process runs more than the crate's timer thread, which
    // sleeps.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: it accesses no memory. Nothing of the parent is dropped.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        pid => pid,
    };
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        match unsafe { libc::waitpid(pid, &raw mut status, 0) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            _ => return Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0),
        }
    }
}

/// Makes a system call fail with this error number, by a seccomp filter, in this thread and in
/// those that it starts.
pub fn refuse_call(call: libc::c_long, errno: libc::c_int) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        // The number of the system call is the first field of `seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { jf: 1, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, call as u32) },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    install_filter(&mut filter)?;
    // SAFETY: the filter refuses the call; if it did not, the arguments name no memory.
    let refused = unsafe { libc::syscall(call, -1, 0, 0, 0, 0) } < 0;
    assert!(refused && io::Error::last_os_error().raw_os_error() == Some(errno), "the filter works");
    Ok(())
}

/// Lets no socket have another send buffer than the usual one, by a seccomp filter, in this thread
/// and in those that it starts. Not for 32-bit x86, where the option of `setsockopt` is no argument
/// of the system call.
pub fn keep_send_buffers() -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump =
        |k: u32, jt, jf| libc::sock_filter { jt, jf, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k) };
    // The lower half of the third argument in `seccomp_data`.
    let option =
        std::mem::offset_of!(libc::seccomp_data, args) + 2 * 8 + if cfg!(target_endian = "big") { 4 } else { 0 };
    let options = [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE];
    let [first, second] = options.map(i32::cast_unsigned);
    install_filter(&mut [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        jump(libc::SYS_setsockopt as u32, 0, 4),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, option as u32),
        jump(first, 1, 0),
        jump(second, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ])?;
    for option in options {
        // SAFETY: there is no such descriptor, and the value has no bytes.
        let refused = unsafe { libc::setsockopt(-1, libc::SOL_SOCKET, option, std::ptr::null(), 0) } < 0;
        assert!(refused && io::Error::last_os_error().raw_os_error() == Some(libc::EPERM), "the filter works");
    }
    Ok(())
}

/// For this thread and those that it starts.
fn install_filter(filter: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: these two read the numbers, and a program whose filter exists and has that length.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks `answer` before each of these system calls on a descriptor, in this thread and in those
/// that it starts from now on, by a seccomp filter: whether the call fails with an error number, or
/// is executed. `answer` runs in a thread of its own, until the process ends.
pub fn answer_calls(
    calls: [libc::c_long; 2],
    descriptor: RawFd,
    mut answer: impl FnMut() -> Option<libc::c_int> + Send + 'static,
) -> io::Result<()> {
    let (tell, told) = sync_channel::<OwnedFd>(1);
    // Started before the filter exists, and so outside of it.
    thread::spawn(move || {
        let Ok(listener) = told.recv() else { return };
        loop {
            // SAFETY: both are plain data, for which zeros are valid; the kernel wants zeros.
            let (mut call, mut reply): (libc::seccomp_notif, libc::seccomp_notif_resp) = unsafe { std::mem::zeroed() };
            // SAFETY: the descriptor is open, and `call` is what this command writes.
            if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } < 0 {
                match io::Error::last_os_error().kind() {
                    // The thread that called was interrupted by a signal.
                    io::ErrorKind::Interrupted | io::ErrorKind::NotFound => continue,
                    _ => return,
                }
            }
            reply.id = call.id;
            match answer() {
                Some(errno) => reply.error = -errno,
                None => reply.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            }
            // SAFETY: as above; this command reads `reply`. It fails if the caller was interrupted.
            unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut reply) };
        }
    });
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let equal =
        |k: u32, jt, jf| libc::sock_filter { jt, jf, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k) };
    // The first argument is at byte 16 of `seccomp_data`; of its two words, this is the lower one.
    let argument = if cfg!(target_endian = "big") { 20 } else { 16 };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        equal(calls[0] as u32, 1, 0),
        equal(calls[1] as u32, 0, 3),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, argument),
        equal(descriptor.cast_unsigned(), 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: these two read the numbers, and a program whose filter exists and has that length.
    let listener = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program)
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for the caller.
    let listener = unsafe { OwnedFd::from_raw_fd(listener as RawFd) };
    tell.send(listener).map_err(|_| io::ErrorKind::BrokenPipe.into())
}

/// As a daemon does: a child by `fork` continues, and the process itself ends.
pub fn go_on_in_a_fork() -> io::Result<()> {
    // SAFETY: as in `in_a_fork`.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(()),
        // SAFETY: it accesses no memory.
        _ => unsafe { libc::_exit(0) },
    }
}

/// Makes a child by `fork`, which has copies of all descriptors and sleeps. Returns its id. It ends
/// after an hour at the latest.
pub fn fork_sleeper() -> io::Result<libc::pid_t> {
    // SAFETY: the child calls only `alarm`, `pause` and `_exit`, which are async-signal-safe, so it
    // needs no lock that another thread held at the time of the fork.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: see above; none of these functions accesses memory.
        0 => unsafe {
            libc::alarm(3600);
            libc::pause();
            libc::_exit(0)
        },
        pid => Ok(pid),
    }
}
