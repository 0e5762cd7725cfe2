//! `web`: its service blocks and unblocks addresses, and ends together with the filter.

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{PORT, Program, http};
use crate::{
    common::PATIENCE,
    support::{self, VethOptions},
};

tests![
    sync web_blocks_and_unblocks_addresses,
    sync web_resets_open_connections_of_a_blocked_address,
    sync web_blocks_incoming_and_forwarded_connections,
    sync web_filters_no_traffic_of_its_own,
    sync web_refuses_what_it_cannot_do,
    sync web_ends_while_a_request_and_packets_are_open,
    sync web_ends_despite_a_request_that_stays_open,
    sync web_names_an_address_that_is_in_use,
];

const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
/// Addresses of this host that are not the client's.
const SERVERS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn start(options: &[&str]) -> Program {
    let mut program = Program::start("web", &[&["--port", "9000"], options].concat());
    program.until_ready();
    program
}

/// Ends the program; returns the numbers of its last line.
fn end(program: Program) -> BTreeMap<String, u64> {
    let (status, output) = program.end(Signal::SIGINT);
    assert!(status.success(), "{status}");
    last_line(&output)
}

fn last_line(output: &str) -> BTreeMap<String, u64> {
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
    assert_eq!(output.lines().count(), 1, "{output}");
    let words: Vec<&str> = output.split_whitespace().collect();
    let numbers = words.chunks(2).map(|pair| (pair[0].to_owned(), pair[1].parse().unwrap())).collect();
    adds_up(&numbers);
    numbers
}

fn adds_up(numbers: &BTreeMap<String, u64>) {
    assert_eq!(numbers["received"], numbers["accepted"] + numbers["rejected"] + numbers["dropped"], "{numbers:?}");
    assert_eq!(numbers["lost"], 0, "{numbers:?}");
}

fn stats() -> BTreeMap<String, u64> {
    let (status, text) = http::request(LISTEN, "GET", "/stats");
    assert_eq!(status, 200, "{text}");
    numbers(&text)
}

/// The numbers of a JSON object that contains no others.
fn numbers(text: &str) -> BTreeMap<String, u64> {
    let fields = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap().split(',');
    let pairs = fields.map(|field| field.split_once(':').unwrap());
    pairs.map(|(name, number)| (name.trim_matches('"').to_owned(), number.parse().unwrap())).collect()
}

/// Asserts what is blocked.
#[track_caller]
fn are_blocked(addresses: &[IpAddr]) {
    let addresses: Vec<_> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    assert_eq!(http::request(LISTEN, "GET", "/block"), (200, format!("[{}]", addresses.join(","))));
}

/// The status of the response.
fn set(method: &str, address: &str) -> u16 {
    http::request(LISTEN, method, &format!("/block/{address}")).0
}

fn block(address: IpAddr) {
    assert_eq!(set("PUT", &address.to_string()), 204);
}

fn unblock(address: IpAddr) {
    assert_eq!(set("DELETE", &address.to_string()), 204);
}

