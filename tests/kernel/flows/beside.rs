//! Connections that the other side of a denied one begins, on the same addresses and ports.

use std::{
    net::{SocketAddrV4, TcpListener},
    time::{Duration, Instant},
};

use tokio_nfqueue::{
    Hook, Protocol, Queue, Rule,
    divert::{FlowTuple, Match, TcpFlags},
};

use super::{
    bind, come, confirm, forgetful, pass, queue_is_empty, renewed,
    segments::{
        ACK, Hosts, SYN, SYN_ACK, datagram, deny_crossing_syn, deny_datagram, forwarded, opened, pass_segment, queued,
        segment, tcp, udp, unreachable,
    },
    table,
};
use crate::{
    common::{kernel_release, lose_connections, next},
    support,
};

tests![
    one a_connection_to_this_host_begins_beside_its_denied_one,
    one an_idle_connection_goes_on_beside_a_denial_that_is_renewed,
    one a_connection_for_which_there_is_no_room_begins_later,
    one a_denied_syn_is_denied_beside_one_of_the_other_side,
    one an_error_about_a_connection_beside_a_denied_one_passes,
    one an_invalid_segment_of_a_connection_beside_a_denied_one_comes_to_the_queue,
    one the_other_side_begins_again_after_its_crossing_connection_was_denied,
    one an_error_about_a_crossing_connection_denies_no_later_one,
    one an_error_about_a_crossing_connection_protects_nothing,
    one a_syn_that_input_drops_begins_nothing,
];

/// Where this host speaks to the server.
fn here(hosts: &Hosts) -> SocketAddrV4 {
    let [client, _] = hosts.addresses();
    SocketAddrV4::new(hosts.server.gateway(), client.port())
}

/// The server sends a segment to this host.
fn to_here(hosts: &Hosts, flags: u8, numbers: (u32, u32)) {
    let ([_, server], here) = (hosts.addresses(), here(hosts));
    hosts.server.send(&segment(server, here, flags, numbers, b""), *here.ip());
}

/// This host begins a connection, which is denied when the server answers.
async fn begin_here_and_deny(hosts: &Hosts, queue: &mut Queue) {
    let [_, server] = hosts.addresses();
    let syn = segment(here(hosts), server, SYN, (1000, 0), b"");
    support::send_raw_ipv4(&support::raw_ipv4(), &syn, *server.ip()).unwrap();
    to_here(hosts, SYN_ACK, (5000, 1001));
    confirm(queued(queue, SYN_ACK).await.drop().for_flow()).await.unwrap();
}

/// The one that this host has begun is denied when the server answers.
async fn a_connection_to_this_host_begins_beside_its_denied_one() {
    let hosts = Hosts::new();
    for hooks in [&[Hook::Prerouting][..], &[Hook::Prerouting, Hook::Forward]] {
        hosts.another_port();
        let mut queue = bind();
        let rules = hooks.iter().map(|hook| Rule::new(*hook).protocol(Protocol::Tcp).to_queue(0));
        let divert = table(rules).install().unwrap();
        let listener = TcpListener::bind(here(&hosts)).unwrap();
        begin_here_and_deny(&hosts, &mut queue).await;
        assert_eq!(hosts.arrived(), [1, 0]);
        lose_connections();
        to_here(&hosts, SYN, (9000, 0));
        pass_segment(&mut queue, SYN).await;
        // After a second this host answers again.
        let [answers, others] = hosts.arrived();
        assert!(answers >= 1 && others == 0, "{hooks:?}: the answer of this host is denied");
        divert.close().unwrap();
        drop(listener);
        hosts.arrived();
    }
}

/// Anybody can send the client's SYNs.
async fn an_idle_connection_goes_on_beside_a_denial_that_is_renewed() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = forgetful([tcp()]).install().unwrap();
    hosts.client(SYN, (1, 0), b"");
    let first = queued(&mut queue, SYN).await;
    let denied = Instant::now();
    confirm(first.drop().for_flow()).await.unwrap();
    hosts.server(SYN, (5000, 0), b"");
    pass_segment(&mut queue, SYN).await;
    hosts.client(SYN_ACK, (1000, 5001), b"");
    pass_segment(&mut queue, SYN_ACK).await;
    hosts.server(ACK, (5001, 1001), b"data");
    pass_segment(&mut queue, ACK).await;
    // For longer than a connection beside a denial is remembered without packets.
    if !renewed(&mut queue, denied, 15, || hosts.client(SYN, (1, 0), b"")).await {
        return;
    }
    assert_eq!(hosts.arrived(), [1, 2]);
    hosts.server(ACK, (5005, 1001), b"data");
    assert_eq!(hosts.arrived(), [0, 0]);
    pass_segment(&mut queue, ACK).await;
    assert_eq!(hosts.arrived(), [0, 1]);
}

