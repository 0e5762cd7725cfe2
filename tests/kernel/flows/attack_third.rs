//! Attempts around the memory of connections beside denied ones, and of conversations in both
//! directions.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use tokio_nfqueue::{
    Hook, Protocol, Queue, Rule,
    divert::{ConnectionState, FlowTuple, Match},
};

use super::{
    CROSSING, LOOPBACKS, Talk,
    attack_more::{COOKIE_ACK, COOKIE_ECHO, INIT, INIT_ACK, SCTP, initiation, sctp},
    bind, come, confirm, crossing_is_over, entries_gone, forgetful, pass, queue_is_empty,
    segments::{
        ACK, Hosts, SYN, SYN_ACK, accept_in_the_middle, deny_crossing_syn, deny_datagram, forwarded, from_client,
        pass_segment, queued, tcp, udp,
    },
    table, to_port,
};
use crate::common::{
    next,
    rules::{self, Place},
};

tests![
    one a_denied_syn_that_is_sent_again_does_not_come_to_the_queue,
    one a_denied_syn_that_is_sent_again_begins_nothing,
    one a_syn_is_accepted_before_a_later_place,
    one a_forwarded_datagram_that_crosses_a_denied_one_is_dropped_beside_rules_for_this_host,
    one a_syn_that_a_later_place_drops_begins_nothing,
    one a_forgotten_denial_leaves_nothing_beside,
    one an_expired_denial_leaves_nothing_beside,
    one a_denial_wins_over_a_translated_packet_of_the_other_side,
    one a_forged_packet_does_not_protect_a_translated_packet_of_the_other_side,
    one a_translated_conversation_stays_denied_when_its_entry_is_gone,
    one a_client_cannot_answer_its_own_sctp_init,
    one a_crossed_conversation_stays_denied_when_its_entry_is_gone,
    one a_later_syn_of_the_client_is_denied_beside_an_unanswered_one,
    one an_accept_on_this_host_survives_its_later_hook,
    one a_stray_syn_that_is_rejected_does_not_end_the_accept,
    one a_connection_beside_a_denial_comes_to_a_queue_behind_everything,
    one a_connection_beside_a_denial_on_this_host_goes_on,
    one as_many_conversations_as_the_capacity_are_remembered,
];

/// Both sides begin at once, and the server's SYN passes before that of the client is denied. The
/// client sends its SYN once more, as every client does.
async fn a_denied_syn_that_is_sent_again_does_not_come_to_the_queue() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    deny_crossing_syn(&hosts, &mut queue).await;
    hosts.client(SYN, (1000, 0), b"");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// The same, and only what connection tracking calls new comes to the queue.
async fn a_denied_syn_that_is_sent_again_begins_nothing() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = forwarded(Protocol::Tcp).when(Match::connection_state([ConnectionState::New])).to_queue(0);
    let _divert = table([rule]).install().unwrap();
    deny_crossing_syn(&hosts, &mut queue).await;
    hosts.client(SYN, (1000, 0), b"");
    hosts.client(SYN_ACK, (1000, 5001), b"");
    hosts.server(SYN_ACK, (5000, 1001), b"");
    hosts.client(ACK, (1001, 5001), b"bad");
    hosts.server(ACK, (5001, 1001), b"data");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// The table has another place, where no rule matches.
async fn a_syn_is_accepted_before_a_later_place() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let later = Rule::new(Hook::Postrouting).protocol(Protocol::Udp).destination_port(9).drop();
    let _divert = table([tcp(), later]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.server(SYN_ACK, (5000, 1001), b"");
    hosts.client(ACK, (1001, 5001), b"request");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [2, 1]);
}