fn refuses(address: IpAddr) {
    assert_eq!(TcpStream::connect((address, PORT)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

/// Both sides of a connection through the filter.
fn connection(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    transfer(&mut client, &mut server);
    transfer(&mut server, &mut client);
    (client, server)
}

fn transfer(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"text").unwrap();
    let mut received = [0; 4];
    to.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"text");
}

fn web_blocks_and_unblocks_addresses() {
    let program = start(&[]);
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    for (server, number) in SERVERS.into_iter().zip(1..) {
        let listener = TcpListener::bind((server, PORT)).unwrap();
        connection(&listener);
        block(server);
        // Twice is as once.
        block(server);
        are_blocked(&[server]);
        refuses(server);
        connection(&other);
        unblock(server);
        are_blocked(&[]);
        connection(&listener);
        let stats = stats();
        adds_up(&stats);
        // A SYN may have been sent again.
        assert!(stats["rejected"] >= number, "{stats:?}");
    }
    assert!(end(program)["rejected"] >= 2);
}

fn web_resets_open_connections_of_a_blocked_address() {
    let program = start(&[]);
    for server in SERVERS {
        let listener = TcpListener::bind((server, PORT)).unwrap();
        let (mut client, _server) = connection(&listener);
        block(server);
        client.write_all(b"text").unwrap();
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert!(end(program)["rejected"] >= 2);
}

fn web_blocks_incoming_and_forwarded_connections() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    left.route_through_near();
    right.route_through_near();
    let program = start(&[]);
    let families: [[IpAddr; 3]; 2] = [
        [left.far_v4.into(), left.near_v4.into(), right.far_v4.into()],
        [left.far_v6.into(), left.near_v6.into(), right.far_v6.into()],
    ];
    for [client, this, behind] in families {
        let bind = |address| TcpListener::bind((address, PORT)).unwrap();
        for (address, _listener) in [(this, bind(this)), (behind, right.run(|| bind(behind)))] {
            for blocked in [client, address] {
                left.run(|| drop(TcpStream::connect((address, PORT)).unwrap()));
                block(blocked);
                left.run(|| refuses(address));
                unblock(blocked);
            }
        }
    }
    // The FIN of the connection before may come late.
    assert!(end(program)["rejected"] >= 8);
}

fn web_filters_no_traffic_of_its_own() {
    let program = start(&[]);
    block(LISTEN.ip());
    are_blocked(&[LISTEN.ip()]);
    let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    refuses(LISTEN.ip());
    // It is the source of connections to other addresses of this host.
    let _other = TcpListener::bind((SERVERS[0], PORT)).unwrap();
    refuses(SERVERS[0]);
    unblock(LISTEN.ip());
    let end = end(program);
    assert!(end["rejected"] >= 2 && end["received"] == end["rejected"], "{end:?}");
}

fn web_refuses_what_it_cannot_do() {
    let program = start(&["--addresses", "2"]);
    for no_address in ["192.0.2.256", "name.example", "192.0.2.0%2f24", "%ff"] {
        assert_eq!(set("PUT", no_address), 400, "{no_address}");
    }
    assert_eq!(set("DELETE", "192.0.2.1"), 404);
    assert_eq!(set("POST", "192.0.2.1"), 405);
    assert_eq!(http::request(LISTEN, "GET", "/").0, 404);
    assert_eq!(http::request(LISTEN, "not http", "").0, 400);
    assert_eq!(set("PUT", "192.0.2.1"), 204);
    assert_eq!(set("PUT", "2001:db8::1"), 204);
    assert_eq!(set("PUT", "192.0.2.3"), 507);
    // It is blocked already.
    assert_eq!(set("PUT", "::ffff:192.0.2.1"), 204);
    are_blocked(&[[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap()]);
    assert_eq!(set("DELETE", "::ffff:192.0.2.1"), 204);
    assert_eq!(set("PUT", "192.0.2.3"), 204);
    assert_eq!(end(program)["received"], 0);
}

fn web_ends_while_a_request_and_packets_are_open() {
    let program = start(&[]);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    let mut connections: Vec<_> = (0..20).map(|_| connection(&listener)).collect();
    let (request, rest) = half_request();

    // So that the packets and the signal come at the same time.
    let process = Pid::from_raw(program.0.id() as i32);
    kill(process, Signal::SIGSTOP).unwrap();
    support::wait_until("the program is stopped", || {
        fs::read_to_string(format!("/proc/{process}/stat")).unwrap().contains(") T ")
    });
    for (client, _) in &mut connections {
        client.write_all(b"text").unwrap();
    }
    support::wait_until("the packets are queued", || support::queue_line(0).unwrap()[2] >= 20);
    kill(process, Signal::SIGTERM).unwrap();
    kill(process, Signal::SIGCONT).unwrap();

    support::wait_until("the filter has ended", || support::queue_line(0).is_none());
    (&request).write_all(rest.as_bytes()).unwrap();
    let (status, text) = http::response(request);
    assert_eq!(status, 200, "{text}");
    let served = numbers(&text);
    let (status, output) = program.wait();
    assert!(status.success(), "{status}");
    let last = last_line(&output);
    assert_eq!(served, last);
    // SYN, ACK and text, and the text that was queued at the end.
    assert!(last["received"] >= 4 * 20 && last["accepted"] >= 3 * 20, "{last:?}");
    // What was dropped comes again.
    for (_, server) in &mut connections {
        let mut received = [0; 4];
        server.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"text");
    }
}

/// The program has read the first half of a request. Returns the second half.
fn half_request() -> (TcpStream, String) {
    let mut stream = http::connect(LISTEN);
    let mut head = http::head("GET", "/stats");
    let rest = head.split_off(head.len() / 2);
    stream.write_all(head.as_bytes()).unwrap();
    support::wait_until("the program has read it", || {
        let text = fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        // In columns 2 to 5: the addresses, the state (1: established), the queues.
        let ends = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let ends = ends.filter(|line| line[3] == "01" && line[1..3].iter().any(|address| address.ends_with(":1F90")));
        let queues: Vec<_> = ends.map(|line| line[4].to_owned()).collect();
        queues == ["00000000:00000000"; 2]
    });
    (stream, rest)
}

fn web_ends_despite_a_request_that_stays_open() {
    let program = start(&[]);
    let (_request, _) = half_request();
    end(program);
}

fn web_names_an_address_that_is_in_use() {
    let _other = TcpListener::bind(LISTEN).unwrap();
    let (status, error) = Program::start("web", &[]).fails();
    assert_eq!(status.code(), Some(1));
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("web: listen on 127.0.0.1:8080: "), "{error}");
}
