//! Each action.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{
    ErrorKind as Kind, Hook, Protocol, Rule,
    divert::{Direction, Match, Priority, TableFamily},
};

use super::{connect, counts, datagram, install, out, port, receiver, udp_out};
use crate::support::{self, Bridge, PATIENCE, RawQueue, udp};

tests![
    sync rejected_datagrams_are_answered_with_port_unreachable,
    sync rejected_connections_are_reset,
    sync one_rule_rejects_all_protocols,
    sync mark_is_changed_for_later_rules_and_the_queue,
    sync rule_without_an_action_continues,
    sync priorities_by_name_and_per_rule,
    sync tables_of_one_version,
    sync table_of_a_bridge,
    sync counters_have_packets_and_bytes,
    sync what_the_kernel_lacks_is_named,
];

const LOOPBACKS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The error that a sender gets for a datagram to this address. Waits for it if one is expected.
fn answer_to_a_datagram(address: IpAddr, to: u16, expected: bool) -> Option<ErrorKind> {
    let from = receiver(address);
    from.connect((address, to)).unwrap();
    from.send(b"x").unwrap();
    from.set_nonblocking(!expected).unwrap();
    from.recv(&mut [0; 8]).err().map(|error| error.kind())
}

/// The error of a connection to a listener.
fn answer_to_a_connection(address: IpAddr) -> Option<ErrorKind> {
    let listener = TcpListener::bind((address, 0)).unwrap();
    TcpStream::connect_timeout(&listener.local_addr().unwrap(), PATIENCE).err().map(|error| error.kind())
}

fn rejected_datagrams_are_answered_with_port_unreachable() {
    for (address, family) in [
        (LOOPBACKS[0], TableFamily::Inet),
        (LOOPBACKS[1], TableFamily::Inet),
        (LOOPBACKS[0], TableFamily::Ip),
        (LOOPBACKS[1], TableFamily::Ip6),
    ] {
        let to = receiver(address);
        for hook in [Hook::Prerouting, Hook::Input] {
            let rule = Rule::new(hook).protocol(Protocol::Udp).destination_port(port(&to)).reject();
            let divert = Divert::builder().family(family).rule(rule).install().unwrap();
            let answer = answer_to_a_datagram(address, port(&to), true);
            assert_eq!(answer, Some(ErrorKind::ConnectionRefused), "{address} {family:?} {hook:?}");
            assert_eq!(counts(&divert), [1]);
            divert.close().unwrap();
        }
        assert_eq!(answer_to_a_datagram(address, port(&to), false), Some(ErrorKind::WouldBlock));
    }
}

fn rejected_connections_are_reset() {
    for address in LOOPBACKS {
        let divert = install([Rule::new(Hook::Input).when(Match::tcp_syn()).reject()]);
        assert_eq!(answer_to_a_connection(address), Some(ErrorKind::ConnectionRefused));
        assert_eq!(counts(&divert), [1]);
        divert.close().unwrap();
        assert_eq!(answer_to_a_connection(address), None);
    }
}

fn one_rule_rejects_all_protocols() {
    let to = LOOPBACKS.map(receiver);
    // The reset and the error come to this hook too.
    let divert = install([Rule::new(Hook::Input).when(Match::direction(Direction::Original)).reject()]);
    for (address, to) in LOOPBACKS.into_iter().zip(&to) {
        assert_eq!(answer_to_a_connection(address), Some(ErrorKind::ConnectionRefused));
        assert_eq!(answer_to_a_datagram(address, port(to), true), Some(ErrorKind::ConnectionRefused));
    }
    // One rule, though the kernel has two.
    assert_eq!(divert.counters().unwrap().len(), 1);
    assert!(counts(&divert)[0] >= 4);
}

fn mark_is_changed_for_later_rules_and_the_queue() {
    let (to, from) = (receiver(Ipv4Addr::LOCALHOST), support::udp_marked("127.0.0.1:0", 0xf0f0));
    let queue = RawQueue::bind(3).unwrap();
    let divert = install([
        udp_out().set_mark(0x0a, 0xff),
        udp_out().mark(0xf00a, u32::MAX).count(),
        udp_out().set_mark(0x7000_0000, 0xf000_0000).to_queue(3),
    ]);
    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    let packet = queue.next(PATIENCE).expect("a packet");
    assert_eq!(packet.mark, 0x7000_f00a);
    assert_eq!(counts(&divert), [1, 1, 1]);
    // Linux 6.1 warns if a packet is still queued when the last base chain of the hook goes.
    drop(queue);
}

