//! The cost of the capability check. The crate asks for the thread's `CAP_NET_ADMIN` after each
//! send: without it the kernel discards the verdicts, and does not always report that.

use std::{hint::black_box, time::Duration};

use nix::time::ClockId;
use rustix::thread::capabilities;

use super::{flood, latency, options::Scale, ours, summary::Book};

pub const SECTION: &str = "capability check";
pub const CALL: &str = "capget";
pub const COST: &str = "ns/check";

/// Rates of the adaptive sweep. At the two lower ones a send carries one verdict. The third has the
/// lowest cost per packet while most sends still carry one.
const RATES: [u64; 3] = [1_000, 20_000, 100_000];

/// The check at one load, and its share of the cost of a packet.
pub struct Share {
    pub load: String,
    pub check_ns: f64,
    pub per_send: f64,
    pub cpu_ns: f64,
    pub of_cpu: f64,
}

/// Measures the CPU time of the system call that `src/sys.rs` makes. Here many calls follow one
/// another, with a warm cache. Among other work a call may cost more.
pub fn measure(scale: &Scale, book: &mut Book) {
    let calls = 10 * scale.packets;
    let start = cpu();
    for _ in 0..calls {
        black_box(capabilities(None)).expect("read the thread's capabilities");
    }
    book.note(SECTION, CALL, COST, (cpu() - start).as_nanos() as f64 / calls as f64);
}

/// The calling thread's CPU time. Other work of the host does not count.
fn cpu() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().expect("read the thread's clock").into()
}

/// Computed from the sweep and the flood of the same run. Loads that were not measured are left
/// out.
pub fn shares(book: &Book) -> Vec<Share> {
    let Some(check_ns) = book.median(SECTION, CALL, COST) else { return Vec::new() };
    let share = |load: String, section, name: &str, batch, cpu| {
        let (per_send, cpu_ns) = (book.median(section, name, batch)?, book.median(section, name, cpu)?);
        Some(Share { load, check_ns, per_send, cpu_ns, of_cpu: check_ns / per_send / cpu_ns })
    };
    let sweep = RATES.map(|rate| {
        let name = rate.to_string();
        share(format!("{rate}/s"), latency::SWEEP_SECTION, &name, latency::BATCH, latency::CPU)
    });
    let flood = share("flood".to_owned(), flood::SECTION, ours::ACCEPT_ALL.name, flood::BATCH, flood::CPU);
    sweep.into_iter().chain([flood]).flatten().collect()
}
