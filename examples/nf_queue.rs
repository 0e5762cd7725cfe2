//! A program with the options of the kernel's own selftest helper, for scripts written for that
//! one. It shows how to hold packets, decide them in any order, and requeue them.
//!
//! The queue is in the current network namespace. The rules are yours, for example
//! `nft add rule inet filter output udp dport 9000 queue num 0`. Without nft, run in another
//! terminal: `cargo run -p nfqueue-divert --example rule -- output udp 9000 --queue 0`. As root:
//! `cargo run --release --example nf_queue -- -q 0 -c -t 5` (`-h` lists the options).

use std::{
    pin::{Pin, pin},
    process::ExitCode,
    time::Duration,
};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, Sleep, sleep},
};
use tokio_nfqueue::{Action, Error, Hook, Packet, Queue, VerdictSink};

async fn run(options: &Options) -> Result<(), Error> {
    let mut end = pin!(end_signal());
    let builder = Queue::builder(options.queue).uid_gid(true).gso(!options.no_gso).fail_open(options.fail_open);
    let (mut packets, verdicts) = builder.on_unanswered(Action::Accept).bind().await?.split();
    let mut observer = Observer::new(options);

    let mut held = Vec::with_capacity(HELD);
    let mut quiet: Pin<Box<Sleep>> = Box::pin(sleep(options.timeout.unwrap_or_default()));
    loop {
        tokio::select! {
            packet = packets.recv() => {
                let Some(packet) = packet.transpose()? else { break };
                observer.see(&packet);
                held.push(packet);
                if !options.out_of_order || held.len() == HELD {
                    decide(&mut held, &verdicts, options).await;
                }
                if let Some(timeout) = options.timeout {
                    quiet.as_mut().reset(Instant::now() + timeout);
                }
            }
            // Fewer packets than `HELD` are not held for longer than this.
            () = sleep(HOLD), if !held.is_empty() => decide(&mut held, &verdicts, options).await,
            () = &mut quiet, if options.timeout.is_some() => break,
            () = &mut end => break,
        }
    }
    decide(&mut held, &verdicts, options).await;
    verdicts.close().await?;
    observer.print_counts();
    Ok(())
}

/// Decides the held packets, the last one first.
async fn decide(held: &mut Vec<Packet>, verdicts: &VerdictSink, options: &Options) {
    while let Some(packet) = held.pop() {
        if let Some(delay) = options.delay {
            sleep(delay).await;
        }
        let verdict = match options.requeue {
            Some(queue) => packet.requeue(queue),
            None => packet.accept(),
        };
        if let Err(error) = verdict.submit() {
            eprintln!("nf_queue: {error:#}");
        }
        if options.out_of_order {
            // Within one flush the verdicts reach the kernel in the packets' order.
            let _ = verdicts.flush().await;
        }
    }
}

/// How many packets `-O` holds.
const HELD: usize = 16;
/// How long `-O` holds packets if no further packet arrives.
const HOLD: Duration = Duration::from_millis(10);
/// How many verdicts `-b` sends for each packet.
const BOGUS: u32 = 50;

/// What `-c`, `-v` and `-b` do with each packet.
struct Observer<'a> {
    options: &'a Options,
    bogus: Option<Socket>,
    /// Packets by the kernel's number of the hook.
    counts: [u32; 5],
}

impl<'a> Observer<'a> {
    fn new(options: &'a Options) -> Self {
        let bogus = options.bogus.then(|| Socket::new(NETLINK_NETFILTER)).transpose().ok().flatten();
        Self { options, bogus, counts: [0; 5] }
    }

    fn see(&mut self, packet: &Packet) {
        if self.options.verbose > 0 {
            print(packet, self.options.verbose);
        }
        if let Some(count) = number(packet.hook()).and_then(|hook| self.counts.get_mut(hook)) {
            *count += 1;
        }
        if let Some(socket) = &self.bogus {
            send_bogus(socket, self.options.queue, packet.id().get());
        }
    }

    fn print_counts(&self) {
        if !self.options.count {
            return;
        }
        for (hook, count) in self.counts.iter().enumerate() {
            println!("hook {hook} packets {count:08}");
        }
        println!("{} packets total", self.counts.iter().sum::<u32>());
    }
}

fn number(hook: Hook) -> Option<usize> {
    Some(match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
        _ => return None,
    })
}

