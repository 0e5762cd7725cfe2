//! Accepted connections that this host forwards leave the hooks, and come back to them.
//!
//! Where the kernel has no flowtables, the tests check that `install` says so.

use std::{
    env, io,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use nfqueue_divert::Divert;
use tokio::task::spawn_blocking;
use tokio_nfqueue::{
    ErrorKind, FlowMarks, Hook, Packet, Protocol, Queue, Rule,
    divert::{ConnectionState, DivertBuilder, FlowTuple, Match, Rate, TableFamily},
};

use super::{
    Decision, bind, confirm, pass, queue_is_empty,
    segments::{self, ACK, Hosts, LAST, RST, SYN, SYN_ACK},
    table, to_port,
};
use crate::{
    common::{next, rules, soon},
    support::{self, Peer, VethOptions},
};

tests![
    one a_kernel_without_flowtables_refuses,
    one what_cannot_be_offloaded_is_refused,
    one datagrams_leave_the_hooks,
    one segments_leave_the_hooks,
    one connections_of_other_interfaces_stay,
    one a_syn_on_an_offloaded_connection_comes_to_the_queue,
    one a_syn_that_conntrack_calls_invalid_ends_the_offload,
    one a_reset_ends_the_connection_and_a_syn_begins_another,
    one a_packet_that_was_queued_before_denies_an_offloaded_connection,
    one a_denial_reaches_both_sides_of_a_translated_connection,
    one one_offloaded_connection_is_forgotten,
    one all_offloaded_connections_are_forgotten,
    one an_offloaded_connection_of_an_earlier_table_is_new,
    one packets_that_are_moved_past_the_flowtable_are_unchanged,
    one replaced_rules_keep_the_flowtable,
];

/// The interfaces of [`Hosts`].
const INTERFACES: [&str; 2] = ["veth1", "veth2"];

fn offloading(rules: impl IntoIterator<Item = Rule>) -> DivertBuilder {
    table(rules).offload(INTERFACES)
}

/// Set where the kernel has flowtables.
const EXPECTED: &str = "TOKIO_NFQUEUE_EXPECT_FLOWTABLE";

/// Whether connections between the interfaces can be offloaded.
fn has_flowtables() -> bool {
    match offloading([Rule::new(Hook::Forward).count()]).install() {
        Ok(divert) => {
            divert.close().unwrap();
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(env::var_os(EXPECTED).is_none(), "{error}");
            false
        }
    }
}

/// A rule that counts forwarded packets before all others, but for those of [`Hosts::arrived`].
struct Hooked(Divert);

impl Hooked {
    fn new() -> Self {
        let last = Match::protocol(Protocol::Other(LAST));
        Self(crate::common::divert([Rule::new(Hook::Forward).priority(-150).unless(last).count()]))
    }

    fn packets(&self) -> u64 {
        self.0.counters().unwrap()[0].packets
    }
}

fn forwarded(protocol: Protocol) -> Rule {
    segments::forwarded(protocol).to_queue(0)
}

async fn a_kernel_without_flowtables_refuses() {
    let _hosts = Hosts::new();
    let error = match offloading([forwarded(Protocol::Tcp)]).install() {
        Ok(divert) => {
            let script = divert.to_nft().unwrap();
            assert!(script.contains("flow add @flow_accepted_connections"), "{script}");
            return;
        }
        Err(error) => error,
    };
    assert!(env::var_os(EXPECTED).is_none(), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let text = error.to_string();
    assert!(text.contains("offload: ") && (text.contains("flowtables") || text.contains("namespace")), "{text}");
    // Nothing is left.
    table([forwarded(Protocol::Tcp)]).install().unwrap();
}

async fn what_cannot_be_offloaded_is_refused() {
    let _hosts = Hosts::new();
    let rule = || forwarded(Protocol::Tcp);
    let new = || Match::connection_state([ConnectionState::New]);
    let rate = || Match::rate_above(Rate::packets_per_second(9));
    let minute = Duration::from_secs(60);
    let unmarked = Divert::builder().rule(rule()).offload(INTERFACES);
    for (builder, reason) in [
        (unmarked, "it needs flow marks"),
        (table([rule()]).offload([""; 0]), "there is no interface"),
        (table([rule()]).offload(["veth1", "missing"]), "there is no interface \"missing\""),
        (table([rule()]).offload(["veth1", "lo"]), "interface \"lo\": it is the loopback interface"),
        (table([rule()]).offload(["veth*"]), "by its whole name"),
        (offloading([rule()]).family(TableFamily::Ip), "family inet"),
        (offloading([Rule::new(Hook::Input).to_queue(0)]), "no rule or chain at forward"),
        (offloading([rule()]).denied_flows(10, minute / 2), "at least 60s"),
        (offloading([rule(), Rule::new(Hook::Forward).when(rate()).drop()]), "rule 1: rate: "),
    ] {
        let error = builder.install().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    if has_flowtables() {
        let limited = Rule::new(Hook::Forward).when(rate()).when(new()).drop();
        let builder = offloading([rule(), limited]).denied_flows(10, minute);
        let divert = builder.install().unwrap();
        assert!(divert.replace_rules([Rule::new(Hook::Forward).when(rate()).drop()]).is_err());
        support::drop_now(divert);
        table([]).chain(Hook::Forward, None).offload_all().install().unwrap();
    }
}

/// Two hosts behind this one, with kernels that answer.
struct Ends {
    client: Peer,
    server: Peer,
}

impl Ends {
    fn new() -> Self {
        let [client, server] = [1, 2].map(|index| {
            let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
            peer.route_through_near();
            peer
        });
        support::forwarding();
        Self { client, server }
    }

    /// The addresses of client and server, of each version.
    fn addresses(&self) -> [[IpAddr; 2]; 2] {
        let Self { client, server } = self;
        [[client.far_v4.into(), server.far_v4.into()], [client.far_v6.into(), server.far_v6.into()]]
    }

    /// Connected sockets.
    fn udp(&self, [client, server]: [IpAddr; 2]) -> [UdpSocket; 2] {
        let server = self.server.run(|| support::udp((server, 0)));
        let client = self.client.run(|| support::udp((client, 0)));
        client.connect(server.local_addr().unwrap()).unwrap();
        server.connect(client.local_addr().unwrap()).unwrap();
        [client, server]
    }
}

/// A datagram from one socket to another.
fn cross(from: &UdpSocket, to: &UdpSocket) {
    from.send(b"data").unwrap();
    assert_eq!(to.recv(&mut [0; 8]).unwrap(), 4);
}

/// A flow that is accepted, answered and used.
async fn offloaded_flow(queue: &mut Queue, hooked: &Hooked, [client, server]: &[UdpSocket; 2]) {
    client.send(b"data").unwrap();
    let packet = next(queue).await;
    confirm(packet.accept().for_flow()).await.unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 4);
    cross(server, client);
    cross(client, server);
    let before = hooked.packets();
    for _ in 0..20 {
        cross(client, server);
        cross(server, client);
    }
    assert_eq!(hooked.packets(), before);
    queue_is_empty(queue);
}

async fn datagrams_leave_the_hooks() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    for addresses in ends.addresses() {
        let sockets = ends.udp(addresses);
        let hooked = Hooked::new();
        let mut queue = bind();
        let divert = offloading([forwarded(Protocol::Udp)]).install().unwrap();
        offloaded_flow(&mut queue, &hooked, &sockets).await;
        // Another one is asked about.
        let sockets = ends.udp(addresses);
        sockets[0].send(b"data").unwrap();
        drop(next(&mut queue).await);
        divert.close().unwrap();
    }
}

async fn segments_leave_the_hooks() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    for [client, server] in ends.addresses() {
        let hooked = Hooked::new();
        let mut queue = bind();
        let divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
        let listener = ends.server.run(|| TcpListener::bind((server, 0))).unwrap();
        let to = listener.local_addr().unwrap();
        let connecting = ends.client.spawn(move || TcpStream::connect_timeout(&to, crate::common::PATIENCE));
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        // The client sends it again after a second.
        while let Ok(again) = queue.try_recv() {
            confirm(again.accept().for_flow()).await.unwrap();
        }
        let received = queue.stats().received.packets;
        let joined = spawn_blocking(move || connecting.join().unwrap().unwrap());
        let near = soon("the connection", joined).await.unwrap();
        assert_eq!(near.local_addr().unwrap().ip(), client);
        let (far, _) = listener.accept().unwrap();
        let talk = move |rounds: usize| {
            let (mut near_again, mut far_again) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            for _ in 0..rounds {
                near_again.write_all(b"question").unwrap();
                far_again.read_exact(&mut [0; 8]).unwrap();
                far_again.write_all(b"answer").unwrap();
                near_again.read_exact(&mut [0; 6]).unwrap();
            }
        };
        talk(3);
        let before = hooked.packets();
        talk(30);
        assert_eq!(hooked.packets(), before);
        queue_is_empty(&mut queue);
        assert_eq!(queue.stats().received.packets, received);
        divert.close().unwrap();
        // Nothing is left that knows the connection.
        talk(2);
        assert!(hooked.packets() > before);
    }
}

