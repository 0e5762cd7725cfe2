//! Each condition, and its negation.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    Hook, Protocol, Rule,
    divert::{ConnectionState, Direction, Match, Rate, TcpFlags},
};

use super::{connect, counts, datagram, install, matched, out, port, receiver, udp_out};
use crate::support::{self, PATIENCE, udp, udp_marked};

tests![
    sync ports,
    sync many_ports,
    sync addresses,
    sync protocols,
    sync icmp_types,
    sync tcp_flags,
    sync interfaces,
    sync marks,
    sync connection_marks,
    sync connection_states_and_directions,
    sync first_packets_and_bytes_of_a_connection,
    sync accounting_is_switched_on_for_new_connections,
    sync users,
    sync rates,
    sync fragments_are_reassembled_before_ports_are_compared,
    sync connection_tracking_is_switched_on_without_a_rule,
];

const V4: Ipv4Addr = Ipv4Addr::LOCALHOST;
const V6: Ipv6Addr = Ipv6Addr::LOCALHOST;

fn ports() {
    for address in [IpAddr::from(V4), V6.into()] {
        let receivers = [20, 21, 22, 23, 24].map(|port| udp((address, port)));
        let all = || receivers.iter().for_each(|to| datagram(address, to));
        assert_eq!(matched(udp_out(), Match::destination_port(21), all), (1, 4));
        assert_eq!(matched(udp_out(), Match::destination_port(21..=23), all), (3, 2));
        assert_eq!(matched(udp_out(), Match::destination_ports([20_u16, 23, 90]), all), (2, 3));
        assert_eq!(matched(udp_out(), Match::destination_ports([0..=20, 22..=23, 500..=65535]), all), (3, 2));
        let both = out().when(Match::protocols([Protocol::Udp, Protocol::Tcp]));
        assert_eq!(matched(both, Match::destination_ports([24_u16]), all), (1, 4));

        let from = udp((address, 1000));
        let send = || _ = from.send_to(b"x", receivers[0].local_addr().unwrap()).unwrap();
        assert_eq!(matched(udp_out(), Match::source_port(1000), send), (1, 0));
        assert_eq!(matched(udp_out(), Match::source_ports([1..=999, 1001..=2000]), send), (0, 1));
    }
}

/// More ranges than a message holds.
fn many_ports() {
    let receivers = [3000, 3001, 60_001].map(|port| udp((V4, port)));
    let all = || receivers.iter().for_each(|to| datagram(V4, to));
    let odd = Match::destination_ports((0..2000_u16).map(|number| 2 * number + 1));
    assert_eq!(matched(udp_out(), odd, all), (1, 2));
    let ranges = Match::destination_ports((0..1000_u16).map(|number| 10 * number..=10 * number + 1));
    assert_eq!(matched(udp_out(), ranges, all), (2, 1));
}

fn addresses() {
    support::add_address("lo", "2001:db8::1".parse().unwrap(), 128);
    let four = [V4, Ipv4Addr::new(127, 1, 2, 3), Ipv4Addr::new(127, 9, 0, 1)].map(receiver);
    let six = [V6, "2001:db8::1".parse().unwrap()].map(receiver);
    let all = || {
        four.iter().for_each(|to| datagram(V4, to));
        six.iter().for_each(|to| datagram(V6, to));
    };
    let network = |address: &str, prefix| (address.parse::<IpAddr>().unwrap(), prefix);
    // Also the negated condition requires the IP version.
    assert_eq!(matched(udp_out(), Match::destination_address(Ipv4Addr::new(127, 1, 0, 0), 16), all), (1, 2));
    assert_eq!(matched(udp_out(), Match::destination_address(V6, 128), all), (1, 1));
    let several = [network("127.0.0.0", 16), network("127.9.0.1", 32)];
    assert_eq!(matched(udp_out(), Match::destination_addresses(several), all), (2, 1));
    let several = [network("2001:db8::", 32), network("fe80::", 10)];
    assert_eq!(matched(udp_out(), Match::destination_addresses(several), all), (1, 1));
    assert_eq!(matched(udp_out(), Match::source_address(V4, 32), all), (3, 0));
    let everything = [network("::", 1), network("8000::", 1)];
    let rule = udp_out().when(Match::source_addresses(everything));
    let divert = install([rule.count()]);
    all();
    assert_eq!(counts(&divert), [2]);
}

