//! `ips`: connections without the pattern leave the queue, those with it are reset.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use nfqueue_divert::Divert;
use nix::sys::signal::Signal;
use socket2::{Domain, Type};
use tokio_nfqueue::{Action, Hook, Packet, Protocol, Queue, Rule, edit::Edit, inject::Injector};

use super::{PORT, Program};
use crate::{common, support};

tests![
    sync ips_lets_clean_connections_leave_the_queue,
    sync ips_resets_both_sides_for_a_pattern_in_two_segments,
    sync ips_judges_incoming_connections,
    sync ips_lets_a_pattern_behind_the_searched_bytes_pass,
    one ips_finds_a_pattern_in_segments_out_of_order,
    one ips_drops_other_bytes_in_the_place_of_earlier_ones,
    one ips_ignores_a_syn_within_a_connection,
    sync ips_forgets_the_oldest_of_too_many_connections,
    sync ips_judges_a_port_that_is_used_again,
];

const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn start(options: &[&str]) -> Program {
    let mut program = Program::start("ips", &[&["--port", "9000", "--pattern", "attack"], options].concat());
    program.until_ready();
    program
}

/// Ends the program, which must report these numbers. Returns how many packets it has received.
fn end(program: Program, connections: u32, clean: u32, bad: u32) -> u32 {
    let (status, output) = program.end(Signal::SIGINT);
    assert!(status.success(), "{status}");
    let (received, rest) = output.strip_prefix("received ").unwrap().split_once(' ').unwrap();
    assert_eq!(rest, format!("connections {connections} clean {clean} bad {bad} lost 0\n"));
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
    received.parse().unwrap()
}

fn ips_lets_clean_connections_leave_the_queue() {
    let program = start(&["--bytes", "100"]);
    let mut connections: Vec<Talk> = LOOPBACKS.into_iter().flat_map(|address| Talk::several(address, 4)).collect();
    // The first 100 bytes of each.
    for text in [[b'a'; 60], [b'b'; 60]] {
        connections.iter_mut().for_each(|talk| talk.passes(&text));
    }
    for _ in 0..50 {
        for talk in &mut connections {
            talk.passes(b"attack");
            talk.replies(b"attack");
        }
    }
    let received = end(program, 8, 8, 0);
    // SYN, ACK and two segments of each, and perhaps some more if the client has sent them again.
    assert!((32..100).contains(&received), "{received} packets came to the queue");
}

fn ips_resets_both_sides_for_a_pattern_in_two_segments() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut connections = Talk::several(address, 4);
        connections.iter_mut().for_each(|talk| talk.passes(b"an att"));
        let clean = connections.split_off(2);
        for talk in &mut connections {
            talk.client.write_all(b"ack").unwrap();
        }
        connections.into_iter().for_each(Talk::expect_reset);
        for mut talk in clean {
            talk.passes(b"empt");
            talk.replies(b"reply");
        }
    }
    end(program, 8, 0, 4);
}

fn ips_judges_incoming_connections() {
    let peer = support::veth();
    let program = start(&["--bytes", "8"]);
    for address in [IpAddr::from(peer.near_v4), IpAddr::from(peer.near_v6)] {
        let listener = TcpListener::bind((address, PORT)).unwrap();
        let connect = || Talk::new(peer.run(|| TcpStream::connect((address, PORT)).unwrap()), &listener);
        let (mut clean, mut bad) = (connect(), connect());
        clean.passes(b"12345678");
        clean.passes(b"attack");
        clean.replies(b"attack");
        bad.passes(b"at");
        bad.client.write_all(b"tack").unwrap();
        bad.expect_reset();
    }
    end(program, 4, 2, 2);
}

fn ips_lets_a_pattern_behind_the_searched_bytes_pass() {
    let program = start(&["--bytes", "10"]);
    for address in LOOPBACKS {
        let [mut within, mut across] = Talk::several(address, 2).try_into().unwrap_or_else(|_| unreachable!());
        within.client.write_all(b"1234attack").unwrap();
        within.expect_reset();
        across.passes(b"12345attack");
    }
    end(program, 4, 2, 2);
}

async fn ips_finds_a_pattern_in_segments_out_of_order() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        talk.passes(b"an ");
        let mut before = Before::new();
        let (first, second) = (before.hold(&mut talk, b"att").await, before.hold(&mut talk, b"ack").await);
        before.release(second).await;
        before.release(first).await;
        let again = before.next(b"ack").await;
        before.release(again).await;
        before.end().await;
        talk.receives(b"att");
        talk.expect_reset();
    }
    end(program, 2, 0, 2);
}

async fn ips_drops_other_bytes_in_the_place_of_earlier_ones() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        talk.passes(b"an ");
        let mut before = Before::new();
        let segment = before.hold(&mut talk, b"att").await;
        let mut other = segment.edit().unwrap();
        other.replace_payload(b"emp").unwrap();
        before.inject(other.finish()).await;
        before.release(segment).await;
        // The client sends it again, because the server has not received it.
        before.next(b"att").await;
        talk.server.set_nonblocking(true).unwrap();
        assert_eq!(talk.server.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        before.end().await;
    }
    end(program, 2, 0, 0);
}

