//! The example programs, with their command lines, on a real kernel.

pub(crate) mod capture;
pub(crate) mod dns_firewall;
pub(crate) mod firewall;
mod http;
pub(crate) mod ips;
pub(crate) mod netem;
pub(crate) mod prometheus;
pub(crate) mod shaper;
pub(crate) mod sni_filter;
mod talk;
pub(crate) mod web;

use std::{
    io::{BufRead, BufReader, Read},
    net::{Ipv4Addr, UdpSocket},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nfqueue_divert::Divert;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio_nfqueue::{Hook, Protocol, Rule};

use crate::support;

tests![
    sync accept_all_stops_on_sigterm,
    sync accept_all_stops_on_sigint,
    sync out_of_order_accepts_everything,
    sync per_flow_sees_one_packet_of_each_connection,
    sync per_flow_sees_every_packet_without_flows,
    sync nf_queue_counts_packets_and_stops_after_its_timeout,
    sync nf_queue_requeues_packets,
    sync rule_leads_to_a_queue_until_it_ends,
    sync rule_with_bypass_accepts_without_a_program,
    sync restart_under_load_loses_no_packet,
    sync a_second_restart_process_takes_the_queue_over,
    sync invalid_command_lines_are_refused,
    sync programs_need_only_the_capabilities_that_the_guide_names,
    sync without_the_capability_one_line_is_printed,
];

const PORT: u16 = 9000;

fn accept_all_stops_on_sigterm() {
    accept_all(Signal::SIGTERM, &[]);
}

fn accept_all_stops_on_sigint() {
    let options = ["--max-len", "2048", "--copy-range", "64", "--no-gso", "--fail-open", "--threads", "2"];
    accept_all(Signal::SIGINT, &options);
}

fn accept_all(signal: Signal, options: &[&str]) {
    let queue = 7;
    let mut arguments = vec!["--queue", "7"];
    arguments.extend(options);
    let mut program = Program::start("accept_all", &arguments);
    program.until_ready();
    let _divert = divert(&[queue]);
    assert_eq!(delivered(500), 500);
    let (status, output) = program.end(signal);
    assert!(status.success(), "{status}");
    assert!(output.starts_with("received 500 accepted 500 lost 0"), "{output}");
    assert_eq!(output.lines().count(), 1, "{output}");
    assert_eq!(support::queue_line(queue), None, "the queue is unbound");
}

fn out_of_order_accepts_everything() {
    let mut program =
        Program::start("out_of_order", &["--queue", "1", "--tasks", "4", "--hold-us", "300", "--seed", "5"]);
    program.until_ready();
    let _divert = divert(&[1]);
    assert_eq!(delivered(1000), 1000);
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert!(output.starts_with("received 1000 accepted 1000 lost 0"), "{output}");
}

fn per_flow_sees_one_packet_of_each_connection() {
    per_flow(Signal::SIGTERM, &["--port", "9000"], "received 2 accepted 2 lost 0");
}

fn per_flow_sees_every_packet_without_flows() {
    per_flow(Signal::SIGINT, &["--no-flow", "--port", "9000"], "received 400 accepted 400 lost 0");
}

fn per_flow(signal: Signal, options: &[&str], expected: &str) {
    let mut program = Program::start("per_flow", options);
    program.until_ready();
    let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
    // Each has a port of its own.
    let senders = [(); 2].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    for sender in &senders {
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        for number in 0..200_u32 {
            sender.send(&number.to_be_bytes()).unwrap();
            receiver.recv(&mut [0; 4]).unwrap();
        }
    }
    let (status, output) = program.end(signal);
    assert!(status.success(), "{status}");
    assert!(output.starts_with(expected), "{output}");
    assert_eq!(output.lines().count(), 1, "{output}");
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
}

fn nf_queue_counts_packets_and_stops_after_its_timeout() {
    for options in [
        &["-c", "-t", "600"][..],
        &["-c", "-t600", "-O", "-b", "-o", "-G"],
        &["-c", "-v", "-v", "-t", "600", "-d", "1"],
    ] {
        let program = Program::start("nf_queue", options);
        support::wait_until("the queue is bound", || support::queue_line(0).is_some());
        {
            let divert = divert(&[0]);
            assert_eq!(delivered(50), 50, "{options:?}");
            divert.remove_rules().unwrap();
        }
        let (status, output) = program.end(Signal::SIGINT);
        assert!(status.success(), "{options:?}: {status}");
        let expected = "hook 0 packets 00000000\nhook 1 packets 00000000\nhook 2 packets 00000000\n\
                        hook 3 packets 00000050\nhook 4 packets 00000000\n50 packets total\n";
        assert!(output.ends_with(expected), "{options:?}: {output}");
        let verbose = output.lines().filter(|line| line.starts_with("packet hook=3, hwproto 0x800")).count();
        assert_eq!(verbose, if options.contains(&"-v") { 50 } else { 0 }, "{output}");
    }
    let begun = Instant::now();
    let (status, output) = Program::start("nf_queue", &["-c", "-t", "1"]).wait();
    assert!(status.success() && begun.elapsed() >= Duration::from_secs(1), "{status}");
    assert!(output.ends_with("\n0 packets total\n"), "{output}");
}

fn nf_queue_requeues_packets() {
    let first = Program::start("nf_queue", &["-c", "-q", "1", "-Q", "2", "-t", "600"]);
    let second = Program::start("nf_queue", &["-c", "-q", "2", "-t", "600"]);
    support::wait_until("both queues are bound", || [1, 2].iter().all(|queue| support::queue_line(*queue).is_some()));
    let divert = divert(&[1]);
    assert_eq!(delivered(100), 100);
    divert.remove_rules().unwrap();
    let ((one, first), (two, second)) = (first.end(Signal::SIGINT), second.end(Signal::SIGINT));
    assert!(one.success() && two.success());
    assert!(first.ends_with("100 packets total\n"), "{first}");
    assert_eq!(first, second);
}

/// The headers of `accept_all` and `nf_queue` name it.
fn rule_leads_to_a_queue_until_it_ends() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut accepts = Program::start("accept_all", &["--queue", "7"]);
        accepts.until_ready();
        let mut rule = Program::start("rule", &["output", "udp", "9000", "--queue", "7"]);
        rule.until_ready();
        assert_eq!(delivered(100), 100);
        let (status, output) = rule.end(signal);
        assert!(status.success(), "{status}");
        assert_eq!(output, "matched packets: 100\n");
        assert_eq!(delivered(50), 50);
        let (status, output) = accepts.end(signal);
        assert!(status.success(), "{status}");
        assert!(output.starts_with("received 100 accepted 100 lost 0"), "{output}");
    }
}

