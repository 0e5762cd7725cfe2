//! Which replaced payloads the kernel takes (`nfqnl_mangle`), tested with raw verdict messages.
//!
//! If the kernel does not take a replaced payload, it drops the packet and acknowledges the
//! verdict. So each verdict here sends its packet to a second queue, where it arrives at once or
//! never.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use etherparse::PacketBuilder;
use netlink_packet_core::DefaultNla;

use crate::{
    common::{
        self,
        rules::{self, Expressions, NetfilterProtoFamily, Place},
    },
    support::{self, Bridge, Frame, FrameSocket, Peer, RawQueue, UserNamespace},
};

tests![
    sync ipv4_replacements_are_taken_as_documented,
    sync replacements_of_other_protocols_are_taken_as_documented,
    sync tcp_replacements_are_taken_as_documented,
    sync replacements_with_ipv4_options_are_taken_as_documented,
    sync replacements_of_ipv4_fragments_are_taken_as_documented,
    sync replacements_of_tracked_ipv4_are_taken_as_documented,
    sync replacements_of_icmp_errors_of_tracked_connections_are_taken_as_documented,
    sync ipv6_replacements_are_taken_as_documented,
    sync replacements_with_extension_headers_are_taken_as_documented,
    sync replacements_of_ipv6_fragments_are_taken_as_documented,
    sync replacements_without_a_next_header_are_taken_as_documented,
    sync replacements_of_tracked_ipv6_are_taken_as_documented,
    sync replacements_of_bridged_packets_are_taken_as_documented,
    sync replacements_in_another_user_namespace_are_taken_as_documented,
];

/// Which kernels do not take a replacement: none, those from a release on, or all.
#[derive(Debug, Clone, Copy)]
enum Refused {
    Never,
    From(u32, u32),
    Always,
}
use Refused::{Always, Never};

/// `nfqnl_validate_write`: headers whose length or kind would change, and all packets of a bridge.
const FROM_7_2: Refused = Refused::From(7, 2);
/// `nfqnl_validate_l4`: the transport header must be complete, and of the connection's protocol.
const FROM_7_3: Refused = Refused::From(7, 3);

impl Refused {
    fn here(self) -> bool {
        match self {
            Never => false,
            Self::From(major, minor) => common::kernel_release() >= (major, minor),
            Always => true,
        }
    }
}

/// A peer whose packets are sent to queue 0 before they are routed.
struct Path {
    peer: Peer,
    socket: FrameSocket,
    near: [u8; 6],
    first: RawQueue,
    second: RawQueue,
}

impl Path {
    /// `None` where the kernel takes no replaced payload because of the user namespace.
    fn new() -> Option<Self> {
        if !common::replaces_payloads() {
            return None;
        }
        Some(Self::anywhere())
    }

    fn anywhere() -> Self {
        let peer = support::veth();
        let near = FrameSocket::open(&peer.near).address();
        let socket = peer.run(|| FrameSocket::open(&peer.far));
        let (first, second) = (RawQueue::bind(0).unwrap(), RawQueue::bind(1).unwrap());
        for (family, name) in [(NetfilterProtoFamily::IPv4, "v4"), (NetfilterProtoFamily::IPv6, "v6")] {
            // After connection tracking, NF_IP_PRI_CONNTRACK.
            rules::install_queue(family, name, Place { hook: 0, priority: -150 }, 0).unwrap();
        }
        Self { peer, socket, near, first, second }
    }

    fn send(&self, sent: &[u8]) {
        let ether_type: [u8; 2] = if sent[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
        let bytes = [&self.near[..], &[2, 0, 0, 0, 0, 9], &ether_type, sent].concat();
        self.socket.send(&Frame { tag: None, bytes });
    }

    /// Sends a packet and accepts it.
    fn deliver(&self, sent: &[u8]) {
        self.send(sent);
        while let Some(packet) = self.first.next(Duration::from_millis(100)) {
            self.first.accept(&packet);
        }
    }

    /// Whether the kernel takes the replacement of a packet by another.
    fn takes(&self, sent: &[u8], replacement: &[u8]) -> bool {
        self.send(sent);
        taken(&self.first, &self.second, sent, replacement)
    }

    fn check<'a>(&self, sent: &[u8], replacements: impl IntoIterator<Item = (&'a str, Refused, Vec<u8>)>) {
        let mut wrong = Vec::new();
        for (what, refused, replacement) in replacements {
            if self.takes(sent, &replacement) == refused.here() {
                wrong.push((what, refused));
            }
        }
        assert!(wrong.is_empty(), "not as expected: {wrong:?}");
    }
}

