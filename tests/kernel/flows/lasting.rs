//! Denials hold for as many connections and as long as promised, and for no others.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{FlowMarks, Hook, Packet, Protocol, Queue, Rule, divert::Match};

use super::{
    MEMORY, bind, come, confirm, denials_expired, entries_gone, forgetful, pass, queue_is_empty,
    segments::{
        ACK, FIN, Hosts, LAST, PSH, RST, SYN, SYN_ACK, accept_in_the_middle, deny_datagram, forwarded, from_client,
        opened, pass_segment, queued, segment, tcp, udp,
    },
    table,
};
use crate::common::{
    lose_connections, many, next,
    rules::{self, Expressions, NetfilterProtoFamily, Place},
};

tests![
    one an_accepted_entry_stays_denied_by_a_verdict_for_another_one,
    one an_accepted_entry_stays_denied_by_a_verdict_for_the_other_side,
    one a_connection_that_a_denied_one_has_announced_is_denied,
    one as_many_dropped_and_rejected_connections_as_the_capacity_are_remembered,
    one untracked_connections_pass_in_any_number,
    one a_denied_connection_stays_denied_for_any_flags,
    one a_verdict_denies_although_the_rules_were_replaced,
    one a_table_with_other_marks_lets_the_answer_to_a_first_packet_pass,
    one a_conversation_stays_denied_by_a_verdict_for_another_entry_when_its_own_is_gone,
    one a_conversation_that_was_not_answered_stays_denied_when_its_entry_is_gone,
    one a_connection_that_one_with_two_syns_has_announced_can_be_accepted,
];

/// Of two SYNs that wait at once, the first one is accepted, and its connection is established.
/// Returns the other one.
async fn accepted_while_another_syn_waits(hosts: &Hosts, queue: &mut Queue) -> Packet {
    hosts.client(SYN, (1000, 0), b"");
    let accepted = queued(queue, SYN).await;
    hosts.client(SYN, (1000, 0), b"");
    let waits = queued(queue, SYN).await;
    confirm(accepted.accept().for_flow()).await.unwrap();
    hosts.server(SYN_ACK, (5000, 1001), b"");
    hosts.client(ACK, (1001, 5001), b"");
    waits
}

/// Has connection tracking read what FTP announces.
fn assist_ftp() {
    rules::install_helper("helper", Place { hook: 0, priority: 0 }, "ftp", 6).unwrap();
}

/// What an FTP client sends to announce a connection to its port 200 · 256 + 10, and the sequence
/// numbers of that.
const ANNOUNCEMENT: [(u32, &[u8]); 2] = [(1001, b"USER me\r\n"), (1010, b"PORT 10,9,1,2,200,10\r\n")];

/// The server sends a segment of the announced connection.
fn send_announced(hosts: &Hosts, flags: u8, numbers: (u32, u32), data: &[u8]) {
    let [client, server] = hosts.addresses().map(|address| *address.ip());
    let (from, to) = (SocketAddrV4::new(server, 20), SocketAddrV4::new(client, 200 * 256 + 10));
    hosts.server.send(&segment(from, to, flags, numbers, data), client);
}

/// Of two SYNs that wait at once each has an entry. The first one's is kept.
async fn an_accepted_entry_stays_denied_by_a_verdict_for_another_one() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = forgetful([tcp()]).install().unwrap();
    let denied = accepted_while_another_syn_waits(&hosts, &mut queue).await;
    assert_eq!(hosts.arrived(), [2, 1]);
    let since = Instant::now();
    confirm(denied.drop().for_flow()).await.unwrap();
    hosts.client(ACK, (1001, 5001), b"bad");
    // The entry becomes denied by a packet that the denial stops, while that is remembered.
    if since.elapsed() >= MEMORY {
        return;
    }
    assert_eq!(hosts.arrived(), [0, 0]);
    denials_expired().await;
    hosts.client(ACK, (1001, 5001), b"bad");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0], "it was accepted");
}

async fn an_accepted_entry_stays_denied_by_a_verdict_for_the_other_side() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = forgetful([udp()]).install().unwrap();
    hosts.datagram(true);
    let accepted = next(&mut queue).await;
    hosts.datagram(false);
    let denied = next(&mut queue).await;
    confirm(accepted.accept().for_flow()).await.unwrap();
    let since = Instant::now();
    confirm(denied.drop().for_flow()).await.unwrap();
    let speak = || [false, true].into_iter().for_each(|of_client| hosts.datagram(of_client));
    assert_eq!(hosts.arrived(), [1, 0]);
    speak();
    if since.elapsed() >= MEMORY {
        return;
    }
    assert_eq!(hosts.arrived(), [0, 0]);
    denials_expired().await;
    speak();
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0], "it was accepted");
}

