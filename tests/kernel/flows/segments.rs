//! Hand-made packets that this host forwards: no kernel answers them, and each end counts what
//! arrives.

use std::{
    cell::Cell,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    sync::atomic::{AtomicU64, Ordering},
};

use etherparse::{IcmpEchoHeader, Icmpv4Type, IpNumber, PacketBuilder, icmpv4::DestUnreachableHeader};
use nfqueue_divert::Divert;
use tokio_nfqueue::{Hook, Packet, Protocol, Queue, Rule};

use super::confirm;
use crate::{
    common::next,
    support::{self, Peer, VethOptions},
};

const SERVER: u16 = 80;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const SYN_ACK: u8 = SYN | ACK;
pub(crate) const RST_ACK: u8 = RST | ACK;

/// A host behind this one.
pub(crate) struct Side {
    peer: Peer,
    raw: OwnedFd,
    /// Drops what arrives, so that no kernel answers: the last packets of a round, and others.
    sink: Divert,
    seen: AtomicU64,
}

/// The protocol of the last packet of a round, for experiments (RFC 3692).
pub(crate) const LAST: u8 = 253;

/// Two hosts behind this one, which forwards.
pub(crate) struct Hosts {
    pub(crate) client: Side,
    pub(crate) server: Side,
    client_port: Cell<u16>,
}

impl Side {
    fn new(index: u8) -> Self {
        let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
        peer.route_through_near();
        let (raw, sink) = peer.run(|| {
            let rule = || Rule::new(Hook::Prerouting).ipv4();
            let last = rule().protocol(Protocol::Other(LAST)).drop();
            (support::raw_ipv4(), crate::common::divert([last, rule().drop()]))
        });
        Self { peer, raw, sink, seen: AtomicU64::new(0) }
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        self.peer.far_v4
    }

    pub(crate) fn send(&self, packet: &[u8], to: Ipv4Addr) {
        support::send_raw_ipv4(&self.raw, packet, to).unwrap();
    }

    /// The address by which this host knows the one that forwards.
    pub(crate) fn gateway(&self) -> Ipv4Addr {
        self.peer.near_v4
    }

    /// Gives this host one more address.
    pub(crate) fn another_address(&self) -> Ipv4Addr {
        let [a, b, c, d] = self.address().octets();
        let another = Ipv4Addr::new(a, b, c, d + 1);
        self.peer.run(|| support::add_address(&self.peer.far, another.into(), 24));
        // So that no later packet waits until the neighbour is known, and arrives after others.
        let [last, _] = self.counts();
        support::send_raw_ipv4(&support::raw_ipv4(), &last_packet(self.gateway(), another), another).unwrap();
        support::wait_until("the neighbour is known", || self.counts()[0] > last);
        another
    }

    /// Sends a datagram under this address.
    pub(crate) fn datagram(&self, from: SocketAddrV4, to: SocketAddrV4) {
        self.send(&datagram(from, to, b"data"), *to.ip());
    }

    fn counts(&self) -> [u64; 2] {
        let counters = self.sink.counters().unwrap();
        [0, 1].map(|index| counters[index].packets)
    }
}

impl Hosts {
    pub(crate) fn new() -> Self {
        let [client, server] = [1, 2].map(Side::new);
        support::forwarding();
        Self { client, server, client_port: Cell::new(40_000) }
    }

    /// From now on the client uses another port.
    pub(crate) fn another_port(&self) {
        self.client_port.set(self.client_port.get() + 1);
    }

    /// The numbers of packets that have arrived at the server and at the client since the last
    /// call.
    pub(crate) fn arrived(&self) -> [u64; 2] {
        let sides = [(&self.client, &self.server), (&self.server, &self.client)];
        sides.map(|(from, to)| {
            // Where earlier packets may still wait.
            support::on_each_cpu(|_| {
                let [last, _] = to.counts();
                from.send(&last_packet(from.address(), to.address()), to.address());
                support::wait_until("the last packet has arrived", || to.counts()[0] > last);
            });
            let all = to.counts()[1];
            all - to.seen.swap(all, Ordering::Relaxed)
        })
    }

    /// Those of the client and of the server.
    pub(crate) fn addresses(&self) -> [SocketAddrV4; 2] {
        [
            SocketAddrV4::new(self.client.address(), self.client_port.get()),
            SocketAddrV4::new(self.server.address(), SERVER),
        ]
    }

    /// The client sends a segment with these flags, numbers and data.
    pub(crate) fn client(&self, flags: u8, numbers: (u32, u32), data: &[u8]) {
        let [client, server] = self.addresses();
        self.client.send(&segment(client, server, flags, numbers, data), *server.ip());
    }

    pub(crate) fn server(&self, flags: u8, numbers: (u32, u32), data: &[u8]) {
        let [client, server] = self.addresses();
        self.server.send(&segment(server, client, flags, numbers, data), *client.ip());
    }

    /// The client sends a datagram, or the server.
    pub(crate) fn datagram(&self, of_client: bool) {
        let [client, server] = self.addresses();
        let (side, from, to) = if of_client { (&self.client, client, server) } else { (&self.server, server, client) };
        side.datagram(from, to);
    }