fn protocols() {
    let to = receiver(V4);
    let all = || {
        datagram(V4, &to);
        assert!(support::ping(V4.into(), PATIENCE));
        assert!(support::ping(V6.into(), PATIENCE));
    };
    assert_eq!(matched(out(), Match::protocol(Protocol::Udp), all), (1, 4));
    let icmp = Match::protocols([Protocol::Icmp, Protocol::Icmpv6]);
    assert_eq!(matched(out(), icmp, all), (4, 1));
    assert_eq!(matched(out(), Match::protocol(Protocol::Other(58)), all), (2, 3));
}

fn icmp_types() {
    let all = || {
        assert!(support::ping(V4.into(), PATIENCE));
        assert!(support::ping(V6.into(), PATIENCE));
    };
    // The negated condition requires the protocol too.
    assert_eq!(matched(out(), Match::icmp_type(8), all), (1, 1));
    assert_eq!(matched(out(), Match::icmpv6_type(129), all), (1, 1));
    assert_eq!(matched(out(), Match::icmpv6_type(1), all), (0, 2));
}

fn tcp_flags() {
    let all = || drop(connect());
    let rule = || out().when(Match::direction(Direction::Original));
    // After a second they are sent again.
    let begun = Instant::now();
    let is_one = |count: u64| count == 1 || count > 1 && begun.elapsed() >= Duration::from_secs(1);
    let (first, others) = matched(rule(), Match::tcp_syn(), all);
    assert!(is_one(first), "{first}, not one SYN");
    assert!(others >= 1, "an ACK");
    let answer = Match::tcp_flags(TcpFlags::SYN | TcpFlags::ACK, TcpFlags::SYN | TcpFlags::ACK | TcpFlags::RST);
    let answers = matched(out().when(Match::direction(Direction::Reply)), answer, all).0;
    assert!(is_one(answers), "{answers}, not one SYN with ACK");
}

fn interfaces() {
    let peer = support::veth();
    let (here, there) = (receiver(peer.near_v4), peer.run(|| receiver(peer.far_v4)));
    let lo = receiver(V4);
    let all = || {
        datagram(V4, &lo);
        here.send_to(b"x", there.local_addr().unwrap()).unwrap();
        there.send_to(b"x", here.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 8];
        here.recv(&mut buffer).unwrap();
        lo.recv(&mut buffer).unwrap();
    };
    let udp_in = || Rule::new(Hook::Input).protocol(Protocol::Udp);
    let beginning = format!("{}*", &peer.near[..3]);
    for name in [&peer.near, &beginning] {
        assert_eq!(matched(udp_out(), Match::interface(name), all), (1, 1), "{name}");
        assert_eq!(matched(udp_out(), Match::output_interface(name), all), (1, 1), "{name}");
        assert_eq!(matched(udp_in(), Match::interface(name), all), (1, 1), "{name}");
        assert_eq!(matched(udp_in(), Match::input_interface(name), all), (1, 1), "{name}");
    }
    assert_eq!(matched(udp_out(), Match::interface("l"), all), (0, 2));
    let divert = install([udp_out().interface("*").count()]);
    all();
    assert_eq!(counts(&divert), [2]);
}

fn marks() {
    let to = receiver(V4);
    let senders = [0, 0x12, 0x8000_0012].map(|mark| udp_marked((V4, 0), mark));
    let all = || senders.iter().for_each(|from| _ = from.send_to(b"x", to.local_addr().unwrap()).unwrap());
    assert_eq!(matched(udp_out(), Match::mark(0x12, 0xff), all), (2, 1));
    assert_eq!(matched(udp_out(), Match::mark(0, u32::MAX), all), (1, 2));
    let divert = install([udp_out().mark(0x12, 0xff).unless_mark(0x8000_0000, 0x8000_0000).count()]);
    all();
    assert_eq!(counts(&divert), [1]);
}

