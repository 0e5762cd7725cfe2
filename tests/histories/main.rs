//! Random histories of the whole crate against a simulated kernel.
//!
//! A history is determined by its seed. Where a multi-thread runtime has a part in it, the order in
//! which threads run is not; no history depends on the system's clock.
//! `TOKIO_NFQUEUE_SIMULATED_SECONDS` is the time (15); with `TOKIO_NFQUEUE_SIMULATED_SEED` the
//! history of one seed is repeated all that time. The example `soak` runs them for longer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

mod settings;
mod simulated;

use simulated::Totals;

const SECONDS: &str = "TOKIO_NFQUEUE_SIMULATED_SECONDS";
const SEED: &str = "TOKIO_NFQUEUE_SIMULATED_SEED";

/// Each packet has exactly one outcome, which is what its owner decided, or the default action, or
/// its deadline's; and every counter adds up.
#[test]
fn histories_keep_the_promises() {
    let variable = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
    };
    let (duration, only) = (Duration::from_secs(variable(SECONDS).unwrap_or(15)), variable(SEED));
    let (begin, mut totals, mut seed) = (Instant::now(), Totals::default(), only.unwrap_or(1));
    while begin.elapsed() < duration {
        match simulated::history(seed) {
            Ok(more) => totals += more,
            Err(wrong) => panic!("{SEED}={seed} brings:\n{wrong}"),
        }
        seed += u64::from(only.is_none());
    }
    eprintln!("{totals:?}");
    assert!(totals.packets > 0);
}

/// A seed repeats its history to the last counter and the last microsecond, also when the system is
/// busy: one that has found something wrong finds it again.
#[test]
fn a_seed_repeats_its_history_exactly() {
    let _busy = Busy::start();
    let mut repeated = 0;
    for seed in 1..=REPEATED {
        let [first, again] =
            [(); 2].map(|()| simulated::history(seed).unwrap_or_else(|wrong| panic!("{seed}: {wrong}")));
        assert_eq!(first.digest, again.digest, "seed {seed}: {first:?}, {again:?}");
        repeated += u64::from(first.digest.is_some());
    }
    assert!(repeated > REPEATED / 2, "most have no other threads");
}

const REPEATED: u64 = 100;

/// Threads that take the CPUs until this is dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(stop)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