/// As [`Path::takes`], for a packet that has been sent already.
fn taken(first: &RawQueue, second: &RawQueue, sent: &[u8], replacement: &[u8]) -> bool {
    const TO_QUEUE_1: u32 = 1 << 16 | 3;
    loop {
        let packet = first.next(support::PATIENCE).expect("a packet");
        if packet.payload != sent {
            // Neighbour discovery, for example.
            first.accept(&packet);
            continue;
        }
        assert_eq!(first.confirmed_replacement(packet.id, TO_QUEUE_1, replacement), 0);
        let Some(packet) = second.next(Duration::from_millis(50)) else { return false };
        assert_eq!(packet.payload, replacement);
        second.verdict(packet.id, 0);
        return true;
    }
}

const FROM: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 77);
const TO: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 78);
const FROM_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 0x77);
const TO_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 0x78);

fn udp(length: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(FROM.octets(), TO.octets(), 64).udp(1000, 2000).write(&mut packet, &vec![7; length]).unwrap();
    // Clears "do not fragment", which the builder sets.
    packet[6] = 0;
    sum(packet)
}

fn tcp(length: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(FROM.octets(), TO.octets(), 64)
        .tcp(1000, 2000, 1, 1000)
        .write(&mut packet, &vec![7; length])
        .unwrap();
    sum(packet)
}

/// With a correct header checksum.
fn sum(mut packet: Vec<u8>) -> Vec<u8> {
    let header = usize::from(packet[0] & 15) * 4;
    packet[10..12].fill(0);
    let sum = checksum(&packet[..header]);
    packet[10..12].copy_from_slice(&sum);
    packet
}

/// The Internet checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

/// With a correct total length, IPv4 or IPv6.
fn sized(mut packet: Vec<u8>) -> Vec<u8> {
    let length = packet.len() as u16;
    if packet[0] >> 4 == 4 {
        packet[2..4].copy_from_slice(&length.to_be_bytes());
    } else {
        packet[4..6].copy_from_slice(&(length - 40).to_be_bytes());
    }
    packet
}

fn with(packet: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[at..at + bytes.len()].copy_from_slice(bytes);
    packet
}

/// With bytes inserted.
fn inserted(packet: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    [&packet[..at], bytes, &packet[at..]].concat()
}

fn ipv4_replacements_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let sent = udp(12);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, udp(100)),
            ("much longer", Never, udp(60_000)),
            ("shorter", Never, udp(3)),
            ("no data", Never, udp(0)),
            ("DF set", Never, with(&sent, 6, &[0x40])),
            ("type of service", Never, with(&sent, 1, &[0xb8])),
            ("identification", Never, with(&sent, 4, &[1, 2])),
            ("time to live", Never, with(&sent, 8, &[1])),
            ("wrong header checksum", Never, with(&sent, 10, &[1, 2])),
            ("source", Never, with(&sent, 12, &[1, 2, 3, 4])),
            ("destination", Never, with(&sent, 16, &[1, 2, 3, 4])),
            ("ports", Never, with(&sent, 20, &[1, 2, 3, 4])),
            ("wrong UDP length", Never, with(&sent, 24, &[0, 99])),
            ("wrong UDP checksum", Never, with(&sent, 26, &[1, 2])),
            ("another protocol: 253", Never, with(&sent, 9, &[253])),
            ("another protocol: TCP, its header whole", Never, tcp(0)),
            ("another protocol: TCP, its header broken", FROM_7_3, with(&sent, 9, &[6])),
            ("total length 1 too low", FROM_7_2, with(&sent, 2, &[0, 39])),
            ("total length 1 too high", FROM_7_2, with(&sent, 2, &[0, 41])),
            ("total length 0", FROM_7_2, with(&sent, 2, &[0, 0])),
            ("a byte appended, the total length as before", FROM_7_2, inserted(&sent, 40, &[0])),
            ("version 5", FROM_7_2, with(&sent, 0, &[0x55])),
            ("version 6", FROM_7_2, with(&sent, 0, &[0x65])),
            ("an IPv6 packet", FROM_7_2, udp_v6(12)),
            ("header length 4", FROM_7_2, with(&sent, 0, &[0x44])),
            (
                "header length 6, options inserted",
                FROM_7_2,
                sized(with(&inserted(&sent, 20, &[1, 1, 1, 0]), 0, &[0x46])),
            ),
            ("header length 15, beyond the packet", FROM_7_2, with(&sent, 0, &[0x4f])),
            ("more fragments", FROM_7_2, with(&sent, 6, &[0x20])),
            ("reserved bit", FROM_7_2, with(&sent, 6, &[0x80])),
            ("fragment offset", FROM_7_2, with(&sent, 7, &[1])),
            ("part of a UDP header: 7 bytes", FROM_7_3, sized(sent[..27].to_vec())),
            ("part of a UDP header: 4 bytes", FROM_7_3, sized(sent[..24].to_vec())),
            ("the IPv4 header alone", FROM_7_3, sized(sent[..20].to_vec())),
            ("the IPv4 header alone, protocol 253", Never, with(&sized(sent[..20].to_vec()), 9, &[253])),
            ("19 bytes", Always, sent[..19].to_vec()),
            ("1 byte", Always, sent[..1].to_vec()),
        ],
    );
}

