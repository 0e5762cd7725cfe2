//! Everyday rates, at which a consumer sleeps between packets: what each way of receiving costs
//! beside loops without a crate.

use super::{
    consumer::Contender,
    floor,
    latency::{self, Host},
    options::Scale,
    ours, peers,
    summary::Book,
    syscalls::Counter,
};

pub const SECTION: &str = "everyday";
pub const RATES: [u64; 3] = [1_000, 10_000, 30_000];
pub const CALLS: &str = "system calls/packet";
pub const WAKE_UPS: &str = "other wake-ups/s";

pub const BLOCKING: Contender = Contender { name: "blocking loop", ..floor::ONE };

/// The rate at which all contenders are measured. At the others only the most important ones are.
const RATE_OF_ALL: u64 = 10_000;

pub fn contenders(rate: u64) -> impl Iterator<Item = Contender> {
    let others = ours::OTHER_WAYS.into_iter().flatten().chain([ours::POLL]);
    let others = others.filter(move |_| rate == RATE_OF_ALL);
    [BLOCKING, peers::NFQ].into_iter().chain(floor::ASYNC).chain(ours::RECV).chain(ours::RECV_MANY).chain(others)
}

pub fn section(rate: u64) -> String {
    format!("{SECTION} at {rate}/s")
}

/// The loop without a crate on the same runtime.
pub fn raw_loop(name: &str) -> &'static str {
    let [one, two] = floor::ASYNC;
    if name.ends_with("multi_thread") { two.name } else { one.name }
}

pub fn measure(contender: &Contender, rate: u64, scale: &Scale, book: &mut Book) {
    // For enough packets, but not for longer than necessary.
    let window = if rate < RATE_OF_ALL { scale.window * 4 } else { scale.window * 3 / 2 };
    let timed = Scale { window, ..*scale };
    let (outcome, calls) = latency::run_then(Some(contender), rate, &timed, Host::Idle, |paced| {
        let mut counter = Counter::of_other_threads()?;
        let sent = paced.run(scale.window / 2);
        Some(counter.count() as f64 / sent as f64)
    });
    let (section, name) = (section(rate), contender.name);
    latency::note(book, &section, name, &outcome);
    book.note(&section, name, WAKE_UPS, outcome.other_wake_ups);
    if let Some(calls) = calls {
        book.note(&section, name, CALLS, calls);
    }
}
