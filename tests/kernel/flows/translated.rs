//! Denials behind address translation, which gives packets of different hosts the same addresses.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Instant,
};

use tokio_nfqueue::{
    Hook, Protocol, Rule,
    divert::{FlowTuple, Priority},
};

use super::{
    MEMORY, bind, come, confirm, forgetful, pass, queue_is_empty, renewed,
    segments::{ACK, Hosts, SYN, SYN_ACK, deny_datagram, echo, forwarded, pass_segment, queued, segment, tcp, udp},
    table, unlimited_icmp_errors,
};
use crate::{
    common::{
        lose_connections, next,
        rules::{self, Place},
    },
    support,
};

tests![
    one a_denial_does_not_reach_another_client_behind_masquerade,
    one a_denied_ping_does_not_reach_another_client_behind_masquerade,
    one a_denied_syn_from_outside_does_not_reach_a_client_behind_masquerade,
    one a_denied_datagram_from_outside_does_not_reach_a_client_behind_masquerade,
    one a_denial_for_this_host_does_not_reach_a_client_behind_masquerade,
    one a_denial_does_not_reach_another_address_of_the_same_server,
    one a_denied_packet_to_an_inside_address_does_not_reach_the_connection_of_its_owner,
    one a_rejected_echo_request_is_answered_behind_address_translation,
    one a_forgotten_denial_leaves_nothing_beside_behind_translation,
    one an_idle_connection_goes_on_beside_a_denial_behind_translation,
    one a_renewed_denial_does_not_reach_another_address_of_the_same_server,
    one a_translated_connection_stays_denied_or_rejected_when_its_entry_is_gone,
    one a_connection_beside_a_denial_begins_if_its_first_packet_is_seen_behind_translation,
    one a_denied_first_packet_is_not_hidden_by_another_denial,
];

/// A service that is the server by another name.
const SERVICE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The client by another name.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// The server knows the client by the address of this host, which is returned, and the same port.
fn masquerade(hosts: &Hosts) -> SocketAddrV4 {
    let [client, server] = hosts.addresses();
    rules::install_redirection("nat", SERVICE.into(), 0..=u16::MAX, (*server.ip()).into(), true).unwrap();
    SocketAddrV4::new(hosts.server.gateway(), client.port())
}

/// The second client uses the port of the first one, after the first one's connection.
async fn a_denial_does_not_reach_another_client_behind_masquerade() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let outside = masquerade(&hosts);
    let other = SocketAddrV4::new(hosts.client.another_address(), client.port());
    let mut queue = bind();
    let _divert = table([udp()]).install().unwrap();
    hosts.client.datagram(client, server);
    pass(&mut queue).await;
    hosts.server.datagram(server, outside);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [1, 0]);
    lose_connections();
    hosts.client.datagram(other, server);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.server.datagram(server, outside);
    assert_eq!(hosts.arrived(), [1, 1], "its answer is denied");
    queue_is_empty(&mut queue);
}

/// The packet has the addresses of the client's replies as the client sees them. It is the first of
/// a connection of its own: the replies have the address of this host.
async fn a_denied_packet_to_an_inside_address_does_not_reach_the_connection_of_its_owner() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let outside = masquerade(&hosts);
    let mut queue = bind();
    let _divert = table([udp(), tcp()]).install().unwrap();
    hosts.client.datagram(client, server);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.server.send(&segment(server, outside, SYN_ACK, (5000, 1001), b""), *outside.ip());
    assert_eq!(hosts.arrived(), [2, 1]);

    hosts.server.datagram(server, client);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    hosts.server(SYN, (7000, 0), b"");
    confirm(queued(&mut queue, SYN).await.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 0]);

    hosts.client.datagram(client, server);
    hosts.client(ACK, (1001, 5001), b"data");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [2, 0], "the client's own connections are denied");
}

async fn a_denied_ping_does_not_reach_another_client_behind_masquerade() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses().map(|address| *address.ip());
    let outside = *masquerade(&hosts).ip();
    let other = hosts.client.another_address();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Icmp).to_queue(0)]).install().unwrap();
    hosts.client.send(&echo(client, server, false, 7), server);
    pass(&mut queue).await;
    hosts.server.send(&echo(server, outside, true, 7), outside);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [1, 0]);
    lose_connections();
    hosts.client.send(&echo(other, server, false, 7), server);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.server.send(&echo(server, outside, true, 7), outside);
    assert_eq!(hosts.arrived(), [1, 1], "its answer is denied");
    queue_is_empty(&mut queue);
}

