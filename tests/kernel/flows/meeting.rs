//! Two verdicts for one connection: the denial wins.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{Hook, Packet, Protocol, Queue, Rule, Verdict, divert::Match};

use super::{
    CROSSING, LOOPBACKS, Talk, bind, confirm, pass, queue_is_empty,
    segments::{self, ACK, Hosts, LAST, SYN, SYN_ACK, datagram, deny_datagram, echo, from_client, queued, udp},
    table, to_port,
};
use crate::common::{kernel_release, lose_connections, next};

tests![
    one a_denial_wins_over_an_accept_of_another_first_packet,
    one a_denial_wins_over_an_accept_of_the_other_side,
    one a_denial_wins_in_one_flush,
    one an_accept_of_a_lost_entry_is_forgotten,
    one an_icmp_error_does_not_speak_for_the_connection_it_quotes,
    one forged_packets_do_not_block_the_connections_of_others,
    one a_packet_of_the_other_side_is_dropped_only_shortly,
    one a_denial_wins_over_an_accept_of_the_other_side_at_an_earlier_hook,
    one a_denial_wins_over_such_an_accept_that_waits_in_another_queue,
    one a_crossing_datagram_is_dropped_although_an_earlier_one_of_the_client_has_passed,
    one a_rule_lets_a_crossing_datagram_pass_at_the_last_hook,
];

/// All but the last packets of the rounds.
fn forwarded() -> Rule {
    Rule::new(Hook::Forward).unless(Match::protocol(Protocol::Other(LAST)))
}

type Decide = fn(Packet) -> Verdict;

const ACCEPTS: [Decide; 2] = [|packet| packet.accept(), |packet| packet.accept().for_flow()];
const DENIALS: [Decide; 2] = [|packet| packet.drop().for_flow(), |packet| packet.reject().for_flow()];

/// Each has an entry of its own, and only one is confirmed.
async fn a_denial_wins_over_an_accept_of_another_first_packet() {
    for hook in [Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting] {
        for (accept, deny) in ACCEPTS.into_iter().flat_map(|accept| DENIALS.map(|deny| (accept, deny))) {
            for order in 0..4 {
                let talk = Talk::loopback(LOOPBACKS[order / 2]);
                let mut queue = bind();
                let _divert = table([to_port(hook, talk.port()).to_queue(0)]).install().unwrap();
                talk.ask(1);
                talk.ask(2);
                let [first, second] = [next(&mut queue).await, next(&mut queue).await];
                if order % 2 == 0 {
                    confirm(accept(first)).await.unwrap();
                    let _ = confirm(deny(second)).await;
                    talk.asked(1);
                } else {
                    let _ = confirm(deny(first)).await;
                    // At a later hook of the table, the packet may be one of a denied connection.
                    confirm(accept(second)).await.unwrap();
                }
                while let Some(_error) = talk.client.take_error().unwrap() {}
                talk.server.set_nonblocking(true).unwrap();
                while talk.server.recv(&mut [0]).is_ok() {}
                for number in 3..6 {
                    talk.ask(number);
                    queue_is_empty(&mut queue);
                }
                assert!(talk.server.recv(&mut [0]).is_err(), "{hook:?} {order}");
            }
        }
    }
}

/// The first packets of both sides wait at once; each has an entry in its own direction.
async fn a_denial_wins_over_an_accept_of_the_other_side() {
    let hosts = Hosts::new();
    for (accept, deny) in ACCEPTS.into_iter().flat_map(|accept| DENIALS.map(|deny| (accept, deny))) {
        for accept_first in [true, false] {
            hosts.another_port();
            let mut queue = bind();
            let divert = table([udp()]).install().unwrap();
            hosts.datagram(true);
            let denied = next(&mut queue).await;
            hosts.datagram(false);
            let accepted = next(&mut queue).await;
            if accept_first {
                confirm(accept(accepted)).await.unwrap();
                confirm(deny(denied)).await.unwrap();
            } else {
                confirm(deny(denied)).await.unwrap();
                confirm(accept(accepted)).await.unwrap();
            }
            assert_eq!(hosts.arrived()[0], 0);
            // No packet of the client passes unseen.
            for _ in 0..3 {
                hosts.datagram(true);
                assert_eq!(hosts.arrived()[0], 0, "{accept_first}");
                while let Ok(packet) = queue.try_recv() {
                    confirm(packet.drop()).await.unwrap();
                }
            }
            divert.close().unwrap();
        }
    }
}

