//! `nfqtop` shows the NFQUEUE queues of a network namespace: who has bound them, how many packets
//! come, wait and are lost, which rules lead to them, and what to do about trouble.
//!
//! What reads the system is in `reader` (with `owners` and `rule_source`), `namespace`, `signals`
//! and `terminal`. All else is pure: text and bytes in (`kernel`, `rules`, `keys`), rates and
//! trouble (`view`, `advice`), text and cells out (`table`, `json`, `screen`).

mod advice;
mod cells;
mod json;
mod kernel;
mod keys;
mod namespace;
mod options;
mod owners;
mod reader;
mod rule_source;
mod rules;
mod screen;
mod signals;
mod snapshot;
mod table;
mod terminal;
mod view;

use std::{
    io::{self, ErrorKind, Write},
    process::ExitCode,
    time::Instant,
};

use crate::{
    options::{Options, Request, USAGE},
    reader::Reader,
    signals::{Signals, Woken},
    view::{History, View},
};

fn main() -> ExitCode {
    let options = match options::parse(lexopt::Parser::from_env()) {
        Ok(Request::Run(options)) => options,
        Ok(Request::Help) => return print(&format!("{USAGE}\n")),
        Ok(Request::Version) => return print(&format!("nfqtop {}\n", env!("CARGO_PKG_VERSION"))),
        Err(error) => {
            eprintln!("nfqtop: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nfqtop: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, String> {
    if let Some(namespace) = &options.namespace {
        namespace.enter()?;
    }
    let namespace = namespace::current();
    if options.once || options.json {
        return report(options, &namespace);
    }
    terminal::run(options.interval, &namespace)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints text or JSON after each interval, or once. Fails if the queues could not be read.
fn report(options: &Options, namespace: &str) -> Result<ExitCode, String> {
    let mut signals = Signals::new().map_err(|error| format!("handle signals: {error}"))?;
    let (mut reader, mut history) = (Reader::new(), History::default());
    let mut view = history.update(&reader.read());
    if options.once && !view.queues_readable {
        // Nothing comes of watching for a while.
        print(&text(options, &view, namespace));
        return Ok(ExitCode::FAILURE);
    }
    loop {
        let next = Instant::now() + options.interval;
        while Instant::now() < next {
            let woken = signals.wait(Some(next), None::<io::Stdin>).map_err(|error| format!("wait: {error}"))?;
            if woken == Woken::End {
                return Ok(ExitCode::SUCCESS);
            }
        }
        view = history.update(&reader.read());
        let code = print(&text(options, &view, namespace));
        if options.once || code == ExitCode::FAILURE {
            return Ok(if view.queues_readable { code } else { ExitCode::FAILURE });
        }
    }
}

fn text(options: &Options, view: &View, namespace: &str) -> String {
    if options.json { format!("{}\n", json::line(view, namespace)) } else { table::text(view, namespace) }
}

/// Prints to standard output.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A reader that has seen enough, for example `head`, is no reason to complain.
            if error.kind() != ErrorKind::BrokenPipe {
                eprintln!("nfqtop: standard output: {error}");
            }
            ExitCode::FAILURE
        }
    }
}