/// Anybody can send it under the server's name, to the port of the client.
async fn a_denied_syn_from_outside_does_not_reach_a_client_behind_masquerade() {
    let hosts = Hosts::new();
    let [_, server] = hosts.addresses();
    let outside = masquerade(&hosts);
    let from_server = |flags, numbers| hosts.server.send(&segment(server, outside, flags, numbers, b""), *outside.ip());
    let mut queue = bind();
    let rule = Rule::new(Hook::Prerouting).protocol(Protocol::Tcp).to_queue(0);
    let _divert = table([rule]).install().unwrap();
    from_server(SYN, (1, 0));
    confirm(queued(&mut queue, SYN).await.drop().for_flow()).await.unwrap();
    hosts.client(SYN, (1000, 0), b"");
    pass_segment(&mut queue, SYN).await;
    from_server(SYN_ACK, (5000, 1001));
    pass_segment(&mut queue, SYN_ACK).await;
    assert_eq!(hosts.arrived(), [1, 1]);
}

async fn a_denied_datagram_from_outside_does_not_reach_a_client_behind_masquerade() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let outside = masquerade(&hosts);
    let mut queue = bind();
    let to_this_host = Rule::new(Hook::Input).protocol(Protocol::Udp).to_queue(0);
    let _divert = table([to_this_host, udp()]).install().unwrap();
    hosts.server.datagram(server, outside);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    hosts.client.datagram(client, server);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.server.datagram(server, outside);
    assert_eq!(hosts.arrived(), [1, 1], "its answer is denied");
    queue_is_empty(&mut queue);
}

/// This host has a conversation with the server, by the port of the client, before it.
async fn a_denial_for_this_host_does_not_reach_a_client_behind_masquerade() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let outside = masquerade(&hosts);
    let mut queue = bind();
    let rules = [Hook::Output, Hook::Prerouting].map(|hook| Rule::new(hook).protocol(Protocol::Udp).to_queue(0));
    let _divert = table(rules).install().unwrap();
    let socket = support::udp(outside);
    socket.send_to(b"question", server).unwrap();
    pass(&mut queue).await;
    hosts.server.datagram(server, outside);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    drop(socket);
    assert_eq!(hosts.arrived(), [1, 0]);
    lose_connections();
    hosts.client.datagram(client, server);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.server.datagram(server, outside);
    assert_eq!(hosts.arrived(), [1, 1], "its answer is denied");
    queue_is_empty(&mut queue);
}

/// The client uses one port for both. The rule asks before the translation.
async fn a_denial_does_not_reach_another_address_of_the_same_server() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let [first, second] = [1, 2].map(|last| SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, last), server.port()));
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, server.port(), (*server.ip(), server.port())).unwrap();
    let mut queue = bind();
    let rule = Rule::new(Hook::Prerouting).protocol(Protocol::Udp).to_queue(0);
    let _divert = table([rule]).priority(Priority::MANGLE).install().unwrap();
    hosts.client.datagram(client, first);
    pass(&mut queue).await;
    hosts.server.datagram(server, client);
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    assert_eq!(hosts.arrived(), [1, 0]);
    lose_connections();
    hosts.client.datagram(client, second);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    hosts.server.datagram(server, client);
    assert_eq!(hosts.arrived(), [1, 1], "its answer is denied");
    queue_is_empty(&mut queue);
}

/// Also before the translation. No rule sees the answer.
async fn a_rejected_echo_request_is_answered_behind_address_translation() {
    let hosts = Hosts::new();
    unlimited_icmp_errors();
    masquerade(&hosts);
    let client = hosts.client.address();
    for (hook, priority) in [(Hook::Prerouting, -150), (Hook::Prerouting, 0), (Hook::Forward, 0)] {
        for for_flow in [false, true] {
            let mut queue = bind();
            let icmp = |hook| Rule::new(hook).protocol(Protocol::Icmp).to_queue(0);
            let rules = [hook, Hook::Output, Hook::Postrouting].map(icmp);
            let divert = table(rules).priority(priority).install().unwrap();
            hosts.client.send(&echo(client, SERVICE, false, 7), SERVICE);
            let verdict = next(&mut queue).await.reject();
            confirm(if for_flow { verdict.for_flow() } else { verdict }).await.unwrap();
            queue_is_empty(&mut queue);
            assert_eq!(hosts.arrived(), [0, 1], "{hook:?} {priority} {for_flow}");
            divert.close().unwrap();
        }
    }
}

