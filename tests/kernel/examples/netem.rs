//! `netem`: packets between two namespaces are delayed, lost, sent twice and reordered.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{PORT, Program, introduce};
use crate::support::{self, Peer, VethOptions};

tests![
    sync netem_delays_packets_and_keeps_their_order,
    sync netem_delays_by_at_least_delay_minus_jitter,
    sync netem_loses_what_it_is_told_to_lose,
    sync netem_loses_the_same_packets_with_the_same_seed,
    sync netem_sends_packets_twice_at_each_hook,
    sync netem_reorders_packets,
    sync netem_drops_what_is_over_the_limit,
    sync netem_sends_at_its_end_what_waits,
    sync netem_breaks_no_tcp_transfer,
];

fn start(options: &[&str]) -> Program {
    let mut program = Program::start("netem", &[&["--port", "9000"], options].concat());
    program.until_ready();
    program
}

/// Ends the program. Returns the numbers of its line: packets, lost, sent twice, not delayed, over
/// the limit.
fn end(program: Program) -> [u32; 5] {
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert_eq!(output.lines().count(), 1, "{output}");
    assert!(output.ends_with("; 0 copies failed, 0 packets lost unseen\n"), "{output}");
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
    let mut numbers = output.split(|c: char| !c.is_ascii_digit()).filter_map(|text| text.parse().ok());
    [(); 5].map(|()| numbers.next().unwrap_or_else(|| panic!("{output}")))
}

/// Waits until so many packets have come to the queue, and have all been decided.
fn decided(packets: u64) {
    support::wait_until("all packets are decided", || {
        support::queue_line(0).is_some_and(|line| line[2] == 0 && line[7] == packets)
    });
}

/// Sends numbered datagrams, from one namespace to another. It is made before the program starts.
struct Flow {
    sender: UdpSocket,
    receiver: UdpSocket,
}

impl Flow {
    fn new(peer: &Peer) -> Self {
        Self::between(support::udp((peer.near_v4, 0)), peer.run(|| support::udp((peer.far_v4, PORT))))
    }

    fn between(sender: UdpSocket, receiver: UdpSocket) -> Self {
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        introduce(&sender, &receiver);
        Self { sender, receiver }
    }

    fn send(&self, number: u32) {
        self.sender.send(&number.to_be_bytes()).unwrap();
    }

    fn receive(&self) -> u32 {
        let mut datagram = [0; 5];
        assert_eq!(self.receiver.recv(&mut datagram).unwrap(), 4);
        u32::from_be_bytes(*datagram.first_chunk().unwrap())
    }

