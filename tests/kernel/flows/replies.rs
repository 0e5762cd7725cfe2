//! What passes of a rejected connection: this host's own replies, and nothing else.

use std::{
    cell::Cell,
    fs,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use tokio::task::spawn_blocking;
use tokio_nfqueue::{Hook, Packet, Protocol, Queue, Rule, Verdict};

use super::{
    LOOPBACKS, bind, confirm, queue_is_empty,
    segments::{ACK, Hosts, RST, SYN, SYN_ACK, opened, queued, segment, tcp, udp, unreachable},
    table, unlimited_icmp_errors,
};
use crate::{
    common::{PATIENCE, next, rules, soon},
    support::{self, Bridge, Frame, VethOptions},
};

tests![
    one nothing_of_a_rejected_connection_passes_but_replies_of_this_host,
    one the_first_packet_is_answered_on_loopback,
    one the_first_packet_is_answered_for_the_own_host,
    one the_first_packet_is_answered_for_another_host,
    one the_first_packet_is_answered_for_others,
    one a_bridged_packet_is_answered_if_a_route_leads_to_its_sender,
    one a_bridged_syn_never_takes_the_shortcut,
    one what_other_hosts_send_over_a_bridge_is_no_reply_of_this_host,
    one what_a_process_sends_is_no_reply_of_the_kernel,
    one the_first_packet_is_answered_behind_address_translation,
    one a_reply_is_not_queued_beside_a_flood_of_rejected_first_packets,
];

async fn nothing_of_a_rejected_connection_passes_but_replies_of_this_host() {
    let hosts = Hosts::new();
    let mut queue = bind();
    // Of both sides nothing passes but what the forward hook sees, and the resets at the output
    // hook.
    let rule = |hook| Rule::new(hook).protocol(Protocol::Tcp).to_queue(0);
    let _divert = table([rule(Hook::Forward), rule(Hook::Output), rule(Hook::Input)]).install().unwrap();
    let pass = async |queue: &mut Queue| {
        confirm(next(queue).await.accept()).await.unwrap();
    };
    hosts.client(SYN, (1000, 0), b"");
    pass(&mut queue).await;
    hosts.server(SYN_ACK, (5000, 1001), b"");
    pass(&mut queue).await;
    hosts.client(ACK, (1001, 5001), b"");
    pass(&mut queue).await;
    hosts.arrived();
    hosts.client(ACK, (1001, 5001), b"bad");
    confirm(next(&mut queue).await.reject().for_flow()).await.unwrap();
    // The client is reset.
    assert_eq!(hosts.arrived(), [0, 1]);
    for data in [&b""[..], b"data"] {
        hosts.client(RST, (1001, 0), data);
        hosts.server(RST | ACK, (5001, 1001), data);
    }
    hosts.error();
    assert_eq!(hosts.arrived(), [0, 0]);
    queue_is_empty(&mut queue);
    hosts.client(ACK, (1001, 5001), b"data");
    hosts.server(ACK, (5001, 1001), b"data");
    assert_eq!(hosts.arrived(), [1, 1]);
    queue_is_empty(&mut queue);
}

/// The kernel limits its ICMP errors, so that most of the datagrams get no reply.
async fn a_reply_is_not_queued_beside_a_flood_of_rejected_first_packets() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let answers = Rule::new(Hook::Output).protocol(Protocol::Tcp).to_queue(0);
    let _divert = table([tcp(), udp(), answers]).install().unwrap();
    opened(&hosts, &mut queue).await;
    let [client, server] = hosts.addresses();
    for port in 10_000..12_000 {
        hosts.client.datagram(SocketAddrV4::new(*client.ip(), port), server);
        next(&mut queue).await.reject().submit().unwrap();
    }
    queue.sink().flush().await;
    hosts.arrived();
    hosts.client(ACK, (1001, 5001), b"bad");
    confirm(queued(&mut queue, ACK).await.reject()).await.unwrap();
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [0, 1]);
}

type Decide = fn(Packet) -> Verdict;
const REJECTS: [Decide; 2] = [|packet| packet.reject(), |packet| packet.reject().for_flow()];

/// The hooks of the rules, each of which queues everything.
const ARRANGEMENTS: [&[Hook]; 6] = [
    &[Hook::Output],
    &[Hook::Input],
    &[Hook::Prerouting],
    &[Hook::Input, Hook::Output],
    &[Hook::Prerouting, Hook::Output],
    &[Hook::Prerouting, Hook::Input, Hook::Output, Hook::Postrouting],
];