/// The server's connection to the client's other address began beside a denial that has been
/// forgotten, and is accepted. Then a packet that waited since is denied.
async fn a_forgotten_denial_leaves_nothing_beside_behind_translation() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, client.port(), (*client.ip(), client.port())).unwrap();
    let mut failed = Vec::new();
    for translated in [false, true] {
        let to = if translated { SocketAddrV4::new(OUTSIDE, client.port()) } else { client };
        let mut queue = bind();
        let divert = table([udp()]).install().unwrap();
        hosts.datagram(true);
        let first = next(&mut queue).await;
        hosts.datagram(true);
        let second = next(&mut queue).await;
        confirm(first.drop().for_flow()).await.unwrap();
        hosts.server.datagram(server, to);
        pass(&mut queue).await;
        assert!(divert.forget_flow(FlowTuple::udp(client, server)).unwrap());
        hosts.server.datagram(server, to);
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        confirm(second.drop().for_flow()).await.unwrap();
        hosts.arrived();
        hosts.server.datagram(server, to);
        hosts.datagram(true);
        failed.push(hosts.arrived());
        divert.close().unwrap();
        lose_connections();
    }
    assert_eq!(failed, [[0, 0]; 2], "the denied connection passes");
}

/// As `an_idle_connection_goes_on_beside_a_denial_that_is_renewed`. What the client sends is far
/// outside of the window.
async fn an_idle_connection_goes_on_beside_a_denial_behind_translation() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, client.port(), (*client.ip(), client.port())).unwrap();
    let mut asked = Vec::new();
    for translated in [false, true] {
        let to = if translated { SocketAddrV4::new(OUTSIDE, client.port()) } else { client };
        let from_server = |flags, numbers, data: &[u8]| {
            hosts.server.send(&segment(server, to, flags, numbers, data), *to.ip());
        };
        let mut queue = bind();
        let divert = forgetful([tcp()]).install().unwrap();
        hosts.client(SYN, (1, 0), b"");
        let first = queued(&mut queue, SYN).await;
        let denied = Instant::now();
        confirm(first.drop().for_flow()).await.unwrap();
        from_server(SYN, (5000, 0), b"");
        pass_segment(&mut queue, SYN).await;
        hosts.client(SYN_ACK, (1000, 5001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        from_server(ACK, (5001, 1001), b"data");
        pass_segment(&mut queue, ACK).await;
        if !renewed(&mut queue, denied, 15, || hosts.client(ACK, (1_000_000_000, 5001), b"bad")).await {
            return;
        }
        hosts.arrived();
        from_server(ACK, (5005, 1001), b"data");
        asked.push(come(&mut queue).await.is_some());
        divert.close().unwrap();
        lose_connections();
    }
    assert_eq!(asked, [true; 2], "a connection beside a denied one is denied");
}

/// The client uses one port for both, one after the other. The conversation with the first one is
/// denied, conntrack loses it, and the server sends again.
async fn a_renewed_denial_does_not_reach_another_address_of_the_same_server() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let [first, second] = [1, 2].map(|last| SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, last), server.port()));
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, server.port(), (*server.ip(), server.port())).unwrap();
    let memory = 3 * MEMORY;
    for goes_on in [false, true] {
        let mut queue = bind();
        let divert = forgetful([udp()]).denied_flows(10, memory).install().unwrap();
        hosts.client.datagram(client, first);
        pass(&mut queue).await;
        hosts.server.datagram(server, client);
        pass(&mut queue).await;
        hosts.client.datagram(client, first);
        let denied = next(&mut queue).await;
        let start = Instant::now();
        confirm(denied.drop().for_flow()).await.unwrap();
        assert_eq!(hosts.arrived(), [1, 1]);
        lose_connections();
        let until = |time: u32| tokio::time::sleep_until((start + memory * time / 10).into());
        until(6).await;
        if goes_on {
            hosts.server.datagram(server, client);
            if start.elapsed() >= memory {
                // The machine stopped the test until the denial was over.
                return;
            }
            queue_is_empty(&mut queue);
            assert_eq!(hosts.arrived(), [0, 0]);
        }
        hosts.client.datagram(client, second);
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        hosts.client.datagram(client, second);
        hosts.server.datagram(server, client);
        queue_is_empty(&mut queue);
        assert_eq!(hosts.arrived(), [2, 1]);
        until(12).await;
        let mut arrived = Vec::new();
        for _ in 0..2 {
            hosts.client.datagram(client, second);
            hosts.server.datagram(server, client);
            queue_is_empty(&mut queue);
            arrived.push(hosts.arrived());
        }
        assert_eq!(arrived, [[1, 1]; 2], "{goes_on}: an accepted connection to another address is denied");
        divert.close().unwrap();
        lose_connections();
    }
}

