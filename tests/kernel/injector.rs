//! Packets that an injector sends.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bytes::Bytes;
use etherparse::PacketBuilder;
use futures::{FutureExt, SinkExt};
use rustix::net::sockopt::set_socket_broadcast;
use tokio_nfqueue::{
    ErrorKind, Hook, NetworkNamespace, Protocol, Queue, Rule,
    inject::{Injector, TrySendError},
};

use crate::{
    common::{self, divert, give_up_capabilities, soon},
    support::{self, Peer, VethOptions},
};

tests![
    both packets_from_any_source_arrive,
    one packets_to_the_broadcast_address_arrive,
    one a_rule_can_exclude_the_mark,
    one a_namespace_can_be_given,
    one an_interface_can_be_given,
    one an_interface_must_exist,
    one without_the_capability_it_is_not_bound,
    one errors_name_the_reason,
    one where_ipv6_is_switched_off_its_packets_are_unsupported,
    one incomplete_packets_are_not_sent,
    both send_waits_while_the_buffer_is_full,
    both the_sink_waits_while_the_buffer_is_full,
    one clones_of_the_sink_close_alone,
    sync packets_are_sent_after_the_runtime_has_ended,
];

const PORT: u16 = 9000;
const MARK: u32 = 0x40;

fn datagram(from: IpAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let ip = match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        other => panic!("{other:?}"),
    };
    ip.udp(7, to.port()).write(&mut bytes, payload).unwrap();
    bytes
}

/// Source addresses that no host has, and the other side's addresses.
fn ways(peer: &Peer) -> [(IpAddr, SocketAddr); 2] {
    [
        (Ipv4Addr::new(10, 9, 0, 77).into(), (peer.far_v4, PORT).into()),
        ("fd09::77".parse().unwrap(), (peer.far_v6, PORT).into()),
    ]
}

fn rule() -> Rule {
    Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(PORT)
}

async fn packets_from_any_source_arrive() {
    let peer = support::veth();
    let injector = Injector::builder().bind().unwrap();
    for (from, to) in ways(&peer) {
        let receiver = peer.run(|| support::udp(to));
        for number in 0..20 {
            let packet = datagram(from, to, &[number; 99]);
            if number % 2 == 0 {
                injector.send(&packet).await.unwrap();
            } else {
                injector.try_send(&packet).unwrap();
            }
            let mut buffer = [0; 128];
            assert_eq!(receiver.recv_from(&mut buffer).unwrap(), (99, SocketAddr::new(from, 7)));
            assert_eq!(buffer[..99], [number; 99]);
        }
    }
}

async fn packets_to_the_broadcast_address_arrive() {
    let peer = support::veth();
    let receiver = peer.run(|| support::udp(("0.0.0.0", PORT)));
    set_socket_broadcast(&receiver, true).unwrap();
    let injector = Injector::builder().bind().unwrap();
    let to = (Ipv4Addr::new(10, 9, 0, 255), PORT).into();
    injector.send(&datagram(peer.near_v4.into(), to, b"all")).await.unwrap();
    assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), 3);
}

async fn a_rule_can_exclude_the_mark() {
    let peer = support::veth();
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([rule().unless_mark(MARK, u32::MAX).to_queue(0)]);
    let marked = Injector::builder().mark(MARK).bind().unwrap();
    let other = Injector::builder().mark(7).bind().unwrap();
    for (from, to) in ways(&peer) {
        let receiver = peer.run(|| support::udp(to));
        other.send(&datagram(from, to, b"queued")).await.unwrap();
        let packet = common::next(&mut queue).await;
        assert_eq!(packet.mark(), 7);
        marked.send(&datagram(from, to, b"not queued")).await.unwrap();
        assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 10);
        packet.accept().submit().unwrap();
        assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 6);
    }
    assert_eq!(queue.stats().received.packets, 2);
}

async fn a_namespace_can_be_given() {
    let peer = support::veth();
    let namespace = peer.run(|| NetworkNamespace::current().unwrap());
    let injector = Injector::builder().namespace(namespace).bind().unwrap();
    let receiver = support::udp((peer.near_v4, PORT));
    let to = (peer.near_v4, PORT).into();
    injector.send(&datagram(peer.far_v4.into(), to, b"from there")).await.unwrap();
    assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 10);
}

