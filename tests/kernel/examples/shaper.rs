//! `shaper`: what passes in a time is bounded for each source, and what the program remembers is
//! bounded too. A lower bound of a speed is never asserted.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{PORT, Program, introduce};
use crate::support::{self, Peer};

tests![
    sync shaper_limits_a_source_above_its_rate_and_no_other,
    sync shaper_limits_ipv6_sources_by_their_network,
    sync shaper_limits_a_tcp_transfer,
    sync shaper_remembers_no_more_sources_than_it_may,
    sync shaper_forgets_idle_sources,
    sync shaper_lets_pass_at_its_end_what_waits,
    sync shaper_drops_what_waits_above_the_limit_of_all_sources,
];

fn start(options: &[&str]) -> Program {
    let mut program = Program::start("shaper", &[&["--port", "9000"], options].concat());
    program.until_ready();
    program
}

/// What the program's line says.
#[derive(Debug)]
struct Line {
    packets: u32,
    passed: u32,
    waited: u32,
    dropped: u32,
    most_sources: u32,
    shared: u32,
}

fn end(program: Program) -> Line {
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert_eq!(output.lines().count(), 1, "{output}");
    assert!(output.ends_with(" 0 packets lost unseen\n"), "{output}");
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
    let mut numbers = output.split(|c: char| !c.is_ascii_digit()).filter_map(|text| text.parse::<u32>().ok());
    let mut next = || numbers.next().unwrap_or_else(|| panic!("{output}"));
    let (packets, at_once, waited) = (next(), next(), next());
    let line =
        Line { packets, passed: at_once + waited, waited, dropped: next(), most_sources: next(), shared: next() };
    assert_eq!(line.packets, line.passed + line.dropped, "{output}");
    line
}

/// Waits until so many packets have come to the queue, and so many of them wait.
fn queued(packets: u64, waiting: u64) {
    support::wait_until("the packets are decided", || {
        support::queue_line(0).is_some_and(|line| line[2] == waiting && line[7] == packets)
    });
}

/// What passes at most in this time, in bytes.
fn at_most(rate: u32, burst: u32, time: Duration) -> f64 {
    f64::from(rate) * time.as_secs_f64() + f64::from(burst)
}

/// A socket of the other namespace, at an address of its own.
fn sender(peer: &Peer, address: impl Into<IpAddr>, receiver: &UdpSocket) -> UdpSocket {
    let address = address.into();
    let socket = peer.run(|| {
        if address != IpAddr::from(peer.far_v4) && address != IpAddr::from(peer.far_v6) {
            support::add_address(&peer.far, address, if address.is_ipv4() { 24 } else { 64 });
        }
        support::udp((address, 0))
    });
    socket.connect(receiver.local_addr().unwrap()).unwrap();
    introduce(&socket, receiver);
    socket
}

/// Receives so many datagrams; returns how many are from each source.
fn received(receiver: &UdpSocket, count: u32) -> HashMap<IpAddr, u32> {
    let mut sources = HashMap::new();
    for _ in 0..count {
        let (_, source) = receiver.recv_from(&mut [0; 2048]).unwrap();
        *sources.entry(source.ip()).or_default() += 1;
    }
    sources
}

fn shaper_limits_a_source_above_its_rate_and_no_other() {
    let peer = support::veth();
    let (fast, slow) = (peer.far_v4, Ipv4Addr::new(10, 9, 0, 3));
    let receiver = support::udp((peer.near_v4, PORT));
    let [fast_sender, slow_sender] = [fast, slow].map(|address| sender(&peer, address, &receiver));
    // With the headers, 1000 bytes and 100.
    let program = start(&["--rate", "20000", "--burst", "10000", "--queue", "20000"]);
    let begin = Instant::now();
    for number in 0..150 {
        fast_sender.send(&[1; 972]).unwrap();
        if number % 3 == 0 {
            slow_sender.send(&[2; 72]).unwrap();
        }
    }
    queued(200, 0);
    let time = begin.elapsed();
    let line = end(program);
    assert_eq!((line.packets, line.most_sources, line.shared), (200, 2, 0), "{line:?}");
    let sources = received(&receiver, line.passed);
    assert_eq!(sources[&slow.into()], 50, "the slow source loses nothing");
    let passed = sources[&fast.into()];
    assert!(f64::from(passed * 1000) <= at_most(20_000, 10_000, time), "{passed} packets in {time:?}");
    // A full bucket, and what waits.
    assert!(passed >= 29 && line.waited >= 19, "{passed} packets, {line:?}");
}

fn shaper_limits_ipv6_sources_by_their_network() {
    let peer = support::veth();
    let other = |host| Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, host);
    let receiver = support::udp((peer.near_v6, PORT));
    let senders = [3, 4, 5].map(|host| sender(&peer, other(host), &receiver));
    let program = start(&["--rate", "1000", "--burst", "2000", "--queue", "0"]);
    let begin = Instant::now();
    for _ in 0..30 {
        // With the headers, 500 bytes.
        senders.iter().for_each(|sender| _ = sender.send(&[1; 452]).unwrap());
    }
    queued(90, 0);
    let time = begin.elapsed();
    let line = end(program);
    assert_eq!((line.packets, line.waited, line.most_sources), (90, 0, 1), "{line:?}");
    assert!(f64::from(line.passed * 500) <= at_most(1000, 2000, time), "{} packets in {time:?}", line.passed);
    received(&receiver, line.passed);
}