/// For each protocol that the kernel knows, a complete header is needed.
fn replacements_of_other_protocols_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let sent = udp(12);
    // ICMP, GRE, ESP, AH, ICMPv6, SCTP
    for (protocol, least) in [(1, 8), (47, 4), (50, 8), (51, 12), (58, 8), (132, 12)] {
        let cut = |length: usize| with(&sized(sent[..20 + length].to_vec()), 9, &[protocol]);
        let (whole, part) = (format!("all of protocol {protocol}"), format!("part of protocol {protocol}"));
        path.check(&sent, [(&*whole, Never, cut(least)), (&*part, FROM_7_3, cut(least - 1))]);
    }
}

fn tcp_replacements_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let sent = tcp(20);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("DF clear", Never, with(&sent, 6, &[0])),
            ("TCP options inserted", Never, sized(with(&inserted(&sent, 40, &[1; 4]), 32, &[0x60]))),
            ("TCP header length 4", FROM_7_3, with(&sent, 32, &[0x40])),
            ("TCP header length beyond the packet", FROM_7_3, with(&sent, 32, &[0xb0])),
            ("TCP header length up to the packet's end", Never, with(&sent, 32, &[0xa0])),
            ("part of a TCP header: 19 bytes", FROM_7_3, sized(sent[..39].to_vec())),
        ],
    );
}

fn replacements_with_ipv4_options_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    // Three times no operation, end of options.
    let sent = sum(sized(with(&inserted(&udp(12), 20, &[1, 1, 1, 0]), 0, &[0x46])));
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, sized(inserted(&sent, 44, &[0; 10]))),
            ("other options", FROM_7_2, with(&sent, 20, &[1, 1, 0, 0])),
            ("no options", FROM_7_2, udp(12)),
            ("more options", FROM_7_2, sized(with(&inserted(&sent, 20, &[1; 4]), 0, &[0x47]))),
        ],
    );
}

fn replacements_of_ipv4_fragments_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let (first, later) = (sum(with(&udp(12), 6, &[0x20])), sum(with(&udp(12), 7, &[3])));
    path.check(
        &first,
        [
            ("unchanged", Never, first.clone()),
            ("longer", Never, sized(inserted(&first, 40, &[0; 8]))),
            ("no fragment", FROM_7_2, udp(12)),
            ("DF set", Never, with(&first, 6, &[0x60])),
            ("part of a UDP header: 4 bytes", Never, sized(first[..24].to_vec())),
        ],
    );
    path.check(
        &later,
        [
            ("unchanged", Never, later.clone()),
            ("another offset", FROM_7_2, with(&later, 7, &[4])),
            ("more fragments", FROM_7_2, with(&later, 6, &[0x20])),
        ],
    );
}

