//! A network namespace with queues in different kinds of trouble, under load; runs a command in it.
//!
//! `cargo build --release -p nfqtop --bins --examples`, then
//! `target/release/examples/lab target/release/nfqtop`. As root or as an ordinary user; it changes
//! nothing outside of its namespace, and all of it ends with the command.
//! `--queues N` makes as many healthy queues instead, with little traffic.

use std::{
    collections::VecDeque,
    ffi::{CString, OsString},
    io::Read,
    net::{Ipv4Addr, UdpSocket},
    process::{self, Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use nfqueue_divert::{Divert, Hook, Protocol, Rule};
use nfqueue_testbed::{RawQueue, enter, isolated, queue_line, wait_until};
use nix::sys::prctl;

/// Datagrams to this port plus a number are for that queue.
const PORT: u16 = 9000;
/// Set in the processes with queues: name, first queue, number of queues, pause between two
/// verdicts in microseconds.
const TASK: &str = "NFQTOP_LAB_TASK";

/// Name, first queue, how many, pause.
const PROGRAMS: &[(&str, u16, u16, u64)] = &[
    ("dns-filter", 1, 1, 0),
    ("ids-worker", 2, 1, 0),
    ("ids-worker", 3, 1, 0),
    ("proxy", 7, 1, STUCK),
    ("slow-logger", 8, 1, 5_000),
    ("forgotten", 20, 1, 0),
];
/// A pause of an hour.
const STUCK: u64 = 3_600_000_000;
/// Port and datagrams a second.
const TRAFFIC: &[(u16, u32)] = &[(1, 2_500), (2, 800), (3, 700), (4, 60), (8, 600), (9, 40)];

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(TASK) {
        serve(&task);
    }
    if let Err(error) = enter() {
        eprintln!("lab: {error}");
        return ExitCode::FAILURE;
    }
    let mut arguments = std::env::args_os().skip(1).peekable();
    let mut queues = None;
    if arguments.next_if(|argument| argument == "--queues").is_some() {
        queues = arguments.next().and_then(|text| text.to_str()?.parse::<u16>().ok());
    }
    let Some(program) = arguments.next() else {
        eprintln!("usage: lab [--queues N] COMMAND [ARGUMENT]...");
        return ExitCode::from(2);
    };
    let arguments: Vec<OsString> = arguments.collect();
    isolated(|| {
        let (programs, rules, traffic) = match queues {
            Some(count) => many(count),
            None => (PROGRAMS.to_vec(), troubled(), TRAFFIC.to_vec()),
        };
        let mut children: Vec<Child> = programs.iter().map(start).collect();
        let bound = programs.iter().flat_map(|(_, first, count, _)| *first..first + count);
        for queue in bound {
            wait_until("the queue is bound", || queue_line(queue).is_some());
        }
        let divert = Divert::builder().table("lab").rules(rules).install().expect("install rules");
        // No program decides these.
        send(7, 12);
        for (queue, rate) in traffic {
            thread::spawn(move || flow(queue, rate));
        }
        let status = Command::new(&program).args(&arguments).status();
        for child in &mut children {
            let _ = child.kill();
            let _ = child.wait();
        }
        drop(divert);
        match status {
            Ok(status) => ExitCode::from(status.code().unwrap_or(1) as u8),
            Err(error) => {
                eprintln!("lab: {}: {error}", program.to_string_lossy());
                ExitCode::FAILURE
            }
        }
    })
}

type Programs = Vec<(&'static str, u16, u16, u64)>;

/// One program with all of them.
fn many(count: u16) -> (Programs, Vec<Rule>, Vec<(u16, u32)>) {
    let rules = (0..count).map(|queue| to(queue).to_queue(queue)).collect();
    (vec![("hundred", 0, count, 0)], rules, (0..count).map(|queue| (queue, 10)).collect())
}

fn troubled() -> Vec<Rule> {
    let closed = |queue: u16| to(queue).to_queue(queue).bypass(false);
    let mut rules: Vec<Rule> = [1, 2, 3, 4, 7, 8].map(closed).into();
    rules.push(to(9).to_queue(9).bypass(true));
    rules
}

fn to(queue: u16) -> Rule {
    Rule::new(Hook::Output).ipv4().protocol(Protocol::Udp).destination_port(PORT + queue)
}

fn start((name, first, count, pause): &(&str, u16, u16, u64)) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.env(TASK, format!("{name} {first} {count} {pause}")).stdin(Stdio::piped());
    command.spawn().expect("start a process")
}

/// The whole `main` of a process with queues: it accepts all packets.
fn serve(task: &str) -> ! {
    let words: Vec<&str> = task.split(' ').collect();
    let number = |index: usize| words[index].parse::<u64>().expect("a number");
    prctl::set_name(&CString::new(words[0]).expect("a name")).expect("set the name");
    let (first, count, pause) = (number(1) as u16, number(2) as u16, Duration::from_micros(number(3)));
    for queue in (first..first + count).map(|queue| RawQueue::bind(queue).expect("bind the queue")) {
        thread::spawn(move || decide(&queue, pause));
    }
    // Until the lab has ended, however it ended.
    let _ = std::io::stdin().read(&mut [0]);
    process::exit(0)
}

/// Reads all packets at once, and accepts one after each pause.
fn decide(queue: &RawQueue, pause: Duration) {
    let (mut held, mut last) = (VecDeque::new(), Instant::now());
    loop {
        let patience = pause.clamp(Duration::from_millis(1), Duration::from_secs(1));
        held.extend(queue.next(patience));
        while last.elapsed() >= pause
            && let Some(packet) = held.pop_front()
        {
            queue.accept(&packet);
            last = Instant::now();
        }
    }
}

fn send(queue: u16, count: u32) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a socket");
    for _ in 0..count {
        let _ = socket.send_to(&[0; 100], (Ipv4Addr::LOCALHOST, PORT + queue));
    }
}

/// Datagrams at a rate, a little uneven.
fn flow(queue: u16, rate: u32) {
    const TICK: Duration = Duration::from_millis(20);
    let start = Instant::now();
    let mut sent = 0.0;
    loop {
        thread::sleep(TICK);
        let seconds = start.elapsed().as_secs_f64();
        let now = f64::from(rate) * (seconds - 0.3 * (seconds * 0.7 + f64::from(queue)).cos());
        let count = (now - sent).max(0.0) as u32;
        // A socket each, which waiting packets fill.
        send(queue, count.min(100));
        sent += f64::from(count);
    }
}
