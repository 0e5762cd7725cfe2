//! Histories against a simulated kernel, for the tests and for the example `soak`.

use std::{
    ops::AddAssign,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
    time::Duration,
};

mod plan;
mod records;
mod run;

/// What happened.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) histories: u64,
    pub(crate) packets: u64,
    pub(crate) accepted: u64,
    pub(crate) dropped: u64,
    /// Decided without a verdict: a full queue or buffer, an interface that went down.
    pub(crate) undecided: u64,
    /// Handed out, and not decided by the owner.
    pub(crate) abandoned: u64,
    /// Verdicts that came too late.
    pub(crate) late: u64,
    /// Verdicts refused because the capability was missing.
    pub(crate) refused: u64,
    pub(crate) faults: u64,
    /// Of everything that came of the last history, with its times. `None` if threads ran in an
    /// order that the seed does not determine.
    pub(crate) digest: Option<u64>,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.histories += other.histories;
        self.packets += other.packets;
        self.accepted += other.accepted;
        self.dropped += other.dropped;
        self.undecided += other.undecided;
        self.abandoned += other.abandoned;
        self.late += other.late;
        self.refused += other.refused;
        self.faults += other.faults;
        self.digest = other.digest;
    }
}

/// Runs the history of a seed.
///
/// # Errors
/// What was wrong.
pub(crate) fn history(seed: u64) -> Result<Totals, String> {
    /// A history takes some milliseconds.
    const PATIENCE: Duration = Duration::from_secs(60);
    let (sender, receiver) = mpsc::channel();
    // In a thread of its own, so that one that hangs is reported.
    let thread = thread::Builder::new().name(format!("history {seed}")).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| run::run(plan::Plan::new(seed))));
        let _ = sender.send(result.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("panicked: {}", text.unwrap_or("with something that is no text")))
        }));
    });
    let thread = thread.map_err(|error| error.to_string())?;
    match receiver.recv_timeout(PATIENCE) {
        Ok(result) => {
            let _ = thread.join();
            result.map_err(|wrong| format!("{wrong}\n{:?}", plan::Plan::new(seed)))
        }
        Err(_) => Err(format!("it hangs\n{:?}", plan::Plan::new(seed))),
    }
}