fn rule_with_bypass_accepts_without_a_program() {
    for (options, is_accepted) in [(&["--bypass"][..], true), (&[], false)] {
        let mut rule = Program::start("rule", &[&["output", "udp", "9000"], options].concat());
        rule.until_ready();
        let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
        // The kernel may tell the sender of a packet that it was dropped.
        let _ = support::udp((Ipv4Addr::LOCALHOST, 0)).send_to(b"datagram", receiver.local_addr().unwrap());
        // What is not dropped has arrived.
        receiver.set_nonblocking(!is_accepted).unwrap();
        assert_eq!(receiver.recv(&mut [0; 8]).is_ok(), is_accepted);
        let (status, output) = rule.end(Signal::SIGTERM);
        assert!(status.success(), "{status}");
        assert_eq!(output, "matched packets: 1\n");
    }
}

fn restart_under_load_loses_no_packet() {
    let arguments = ["--restarts", "2", "--rate", "5000", "--seconds", "1"];
    let (status, output) = Program::start("restart", &arguments).wait();
    assert!(status.success(), "{status}: {output}");
    assert_eq!(output.lines().count(), 4, "{output}");
    let last = output.lines().last().unwrap();
    assert!(last.starts_with("15000 datagrams, "), "{output}");
    assert!(last.ends_with(": 0 lost, 0 doubled; 15000 decided, 0 gone"), "{output}");
}

