//! `dns_firewall`: queries for blocked names are answered from the queue, others by the server.

use std::{
    io::{ErrorKind, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
};

use hickory_proto::{
    op::{Edns, EdnsFlags, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        Name, RecordType,
        rdata::opt::{EdnsCode, EdnsOption},
    },
};
use nfqueue_divert::Divert;
use nix::sys::signal::Signal;
use tokio_nfqueue::{Hook, Rule};

use super::{PORT, Program};
use crate::support::{self, VethOptions};

tests![
    sync dns_firewall_answers_blocked_names_and_names_below,
    sync dns_firewall_answers_incoming_and_forwarded_queries,
    sync dns_firewall_responds_with_edns_to_edns_only,
    sync dns_firewall_accepts_what_is_no_query_unchanged,
    sync dns_firewall_reads_names_from_files,
    sync dns_firewall_drops_a_query_that_it_cannot_answer,
];

const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn start(names: &[&str]) -> Program {
    let mut program = Program::start("dns_firewall", &[&["--port", "9000"], names].concat());
    program.until_ready();
    program
}

/// Ends the program, which must have answered all queries for blocked names.
fn end(program: Program, received: u32, blocked: u32) {
    let accepted = received - blocked;
    end_with(program, &format!("received {received} accepted {accepted} blocked {blocked} unanswered 0 lost 0\n"));
}

fn end_with(program: Program, expected: &str) {
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert_eq!(output, expected);
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
}

fn dns_firewall_answers_blocked_names_and_names_below() {
    let program = start(&["blocked.example", "other.example."]);
    for address in LOOPBACKS {
        let talk = Talk::new(support::udp((address, 0)), support::udp((address, PORT)));
        for name in ["blocked.example", "BLOCKED.Example", "a.b.Blocked.example", "other.example"] {
            talk.is_blocked(&query(name));
        }
        for name in ["example", "notblocked.example", "blocked.example.org", "www.example"] {
            talk.is_allowed(&query(name));
        }
    }
    end(program, 16, 8);
}

fn dns_firewall_answers_incoming_and_forwarded_queries() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    left.route_through_near();
    right.route_through_near();
    let program = start(&["blocked.example"]);
    let families: [[IpAddr; 3]; 2] = [
        [left.far_v4.into(), left.near_v4.into(), right.far_v4.into()],
        [left.far_v6.into(), left.near_v6.into(), right.far_v6.into()],
    ];
    for [client, this, behind] in families {
        let servers = [support::udp((this, PORT)), right.run(|| support::udp((behind, PORT)))];
        for server in servers {
            let talk = Talk::new(left.run(|| support::udp((client, 0))), server);
            talk.is_blocked(&query("www.blocked.example"));
            talk.is_allowed(&query("www.example"));
        }
    }
    end(program, 8, 4);
}

fn dns_firewall_responds_with_edns_to_edns_only() {
    let program = start(&["blocked.example"]);
    let talk = Talk::new(support::udp((LOOPBACKS[0], 0)), support::udp((LOOPBACKS[0], PORT)));
    for dnssec_ok in [false, true] {
        let mut query = query("blocked.example");
        let mut edns = Edns::new();
        edns.set_max_payload(4096).set_dnssec_ok(dnssec_ok);
        // A cookie, which the response does not return.
        edns.options_mut().insert(EdnsOption::Unknown(10, vec![7; 8]));
        query.set_edns(edns);
        let edns = talk.is_blocked(&query).edns.expect("the response has EDNS");
        assert_eq!((edns.version(), edns.max_payload()), (0, 1232));
        let EdnsFlags { dnssec_ok: returned, .. } = *edns.flags();
        assert_eq!(returned, dnssec_ok);
        let blocked = EdnsOption::Unknown(15, vec![0, 15]);
        assert_eq!(edns.option(EdnsCode::Unknown(15)), Some(&blocked));
        assert_eq!(edns.options().as_ref().len(), 1);
    }
    let edns = talk.is_blocked(&query_without_recursion()).edns;
    assert_eq!(edns, None);
    end(program, 3, 3);
}

fn query_without_recursion() -> Message {
    let mut query = query("blocked.example");
    query.metadata.recursion_desired = false;
    query
}

