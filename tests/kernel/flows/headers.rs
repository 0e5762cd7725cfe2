//! Headers that hide where a packet goes, or to which connection it belongs: fragments in
//! fragments, and source routes.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{IpNumber, PacketBuilder};
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    Hook, Protocol, Queue, Rule,
    divert::{ConnectionState, Match},
};

use super::{
    bind, confirm, pass, queue_is_empty,
    segments::{Hosts, forwarded},
    table,
};
use crate::{
    common::next,
    support::{self, Peer, VethOptions},
};

tests![
    one of_a_fragment_in_a_fragment_nothing_passes_the_queue,
    one a_fragment_in_a_fragment_passes_no_rule_without_flows,
    one a_header_chain_in_fragments_passes_no_rule_for_all_others,
    one packets_with_a_source_route_are_always_asked_about,
    one packets_with_ip_options_are_always_asked_about,
    one fragments_on_loopback_pass,
];

const PORT: u16 = 53;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const UDP: u8 = 17;

/// A host that sends IPv6 packets through this one, and one that receives them.
struct Path {
    from: Peer,
    to: Peer,
    /// Counts and drops what arrives: the last packets of a round, and others.
    sink: Divert,
}

impl Path {
    fn new() -> Self {
        let [from, to] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
        [&from, &to].into_iter().for_each(Peer::route_through_near);
        support::forwarding();
        // Before the kernel could reassemble.
        let rule = || Rule::new(Hook::Prerouting).priority(-500).source_address(from.far_v6, 128);
        let last = rule().protocol(Protocol::Other(LAST));
        let sink = to.run(|| crate::common::divert([last.drop(), rule().drop()]));
        Self { from, to, sink }
    }

    /// Sends a packet with this protocol or extension header.
    fn send(&self, next_header: u8, payload: &[u8]) {
        let mut packet = Vec::new();
        let addresses = (self.from.far_v6.octets(), self.to.far_v6.octets());
        let builder = PacketBuilder::ipv6(addresses.0, addresses.1, 64);
        builder.write(&mut packet, IpNumber(next_header), payload).unwrap();
        let to = self.to.far_v6;
        self.from.run(|| support::send_raw_ipv6(&packet, to)).unwrap();
    }

    fn datagram(&self) -> Vec<u8> {
        datagram(self.from.far_v6, self.to.far_v6)
    }

    /// The number of packets that have arrived since the rules of the sink exist.
    fn arrived(&self) -> u64 {
        let counted = |index: usize| self.sink.counters().unwrap()[index].packets;
        support::on_each_cpu(|_| {
            let last = counted(0);
            self.send(LAST, b"last");
            support::wait_until("the last packet has arrived", || counted(0) > last);
        });
        counted(1)
    }
}

/// For experiments (RFC 3692).
const LAST: u8 = 253;

/// The transport header and the data of a datagram.
fn datagram(from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv6(from.octets(), to.octets(), 64).udp(4000, PORT);
    builder.write(&mut packet, b"harmless, and what was not seen...").unwrap();
    packet.split_off(40)
}

/// A part of what comes behind the fragment header. `offset` is in bytes.
fn part(next_header: u8, offset: u16, more: bool, id: u32, bytes: &[u8]) -> Vec<u8> {
    let [high, low] = (offset | u16::from(more)).to_be_bytes();
    [&[next_header, 0, high, low], &id.to_be_bytes()[..], bytes].concat()
}

/// The whole of a fragmented packet: such a header is removed without looking at what it contains.
fn whole(bytes: &[u8]) -> Vec<u8> {
    part(FRAGMENT, 0, false, 7, bytes)
}

/// All of this port, and all but ICMPv6.
fn rules() -> [Rule; 2] {
    [
        Rule::new(Hook::Forward).protocol(Protocol::Udp).destination_port(PORT).to_queue(0),
        Rule::new(Hook::Forward).unless(Match::protocols([Protocol::Icmpv6, Protocol::Other(LAST)])).to_queue(0),
    ]
}

/// Sends the parts of a datagram: plain ones come to the queue as one packet; none passes in parts.
async fn send_parts(path: &Path, queue: &mut Queue) {
    let datagram = path.datagram();
    let (head, tail) = datagram.split_at(16);
    for (id, pack) in [(1, <[u8]>::to_vec as fn(&[u8]) -> Vec<u8>), (2, whole)] {
        path.send(FRAGMENT, &pack(&part(UDP, 16, false, id, tail)));
        path.send(FRAGMENT, &pack(&part(UDP, 0, true, id, head)));
        if id == 1 {
            let packet = next(queue).await;
            assert_eq!(packet.payload().len(), 40 + datagram.len());
            confirm(packet.accept()).await.unwrap();
            assert_eq!(path.arrived(), 2);
        } else {
            // The first part alone is no datagram.
            let before = path.arrived();
            while let Ok(packet) = queue.try_recv() {
                let bytes = packet.payload();
                assert_eq!((bytes[48], bytes[50..52].to_vec()), (UDP, vec![0, 1]), "a later part: {packet:?}");
                confirm(packet.drop()).await.unwrap();
            }
            assert_eq!(path.arrived(), before);
            assert_eq!(before, 2, "parts have passed");
        }
    }
}

/// Rules see whole packets, and what is no whole packet is dropped (`DivertBuilder::defragment`).
async fn of_a_fragment_in_a_fragment_nothing_passes_the_queue() {
    for rule in rules() {
        let path = Path::new();
        let mut queue = bind();
        let _divert = table([rule]).install().unwrap();
        send_parts(&path, &mut queue).await;
        support::fresh();
    }
}