/// A TCP and a UDP client learn that they are refused. `client` and `server` make sockets there.
async fn refused_everywhere(
    arrangements: &[&[Hook]],
    priority: i32,
    (server_address, client_address): (IpAddr, IpAddr),
    at_server: impl Fn(SocketAddr) -> (TcpListener, UdpSocket),
    at_client: impl Fn(SocketAddr, SocketAddr) -> (UdpSocket, tokio::task::JoinHandle<io::Result<()>>),
) {
    let (listener, server) = at_server((server_address, 0).into());
    for hooks in arrangements {
        for reject in REJECTS {
            let case = format!("{hooks:?} {priority} {client_address}");
            let mut queue = bind();
            let rules = hooks.iter().flat_map(|hook| {
                [Protocol::Tcp, Protocol::Udp, Protocol::Icmp, Protocol::Icmpv6]
                    .map(|protocol| Rule::new(*hook).protocol(protocol).to_queue(0))
            });
            let divert = table(rules).priority(priority).install().unwrap();
            let (client, connecting) = at_client(server.local_addr().unwrap(), listener.local_addr().unwrap());
            client.send(b"?").unwrap();
            let mut done = Box::pin(connecting);
            let answered = Cell::new(false);
            // A packet of the neighbour discovery is none of the clients'.
            let decide = async |packet: Packet| {
                let payload = packet.payload();
                let protocol = if payload[0] >> 4 == 4 { payload[9] } else { payload[6] };
                if matches!(protocol, 6 | 17) {
                    confirm(reject(packet)).await.unwrap();
                    answered.set(answered.get() || protocol == 17);
                } else {
                    confirm(packet.accept()).await.unwrap();
                }
            };
            let result = loop {
                tokio::select! {
                    packet = next(&mut queue) => decide(packet).await,
                    result = &mut done => break result.unwrap(),
                }
            };
            assert_eq!(result.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionRefused), "TCP, {case}");
            while !answered.get() {
                decide(soon("the datagram", next(&mut queue)).await).await;
            }
            super::refused(&client, &format!("UDP, {case}"));
            divert.close().unwrap();
        }
    }
}

fn serve(address: SocketAddr) -> (TcpListener, UdpSocket) {
    (TcpListener::bind(address).unwrap(), support::udp(address))
}

fn connect(datagrams: SocketAddr, segments: SocketAddr, from: IpAddr) -> (UdpSocket, TcpStreamTask) {
    let client = support::udp((from, 0));
    client.connect(datagrams).unwrap();
    (client, spawn_blocking(move || TcpStream::connect_timeout(&segments, PATIENCE).map(drop)))
}

type TcpStreamTask = tokio::task::JoinHandle<io::Result<()>>;

async fn the_first_packet_is_answered_on_loopback() {
    unlimited_icmp_errors();
    for address in LOOPBACKS {
        let client = |datagrams, segments| connect(datagrams, segments, address);
        refused_everywhere(&ARRANGEMENTS, 0, (address, address), serve, client).await;
    }
}

/// This host is the client.
async fn the_first_packet_is_answered_for_the_own_host() {
    let peer = support::veth();
    unlimited_icmp_errors();
    let pairs: [(IpAddr, IpAddr); 2] =
        [(peer.far_v4.into(), peer.near_v4.into()), (peer.far_v6.into(), peer.near_v6.into())];
    let arrangements: [&[Hook]; 3] = [&[Hook::Output], &[Hook::Input, Hook::Output], &[Hook::Output, Hook::Prerouting]];
    for (server, client) in pairs {
        let at_server = |address| peer.run(|| serve(address));
        let at_client = |datagrams, segments| connect(datagrams, segments, client);
        refused_everywhere(&arrangements, 0, (server, client), at_server, at_client).await;
    }
}

/// This host is the server.
async fn the_first_packet_is_answered_for_another_host() {
    let peer = support::veth();
    unlimited_icmp_errors();
    let pairs: [(IpAddr, IpAddr); 2] =
        [(peer.near_v4.into(), peer.far_v4.into()), (peer.near_v6.into(), peer.far_v6.into())];
    let arrangements: [&[Hook]; 4] =
        [&[Hook::Input], &[Hook::Input, Hook::Output], &[Hook::Prerouting], &[Hook::Prerouting, Hook::Output]];
    for (server, client) in pairs {
        refused_everywhere(&arrangements, 0, (server, client), serve, at(&peer, client)).await;
    }
}

