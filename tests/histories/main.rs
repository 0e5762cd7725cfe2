//! Random histories of the whole crate against a simulated kernel.
//!
//! A history is determined by its seed, except for the order in which threads run.
//! `TOKIO_NFQUEUE_SIMULATED_SECONDS` is the time (15); with `TOKIO_NFQUEUE_SIMULATED_SEED` the
//! history of one seed is repeated all that time. `examples/soak.rs` runs them for longer.

use std::time::{Duration, Instant};

mod simulated;
#[path = "../support"]
#[allow(dead_code, unreachable_pub, reason = "other tests use the rest")]
mod support {
    pub mod random;
    pub mod settings;
}

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
