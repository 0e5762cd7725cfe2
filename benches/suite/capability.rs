//! What it costs that this crate asks for the thread's `CAP_NET_ADMIN` after each send: without it the kernel discards
//! what was sent, and does not always say so.

use std::{hint::black_box, time::Duration};

use nix::time::ClockId;
use rustix::thread::capabilities;

use super::{flood, latency, options::Scale, ours, summary::Book};

pub const SECTION: &str = "capability check";
pub const CALL: &str = "capget";
pub const COST: &str = "ns/check";

/// Of the adaptive sweep: two low rates, at which a send carries one packet, and the one at which a packet costs least
/// while most sends still carry one.
const RATES: [u64; 3] = [1_000, 20_000, 100_000];

/// The check at one load, and its part of what a packet costs.
pub struct Share {
    pub load: String,
    pub check_ns: f64,
    pub per_send: f64,
    pub cpu_ns: f64,
    pub of_cpu: f64,
}

/// Measures the CPU time of the system call by itself, as `src/sys.rs` makes it. Many in a row find everything in the cache:
/// among other work it may cost more.
pub fn measure(scale: &Scale, book: &mut Book) {
    let calls = 10 * scale.packets;
    let start = cpu();
    for _ in 0..calls {
        black_box(capabilities(None)).expect("read the thread's capabilities");
    }
    book.note(SECTION, CALL, COST, (cpu() - start).as_nanos() as f64 / calls as f64);
}

/// Of the calling thread, so that what else the host does adds nothing.
fn cpu() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().expect("read the thread's clock").into()
}

/// From what the sweep and the flood of the same run have measured; without the loads that were not.
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
