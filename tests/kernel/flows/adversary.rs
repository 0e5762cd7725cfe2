//! An adversary of verdicts for connections: it sends whatever it likes from all sides, decides at
//! random, and checks each packet that arrives, comes to the queue, or is lost against what the
//! documentation promises (`guide::flows`).
//!
//! `NFQUEUE_FLOWS_SECONDS` is the time for each test (20, and 5 for each case of reused ports);
//! `NFQUEUE_FLOWS_SEED` repeats a random walk.

mod answered;
mod reuse;
mod walk;

use std::{
    ops::RangeInclusive,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use libtest_mimic::Trial;

use crate::{common, support};

const SECONDS: &str = "NFQUEUE_FLOWS_SECONDS";
const SEED: &str = "NFQUEUE_FLOWS_SEED";

pub(crate) fn tests() -> Vec<Trial> {
    let name = |name| common::test_name(module_path!(), name);
    let reuse = |range: Option<RangeInclusive<u16>>, rate| {
        let duration = Duration::from_secs(variable(SECONDS).unwrap_or(5));
        support::isolated(|| runtime().block_on(reuse::every_syn_is_queued(range, rate, duration)));
    };
    let mut tests = vec![
        support::test_unbounded(&name("adversary_breaks_no_promise"), || support::isolated(random_walk)),
        support::test_unbounded(&name("adversary_reuses_few_ports"), move || reuse(Some(40_000..=40_999), 450)),
        // The kernel goes through the default range in steps of nine on average
        // (`__inet_hash_connect`): at this rate it begins again after two seconds.
        support::test_unbounded(&name("adversary_reuses_the_default_ports"), move || reuse(None, 1500)),
    ];
    tests.extend(common::one(
        &name("adversary_is_answered_when_rejected"),
        answered::rejected_first_packets_are_answered,
    ));
    tests
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn random_walk() {
    let seconds = variable(SECONDS).unwrap_or(20);
    let by_clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_millis() as u64 % 1_000_000);
    let seed = variable(SEED).unwrap_or_else(by_clock);
    match walk::walk(seed, Duration::from_secs(seconds)) {
        Ok(totals) => eprintln!("adversary, {SEED}={seed}: {totals:#?}"),
        Err(report) => panic!("{SEED}={seed} breaks promises:\n{report}"),
    }
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}
