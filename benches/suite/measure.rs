//! What something costs: time, CPU time of the consumer, allocations.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ops::{Add, AddAssign},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};

/// A moment, to be compared with a later one.
///
/// CPU time is that of the whole process less that of the calling thread: who measures (and makes the traffic) is thereby
/// told apart from who is measured. The kernel knows their sum to the nanosecond; how it parts into user and system time
/// is sampled at the timer's ticks, so that split needs some seconds' worth of rounds.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    at: Instant,
    process: Cpu,
    own: Cpu,
    allocations: u64,
}

/// What happened between two moments.
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

    /// What it has cost the rest of the process since then.
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

/// Counts allocations while it is asked to.
struct Counting;

#[global_allocator]
static COUNTING_ALLOCATOR: Counting = Counting;
static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Counts allocations (and reallocations) of all threads from now on, or no longer. Off, it costs next to nothing.
pub fn count_allocations(on: bool) {
    COUNTING.store(on, Relaxed);
}

fn counted() {
    if COUNTING.load(Relaxed) {
        ALLOCATIONS.fetch_add(1, Relaxed);
    }
}

// SAFETY: everything is left to the system's allocator; counting touches no memory that it manages.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        counted();
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which is that of `System`.
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