/// No rule asks about the server's packets, and the table has a place for what this host sends or
/// receives.
async fn a_forwarded_datagram_that_crosses_a_denied_one_is_dropped_beside_rules_for_this_host() {
    let hosts = Hosts::new();
    let mut arrived = Vec::new();
    for hook in [None, Some(Hook::Input), Some(Hook::Output)] {
        hosts.another_port();
        let mut queue = bind();
        let [client, _] = hosts.addresses();
        let asked = Rule::new(Hook::Prerouting).protocol(Protocol::Udp).source_address(*client.ip(), 32).to_queue(0);
        let other = hook.map(|hook| Rule::new(hook).protocol(Protocol::Udp).destination_port(9).drop());
        let divert = table([asked].into_iter().chain(other)).install().unwrap();
        let denied = Instant::now();
        deny_datagram(&hosts, &mut queue).await;
        hosts.datagram(false);
        if denied.elapsed() >= CROSSING {
            return;
        }
        arrived.push(hosts.arrived());
        divert.close().unwrap();
    }
    assert_eq!(arrived, [[0, 0]; 3]);
}

/// Clients are asked about; servers may not begin a connection. Connection tracking has lost the
/// denied connection.
async fn a_syn_that_a_later_place_drops_begins_nothing() {
    let hosts = Hosts::new();
    let [_, server] = hosts.addresses();
    for later in [false, true] {
        let mut queue = bind();
        let asked = from_client(&hosts, Protocol::Tcp).to_queue(0);
        let begins = forwarded(Protocol::Tcp).source_address(*server.ip(), 32).when(Match::tcp_syn()).drop();
        let begins = if later { begins.priority(10) } else { begins };
        let divert = table([asked, begins]).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        pass_segment(&mut queue, SYN).await;
        hosts.server(SYN_ACK, (5000, 1001), b"");
        hosts.client(ACK, (1001, 5001), b"bad");
        confirm(queued(&mut queue, ACK).await.drop().for_flow()).await.unwrap();
        assert_eq!(hosts.arrived(), [1, 1]);
        entries_gone().await;
        hosts.server(ACK, (5001, 1001), b"data");
        assert_eq!(hosts.arrived(), [0, 0]);
        hosts.server(SYN, (9000, 0), b"");
        hosts.server(ACK, (5001, 1001), b"data");
        assert_eq!(hosts.arrived(), [0, 0], "{later}");
        divert.close().unwrap();
        entries_gone().await;
    }
}

/// The client's packet waits, that of the server is accepted with its connection, and then the
/// client's is denied.
async fn crossing_denial(hosts: &Hosts, queue: &mut Queue) {
    hosts.datagram(true);
    let denied = next(queue).await;
    hosts.datagram(false);
    confirm(next(queue).await.accept().for_flow()).await.unwrap();
    confirm(denied.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.datagram(false);
    hosts.datagram(true);
    queue_is_empty(queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// The server had a connection of its own beside an earlier denial.
async fn a_forgotten_denial_leaves_nothing_beside() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    for earlier in [false, true] {
        let mut queue = bind();
        let divert = table([udp()]).install().unwrap();
        if earlier {
            deny_datagram(&hosts, &mut queue).await;
            hosts.datagram(false);
            pass(&mut queue).await;
            divert.forget_flow(FlowTuple::udp(client, server)).unwrap();
            hosts.arrived();
            entries_gone().await;
        }
        crossing_denial(&hosts, &mut queue).await;
        divert.close().unwrap();
        entries_gone().await;
    }
}

/// The same, and the earlier denial was not renewed, but the server's connection was.
async fn an_expired_denial_leaves_nothing_beside() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = forgetful([udp()]).denied_flows(10, Duration::from_secs(8)).install().unwrap();
    deny_datagram(&hosts, &mut queue).await;
    for _ in 0..14 {
        hosts.datagram(false);
        pass(&mut queue).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    hosts.arrived();
    entries_gone().await;
    crossing_denial(&hosts, &mut queue).await;
}

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The client has another address for the server, in both directions.
fn translated(hosts: &Hosts) -> impl Fn() {
    let [client, server] = hosts.addresses();
    rules::install_source_nat("snat", server.port(), OUTSIDE).unwrap();
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, client.port(), (*client.ip(), client.port())).unwrap();
    move || {
        let outside = SocketAddrV4::new(OUTSIDE, client.port());
        hosts.server.datagram(server, outside);
    }
}

async fn a_denial_wins_over_a_translated_packet_of_the_other_side() {
    let hosts = Hosts::new();
    let answer = translated(&hosts);
    let mut queue = bind();
    let _divert = table([udp()]).install().unwrap();
    denied_while_both_begin(&hosts, &mut queue, answer).await;
}

/// It has the server's address, and is for the address of the client that the server does not know.
async fn a_forged_packet_does_not_protect_a_translated_packet_of_the_other_side() {
    let hosts = Hosts::new();
    let answer = translated(&hosts);
    let mut queue = bind();
    let _divert = table([udp()]).install().unwrap();
    hosts.datagram(false);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 0]);
    denied_while_both_begin(&hosts, &mut queue, answer).await;
}