/// This host forwards.
async fn the_first_packet_is_answered_for_others() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    unlimited_icmp_errors();
    left.route_through_near();
    right.route_through_near();
    let pairs: [(IpAddr, IpAddr); 2] =
        [(right.far_v4.into(), left.far_v4.into()), (right.far_v6.into(), left.far_v6.into())];
    let arrangements: [&[Hook]; 3] =
        [&[Hook::Forward], &[Hook::Forward, Hook::Output], &[Hook::Prerouting, Hook::Output]];
    for (server, client) in pairs {
        let at_server = |address| right.run(|| serve(address));
        refused_everywhere(&arrangements, 0, (server, client), at_server, at(&left, client)).await;
    }
}

/// Also before the translation. The client knows another address of the server, and the server
/// another of the client.
async fn the_first_packet_is_answered_behind_address_translation() {
    let [left, right] = [1, 2].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    unlimited_icmp_errors();
    left.route_through_near();
    right.route_through_near();
    let service = Ipv4Addr::new(192, 0, 2, 1).into();
    rules::install_redirection("nat", service, 0..=u16::MAX, right.far_v4.into(), true).unwrap();
    let arrangements: [&[Hook]; 2] =
        [&[Hook::Prerouting, Hook::Output, Hook::Postrouting], &[Hook::Forward, Hook::Output, Hook::Postrouting]];
    for priority in [-150, 0] {
        let at_server = |address| right.run(|| serve(address));
        let at_service = |address: SocketAddr| SocketAddr::new(service, address.port());
        let connect = at(&left, left.far_v4.into());
        let at_client = |datagrams, segments| connect(at_service(datagrams), at_service(segments));
        let ends = (right.far_v4.into(), left.far_v4.into());
        refused_everywhere(&arrangements, priority, ends, at_server, at_client).await;
    }
}

/// Clients in another namespace. Its threads are not those of the runtime.
fn at(peer: &support::Peer, client: IpAddr) -> impl Fn(SocketAddr, SocketAddr) -> (UdpSocket, TcpStreamTask) {
    move |datagrams, segments| {
        let socket = peer.run(|| {
            let socket = support::udp((client, 0));
            socket.connect(datagrams).unwrap();
            socket
        });
        let connecting = peer.spawn(move || TcpStream::connect_timeout(&segments, PATIENCE).map(drop));
        (socket, spawn_blocking(move || connecting.join().unwrap()))
    }
}

/// This host bridges, and rules of IP see what it bridges.
pub(super) struct Bridging(Bridge);

/// A kernel without BRIDGE_NETFILTER has no such rules.
pub(super) fn bridging() -> Option<Bridging> {
    let setting = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    if !fs::exists(setting).unwrap() {
        println!("the kernel has no BRIDGE_NETFILTER");
        return None;
    }
    let bridge = Bridge::new();
    fs::write(setting, "1").unwrap();
    Some(Bridging(bridge))
}

impl Bridging {
    const IPV4: [u8; 2] = [8, 0];
    /// For experiments (IEEE 802).
    const LAST: [u8; 2] = [0x88, 0xb5];

    fn send(&self, from: usize, ethertype: [u8; 2], packet: &[u8]) {
        let ends = &self.0.ends;
        let [source, destination] = [from, 1 - from].map(|end| ends[end].socket.address());
        let bytes = [&destination[..], &source, &ethertype, packet].concat();
        ends[from].socket.send(&Frame { tag: None, bytes });
    }

    /// The client is at the first end, the server at the second one.
    pub(super) fn segment(&self, from: usize, port: u16, flags: u8, numbers: (u32, u32)) {
        let [client, server] = [1, 2].map(|subnet| Ipv4Addr::new(10, 9, subnet, 2));
        let mut ends = [SocketAddrV4::new(client, port), SocketAddrV4::new(server, 80)];
        ends.rotate_left(from);
        self.send(from, Self::IPV4, &segment(ends[0], ends[1], flags, numbers, b""));
    }

    /// The IPv4 packets that have arrived at an end.
    pub(super) fn arrived(&self, end: usize) -> usize {
        let (mut last, mut arrived) = (0, 0);
        support::on_each_cpu(|_| {
            self.send(1 - end, Self::LAST, &[0; 46]);
            last += 1;
        });
        while last > 0 {
            let mut frame = None;
            support::wait_until("a frame has arrived", || {
                frame = self.0.ends[end].socket.arrived();
                frame.is_some()
            });
            match frame.unwrap().bytes[12..14].try_into().unwrap() {
                Self::LAST => last -= 1,
                Self::IPV4 => arrived += 1,
                _ => {}
            }
        }
        arrived
    }
}

