//! `sni_filter`: blocked names do not reach a server that would accept them, and other connections
//! leave the queue.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
};

use nfqueue_inspect::quic::seal_initial;
use nix::sys::signal::Signal;

use super::{
    PORT, Program,
    talk::{Before, LOOPBACKS, Talk},
};
use crate::support::{self, PATIENCE, VethOptions};

tests![
    sync sni_filter_lets_clean_connections_leave_the_queue,
    sync sni_filter_blocks_a_name_and_names_below,
    sync sni_filter_blocks_a_name_split_over_segments_and_records,
    one sni_filter_blocks_a_name_in_segments_out_of_order,
    one sni_filter_drops_a_blocked_name_in_the_place_of_another,
    sync sni_filter_judges_an_encrypted_hello_by_its_outer_name,
    sync sni_filter_accepts_connections_without_a_name,
    sync sni_filter_resets_what_it_cannot_judge,
    sync sni_filter_judges_forwarded_connections,
    sync sni_filter_leaves_hosts_behind_other_interfaces_alone,
    sync sni_filter_judges_single_hosts,
    sync sni_filter_blocks_quic,
];

fn start(options: &[&str]) -> Program {
    let mut program =
        Program::start("sni_filter", &[&["--port", "9000", "--block", "blocked.example"], options].concat());
    program.until_ready();
    program
}

/// Ends the program, which must report these numbers. Returns how many packets it has received.
fn end(program: Program, allowed: u32, blocked: u32) -> u32 {
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    let (received, rest) = output.strip_prefix("received ").unwrap().split_once(' ').unwrap();
    assert_eq!(rest, format!("allowed {allowed} blocked {blocked} lost 0\n"));
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
    received.parse().unwrap()
}

fn sni_filter_lets_clean_connections_leave_the_queue() {
    let program = start(&[]);
    let mut connections: Vec<Talk> = LOOPBACKS.into_iter().flat_map(|address| Talk::several(address, 4)).collect();
    let hello = hello("clean.example");
    let (first, second) = hello.split_at(70);
    for text in [first, second] {
        connections.iter_mut().for_each(|talk| talk.passes(text));
    }
    for _ in 0..50 {
        for talk in &mut connections {
            talk.replies(b"certificates");
            talk.passes(b"data");
        }
    }
    let received = end(program, 8, 0);
    // The handshake, two segments, the reply and their acknowledgements: about ten of each.
    assert!((40..200).contains(&received), "{received} packets came to the queue");
}

fn sni_filter_blocks_a_name_and_names_below() {
    let program = start(&["--block", "Other.Example."]);
    for address in LOOPBACKS {
        for name in ["blocked.example", "BLOCKED.Example.", "a.b.blocked.example", "other.example"] {
            let mut talk = Talk::several(address, 1).remove(0);
            talk.client.write_all(&hello(name)).unwrap();
            expect_nothing(&talk);
            talk.expect_reset();
        }
        for name in ["example", "notblocked.example", "blocked.example.org", "www.example"] {
            let mut talk = Talk::several(address, 1).remove(0);
            talk.passes(&hello(name));
            talk.replies(b"certificates");
        }
    }
    end(program, 8, 8);
}

fn sni_filter_blocks_a_name_split_over_segments_and_records() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let whole = hello("www.blocked.example");
        for (hello, length) in [(&whole, 1), (&whole, 7), (&whole, 100), (&records(&whole[5..], 20), 30)] {
            let mut talk = Talk::several(address, 1).remove(0);
            // The client may be reset while it still sends.
            let sent = hello.chunks(length).try_for_each(|segment| talk.client.write_all(segment));
            if sent.is_ok() {
                assert_eq!(talk.client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
            }
            talk.server.set_nonblocking(true).unwrap();
            let mut received = Vec::new();
            let error = talk.server.read_to_end(&mut received).unwrap_err().kind();
            // It is reset if it acknowledges what it has received.
            assert!(matches!(error, ErrorKind::WouldBlock | ErrorKind::ConnectionReset), "{error}");
            assert!(hello.starts_with(&received) && received.len() < hello.len(), "{length}: {received:?}");
        }
    }
    end(program, 0, 8);
}

async fn sni_filter_blocks_a_name_in_segments_out_of_order() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        let mut before = Before::new();
        let hello = hello("blocked.example");
        let (first, second) = hello.split_at(hello.len() / 2);
        let [first_held, second_held] = [before.hold(&mut talk, first).await, before.hold(&mut talk, second).await];
        before.release(second_held).await;
        before.release(first_held).await;
        let again = before.next(second).await;
        before.release(again).await;
        before.end().await;
        talk.receives(first);
        talk.expect_reset();
    }
    end(program, 0, 2);
}

