//! Replaced payloads, as the receiver sees them.

use std::{
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
};

use etherparse::{IpHeaders, TransportHeader};
use tokio_nfqueue::{Action, ErrorKind, NetworkNamespace, Packet, Queue};

use crate::{
    common::{self, Hook, Protocol, Rule, Traffic, divert, hold, next, soon, start},
    support,
};

tests![
    one udp_payloads_are_replaced_over_ipv4_loopback,
    one udp_payloads_are_replaced_over_ipv6_loopback,
    both udp_payloads_are_replaced_over_ipv4_between_namespaces,
    one udp_payloads_are_replaced_over_ipv6_between_namespaces,
    both tcp_payloads_are_replaced_over_ipv4_loopback,
    one tcp_payloads_are_replaced_over_ipv6_loopback,
    one tcp_payloads_are_replaced_over_ipv4_between_namespaces,
    one tcp_payloads_are_replaced_over_ipv6_between_namespaces,
    one payloads_are_replaced_at_the_input_hook,
    one the_longest_payload_is_delivered,
    one payload_and_mark_and_requeue_work_in_one_verdict,
    one a_packet_with_a_wrong_checksum_is_not_delivered,
    one an_invalid_length_is_refused_and_gets_the_default_action,
    one payloads_are_refused_in_a_namespace_of_another_user_namespace,
];

const SENT: &[u8] = b"as it was sent";
const SHORTER: &[u8] = b"short";
const LONGER: &[u8] = b"much longer than what the sender believes to have sent, by an odd number of bytes";

async fn udp_payloads_are_replaced_over_ipv4_loopback() {
    udp(local(Ipv4Addr::LOCALHOST.into())).await;
}

async fn udp_payloads_are_replaced_over_ipv6_loopback() {
    udp(local(Ipv6Addr::LOCALHOST.into())).await;
}

async fn udp_payloads_are_replaced_over_ipv4_between_namespaces() {
    udp(remote(|peer| peer.far_v4.into())).await;
}

async fn udp_payloads_are_replaced_over_ipv6_between_namespaces() {
    udp(remote(|peer| peer.far_v6.into())).await;
}

async fn tcp_payloads_are_replaced_over_ipv4_loopback() {
    tcp(local(Ipv4Addr::LOCALHOST.into())).await;
}

async fn tcp_payloads_are_replaced_over_ipv6_loopback() {
    tcp(local(Ipv6Addr::LOCALHOST.into())).await;
}

async fn tcp_payloads_are_replaced_over_ipv4_between_namespaces() {
    tcp(remote(|peer| peer.far_v4.into())).await;
}

async fn tcp_payloads_are_replaced_over_ipv6_between_namespaces() {
    tcp(remote(|peer| peer.far_v6.into())).await;
}

/// The receiver: in this namespace or in another.
struct Place {
    peer: Option<support::Peer>,
    address: SocketAddr,
}

fn local(address: IpAddr) -> Place {
    Place { peer: None, address: (address, 9000).into() }
}

fn remote(address: impl FnOnce(&support::Peer) -> IpAddr) -> Place {
    let peer = support::veth();
    Place { address: (address(&peer), 9000).into(), peer: Some(peer) }
}

impl Place {
    fn open<T: Send>(&self, open: impl FnOnce(SocketAddr) -> T + Send) -> T {
        match &self.peer {
            Some(peer) => peer.run(|| open(self.address)),
            None => open(self.address),
        }
    }
}

/// Queues packets to the receiver at the output hook, where checksums may be unfinished.
fn queue_to(protocol: Protocol) -> (Queue, common::Divert) {
    let queue = common::bind_now(Queue::builder(0));
    let rule = Rule::new(Hook::Output).protocol(protocol).destination_port(9000).to_queue(0);
    (queue, divert([rule]))
}

async fn udp(place: Place) {
    if !common::replaces_payloads() {
        return;
    }
    let receiver = place.open(support::udp);
    receiver.set_nonblocking(true).unwrap();
    let receiver = tokio::net::UdpSocket::from_std(receiver).unwrap();
    let any: IpAddr = if place.address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let sender = UdpSocket::bind((any, 0)).unwrap();

    let (mut queue, _divert) = queue_to(Protocol::Udp);
    for replacement in [SHORTER, LONGER, SENT, b""] {
        sender.send_to(SENT, place.address).unwrap();
        let packet = next(&mut queue).await;
        assert!(packet.payload().ends_with(SENT));
        let replaced = rebuilt(packet.payload(), replacement);
        packet.accept().payload(replaced).submit().unwrap();
        let mut datagram = [0; 256];
        let length = soon("the datagram", receiver.recv(&mut datagram)).await.unwrap();
        assert_eq!(&datagram[..length], replacement);
    }
}

