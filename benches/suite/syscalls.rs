//! System calls per packet. Those of a prefilled queue are counted by tracing a child with ptrace,
//! which is exact and needs no privilege, but slow. At a steady rate the kernel counts them as
//! performance events, if it can and if the process is root.

use std::{
    fs,
    fs::File,
    io::Read,
    os::fd::{FromRawFd, OwnedFd},
    process::Stdio,
    sync::OnceLock,
    thread,
};

use nix::{
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        ptrace::{self, Options},
        signal::{Signal, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, getppid},
};
use std::time::Duration;

use super::{child, consumer::Contender, drain, measure::other_threads, summary::Book, support};

pub const SECTION: &str = "system calls";
pub const RECEIVES: &str = "receives/packet";
pub const SENDS: &str = "sends/packet";
pub const OTHERS: &str = "others/packet";
pub const TOTAL: &str = "calls/packet";

/// Packets in the prefilled queue. Few enough for the default buffers.
const PACKETS: usize = 200;
const DRAINS: usize = 11;
const COUNTED: f64 = (PACKETS * (DRAINS - 1)) as f64;

pub fn measure(contender: &Contender, book: &mut Book) {
    let Some(counts) = trace(contender.name) else { return };
    for (figure, count) in [(RECEIVES, counts.receives), (SENDS, counts.sends), (OTHERS, counts.others)] {
        book.note(SECTION, contender.name, figure, f64::from(count) / COUNTED);
    }
    let total = counts.receives + counts.sends + counts.others;
    book.note(SECTION, contender.name, TOTAL, f64::from(total) / COUNTED);
}

/// Runs in the child. Empties a queue several times, with `getppid` before and after each time as a
/// mark.
pub fn traced(contender: &Contender) {
    support::isolated(|| {
        ptrace::traceme().expect("be traced");
        raise(Signal::SIGSTOP).expect("stop");
        // Each stop takes microseconds. A long delay keeps the flush policy from timing out because
        // of them.
        let job = super::consumer::Job { max_delay: Some(Duration::from_secs(1)), ..drain::job(2 * PACKETS) };
        drain::drains(contender, &job, PACKETS, DRAINS, |nth, count, run| {
            assert_eq!(count, PACKETS as u64, "all were queued");
            if nth > 0 {
                getppid();
            }
            run();
            if nth > 0 {
                getppid();
            }
        });
    });
}

#[derive(Default)]
struct Counts {
    receives: u32,
    sends: u32,
    others: u32,
}

/// `None` if this platform cannot identify system calls.
fn trace(name: &str) -> Option<Counts> {
    let mut command = child::command(&["syscalls", name]);
    #[expect(clippy::zombie_processes, reason = "the loop below waits for it")]
    let process = command.stdout(Stdio::null()).spawn().expect("start a child");
    let all = Some(WaitPidFlag::__WALL);
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    let leader = Pid::from_raw(process.id().cast_signed());
    let mut counts = Counts::default();
    // The thread that makes the marks. Its own calls do not count.
    let mut marker = None;
    let mut between_marks = false;
    let mut traced_any = false;
    loop {
        let (pid, signal) = match waitpid(None, all).expect("wait for the child") {
            WaitStatus::Exited(pid, code) if pid == leader => {
                assert!(traced_any && code == 0, "the child for {name} failed: {code}");
                return marker.map(|_| counts);
            }
            WaitStatus::Signaled(pid, signal, _) if pid == leader => panic!("the child for {name} failed: {signal}"),
            WaitStatus::PtraceSyscall(pid) => {
                if let Some(number) = entered(pid) {
                    if number == libc::SYS_getppid {
                        marker = Some(pid);
                        between_marks = !between_marks;
                    } else if between_marks && marker != Some(pid) {
                        counts.add(number);
                    }
                }
                (pid, None)
            }
            WaitStatus::Stopped(pid, Signal::SIGSTOP) => {
                if !traced_any {
                    ptrace::setoptions(pid, options).expect("set the tracer's options");
                    traced_any = true;
                }
                (pid, None)
            }
            WaitStatus::Stopped(pid, signal) => (pid, Some(signal)),
            WaitStatus::PtraceEvent(pid, ..) => (pid, None),
            _ => continue,
        };
        // The thread may have ended.
        let _ = ptrace::syscall(pid, signal);
    }
}