/// The same link-local address is behind each of two interfaces.
async fn an_interface_can_be_given() {
    let peers = [0, 1].map(|index| support::veth_with(&VethOptions { index, ..VethOptions::default() }));
    let shared = "fe80::77".parse::<IpAddr>().unwrap();
    let to = SocketAddr::new(shared, PORT);
    let receivers = peers.each_ref().map(|peer| {
        peer.run(|| {
            support::add_address(&peer.far, shared, 64);
            support::udp(("::", PORT))
        })
    });
    for (number, (peer, receiver)) in peers.iter().zip(&receivers).enumerate() {
        let injector = Injector::builder().interface(&peer.near).bind().unwrap();
        let packet = datagram("fe80::99".parse().unwrap(), to, &vec![0; number + 1]);
        injector.send(&packet).await.unwrap();
        assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), number + 1);
        let (from, to) = (peer.near_v4.into(), (peer.far_v4, PORT).into());
        injector.send(&datagram(from, to, b"IPv4")).await.unwrap();
        assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), 4);
        let own = [(peer.near_v4.into(), peer.far_v4.into()), (peer.near_v6.into(), peer.far_v6.into())];
        for (to, from) in own.map(|(to, from): (IpAddr, IpAddr)| (SocketAddr::new(to, PORT), from)) {
            let receiver = support::udp(to);
            injector.send(&datagram(from, to, b"to this host")).await.unwrap();
            assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 12);
        }
    }
}

async fn an_interface_must_exist() {
    let error = Injector::builder().interface("nothing").bind().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Other);
    assert!(error.to_string().starts_with("bind to interface \"nothing\""), "{error}");
}

async fn without_the_capability_it_is_not_bound() {
    give_up_capabilities();
    let error = Injector::builder().bind().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
    assert!(error.to_string().contains("CAP_NET_RAW is needed"), "{error}");
}

async fn errors_name_the_reason() {
    let peer = support::veth();
    let injector = Injector::builder().bind().unwrap();
    for (from, to) in ways(&peer) {
        let reason = async |packet: Vec<u8>| {
            let error = injector.send(&packet).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Other);
            (error.raw_os_error().unwrap(), error.to_string())
        };
        let headers = if to.is_ipv4() { 28 } else { 48 };
        injector.send(&datagram(from, to, &vec![0; 1500 - headers])).await.unwrap();
        let (errno, text) = reason(datagram(from, to, &vec![0; 1501 - headers])).await;
        assert_eq!(errno, nix::errno::Errno::EMSGSIZE as i32);
        assert!(text.contains("longer than the MTU"), "{text}");

        let nowhere = if to.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
        let (errno, text) = reason(datagram(from, SocketAddr::new(nowhere.parse().unwrap(), PORT), b"")).await;
        assert_eq!(errno, nix::errno::Errno::ENETUNREACH as i32);
        assert!(text.contains("there is no route to"), "{text}");

        let divert = divert([rule().drop()]);
        let (errno, text) = reason(datagram(from, to, b"")).await;
        assert_eq!(errno, nix::errno::Errno::EPERM as i32);
        assert!(text.contains("a rule at the output"), "{text}");
        divert.close().unwrap();
        // None of them ends anything.
        injector.send(&datagram(from, to, b"")).await.unwrap();
    }
}

async fn where_ipv6_is_switched_off_its_packets_are_unsupported() {
    let peer = support::veth();
    let injector = Injector::builder().bind().unwrap();
    let before = Injector::builder().interface(&*peer.near).bind().unwrap();
    for interface in ["all", "default"] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1").unwrap();
    }
    let after = Injector::builder().bind().unwrap();
    let [(from_v4, to_v4), (from, to)] = ways(&peer);
    for injector in [injector, before, after] {
        for (from, to) in
            [(from, to), (from, "[::1]:9".parse().unwrap()), (to.ip(), "[2001:db8::1]:9".parse().unwrap())]
        {
            let error = injector.send(&datagram(from, to, b"text")).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("IPv6"), "{error}");
        }
        injector.send(&datagram(from_v4, to_v4, b"text")).await.unwrap();
    }
}

