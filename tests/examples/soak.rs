//! Random histories of the whole crate, for as long as one likes: against a simulated kernel, and
//! at the same time against the real one, in network namespaces of its own. It changes no rule of
//! yours. On the real kernel there are three kinds of histories: packets and verdicts, verdicts for
//! connections, and lives of filters, which are killed, stopped and replaced. As root or as an
//! ordinary user:
//! `cargo run --release --example soak -- --minutes 10`
//!
//! Prints counts each minute. The exit code is 1 if a promise was broken; the seed is printed.

use std::{
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

#[macro_use]
#[path = "../kernel/common/mod.rs"]
mod common;
#[path = "../kernel/histories/mod.rs"]
mod histories;
#[path = "../lives/mod.rs"]
mod lives;
#[path = "../histories/settings.rs"]
mod settings;
#[path = "../histories/simulated/mod.rs"]
mod simulated;
#[path = "../kernel/support/mod.rs"]
mod support;
#[path = "../kernel/flows/adversary/walk/mod.rs"]
mod walk;

const USAGE: &str = "usage: soak [--minutes M] [--seed S] [--only simulated|real]";

#[derive(Debug)]
struct Options {
    duration: Duration,
    /// The first seed; the same seed brings the same histories.
    seed: u64,
    simulated: bool,
    real: bool,
}

/// What all threads share.
#[derive(Debug)]
struct Soak {
    begin: Instant,
    end: Instant,
    next: AtomicU64,
    /// The same for lives, which wait for the kernel most of the time: several run at once.
    next_life: AtomicU64,
    simulated: Mutex<simulated::Totals>,
    real: Mutex<histories::Totals>,
    flows: Mutex<walk::Totals>,
    lives: Mutex<lives::Totals>,
    violations: Mutex<Vec<String>>,
}

fn main() -> ExitCode {
    if let Some(code) = lives::child() {
        return code;
    }
    // In a user namespace first, while there is one thread.
    let entered = support::enter();
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("soak: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let begin = Instant::now();
    let soak = Arc::new(Soak {
        begin,
        end: begin + options.duration,
        next: AtomicU64::new(options.seed),
        next_life: AtomicU64::new(options.seed),
        simulated: Mutex::default(),
        real: Mutex::default(),
        flows: Mutex::default(),
        lives: Mutex::default(),
        violations: Mutex::default(),
    });
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut start = |body: fn(&Soak, u64), seed: u64| {
        let soak = Arc::clone(&soak);
        threads.push(thread::spawn(move || body(&soak, seed)));
    };
    if options.simulated {
        let count = thread::available_parallelism().map_or(1, usize::from);
        (0..count).for_each(|_| start(run_simulated, 0));
    }
    match (options.real, entered) {
        (false, _) => {}
        (true, Ok(())) => {
            [run_real, run_flows, run_lives, run_lives].into_iter().for_each(|run| start(run, options.seed))
        }
        (true, Err(reason)) => eprintln!("soak: nothing runs against the real kernel: {reason}"),
    }
    let mut report = begin + Duration::from_secs(60);
    while !threads.iter().all(JoinHandle::is_finished) {
        thread::sleep(Duration::from_millis(50));
        if Instant::now() >= report {
            soak.print();
            report += Duration::from_secs(60);
        }
    }
    for thread in threads {
        if thread.join().is_err() {
            soak.violation("a thread of this program panicked".to_owned());
        }
    }
    soak.print();
    let violations = lock(&soak.violations);
    println!("{} violations", violations.len());
    violations.iter().for_each(|violation| println!("{violation}"));
    if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn options() -> Result<Options, lexopt::Error> {
    use lexopt::prelude::*;
    let mut options = Options { duration: Duration::from_secs(60), seed: 1, simulated: true, real: true };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("minutes") => {
                let minutes: f64 = arguments.value()?.parse()?;
                options.duration = Duration::try_from_secs_f64(minutes * 60.0).map_err(|error| error.to_string())?;
            }
            Long("seed") => options.seed = arguments.value()?.parse()?,
            Long("only") => match arguments.value()?.to_str() {
                Some("simulated") => options.real = false,
                Some("real") => options.simulated = false,
                _ => return Err("--only takes simulated or real".into()),
            },
            other => return Err(other.unexpected()),
        }
    }
    Ok(options)
}

impl Soak {
    fn is_over(&self) -> bool {
        Instant::now() >= self.end || !lock(&self.violations).is_empty()
    }

    /// The histories that run end before the report is complete.
    fn violation(&self, text: String) {
        let text = format!("after {:.1} s, {text}", self.begin.elapsed().as_secs_f64());
        eprintln!("{}", text.lines().next().unwrap_or_default());
        lock(&self.violations).push(text);
    }

    fn print(&self) {
        let (simulated, real) = (*lock(&self.simulated), *lock(&self.real));
        println!("{:>6.1} s simulated: {simulated:?}", self.begin.elapsed().as_secs_f64());
        println!("         real kernel: {real:?}");
        println!("         verdicts for connections: {:?}", lock(&self.flows));
        println!("         lives of filters: {:?}", lock(&self.lives));
    }
}

fn run_simulated(soak: &Soak, _: u64) {
    while !soak.is_over() {
        let seed = soak.next.fetch_add(1, Ordering::Relaxed);
        match simulated::history(seed) {
            Ok(totals) => *lock(&soak.simulated) += totals,
            Err(wrong) => soak.violation(format!("simulated, --seed {seed}: {wrong}")),
        }
    }
}

fn run_real(soak: &Soak, mut seed: u64) {
    use histories::Profile;
    while !soak.is_over() {
        for profile in [Profile::Calm, Profile::Faulty, Profile::Closing] {
            match histories::history("soak", profile, seed) {
                Ok(totals) => *lock(&soak.real) += totals,
                Err(wrong) => soak.violation(format!("real kernel, {profile:?}, --seed {seed}: {wrong}")),
            }
        }
        seed += 1;
    }
}

fn run_flows(soak: &Soak, mut seed: u64) {
    while !soak.is_over() {
        match histories::guarded(&format!("flows {seed}"), move || walk::round(seed)) {
            Ok(totals) => *lock(&soak.flows) += totals,
            Err(wrong) => soak.violation(format!("real kernel, verdicts for connections, --seed {seed}: {wrong}")),
        }
        seed += 1;
    }
}

fn run_lives(soak: &Soak, _: u64) {
    while !soak.is_over() {
        let seed = soak.next_life.fetch_add(1, Ordering::Relaxed);
        match histories::guarded(&format!("lives {seed}"), move || lives::history(seed)) {
            Ok(totals) => *lock(&soak.lives) += totals,
            Err(wrong) => soak.violation(format!("real kernel, lives of filters, --seed {seed}: {wrong}")),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
