//! `sni_filter`: blocked names do not reach a server that would accept them, and other connections
//! leave the queue.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use nfqueue_inspect::quic::seal_initial;
use nix::sys::signal::Signal;
use socket2::{Domain, Protocol, Socket, Type};

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
    sync sni_filter_blocks_a_name_behind_records_that_some_servers_skip,
    sync sni_filter_blocks_a_name_in_the_second_hello,
    sync sni_filter_lets_no_connection_have_several_paths,
    sync sni_filter_blocks_quic_whose_hello_comes_from_two_ports,
    sync sni_filter_blocks_quic_by_the_name_in_its_second_hello,
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
    // The handshake, two segments, the reply and their acknowledgements: about ten of each, and
    // some more if they are sent again. All would be more than 800.
    assert!((40..400).contains(&received), "{received} packets came to the queue");
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
    // All would be more than 200.
    assert!(received < 150, "{received} packets came to the queue");
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
        // A connection ID belongs to one pair of ports.
        let [first, other] = if address.is_ipv4() { [b"first id", b"other id"] } else { [b"third id", b"later id"] };
        passes(&initial(first, "clean.example"));
        // A packet with a short header, and another connection on the same ports.
        passes(&[0x40; 30]);
        is_blocked(&client, &initial(other, "www.blocked.example"));
        passes(&[0x40; 30]);
        // One whose first packets were not seen.
        let unknown = support::udp((address, 0));
        unknown.connect(server.local_addr().unwrap()).unwrap();
        is_blocked(&unknown, &[0x40; 30]);
    }
    assert_eq!(end(program, 2, 2), 10);
}

/// Go skips alerts, GnuTLS skips ChangeCipherSpec, and both are satisfied with older records.
fn sni_filter_blocks_a_name_behind_records_that_some_servers_skip() {
    let program = start(&[]);
    let hello = hello("blocked.example");
    let mut old = hello.clone();
    old[1] = 2;
    let streams = [[&[21, 3, 1, 0, 2, 1, 90][..], &hello].concat(), [&[20, 3, 3, 0, 1, 1][..], &hello].concat(), old];
    for address in LOOPBACKS {
        for (mut talk, stream) in Talk::several(address, streams.len()).into_iter().zip(&streams) {
            talk.client.write_all(stream).unwrap();
            talk.expect_reset();
        }
    }
    end(program, 0, 6);
}

/// OpenSSL and GnuTLS take the second name, also if it is another one.
fn sni_filter_blocks_a_name_in_the_second_hello() {
    let program = start(&[]);
    let mut retry = vec![22, 3, 3, 0, 88, 2, 0, 0, 84, 3, 3];
    retry.extend([0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91]);
    retry.extend([0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c]);
    retry.resize(93, 0);
    let (clean, blocked) = (hello("clean.example"), hello("blocked.example"));
    for address in LOOPBACKS {
        let mut connections = Talk::several(address, 3);
        for talk in &mut connections {
            talk.passes(&clean);
        }
        // The third client does not wait.
        connections
            .pop()
            .map(|mut talk| talk.client.write_all(&blocked).map(|()| talk.expect_reset()))
            .unwrap()
            .unwrap();
        for talk in &mut connections {
            talk.replies(&retry);
            talk.passes(&[20, 3, 3, 0, 1, 1]);
        }
        let [mut honest, mut other] = connections.try_into().unwrap_or_else(|_| unreachable!());
        honest.passes(&clean);
        honest.replies(b"certificates");
        other.client.write_all(&blocked).unwrap();
        other.expect_reset();
    }
    end(program, 8, 4);
}

/// With MPTCP, an option says where the bytes of a segment belong, and the connection may have
/// segments on other ports.
fn sni_filter_lets_no_connection_have_several_paths() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let multipath = || Socket::new(Domain::for_address((address, 0).into()), Type::STREAM, Some(Protocol::MPTCP));
        let Ok(listener) = multipath() else {
            eprintln!("this kernel has no MPTCP");
            break;
        };
        listener.bind(&SocketAddr::from((address, PORT)).into()).unwrap();
        listener.listen(1).unwrap();
        let before = counter("Tcp:", "RetransSegs");
        let client = multipath().unwrap();
        client.set_nonblocking(true).unwrap();
        let connecting = client.connect(&SocketAddr::from((address, PORT)).into()).unwrap_err();
        assert_eq!(connecting.raw_os_error(), Some(nix::errno::Errno::EINPROGRESS as i32));
        support::wait_until("the SYN is sent again", || counter("Tcp:", "RetransSegs") > before);
        assert_eq!(counter("MPTcpExt:", "MPCapableSYNRX"), 0);
    }
    let (status, _) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
}

/// A counter of this network namespace.
fn counter(group: &str, name: &str) -> u64 {
    let text = ["snmp", "netstat"]
        .map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap())
        .concat();
    let mut lines = text.lines().filter(|line| line.starts_with(group)).map(str::split_ascii_whitespace);
    let (names, mut values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.into_iter().position(|one| one == name).unwrap();
    values.nth(at).unwrap().parse().unwrap()
}

/// Servers know a connection by its ID, and need not look at the port of the client.
fn sni_filter_blocks_quic_whose_hello_comes_from_two_ports() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let server = support::udp((address, PORT));
        let [first, second] = [(); 2].map(|()| support::udp((address, 0)));
        let hello = hello("blocked.example").split_off(5);
        let id = if address.is_ipv4() { b"first id" } else { b"other id" };
        let at = hello.len() - 12;
        first.send_to(&initial_with(id, 0, 0, &hello[..at]), (address, PORT)).unwrap();
        second.send_to(&initial_with(id, 1, at, &hello[at..]), (address, PORT)).unwrap();
        first.send_to(&initial_with(id, 2, 0, &hello[..at]), (address, PORT)).unwrap();
        // Datagrams on one socket of the server are in their order.
        for _ in 0..2 {
            let (_, from) = server.recv_from(&mut [0; 2048]).unwrap();
            assert_eq!(from, first.local_addr().unwrap());
        }
    }
    end(program, 0, 0);
}

fn sni_filter_blocks_quic_by_the_name_in_its_second_hello() {
    let program = start(&[]);
    for address in LOOPBACKS {
        let (client, server) = (support::udp((address, 0)), support::udp((address, PORT)));
        client.connect(server.local_addr().unwrap()).unwrap();
        let id = if address.is_ipv4() { b"first id" } else { b"other id" };
        let [clean, blocked] = ["clean.example", "blocked.example"].map(|name| hello(name).split_off(5));
        client.send(&initial_with(id, 0, 0, &clean)).unwrap();
        server.recv(&mut [0; 2048]).unwrap();
        client.send(&initial_with(id, 1, clean.len(), &blocked)).unwrap();
        assert_eq!(client.recv(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    end(program, 2, 2);
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
    initial_with(id, 0, 0, &hello(name)[5..])
}

/// A packet with a part of a hello.
fn initial_with(id: &[u8], number: u8, at: usize, part: &[u8]) -> Vec<u8> {
    let number_of = |length: usize| (0x4000 | length as u16).to_be_bytes();
    let mut frames = [&[6][..], &number_of(at), &number_of(part.len()), part].concat();
    frames.resize(1150, 0);
    seal_initial(false, id, id, number, &frames)
}
