//! Runs the measurements: the contenders take turns, round after round. A progress line says how
//! far the run is.

use std::{
    io::{IsTerminal, Write, stderr},
    time::{Duration, Instant},
};

use super::{options::Options, summary::Book};

/// Measurements whose results are compared.
pub struct Section<'a> {
    pub name: &'static str,
    pub rounds: usize,
    pub steps: Vec<Step<'a>>,
}

pub struct Step<'a> {
    pub name: String,
    pub run: Box<dyn Fn(&mut Book) + 'a>,
}

impl<'a> Section<'a> {
    pub fn new(name: &'static str, rounds: usize) -> Self {
        Self { name, rounds, steps: Vec::new() }
    }

    pub fn step(mut self, name: impl Into<String>, run: impl Fn(&mut Book) + 'a) -> Self {
        self.steps.push(Step { name: name.into(), run: Box::new(run) });
        self
    }
}

/// Names every measurement, for `cargo bench --workspace -- --list`.
pub fn list(sections: &[Section<'_>], options: &Options) {
    for name in sections.iter().flat_map(|section| section.steps.iter().map(|step| full_name(section, step))) {
        if options.wants(&name) {
            println!("{name}: benchmark");
        }
    }
}

/// Makes all measurements that the options select.
pub fn run(sections: &[Section<'_>], options: &Options) -> Book {
    let mut book = Book::default();
    let wanted = |section: &Section<'_>, step: &Step<'_>| options.wants(&full_name(section, step));
    let count = |section: &Section<'_>| section.steps.iter().filter(|step| wanted(section, step)).count();
    let mut progress = Progress::new(sections.iter().map(|section| section.rounds * count(section)).sum());
    for section in sections {
        for round in 1..=section.rounds {
            for step in section.steps.iter().filter(|step| wanted(section, step)) {
                progress.tell(section.name, &step.name, (round, section.rounds));
                (step.run)(&mut book);
            }
        }
    }
    progress.end();
    book
}

fn full_name(section: &Section<'_>, step: &Step<'_>) -> String {
    format!("{}/{}", section.name, step.name)
}

/// On a terminal one line, updated in place; otherwise one line for each section.
struct Progress {
    total: usize,
    done: usize,
    started: Instant,
    section: &'static str,
    terminal: bool,
}

impl Progress {
    fn new(total: usize) -> Self {
        Self { total, done: 0, started: Instant::now(), section: "", terminal: stderr().is_terminal() }
    }

    fn tell(&mut self, section: &'static str, step: &str, (round, rounds): (usize, usize)) {
        let (done, total, elapsed) = (self.done, self.total, clock(self.started.elapsed()));
        if self.terminal {
            eprint!("\r\x1b[K[{done:>3}/{total}] {elapsed}  {section}, round {round} of {rounds}: {step}");
            let _ = stderr().flush();
        } else if section != self.section {
            eprintln!("[{done:>3}/{total}] {elapsed}  {section}, {rounds} rounds");
        }
        self.section = section;
        self.done += 1;
    }

    fn end(&self) {
        let (total, elapsed) = (self.total, clock(self.started.elapsed()));
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        eprintln!("{clear}[{total}/{total}] {elapsed}");
    }
}

fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}