/// How many are remembered.
const ROOM: u16 = 4096;

async fn a_connection_for_which_there_is_no_room_begins_later() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let divert = table([udp()]).denied_flows(2 * u32::from(ROOM), Duration::from_secs(600)).install().unwrap();
    let [first, server] = hosts.addresses();
    for _ in 0..ROOM {
        hosts.datagram(true);
        next(&mut queue).await.drop().for_flow().submit().unwrap();
        queue.sink().flush().await;
        hosts.datagram(false);
        pass(&mut queue).await;
        hosts.another_port();
    }
    deny_datagram(&hosts, &mut queue).await;
    assert_eq!(hosts.arrived(), [0, ROOM.into()]);
    for _ in 0..2 {
        hosts.datagram(false);
        pass(&mut queue).await;
        assert_eq!(hosts.arrived(), [0, 0]);
    }
    assert!(divert.forget_flow(FlowTuple::udp(first, server)).unwrap());
    for _ in 0..3 {
        hosts.datagram(false);
        pass(&mut queue).await;
        assert_eq!(hosts.arrived(), [0, 1]);
    }
}

/// The server's SYN is accepted, so that the client's would be its answer.
async fn a_denied_syn_is_denied_beside_one_of_the_other_side() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.drop().for_flow()).await.unwrap();
    hosts.server(SYN, (5000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.client(SYN, (1000, 0), b"");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 1]);
    // What follows is of the server's connection, and cannot leave the queue.
    hosts.client(SYN_ACK, (1000, 5001), b"");
    confirm(queued(&mut queue, SYN_ACK).await.accept().for_flow()).await.unwrap();
    hosts.server(ACK, (5001, 1001), b"data");
    confirm(queued(&mut queue, ACK).await.accept().for_flow()).await.unwrap();
    hosts.client(ACK, (1001, 5005), b"data");
    pass_segment(&mut queue, ACK).await;
    assert_eq!(hosts.arrived(), [2, 1]);
}

async fn an_error_about_a_connection_beside_a_denied_one_passes() {
    let hosts = Hosts::new();
    let [client, server] = hosts.addresses();
    let mut queue = bind();
    let _divert = table([udp()]).install().unwrap();
    deny_datagram(&hosts, &mut queue).await;
    hosts.datagram(false);
    pass(&mut queue).await;
    let error = unreachable(client, server, &datagram(server, client, b"data"));
    hosts.client.send(&error, *server.ip());
    assert_eq!(hosts.arrived(), [1, 1]);
}

/// It is far outside of the window.
async fn an_invalid_segment_of_a_connection_beside_a_denied_one_comes_to_the_queue() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.server(SYN, (7000, 0), b"");
    confirm(queued(&mut queue, SYN).await.reject().for_flow()).await.unwrap();
    hosts.arrived();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1_000_000_000, 5001), b"data");
    pass_segment(&mut queue, ACK).await;
    assert_eq!(hosts.arrived(), [1, 0]);
}

/// Both sides begin at once, and the server's SYN is denied: the client's connection too.
async fn the_other_side_begins_again_after_its_crossing_connection_was_denied() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    hosts.client(SYN, (1000, 0), b"");
    let of_client = queued(&mut queue, SYN).await;
    hosts.server(SYN, (5000, 0), b"");
    let of_server = queued(&mut queue, SYN).await;
    confirm(of_client.accept()).await.unwrap();
    confirm(of_server.drop().for_flow()).await.unwrap();
    hosts.server(SYN, (5000, 0), b"");
    hosts.client(SYN_ACK, (1000, 5001), b"");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [1, 0]);
    hosts.client(SYN, (9000, 0), b"");
    if kernel_release() < (6, 12) {
        // The server's packet had got the entry of the client's, which had passed.
        queue_is_empty(&mut queue);
        assert_eq!(hosts.arrived(), [0, 0]);
        return;
    }
    pass_segment(&mut queue, SYN).await;
    assert_eq!(hosts.arrived(), [1, 0]);
}