/// A flush sends the verdicts in the order of the ids.
async fn a_denial_wins_in_one_flush() {
    for deny in DENIALS {
        let talk = Talk::loopback(LOOPBACKS[0]);
        let mut queue = bind();
        let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
        talk.ask(1);
        pass(&mut queue).await;
        talk.asked(1);
        talk.ask(2);
        talk.ask(3);
        let [first, second] = [next(&mut queue).await, next(&mut queue).await];
        second.accept().for_flow().submit().unwrap();
        confirm(deny(first)).await.unwrap();
        talk.server.set_nonblocking(true).unwrap();
        while talk.server.recv(&mut [0]).is_ok() {}
        while let Some(_error) = talk.client.take_error().unwrap() {}
        talk.ask(4);
        queue_is_empty(&mut queue);
        assert!(talk.server.recv(&mut [0]).is_err());
    }
}

/// Of the two entries of the first packets, the second is lost, and its mark with it.
async fn an_accept_of_a_lost_entry_is_forgotten() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    talk.ask(1);
    talk.ask(2);
    let [first, second] = [next(&mut queue).await, next(&mut queue).await];
    confirm(first.accept()).await.unwrap();
    confirm(second.accept().for_flow()).await.unwrap();
    talk.asked(1);
    talk.asked(2);
    talk.ask(3);
    // Linux 6.1 gives the packet the entry that was kept; 6.12 and later do not.
    if kernel_release() >= (6, 12) {
        pass(&mut queue).await;
    }
    talk.asked(3);
}

async fn an_icmp_error_does_not_speak_for_the_connection_it_quotes() {
    let hosts = Hosts::new();
    for decide in ACCEPTS.into_iter().chain(DENIALS) {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([forwarded().to_queue(0)]).install().unwrap();
        let pass = async |queue: &mut Queue| {
            confirm(next(queue).await.accept()).await.unwrap();
        };
        hosts.client(SYN, (1000, 0), b"");
        pass(&mut queue).await;
        hosts.server(SYN_ACK, (5000, 1001), b"");
        pass(&mut queue).await;
        hosts.client(ACK, (1001, 5001), b"");
        pass(&mut queue).await;
        hosts.error();
        let error = next(&mut queue).await;
        assert_eq!(error.payload()[9], 1);
        let _ = confirm(decide(error)).await;
        // The connection is as undecided as before, in both directions.
        hosts.client(ACK, (1001, 5001), b"data");
        pass(&mut queue).await;
        hosts.server(ACK, (5001, 1005), b"data");
        pass(&mut queue).await;
        divert.close().unwrap();
    }
}

/// An off-path sender uses the address of the server: the policy denies what it sends.
async fn forged_packets_do_not_block_the_connections_of_others() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([forwarded().to_queue(0)]).install().unwrap();
    for deny in DENIALS {
        // UDP: the client's own packet comes to the queue, and so do all later ones.
        hosts.another_port();
        hosts.datagram(false);
        let _ = confirm(deny(next(&mut queue).await)).await;
        hosts.arrived();
        hosts.datagram(true);
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        hosts.datagram(false);
        confirm(next(&mut queue).await.accept()).await.unwrap();
        assert_eq!(hosts.arrived(), [1, 1]);
        // TCP
        hosts.another_port();
        hosts.server(SYN, (7000, 0), b"");
        let _ = confirm(deny(next(&mut queue).await)).await;
        hosts.arrived();
        hosts.client(SYN, (1000, 0), b"");
        confirm(next(&mut queue).await.accept()).await.unwrap();
        hosts.server(SYN_ACK, (5000, 1001), b"");
        confirm(next(&mut queue).await.accept()).await.unwrap();
        assert_eq!(hosts.arrived(), [1, 1]);
    }
}

/// No rule asks about the client's packets, and the protocol does not tell what they are.
async fn a_packet_of_the_other_side_is_dropped_only_shortly() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let [client, server] = hosts.addresses();
    let rule = forwarded().source_address(*server.ip(), 32);
    let _divert = table([rule.to_queue(0)]).install().unwrap();
    hosts.datagram(false);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    hosts.server.send(&echo(*server.ip(), *client.ip(), false, 7), *client.ip());
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    let mut passed = 0;
    while passed == 0 {
        hosts.client.send(&datagram(client, server, b"data"), *server.ip());
        passed = hosts.arrived()[0];
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The denial itself holds.
    hosts.datagram(false);
    assert_eq!(hosts.arrived()[1], 0);
    // A TCP connection was never blocked.
    hosts.server(SYN, (7000, 0), b"");
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    hosts.client(SYN, (1000, 0), b"");
    assert_eq!(hosts.arrived(), [1, 0]);
}