fn a_second_restart_process_takes_the_queue_over() {
    let socket = std::env::temp_dir().join(format!("restart-test-{}", std::process::id()));
    let arguments = ["--queue", "3", "--socket", socket.to_str().unwrap()];
    let mut first = Program::start("restart", &arguments);
    first.until_ready();
    // The rule is the user's, and stays.
    let _divert = divert(&[3]);
    assert_eq!(delivered(100), 100);
    let mut second = Program::start("restart", &arguments);
    second.until_ready();
    let (status, output) = first.wait();
    assert!(status.success(), "{status}");
    assert_eq!(output, "decided 100 passed-on 0 lost 0 gone 0\n");
    assert_eq!(delivered(50), 50);
    let (status, output) = second.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert_eq!(output, "decided 50 passed-on 0 lost 0 gone 0\n");
    assert_eq!(support::queue_line(3), None, "the queue is unbound");
    let _ = std::fs::remove_file(socket);
}

fn invalid_command_lines_are_refused() {
    for (program, arguments) in [
        ("accept_all", &["--queue", "70000"][..]),
        ("accept_all", &["--threads", "0"]),
        ("accept_all", &["--copy-range", "0"]),
        ("accept_all", &["--bogus"]),
        ("out_of_order", &["--tasks", "none"]),
        ("nf_queue", &["-x"]),
        ("nf_queue", &["-q", "3", "-Q", "3"]),
        ("per_flow", &["--port", "port"]),
        ("dns_firewall", &[]),
        ("dns_firewall", &["--port", "0x", "example.com"]),
        ("dns_firewall", &["a..b"]),
        ("dns_firewall", &[""]),
        ("dns_firewall", &["--file", "/nowhere"]),
        ("ips", &[]),
        ("ips", &["--pattern", ""]),
        ("ips", &["--pattern", "long", "--bytes", "3"]),
        ("ips", &["--pattern", "long", "--connections", "0"]),
        ("ips", &["--pattern", "long", "--bytes", "1048577"]),
        ("sni_filter", &[]),
        ("sni_filter", &["--block", "a..b"]),
        ("sni_filter", &["--block", "a.example", "--port", "0x"]),
        ("sni_filter", &["--block", "a.example", "--client", "host"]),
        ("sni_filter", &["--block", "a.example", "--client", "192.0.2.1", "--clients", "eth0"]),
        ("sni_filter", &["--block", "a.example", "--clients", "eth0", "--client", "192.0.2.1"]),
        ("rule", &[]),
        ("rule", &["nowhere", "udp", "9000"]),
        ("rule", &["output", "udp", "0x"]),
        ("rule", &["output", "udp", "9000", "--queue", "70000"]),
        ("rule", &["output", "udp", "9000", "more"]),
        ("capture", &["--port", "9000"]),
        ("capture", &["--write", "/nowhere/file", "--port", "9000"]),
        ("capture", &["--write", "/dev/full", "--port", "9000"]),
        ("capture", &["--write", "/dev/null"]),
        ("netem", &["--bogus"]),
        ("netem", &["--loss", "101"]),
        ("netem", &["--duplicate", "NaN"]),
        ("netem", &["--delay", "-1"]),
        ("netem", &["--reorder", "5"]),
        ("netem", &["--protocol", "1", "--port", "5"]),
        ("netem", &["--hook", "nowhere"]),
        ("netem", &["--limit", "0"]),
        ("shaper", &[]),
        ("shaper", &["--rate", "0"]),
        ("shaper", &["--rate", "-5"]),
        ("shaper", &["--rate", "5", "--burst", "0"]),
        ("shaper", &["--rate", "5", "--hook", "output"]),
        ("firewall", &[]),
        ("firewall", &["prompt"]),
        ("firewall", &["ask", "--socket", "/nowhere/socket"]),
        ("firewall", &["prompt", "--socket", "/nowhere/socket"]),
        ("firewall", &["prompt", "--socket", "/nowhere/socket", "--questions", "3"]),
        ("firewall", &["--socket", "/nowhere/socket", "--default", "maybe"]),
        ("firewall", &["--socket", "/nowhere/socket", "--deadline", "0"]),
        ("firewall", &["--socket", "/nowhere/socket", "--questions", "0"]),
        ("prometheus", &["--port", "70000"]),
        ("prometheus", &["--listen", "9900"]),
        ("prometheus", &["--listen", "127.0.0.1:9000"]),
        ("web", &["--bogus"]),
        ("web", &["--addresses", "-1"]),
        ("web", &["--listen", "127.0.0.1:9000", "--port", "9000"]),
        ("demo", &["--bogus"]),
        ("restart", &["--bogus"]),
        ("restart", &["--rate", "0"]),
        ("restart", &["--restarts", "1000", "--rate", "1000000", "--seconds", "60"]),
        ("restart", &["--socket", "/does/not/exist", "--queue", "70000"]),
    ] {
        let (status, _) = Program::start(program, arguments).wait();
        assert!(!status.success() && status.code().is_some(), "{program} {arguments:?}: {status}");
    }
}

