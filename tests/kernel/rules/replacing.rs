//! All rules replaced in one transaction.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{
    ErrorKind, Hook, Protocol, Rule,
    divert::{Match, Priority},
};

use super::{counts, datagram, install, out, port, receiver, udp_out};
use crate::support::{self, PATIENCE, RawQueue, many};

tests![
    sync rules_are_replaced_in_one_step,
    sync refused_rules_leave_the_old_ones,
    sync new_hooks_and_priorities_are_added,
    sync the_first_rule_to_a_queue_may_come_later,
    sync declared_chains_let_held_packets_alone,
    sync held_packets_survive_the_last_rule_of_connection_tracking,
    sync traffic_with_held_packets_is_not_lost_nor_queued_twice,
];

fn rules_are_replaced_in_one_step() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let divert = install([udp_out().count(), udp_out().drop()]);
    divert.replace_rules([udp_out().accept()]).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    assert_eq!(counts(&divert), [1]);
    divert.replace_rules([]).unwrap();
    assert_eq!(counts(&divert), []);
    datagram(Ipv4Addr::LOCALHOST, &to);
    let ports = Match::destination_ports([port(&to), 1]);
    divert.replace_rules([udp_out().when(ports).count(), udp_out().count()]).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    assert_eq!(counts(&divert), [1, 1]);
}

fn refused_rules_leave_the_old_ones() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let divert = install([udp_out().count()]);
    let error = divert.replace_rules([udp_out().accept(), out()]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("rule 1: action"), "{error}");
    datagram(Ipv4Addr::LOCALHOST, &to);
    assert_eq!(counts(&divert), [1]);
}

fn new_hooks_and_priorities_are_added() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let divert = install([udp_out().count()]);
    let udp_in = || Rule::new(Hook::Input).protocol(Protocol::Udp);
    divert.replace_rules([udp_in().count(), udp_out().priority(Priority::MANGLE).count(), udp_out().count()]).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    to.recv(&mut [0; 8]).unwrap();
    assert_eq!(counts(&divert), [1, 1, 1]);
    divert.replace_rules([udp_out().count()]).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    assert_eq!(counts(&divert), [1]);
    divert.remove_rules().unwrap();
    divert.replace_rules([udp_in().drop()]).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    support::wait_until("it is dropped", || counts(&divert) == [1]);
}

/// How the kernel sends to a queue is not known before.
fn the_first_rule_to_a_queue_may_come_later() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let queue = RawQueue::bind(8).unwrap();
    for hook in [Hook::Output, Hook::Postrouting] {
        let divert = install([udp_out().count()]);
        divert.replace_rules([Rule::new(hook).protocol(Protocol::Udp).to_queue(8)]).unwrap();
        datagram(Ipv4Addr::LOCALHOST, &to);
        queue.accept(&queue.next(PATIENCE).expect("the packet is queued"));
        assert_eq!(to.recv(&mut [0; 8]).unwrap(), 1);
        assert_eq!(counts(&divert), [1]);
        divert.close().unwrap();
    }
}

fn declared_chains_let_held_packets_alone() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let queue = RawQueue::bind(8).unwrap();
    let divert = Divert::builder()
        .chain(Hook::Output, Priority::RAW)
        .chain(Hook::Output, None)
        .defragment(true)
        .rule(udp_out().to_queue(8))
        .install()
        .unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to);
    let packet = queue.next(PATIENCE).expect("the packet is queued");
    divert
        .replace_rules([udp_out().priority(Priority::RAW).count(), udp_out().destination_port(port(&to)).to_queue(8)])
        .unwrap();
    queue.accept(&packet);
    assert_eq!(to.recv(&mut [0; 8]).unwrap(), 1);
    assert!(queue.next(Duration::from_millis(50)).is_none(), "it is not queued again");
}

