//! `ips`: connections without the pattern leave the queue, those with it are reset.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use nix::sys::signal::Signal;
use socket2::{Domain, Type};
use tokio_nfqueue::edit::Edit;

use super::{
    PORT, Program,
    talk::{Before, LOOPBACKS, Talk},
};
use crate::support;

tests![
    sync ips_lets_clean_connections_leave_the_queue,
    sync ips_resets_both_sides_for_a_pattern_in_two_segments,
    sync ips_judges_incoming_connections,
    sync ips_lets_a_pattern_behind_the_searched_bytes_pass,
    one ips_finds_a_pattern_in_segments_out_of_order,
    one ips_drops_other_bytes_in_the_place_of_earlier_ones,
    one ips_lets_nothing_pass_behind_the_end_of_a_stream,
    one ips_ignores_a_syn_within_a_connection,
    sync ips_forgets_the_oldest_of_too_many_connections,
    sync ips_judges_a_port_that_is_used_again,
];

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
    // All would be more than 800.
    assert!((32..400).contains(&received), "{received} packets came to the queue");
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

/// The server has ignored a segment with FIN, as if its checksum was wrong. What comes in its place
/// is longer.
async fn ips_lets_nothing_pass_behind_the_end_of_a_stream() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        let mut before = Before::new();
        let segment = before.hold(&mut talk, b"an attack").await;
        let mut ending = segment.edit().unwrap();
        ending.replace_payload(b"an ").unwrap();
        let flags = segment.view().unwrap().ip_header().len() + 13;
        let mut ending = ending.finish();
        ending[flags] |= 1;
        before.inject(ending).await;
        before.release(segment).await;
        // The client sends it again, because the server has not received it.
        before.next(b"an attack").await;
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
        before.injector.send(&Edit::new(&syn).unwrap().finish()).await.unwrap();
        let segment = before.hold(&mut talk, b"ack").await;
        before.release(segment).await;
        before.end().await;
        talk.expect_reset();
    }
    end(program, 2, 0, 2);
}

fn ips_forgets_the_oldest_of_too_many_connections() {
    for address in LOOPBACKS {
        let program = start(&["--connections", "2"]);
        let mut connections = Talk::several(address, 3);
        connections.remove(0).passes(b"attack");
        for mut talk in connections {
            talk.client.write_all(b"attack").unwrap();
            talk.expect_reset();
        }
        end(program, 3, 0, 2);
    }
}

fn ips_judges_a_port_that_is_used_again() {
    let program = start(&["--bytes", "9"]);
    for address in LOOPBACKS {
        let listener = TcpListener::bind((address, PORT)).unwrap();
        let mut client_address = None;
        for _ in 0..3 {
            let client = connect_from(client_address, listener.local_addr().unwrap());
            client_address = Some(client.local_addr().unwrap());
            let mut talk = Talk::new(client, &listener);
            talk.passes(b"some text");
            // This says what the server has received.
            talk.replies(b"reply");
            let Talk { client, mut server } = talk;
            drop(client);
            assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        let client = connect_from(client_address, listener.local_addr().unwrap());
        let mut talk = Talk::new(client, &listener);
        talk.client.write_all(b"attack").unwrap();
        talk.expect_reset();
    }
    end(program, 8, 6, 2);
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