fn connection_marks() {
    let to = receiver(V4);
    let from = receiver(V4);
    let send = || _ = from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    let marks = |value| Match::connection_mark(value, 0xff);
    let divert = install([
        udp_out().when(marks(5)).count(),
        udp_out().unless(marks(5)).count(),
        udp_out().set_connection_mark(0x105, 0x1ff),
        udp_out().when(marks(5)).count(),
    ]);
    send();
    assert_eq!(counts(&divert), [0, 1, 1, 1]);
    send();
    assert_eq!(counts(&divert), [1, 1, 2, 2]);
}

fn connection_states_and_directions() {
    use ConnectionState::{Established, New, Related};
    for address in [IpAddr::from(V4), V6.into()] {
        let exchange = || {
            let [one, other] = [receiver(address), receiver(address)];
            one.send_to(b"x", other.local_addr().unwrap()).unwrap();
            other.send_to(b"x", one.local_addr().unwrap()).unwrap();
            one.send_to(b"x", other.local_addr().unwrap()).unwrap();
        };
        assert_eq!(matched(udp_out(), Match::connection_state([New]), exchange), (1, 2));
        assert_eq!(matched(udp_out(), Match::connection_state([Established, Related]), exchange), (2, 1));
        assert_eq!(matched(udp_out(), Match::direction(Direction::Original), exchange), (2, 1));
        assert_eq!(matched(udp_out(), Match::direction(Direction::Reply), exchange), (1, 2));
    }
}

/// Sends datagrams of 100 bytes, with the headers 128 or 148, and answers to some of them.
fn conversation(address: IpAddr, questions: u32, answers: u32) {
    let server = receiver(address);
    let client = receiver(address);
    client.connect(server.local_addr().unwrap()).unwrap();
    for number in 0..questions {
        client.send(&[0; 100]).unwrap();
        server.recv(&mut [0; 100]).unwrap();
        if number < answers {
            server.send_to(&[0; 100], client.local_addr().unwrap()).unwrap();
        }
    }
}

fn first_packets_and_bytes_of_a_connection() {
    for address in [IpAddr::from(V4), V6.into()] {
        let length = if address.is_ipv4() { 128 } else { 148 };
        assert_eq!(matched(udp_out(), Match::first_packets(3), || conversation(address, 10, 0)), (3, 7));
        // Both directions count.
        assert_eq!(matched(udp_out(), Match::first_packets(3), || conversation(address, 10, 10)), (3, 17));
        assert_eq!(matched(udp_out(), Match::first_packets(u64::MAX - 1), || conversation(address, 5, 0)), (5, 0));
        let bytes = Match::first_bytes(4 * length);
        assert_eq!(matched(udp_out(), bytes, || conversation(address, 10, 0)), (4, 6));
        let bytes = Match::first_bytes(4 * length - 1);
        assert_eq!(matched(udp_out(), bytes, || conversation(address, 10, 1)), (3, 8));
    }
}

fn accounting_is_switched_on_for_new_connections() {
    let file = "/proc/sys/net/netfilter/nf_conntrack_acct";
    let tracking = Divert::builder().track_connections().rule(out().count()).install().unwrap();
    assert_eq!(std::fs::read_to_string(file).unwrap().trim(), "0");
    let (client, server) = (receiver(V4), receiver(V4));
    client.connect(server.local_addr().unwrap()).unwrap();
    (0..5).for_each(|_| _ = client.send(b"x").unwrap());
    let divert = install([udp_out().first_packets(2).count()]);
    assert_eq!(std::fs::read_to_string(file).unwrap().trim(), "1");
    // An older connection: all its packets match.
    (0..5).for_each(|_| _ = client.send(b"x").unwrap());
    assert_eq!(counts(&divert), [5]);
    conversation(V4.into(), 5, 0);
    assert_eq!(counts(&divert), [7]);
    drop(tracking);
}