async fn a_bridged_packet_is_answered_if_a_route_leads_to_its_sender() {
    let Some(bridging) = bridging() else { return };
    let mut queue = bind();
    let _divert = table([Rule::new(Hook::Forward).ipv4().to_queue(0)]).install().unwrap();
    for (route, port) in [(false, 40_000), (true, 40_001)] {
        if route {
            support::add_address(&bridging.0.name, Ipv4Addr::new(10, 9, 7, 1).into(), 16);
        }
        bridging.segment(0, port, SYN, (1000, 0));
        confirm(next(&mut queue).await.reject().for_flow()).await.unwrap();
        assert_eq!([0, 1].map(|end| bridging.arrived(end)), [usize::from(route), 0]);
    }
}

/// Bridged packets come to `Postrouting` without the interface by which they have come.
async fn a_bridged_syn_never_takes_the_shortcut() {
    let Some(bridging) = bridging() else { return };
    let post = || Rule::new(Hook::Postrouting).protocol(Protocol::Tcp).to_queue(0);
    let none = |hook| Rule::new(hook).protocol(Protocol::Tcp).destination_port(9).drop();
    let tables = [vec![post()], vec![post(), none(Hook::Output)], vec![post(), none(Hook::Input)]];
    for (rules, port) in tables.into_iter().zip(40_000..) {
        let mut queue = bind();
        let divert = table(rules).install().unwrap();
        bridging.segment(0, port, SYN, (1000, 0));
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        bridging.segment(1, port, SYN_ACK, (5000, 1001));
        bridging.segment(0, port, ACK, (1001, 5001));
        assert_eq!([0, 1].map(|end| bridging.arrived(end)), [1, 2]);
        queue_is_empty(&mut queue);
        // The next connection is accepted packet by packet.
        for (from, flags, numbers) in
            [(0, SYN, (90_000, 0)), (1, SYN_ACK, (70_000, 90_001)), (0, ACK, (90_001, 70_001))]
        {
            bridging.segment(from, port, flags, numbers);
            confirm(next(&mut queue).await.accept()).await.unwrap();
        }
        assert_eq!([0, 1].map(|end| bridging.arrived(end)), [1, 2]);
        divert.close().unwrap();
    }
}

/// Also after a packet of the connection was rejected.
async fn what_other_hosts_send_over_a_bridge_is_no_reply_of_this_host() {
    let Some(bridging) = bridging() else { return };
    support::add_address(&bridging.0.name, Ipv4Addr::new(10, 9, 7, 1).into(), 16);
    let [client, server] = [1, 2].map(|subnet| Ipv4Addr::new(10, 9, subnet, 2));
    let port = 40_000;
    let mut queue = bind();
    let from_client = Rule::new(Hook::Forward).protocol(Protocol::Tcp).source_address(client, 32).to_queue(0);
    let from_server = Rule::new(Hook::Postrouting).source_address(server, 32).to_queue(0);
    let _divert = table([from_client, from_server]).install().unwrap();
    for (from, flags, numbers) in [(0, SYN, (1000, 0)), (1, SYN_ACK, (5000, 1001))] {
        bridging.segment(from, port, flags, numbers);
        confirm(next(&mut queue).await.accept()).await.unwrap();
    }
    bridging.segment(0, port, ACK, (1001, 5001));
    confirm(next(&mut queue).await.reject()).await.unwrap();
    bridging.arrived(0);
    bridging.arrived(1);
    queue_is_empty(&mut queue);
    let ends = [SocketAddrV4::new(client, port), SocketAddrV4::new(server, 80)];
    let quoted = segment(ends[0], ends[1], ACK, (1001, 5001), &[b's'; 400]);
    bridging.send(1, Bridging::IPV4, &unreachable(ends[1], ends[0], &quoted));
    confirm(next(&mut queue).await.drop()).await.unwrap();
    bridging.segment(1, port, RST | ACK, (5001, 1001));
    confirm(next(&mut queue).await.drop()).await.unwrap();
    assert_eq!([0, 1].map(|end| bridging.arrived(end)), [0, 0]);
}

/// On the loopback interface, where `Input` does not see who has sent it.
async fn what_a_process_sends_is_no_reply_of_the_kernel() {
    // So that its reset is as short as the kernel's.
    fs::write("/proc/sys/net/ipv4/tcp_timestamps", "0").unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let mut queue = bind();
    let _divert = table([Rule::new(Hook::Input).protocol(Protocol::Tcp).to_queue(0)]).install().unwrap();
    (&client).write_all(b"a").unwrap();
    confirm(next(&mut queue).await.reject()).await.unwrap();
    socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
    drop(server);
    // Before it, others may come.
    while next(&mut queue).await.payload()[33] & RST == 0 {}
}