/// The number of the system call that a stopped thread is about to make.
#[cfg(target_env = "gnu")]
fn entered(pid: Pid) -> Option<libc::c_long> {
    let info = ptrace::syscall_info(pid).ok()?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says that the kernel has filled in this field of the union.
    Some(unsafe { info.u.entry.nr } as libc::c_long)
}

/// nix has `syscall_info` only for glibc.
#[cfg(not(target_env = "gnu"))]
fn entered(_: Pid) -> Option<libc::c_long> {
    None
}

impl Counts {
    fn add(&mut self, number: libc::c_long) {
        match number {
            libc::SYS_recvfrom | libc::SYS_recvmsg | libc::SYS_recvmmsg => self.receives += 1,
            libc::SYS_sendto | libc::SYS_sendmsg | libc::SYS_sendmmsg => self.sends += 1,
            _ => self.others += 1,
        }
    }
}

/// Counts the system calls of all threads that existed when it was made, except the thread that
/// made it.
pub struct Counter(Vec<File>);

impl Counter {
    /// `None` if the kernel cannot count them, or does not let this process.
    pub fn of_other_threads() -> Option<Self> {
        static EVENT: OnceLock<Option<u64>> = OnceLock::new();
        let event = (*EVENT.get_or_init(event))?;
        // A thread may have ended since it was listed.
        let counters: Vec<_> = other_threads().into_iter().filter_map(|thread| open(event, thread)).collect();
        (!counters.is_empty()).then_some(Self(counters))
    }

    pub fn count(&mut self) -> u64 {
        let read = |counter: &mut File| {
            let mut count = [0; 8];
            counter.read_exact(&mut count).expect("read a counter");
            u64::from_ne_bytes(count)
        };
        self.0.iter_mut().map(read).sum()
    }
}

/// The number of the event "a system call begins".
fn event() -> Option<u64> {
    const FOLDER: &str = "/sys/kernel/tracing";
    let read = || fs::read_to_string(format!("{FOLDER}/events/raw_syscalls/sys_enter/id")).ok()?.trim().parse().ok();
    let mounted = || {
        // The mount is visible to this thread only, and ends with it.
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).ok()?;
        mount(Some("tracefs"), FOLDER, Some("tracefs"), MsFlags::empty(), None::<&str>).ok()?;
        read()
    };
    read().or_else(|| thread::scope(|scope| scope.spawn(mounted).join().expect("the thread does not panic")))
}

/// Begins to count an event of a thread.
fn open(event: u64, thread: i32) -> Option<File> {
    const TRACEPOINT: u32 = 2;
    const CLOSE_ON_EXEC: libc::c_ulong = 8;
    // struct perf_event_attr, of which the rest is zero: type, size, config
    let mut attributes = [0; 64];
    attributes[..4].copy_from_slice(&TRACEPOINT.to_ne_bytes());
    attributes[4..8].copy_from_slice(&64_u32.to_ne_bytes());
    attributes[8..16].copy_from_slice(&event.to_ne_bytes());
    let (any_processor, no_group) = (-1, -1);
    // SAFETY: the kernel reads as many bytes as `attributes` says that it has. A result that is not
    // negative is a new descriptor, which is not owned elsewhere.
    unsafe {
        let number = libc::SYS_perf_event_open;
        let fd = libc::syscall(number, attributes.as_ptr(), thread, any_processor, no_group, CLOSE_ON_EXEC);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd as i32).into())
    }
}