async fn tcp(place: Place) {
    if !common::replaces_payloads() {
        return;
    }
    let listener = place.open(|address| TcpListener::bind(address).unwrap());
    for replacement in [SHORTER, LONGER] {
        let listener = listener.try_clone().unwrap();
        let (mut queue, divert) = queue_to(Protocol::Tcp);
        let (address, length) = (place.address, replacement.len());
        let receiver = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
            let mut read = vec![0; length];
            stream.read_exact(&mut read).map(|()| read)
        });
        let client = tokio::spawn(async move {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, SENT).await.unwrap();
            stream
        });
        let mut replaced = 0;
        let serve = async {
            loop {
                let packet = next(&mut queue).await;
                // Only once: the sender retransmits data that was not acknowledged.
                let replace = replaced == 0 && packet.payload().ends_with(SENT);
                let verdict = if replace {
                    replaced += 1;
                    let payload = rebuilt(packet.payload(), replacement);
                    packet.accept().payload(payload)
                } else {
                    packet.accept()
                };
                verdict.submit().unwrap();
            }
        };
        tokio::select! {
            () = serve => {}
            () = common::eventually("the receiver has read enough", || receiver.is_finished()) => {}
        }
        assert_eq!(receiver.join().unwrap().unwrap(), replacement);
        assert_eq!(replaced, 1);
        drop((client.await.unwrap(), divert, queue));
        common::freed(0).await;
    }
}

/// The packet with other data, and with correct lengths and checksums.
fn rebuilt(packet: &[u8], data: &[u8]) -> Vec<u8> {
    let (mut ip, payload) = IpHeaders::from_slice(packet).unwrap();
    let mut transport = match payload.ip_number {
        etherparse::IpNumber::UDP => {
            let (mut udp, _) = etherparse::UdpHeader::from_slice(payload.payload).unwrap();
            udp.length = (8 + data.len()).try_into().unwrap();
            TransportHeader::Udp(udp)
        }
        _ => TransportHeader::Tcp(etherparse::TcpHeader::from_slice(payload.payload).unwrap().0),
    };
    ip.set_payload_len(transport.header_len() + data.len()).unwrap();
    match &ip {
        IpHeaders::Ipv4(header, _) => transport.update_checksum_ipv4(header, data).unwrap(),
        IpHeaders::Ipv6(header, _) => transport.update_checksum_ipv6(header, data).unwrap(),
    }
    let mut bytes = Vec::new();
    ip.write(&mut bytes).unwrap();
    transport.write(&mut bytes).unwrap();
    bytes.extend_from_slice(data);
    bytes
}

fn renumbered(packet: &Packet, number: u32) -> Vec<u8> {
    rebuilt(packet.payload(), &number.to_be_bytes())
}