fn users() {
    let to = receiver(V4);
    let user = rustix::process::geteuid().as_raw();
    assert_eq!(matched(udp_out(), Match::user(user), || datagram(V4, &to)), (1, 0));
    assert_eq!(matched(udp_out(), Match::user(user + 1), || datagram(V4, &to)), (0, 1));
}

fn rates() {
    let to = receiver(V4);
    let send = || (0..20).for_each(|_| datagram(V4, &to));
    // An hour is longer than the test, so only the burst matches.
    let rate = Rate::packets_per_hour(1).burst(7);
    for (below, above) in [
        (udp_out().when(Match::rate_below(rate)), udp_out().when(Match::rate_above(rate))),
        (udp_out().unless(Match::rate_above(rate)), udp_out().unless(Match::rate_below(rate))),
    ] {
        let divert = install([below.count(), above.count()]);
        send();
        assert_eq!(counts(&divert), [7, 13]);
    }
    // Packets of 29 bytes; the bucket holds the bytes of a second and the burst.
    let divert = install([udp_out().when(Match::rate_below(Rate::bytes_per_second(1).burst(99))).count()]);
    send();
    let count = counts(&divert)[0];
    assert!((1..=4).contains(&count), "{count}");
    // Only what meets all other conditions counts.
    let other = receiver(V4);
    let divert = install([udp_out().when(Match::rate_below(rate)).destination_port(port(&other)).count()]);
    send();
    (0..9).for_each(|_| datagram(V4, &other));
    assert_eq!(counts(&divert), [7]);
}

/// Sends a UDP datagram to this host as two IPv4 fragments.
fn send_fragments(to: u16) {
    let mut packet = Vec::new();
    PacketBuilder::ipv4([127, 0, 0, 1], [127, 0, 0, 1], 64).udp(9, to).write(&mut packet, &[b'f'; 40]).unwrap();
    let (header, rest) = packet.split_at(20);
    let socket = support::raw_ipv4();
    for (payload, flags) in [(&rest[..24], 0x2000_u16), (&rest[24..], 3)] {
        let mut fragment = [header, payload].concat();
        let length = fragment.len() as u16;
        fragment[2..4].copy_from_slice(&length.to_be_bytes());
        fragment[4..6].copy_from_slice(&77_u16.to_be_bytes());
        fragment[6..8].copy_from_slice(&flags.to_be_bytes());
        support::send_raw_ipv4(&socket, &fragment, V4).unwrap();
    }
}

fn fragments_are_reassembled_before_ports_are_compared() {
    let to = receiver(V4);
    let arrived = Rule::new(Hook::Prerouting).protocol(Protocol::Udp);
    let install = |on: Option<bool>| {
        let builder =
            Divert::builder().rules([arrived.clone().destination_port(port(&to)).count(), arrived.clone().count()]);
        on.into_iter().fold(builder, |builder, on| builder.defragment(on)).install().unwrap()
    };
    let mut buffer = [0; 64];
    for (on, expected) in [(None, [1, 1]), (Some(true), [1, 1]), (Some(false), [1, 2])] {
        let divert = install(on);
        send_fragments(port(&to));
        assert_eq!(to.recv(&mut buffer).unwrap(), 40);
        let counted = counts(&divert);
        divert.close().unwrap();
        assert_eq!(counted, expected, "{on:?}");
    }
}

fn connection_tracking_is_switched_on_without_a_rule() {
    let divert = Divert::builder().track_connections().rule(udp_out().count()).install().unwrap();
    let [one, other] = [receiver(V4), receiver(V4)];
    one.send_to(b"x", other.local_addr().unwrap()).unwrap();
    // The rule is new, but the connection is not.
    divert.replace_rules([udp_out().when(Match::connection_state([ConnectionState::New])).count()]).unwrap();
    other.send_to(b"x", one.local_addr().unwrap()).unwrap();
    assert_eq!(counts(&divert), [0]);
    datagram(V4, &one);
    assert_eq!(counts(&divert), [1]);
}