async fn denied_while_both_begin(hosts: &Hosts, queue: &mut Queue, answer: impl Fn()) {
    hosts.datagram(true);
    let denied = next(queue).await;
    answer();
    pass(queue).await;
    confirm(denied.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.datagram(true);
    queue_is_empty(queue);
    answer();
    queue_is_empty(queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// Only the client's datagrams come to the queue.
async fn a_translated_conversation_stays_denied_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let answer = translated(&hosts);
    let mut queue = bind();
    let _divert = table([from_client(&hosts, Protocol::Udp).to_queue(0)]).install().unwrap();
    hosts.datagram(true);
    pass(&mut queue).await;
    answer();
    assert_eq!(hosts.arrived(), [1, 1]);
    deny_datagram(&hosts, &mut queue).await;
    answer();
    assert_eq!(hosts.arrived(), [0, 0]);
    entries_gone().await;
    answer();
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// The server says nothing to the INIT that was accepted.
async fn a_client_cannot_answer_its_own_sctp_init() {
    let hosts = Hosts::new();
    // The packets have no checksums.
    fs::write("/proc/sys/net/netfilter/nf_conntrack_checksum", "0").unwrap();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Other(SCTP)).to_queue(0)]).install().unwrap();
    let (mine, yours) = (0x1111, 0x2222);
    let data = [&[0; 12][..], b"data"].concat();
    for (of_client, tag, kind, body) in [
        (true, 0, INIT, initiation(mine)),
        (false, mine, INIT_ACK, initiation(yours)),
        (true, yours, COOKIE_ECHO, b"cook".to_vec()),
        (false, mine, COOKIE_ACK, Vec::new()),
        (true, yours, 0, data.clone()),
    ] {
        sctp(&hosts, of_client, tag, kind, &body);
        confirm(next(&mut queue).await.accept()).await.unwrap();
    }
    assert_eq!(hosts.arrived(), [3, 2]);
    sctp(&hosts, true, 0, INIT, &initiation(0x3333));
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [1, 0]);
    sctp(&hosts, true, yours, INIT_ACK, &initiation(0x3333));
    sctp(&hosts, true, yours, 0, &data);
    assert_eq!(hosts.arrived(), [0, 0], "data of the older association has passed");
}

/// The server's datagrams have passed before the verdict. No rule asks about them.
async fn a_crossed_conversation_stays_denied_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([from_client(&hosts, Protocol::Udp).to_queue(0)]).install().unwrap();
    hosts.datagram(true);
    let denied = next(&mut queue).await;
    hosts.datagram(false);
    hosts.datagram(true);
    pass(&mut queue).await;
    confirm(denied.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [1, 1]);
    hosts.datagram(false);
    hosts.datagram(true);
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
    entries_gone().await;
    hosts.datagram(false);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// Both sides have sent, and one verdict for each.