/// The verdict is for a packet with another entry. No rule asks about what is announced.
async fn a_connection_that_a_denied_one_has_announced_is_denied() {
    let hosts = Hosts::new();
    assist_ftp();
    let [_, server] = hosts.addresses();
    let mut queue = bind();
    let _divert = table([tcp().destination_port(server.port())]).install().unwrap();
    let denied = accepted_while_another_syn_waits(&hosts, &mut queue).await;
    for (number, data) in ANNOUNCEMENT {
        hosts.client(ACK, (number, 5001), data);
    }
    assert_eq!(hosts.arrived(), [4, 1]);
    confirm(denied.drop().for_flow()).await.unwrap();
    hosts.client(ACK, (1032, 5001), b"bad");
    assert_eq!(hosts.arrived(), [0, 0]);
    send_announced(&hosts, SYN, (1, 0), b"");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

async fn as_many_dropped_and_rejected_connections_as_the_capacity_are_remembered() {
    const CAPACITY: u16 = many(13_000) as u16;
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let mut queue = bind();
    let divert = table([udp()]).denied_flows(CAPACITY.into(), Duration::from_secs(600));
    let _divert = divert.install().unwrap();
    let ports: Vec<u16> = (1000..1000 + 2 * CAPACITY).collect();
    let send = |port| hosts.client.datagram(SocketAddrV4::new(*client.ip(), port), server);
    let (dropped, rejected) = ports.split_at(CAPACITY.into());
    for (ports, reject) in [(dropped, false), (rejected, true)] {
        for some in ports.chunks(100) {
            for port in some {
                send(*port);
                let packet = next(&mut queue).await;
                let verdict = if reject { packet.reject() } else { packet.drop() };
                verdict.for_flow().submit().unwrap();
            }
            queue.sink().flush().await;
        }
    }
    for ports in [dropped, rejected] {
        for port in &ports[ports.len() - 100..] {
            send(*port);
            queue_is_empty(&mut queue);
        }
    }
}

/// The table concerns datagrams only, and can remember 4096 segments that begin a connection.
async fn untracked_connections_pass_in_any_number() {
    let hosts = Hosts::new();
    let untracked = Expressions::Other { expression_type: "notrack".to_owned(), attributes: Vec::new() };
    let place = Place { hook: 0, priority: -300 };
    rules::install(NetfilterProtoFamily::Inet, "untracked", Some(place), vec![untracked]).unwrap();
    let _queue = bind();
    let _divert = table([udp()]).install().unwrap();
    for _ in 0..50 {
        for _ in 0..100 {
            hosts.another_port();
            hosts.client(SYN, (1000, 0), b"");
        }
        assert_eq!(hosts.arrived(), [100, 0]);
    }
}

/// Also when connection tracking has lost it.
async fn a_denied_connection_stays_denied_for_any_flags() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1001, 5001), b"bad");
    confirm(queued(&mut queue, ACK).await.drop().for_flow()).await.unwrap();
    let send = |segments: [(u8, (u32, u32)); 5]| {
        for (flags, numbers) in segments {
            hosts.client(flags, numbers, b"bad");
            // The server may begin a connection of its own.
            let flags = if flags == SYN { ACK } else { flags };
            hosts.server(flags, numbers, b"bad");
        }
    };
    let far = (3_000_000_000, 5001);
    send([(ACK, far), (0, (1001, 0)), (RST, (1001, 0)), (SYN, (77, 0)), (SYN_ACK, (1, 1))]);
    lose_connections();
    let next = (1001, 5001);
    send([(ACK, next), (PSH | ACK, next), (SYN, (77, 0)), (SYN_ACK, (1, 1)), (FIN | ACK, next)]);
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// While the packet waited: the rule that queued it is gone, or there is a chain before it.
async fn a_verdict_denies_although_the_rules_were_replaced() {
    let hosts = Hosts::new();
    let all = || forwarded(Protocol::Udp);
    let earlier = all().priority(-20).set_mark(0, 0x10_0000);
    for rules in [vec![all().accept()], vec![earlier, udp()]] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([udp()]).install().unwrap();
        hosts.datagram(true);
        let packet = next(&mut queue).await;
        divert.replace_rules(rules).unwrap();
        confirm(packet.drop().for_flow()).await.unwrap();
        hosts.datagram(true);
        queue_is_empty(&mut queue);
        assert_eq!(hosts.arrived(), [0, 0]);
        divert.close().unwrap();
    }
}

