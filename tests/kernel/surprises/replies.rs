//! Replies that do not arrive, and changed destinations.

use std::{
    io,
    net::{SocketAddr, TcpStream, UdpSocket},
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{FlowMarks, Hook, Packet, Protocol, Queue, Rule, divert::Priority, inject::Injector};

use crate::{
    common::{
        self, PORT, next,
        rules::{self, Place},
    },
    support::{self, Peer, VethOptions},
};

tests![
    one a_reply_to_the_first_packet_behind_dnat_is_ignored_and_a_reject_arrives,
    one a_reply_to_a_denied_connection_at_input_is_refused,
    one a_destination_changed_at_postrouting_goes_to_the_old_next_hop,
];

/// Where the clients believe the server to be.
const SERVICE: u16 = 9500;

/// A client and a server with a router between them, which is this namespace.
fn router() -> [Peer; 2] {
    let peers = [0, 1].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    support::forwarding();
    peers.iter().for_each(Peer::route_through_near);
    peers
}

/// Drops a packet, and injects a reply.
async fn reply(injector: &Injector, packet: Packet) -> Result<(), tokio_nfqueue::Error> {
    let mut edit = packet.edit().unwrap();
    edit.turn_around().unwrap();
    edit.replace_payload(b"reply").unwrap();
    packet.drop().confirm().await.unwrap();
    injector.send(&edit.finish()).await
}

fn received(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    let mut datagram = [0; 64];
    socket.recv(&mut datagram).map(|length| datagram[..length].to_vec())
}

async fn a_reply_to_the_first_packet_behind_dnat_is_ignored_and_a_reject_arrives() {
    let [client_side, server_side] = router();
    let service = SocketAddr::from((client_side.near_v4, SERVICE));
    let place = Place { hook: Hook::Prerouting.number().into(), priority: -100 };
    for (name, port) in [("nat", SERVICE), ("nat_tcp", SERVICE + 1)] {
        rules::install_nat_at(name, place, port, (server_side.far_v4, PORT)).unwrap();
    }
    let client = || {
        let client = client_side.run(|| support::udp((client_side.far_v4, 0)));
        client.connect(service).unwrap();
        client
    };
    let injector = Injector::builder().bind().unwrap();
    let mut queue = Queue::builder(0).flow_marks(FlowMarks::default()).bind().await.unwrap();

    // Before the translation, the packet has the addresses that the client knows.
    for (hook, priority, arrives) in [
        (Hook::Forward, Priority::FILTER, false),
        (Hook::Prerouting, Priority::FILTER, false),
        (Hook::Prerouting, Priority::MANGLE, true),
    ] {
        let rule = Rule::new(hook).protocol(Protocol::Udp).to_queue(0);
        let divert = Divert::builder().rule(rule).priority(priority).install().unwrap();
        let client = client();
        client.send(b"query").unwrap();
        reply(&injector, next(&mut queue).await).await.unwrap();
        let received = support::received_before(&support::udp(service), &client);
        let reply = (b"reply".to_vec(), service);
        assert_eq!(received, if arrives { vec![reply] } else { vec![] }, "{hook:?} {priority:?}");
        divert.close().unwrap();
    }

    let rules = [Protocol::Udp, Protocol::Tcp]
        .map(|protocol| Rule::new(Hook::Forward).protocol(protocol).destination_port(PORT).to_queue(0));
    let _divert = Divert::builder().flow_marks(FlowMarks::default()).rules(rules).install().unwrap();
    let client = client();
    client.send(b"query").unwrap();
    next(&mut queue).await.reject().confirm().await.unwrap();
    assert_eq!(received(&client).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    let connect = client_side.spawn(move || TcpStream::connect(service).unwrap_err().kind());
    next(&mut queue).await.reject().confirm().await.unwrap();
    assert_eq!(connect.join().unwrap(), io::ErrorKind::ConnectionRefused);
}

async fn a_reply_to_a_denied_connection_at_input_is_refused() {
    let peer = support::veth();
    let server = support::udp((peer.near_v4, PORT));
    let mut queue = Queue::builder(0).flow_marks(FlowMarks::default()).bind().await.unwrap();
    let rule = Rule::new(Hook::Input).protocol(Protocol::Udp).to_queue(0);
    let _divert = Divert::builder().flow_marks(FlowMarks::default()).rule(rule).install().unwrap();
    let injector = Injector::builder().bind().unwrap();
    let client = peer.run(|| support::udp((peer.far_v4, 0)));
    client.connect(server.local_addr().unwrap()).unwrap();

    // A reply beside a verdict for the packet alone arrives, also after a second packet.
    for _ in 0..2 {
        client.send(b"query").unwrap();
        reply(&injector, next(&mut queue).await).await.unwrap();
        assert_eq!(received(&client).unwrap(), b"reply");
    }
    let client = peer.run(|| support::udp((peer.far_v4, 0)));
    client.connect(server.local_addr().unwrap()).unwrap();
    client.send(b"query").unwrap();
    let packet = next(&mut queue).await;
    let mut edit = packet.edit().unwrap();
    edit.turn_around().unwrap();
    packet.drop().for_flow().confirm().await.unwrap();
    let error = injector.send(&edit.finish()).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EPERM as i32), "{error}");
    assert!(error.to_string().contains("a rule at the output"), "{error}");
}

async fn a_destination_changed_at_postrouting_goes_to_the_old_next_hop() {
    if !common::replaces_payloads() {
        return eprintln!("not tried, for this kernel refuses replaced payloads in a user namespace");
    }
    let peers = router();
    let client = support::veth_with(&VethOptions { index: 2, ..VethOptions::default() });
    client.route_through_near();
    let receivers = peers.each_ref().map(|peer| peer.run(|| support::udp((peer.far_v4, PORT))));
    for (hook, forwarded, expected) in [
        (Hook::Output, false, true),
        (Hook::Postrouting, false, false),
        (Hook::Prerouting, true, true),
        (Hook::Forward, true, false),
        (Hook::Postrouting, true, false),
    ] {
        let mut queue = Queue::builder(0).bind().await.unwrap();
        let rule = Rule::new(hook).protocol(Protocol::Udp).destination_address(peers[0].far_v4, 32).to_queue(0);
        let divert = Divert::builder().rule(rule).install().unwrap();
        let sender = match forwarded {
            true => client.run(|| support::udp((client.far_v4, 0))),
            false => support::udp(("0.0.0.0", 0)),
        };
        sender.send_to(b"query", (peers[0].far_v4, PORT)).unwrap();
        let packet = next(&mut queue).await;
        let mut edit = packet.edit().unwrap();
        edit.set_destination_address(peers[1].far_v4).unwrap();
        packet.accept().payload(edit.finish()).confirm().await.unwrap();
        queue.close().await.unwrap();
        divert.close().unwrap();
        let received: Vec<Vec<u8>> =
            support::received_before(&sender, &receivers[1]).into_iter().map(|(datagram, _)| datagram).collect();
        let query = b"query".to_vec();
        assert_eq!(received, if expected { vec![query] } else { vec![] }, "{hook:?}, forwarded: {forwarded}");
    }
    for receiver in receivers {
        receiver.set_nonblocking(true).unwrap();
        assert!(received(&receiver).is_err());
    }
}
