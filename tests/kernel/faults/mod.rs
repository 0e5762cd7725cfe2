//! Faults of processes, of the network, of the kernel and of limits.

use std::{process::ExitCode, time::Duration};

use libtest_mimic::Trial;

mod errnos;
mod flood;
mod killed;
mod limits;
mod network;
mod process;
mod stopped;

/// For how long the flood lasts, in seconds.
const SECONDS: &str = "TOKIO_NFQUEUE_FAULTS_SECONDS";

pub(crate) fn tests() -> Vec<Trial> {
    [killed::tests, stopped::tests, network::tests, errnos::tests, limits::tests, flood::tests]
        .iter()
        .flat_map(|tests| tests())
        .collect()
}

/// The whole `main` of the processes that these tests start; `None` in all others.
pub(crate) fn child() -> Option<ExitCode> {
    process::child()
}

fn duration() -> Duration {
    let Ok(text) = std::env::var(SECONDS) else { return Duration::from_secs(2) };
    Duration::from_secs(text.parse().unwrap_or_else(|_| panic!("{SECONDS} is a number, not {text:?}")))
}