fn shaper_limits_a_tcp_transfer() {
    let peer = support::veth();
    let listener = TcpListener::bind((peer.near_v4, PORT)).unwrap();
    let program = start(&["--rate", "100000", "--burst", "20000", "--queue", "30000"]);
    let to = peer.near_v4;
    let begin = Instant::now();
    let sending = peer.spawn(move || TcpStream::connect((to, PORT)).unwrap().write_all(&[7; 120_000]).unwrap());
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    server.read_to_end(&mut bytes).unwrap();
    let time = begin.elapsed();
    sending.join().unwrap();
    assert!(bytes == [7; 120_000], "{} bytes", bytes.len());
    assert!(120_000.0 <= at_most(100_000, 20_000, time), "120000 bytes in {time:?}");
    assert!(end(program).waited > 0);
}

fn shaper_remembers_no_more_sources_than_it_may() {
    let peer = support::veth();
    let receiver = support::udp((peer.near_v4, PORT));
    sender(&peer, peer.far_v4, &receiver);
    let program = start(&["--rate", "100", "--burst", "150", "--queue", "0", "--sources", "16"]);
    let begin = Instant::now();
    peer.run(|| {
        let socket = support::raw_ipv4();
        for host in 3..203 {
            let packet = forged(Ipv4Addr::new(10, 9, 0, host), peer.near_v4);
            support::send_raw_ipv4(&socket, &packet, peer.near_v4).unwrap();
        }
    });
    queued(200, 0);
    let time = begin.elapsed();
    let line = end(program);
    assert_eq!((line.packets, line.most_sources), (200, 16), "{line:?}");
    assert!(line.shared > 0, "{line:?}");
    // 16 sources, and the further ones as one.
    let most = 17.0 * at_most(100, 150, time);
    assert!(f64::from(line.passed * 100) <= most, "{} packets in {time:?}", line.passed);
    assert!(line.passed >= 17, "each of them sends its first packet: {line:?}");
    assert_eq!(received(&receiver, line.passed).len() as u32, line.passed);
}

/// A datagram of 100 bytes with this source address.
fn forged(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    // The kernel fills in what is 0 of the IPv4 header, and UDP may have no checksum.
    let mut packet = vec![0x45, 0, 0, 100, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    for number in [4000, PORT, 80, 0] {
        packet.extend(number.to_be_bytes());
    }
    packet.resize(100, 0);
    packet
}

fn shaper_forgets_idle_sources() {
    let peer = support::veth();
    let receiver = support::udp((peer.near_v4, PORT));
    let senders = [2, 3, 4].map(|host| sender(&peer, Ipv4Addr::new(10, 9, 0, host), &receiver));
    // The program looks for idle sources once a second, or later on a busy machine.
    let forgotten = |pause: u64| {
        let program = start(&["--rate", "1000000", "--sources", "2"]);
        senders[..2].iter().for_each(|sender| _ = sender.send(b"text").unwrap());
        queued(2, 0);
        thread::sleep(Duration::from_secs(pause));
        senders[2].send(b"text").unwrap();
        queued(3, 0);
        let line = end(program);
        // One at a time, if it is a second until the next one.
        assert!(line.passed == 3 && (1..=2).contains(&line.most_sources), "{line:?}");
        received(&receiver, 3);
        line.shared == 0
    };
    assert!([0, 2, 8, 16].into_iter().any(forgotten), "the third source has had no place in the table");
}

fn shaper_lets_pass_at_its_end_what_waits() {
    let peer = support::veth();
    let receiver = support::udp((peer.near_v4, PORT));
    let senders = [2, 3].map(|host| sender(&peer, Ipv4Addr::new(10, 9, 0, host), &receiver));
    let program = start(&["--rate", "1", "--burst", "100", "--queue", "10000"]);
    // With the headers, 100 bytes.
    (0..50_u8).for_each(|number| _ = senders[0].send(&[number; 72]).unwrap());
    // When this one has passed, the program has read all the others.
    senders[1].send(&[255; 72]).unwrap();
    queued(51, 49);
    let line = end(program);
    assert_eq!((line.passed, line.waited), (51, 49), "{line:?}");
    // The two that did not wait are the first.
    for number in [0, 255].into_iter().chain(1..50) {
        let mut datagram = [0; 100];
        receiver.recv(&mut datagram).unwrap();
        assert_eq!(datagram[0], number);
    }
}

fn shaper_drops_what_waits_above_the_limit_of_all_sources() {
    let peer = support::veth();
    let receiver = support::udp((peer.near_v4, PORT));
    let senders = [2, 3].map(|host| sender(&peer, Ipv4Addr::new(10, 9, 0, host), &receiver));
    let program = start(&["--rate", "1", "--burst", "100", "--queue", "10000", "--packets", "20"]);
    (0..30).for_each(|_| _ = senders[0].send(&[1; 72]).unwrap());
    queued(30, 20);
    // What need not wait passes.
    senders[1].send(&[2; 72]).unwrap();
    queued(31, 20);
    let line = end(program);
    assert_eq!((line.passed, line.waited, line.dropped), (22, 20, 9), "{line:?}");
    let sources = received(&receiver, 22);
    assert_eq!(sources[&Ipv4Addr::new(10, 9, 0, 3).into()], 1);
}
