//! The bench gate: `cargo bench --workspace -- --gate` fails if this crate has become slower.
//!
//! It compares counts where counts tell: system calls, allocations, wake-ups, and instructions
//! under valgrind where that is installed. CPU time is compared as a ratio to loops without a
//! crate, in the same run, and fails only if every round is above the limit. It takes about a
//! minute. Without `--gate` this program does nothing.
#![allow(missing_docs)]

use std::process::ExitCode;

use suite::{
    child, drain, everyday, floor, instructions,
    options::{Options, USAGE},
    ours,
    plan::{self, Section},
    summary::{Book, Summary},
    support, syscalls,
};

mod suite;

/// The rates whose calls and wake-ups are counted.
const RATES: [u64; 2] = [everyday::RATES[0], everyday::RATES[1]];

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("gate: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // It needs no namespaces.
    if instructions::is_task(&options.child) {
        instructions::run(&options.child);
        return ExitCode::SUCCESS;
    }
    if !options.gate && options.child.is_empty() {
        return ExitCode::SUCCESS;
    }
    // Before any other thread starts: an ordinary user becomes root of a user namespace.
    if let Err(sentence) = support::enter() {
        eprintln!("gate: {sentence}");
        return ExitCode::FAILURE;
    }
    if !options.child.is_empty() {
        child::run(&options.child, &[]);
        return ExitCode::SUCCESS;
    }
    let scale = options.scale();
    let mut cpu = Section::new(drain::SECTION, scale.many_rounds);
    for contender in [floor::BATCH, floor::PACKED, ours::ACCEPT_ALL, ours::EIGHT_TASKS] {
        cpu = cpu.step(contender.name, move |book| drain::measure(&contender, &scale, book));
    }
    let paced = RATES.map(|rate| {
        let mut section = Section::new(everyday::SECTION, scale.rounds);
        for contender in [floor::ASYNC[0], ours::RECV[0]] {
            let run = move |book: &mut Book| everyday::measure(&contender, rate, &scale, book);
            section = section.step(format!("{}, {rate}/s", contender.name), run);
        }
        section
    });
    let mut calls = Section::new(syscalls::SECTION, 1);
    let mut allocations = Section::new("allocations", 1);
    for contender in [ours::ACCEPT_ALL, ours::EIGHT_TASKS] {
        calls = calls.step(contender.name, move |book| syscalls::measure(&contender, book));
        allocations = allocations.step(contender.name, move |book| drain::allocations(&contender, &scale, book));
    }
    let mut counted = Section::new(instructions::SECTION, 1);
    for way in instructions::ALL {
        counted = counted.step(way, move |book| instructions::measure(way, book));
    }
    let sections: Vec<_> = [counted, calls, allocations, cpu].into_iter().chain(paced).collect();
    let book = plan::run(&sections, &options);
    report(&checks(&book))
}

/// A figure that must not rise.
struct Check {
    what: String,
    limit: f64,
    /// `None` if this machine cannot measure it.
    measured: Option<Summary>,
}

impl Check {
    /// In the quietest round, too: what only some rounds show is noise.
    fn is_exceeded(&self) -> bool {
        self.measured.is_some_and(|measured| measured.least > self.limit)
    }
}

/// The limits of counts are what was measured when they were last changed, and a tenth. Those of
/// CPU times are for a host that does nothing else, and a third above what is measured there.
fn checks(book: &Book) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut check = |what: String, limit, measured| checks.push(Check { what, limit, measured });
    for (way, limit) in instructions::ALL.into_iter().zip(instructions::LIMITS) {
        let measured = book.get(instructions::SECTION, way, instructions::COUNT);
        check(format!("instructions a packet, {way}"), limit, measured);
    }
    for (contender, reference, limit) in
        [(ours::ACCEPT_ALL, floor::BATCH, 1.35), (ours::EIGHT_TASKS, floor::PACKED, 1.50)]
    {
        let name = contender.name;
        check(
            format!("system calls a packet, prefilled queue: {name}"),
            1.17,
            book.get(syscalls::SECTION, name, syscalls::TOTAL),
        );
        check(format!("allocations a packet: {name}"), 0.05, book.get(drain::SECTION, name, drain::ALLOCATIONS));
        let ratio = book.ratio(drain::SECTION, drain::CPU, name, reference.name);
        check(format!("CPU time, prefilled queue: {name} / {}", reference.name), limit, ratio);
    }
    let (recv, raw) = (ours::RECV[0].name, floor::ASYNC[0].name);
    for rate in RATES {
        let section = everyday::section(rate);
        check(format!("system calls a packet at {rate}/s: {recv}"), 3.2, book.get(&section, recv, everyday::CALLS));
        let wake_ups = book.get(&section, recv, everyday::WAKE_UPS);
        check(format!("wake-ups of other threads a second at {rate}/s: {recv}"), 10.0, wake_ups);
        let ratio = book.ratio(&section, suite::latency::CPU, recv, raw);
        check(format!("CPU time at {rate}/s: {recv} / {raw}"), 1.5, ratio);
    }
    checks
}

fn report(checks: &[Check]) -> ExitCode {
    println!("{:<72} {:>8} {:>8}", "", "limit", "measured");
    for check in checks {
        let measured = check.measured.map_or("not here".to_owned(), |measured| format!("{:.3}", measured.median));
        let exceeded = if check.is_exceeded() { "  EXCEEDED" } else { "" };
        println!("{:<72} {:>8} {measured:>8}{exceeded}", check.what, check.limit);
    }
    match checks.iter().filter(|check| check.is_exceeded()).count() {
        0 => {
            println!("The gate is passed.");
            ExitCode::SUCCESS
        }
        count => {
            println!("{count} of {} figures are above their limits, in each round.", checks.len());
            ExitCode::FAILURE
        }
    }
}
