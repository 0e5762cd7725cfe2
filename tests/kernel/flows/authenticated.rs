//! TCP in an authentication header of IPv6: connection tracking reads the TCP header, and rules the
//! authentication header.

use std::net::{Ipv6Addr, SocketAddr};

use etherparse::{Icmpv6Type, IpNumber, PacketBuilder, icmpv6::DestUnreachableCode};
use nfqueue_divert::Divert;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio_nfqueue::{ErrorKind, Hook, Packet, Protocol, Queue, Rule};

use super::{
    bind, come, confirm, crossing_is_over, pass, queue_is_empty,
    segments::{ACK, LAST, SYN, SYN_ACK},
    table,
};
use crate::{
    common::{lose_connections, next},
    support::{self, Peer, VethOptions},
};

tests![
    one a_syn_in_an_authentication_header_never_takes_the_shortcut,
    one a_denial_holds_in_an_authentication_header,
    one datagrams_in_an_authentication_header_can_be_accepted,
    one an_accept_in_an_authentication_header_does_not_hold_for_other_packets,
    one a_denial_holds_for_the_other_side_in_an_authentication_header,
    one an_icmp_error_in_an_authentication_header_does_not_speak_for_the_connection_it_quotes,
];

const AUTHENTICATED: u8 = 51;
/// Of 24 bytes.
const HEADER_LENGTH: usize = 24;

/// A host behind this one.
struct Side {
    peer: Peer,
    raw: Socket,
    /// Counts what arrives: the last packets of a round, and others.
    sink: Divert,
}

impl Side {
    fn new(index: u8) -> Self {
        let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
        peer.route_through_near();
        let (raw, sink) = peer.run(|| {
            let rule = |protocol| Rule::new(Hook::Prerouting).protocol(Protocol::Other(protocol)).drop();
            let sink = crate::common::divert([rule(LAST), rule(AUTHENTICATED)]);
            (Socket::new(Domain::IPV6, Type::RAW, Some(255.into())).unwrap(), sink)
        });
        Self { peer, raw, sink }
    }

    fn address(&self) -> Ipv6Addr {
        self.peer.far_v6
    }

    fn send(&self, packet: &[u8], to: &Self) {
        self.raw.send_to(packet, &SockAddr::from(SocketAddr::new(to.address().into(), 0))).unwrap();
    }

    /// How many packets have arrived at the other host when all that was sent to it has.
    fn arrived_at(&self, to: &Self) -> u64 {
        let counts = || to.sink.counters().unwrap();
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv6(self.address().octets(), to.address().octets(), 64);
        builder.write(&mut packet, IpNumber(LAST), &[]).unwrap();
        support::on_each_cpu(|_| {
            let last = counts()[0].packets;
            self.send(&packet, to);
            support::wait_until("the last packet has arrived", || counts()[0].packets > last);
        });
        counts()[1].packets
    }
}

struct Net {
    client: Side,
    server: Side,
}

impl Net {
    fn new() -> Self {
        let [client, server] = [1, 2].map(Side::new);
        support::forwarding();
        Self { client, server }
    }

    /// A side sends a segment.
    fn segment(&self, of_client: bool, flags: u8, (sequence, acknowledgement): (u32, u32), data: &[u8]) {
        let (from, to, ports) = self.ends(of_client);
        let mut builder = PacketBuilder::ipv6(from.address().octets(), to.address().octets(), 64)
            .tcp(ports[0], ports[1], sequence, 64_000);
        if flags & SYN != 0 {
            builder = builder.syn();
        }
        if flags & ACK != 0 {
            builder = builder.ack(acknowledgement);
        }
        let mut packet = Vec::new();
        builder.write(&mut packet, data).unwrap();
        from.send(&authenticated(packet), to);
    }

    /// The client sends a segment without the header.
    fn plain_segment(&self) {
        let (from, to, ports) = self.ends(true);
        let mut packet = Vec::new();
        PacketBuilder::ipv6(from.address().octets(), to.address().octets(), 64)
            .tcp(ports[0], ports[1], 1005, 64_000)
            .ack(5001)
            .write(&mut packet, b"bad")
            .unwrap();
        from.send(&packet, to);
    }

    fn datagram(&self, of_client: bool) {
        let (from, to, ports) = self.ends(of_client);
        let mut packet = Vec::new();
        PacketBuilder::ipv6(from.address().octets(), to.address().octets(), 64)
            .udp(ports[0], ports[1])
            .write(&mut packet, b"data")
            .unwrap();
        from.send(&authenticated(packet), to);
    }

    fn ends(&self, of_client: bool) -> (&Side, &Side, [u16; 2]) {
        match of_client {
            true => (&self.client, &self.server, [40_000, 80]),
            false => (&self.server, &self.client, [80, 40_000]),
        }
    }

    /// How many packets have arrived at the server and at the client.
    fn arrived(&self) -> [u64; 2] {
        [self.client.arrived_at(&self.server), self.server.arrived_at(&self.client)]
    }
}

/// Puts an authentication header before the transport header.
fn authenticated(mut packet: Vec<u8>) -> Vec<u8> {
    let length = u16::from_be_bytes([packet[4], packet[5]]) + HEADER_LENGTH as u16;
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    let mut header = [0; HEADER_LENGTH];
    // The length in words, less 2; an index of a security association.
    (header[0], header[1], header[6]) = (packet[6], (HEADER_LENGTH / 4 - 2) as u8, 1);
    packet[6] = AUTHENTICATED;
    packet.splice(40..40, header);
    packet
}