/// The server's SYN is accepted with its connection at `Prerouting` and waits at `Forward`, when
/// the client's is denied.
async fn a_denial_wins_over_an_accept_of_the_other_side_at_an_earlier_hook() {
    let hosts = Hosts::new();
    for later_for_flow in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let rules = [Hook::Prerouting, Hook::Forward].map(|hook| Rule::new(hook).protocol(Protocol::Tcp).to_queue(0));
        let divert = table(rules).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        let denied = queued(&mut queue, SYN).await;
        hosts.server(SYN, (5000, 0), b"");
        confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
        let later = queued(&mut queue, SYN).await;
        confirm(denied.drop().for_flow()).await.unwrap();
        let later = later.accept();
        confirm(if later_for_flow { later.for_flow() } else { later }).await.unwrap();
        hosts.arrived();
        hosts.client(SYN_ACK, (1000, 5001), b"");
        hosts.server(ACK, (5001, 1001), b"data");
        hosts.client(ACK, (1001, 5005), b"bad");
        assert_eq!(hosts.arrived(), [0, 0], "it left the queue, {later_for_flow}");
        divert.close().unwrap();
    }
}

/// The same, and the SYN waits in the queue of another table.
async fn a_denial_wins_over_such_an_accept_that_waits_in_another_queue() {
    let hosts = Hosts::new();
    for two_places in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let later = segments::forwarded(Protocol::Udp).destination_port(9).drop();
        let rule = Rule::new(Hook::Prerouting).protocol(Protocol::Tcp).to_queue(0);
        let divert = table([rule].into_iter().chain(two_places.then_some(later))).install().unwrap();
        let mut other = Queue::builder(1).bind().await.unwrap();
        let earlier = Rule::new(Hook::Forward).protocol(Protocol::Tcp).priority(-5).to_queue(1);
        let second = Divert::builder().rule(earlier).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        let denied = queued(&mut queue, SYN).await;
        hosts.server(SYN, (5000, 0), b"");
        confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
        let later = next(&mut other).await;
        confirm(denied.drop().for_flow()).await.unwrap();
        confirm(later.accept()).await.unwrap();
        second.close().unwrap();
        hosts.arrived();
        hosts.client(SYN_ACK, (1000, 5001), b"");
        hosts.server(ACK, (5001, 1001), b"data");
        hosts.client(ACK, (1001, 5005), b"bad");
        assert_eq!(hosts.arrived(), [0, 0], "it left the queue, {two_places}");
        divert.close().unwrap();
    }
}

/// It waits in the queue of another table meanwhile.
async fn a_crossing_datagram_is_dropped_although_an_earlier_one_of_the_client_has_passed() {
    let hosts = Hosts::new();
    let [_, server] = hosts.addresses();
    let mut arrived = Vec::new();
    for earlier in [false, true] {
        let mut queue = bind();
        let rule = from_client(&hosts, Protocol::Udp).to_queue(0);
        let divert = table([rule]).install().unwrap();
        let mut other = Queue::builder(1).bind().await.unwrap();
        let of_server = Rule::new(Hook::Prerouting).protocol(Protocol::Udp).source_address(*server.ip(), 32);
        let second = Divert::builder().rule(of_server.to_queue(1)).install().unwrap();
        hosts.datagram(false);
        let crosses = next(&mut other).await;
        if earlier {
            hosts.datagram(true);
            pass(&mut queue).await;
        }
        let denied = Instant::now();
        deny_datagram(&hosts, &mut queue).await;
        hosts.arrived();
        confirm(crosses.accept()).await.unwrap();
        if denied.elapsed() >= CROSSING {
            return;
        }
        arrived.push(hosts.arrived());
        second.close().unwrap();
        divert.close().unwrap();
        lose_connections();
    }
    assert_eq!(arrived, [[0, 0]; 2]);
}

/// "It also passes if a rule of yours accepts it at the last hook with rules."
async fn a_rule_lets_a_crossing_datagram_pass_at_the_last_hook() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let mut arrived = Vec::new();
    for later in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let from = |address: SocketAddrV4| {
            Rule::new(Hook::Prerouting).protocol(Protocol::Udp).source_address(*address.ip(), 32)
        };
        let other = segments::forwarded(Protocol::Udp).destination_port(9).drop();
        let rules = [from(client).to_queue(0), from(server).accept()];
        let divert = table(rules.into_iter().chain(later.then_some(other))).install().unwrap();
        let denied = Instant::now();
        deny_datagram(&hosts, &mut queue).await;
        hosts.datagram(false);
        if denied.elapsed() >= CROSSING {
            return;
        }
        arrived.push(hosts.arrived());
        divert.close().unwrap();
    }
    assert_eq!(arrived, [[0, 1], [0, 0]]);
}
