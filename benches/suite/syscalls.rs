//! System calls per packet. They are counted by tracing a child with ptrace, which is exact and
//! needs no privilege.

use std::process::Stdio;

use nix::{
    libc,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, getppid},
};
use std::time::Duration;

use super::{child, consumer::Contender, drain, summary::Book, support};

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