/// The table in `guide::service`.
fn programs_need_only_the_capabilities_that_the_guide_names() {
    use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

    let cases: [(&str, &[&str], CapabilitySet); 3] = [
        ("accept_all", &[], CapabilitySet::NET_ADMIN),
        ("per_flow", &["--port", "9000"], CapabilitySet::NET_ADMIN),
        ("dns_firewall", &["blocked.example"], CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW),
    ];
    for (name, arguments, needed) in cases {
        // In a separate thread, because the bounding set belongs to threads. In `exec`, root gets
        // what is in it.
        let started = std::thread::spawn(move || {
            for capability in CapabilitySet::all() - needed {
                // The kernel may not know all of them.
                let _ = remove_capability_from_bounding_set(capability);
            }
            Program::start(name, arguments)
        });
        let mut program = started.join().unwrap();
        program.until_ready();
        if name == "per_flow" {
            assert_eq!(delivered(100), 100);
        }
        let (status, _) = program.end(Signal::SIGTERM);
        assert!(status.success(), "{name}: {status}");
    }
}

fn without_the_capability_one_line_is_printed() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

    // In a separate thread, because capabilities belong to threads.
    let status = std::thread::spawn(|| {
        let none = CapabilitySet::empty();
        // Root would regain its capabilities in `exec`.
        rustix::thread::remove_capability_from_bounding_set(CapabilitySet::NET_ADMIN).unwrap();
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
        let mut command = Command::new(path("accept_all"));
        let started = support::start_process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()));
        let output = started.unwrap().wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    });
    let (status, stderr) = status.join().unwrap();
    assert!(!status.success(), "{status}");
    assert!(stderr.contains("bind queue 0: not permitted"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

/// Sends `datagrams` datagrams through the queue to this process; returns how many were delivered
/// with the right content.
fn delivered(datagrams: u32) -> u32 {
    let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut seen = vec![false; datagrams as usize];
    for number in 0..datagrams {
        sender.send_to(&number.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
    }
    for _ in 0..datagrams {
        let mut datagram = [0; 16];
        let length = receiver.recv(&mut datagram).expect("the next datagram");
        let number = u32::from_be_bytes(datagram[..length].try_into().unwrap());
        assert!(!std::mem::replace(&mut seen[number as usize], true), "{number} came twice");
    }
    seen.iter().map(|seen| u32::from(*seen)).sum()
}

/// Sends a datagram before a test begins. The kernel looks for a neighbour then, and loses some of
/// many packets that wait for one.
fn introduce(sender: &UdpSocket, receiver: &UdpSocket) {
    sender.send_to(b"first", receiver.local_addr().unwrap()).unwrap();
    receiver.recv(&mut [0; 5]).unwrap();
}

fn divert(queues: &[u16]) -> Divert {
    let rule = |queue: &u16| Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(PORT).to_queue(*queue);
    Divert::builder().rules(queues.iter().map(rule)).install().unwrap()
}

/// A running example. It is in the network namespace of the thread that started it.
struct Program(Child);

impl Program {
    fn start(name: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(path(name));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(support::start_process(&mut command).unwrap_or_else(|error| panic!("{name}: {error}")))
    }

    fn until_ready(&mut self) {
        let mut line = String::new();
        BufReader::new(self.0.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
    }

    fn end(self, signal: Signal) -> (ExitStatus, String) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
        self.wait()
    }

    fn wait(mut self) -> (ExitStatus, String) {
        let mut output = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        (self.0.wait().unwrap(), output)
    }

    /// Waits for the end of a program that prints an error.
    fn fails(mut self) -> (ExitStatus, String) {
        let mut error = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        (self.0.wait().unwrap(), error)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // If a test has failed before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `cargo test` builds the examples together with the tests (for these alone,
/// `cargo build --examples` comes first), beside the folder of this binary.
fn path(example: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let beside = this.parent().unwrap().join(example);
    if beside.exists() { beside } else { this.ancestors().nth(2).unwrap().join("examples").join(example) }
}