async fn connections_of_other_interfaces_stay() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    let sockets = ends.udp(ends.addresses()[0]);
    let hooked = Hooked::new();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Udp)]).offload(["veth1"]).install().unwrap();
    let [client, server] = &sockets;
    client.send(b"data").unwrap();
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 4);
    let before = hooked.packets();
    for _ in 0..3 {
        cross(server, client);
        cross(client, server);
    }
    assert_eq!(hooked.packets(), before + 6);
    queue_is_empty(&mut queue);
}

/// The next packet, which has these flags and the right TTL.
async fn queued(queue: &mut Queue, flags: u8) -> Packet {
    let packet = segments::queued(queue, flags).await;
    assert_eq!(packet.payload()[8], 63);
    packet
}

/// A connection that is accepted by its first packet, and used.
async fn offloaded(hosts: &Hosts, hooked: &Hooked, queue: &mut Queue) {
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.server(SYN_ACK, (5000, 1001), b"");
    hosts.client(ACK, (1001, 5001), b"");
    hosts.client(ACK, (1001, 5001), b"request");
    hosts.server(ACK, (5001, 1008), b"response");
    assert_eq!(hosts.arrived(), [3, 2]);
    leaves(hosts, hooked);
    queue_is_empty(queue);
}

/// Segments of both sides arrive and meet no hook.
#[track_caller]
fn leaves(hosts: &Hosts, hooked: &Hooked) {
    let before = hooked.packets();
    hosts.client(ACK, (1008, 5009), b"request");
    hosts.server(ACK, (5009, 1015), b"response");
    assert_eq!(hosts.arrived(), [1, 1]);
    assert_eq!(hooked.packets(), before);
}