async fn a_fragment_in_a_fragment_passes_no_rule_without_flows() {
    for rule in rules() {
        let path = Path::new();
        let mut queue = crate::common::bind_now(Queue::builder(0));
        // Nothing is reassembled at first.
        let divert = crate::common::divert([Rule::new(Hook::Forward).ipv4().count()]);
        divert.replace_rules([rule.clone()]).unwrap();
        send_parts(&path, &mut queue).await;
        divert.close().unwrap();
        // At all hooks but `Prerouting` and `Output`, also before that priority.
        for (hook, priority) in [(Hook::Forward, 0), (Hook::Forward, -450), (Hook::Postrouting, 0)] {
            let count = Rule::new(hook).priority(priority).protocol(Protocol::Tcp).destination_port(1).count();
            let divert = crate::common::divert([count]);
            let sent = path.arrived();
            path.send(FRAGMENT, &whole(&part(UDP, 16, false, 3, b"12345678")));
            assert_eq!(path.arrived(), sent, "{hook:?} {priority}");
            divert.close().unwrap();
        }
        queue_is_empty(&mut queue);
        support::fresh();
    }
}

/// The kernel finds no protocol in the first part, and does not reassemble it.
async fn a_header_chain_in_fragments_passes_no_rule_for_all_others() {
    for (with_flows, nested) in [(true, false), (true, true), (false, false), (false, true)] {
        for rule in rules() {
            let path = Path::new();
            let (mut queue, divert) = match with_flows {
                true => (bind(), table([rule]).install().unwrap()),
                false => (crate::common::bind_now(Queue::builder(0)), crate::common::divert([rule])),
            };
            // 16 bytes of options: padding.
            let options = [&[UDP, 1, 1, 12], &[0; 12][..]].concat();
            let chain = [options, path.datagram()].concat();
            let (head, tail) = chain.split_at(8);
            let pack = if nested { whole } else { <[u8]>::to_vec };
            path.send(FRAGMENT, &pack(&part(DESTINATION_OPTIONS, 0, true, 1, head)));
            path.send(FRAGMENT, &pack(&part(DESTINATION_OPTIONS, 8, false, 1, tail)));
            assert_eq!(path.arrived(), 0, "flows: {with_flows}, nested: {nested}");
            drop((queue.try_recv(), divert));
            support::fresh();
        }
    }
}

/// An accept of the connection with the next hop does not let a packet reach another host.
async fn packets_with_a_source_route_are_always_asked_about() {
    let path = Path::new();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Udp).to_queue(0)]).install().unwrap();
    path.send(UDP, &path.datagram());
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    path.send(UDP, &path.datagram());
    assert_eq!(path.arrived(), 2);
    // Type 4 (RFC 8754) with one segment, already reached; and a type that is not assigned.
    for kind in [4, 253] {
        let route = [&[UDP, 2, kind, 0, 0, 0, 0, 0], &path.to.far_v6.octets()[..]].concat();
        for decided in 0..2 {
            path.send(ROUTING, &[route.clone(), path.datagram()].concat());
            let packet = next(&mut queue).await;
            assert_eq!(packet.payload()[6], ROUTING, "{decided}");
            confirm(packet.accept().for_flow()).await.unwrap();
        }
    }
    // A home address of whom the kernel does not know (RFC 6275, section 6.3).
    let home = [&[UDP, 2, 1, 2, 0, 0, 201, 16], &path.from.far_v6.octets()[..]].concat();
    path.send(DESTINATION_OPTIONS, &[home, path.datagram()].concat());
    pass(&mut queue).await;
    path.send(UDP, &path.datagram());
    assert_eq!(path.arrived(), 8);
    queue_is_empty(&mut queue);
}

/// Over the loopback interface the kernel does not reassemble twice.
async fn fragments_on_loopback_pass() {
    let (to, from) = (support::udp((Ipv6Addr::LOCALHOST, 0)), support::udp((Ipv6Addr::LOCALHOST, 0)));
    let port = to.local_addr().unwrap().port();
    // More than the MTU of the interface with all headers.
    let data = vec![7; 65_507];
    for hook in [Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting] {
        let rule = Rule::new(hook).protocol(Protocol::Udp).destination_port(port);
        let tracked = rule.clone().when(Match::connection_state([ConnectionState::Invalid])).drop();
        let _divert = Divert::builder().rules([tracked, rule.count()]).defragment(true).install().unwrap();
        from.send_to(&data, to.local_addr().unwrap()).unwrap();
        assert_eq!(to.recv(&mut vec![0; 65_535]).unwrap(), data.len(), "{hook:?}");
    }
}

async fn packets_with_ip_options_are_always_asked_about() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Udp).to_queue(0)]).install().unwrap();
    hosts.datagram(true);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.datagram(true);
    let [client, server] = hosts.addresses();
    let with_option = |option: [u8; 4]| {
        let mut bytes = Vec::new();
        let addresses: [Ipv4Addr; 2] = [*client.ip(), *server.ip()];
        let builder = PacketBuilder::ip(etherparse::IpHeaders::Ipv4(
            etherparse::Ipv4Header {
                source: addresses[0].octets(),
                destination: addresses[1].octets(),
                time_to_live: 64,
                options: option.into(),
                ..Default::default()
            },
            Default::default(),
        ));
        builder.udp(client.port(), server.port()).write(&mut bytes, b"data").unwrap();
        bytes
    };
    // Nothing, nothing, nothing, the end; and a record of the route without places for it.
    for option in [[1, 1, 1, 0], [7, 3, 4, 0]] {
        hosts.client.send(&with_option(option), *server.ip());
        assert_eq!(next(&mut queue).await.payload()[0], 0x46);
        hosts.client.send(&with_option(option), *server.ip());
        pass(&mut queue).await;
    }
    hosts.datagram(true);
    hosts.datagram(false);
    assert_eq!(hosts.arrived(), [5, 1]);
    queue_is_empty(&mut queue);
}