fn print(packet: &Packet, verbose: u8) {
    let hook = number(packet.hook()).map_or_else(|| format!("{:?}", packet.hook()), |number| number.to_string());
    let mut line = format!("packet hook={hook}, hwproto 0x{:x}", packet.hw_protocol());
    for (holds, word) in [
        (!packet.is_checksum_ready(), " csumnotready"),
        (packet.is_gso(), " gso"),
        (packet.is_checksum_unverified(), " csumnotverified"),
    ] {
        if holds {
            line += word;
        }
    }
    if verbose > 1 {
        line += &format!(
            " len {} in {:?} out {:?}",
            packet.original_len().unwrap_or(0),
            packet.interface_in(),
            packet.interface_out()
        );
    }
    println!("{line}");
}

/// Sends verdicts for packets that do not exist. The crate cannot decide a packet that the program
/// does not hold, so the messages are built here. They are sent from another socket. The kernel
/// refuses them for both reasons.
fn send_bogus(socket: &Socket, queue: u16, id: u32) {
    let mut datagram = Vec::with_capacity(32 * BOGUS as usize);
    for offset in 0..BOGUS {
        // struct nlmsghdr: length; NFNL_SUBSYS_QUEUE and NFQNL_MSG_VERDICT; NLM_F_REQUEST;
        // sequence and port 0.
        datagram.extend_from_slice(&32u32.to_ne_bytes());
        datagram.extend_from_slice(&0x0301u16.to_ne_bytes());
        datagram.extend_from_slice(&1u16.to_ne_bytes());
        datagram.extend_from_slice(&[0; 8]);
        // struct nfgenmsg
        datagram.extend_from_slice(&[0, 0]);
        datagram.extend_from_slice(&queue.to_be_bytes());
        // NFQA_VERDICT_HDR: accept, and an id that is far from all ids in use.
        datagram.extend_from_slice(&12u16.to_ne_bytes());
        datagram.extend_from_slice(&2u16.to_ne_bytes());
        datagram.extend_from_slice(&1u32.to_be_bytes());
        datagram.extend_from_slice(&id.wrapping_add(0x7fff_ff00 + offset).to_be_bytes());
    }
    let _ = socket.send(&datagram, 0);
}

/// Ends with SIGINT or SIGTERM. The handlers are installed when this returns.
fn end_signal() -> impl Future<Output = ()> {
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("nf_queue: {error}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(&options)).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nf_queue: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: nf_queue [-c] [-v [-v]] [-o] [-O] [-b] [-t SECONDS] [-q N] [-Q N] [-d MS] [-G]

  -c          count packets by hook, and print the counts at the end
  -v, -vv     print each packet's hook, protocol and offload state; twice: also its length and interfaces
  -o          fail open: the kernel accepts new packets while the queue is full
  -O          out of order: hold up to 16 packets and decide them in reverse order
  -b          send 50 bogus verdicts for each packet, and ignore their errors
  -t SECONDS  end after this time without a packet
  -q N        the queue's number (default: 0)
  -Q N        requeue packets to queue N instead of accepting them
  -d MS       wait this long before each verdict, in milliseconds
  -G          no GSO: the kernel splits GSO packets into segments before it queues them";

#[derive(Default)]
struct Options {
    count: bool,
    verbose: u8,
    fail_open: bool,
    out_of_order: bool,
    bogus: bool,
    timeout: Option<Duration>,
    queue: u16,
    requeue: Option<u16>,
    delay: Option<Duration>,
    no_gso: bool,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options::default();
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Short('c') => options.count = true,
            Short('v') => options.verbose += 1,
            Short('o') => options.fail_open = true,
            Short('O') => options.out_of_order = true,
            Short('b') => options.bogus = true,
            Short('t') => {
                options.timeout = Some(Duration::from_secs(arguments.value()?.parse()?)).filter(|t| !t.is_zero())
            }
            Short('q') => options.queue = arguments.value()?.parse()?,
            Short('Q') => options.requeue = Some(arguments.value()?.parse()?),
            Short('d') => options.delay = Some(Duration::from_millis(arguments.value()?.parse()?)),
            Short('G') => options.no_gso = true,
            Short('h') => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.requeue == Some(options.queue) {
        return Err("-Q must name another queue than -q".into());
    }
    Ok(Some(options))
}
