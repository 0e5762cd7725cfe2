//! Sends packets to a queue without nft: one rule, until the program ends.
//!
//! Run it as root: `cargo run -p nfqueue-divert --example rule -- output udp 9000 --queue 0`. It is
//! for programs that leave the rules to others, such as the example `accept_all`. Without
//! `--bypass`, packets are dropped while no program has bound the queue, so start that one first.
//!
//! It prints `ready` on standard error once the rule is there. SIGINT and SIGTERM end it, and the
//! rule with it, and it prints how many packets the rule has matched.

use std::process::ExitCode;

use nfqueue_divert::{Divert, Error, Hook, Protocol, Rule};
use nix::sys::signal::{SigSet, Signal};

fn run(rule: Rule) -> Result<(), Error> {
    // They wait for `wait`, also those that come before it.
    let ends = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    ends.thread_block().expect("block the signals");
    let divert = Divert::builder().rule(rule).install()?;
    eprintln!("ready");
    ends.wait().expect("wait for a signal");
    println!("matched packets: {}", divert.counters()?[0].packets);
    // The kernel removes the rule when `divert` is gone.
    Ok(())
}

fn main() -> ExitCode {
    let rule = match rule() {
        Ok(Some(rule)) => rule,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("rule: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(rule) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rule: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: rule input|output|forward tcp|udp PORT [--queue N] [--bypass]

  PORT       the destination port
  --queue N  the queue's number (default: 0)
  --bypass   accepts the packets while no program has bound the queue";

fn rule() -> Result<Option<Rule>, lexopt::Error> {
    use lexopt::prelude::*;

    let (mut words, mut queue, mut bypass) = (Vec::new(), 0, false);
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(word) => words.push(word.string()?),
            Long("queue") => queue = arguments.value()?.parse()?,
            Long("bypass") => bypass = true,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [hook, protocol, port] = words[..] else { return Err("a hook, a protocol and a port are needed".into()) };
    let hook = match hook {
        "input" => Hook::Input,
        "output" => Hook::Output,
        "forward" => Hook::Forward,
        _ => return Err(format!("no such hook: {hook}").into()),
    };
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err(format!("neither tcp nor udp: {protocol}").into()),
    };
    let port = port.parse().map_err(|error| format!("{port} is not a port: {error}"))?;
    Ok(Some(Rule::new(hook).protocol(protocol).destination_port(port).to_queue(queue).bypass(bypass)))
}
