//! The command line.

use std::time::Duration;

use crate::namespace::Namespace;

pub(crate) const USAGE: &str = "usage: nfqtop [--namespace NAME|PATH|PID] [--interval SECONDS] [--once] [--json]

Shows the NFQUEUE queues of a network namespace, those in trouble first.

  -n, --namespace WHICH   another network namespace: a name of `ip netns`, a path, or the id of a process
  -i, --interval SECONDS  between two refreshes, 0.1 or more (default: 1)
  -1, --once              watches for one interval, prints a table and ends; a queue is called stuck
                          if no packet leaves it for 1 s
  -j, --json              prints a JSON object for each refresh; with --once a single one
  -h, --help              prints this
  -V, --version           prints the version

Without --once and --json it needs a terminal; the footer shows the keys. Root sees everything.
Otherwise CAP_DAC_READ_SEARCH is needed for the queues, CAP_SYS_PTRACE for the processes of other
users, and CAP_NET_ADMIN for the rules.";

#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) namespace: Option<Namespace>,
    pub(crate) interval: Duration,
    pub(crate) once: bool,
    pub(crate) json: bool,
}

/// What the command line asks for.
#[derive(Debug, PartialEq)]
pub(crate) enum Request {
    Run(Options),
    Help,
    Version,
}

pub(crate) fn parse(mut arguments: lexopt::Parser) -> Result<Request, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { namespace: None, interval: Duration::from_secs(1), once: false, json: false };
    while let Some(argument) = arguments.next()? {
        match argument {
            Short('n') | Long("namespace") => {
                options.namespace = Some(arguments.value()?.parse_with(Namespace::parse)?);
            }
            Short('i') | Long("interval") => options.interval = arguments.value()?.parse_with(interval)?,
            Short('1') | Long("once") => options.once = true,
            Short('j') | Long("json") => options.json = true,
            Short('h') | Long("help") => return Ok(Request::Help),
            Short('V') | Long("version") => return Ok(Request::Version),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Request::Run(options))
}

fn interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        Ok(_) => Err("an interval is between 0.1 and 86400 seconds".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Request, String> {
        parse(lexopt::Parser::from_args(arguments)).map_err(|error| error.to_string())
    }

    #[test]
    fn all_options_are_read() {
        let options = Options {
            namespace: Some(Namespace::Name("lab".into())),
            interval: Duration::from_millis(500),
            once: true,
            json: true,
        };
        assert_eq!(parsed(&["--namespace", "lab", "-i", "0.5", "--once", "-j"]), Ok(Request::Run(options)));
        assert_eq!(parsed(&["--help"]), Ok(Request::Help));
        assert_eq!(parsed(&["-V"]), Ok(Request::Version));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parsed(&["--interval", "0"]).unwrap_err().contains("between 0.1 and 86400"));
        assert!(parsed(&["--interval", "NaN"]).is_err());
        assert!(parsed(&["--queue"]).unwrap_err().contains("--queue"));
        assert!(parsed(&["7"]).is_err());
    }
}