/// The next packet, which has these flags.
async fn queued(queue: &mut Queue, flags: u8) -> Packet {
    let packet = next(queue).await;
    assert_eq!(packet.payload()[40 + HEADER_LENGTH + 13], flags, "{packet:?}");
    packet
}

fn rule() -> Rule {
    Rule::new(Hook::Forward).protocol(Protocol::Other(AUTHENTICATED)).to_queue(0)
}

async fn a_syn_in_an_authentication_header_never_takes_the_shortcut() {
    let net = Net::new();
    let mut queue = bind();
    let _divert = table([rule()]).install().unwrap();
    net.segment(true, SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    net.segment(false, SYN_ACK, (5000, 1001), b"");
    confirm(queued(&mut queue, SYN_ACK).await.accept().for_flow()).await.unwrap();
    net.segment(true, ACK, (1001, 5001), b"");
    confirm(queued(&mut queue, ACK).await.accept().for_flow()).await.unwrap();
    for of_client in [true, false] {
        net.segment(of_client, SYN, (90_000, 0), b"");
        confirm(queued(&mut queue, SYN).await.drop()).await.unwrap();
    }
    assert_eq!(net.arrived(), [2, 1]);
}

async fn a_denial_holds_in_an_authentication_header() {
    let net = Net::new();
    let mut queue = bind();
    let _divert = table([rule()]).install().unwrap();
    net.segment(true, SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept()).await.unwrap();
    net.segment(false, SYN_ACK, (5000, 1001), b"");
    confirm(queued(&mut queue, SYN_ACK).await.accept()).await.unwrap();
    net.segment(true, ACK, (1001, 5001), b"bad");
    confirm(queued(&mut queue, ACK).await.drop().for_flow()).await.unwrap();
    for _ in 0..2 {
        net.segment(true, ACK, (1001, 5001), b"bad");
        net.segment(false, ACK, (5001, 1001), b"data");
        net.segment(true, SYN, (90_000, 0), b"");
    }
    assert_eq!(net.arrived(), [1, 1]);
    queue_is_empty(&mut queue);
}

async fn datagrams_in_an_authentication_header_can_be_accepted() {
    let net = Net::new();
    let mut queue = bind();
    let _divert = table([rule()]).install().unwrap();
    net.datagram(true);
    pass(&mut queue).await;
    net.datagram(false);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    net.datagram(true);
    net.datagram(false);
    assert_eq!(net.arrived(), [2, 2]);
    queue_is_empty(&mut queue);
}

/// The packet with the header is accepted alone, as the guide says. Segments without the header
/// have the same connection.
async fn an_accept_in_an_authentication_header_does_not_hold_for_other_packets() {
    let mut come_to_queue = Vec::new();
    let net = Net::new();
    for for_flow in [false, true] {
        let mut queue = bind();
        let plain = Rule::new(Hook::Forward).protocol(Protocol::Tcp).to_queue(0);
        let divert = table([rule(), plain]).install().unwrap();
        net.segment(true, ACK, (1001, 5001), b"data");
        let verdict = queued(&mut queue, ACK).await.accept();
        confirm(if for_flow { verdict.for_flow() } else { verdict }).await.unwrap();
        net.plain_segment();
        let packet = come(&mut queue).await;
        come_to_queue.push(packet.map(|packet| packet.payload()[6]));
        divert.close().unwrap();
        lose_connections();
    }
    assert_eq!(come_to_queue, [Some(6); 2], "the segment did not come to the queue");
}

/// A segment without the header is denied, and conntrack has no entry.
async fn a_denial_holds_for_the_other_side_in_an_authentication_header() {
    let net = Net::new();
    let mut queue = bind();
    let plain = Rule::new(Hook::Forward).protocol(Protocol::Tcp).to_queue(0);
    let _divert = table([plain]).install().unwrap();
    net.plain_segment();
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    net.segment(true, ACK, (1001, 5001), b"data");
    crossing_is_over().await;
    assert_eq!(net.arrived(), [0, 0]);
    net.segment(false, ACK, (5001, 1008), b"data");
    assert_eq!(net.arrived(), [0, 0]);
}

async fn an_icmp_error_in_an_authentication_header_does_not_speak_for_the_connection_it_quotes() {
    let net = Net::new();
    let mut queue = bind();
    let _divert = table([rule()]).install().unwrap();
    for deny in [true, false] {
        let before = net.arrived();
        for of_client in [true, false] {
            net.datagram(of_client);
            pass(&mut queue).await;
        }
        // Anybody can quote the client's datagram.
        let (client, server, ports) = net.ends(true);
        let mut quoted = Vec::new();
        PacketBuilder::ipv6(client.address().octets(), server.address().octets(), 64)
            .udp(ports[0], ports[1])
            .write(&mut quoted, b"data")
            .unwrap();
        let mut error = Vec::new();
        PacketBuilder::ipv6(server.address().octets(), client.address().octets(), 64)
            .icmpv6(Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port))
            .write(&mut error, &quoted)
            .unwrap();
        server.send(&authenticated(error), client);
        let packet = next(&mut queue).await;
        assert_eq!(packet.payload()[40], 58, "{packet:?}");
        let verdict = if deny { packet.drop() } else { packet.accept() };
        let refusal = confirm(verdict.for_flow()).await.unwrap_err();
        assert_eq!(refusal.kind(), ErrorKind::InvalidInput, "{refusal}");
        // The connection is neither denied nor accepted.
        for of_client in [true, false] {
            net.datagram(of_client);
            pass(&mut queue).await;
        }
        let [to_server, to_client] = net.arrived();
        assert_eq!([to_server - before[0], to_client - before[1]], [2, 3 - u64::from(deny)]);
    }
}
