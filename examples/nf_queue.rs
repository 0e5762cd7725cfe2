//! A program with the options of the kernel's own selftest helper, so that scripts written for that run against this crate.
//!
//! ```text
//! nf_queue [-c] [-v [-v]] [-o] [-O] [-b] [-t SECONDS] [-q N] [-Q N] [-d MS] [-G]
//! ```

use std::{pin::Pin, process::ExitCode, time::Duration};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Sleep, sleep},
};
use tokio_nfqueue::{Action, Error, Hook, Packet, Queue, VerdictSink};

const USAGE: &str = "usage: nf_queue [-c] [-v [-v]] [-o] [-O] [-b] [-t SECONDS] [-q N] [-Q N] [-d MS] [-G]

  -c          count packets by hook, and print the counts at the end
  -v, -vv     print each packet's hook, protocol and offload state; twice: its length and interfaces as well
  -o          fail open: pass packets unseen when the queue is full
  -O          out of order: hold up to 16 packets and answer them in reverse
  -b          send 50 bogus verdicts for each packet, and ignore their errors
  -t SECONDS  end after so long without a packet
  -q N        the queue's number (0)
  -Q N        hand packets on to queue N instead of accepting them
  -d MS       wait so many milliseconds before each verdict
  -G          without GSO: have the kernel cut super-packets into segments";

/// How many packets `-O` holds.
const HELD: usize = 16;
/// How long `-O` holds packets when no further one comes.
const HOLD: Duration = Duration::from_millis(10);
/// How many verdicts `-b` sends for each packet.
const BOGUS: u32 = 50;

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
            eprintln!("nf_queue: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> Result<(), Error> {
    let mut interrupt = signal(SignalKind::interrupt()).expect("install a signal handler");
    let mut terminate = signal(SignalKind::terminate()).expect("install a signal handler");
    let (mut packets, verdicts) = Queue::builder(options.queue)
        .uid_gid(true)
        .gso(!options.no_gso)
        .fail_open(options.fail_open)
        .on_unanswered(Action::Accept)
        .bind()?
        .split();
    let bogus = options.bogus.then(|| Socket::new(NETLINK_NETFILTER)).transpose().ok().flatten();

    let mut counts = [0u32; 5];
    let mut held = Vec::with_capacity(HELD);
    let mut quiet: Pin<Box<Sleep>> = Box::pin(sleep(options.timeout.unwrap_or_default()));
    loop {
        tokio::select! {
            packet = packets.recv() => {
                let packet = match packet {
                    None => break,
                    Some(Ok(packet)) => packet,
                    Some(Err(error)) => return Err(error),
                };
                if options.verbose > 0 {
                    print(&packet, options.verbose);
                }
                if let Some(count) = number(packet.hook()).and_then(|hook| counts.get_mut(hook)) {
                    *count += 1;
                }
                if let Some(socket) = &bogus {
                    send_bogus(socket, options.queue, packet.id().get());
                }
                held.push(packet);
                if !options.out_of_order || held.len() == HELD {
                    answer(&mut held, &verdicts, options).await;
                }
                if let Some(timeout) = options.timeout {
                    quiet.as_mut().reset(tokio::time::Instant::now() + timeout);
                }
            }
            // Packets that no sixteenth joins are not kept for ever.
            () = sleep(HOLD), if !held.is_empty() => answer(&mut held, &verdicts, options).await,
            () = &mut quiet, if options.timeout.is_some() => break,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    answer(&mut held, &verdicts, options).await;
    verdicts.close().await?;
    if options.count {
        for (hook, count) in counts.iter().enumerate() {
            println!("hook {hook} packets {count:08}");
        }
        println!("{} packets total", counts.iter().sum::<u32>());
    }
    Ok(())
}

/// Answers the packets held, the last one first.
async fn answer(held: &mut Vec<Packet>, verdicts: &VerdictSink, options: &Options) {
    while let Some(packet) = held.pop() {
        if let Some(delay) = options.delay {
            sleep(delay).await;
        }
        let verdict = match options.requeue {
            Some(queue) => packet.requeue(queue),
            None => packet.accept(),
        };
        if let Err(error) = verdicts.submit(verdict) {
            eprintln!("nf_queue: {error}");
        }
        if options.out_of_order {
            // Within one flush the kernel is told in the packets' order; the order wanted here is another.
            let _ = verdicts.flush().await;
        }
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

/// Verdicts for packets that do not exist. The crate has no way to decide a packet that one does not hold, so they are
/// made by hand, and come from a socket of their own: the kernel refuses them for both reasons.
fn send_bogus(socket: &Socket, queue: u16, id: u32) {
    let mut datagram = Vec::with_capacity(32 * BOGUS as usize);
    for offset in 0..BOGUS {
        // struct nlmsghdr: length, NFNL_SUBSYS_QUEUE and NFQNL_MSG_VERDICT, NLM_F_REQUEST; sequence and port 0.
        datagram.extend_from_slice(&32u32.to_ne_bytes());
        datagram.extend_from_slice(&0x0301u16.to_ne_bytes());
        datagram.extend_from_slice(&1u16.to_ne_bytes());
        datagram.extend_from_slice(&[0; 8]);
        // struct nfgenmsg
        datagram.extend_from_slice(&[0, 0]);
        datagram.extend_from_slice(&queue.to_be_bytes());
        // NFQA_VERDICT_HDR: accept, and an id far from any in use.
        datagram.extend_from_slice(&12u16.to_ne_bytes());
        datagram.extend_from_slice(&2u16.to_ne_bytes());
        datagram.extend_from_slice(&1u32.to_be_bytes());
        datagram.extend_from_slice(&id.wrapping_add(0x7fff_ff00 + offset).to_be_bytes());
    }
    let _ = socket.send(&datagram, 0);
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
        return Err("the queue to hand packets on to is the queue itself".into());
    }
    Ok(Some(options))
}