/// The server ignores the first copy of a segment, as if its checksum was wrong, and the second one
/// has another name.
async fn sni_filter_drops_a_blocked_name_in_the_place_of_another() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        let mut before = Before::new();
        let blocked = hello("blocked.example");
        let segment = before.hold(&mut talk, &blocked).await;
        let mut clean = segment.edit().unwrap();
        clean.replace_payload(&hello("another.example")).unwrap();
        before.inject(clean.finish()).await;
        before.release(segment).await;
        // The client sends it again, because the server has not received it.
        before.next(&blocked).await;
        expect_nothing(&talk);
        before.end().await;
    }
    end(program, 2, 0);
}

fn sni_filter_judges_an_encrypted_hello_by_its_outer_name() {
    let program = start(&[]);
    for address in LOOPBACKS {
        for (outer, is_blocked) in [("blocked.example", true), ("provider.example", false)] {
            let hello = hello_with(&[(0xfe0d, vec![0; 200]), server_name(outer)]);
            let mut talk = Talk::several(address, 1).remove(0);
            if is_blocked {
                talk.client.write_all(&hello).unwrap();
                talk.expect_reset();
            } else {
                talk.passes(&hello);
            }
        }
    }
    end(program, 2, 2);
}

fn sni_filter_accepts_connections_without_a_name() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let [mut hello, mut other, mut http, mut speaks_first] = four(address);
        hello.passes(&hello_with(&[]));
        other.passes(b"SSH-2.0-client\r\n");
        http.passes(b"GET / HTTP/1.1\r\nHost: www.example\r\n\r\n");
        speaks_first.replies(b"220 mail.example\r\n");
        speaks_first.passes(b"EHLO blocked.example\r\n");
        for mut talk in [hello, other, http, speaks_first] {
            talk.replies(b"reply");
        }
    }
    end(program, 8, 0);
}

fn sni_filter_resets_what_it_cannot_judge() {
    for address in LOOPBACKS {
        let mut earlier = Talk::several(address, 1).remove(0);
        earlier.passes(b"something");
        let program = start(&[]);
        earlier.client.write_all(b"more").unwrap();
        earlier.expect_reset();
        let [mut twice, mut malformed, mut cut, mut http] = four(address);
        twice.client.write_all(&hello_with(&[server_name("a.example"), server_name("b.example")])).unwrap();
        malformed.client.write_all(&hello("not a name")).unwrap();
        cut.passes(&hello("a.example")[..60]);
        cut.client.shutdown(std::net::Shutdown::Write).unwrap();
        http.client.write_all(b"GET / HTTP/1.1\r\nHost: blocked.example\r\n\r\n").unwrap();
        for talk in [twice, malformed, http, cut] {
            talk.expect_reset();
        }
        end(program, 0, 4);
    }
}

fn sni_filter_judges_forwarded_connections() {
    let [left, right] = routed();
    let program = start(&["--clients", &left.near]);
    for server in [IpAddr::from(right.far_v4), right.far_v6.into()] {
        let listener = right.run(|| TcpListener::bind((server, PORT)).unwrap());
        let connect = || Talk::new(left.run(|| TcpStream::connect((server, PORT)).unwrap()), &listener);
        let (mut clean, mut blocked) = (connect(), connect());
        blocked.client.write_all(&hello("blocked.example")).unwrap();
        expect_nothing(&blocked);
        blocked.expect_reset();
        clean.passes(&hello("clean.example"));
        for _ in 0..50 {
            clean.replies(b"reply");
            clean.passes(b"data");
        }
        // Not what the interface's hosts send.
        let mut own = Talk::new(TcpStream::connect((server, PORT)).unwrap(), &listener);
        own.passes(&hello("blocked.example"));
    }
    let received = end(program, 2, 2);
    assert!(received < 80, "{received} packets came to the queue");
}

fn sni_filter_leaves_hosts_behind_other_interfaces_alone() {
    let hosts = routed();
    for server in [IpAddr::from(hosts[2].far_v4), hosts[2].far_v6.into()] {
        filters_the_first_only(&hosts, server, &["--clients", &hosts[0].near]);
    }
}

fn sni_filter_judges_single_hosts() {
    let hosts = routed();
    let (v4, v6) = (hosts[0].far_v4.to_string(), hosts[0].far_v6.to_string());
    for server in [IpAddr::from(hosts[2].far_v4), hosts[2].far_v6.into()] {
        filters_the_first_only(&hosts, server, &["--client", &v4, "--client", &v6]);
    }
}

