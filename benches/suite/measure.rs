//! The cost of something: wall-clock time, CPU time of the consumer, allocations.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    ops::{Add, AddAssign},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};

/// The clocks and counters at one point in time.
///
/// CPU time is that of the whole process less that of the calling thread. The calling thread
/// measures and sends the traffic; the rest is the consumer. The kernel accounts the sum of user
/// and system time in nanoseconds. It estimates the two parts from samples at timer ticks, so these
/// are exact only over some seconds.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    at: Instant,
    process: Cpu,
    own: Cpu,
    allocations: u64,
}

/// The difference between two moments.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    pub wall: Duration,
    pub user: Duration,
    pub system: Duration,
    pub allocations: u64,
}

#[derive(Debug, Clone, Copy)]
struct Cpu {
    user: Duration,
    system: Duration,
}

impl Moment {
    pub fn now() -> Self {
        let (process, own) = (Cpu::of(UsageWho::RUSAGE_SELF), Cpu::of(UsageWho::RUSAGE_THREAD));
        Self { at: Instant::now(), process, own, allocations: ALLOCATIONS.load(Relaxed) }
    }

    /// The cost to all other threads of the process since then.
    pub fn cost(&self) -> Cost {
        let now = Self::now();
        let others = |part: fn(&Cpu) -> Duration| {
            let spent = |earlier: &Cpu, later: &Cpu| part(later).saturating_sub(part(earlier));
            spent(&self.process, &now.process).saturating_sub(spent(&self.own, &now.own))
        };
        Cost {
            wall: now.at - self.at,
            user: others(|cpu| cpu.user),
            system: others(|cpu| cpu.system),
            allocations: now.allocations - self.allocations,
        }
    }
}

impl Cost {
    pub fn cpu(&self) -> Duration {
        self.user + self.system
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        *self = Self {
            wall: self.wall.add(other.wall),
            user: self.user.add(other.user),
            system: self.system.add(other.system),
            allocations: self.allocations + other.allocations,
        };
    }
}

impl Cpu {
    fn of(who: UsageWho) -> Self {
        let usage = getrusage(who).expect("getrusage");
        let duration =
            |time: TimeVal| Duration::from_secs(time.tv_sec() as u64) + Duration::from_micros(time.tv_usec() as u64);
        Self { user: duration(usage.user_time()), system: duration(usage.system_time()) }
    }
}

/// The name of the threads that decide packets.
pub const CONSUMER: &str = "consumer";

/// The ids of all threads of the process but the calling one.
pub fn other_threads() -> Vec<i32> {
    let own = rustix::thread::gettid().as_raw_nonzero().get();
    let tasks = fs::read_dir("/proc/self/task").expect("list the threads");
    let ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id| *id != own).collect()
}

/// How often threads other than the calling one and those called [`CONSUMER`] have slept so far.
/// Each time something has woken them, or will.
pub fn other_sleeps() -> u64 {
    let sleeps = |id: i32| {
        let status = fs::read_to_string(format!("/proc/self/task/{id}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
        if field("Name:")? == CONSUMER { None } else { field("voluntary_ctxt_switches:")?.parse::<u64>().ok() }
    };
    // A thread may have ended since it was listed.
    other_threads().into_iter().filter_map(sleeps).sum()
}

/// The system's allocator. It counts allocations while that is switched on.
struct Counting;

#[global_allocator]
static COUNTING_ALLOCATOR: Counting = Counting;
static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Switches the counting of allocations and reallocations, of all threads, on or off. It costs very
/// little while off.
pub fn count_allocations(on: bool) {
    COUNTING.store(on, Relaxed);
}

fn counted() {
    if COUNTING.load(Relaxed) {
        ALLOCATIONS.fetch_add(1, Relaxed);
    }
}

// SAFETY: the system's allocator does all the work. Counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        counted();
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        counted();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        counted();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}