fn rule_without_an_action_continues() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let divert = install([udp_out().count(), udp_out().accept(), udp_out().drop()]);
    datagram(Ipv4Addr::LOCALHOST, &to);
    assert_eq!(counts(&divert), [1, 1, 0]);
}

fn priorities_by_name_and_per_rule() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let seen = |priority: Priority| udp_out().priority(priority).mark(1, u32::MAX).count();
    let divert = Divert::builder()
        .priority(Priority::SECURITY)
        .rule(seen(Priority::RAW))
        .rule(udp_out().priority(Priority::MANGLE).set_mark(1, u32::MAX))
        .rule(seen(Priority::FILTER))
        .rule(udp_out().mark(1, u32::MAX).set_mark(2, u32::MAX))
        .rule(seen(Priority::from(51)))
        .install()
        .unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    assert_eq!(counts(&divert), [0, 1, 1, 1, 0]);
}

fn tables_of_one_version() {
    let to = LOOPBACKS.map(receiver);
    for (family, index) in [(TableFamily::Ip, 0), (TableFamily::Ip6, 1)] {
        let rule = udp_out().destination_address(LOOPBACKS[index], 8).destination_port(port(&to[index]));
        let divert = Divert::builder().family(family).rules([udp_out().count(), rule.count()]).install().unwrap();
        LOOPBACKS.into_iter().zip(&to).for_each(|(address, to)| datagram(address, to));
        assert_eq!(counts(&divert), [1, 1], "{family:?}");
        divert.replace_rules([udp_out().drop()]).unwrap();
        let results = LOOPBACKS.map(|address| udp((address, 0)).send_to(b"x", (address, 9)).is_ok());
        assert!(!results[index], "{family:?}");
        assert!(results[1 - index], "{family:?}");
        divert.close().unwrap();
    }
}

fn counters_have_packets_and_bytes() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let divert = install([udp_out().count(), Rule::new(Hook::Input).protocol(Protocol::Udp).count(), out().accept()]);
    for _ in 0..3 {
        datagram(Ipv4Addr::LOCALHOST, &to);
        to.recv(&mut [0; 8]).unwrap();
    }
    let counters = divert.counters().unwrap();
    let numbers: Vec<_> = counters.iter().map(|counter| (counter.packets, counter.bytes)).collect();
    assert_eq!(numbers, [(3, 87), (3, 87), (3, 87)]);
    divert.remove_rules().unwrap();
    assert_eq!(divert.counters().unwrap(), []);
    drop(connect());
}

fn table_of_a_bridge() {
    let bridge = Bridge::new();
    let rule = || Rule::new(Hook::Forward);
    let divert = Divert::builder()
        .family(TableFamily::Bridge)
        .priority(Priority::BRIDGE_FILTER)
        .rule(rule().ipv4().protocol(Protocol::Udp).destination_port(7).count())
        .rule(rule().ipv4().protocol(Protocol::Udp).when(Match::destination_ports([8_u16, 10])).drop())
        .rule(rule().ipv6().count())
        .rule(rule().ipv4().destination_address(Ipv4Addr::new(192, 0, 2, 2), 32).count())
        .rule(rule().interface("nosuch*").drop())
        .install()
        .unwrap();
    super::send_over(&bridge, &[7, 8, 9]);
    assert_eq!(counts(&divert), [1, 1, 0, 2, 0]);
}

fn what_the_kernel_lacks_is_named() {
    // The bridge family has the target of xtables on no kernel.
    let rule = Rule::new(Hook::Forward).to_queue(1);
    match Divert::builder().family(TableFamily::Bridge).rule(rule).install() {
        Ok(divert) => divert.close().unwrap(),
        Err(error) => {
            assert_eq!(error.kind(), Kind::Unsupported, "{error}");
            assert!(error.to_string().contains("rule 0"), "{error}");
            assert!(error.to_string().contains("NFT_QUEUE"), "{error}");
        }
    }
    let rule = Rule::new(Hook::Forward).first_packets(1).count();
    match Divert::builder().family(TableFamily::Bridge).rule(rule).install() {
        Ok(divert) => divert.close().unwrap(),
        Err(error) => {
            assert_eq!(error.kind(), Kind::Unsupported, "{error}");
            assert!(error.to_string().contains("NF_CONNTRACK_BRIDGE"), "{error}");
        }
    }
    let rule = Rule::new(Hook::Input).protocol(Protocol::Tcp).reject();
    match Divert::builder().family(TableFamily::Bridge).rule(rule).install() {
        Ok(divert) => divert.close().unwrap(),
        Err(error) => {
            assert_eq!(error.kind(), Kind::Unsupported, "{error}");
            assert!(error.to_string().contains("NFT_REJECT"), "{error}");
        }
    }
}