/// The verdict is for a SYN with another entry.
async fn a_translated_connection_stays_denied_or_rejected_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let server = hosts.addresses()[1];
    let first = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), server.port());
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, server.port(), (*server.ip(), server.port())).unwrap();
    let mut passed = Vec::new();
    for reject in [false, true] {
        hosts.another_port();
        let [client, _] = hosts.addresses();
        let from_client = |flags, numbers| hosts.client.send(&segment(client, first, flags, numbers, b""), *first.ip());
        let mut queue = bind();
        let rule = forwarded(Protocol::Tcp).source_address(*client.ip(), 32).to_queue(0);
        let divert = table([rule]).install().unwrap();
        from_client(SYN, (1000, 0));
        let accepted = queued(&mut queue, SYN).await;
        from_client(SYN, (1000, 0));
        let denied = queued(&mut queue, SYN).await;
        confirm(accepted.accept()).await.unwrap();
        hosts.server(SYN_ACK, (5000, 1001), b"");
        assert_eq!(hosts.arrived(), [1, 1]);
        confirm(if reject { denied.reject() } else { denied.drop() }.for_flow()).await.unwrap();
        from_client(ACK, (1001, 5001));
        hosts.server(ACK, (5001, 1001), b"data");
        queue_is_empty(&mut queue);
        hosts.arrived();
        lose_connections();
        hosts.server(ACK, (5001, 1001), b"data");
        passed.push(hosts.arrived()[1]);
        divert.close().unwrap();
    }
    assert_eq!(passed, [0, 0], "the server's segment has passed: dropped, rejected");
}

/// To the client's other address. If the rules come before the translation, its first packet is as
/// all others, and later ones are denied.
async fn a_connection_beside_a_denial_begins_if_its_first_packet_is_seen_behind_translation() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, client.port(), (*client.ip(), client.port())).unwrap();
    for (priority, for_flow) in [(Priority::FILTER, false), (Priority::MANGLE, false), (Priority::MANGLE, true)] {
        let to = SocketAddrV4::new(OUTSIDE, client.port());
        let mut queue = bind();
        let rule = Rule::new(Hook::Prerouting).protocol(Protocol::Udp).to_queue(0);
        let divert = table([rule]).priority(priority).install().unwrap();
        deny_datagram(&hosts, &mut queue).await;
        hosts.server.datagram(server, to);
        let verdict = next(&mut queue).await.accept();
        confirm(if for_flow { verdict.for_flow() } else { verdict }).await.unwrap();
        assert_eq!(hosts.arrived(), [0, 1]);
        hosts.server.datagram(server, to);
        let second = come(&mut queue).await.is_some();
        assert_eq!(hosts.arrived(), [0, 0]);
        assert_eq!(second, priority == Priority::FILTER, "{priority:?} {for_flow}");
        divert.close().unwrap();
        lose_connections();
    }
}

/// "A denial of a first packet also holds for an entry whose destination alone has been translated,
/// without another port": also after a denial of another address of the same server.
async fn a_denied_first_packet_is_not_hidden_by_another_denial() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let [first, second] = [1, 2].map(|last| SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, last), server.port()));
    let arriving = Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", arriving, server.port(), (*server.ip(), server.port())).unwrap();
    for hidden in [false, true] {
        let mut queue = bind();
        let divert = table([udp()]).install().unwrap();
        hosts.server.datagram(server, client);
        confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
        if hidden {
            hosts.client.datagram(client, first);
            pass(&mut queue).await;
            hosts.client.datagram(client, first);
            confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
            lose_connections();
        }
        hosts.arrived();
        hosts.client.datagram(client, second);
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        assert_eq!(hosts.arrived(), [1, 0]);
        hosts.server.datagram(server, client);
        assert_eq!(hosts.arrived(), [0, 0], "{hidden}: a denied datagram has passed");
        divert.close().unwrap();
        lose_connections();
    }
}