/// Both sides begin at once, and the client's SYN is denied. The client's host, or anybody in its
/// name, sends an ICMP error about the server's SYN.
async fn an_error_about_a_crossing_connection_denies_no_later_one() {
    let hosts = Hosts::new();
    let mut come_again = Vec::new();
    for error in [false, true] {
        hosts.another_port();
        let [client, server] = hosts.addresses();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        deny_crossing_syn(&hosts, &mut queue).await;
        if error {
            let quoted = segment(server, client, SYN, (5000, 0), b"");
            hosts.client.send(&unreachable(client, server, &quoted[..28]), *server.ip());
            assert_eq!(hosts.arrived(), [0, 0]);
        }
        lose_connections();
        // The side that was not denied. Earlier kernels give the client's packet the entry of the
        // server's, which has passed.
        let begin = if kernel_release() >= (6, 12) { Hosts::server } else { Hosts::client };
        begin(&hosts, SYN, (9000, 0), b"");
        come_again.push(come(&mut queue).await.is_some());
        divert.close().unwrap();
    }
    assert_eq!(come_again, [true; 2], "the other side cannot begin a connection of its own");
}

/// The server's SYN has passed twice before the client's is denied. An ICMP error about what the
/// client sends on the server's connection waits meanwhile.
async fn an_error_about_a_crossing_connection_protects_nothing() {
    let hosts = Hosts::new();
    for error in [false, true] {
        hosts.another_port();
        let [client, server] = hosts.addresses();
        let mut queue = bind();
        let syn = forwarded(Protocol::Tcp).when(Match::tcp_syn()).to_queue(0);
        let divert = table([syn, forwarded(Protocol::Icmp).to_queue(0)]).install().unwrap();
        hosts.client(SYN, (1000, 0), b"");
        let denied = queued(&mut queue, SYN).await;
        for _ in 0..2 {
            hosts.server(SYN, (5000, 0), b"");
            pass_segment(&mut queue, SYN).await;
        }
        let mut waits = None;
        if error {
            let quoted = segment(client, server, SYN_ACK, (1000, 5001), b"");
            hosts.server.send(&unreachable(server, client, &quoted[..28]), *client.ip());
            waits = Some(next(&mut queue).await);
        }
        confirm(denied.drop().for_flow()).await.unwrap();
        if let Some(error) = waits {
            confirm(error.accept()).await.unwrap();
        }
        hosts.arrived();
        hosts.client(SYN_ACK, (1000, 5001), b"");
        hosts.server(ACK, (5001, 1001), b"");
        hosts.client(ACK, (1001, 5001), b"bad");
        queue_is_empty(&mut queue);
        assert_eq!(hosts.arrived(), [0, 0], "{error}");
        divert.close().unwrap();
    }
}

/// `Prerouting` asks about SYNs, and `Input` drops them.
async fn a_syn_that_input_drops_begins_nothing() {
    let hosts = Hosts::new();
    for syn in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let of_server = |hook| Rule::new(hook).protocol(Protocol::Tcp).source_address(hosts.server.address(), 32);
        let rules = [
            of_server(Hook::Prerouting).when(Match::tcp_flags(TcpFlags::SYN, TcpFlags::SYN)),
            of_server(Hook::Input).when(Match::tcp_syn()).drop(),
            of_server(Hook::Input).count(),
        ];
        let [asked, begins, all] = rules;
        let divert = table([asked.to_queue(0), begins, all]).install().unwrap();
        begin_here_and_deny(&hosts, &mut queue).await;
        lose_connections();
        if syn {
            to_here(&hosts, SYN, (9000, 0));
            pass_segment(&mut queue, SYN).await;
        }
        let count = || divert.counters().unwrap()[2].packets;
        let before = count();
        to_here(&hosts, ACK, (5001, 1001));
        hosts.arrived();
        queue_is_empty(&mut queue);
        assert_eq!(count() - before, 0, "{syn}: a segment of the denied connection has passed");
        divert.close().unwrap();
        lose_connections();
    }
}