async fn ips_ignores_a_syn_within_a_connection() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        talk.passes(b"an ");
        let mut before = Before::new();
        let segment = before.hold(&mut talk, b"att").await;
        let mut syn = segment.edit().unwrap();
        let next = syn.view().tcp().unwrap().sequence_number.wrapping_add(3);
        syn.replace_payload(b"").unwrap();
        let tcp = syn.view().ip_header().len();
        let mut syn = syn.finish();
        syn[tcp + 4..tcp + 8].copy_from_slice(&next.wrapping_sub(1).to_be_bytes());
        syn[tcp + 13] = 0x02;
        before.release(segment).await;
        talk.receives(b"att");
        before.inject(Edit::new(&syn).unwrap().finish()).await;
        let segment = before.hold(&mut talk, b"ack").await;
        before.release(segment).await;
        before.end().await;
        talk.expect_reset();
    }
    end(program, 2, 0, 2);
}

/// A queue before the program's, and an injector whose packets the program gets, but the server
/// does not.
struct Before {
    queue: Queue,
    injector: Injector,
    rules: Divert,
}

impl Before {
    const MARK: u32 = 0x50;

    fn new() -> Self {
        let queue = common::bind_now(Queue::builder(5).gso(false));
        let injector = Injector::builder().mark(Self::MARK).bind().unwrap();
        let to_port = |hook| Rule::new(hook).protocol(Protocol::Tcp).destination_port(PORT);
        let held = to_port(Hook::Output).priority(-10).unless_mark(Self::MARK, u32::MAX).to_queue(5);
        let injected = to_port(Hook::Input).mark(Self::MARK, u32::MAX).drop();
        Self { queue, injector, rules: common::divert([injected, held]) }
    }

    /// The client sends a segment, which is held.
    async fn hold(&mut self, talk: &mut Talk, text: &[u8]) -> Packet {
        talk.client.write_all(text).unwrap();
        self.next(text).await
    }

    /// The next packet with this text. Others are acknowledgements, or come again.
    async fn next(&mut self, text: &[u8]) -> Packet {
        loop {
            let packet = common::next(&mut self.queue).await;
            if packet.view().unwrap().payload() == Some(text) {
                return packet;
            }
            self.release(packet).await;
        }
    }

    /// Sends the packet on to the program's queue.
    async fn release(&self, packet: Packet) {
        common::soon("the acknowledgement", packet.accept().confirm()).await.unwrap();
    }

    /// Sends a packet, and waits until the program has accepted it.
    async fn inject(&self, packet: Vec<u8>) {
        self.injector.send(&packet).await.unwrap();
        common::eventually("the program accepts it", || self.rules.counters().unwrap()[0].packets == 1).await;
    }

    /// Packets that come now are accepted.
    async fn end(self) {
        self.rules.remove_rules().unwrap();
        self.queue.sink().close_with(Action::Accept).await.unwrap();
    }
}

fn ips_forgets_the_oldest_of_too_many_connections() {
    let program = start(&["--connections", "2"]);
    for address in LOOPBACKS {
        let mut connections = Talk::several(address, 3);
        connections.remove(0).passes(b"attack");
        for mut talk in connections {
            talk.client.write_all(b"attack").unwrap();
            talk.expect_reset();
        }
    }
    end(program, 6, 0, 4);
}

fn ips_judges_a_port_that_is_used_again() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let listener = TcpListener::bind((address, PORT)).unwrap();
        let mut client_address = None;
        for _ in 0..3 {
            let client = connect_from(client_address, listener.local_addr().unwrap());
            client_address = Some(client.local_addr().unwrap());
            let mut talk = Talk::new(client, &listener);
            talk.passes(b"some text");
            let Talk { client, mut server } = talk;
            drop(client);
            assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        let client = connect_from(client_address, listener.local_addr().unwrap());
        let mut talk = Talk::new(client, &listener);
        talk.client.write_all(b"attack").unwrap();
        talk.expect_reset();
    }
    end(program, 8, 0, 2);
}

/// Connects from this address if there is one. When the stream is dropped, it resets the
/// connection, and the port is free at once.
fn connect_from(from: Option<SocketAddr>, to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    if let Some(from) = from {
        socket.bind(&from.into()).unwrap();
    }
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// Both sides of a connection.
struct Talk {
    client: TcpStream,
    server: TcpStream,
}

impl Talk {
    /// Connections to this address.
    fn several(address: IpAddr, count: usize) -> Vec<Self> {
        let listener = TcpListener::bind((address, PORT)).unwrap();
        let connect = |_| Self::new(TcpStream::connect((address, PORT)).unwrap(), &listener);
        (0..count).map(connect).collect()
    }

    fn new(client: TcpStream, listener: &TcpListener) -> Self {
        let (server, from) = listener.accept().unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        }
        Self { client, server }
    }

    fn passes(&mut self, text: &[u8]) {
        transfer(&mut self.client, &mut self.server, text);
    }

    /// The server receives what the client has sent.
    fn receives(&mut self, text: &[u8]) {
        let mut received = vec![0; text.len()];
        self.server.read_exact(&mut received).unwrap();
        assert_eq!(received, text);
    }

    fn replies(&mut self, text: &[u8]) {
        transfer(&mut self.server, &mut self.client, text);
    }

    /// The client is reset, and the server when it sends. The server has nothing to read.
    fn expect_reset(mut self) {
        assert_eq!(self.client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        self.server.write_all(b"reply").unwrap();
        assert_eq!(self.server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

fn transfer(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
    from.write_all(text).unwrap();
    let mut received = vec![0; text.len()];
    to.read_exact(&mut received).unwrap();
    assert_eq!(received, text);
}