async fn a_syn_on_an_offloaded_connection_comes_to_the_queue() {
    let hosts = Hosts::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let mut queue = bind();
    let _divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
    offloaded(&hosts, &hooked, &mut queue).await;
    // The new connection is accepted packet by packet.
    hosts.client(SYN, (90_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept()).await.unwrap();
    hosts.server(SYN_ACK, (70_000, 90_001), b"");
    confirm(queued(&mut queue, SYN_ACK).await.accept()).await.unwrap();
    hosts.client(ACK, (90_001, 70_001), b"");
    confirm(queued(&mut queue, ACK).await.accept()).await.unwrap();
    hosts.client(ACK, (90_001, 70_001), b"request");
    confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
    assert_eq!(hosts.arrived(), [2, 1]);
    // With any other flags and data.
    hosts.client(SYN, (190_000, 0), b"data");
    confirm(queued(&mut queue, SYN).await.drop()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 0]);
}

/// From the side that has not begun the connection.
async fn a_syn_that_conntrack_calls_invalid_ends_the_offload() {
    let hosts = Hosts::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let mut queue = bind();
    let _divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
    offloaded(&hosts, &hooked, &mut queue).await;
    hosts.server(SYN, (70_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.client(SYN_ACK, (90_000, 70_001), b"");
    let packet = queued(&mut queue, SYN_ACK).await;
    confirm(packet.drop()).await.unwrap();
    hosts.server(ACK, (70_001, 90_001), b"data");
    confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 0]);
}