async fn as_many_conversations_as_the_capacity_are_remembered() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([udp()]).denied_flows(2, Duration::from_secs(60)).install().unwrap();
    for _ in 0..2 {
        hosts.another_port();
        for of_client in [true, false] {
            hosts.datagram(of_client);
            pass(&mut queue).await;
        }
        deny_datagram(&hosts, &mut queue).await;
    }
    assert_eq!(hosts.arrived(), [2, 2]);
    entries_gone().await;
    for of_client in [true, false] {
        hosts.datagram(of_client);
        let packet = queue.try_recv();
        assert!(packet.is_err(), "{of_client}: {packet:?} came to the queue");
    }
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// The server's SYN passes after the denial: a connection of its own, to which no host replies. The
/// client begins the denied connection anew.
async fn a_later_syn_of_the_client_is_denied_beside_an_unanswered_one() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = forwarded(Protocol::Tcp).when(Match::connection_state([ConnectionState::New])).to_queue(0);
    let _divert = table([rule]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.drop().for_flow()).await.unwrap();
    hosts.client(SYN, (1000, 0), b"");
    queue_is_empty(&mut queue);
    // Anybody can send it under the server's name.
    hosts.server(SYN, (5000, 0), b"");
    pass_segment(&mut queue, SYN).await;
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.client(SYN, (1000, 0), b"");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// `Output` asks, and `Input` has a rule for something else.
async fn an_accept_on_this_host_survives_its_later_hook() {
    let mut queue = bind();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Rule::new(Hook::Output).protocol(Protocol::Tcp).destination_port(address.port()).to_queue(0);
    let other = Rule::new(Hook::Input).protocol(Protocol::Udp).destination_port(9).drop();
    let _divert = table([asked, other]).install().unwrap();
    let client = std::thread::spawn(move || std::net::TcpStream::connect(address).unwrap());
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    let queued = come(&mut queue).await;
    assert!(queued.is_none(), "{queued:?} came to the queue");
    drop(client.join());
}

/// It has not passed.
async fn a_stray_syn_that_is_rejected_does_not_end_the_accept() {
    let hosts = Hosts::new();
    for rejected in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        // So that what comes to the queue is no packet that connection tracking calls invalid.
        let invalid = forwarded(Protocol::Tcp).when(Match::connection_state([ConnectionState::Invalid]));
        let divert = table([invalid.unless(Match::tcp_syn()).drop(), tcp()]).install().unwrap();
        accept_in_the_middle(&mut queue, || hosts.client(ACK, (1001, 5001), b"request")).await;
        hosts.server(ACK, (5001, 1008), b"response");
        queue_is_empty(&mut queue);
        hosts.server(SYN, (5009, 0), b"");
        let syn = queued(&mut queue, SYN).await;
        let _ = confirm(if rejected { syn.reject() } else { syn.drop() }).await;
        hosts.arrived();
        hosts.client(ACK, (1008, 5009), b"request");
        let packet = queue.try_recv();
        assert!(packet.is_err(), "{packet:?} came to the queue, {rejected}");
        assert_eq!(hosts.arrived(), [1, 0]);
        divert.close().unwrap();
    }
}

/// At the highest priority, connection tracking may have confirmed the entry of a first packet.
async fn a_connection_beside_a_denial_comes_to_a_queue_behind_everything() {
    let hosts = Hosts::new();
    for priority in [0, i32::MAX - 1, i32::MAX] {
        hosts.another_port();
        let mut queue = bind();
        let rule = Rule::new(Hook::Postrouting).protocol(Protocol::Udp).priority(priority);
        let divert = table([rule.to_queue(0)]).install().unwrap();
        deny_datagram(&hosts, &mut queue).await;
        entries_gone().await;
        for _ in 0..2 {
            hosts.datagram(false);
            let come = tokio::time::timeout(Duration::from_secs(2), next(&mut queue)).await;
            let packet = come.unwrap_or_else(|_| panic!("no packet has come to the queue, {priority}"));
            confirm(packet.accept()).await.unwrap();
        }
        assert_eq!(hosts.arrived(), [0, 2]);
        divert.close().unwrap();
    }
}

/// Of both IP versions. The client answers, which its rule asks about.
async fn a_connection_beside_a_denial_on_this_host_goes_on() {
    for (hook, address) in [Hook::Output, Hook::Postrouting].into_iter().zip(LOOPBACKS) {
        let talk = Talk::loopback(address);
        let mut queue = bind();
        let divert = table([to_port(hook, talk.port()).to_queue(0)]).install().unwrap();
        talk.ask(1);
        let denied = Instant::now();
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
        talk.answer(1);
        if denied.elapsed() >= CROSSING {
            return;
        }
        talk.silent();
        crossing_is_over().await;
        for number in 2..5 {
            talk.answer(number);
            talk.answered(number);
        }
        talk.ask(5);
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        talk.asked(5);
        talk.ask(6);
        pass(&mut queue).await;
        talk.asked(6);
        divert.close().unwrap();
    }
}
