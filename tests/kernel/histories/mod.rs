//! Random histories: queues with random settings, packets that are decided in every possible way,
//! faults, and shutdowns. Each datagram has a number. What happens to it must follow from what was
//! decided for it.
//!
//! A history is determined by its seed, except for the order in which threads run.
//! `TOKIO_NFQUEUE_HISTORIES_SECONDS` is the time for each test (20); with
//! `TOKIO_NFQUEUE_HISTORIES_SEED`, the history of one seed is repeated all that time.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::Trial;

use self::plan::Plan;
pub(crate) use self::{plan::Profile, records::Totals};
use crate::{
    common::{self, PATIENCE},
    support,
};

mod owners;
mod plan;
mod records;
mod run;
mod survival;

const SECONDS: &str = "TOKIO_NFQUEUE_HISTORIES_SECONDS";
const SEED: &str = "TOKIO_NFQUEUE_HISTORIES_SEED";

// The example `soak` has the histories without the tests.
#[allow(dead_code)]
pub(crate) fn tests() -> Vec<Trial> {
    let trial = |name, profile| {
        let full_name = common::test_name(module_path!(), name);
        support::test_unbounded(&full_name, move || histories(name, profile))
    };
    vec![
        trial("histories_without_faults_add_up", Profile::Calm),
        trial("histories_with_faults_lose_only_packets_of_the_faults", Profile::Faulty),
        trial("histories_closed_under_load_add_up", Profile::Closing),
        support::test_unbounded(
            &common::test_name(module_path!(), "a_program_that_uses_the_question_mark_survives_faults"),
            || support::isolated(|| survival::survives(duration())),
        ),
    ]
}

/// Runs histories until the time is over.
///
/// # Panics
/// When one fails.
fn histories(name: &str, profile: Profile) {
    let duration = duration();
    let only = variable(SEED);
    let (begin, mut totals) = (Instant::now(), Totals::default());
    let mut seed = only.unwrap_or(1);
    while begin.elapsed() < duration {
        totals += history(name, profile, seed)
            .unwrap_or_else(|error| panic!("{SEED}={seed} brings: {error}\n{:?}", Plan::new(profile, seed)));
        seed += u64::from(only.is_none());
    }
    eprintln!("{name}: 0 wrong, 0 forgotten, 0 twice; {totals:?}");
}

fn duration() -> Duration {
    Duration::from_secs(variable(SECONDS).unwrap_or(20))
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

/// Runs one history, in its own network namespace.
pub(crate) fn history(name: &str, profile: Profile, seed: u64) -> Result<Totals, String> {
    guarded(&format!("{name} {seed}"), move || run::live(Plan::new(profile, seed)))
}

/// Runs `body` in a thread and a network namespace of its own. A panic is an error, and so is one
/// that hangs.
pub(crate) fn guarded<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (alive, ended) = mpsc::channel::<()>();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _alive = alive;
        support::isolated(body)
    });
    let thread = thread.map_err(|error| error.to_string())?;
    // Nothing is sent: the channel closes when the thread ends for any reason.
    match ended.recv_timeout(PATIENCE * 20) {
        Err(RecvTimeoutError::Timeout) => Err("hangs".to_owned()),
        _ => thread.join().unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("panicked: {}", text.unwrap_or("with something that is no text")))
        }),
    }
}