    /// The server sends an ICMP error about a segment of the client.
    pub(crate) fn error(&self) {
        let [client, server] = self.addresses();
        let quoted = segment(client, server, ACK, (1001, 5001), b"data");
        self.server.send(&unreachable(server, client, &quoted[..28]), *client.ip());
    }
}

/// Packets that this host forwards.
pub(super) fn forwarded(protocol: Protocol) -> Rule {
    Rule::new(Hook::Forward).protocol(protocol)
}

/// All forwarded segments come to the queue.
pub(super) fn tcp() -> Rule {
    forwarded(Protocol::Tcp).to_queue(0)
}

/// All forwarded datagrams do.
pub(super) fn udp() -> Rule {
    forwarded(Protocol::Udp).to_queue(0)
}

/// Packets of the client that this host forwards.
pub(super) fn from_client(hosts: &Hosts, protocol: Protocol) -> Rule {
    forwarded(protocol).source_address(hosts.client.address(), 32)
}

/// The next packet, a segment with these flags.
pub(super) async fn queued(queue: &mut Queue, flags: u8) -> Packet {
    let packet = next(queue).await;
    assert_eq!(packet.payload()[33] & (SYN | RST | ACK), flags, "{packet:?}");
    packet
}

/// Takes the segment that waits and accepts it alone.
pub(super) async fn pass_segment(queue: &mut Queue, flags: u8) {
    confirm(queued(queue, flags).await.accept()).await.unwrap();
}

/// Accepts a connection of which connection tracking has not seen the beginning: by its second
/// packet.
pub(super) async fn accept_in_the_middle(queue: &mut Queue, send: impl Fn()) {
    for _ in 0..2 {
        send();
        confirm(queued(queue, ACK).await.accept().for_flow()).await.unwrap();
    }
}

/// A connection whose packets are accepted one by one.
pub(super) async fn opened(hosts: &Hosts, queue: &mut Queue) {
    hosts.client(SYN, (1000, 0), b"");
    pass_segment(queue, SYN).await;
    hosts.server(SYN_ACK, (5000, 1001), b"");
    pass_segment(queue, SYN_ACK).await;
    hosts.client(ACK, (1001, 5001), b"");
    pass_segment(queue, ACK).await;
    assert_eq!(hosts.arrived(), [2, 1]);
}

/// The client sends a datagram, and its conversation is denied.
pub(super) async fn deny_datagram(hosts: &Hosts, queue: &mut Queue) {
    hosts.datagram(true);
    confirm(next(queue).await.drop().for_flow()).await.unwrap();
}

/// Both sides begin a connection at once. The server's SYN passes, and then that of the client is
/// denied.
pub(super) async fn deny_crossing_syn(hosts: &Hosts, queue: &mut Queue) {
    hosts.client(SYN, (1000, 0), b"");
    let denied = queued(queue, SYN).await;
    hosts.server(SYN, (5000, 0), b"");
    pass_segment(queue, SYN).await;
    confirm(denied.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 1]);
}

fn last_packet(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    of_protocol(LAST, from, to, &[])
}

/// A packet of a protocol by its number.
pub(crate) fn of_protocol(number: u8, from: Ipv4Addr, to: Ipv4Addr, transport: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(from.octets(), to.octets(), 64).write(&mut bytes, IpNumber(number), transport).unwrap();
    bytes
}

/// A TCP segment.
pub(crate) fn segment(
    from: SocketAddrV4,
    to: SocketAddrV4,
    flags: u8,
    (sequence, acknowledgement): (u32, u32),
    data: &[u8],
) -> Vec<u8> {
    let mut builder =
        PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64).tcp(from.port(), to.port(), sequence, 64_000);
    builder = if flags & FIN != 0 { builder.fin() } else { builder };
    builder = if flags & SYN != 0 { builder.syn() } else { builder };
    builder = if flags & RST != 0 { builder.rst() } else { builder };
    builder = if flags & PSH != 0 { builder.psh() } else { builder };
    builder = if flags & ACK != 0 { builder.ack(acknowledgement) } else { builder };
    let mut bytes = Vec::new();
    builder.write(&mut bytes, data).unwrap();
    bytes
}

pub(crate) fn datagram(from: SocketAddrV4, to: SocketAddrV4, data: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64).udp(from.port(), to.port());
    let mut bytes = Vec::new();
    builder.write(&mut bytes, data).unwrap();
    bytes
}

pub(crate) fn unreachable(from: SocketAddrV4, to: SocketAddrV4, quoted: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64)
        .icmpv4(Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port));
    let mut bytes = Vec::new();
    builder.write(&mut bytes, quoted).unwrap();
    bytes
}

/// An echo request, or the reply.
pub(crate) fn echo(from: Ipv4Addr, to: Ipv4Addr, reply: bool, id: u16) -> Vec<u8> {
    let header = IcmpEchoHeader { id, seq: 1 };
    let kind = if reply { Icmpv4Type::EchoReply(header) } else { Icmpv4Type::EchoRequest(header) };
    let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64).icmpv4(kind);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, b"data").unwrap();
    bytes
}