async fn payloads_are_replaced_at_the_input_hook() {
    if !common::replaces_payloads() {
        return;
    }
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for (index, packet) in (0..).zip(hold(&mut queue, &traffic, 0..50).await) {
        let payload = renumbered(&packet, 50 + index);
        packet.accept().payload(payload).submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(50..100).await;
}

async fn the_longest_payload_is_delivered() {
    if !common::replaces_payloads() {
        return;
    }
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    let receiver = support::udp("127.0.0.1:9999");
    traffic.sender.send_to(b"x", "127.0.0.1:9999").unwrap();
    let packet = next(&mut queue).await;
    let data: Vec<u8> = (0..65_531 - 28).map(|index| (index % 251) as u8).collect();
    let payload = rebuilt(packet.payload(), &data);
    assert_eq!(payload.len(), 65_531);
    soon("the reply", packet.accept().payload(payload).confirm()).await.unwrap();
    let mut datagram = vec![0; 65_536];
    let length = receiver.recv(&mut datagram).unwrap();
    assert!(datagram[..length] == data, "{length} bytes");
}

async fn payload_and_mark_and_requeue_work_in_one_verdict() {
    if !common::replaces_payloads() {
        return;
    }
    let (mut queue, _divert) = start(Queue::builder(0));
    let mut other = Queue::builder(1).bind().await.unwrap();
    let traffic = Traffic::new(100);
    for packet in hold(&mut queue, &traffic, 0..10).await {
        let payload = renumbered(&packet, common::number(&packet) + 50);
        packet.requeue(1).mark(3).payload(payload).submit().unwrap();
    }
    queue.sink().flush().await;
    for expected in 50..60 {
        let packet = next(&mut other).await;
        assert_eq!((common::number(&packet), packet.mark()), (expected, 3));
        packet.accept().submit().unwrap();
    }
    other.sink().flush().await;
    traffic.expect(50..60).await;
}

/// Shows that the other tests here would detect a wrong checksum.
async fn a_packet_with_a_wrong_checksum_is_not_delivered() {
    if !common::replaces_payloads() {
        return;
    }
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for packet in hold(&mut queue, &traffic, 0..10).await {
        let mut payload = renumbered(&packet, common::number(&packet) + 50);
        if common::number(&packet) < 5 {
            *payload.last_mut().unwrap() ^= 0x40;
        }
        packet.accept().payload(payload).submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(55..60).await;
}

async fn an_invalid_length_is_refused_and_gets_the_default_action() {
    for action in [Action::Accept, Action::Drop] {
        let (mut queue, divert) = start(Queue::builder(0).on_unanswered(action));
        let traffic = Traffic::new(8);
        let v4 = |length: usize| [0x45].into_iter().chain([0; 70_000]).take(length).collect::<Vec<u8>>();
        let v6 = |length: usize| [0x60].into_iter().chain([0; 70_000]).take(length).collect::<Vec<u8>>();
        let impossible = [vec![], v4(1), v4(19), v4(65_532), v6(39), v6(65_532)];
        for (number, payload) in (0..).zip(impossible) {
            let packet = hold(&mut queue, &traffic, [number]).await.remove(0);
            let id = packet.id();
            let verdict = packet.accept().payload(payload);
            let error = if number % 2 == 0 {
                verdict.submit().unwrap_err()
            } else {
                soon("the refusal", verdict.confirm()).await.unwrap_err()
            };
            assert_eq!((error.kind(), error.packet_id()), (ErrorKind::InvalidInput, Some(id)), "{error}");
        }
        queue.sink().flush().await;
        match action {
            Action::Accept => traffic.expect(0..6).await,
            _ => traffic.expect_nothing(),
        }
        assert_eq!((queue.stats().decided.unanswered, queue.stats().held.in_flight), (6, 0));
        support::drop_now(divert);
    }
}

/// Linux 7.1 and later refuse them. The owner of the network namespace counts: this process may be
/// in the initial user namespace.
async fn payloads_are_refused_in_a_namespace_of_another_user_namespace() {
    let other = support::UserNamespace::new();
    let network = other.network();
    network.run(|| support::link_up("lo"));
    let refused = common::kernel_release() >= (7, 1);
    for (number, action) in [(0, Action::Accept), (1, Action::Drop)] {
        let namespace = NetworkNamespace::open(other.path()).unwrap();
        let mut queue = Queue::builder(number).namespace(namespace).on_unanswered(action).bind().await.unwrap();
        let runtime = tokio::runtime::Handle::current();
        let (traffic, _divert) = network.run(|| {
            let _runtime = runtime.enter();
            (Traffic::new(8), divert([common::udp_in().to_queue(number)]))
        });
        for (index, packet) in (0..).zip(hold(&mut queue, &traffic, 0..4).await) {
            let id = packet.id();
            let payload = renumbered(&packet, 4 + index);
            let verdict = packet.accept().payload(payload);
            let error = match index % 2 {
                0 => {
                    verdict.submit().unwrap();
                    if refused { soon("the report", queue.sink().refusals().recv()).await } else { None }
                }
                _ => soon("the reply", verdict.confirm()).await.err(),
            };
            let expected = refused.then_some((ErrorKind::Unsupported, Some(id)));
            assert_eq!(error.map(|error| (error.kind(), error.packet_id())), expected);
        }
        queue.sink().flush().await;
        match action {
            _ if !refused => traffic.expect(4..8).await,
            Action::Accept => traffic.expect(0..4).await,
            _ => traffic.expect_nothing(),
        }
        assert_eq!(queue.stats().held.in_flight, 0);
    }
}