async fn incomplete_packets_are_not_sent() {
    let injector = Injector::builder().bind().unwrap();
    let packet = datagram(Ipv4Addr::LOCALHOST.into(), (Ipv4Addr::LOCALHOST, PORT).into(), b"text");
    for packet in [&packet[..31], &packet[..10], &[], &[&packet[..], &[0]].concat()] {
        assert_eq!(injector.send(packet).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(matches!(injector.try_send(packet), Err(TrySendError::Failed(_))));
    }
}

/// Queues packets until the send buffer is full; returns how many.
fn fill(injector: &Injector, packet: &[u8]) -> usize {
    for sent in 0..100_000 {
        match injector.try_send(packet) {
            Ok(()) => {}
            Err(TrySendError::Full) => return sent,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the send buffer has no limit");
}

/// While packets wait in a queue, they count against the send buffer.
async fn send_waits_while_the_buffer_is_full() {
    let peer = support::veth();
    for (number, (from, to)) in (0..).zip(ways(&peer)) {
        let mut queue = Queue::builder(number).max_len(100_000).bind().await.unwrap();
        let divert = divert([rule().to_queue(number)]);
        let injector = Injector::builder().bind().unwrap();
        let packet = datagram(from, to, &[0; 1000]);
        let sent = fill(&injector, &packet);
        let mut sends: Vec<_> = (0..3).map(|_| Box::pin(injector.send(&packet))).collect();
        for send in &mut sends {
            assert!(send.as_mut().now_or_never().is_none());
        }
        // The one that is dropped sends nothing.
        sends.pop();
        let decide = async {
            for _ in 0..sent + 2 {
                common::next(&mut queue).await.drop().submit().unwrap();
            }
        };
        let (_, results) =
            soon("all to be sent", futures::future::join(decide, futures::future::join_all(sends))).await;
        results.into_iter().for_each(|result| result.unwrap());
        assert!(queue.try_recv().is_err());
        support::drop_now(divert);
    }
}

async fn the_sink_waits_while_the_buffer_is_full() {
    let peer = support::veth();
    let [_, (from, to)] = ways(&peer);
    let mut queue = Queue::builder(0).max_len(100_000).bind().await.unwrap();
    let _divert = divert([rule().to_queue(0)]);
    let mut injector = Injector::builder().bind().unwrap();
    let mut other = injector.clone();
    let packet = Bytes::from(datagram(from, to, &[0; 1000]));
    let sent = fill(&injector, &packet);
    // The one that waits is kept, and the next one waits for it.
    injector.feed(packet.clone()).await.unwrap();
    assert!(injector.feed(packet.clone()).now_or_never().is_none());
    let send = async {
        injector.feed(packet.clone()).await.unwrap();
        injector.close().await.unwrap();
    };
    let send_other = async {
        for _ in 0..5 {
            SinkExt::send(&mut other, packet.clone()).await.unwrap();
        }
    };
    let decide = async {
        for _ in 0..sent + 2 + 5 {
            common::next(&mut queue).await.drop().submit().unwrap();
        }
    };
    soon("all to be sent", futures::future::join3(decide, send, send_other)).await;
}

async fn clones_of_the_sink_close_alone() {
    let mut injector = Injector::builder().bind().unwrap();
    let mut other = injector.clone();
    let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
    let packet = Bytes::from(datagram(Ipv4Addr::LOCALHOST.into(), (Ipv4Addr::LOCALHOST, PORT).into(), b"text"));
    SinkExt::close(&mut injector).await.unwrap();
    assert_eq!(SinkExt::send(&mut injector, packet.clone()).await.unwrap_err().kind(), ErrorKind::Closed);
    SinkExt::send(&mut other, packet.clone()).await.unwrap();
    // An error concerns one packet.
    let invalid = packet.slice(..20);
    assert_eq!(SinkExt::send(&mut other, invalid).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    SinkExt::send(&mut other, packet).await.unwrap();
    for _ in 0..2 {
        assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), 4);
    }
}

fn packets_are_sent_after_the_runtime_has_ended() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let injector = runtime.block_on(async { Injector::builder().bind().unwrap() });
    drop(runtime);
    let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
    let packet = datagram(Ipv4Addr::LOCALHOST.into(), (Ipv4Addr::LOCALHOST, PORT).into(), b"text");
    injector.try_send(&packet).unwrap();
    futures::executor::block_on(injector.send(&packet)).unwrap();
    for _ in 0..2 {
        assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), 4);
    }
    // Without an I/O driver.
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let bind = || runtime.block_on(async { Injector::builder().bind() });
    assert_eq!(common::without_panic_messages(bind).unwrap_err().kind(), ErrorKind::NoRuntime);
}