fn replacements_of_tracked_ipv4_are_taken_as_documented() {
    track(NetfilterProtoFamily::IPv4);
    let Some(path) = Path::new() else { return };
    let sent = udp(12);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, udp(100)),
            ("addresses", Never, with(&sent, 12, &[1, 2, 3, 4, 5, 6, 7, 8])),
            ("ports", Never, with(&sent, 20, &[1, 2, 3, 4])),
            ("another protocol: 253", FROM_7_3, with(&sent, 9, &[253])),
            ("another protocol: TCP, its header whole", FROM_7_3, tcp(0)),
        ],
    );
}

/// The protocol of an ICMP error differs from that of its connection.
fn replacements_of_icmp_errors_of_tracked_connections_are_taken_as_documented() {
    track(NetfilterProtoFamily::IPv4);
    let Some(path) = Path::new() else { return };
    let near = path.peer.near_v4.octets();
    // A packet with a wrong checksum would not be tracked; 0 means no checksum.
    let sent = sum(with(&with(&udp(12), 16, &near), 26, &[0, 0]));
    path.deliver(&sent);
    // "Port unreachable", about a reply to that packet.
    let reply = sum(with(&with(&sent, 12, &near), 16, &FROM.octets()));
    let reply = with(&reply, 20, &[2000_u16.to_be_bytes(), 1000_u16.to_be_bytes()].concat());
    let error = [&[3, 3, 0, 0, 0, 0, 0, 0], &reply[..]].concat();
    let error = with(&error, 2, &checksum(&error));
    let error = sum(with(&sized([&sent[..20], &error].concat()), 9, &[1]));
    path.check(&error, [("unchanged", FROM_7_3, error.clone())]);
}

fn udp_v6(length: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv6(FROM_V6.octets(), TO_V6.octets(), 64)
        .udp(1000, 2000)
        .write(&mut packet, &vec![7; length])
        .unwrap();
    packet
}

/// With an extension header inserted after the IPv6 header.
fn extended(packet: &[u8], kind: u8, body: &[u8; 6]) -> Vec<u8> {
    let header = [&[packet[6], 0][..], body].concat();
    sized(with(&inserted(packet, 40, &header), 6, &[kind]))
}

/// An unknown destination option of four bytes, which nodes that do not know it skip.
const SKIPPED: [u8; 6] = [0x1e, 4, 1, 2, 3, 4];
const DESTINATION: u8 = 60;
const FRAGMENT: u8 = 44;
const NO_NEXT: u8 = 59;

fn ipv6_replacements_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let sent = udp_v6(12);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, udp_v6(100)),
            ("much longer", Never, udp_v6(60_000)),
            ("shorter", Never, udp_v6(3)),
            ("no data", Never, udp_v6(0)),
            ("traffic class and flow label", Never, with(&sent, 0, &[0x6b, 0x81, 2, 3])),
            ("hop limit", Never, with(&sent, 7, &[1])),
            ("source", Never, with(&sent, 8, &[0xfd, 1])),
            ("destination", Never, with(&sent, 24, &[0xfd, 1])),
            ("ports", Never, with(&sent, 40, &[1, 2, 3, 4])),
            ("wrong UDP checksum", Never, with(&sent, 46, &[1, 2])),
            ("another next header: 253", FROM_7_2, with(&sent, 6, &[253])),
            ("another next header: none", FROM_7_2, with(&sent, 6, &[NO_NEXT])),
            ("payload length 1 too low", FROM_7_2, with(&sent, 4, &[0, 19])),
            ("payload length 1 too high", FROM_7_2, with(&sent, 4, &[0, 21])),
            ("payload length 0", FROM_7_2, with(&sent, 4, &[0, 0])),
            ("version 4", FROM_7_2, with(&sent, 0, &[0x40])),
            ("an IPv4 packet", FROM_7_2, udp(40)),
            ("destination options added", FROM_7_2, extended(&sent, DESTINATION, &SKIPPED)),
            ("part of a UDP header: 7 bytes", FROM_7_3, sized(sent[..47].to_vec())),
            ("the IPv6 header alone", FROM_7_3, sized(sent[..40].to_vec())),
            ("39 bytes", Always, sent[..39].to_vec()),
        ],
    );
}