/// It would queue all that leaves this host.
async fn a_table_with_other_marks_lets_the_answer_to_a_first_packet_pass() {
    let hosts = Hosts::new();
    let marks = FlowMarks::new(0x70_0000);
    let mut queue = bind();
    let mut other_queue = Queue::builder(1).flow_marks(marks).bind().await.unwrap();
    let _divert = table([tcp()]).install().unwrap();
    let rules = [Hook::Output, Hook::Postrouting]
        .map(|hook| Rule::new(hook).ipv4().unless(Match::protocol(Protocol::Other(LAST))).to_queue(1));
    let _other = Divert::builder().flow_marks(marks).rules(rules).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.reject().for_flow()).await.unwrap();
    queue_is_empty(&mut other_queue);
    assert_eq!(hosts.arrived(), [0, 1]);
}

/// Of two first datagrams that wait at once, one passes and is answered, and the other one is
/// denied. Only the client's datagrams come to the queue.
async fn a_conversation_stays_denied_by_a_verdict_for_another_entry_when_its_own_is_gone() {
    let hosts = Hosts::new();
    for at_once in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let rule = from_client(&hosts, Protocol::Udp).to_queue(0);
        let divert = table([rule]).install().unwrap();
        hosts.datagram(true);
        let first = next(&mut queue).await;
        let denied = if at_once {
            hosts.datagram(true);
            Some(next(&mut queue).await)
        } else {
            None
        };
        confirm(first.accept()).await.unwrap();
        hosts.datagram(false);
        assert_eq!(hosts.arrived(), [1, 1]);
        let denied = match denied {
            Some(denied) => denied,
            None => {
                hosts.datagram(true);
                next(&mut queue).await
            }
        };
        confirm(denied.drop().for_flow()).await.unwrap();
        hosts.datagram(false);
        hosts.datagram(true);
        queue_is_empty(&mut queue);
        assert_eq!(hosts.arrived(), [0, 0]);
        entries_gone().await;
        hosts.datagram(false);
        assert_eq!(hosts.arrived(), [0, 0], "{at_once}: the server's datagram has passed");
        divert.close().unwrap();
    }
}

/// The SYN of the announcing connection was sent twice. The announced one is accepted by its first
/// packet.
async fn a_connection_that_one_with_two_syns_has_announced_can_be_accepted() {
    let hosts = Hosts::new();
    assist_ftp();
    let mut asked = Vec::new();
    for again in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        for _ in 0..=u8::from(again) {
            hosts.client(SYN, (1000, 0), b"");
            pass_segment(&mut queue, SYN).await;
        }
        hosts.server(SYN_ACK, (5000, 1001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.client(ACK, (1001, 5001), b"");
        pass_segment(&mut queue, ACK).await;
        for (number, data) in ANNOUNCEMENT {
            hosts.client(ACK, (number, 5001), data);
            pass_segment(&mut queue, ACK).await;
        }
        accept_in_the_middle(&mut queue, || send_announced(&hosts, ACK, (1, 1), b"data")).await;
        send_announced(&hosts, ACK, (5, 1), b"data");
        asked.push(come(&mut queue).await.is_some());
        divert.close().unwrap();
        lose_connections();
    }
    assert_eq!(asked, [false; 2], "it comes to the queue although it was accepted");
}

/// A packet of the client has passed before the verdict, and none of the server. Nobody asks about
/// those of the server.
async fn a_conversation_that_was_not_answered_stays_denied_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let rule = from_client(&hosts, Protocol::Udp).to_queue(0);
    let _divert = table([rule]).install().unwrap();
    hosts.datagram(true);
    pass(&mut queue).await;
    deny_datagram(&hosts, &mut queue).await;
    assert_eq!(hosts.arrived(), [1, 0]);
    entries_gone().await;
    for of_client in [false, true, false] {
        hosts.datagram(of_client);
        queue_is_empty(&mut queue);
        assert_eq!(hosts.arrived(), [0, 0], "{of_client}");
    }
}
