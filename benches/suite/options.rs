//! The command line.

use std::time::Duration;

use lexopt::prelude::*;

pub const USAGE: &str = "usage: cargo bench --workspace [--bench NAME] [-- [--quick] [--gate] [--list] [FILTER ...]]

  --quick   small counts, one round: only checks that everything runs; writes no file
  --gate    only the bench gate: fails if a figure is above its limit (a minute)
  --list    list the names of the measurements
  FILTER    run only the measurements whose name contains one of the filters";

#[derive(Debug, Default)]
pub struct Options {
    pub quick: bool,
    /// Only the bench gate runs.
    pub gate: bool,
    pub list: bool,
    pub help: bool,
    filters: Vec<String>,
    /// The task of a child process; see `child`.
    pub child: Vec<String>,
}

/// Counts and durations of the measurements.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Packets in a prefilled queue.
    pub packets: usize,
    /// How often the queue is filled in a round.
    pub drains: usize,
    /// How long traffic runs before the measurement, and during it.
    pub warm_up: Duration,
    pub window: Duration,
    /// Packets held at once when memory is measured.
    pub held: usize,
    /// How often a measurement is repeated: by default, if it varies much (`many_rounds`), if it
    /// takes long (`few_rounds`).
    pub rounds: usize,
    pub many_rounds: usize,
    pub few_rounds: usize,
}

impl Options {
    pub fn parse() -> Result<Self, lexopt::Error> {
        let mut options = Self { quick: true, ..Self::default() };
        let mut asked_for_quick = false;
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                // `cargo bench` passes this to every benchmark. `cargo test` does not: it only
                // checks that they run.
                Long("bench") => options.quick = false,
                Long("quick" | "test") => asked_for_quick = true,
                Long("gate") => options.gate = true,
                Long("list") => options.list = true,
                Long("child") => options.child = arguments.values()?.map(|v| v.string()).collect::<Result<_, _>>()?,
                Short('h') | Long("help") => options.help = true,
                // Options of other harnesses. Cargo passes them to all benchmarks.
                Long("exact" | "nocapture" | "quiet" | "noplot" | "verbose" | "ignored" | "include-ignored") => {}
                Long("format" | "color" | "test-threads" | "save-baseline" | "baseline") => drop(arguments.value()?),
                Value(filter) => options.filters.push(filter.string()?),
                _ => return Err(argument.unexpected()),
            }
        }
        options.quick |= asked_for_quick;
        Ok(options)
    }

    pub fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()))
    }

    /// Whether this run makes all measurements in full. Only then are the results written to files.
    pub fn complete(&self) -> bool {
        !self.quick && self.filters.is_empty()
    }

    pub fn scale(&self) -> Scale {
        if self.quick {
            let (warm_up, window) = (Duration::from_millis(5), Duration::from_millis(30));
            Scale { packets: 512, drains: 1, warm_up, window, held: 256, rounds: 1, many_rounds: 1, few_rounds: 1 }
        } else {
            let (warm_up, window) = (Duration::from_millis(100), Duration::from_millis(400));
            Scale {
                packets: 16_384,
                drains: 4,
                warm_up,
                window,
                held: 16_384,
                rounds: 5,
                many_rounds: 11,
                few_rounds: 3,
            }
        }
    }
}