fn replacements_with_extension_headers_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let sent = extended(&udp_v6(12), DESTINATION, &SKIPPED);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, extended(&udp_v6(100), DESTINATION, &SKIPPED)),
            ("addresses", Never, with(&sent, 8, &[0xfd, 1])),
            ("other options", FROM_7_2, with(&sent, 47, &[9])),
            ("another next header after them", FROM_7_2, with(&sent, 40, &[253])),
            ("without options", FROM_7_2, udp_v6(12)),
            ("more options", FROM_7_2, extended(&sent, DESTINATION, &SKIPPED)),
            ("part of a UDP header: 7 bytes", FROM_7_3, sized(sent[..55].to_vec())),
        ],
    );
}

fn replacements_of_ipv6_fragments_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    // The first fragment; more follow.
    let sent = extended(&udp_v6(12), FRAGMENT, &[0, 1, 0, 0, 0, 1]);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, sized(inserted(&sent, 68, &[0; 8]))),
            ("another offset", FROM_7_2, with(&sent, 42, &[0, 9])),
            ("another identification", FROM_7_2, with(&sent, 47, &[2])),
            ("no fragment", FROM_7_2, udp_v6(12)),
            ("part of a UDP header: 4 bytes", Never, sized(sent[..52].to_vec())),
        ],
    );
}

fn replacements_without_a_next_header_are_taken_as_documented() {
    let Some(path) = Path::new() else { return };
    let sent = with(&udp_v6(12), 6, &[NO_NEXT]);
    path.check(
        &sent,
        [
            ("unchanged", Never, sent.clone()),
            ("longer", Never, sized(inserted(&sent, 60, &[0; 8]))),
            ("another next header: UDP", FROM_7_2, udp_v6(12)),
        ],
    );
}

fn replacements_of_tracked_ipv6_are_taken_as_documented() {
    track(NetfilterProtoFamily::IPv6);
    let Some(path) = Path::new() else { return };
    let sent = udp_v6(12);
    path.check(&sent, [("unchanged", Never, sent.clone()), ("addresses", Never, with(&sent, 8, &[0xfd, 1]))]);
    let sent = extended(&sent, DESTINATION, &SKIPPED);
    path.check(
        &sent,
        [("unchanged", Never, sent.clone()), ("longer", Never, extended(&udp_v6(40), DESTINATION, &SKIPPED))],
    );
}

fn replacements_of_bridged_packets_are_taken_as_documented() {
    let bridge = Bridge::new();
    let (first, second) = (RawQueue::bind(0).unwrap(), RawQueue::bind(1).unwrap());
    // NF_BR_FORWARD, NF_BR_PRI_FILTER_BRIDGED
    let place = Place { hook: 2, priority: -200 };
    if rules::install_queue(NetfilterProtoFamily::Bridge, "bridge", place, 0).is_err() {
        // A kernel without `NFT_QUEUE`. The module `bridge` has a variable that forbids this.
        return;
    }
    let (v4, v6, other) = (udp(12), udp_v6(12), [7; 50]);
    for (sent, ether_type) in [(&v4[..], [8, 0]), (&v6, [0x86, 0xdd]), (&other, [0x88, 0xb5])] {
        let bytes = [&[2, 0, 0, 0, 0, 2], &[2, 0, 0, 0, 0, 1], &ether_type[..], sent].concat();
        bridge.ends[0].socket.send(&Frame { tag: None, bytes });
        assert_eq!(taken(&first, &second, sent, sent), common::replaces_bridge_payloads());
    }
}

/// The owner of the network namespace counts, not the sender of the verdict: here the test's own
/// process, which may be root.
fn replacements_in_another_user_namespace_are_taken_as_documented() {
    let other = UserNamespace::new();
    other.network().run(|| {
        let path = Path::anywhere();
        for sent in [udp(12), udp_v6(12)] {
            // `nfqnl_mangle`: `e->state.net->user_ns != &init_user_ns`
            assert_eq!(path.takes(&sent, &sent), common::kernel_release() < (7, 1));
        }
    });
}

/// Turns on connection tracking in this network namespace: one rule that reads the state suffices.
fn track(family: NetfilterProtoFamily) {
    // NFTA_CT_DREG, NFTA_CT_KEY: NFT_CT_STATE
    let attributes = [(1, 1_u32), (2, 0)].map(|(kind, number)| DefaultNla::new(kind, number.to_be_bytes().to_vec()));
    let state = Expressions::Other { expression_type: "ct".to_owned(), attributes: attributes.to_vec() };
    rules::install(family, "tracking", None, vec![state]).unwrap();
}