async fn a_reset_ends_the_connection_and_a_syn_begins_another() {
    let hosts = Hosts::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let mut queue = bind();
    let _divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
    offloaded(&hosts, &hooked, &mut queue).await;
    hosts.server(RST, (5017, 0), b"");
    assert_eq!(hosts.arrived(), [0, 1]);
    hosts.client(SYN, (90_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.server(SYN_ACK, (70_000, 90_001), b"");
    hosts.client(ACK, (90_001, 70_001), b"");
    hosts.client(ACK, (90_001, 70_001), b"request");
    hosts.server(ACK, (70_001, 90_008), b"response");
    assert_eq!(hosts.arrived(), [3, 2]);
    queue_is_empty(&mut queue);
    hosts.client(SYN, (190_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.drop()).await.unwrap();
}

/// Of two packets that wait at once, one accepts the connection, and is answered.
async fn a_packet_that_was_queued_before_denies_an_offloaded_connection() {
    let hosts = Hosts::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    for decision in [Decision::Drop, Decision::Reject] {
        hosts.another_port();
        let mut queue = bind();
        let divert = offloading([forwarded(Protocol::Udp)]).install().unwrap();
        hosts.datagram(true);
        confirm(next(&mut queue).await.accept()).await.unwrap();
        hosts.datagram(true);
        hosts.datagram(true);
        let [first, second] = [next(&mut queue).await, next(&mut queue).await];
        confirm(first.accept().for_flow()).await.unwrap();
        hosts.datagram(false);
        let before = hooked.packets();
        for _ in 0..5 {
            hosts.datagram(true);
            hosts.datagram(false);
        }
        assert_eq!(hooked.packets(), before, "{decision:?}");
        assert_eq!(hosts.arrived(), [7, 6], "{decision:?}");
        confirm(decision.for_flow(second)).await.unwrap();
        hosts.arrived();
        let client_gets_errors = decision == Decision::Reject;
        for _ in 0..5 {
            hosts.datagram(true);
            hosts.datagram(false);
        }
        let [at_server, at_client] = hosts.arrived();
        queue_is_empty(&mut queue);
        // The others are ICMP errors, at a limited rate.
        assert!(client_gets_errors || (at_server, at_client) == (0, 0), "{at_server} {at_client}");
        assert!(hooked.packets() >= before + 10, "{decision:?}");
        divert.close().unwrap();
    }
}

async fn a_denial_reaches_both_sides_of_a_translated_connection() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let server = ends.server.run(|| support::udp((ends.server.far_v4, 0)));
    let client = ends.client.run(|| support::udp((ends.client.far_v4, 0)));
    let port = server.local_addr().unwrap().port();
    // The client knows another address and port, the server another address.
    let service = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 7));
    let place = rules::Place { hook: 0, priority: -100 };
    rules::install_nat_at("dnat", place, service.port(), (ends.server.far_v4, port)).unwrap();
    rules::install_source_nat("snat", port, ends.server.near_v4).unwrap();
    client.connect(service).unwrap();
    let mut queue = bind();
    let _divert = offloading([forwarded(Protocol::Udp)]).install().unwrap();
    client.send(b"1").unwrap();
    pass(&mut queue).await;
    let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
    assert_eq!(from.ip(), IpAddr::from(ends.server.near_v4));
    client.send(b"2").unwrap();
    client.send(b"3").unwrap();
    let [second, third] = [next(&mut queue).await, next(&mut queue).await];
    confirm(second.accept().for_flow()).await.unwrap();
    server.connect(from).unwrap();
    server.recv(&mut [0; 8]).unwrap();
    for _ in 0..3 {
        cross(&server, &client);
        cross(&client, &server);
    }
    let before = hooked.packets();
    for _ in 0..3 {
        cross(&server, &client);
        cross(&client, &server);
    }
    assert_eq!(hooked.packets(), before);
    confirm(third.drop().for_flow()).await.unwrap();
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    }
    for _ in 0..3 {
        client.send(b"4").unwrap();
        server.send(b"4").unwrap();
    }
    for socket in [&client, &server] {
        assert_eq!(socket.recv(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    queue_is_empty(&mut queue);
}

fn flow([client, server]: &[UdpSocket; 2]) -> FlowTuple {
    FlowTuple::udp(client.local_addr().unwrap(), server.local_addr().unwrap())
}

async fn one_offloaded_connection_is_forgotten() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    for addresses in ends.addresses() {
        let mut queue = bind();
        let divert = offloading([forwarded(Protocol::Udp)]).install().unwrap();
        let [forgotten, other] = [(); 2].map(|()| ends.udp(addresses));
        for sockets in [&forgotten, &other] {
            offloaded_flow(&mut queue, &hooked, sockets).await;
        }
        // The second time, it is recalled already.
        for _ in 0..2 {
            assert!(divert.forget_flow(flow(&forgotten)).unwrap());
            for (from, to) in [(0, 1), (1, 0)] {
                forgotten[from].send(b"data").unwrap();
                pass(&mut queue).await;
                assert_eq!(forgotten[to].recv(&mut [0; 8]).unwrap(), 4);
            }
            assert!(!divert.forget_flow(flow(&forgotten)).unwrap());
            let before = hooked.packets();
            cross(&other[0], &other[1]);
            cross(&other[1], &other[0]);
            assert_eq!(hooked.packets(), before);
            forgotten[0].send(b"data").unwrap();
            confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
            assert_eq!(forgotten[1].recv(&mut [0; 8]).unwrap(), 4);
            cross(&forgotten[1], &forgotten[0]);
            queue_is_empty(&mut queue);
        }
        divert.close().unwrap();
    }
}

async fn all_offloaded_connections_are_forgotten() {
    let hosts = Hosts::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let mut queue = bind();
    let divert = offloading([forwarded(Protocol::Tcp), forwarded(Protocol::Udp)]).install().unwrap();
    offloaded(&hosts, &hooked, &mut queue).await;
    divert.forget_flows().unwrap();
    for _ in 0..2 {
        hosts.server(ACK, (5017, 1015), b"response");
        confirm(queued(&mut queue, ACK).await.accept()).await.unwrap();
        hosts.client(ACK, (1015, 5025), b"request");
        confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
    }
    assert_eq!(hosts.arrived(), [0, 2]);
}

async fn an_offloaded_connection_of_an_earlier_table_is_new() {
    let hosts = Hosts::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let mut queue = bind();
    let divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
    offloaded(&hosts, &hooked, &mut queue).await;
    support::drop_now((divert, queue));
    let before = hooked.packets();
    hosts.client(ACK, (1015, 5017), b"request");
    assert_eq!(hosts.arrived(), [1, 0]);
    assert_eq!(hooked.packets(), before + 1);
    let mut queue = bind();
    let _divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
    hosts.client(ACK, (1022, 5017), b"request");
    confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
}

/// Also those to this host, and those of connections that no rule asks about.
async fn packets_that_are_moved_past_the_flowtable_are_unchanged() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    let _divert = offloading([Rule::new(Hook::Forward).protocol(Protocol::Other(99)).to_queue(0)]).install().unwrap();
    for (index, addresses) in ends.addresses().into_iter().enumerate() {
        let near: IpAddr = if index == 0 { ends.client.near_v4.into() } else { ends.client.near_v6.into() };
        let here = TcpListener::bind((near, 0)).unwrap();
        let there = ends.server.run(|| TcpListener::bind((addresses[1], 0))).unwrap();
        for listener in [here, there] {
            let to = listener.local_addr().unwrap();
            let connecting = ends.client.spawn(move || TcpStream::connect_timeout(&to, crate::common::PATIENCE));
            let mut accepted = listener.accept().unwrap().0;
            let mut stream = connecting.join().unwrap().unwrap();
            stream.write_all(b"question").unwrap();
            accepted.read_exact(&mut [0; 8]).unwrap();
        }
    }
}

async fn replaced_rules_keep_the_flowtable() {
    let ends = Ends::new();
    if !has_flowtables() {
        return;
    }
    let hooked = Hooked::new();
    let sockets = ends.udp(ends.addresses()[0]);
    let port = sockets[1].local_addr().unwrap().port();
    let mut queue = Queue::builder(1).flow_marks(FlowMarks::default()).bind().await.unwrap();
    let divert = offloading([forwarded(Protocol::Tcp)]).install().unwrap();
    let rules = [(Hook::Forward, port), (Hook::Input, 9)].map(|(hook, port)| to_port(hook, port).to_queue(1));
    divert.replace_rules(rules).unwrap();
    let [client, server] = &sockets;
    client.send(b"data").unwrap();
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 4);
    cross(server, client);
    // Only the rule for this direction offloads.
    cross(client, server);
    let before = hooked.packets();
    cross(client, server);
    cross(server, client);
    assert_eq!(hooked.packets(), before);
    divert.remove_rules().unwrap();
    cross(client, server);
    divert.close().unwrap();
    cross(client, server);
    assert!(hooked.packets() > before);
}