    /// What has arrived and was not received. Does not wait.
    fn arrived(&self) -> Vec<u32> {
        self.receiver.set_nonblocking(true).unwrap();
        let mut numbers = Vec::new();
        let mut datagram = [0; 4];
        loop {
            match self.receiver.recv(&mut datagram) {
                Ok(_) => numbers.push(u32::from_be_bytes(datagram)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        self.receiver.set_nonblocking(false).unwrap();
        numbers
    }

    /// Sends the numbers below `count` through the program, in portions that fit in any buffer, and
    /// ends it. Returns those that have arrived, and the numbers of the program's line. Nothing is
    /// delayed.
    fn through(&self, program: Program, count: u32) -> (Vec<u32>, [u32; 5]) {
        let mut numbers = Vec::new();
        for first in (0..count).step_by(100) {
            let next = count.min(first + 100);
            (first..next).for_each(|number| self.send(number));
            decided(next.into());
            numbers.extend(self.arrived());
        }
        let line = end(program);
        let [packets, lost, ..] = line;
        // The last ones may be on the way.
        let deadline = Instant::now() + support::PATIENCE;
        while numbers.len() < (packets - lost) as usize {
            assert!(Instant::now() < deadline, "{line:?}, but only these have come: {numbers:?}");
            numbers.extend(self.arrived());
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.arrived(), []);
        (numbers, line)
    }
}

fn netem_delays_packets_and_keeps_their_order() {
    let flow = Flow::new(&support::veth());
    let program = start(&["--delay", "150"]);
    let sent: Vec<Instant> = (0..50)
        .map(|number| {
            let now = Instant::now();
            flow.send(number);
            now
        })
        .collect();
    for (number, sent) in (0..).zip(sent) {
        assert_eq!(flow.receive(), number);
        let delay = sent.elapsed();
        assert!(delay >= Duration::from_millis(150), "packet {number} waited {delay:?}");
    }
    assert_eq!(end(program), [50, 0, 0, 0, 0]);
}

fn netem_delays_by_at_least_delay_minus_jitter() {
    let flow = Flow::new(&support::veth());
    let program = start(&["--protocol", "udp", "--delay", "120", "--jitter", "40"]);
    let mut sent = Vec::new();
    for number in 0..50 {
        sent.push(Some(Instant::now()));
        flow.send(number);
    }
    for _ in 0..50 {
        let number = flow.receive();
        let delay = sent[number as usize].take().expect("a packet that has not come yet").elapsed();
        assert!(delay >= Duration::from_millis(80), "packet {number} waited {delay:?}");
    }
    assert_eq!(end(program), [50, 0, 0, 0, 0]);
}

fn netem_loses_what_it_is_told_to_lose() {
    let flow = Flow::new(&support::veth());
    for (percent, least, most) in [("0", 1000, 1000), ("50", 400, 600), ("100", 0, 0)] {
        let program = start(&["--loss", percent, "--interface", "veth0"]);
        let (numbers, line) = flow.through(program, 1000);
        assert!(numbers.is_sorted());
        let arrived = numbers.len() as u32;
        assert!((least..=most).contains(&arrived), "{arrived} of 1000 have arrived, with a loss of {percent} %");
        assert_eq!(line, [1000, 1000 - arrived, 0, 0, 0]);
    }
}

fn netem_loses_the_same_packets_with_the_same_seed() {
    let flow = Flow::new(&support::veth());
    let [first, again, other] =
        ["7", "7", "8"].map(|seed| flow.through(start(&["--loss", "20", "--seed", seed]), 300).0);
    assert_eq!(first, again);
    assert_ne!(first, other);
}

fn netem_sends_packets_twice_at_each_hook() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    left.route_through_near();
    right.route_through_near();
    let families: [[IpAddr; 3]; 2] = [
        [left.far_v4.into(), left.near_v4.into(), right.far_v4.into()],
        [left.far_v6.into(), left.near_v6.into(), right.far_v6.into()],
    ];
    for hook in ["output", "input", "forward"] {
        let flows = families.map(|[client, this, behind]| {
            let sender = match hook {
                "output" => support::udp((this, 0)),
                _ => left.run(|| support::udp((client, 0))),
            };
            let receiver = match hook {
                "input" => support::udp((this, PORT)),
                _ => right.run(|| support::udp((behind, PORT))),
            };
            Flow::between(sender, receiver)
        });
        let program = start(&["--hook", hook, "--duplicate", "100", "--delay", "20"]);
        for flow in flows {
            (0..20).for_each(|number| flow.send(number));
            let mut received: Vec<u32> = (0..40).map(|_| flow.receive()).collect();
            received.sort_unstable();
            assert_eq!(received, (0..40).map(|number| number / 2).collect::<Vec<_>>(), "{hook}");
            assert_eq!(flow.arrived(), [], "{hook}: none comes a third time");
        }
        assert_eq!(end(program), [40, 0, 40, 0, 0], "{hook}");
    }
}

fn netem_reorders_packets() {
    let flow = Flow::new(&support::veth());
    let program = start(&["--delay", "500", "--reorder", "50"]);
    (0..50).for_each(|number| flow.send(number));
    let mut received: Vec<u32> = (0..50).map(|_| flow.receive()).collect();
    assert!(!received.is_sorted(), "{received:?}");
    received.sort_unstable();
    assert_eq!(received, (0..50).collect::<Vec<_>>());
    let [packets, lost, copied, not_delayed, over_limit] = end(program);
    assert_eq!([packets, lost, copied, over_limit], [50, 0, 0, 0]);
    assert!((10..=40).contains(&not_delayed), "{not_delayed} were not delayed");
}

fn netem_drops_what_is_over_the_limit() {
    let flow = Flow::new(&support::veth());
    let program = start(&["--delay", "60000", "--limit", "20"]);
    (0..50).for_each(|number| flow.send(number));
    support::wait_until("30 packets are dropped", || {
        support::queue_line(0).is_some_and(|line| line[2] == 20 && line[7] == 50)
    });
    assert_eq!(end(program), [50, 0, 0, 0, 30]);
    assert_eq!((0..20).map(|_| flow.receive()).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
    assert_eq!(flow.arrived(), []);
}

fn netem_sends_at_its_end_what_waits() {
    let flow = Flow::new(&support::veth());
    let program = start(&["--delay", "3600000", "--duplicate", "100", "--limit", "100"]);
    // When the last one has been dropped, the program has read all the others.
    (0..51).for_each(|number| flow.send(number));
    support::wait_until("50 packets wait", || {
        support::queue_line(0).is_some_and(|line| line[2] == 50 && line[7] == 51)
    });
    assert_eq!(flow.arrived(), []);
    assert_eq!(end(program), [51, 0, 50, 0, 1]);
    let mut received: Vec<u32> = (0..100).map(|_| flow.receive()).collect();
    received.sort_unstable();
    assert_eq!(received, (0..100).map(|number| number / 2).collect::<Vec<_>>());
}

fn netem_breaks_no_tcp_transfer() {
    let peer = support::veth();
    let listener = peer.run(|| TcpListener::bind((peer.far_v4, PORT)).unwrap());
    let options =
        ["--delay", "2", "--jitter", "1", "--loss", "2", "--duplicate", "10", "--reorder", "10", "--protocol", "tcp"];
    let program = start(&options);
    let mut client = TcpStream::connect((peer.far_v4, PORT)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let text: Vec<u8> = (0..100_000_u32).flat_map(|number| number.to_be_bytes()).take(200_000).collect();
    let sending = text.clone();
    let sending = thread::spawn(move || client.write_all(&sending).unwrap());
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    sending.join().unwrap();
    assert!(received == text, "{} bytes have come", received.len());
    let [packets, lost, copied, not_delayed, over_limit] = end(program);
    assert!(packets >= 100 && lost > 0 && copied > 0 && not_delayed > 0, "{packets} {lost} {copied} {not_delayed}");
    assert_eq!(over_limit, 0);
}
