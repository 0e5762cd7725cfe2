//! A firewall that asks a service about each connection that a program of this host opens. The
//! service listens on a Unix socket, and need not be fast, correct or even there.
//!
//! It makes its own rule, for TCP and UDP. Run it as root, and a service in another terminal; here
//! the service is you:
//!
//! - `cargo run --release --example firewall -- prompt --socket /run/firewall`
//! - `cargo run --release --example firewall -- --socket /run/firewall`
//!
//! # The protocol
//!
//! The firewall connects. Both sides send lines of text that end with `\n`:
//!
//! | who | sends | meaning |
//! |---|---|---|
//! | the firewall | `ask 7 tcp 192.0.2.1:40000 203.0.113.5:443 1000 curl` | the number of the question, the protocol, from where, to where, the user's number or `-`, the program's name or `?` (the rest of the line; a program can choose its name) |
//! | the service | `allow 7` or `deny 7` | the answer, which holds for the connection; in any order |
//!
//! # What happens without an answer
//!
//! | the service | then |
//! |---|---|
//! | is slow | the queue's `deadline` decides the packet by the default action. The question stays open for a minute: further packets do not wait, and a late answer decides the next one |
//! | is down, or closes the connection | packets that wait, and new ones, are decided by the default action at once; each new connection tries to reach the service again |
//! | sends nonsense, or an answer to no question | it is counted, and has no effect |
//! | sends a line that does not end, or does not read | it is disconnected, as if it were down |
//! | has too many open questions | further connections are decided by the default action |
//!
//! An answer is remembered for a minute, for packets that were sent before it. Another SYN on the
//! same addresses and ports, perhaps of another program, is asked about. UDP has none: what comes
//! on the same ports within the minute has the same answer.
//!
//! The default action is for the packet, not for the connection: the next packet is asked about
//! again. So a client whose SYN was dropped while the service was restarted is connected when it
//! sends it again. All that the firewall keeps in memory is bounded.
//!
//! What it does not do: it asks neither about incoming connections, nor about those over loopback.
//! The directory of the socket must belong to the service: a program that can put a socket there
//! decides. If the firewall is killed, packets pass: see `DivertBuilder::fail_closed`.
//!
//! It prints `ready` on standard error once queue and rule are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics.

use std::{io, path::PathBuf, process::ExitCode, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::Action;

mod filter;
mod process;
mod prompt;
mod service;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let command = match command() {
        Ok(Some(command)) => command,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("firewall: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let result = match command {
        Command::Filter(options) => filter::run(options).await.map_err(|error| format!("{error:#}")),
        Command::Prompt(socket) => prompt::run(&socket).await.map_err(|error| format!("{}: {error}", socket.display())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("firewall: {sentence}");
            ExitCode::FAILURE
        }
    }
}

/// Ends with SIGINT or SIGTERM. The handlers are installed when this returns.
fn end_signal() -> io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

const USAGE: &str = "usage: firewall --socket PATH [--default allow|deny] [--deadline MS] [--questions N] [--port P]
       firewall prompt --socket PATH

The first asks the service on this socket about each connection. The second is such a service, which
asks you.

  --socket PATH     where the service listens
  --default ACTION  for packets about which the service says nothing: allow, or deny, which drops
                    them (default: deny)
  --deadline MS     how long a packet waits for an answer, 1 to 60000 (default: 5000)
  --questions N     how many questions are open, and how many answers are remembered, at most
                    (default: 100)
  --port P          asks only about connections to this port";

enum Command {
    Filter(Options),
    Prompt(PathBuf),
}

struct Options {
    socket: PathBuf,
    default: Action,
    deadline: Duration,
    questions: usize,
    port: Option<u16>,
}

fn command() -> Result<Option<Command>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut prompt = false;
    let (socket, deadline) = (PathBuf::new(), Duration::from_secs(5));
    let mut options = Options { socket, default: Action::Drop, deadline, questions: 100, port: None };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Value(command) if command == "prompt" && !prompt => prompt = true,
            Long("socket") => options.socket = arguments.value()?.into(),
            Long("default") if !prompt => {
                options.default = arguments.value()?.parse_with(|text| match text {
                    "allow" => Ok(Action::Accept),
                    "deny" => Ok(Action::Drop),
                    _ => Err("neither allow nor deny"),
                })?;
            }
            Long("deadline") if !prompt => {
                options.deadline = arguments.value()?.parse_with(|text| match text.parse() {
                    Ok(milliseconds @ 1..=60_000) => Ok(Duration::from_millis(milliseconds)),
                    _ => Err("a number of milliseconds from 1 to 60000 is needed"),
                })?;
            }
            Long("questions") if !prompt => options.questions = arguments.value()?.parse()?,
            Long("port") if !prompt => options.port = Some(arguments.value()?.parse()?),
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    match options {
        Options { socket, .. } if socket.as_os_str().is_empty() => Err("there is no --socket".into()),
        Options { questions: 0, .. } => Err("no question may be open".into()),
        options if prompt => Ok(Some(Command::Prompt(options.socket))),
        options => Ok(Some(Command::Filter(options))),
    }
}