fn dns_firewall_accepts_what_is_no_query_unchanged() {
    let program = start(&["blocked.example"]);
    let mut count = 0;
    for address in LOOPBACKS {
        let talk = Talk::new(support::udp((address, 0)), support::udp((address, PORT)));
        let query = query("blocked.example");
        let bytes = query.to_vec().unwrap();
        let mut response = query.clone();
        response.metadata.message_type = MessageType::Response;
        let mut notify = query.clone();
        notify.metadata.op_code = OpCode::Notify;
        // A name that points to itself.
        let loops = [&bytes[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
        let mut datagrams = vec![Vec::new(), b"?".to_vec(), vec![0xff; 100], loops];
        datagrams.extend([response.to_vec().unwrap(), notify.to_vec().unwrap()]);
        // Parts of the query.
        datagrams.extend((1..bytes.len()).map(|length| bytes[..length].to_vec()));
        for datagram in &datagrams {
            talk.passes(datagram);
        }
        count += datagrams.len() as u32;
    }
    end(program, count, 0);
}

fn dns_firewall_reads_names_from_files() {
    let path = std::env::temp_dir().join(format!("blocked-names-{}", std::process::id()));
    let mut file = std::fs::File::create_new(&path).unwrap();
    file.write_all(b"# names\n\nblocked.example # a comment\n  b\xc3\xbccher.example.\r\n").unwrap();
    let program = start(&["--file", path.to_str().unwrap(), "other.example"]);
    std::fs::remove_file(&path).unwrap();
    let talk = Talk::new(support::udp((LOOPBACKS[0], 0)), support::udp((LOOPBACKS[0], PORT)));
    for name in ["blocked.example", "www.xn--bcher-kva.example", "other.example"] {
        talk.is_blocked(&query(name));
    }
    talk.is_allowed(&query("names"));
    end(program, 4, 3);
}

/// A rule drops the replies, by their mark.
fn dns_firewall_drops_a_query_that_it_cannot_answer() {
    let program = start(&["blocked.example"]);
    let _divert = Divert::builder().rule(Rule::new(Hook::Output).mark(0x40, u32::MAX).drop()).install().unwrap();
    let talk = Talk::new(support::udp((LOOPBACKS[0], 0)), support::udp((LOOPBACKS[0], PORT)));
    talk.client.send(&query("blocked.example").to_vec().unwrap()).unwrap();
    // The server has not received the query before.
    talk.is_allowed(&query("www.example"));
    end_with(program, "received 2 accepted 1 blocked 1 unanswered 1 lost 0\n");
}

/// A query for an address, with recursion.
fn query(name: &str) -> Message {
    let mut name = Name::from_ascii(name).unwrap();
    name.set_fqdn(true);
    let mut query = Message::new(0x1234, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name, RecordType::A));
    query
}

/// A client and the name server that it asks.
struct Talk {
    client: UdpSocket,
    server: UdpSocket,
}

impl Talk {
    fn new(client: UdpSocket, server: UdpSocket) -> Self {
        // The client takes only what comes from the server's address and port.
        client.connect(server.local_addr().unwrap()).unwrap();
        Self { client, server }
    }

    /// The server receives the datagram.
    fn passes(&self, datagram: &[u8]) -> std::net::SocketAddr {
        self.client.send(datagram).unwrap();
        let mut received = [0; 512];
        let (length, from) = self.server.recv_from(&mut received).expect("the datagram");
        assert_eq!(&received[..length], datagram);
        assert_eq!(from, self.client.local_addr().unwrap());
        from
    }

    /// The client receives the server's response.
    fn is_allowed(&self, query: &Message) {
        let from = self.passes(&query.to_vec().unwrap());
        self.server.send_to(b"response", from).unwrap();
        let mut received = [0; 512];
        let length = self.client.recv(&mut received).expect("the response");
        assert_eq!(&received[..length], b"response");
    }

    /// The client receives the program's response, and the server nothing.
    fn is_blocked(&self, query: &Message) -> Message {
        let asked = query.to_vec().unwrap();
        self.client.send(&asked).unwrap();
        let mut received = [0; 512];
        let length = self.client.recv(&mut received).expect("the response");
        let response = Message::from_vec(&received[..length]).unwrap();
        assert_eq!(response.metadata.id, 0x1234);
        assert_eq!(response.metadata.message_type, MessageType::Response);
        assert_eq!(response.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(response.metadata.recursion_desired, query.metadata.recursion_desired);
        assert!(response.metadata.recursion_available && !response.metadata.authoritative);
        // Byte by byte, because clients compare the case too. Behind the labels: the end of the
        // name, type and class.
        let question = 12..12 + query.queries[0].name().len() + 5;
        assert_eq!(received[question.clone()], asked[question]);
        assert_eq!(response.queries.len(), 1);
        assert!(response.answers.is_empty() && response.authorities.is_empty() && response.additionals.is_empty());
        self.server.set_nonblocking(true).unwrap();
        assert_eq!(self.server.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        self.server.set_nonblocking(false).unwrap();
        response
    }
}