fn held_packets_survive_the_last_rule_of_connection_tracking() {
    let to = receiver(Ipv4Addr::LOCALHOST);
    let queue = RawQueue::bind(8).unwrap();
    let tracked = || udp_out().unless(Match::connection_mark(1, 1)).to_queue(8);
    let divert = install([tracked()]);
    for change in [
        || -> Vec<Rule> { vec![udp_out().accept()] },
        || vec![Rule::new(Hook::Output).unless(Match::connection_mark(2, 2)).accept()],
        Vec::new,
    ] {
        datagram(Ipv4Addr::LOCALHOST, &to);
        let packet = queue.next(PATIENCE).expect("the packet is queued");
        divert.replace_rules(change()).unwrap();
        assert_eq!(support::queue_line(8).unwrap()[2], 1, "the packet is still queued");
        queue.accept(&packet);
        assert_eq!(to.recv(&mut [0; 8]).unwrap(), 1);
        divert.replace_rules([tracked()]).unwrap();
    }
    datagram(Ipv4Addr::LOCALHOST, &to);
    let packet = queue.next(PATIENCE).expect("the packet is queued");
    divert.remove_rules().unwrap();
    queue.accept(&packet);
    assert_eq!(to.recv(&mut [0; 8]).unwrap(), 1);
}

/// Numbered datagrams, some thousands a second, are queued while the rules are replaced over and
/// over. Every twentieth is held for a while.
fn traffic_with_held_packets_is_not_lost_nor_queued_twice() {
    const COUNT: u32 = many(20_000);
    const REPLACEMENTS: u32 = 50;
    let (to, from) = (receiver(Ipv4Addr::LOCALHOST), receiver(Ipv4Addr::LOCALHOST));
    let queue = RawQueue::bind(8).unwrap();
    // One port, several ports and several ranges in turn, each compared in another way.
    let rules = |number: u32| {
        let ports = match number % 3 {
            0 => Match::destination_port(port(&to)),
            1 => Match::destination_ports([port(&to), 1, 3]),
            _ => Match::destination_ports([port(&to)..=port(&to), 1..=u16::try_from(number).unwrap()]),
        };
        [udp_out().when(ports).set_mark(number, u32::MAX).to_queue(8), udp_out().drop()]
    };
    let divert = install(rules(0));
    let address = to.local_addr().unwrap();
    let (replaced, received) = (AtomicU32::new(0), AtomicU32::new(0));
    let done = AtomicBool::new(false);

    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..COUNT {
                // Few enough on the way for any receive buffer.
                while number - received.load(Ordering::Relaxed) >= 100 {
                    thread::yield_now();
                }
                from.send_to(&number.to_be_bytes(), address).expect("a rule drops nothing");
            }
        });
        scope.spawn(|| {
            for number in 1.. {
                if done.load(Ordering::Relaxed) && number > REPLACEMENTS {
                    break;
                }
                divert.replace_rules(rules(number)).unwrap();
                replaced.store(number, Ordering::Relaxed);
            }
        });
        let receiver = scope.spawn(|| receive_all(&to, COUNT, &received));

        let mut queued = BTreeSet::new();
        let mut held = Vec::new();
        let begin = Instant::now();
        while queued.len() < COUNT as usize {
            assert!(begin.elapsed() < 10 * PATIENCE, "{} packets came", queued.len());
            if let Some(packet) = queue.next(Duration::from_millis(20)) {
                let number = u32::from_be_bytes(*packet.payload.last_chunk().unwrap());
                assert!(queued.insert(number), "{number} is queued twice");
                if number % 20 == 0 {
                    held.push((packet, replaced.load(Ordering::Relaxed)));
                } else {
                    queue.accept(&packet);
                }
            }
            // A held packet outlives a replacement, or, so that the sender continues, waits no
            // longer.
            let stuck = held.len() >= 50;
            held.retain(|(packet, number)| {
                let hold = replaced.load(Ordering::Relaxed) <= *number + 1 && !stuck;
                if !hold {
                    queue.accept(packet);
                }
                hold
            });
        }
        held.iter().for_each(|(packet, _)| queue.accept(packet));
        assert_eq!(receiver.join().unwrap(), (0..COUNT).collect(), "all are received, and each once");
        done.store(true, Ordering::Relaxed);
    });
    assert!(queue.next(Duration::ZERO).is_none());
}

fn receive_all(to: &UdpSocket, count: u32, received: &AtomicU32) -> BTreeSet<u32> {
    let mut numbers = BTreeSet::new();
    while numbers.len() < count as usize {
        let mut datagram = [0; 4];
        assert_eq!(to.recv(&mut datagram).expect("a datagram that is not lost"), 4);
        assert!(numbers.insert(u32::from_be_bytes(datagram)), "received twice");
        received.fetch_add(1, Ordering::Relaxed);
    }
    numbers
}
