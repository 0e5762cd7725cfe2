//! A service that is restarted under load without losing a packet: the new process takes the queue
//! over from the old one, through a Unix socket.
//!
//! Without `--socket` it is a demonstration, in a network namespace of its own: it sends numbered
//! datagrams through a queue, restarts the service several times, and counts what was lost or came
//! twice. It needs no set-up and changes no rule of yours. Run it as root or as an ordinary user:
//! `cargo run --release --example restart`
//!
//! With `--socket` it is the service, in the current network namespace. The first process serves
//! the queue; another one with the same arguments takes it over, and the first one ends. The rules
//! are yours, for example `nft add rule inet filter output udp dport 9000 queue num 0`:
//! `restart --queue 0 --socket /run/restart` (`--help` lists the options).

use std::{path::PathBuf, process::ExitCode};

mod service;
mod show;

/// What the command line says.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    queue: u16,
    socket: Option<PathBuf>,
    udp_port: Option<u16>,
    restarts: u32,
    rate: u32,
    seconds: u32,
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("restart: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let result = match &options.socket {
        Some(socket) => service::run(&options, socket),
        None => show::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("restart: {sentence}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: restart [--restarts N] [--rate N] [--seconds N]
       restart --socket PATH [--queue N] [--udp-port N]

  --restarts N   how often the service is restarted (default: 5)
  --rate N       how many packets are sent each second, at most 1000000 (default: 60000)
  --seconds N    the time between two restarts (default: 1)

  --socket PATH  serve a queue; take it over from the process that listens here, if there is one
  --queue N      the queue's number (default: 0)
  --udp-port N   install a rule for packets to this port, instead of using yours";

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { queue: 0, socket: None, udp_port: None, restarts: 5, rate: 60_000, seconds: 1 };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("queue") => options.queue = arguments.value()?.parse()?,
            Long("socket") => options.socket = Some(arguments.value()?.into()),
            Long("udp-port") => options.udp_port = Some(arguments.value()?.parse()?),
            Long("restarts") => options.restarts = arguments.value()?.parse_with(|text| in_range(text, 0, 1000))?,
            Long("rate") => options.rate = arguments.value()?.parse_with(|text| in_range(text, 1, 1_000_000))?,
            Long("seconds") => options.seconds = arguments.value()?.parse_with(|text| in_range(text, 1, 60))?,
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Some(options))
}

fn in_range(text: &str, least: u32, most: u32) -> Result<u32, String> {
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("a number from {least} to {most} is needed")),
    }
}