/// Of the connections to a server behind the third host, those of the second one are not touched.
fn filters_the_first_only([filtered, other, right]: &[support::Peer; 3], server: IpAddr, options: &[&str]) {
    let listener = right.run(|| TcpListener::bind((server, PORT)).unwrap());
    let address = (server, PORT).into();
    let connect = |from: &support::Peer| {
        let client = from.run(|| TcpStream::connect_timeout(&address, PATIENCE).unwrap());
        Talk::new(client, &listener)
    };
    let mut old = connect(other);
    old.passes(b"something");
    let program = start(options);
    old.replies(b"reply");
    old.passes(b"more");
    let mut new = connect(other);
    new.passes(&hello("blocked.example"));
    new.replies(b"reply");
    let (mut clean, mut blocked) = (connect(filtered), connect(filtered));
    clean.passes(&hello("clean.example"));
    clean.replies(b"reply");
    blocked.client.write_all(&hello("blocked.example")).unwrap();
    blocked.expect_reset();
    end(program, 1, 1);
}

fn sni_filter_blocks_quic() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let (client, server) = (support::udp((address, 0)), support::udp((address, PORT)));
        client.connect(server.local_addr().unwrap()).unwrap();
        let passes = |datagram: &[u8]| {
            client.send(datagram).unwrap();
            let mut received = [0; 2048];
            let length = server.recv(&mut received).unwrap();
            assert_eq!(&received[..length], datagram);
        };
        let is_blocked = |client: &UdpSocket, datagram: &[u8]| {
            client.send(datagram).unwrap();
            assert_eq!(client.recv(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            server.set_nonblocking(true).unwrap();
            assert_eq!(server.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
            server.set_nonblocking(false).unwrap();
        };
        passes(&initial(b"first id", "clean.example"));
        // A packet with a short header, and another connection on the same ports.
        passes(&[0x40; 30]);
        is_blocked(&client, &initial(b"other id", "www.blocked.example"));
        passes(&[0x40; 30]);
        // One whose first packets were not seen.
        let unknown = support::udp((address, 0));
        unknown.connect(server.local_addr().unwrap()).unwrap();
        is_blocked(&unknown, &[0x40; 30]);
    }
    assert_eq!(end(program, 2, 2), 10);
}

/// Hosts that reach each other through this one.
fn routed<const N: usize>() -> [support::Peer; N] {
    let hosts = std::array::from_fn(|number| {
        support::veth_with(&VethOptions { index: number as u8 + 1, ..VethOptions::default() })
    });
    support::forwarding();
    hosts.iter().for_each(|host: &support::Peer| host.route_through_near());
    hosts
}

fn four(address: IpAddr) -> [Talk; 4] {
    Talk::several(address, 4).try_into().unwrap_or_else(|_| unreachable!())
}

/// The server has received nothing.
fn expect_nothing(talk: &Talk) {
    talk.server.set_nonblocking(true).unwrap();
    assert_eq!((&talk.server).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    talk.server.set_nonblocking(false).unwrap();
}

/// The first bytes of a TLS client that names this server.
fn hello(name: &str) -> Vec<u8> {
    // The first extension is of those that have no meaning (RFC 8701).
    hello_with(&[(0x0a0a, vec![]), server_name(name), (43, vec![2, 3, 4])])
}

fn server_name(name: &str) -> (u16, Vec<u8>) {
    let length = |more: u16| (name.len() as u16 + more).to_be_bytes();
    (0, [&length(3)[..], &[0], &length(0), name.as_bytes()].concat())
}

/// A ClientHello with these extensions (RFC 8446, section 4.1.2), in a record.
fn hello_with(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let extension = |(kind, content): &(u16, Vec<u8>)| {
        [&kind.to_be_bytes()[..], &(content.len() as u16).to_be_bytes(), content].concat()
    };
    let extensions = extensions.iter().flat_map(extension).collect::<Vec<u8>>();
    let suites_and_methods = [0, 0, 4, 0x13, 1, 0x13, 2, 1, 0];
    let body = [&[3, 3][..], &[7; 32], &suites_and_methods, &(extensions.len() as u16).to_be_bytes(), &extensions];
    let body = body.concat();
    records(&[&[1, 0][..], &(body.len() as u16).to_be_bytes(), &body].concat(), 1 << 14)
}

/// The bytes in TLS records of up to `length` bytes.
fn records(bytes: &[u8], length: usize) -> Vec<u8> {
    let record = |piece: &[u8]| [&[22, 3, 1][..], &(piece.len() as u16).to_be_bytes(), piece].concat();
    bytes.chunks(length).flat_map(record).collect()
}

/// The first datagram of a QUIC client that names this server: a CRYPTO frame, and padding.
fn initial(id: &[u8], name: &str) -> Vec<u8> {
    let hello = &hello(name)[5..];
    let mut frames = [&[6, 0][..], &(0x4000 | hello.len() as u16).to_be_bytes(), hello].concat();
    frames.resize(1150, 0);
    seal_initial(false, id, id, 0, &frames)
}
