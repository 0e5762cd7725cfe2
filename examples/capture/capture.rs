//! Writes what was queued as pcapng, with the verdict and the waiting time as the comment of each
//! packet. It accepts all packets except those to ports that are to be dropped.
//!
//! Run it as root: `cargo run --release --example capture -- --write dns.pcapng --port 53`, then
//! `tshark -r dns.pcapng -T fields -e frame.number -e ip.dst -e frame.comment`. It makes its own
//! rules: for TCP and UDP to or from these ports, sent by this host or received by it.
//!
//! No packet waits for the file. Its bytes are valid after the verdict (`Packet::payload_bytes`),
//! and a thread writes them. If that cannot keep up, packets are not written, and are counted.
//!
//! - Packets begin with their IP header (link type RAW): a queue has no headers of Ethernet.
//! - The waiting time is from the receiving of the packet by the program to its verdict.
//! - This host's own packets have no finished checksums yet, and may be longer than the MTU. The
//!   network interface, or its driver, does that later (GSO).
//! - Whenever no packets come, the file is complete, also if the program is killed then. Only its
//!   owner can read it, if it did not exist before.
//!
//! It prints `ready` on standard error once queue and rules are there. SIGINT and SIGTERM end it,
//! and it prints one line of statistics. If the file cannot be written, it ends, and packets pass.

use std::{
    borrow::Cow,
    error::Error,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    iter,
    os::unix::fs::OpenOptionsExt,
    pin::pin,
    process::ExitCode,
    sync::mpsc::{Receiver, TrySendError, sync_channel},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use pcap_file::{
    DataLink, PcapError,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_nfqueue::{Divert, Hook, Packet, Protocol, Queue, Rule, divert::Match};

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let mut end = pin!(end_signal());
    let file = create(&options.file).map_err(|error| format!("{}: {error}", options.file))?;
    let ports = || options.ports.iter().chain(&options.dropped).copied();
    let rules = [Match::destination_ports(ports()), Match::source_ports(ports())].into_iter().flat_map(|ports| {
        let rule = |hook| Rule::new(hook).when(Match::protocols([Protocol::Tcp, Protocol::Udp])).when(ports.clone());
        // What arrives over loopback has passed the output hook.
        [rule(Hook::Output), rule(Hook::Input).unless(Match::interface("lo"))]
    });
    let rules = Divert::builder().rules(rules).flow_marks(None);
    let (mut packets, verdicts) = Queue::builder(Queue::ANY).divert(rules).bind().await?.split();
    let (records, unwritten) = sync_channel(MOST_UNWRITTEN);
    let writer = tokio::task::spawn_blocking(move || write(file, unwritten));
    eprintln!("ready");

    let mut missing = 0_u64;
    let mut received = Vec::new();
    'queue: loop {
        tokio::select! {
            count = packets.recv_many(&mut received, 64) => {
                if count? == 0 {
                    break;
                }
            }
            () = &mut end => break,
        }
        let since = Instant::now();
        for packet in received.drain(..) {
            let (bytes, mut record) = (packet.payload_bytes(), record(&packet));
            let is_dropped = packet
                .view()
                .is_ok_and(|view| view.destination_port().is_some_and(|port| options.dropped.contains(&port)));
            let (verdict, word) = if is_dropped { (packet.drop(), "dropped") } else { (packet.accept(), "accepted") };
            verdict.submit()?;
            let comment = format!("{word} after {:.6} s", since.elapsed().as_secs_f64());
            record.options.push(EnhancedPacketOption::Comment(comment.into()));
            record.data = bytes.to_vec().into();
            match records.try_send(record) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => missing += 1,
                // The file cannot be written: the writer says why.
                Err(TrySendError::Disconnected(_)) => break 'queue,
            }
        }
    }
    let closed = verdicts.close().await;
    drop(records);
    let written = writer.await?.map_err(|error| format!("{}: {error}", options.file))?;
    let stats = verdicts.stats();
    println!(
        "wrote {written} packets to {}: {} accepted, {} dropped; {missing} not written, {} lost",
        options.file, stats.decided.accepted, stats.decided.dropped, stats.lost.packets
    );
    Ok(closed?)
}

/// How many packets may wait until they are written. With the longest packets, these are 64 MiB.
const MOST_UNWRITTEN: usize = 1024;

/// What is known of a packet before its verdict.
fn record(packet: &Packet) -> EnhancedPacketBlock<'static> {
    let time = packet.timestamp().unwrap_or_else(SystemTime::now);
    EnhancedPacketBlock {
        interface_id: 0,
        timestamp: time.duration_since(UNIX_EPOCH).unwrap_or_default(),
        original_len: packet.original_len().unwrap_or_default() as u32,
        data: Cow::Borrowed(&[]),
        options: Vec::new(),
    }
}

fn create(path: &str) -> io::Result<PcapNgWriter<BufWriter<File>>> {
    // It will contain what others have sent.
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let mut file = PcapNgWriter::new(BufWriter::new(file)).map_err(io_error)?;
    let mut queue = InterfaceDescriptionBlock::new(DataLink::RAW, 0);
    queue.options.push(InterfaceDescriptionOption::IfName("nfqueue".into()));
    // The unit of the timestamps is 10⁻⁹ s: `pcap_file` counts in no other.
    queue.options.push(InterfaceDescriptionOption::IfTsResol(9));
    file.write_pcapng_block(queue).map_err(io_error)?;
    file.get_mut().flush()?;
    Ok(file)
}

/// Returns how many packets were written, when no more can come.
fn write(mut file: PcapNgWriter<BufWriter<File>>, records: Receiver<EnhancedPacketBlock<'static>>) -> io::Result<u64> {
    let mut written = 0;
    while let Ok(first) = records.recv() {
        for record in iter::once(first).chain(records.try_iter()) {
            file.write_pcapng_block(record).map_err(io_error)?;
            written += 1;
        }
        file.get_mut().flush()?;
    }
    Ok(written)
}

/// What the system said, without "Error reading bytes" before it.
fn io_error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
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

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("capture: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("capture: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: capture --write FILE [--port P ...] [--drop-port P ...]

  --write FILE   the file, which is overwritten
  --port P       queue packets to and from this port, and accept them
  --drop-port P  the same, but drop packets to this port";

struct Options {
    file: String,
    ports: Vec<u16>,
    dropped: Vec<u16>,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;

    let mut options = Options { file: String::new(), ports: Vec::new(), dropped: Vec::new() };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("write") => options.file = arguments.value()?.string()?,
            Long("port") => options.ports.push(arguments.value()?.parse()?),
            Long("drop-port") => options.dropped.push(arguments.value()?.parse()?),
            Short('h') | Long("help") => return Ok(None),
            _ => return Err(argument.unexpected()),
        }
    }
    if options.file.is_empty() {
        return Err("there is no file".into());
    }
    if options.ports.is_empty() && options.dropped.is_empty() {
        Err("there is no port".into())
    } else {
        Ok(Some(options))
    }
}
