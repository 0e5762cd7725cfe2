//! Packets of a bridge: VLAN tags, link-layer headers, and protocols other than IP.
//!
//! In the bridge family, only the `queue` expression of nf_tables sends packets to a queue; the
//! kernel refuses the xtables target. On a kernel without the expression (`NFT_QUEUE`), these tests
//! check only that refusal.

use std::{
    io::ErrorKind as IoErrorKind,
    net::{Ipv4Addr, TcpListener, TcpStream},
};

use etherparse::PacketBuilder;
use nix::net::if_::if_nametoindex;
use tokio_nfqueue::{Action, ErrorKind, Family, Packet, Queue, Verdict, Vlan};

use crate::{
    common::{
        self, Hook, Protocol, Random, Rule, divert, next, number,
        rules::{self, NetfilterProtoFamily, Place},
        soon,
    },
    support::{self, Bridge, End, Frame, FrameSocket},
};

tests![
    one each_hook_reports_its_ports,
    both vlan_tags_are_reported_and_kept,
    one vlan_tags_are_replaced,
    one a_tag_is_added_to_an_untagged_frame,
    one the_outer_of_two_tags_is_reported_and_replaced,
    one the_link_layer_header_is_replaced,
    one a_link_layer_header_of_another_length_is_refused,
    one arp_packets_are_queued,
    one ipv6_packets_are_queued,
    one a_dropped_frame_does_not_arrive,
    both verdicts_in_any_order_set_the_right_tags,
    one payloads_are_replaced,
    one a_payload_longer_than_the_mtu_of_the_port_is_lost,
    one an_unsupported_payload_is_refused_and_gets_the_default_action,
    one all_changes_work_in_one_verdict,
    one a_repeated_packet_keeps_its_changes,
    one metadata_mode_reports_the_tag,
    both super_packets_are_not_segmented,
    one br_netfilter_reports_the_ports_of_a_bridge,
];

/// Set to 1 if the kernel has `NFT_QUEUE`, so that these tests must not be skipped.
const EXPECTED: &str = "TOKIO_NFQUEUE_EXPECT_BRIDGE";

const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TO: [u8; 6] = [2, 0, 0, 0, 0, 2];
const IPV4: u16 = 0x0800;
const CUSTOMER: u16 = 0x8100;
const SERVICE: u16 = 0x88a8;

/// A bridge, and a queue for each of these hooks, numbered from 0, which gets all packets of the
/// hook. `None` on a kernel without `NFT_QUEUE`, after a check that it refuses the rule.
fn bridge(hooks: &[Hook]) -> Option<(Bridge, Vec<Queue>)> {
    let bridge = Bridge::new();
    let queues = (0..hooks.len() as u16).map(|number| common::bind_now(Queue::builder(number))).collect();
    for (number, hook) in (0..).zip(hooks) {
        // NF_BR_PRI_FILTER_BRIDGED
        let place = Place { hook: number_of(*hook), priority: -200 };
        match rules::install_queue(NetfilterProtoFamily::Bridge, &format!("queue{number}"), place, number) {
            Ok(()) => {}
            Err(error) => {
                assert!(std::env::var_os(EXPECTED).is_none_or(|value| value != "1"), "{EXPECTED}=1, but {error}");
                assert_eq!(error.kind(), IoErrorKind::NotFound, "{error}");
                untried("no way from the bridge family to a queue");
                return None;
            }
        }
    }
    Some((bridge, queues))
}

/// As [`bridge`], with one queue for all packets that cross the bridge.
fn crossing() -> Option<(Bridge, Queue)> {
    let (bridge, mut queues) = bridge(&[Hook::Forward])?;
    Some((bridge, queues.remove(0)))
}

fn untried(reason: &str) {
    eprintln!("{}: not tried, for this kernel has {reason}", std::thread::current().name().unwrap_or("a test"));
}

/// NF_BR_*, which are numbered as NF_INET_*.
fn number_of(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        _ => 4,
    }
}

fn index(name: &str) -> u32 {
    if_nametoindex(name).unwrap()
}

fn frame(tag: Option<(u16, u16)>, ether_type: u16, body: &[u8]) -> Frame {
    Frame { tag, bytes: [&TO[..], &FROM, &ether_type.to_be_bytes(), body].concat() }
}

/// A packet of `length` bytes (at least 32) that carries a number.
fn udp(number: u32, length: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let data = [&vec![0x55; length - 32][..], &number.to_be_bytes()].concat();
    PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1000, 2000).write(&mut packet, &data).unwrap();
    packet
}

fn udp_frame(tag: Option<(u16, u16)>, number: u32) -> Frame {
    frame(tag, IPV4, &udp(number, 100))
}

fn vlan((protocol, control): (u16, u16)) -> Vlan {
    Vlan { protocol, control }
}

async fn give(verdict: Verdict) {
    soon("the reply of the kernel", verdict.confirm()).await.unwrap();
}

/// The next frame. It may still be on its way through the far interface.
async fn arrival(socket: &FrameSocket) -> Frame {
    let mut frame = None;
    common::eventually("a frame", || {
        frame = socket.arrived();
        frame.is_some()
    })
    .await;
    frame.unwrap()
}

/// Sends a frame across the bridge, decides it, and expects the frame `come` at the other end.
async fn cross(bridge: &Bridge, queue: &mut Queue, sent: &Frame, decide: impl FnOnce(Packet) -> Verdict, come: &Frame) {
    bridge.ends[0].socket.send(sent);
    let packet = next(queue).await;
    give(decide(packet)).await;
    assert_eq!(arrival(&bridge.ends[1].socket).await, *come);
}

async fn each_hook_reports_its_ports() {
    let hooks = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    let Some((bridge, mut queues)) = bridge(&hooks) else { return };
    let [near, far] = [0, 1].map(|end| Some((index(&bridge.name), index(&bridge.ends[end].port))));
    let own = FrameSocket::open(&bridge.name);
    let tag = Some((CUSTOMER, 5));

    let sent = udp_frame(tag, 1);
    bridge.ends[0].socket.send(&sent);
    pass(&mut queues, Hook::Prerouting, near, None, &sent).await;
    pass(&mut queues, Hook::Forward, near, far, &sent).await;
    pass(&mut queues, Hook::Postrouting, None, far, &sent).await;
    assert_eq!(arrival(&bridge.ends[1].socket).await, sent);

    let mut to_the_bridge = udp_frame(tag, 2);
    to_the_bridge.bytes[..6].copy_from_slice(&own.address());
    bridge.ends[0].socket.send(&to_the_bridge);
    pass(&mut queues, Hook::Prerouting, near, None, &to_the_bridge).await;
    pass(&mut queues, Hook::Input, near, None, &to_the_bridge).await;
    assert_eq!(arrival(&own).await, to_the_bridge);

    // Sent to the port from which the bridge has learnt this address.
    let mut from_the_bridge = udp_frame(None, 3);
    from_the_bridge.bytes[..6].copy_from_slice(&FROM);
    from_the_bridge.bytes[6..12].copy_from_slice(&own.address());
    own.send(&from_the_bridge);
    pass(&mut queues, Hook::Output, None, near, &from_the_bridge).await;
    pass(&mut queues, Hook::Postrouting, None, near, &from_the_bridge).await;
    assert_eq!(arrival(&bridge.ends[0].socket).await, from_the_bridge);
    assert_eq!(bridge.ends[1].socket.arrived(), None);
}

/// Checks the packet at a hook and accepts it. `from` and `to` are bridge and port.
async fn pass(queues: &mut [Queue], hook: Hook, from: Option<(u32, u32)>, to: Option<(u32, u32)>, frame: &Frame) {
    let queue = &mut queues[number_of(hook) as usize];
    let packet = next(queue).await;
    assert_eq!((packet.hook(), packet.family(), packet.hw_protocol()), (hook, Family::Bridge, IPV4));
    assert_eq!(packet.interface_in().zip(packet.physical_in()), from, "{hook:?}");
    assert_eq!(packet.interface_out().zip(packet.physical_out()), to, "{hook:?}");
    assert_eq!(packet.vlan(), frame.tag.map(vlan), "{hook:?}");
    assert_eq!(packet.layer2_header(), Some(&frame.bytes[..14]), "{hook:?}");
    assert_eq!(packet.payload(), &frame.bytes[14..], "{hook:?}");
    // The kernel sends it only with an input interface.
    assert_eq!(packet.hardware_address(), from.map(|_| &frame.bytes[6..12]), "{hook:?}");
    give(packet.accept()).await;
}

async fn vlan_tags_are_reported_and_kept() {
    let Some((bridge, mut queue)) = crossing() else { return };
    // Priority 5 and drop eligible; a priority without a VLAN; neither of both.
    let tags = [(CUSTOMER, 5), (CUSTOMER, 0xb123), (CUSTOMER, 0xe000), (CUSTOMER, 0), (SERVICE, 0xffff)];
    for (number, tag) in (0..).zip(tags) {
        let sent = udp_frame(Some(tag), number);
        let look = |packet: Packet| {
            assert_eq!(packet.vlan(), Some(vlan(tag)));
            assert_eq!((packet.hw_protocol(), packet.payload()), (IPV4, &sent.bytes[14..]));
            assert_eq!(packet.addresses().unwrap().0, Ipv4Addr::new(10, 0, 0, 1));
            packet.accept()
        };
        cross(&bridge, &mut queue, &sent, look, &sent).await;
    }
}

async fn vlan_tags_are_replaced() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let changes = [
        ((CUSTOMER, 5), (CUSTOMER, 6)),
        ((CUSTOMER, 0x2005), (CUSTOMER, 0xf005)),
        ((CUSTOMER, 5), (SERVICE, 5)),
        ((SERVICE, 7), (CUSTOMER, 0)),
    ];
    for (number, (old, new)) in (0..).zip(changes) {
        let sent = udp_frame(Some(old), number);
        let come = Frame { tag: Some(new), ..sent.clone() };
        cross(&bridge, &mut queue, &sent, |packet| packet.accept().vlan(vlan(new)), &come).await;
    }
}

async fn a_tag_is_added_to_an_untagged_frame() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let sent = udp_frame(None, 1);
    let look = |packet: Packet| {
        assert_eq!(packet.vlan(), None);
        packet.accept()
    };
    cross(&bridge, &mut queue, &sent, look, &sent).await;
    for tag in [(CUSTOMER, 0x6009), (SERVICE, 9)] {
        let come = Frame { tag: Some(tag), ..sent.clone() };
        cross(&bridge, &mut queue, &sent, |packet| packet.accept().vlan(vlan(tag)), &come).await;
    }
}

async fn the_outer_of_two_tags_is_reported_and_replaced() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let inner = [0x30, 7, 8, 0];
    let sent = frame(Some((SERVICE, 5)), CUSTOMER, &[&inner[..], &udp(1, 100)].concat());
    let look = |packet: Packet| {
        assert_eq!((packet.vlan(), packet.hw_protocol()), (Some(vlan((SERVICE, 5))), CUSTOMER));
        // The payload begins with the inner tag.
        assert_eq!((packet.layer2_header(), packet.payload()), (Some(&sent.bytes[..14]), &sent.bytes[14..]));
        assert_eq!(packet.addresses(), None);
        packet.accept().vlan(vlan((SERVICE, 6)))
    };
    let come = Frame { tag: Some((SERVICE, 6)), ..sent.clone() };
    cross(&bridge, &mut queue, &sent, look, &come).await;
}

async fn the_link_layer_header_is_replaced() {
    let Some((bridge, mut queue)) = crossing() else { return };
    // Destination, source, and an EtherType for local experiments.
    let header = [2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 8, 0x88, 0xb5];
    for tag in [None, Some((CUSTOMER, 5))] {
        let sent = udp_frame(tag, 1);
        let mut come = sent.clone();
        come.bytes[..14].copy_from_slice(&header);
        cross(&bridge, &mut queue, &sent, |packet| packet.accept().layer2_header(header.to_vec()), &come).await;
    }
}

async fn a_link_layer_header_of_another_length_is_refused() {
    let Some((bridge, mut queue)) = crossing() else { return };
    for length in [1, 13, 15, 18] {
        bridge.ends[0].socket.send(&udp_frame(Some((CUSTOMER, 5)), 1));
        let packet = next(&mut queue).await;
        let id = packet.id();
        let verdict = packet.accept().layer2_header(vec![2; length]);
        let error = soon("the reply", verdict.confirm()).await.unwrap_err();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::InvalidInput, Some(id)), "{error}");
        // The packet gets the default action.
        common::eventually("it is dropped", || common::account(0).unwrap().waiting == 0).await;
    }
    let sent = udp_frame(None, 2);
    cross(&bridge, &mut queue, &sent, Packet::accept, &sent).await;
}

async fn arp_packets_are_queued() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let addresses = [&FROM[..], &[10, 0, 0, 1], &[0; 6], &[10, 0, 0, 2]].concat();
    let sent = frame(Some((CUSTOMER, 5)), 0x0806, &[&[0, 1, 8, 0, 6, 4, 0, 1][..], &addresses].concat());
    let look = |packet: Packet| {
        assert_eq!((packet.family(), packet.hw_protocol()), (Family::Bridge, 0x0806));
        assert_eq!((packet.payload(), packet.addresses()), (&sent.bytes[14..], None));
        packet.accept()
    };
    cross(&bridge, &mut queue, &sent, look, &sent).await;
    if common::replaces_bridge_payloads() {
        // The request is replaced by a reply.
        let mut come = sent.clone();
        come.bytes[14 + 7] = 2;
        let body = come.bytes[14..].to_vec();
        cross(&bridge, &mut queue, &sent, |packet| packet.accept().payload(body), &come).await;
    }
}

async fn ipv6_packets_are_queued() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let (source, destination) = ([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0xfd; 16]);
    let mut body = Vec::new();
    PacketBuilder::ipv6(source, destination, 64).udp(1000, 2000).write(&mut body, b"over a bridge").unwrap();
    let sent = frame(Some((CUSTOMER, 5)), 0x86dd, &body);
    let look = |packet: Packet| {
        assert_eq!((packet.family(), packet.hw_protocol()), (Family::Bridge, 0x86dd));
        assert_eq!((packet.payload(), packet.addresses()), (&body[..], Some((source.into(), destination.into()))));
        packet.accept().vlan(vlan((CUSTOMER, 6)))
    };
    let come = Frame { tag: Some((CUSTOMER, 6)), ..sent.clone() };
    cross(&bridge, &mut queue, &sent, look, &come).await;
}

async fn a_dropped_frame_does_not_arrive() {
    let Some((bridge, mut queue)) = crossing() else { return };
    bridge.ends[0].socket.send(&udp_frame(Some((CUSTOMER, 5)), 1));
    let packet = next(&mut queue).await;
    // A change does not alter that.
    give(packet.drop().vlan(vlan((CUSTOMER, 6)))).await;
    let sent = udp_frame(Some((CUSTOMER, 5)), 2);
    cross(&bridge, &mut queue, &sent, Packet::accept, &sent).await;
}

async fn verdicts_in_any_order_set_the_right_tags() {
    const COUNT: u16 = 64;
    let Some((bridge, mut queue)) = crossing() else { return };
    let mut held = Vec::new();
    for number in 0..COUNT {
        bridge.ends[0].socket.send(&udp_frame(Some((CUSTOMER, number)), number.into()));
        held.push(next(&mut queue).await);
    }
    Random::new(7).shuffle(&mut held);
    for packet in held {
        let number = number(&packet) as u16;
        assert_eq!(packet.vlan(), Some(vlan((CUSTOMER, number))));
        // A third is dropped, a third is accepted unchanged.
        let verdict = match number % 3 {
            0 => packet.drop(),
            1 => packet.accept(),
            _ => packet.accept().vlan(vlan((SERVICE, 1000 + number))),
        };
        verdict.submit().unwrap();
    }
    queue.sink().flush().await;
    let mut arrived = Vec::new();
    for _ in (0..COUNT).filter(|number| number % 3 != 0) {
        arrived.push(arrival(&bridge.ends[1].socket).await);
    }
    arrived.sort_by(|a, b| a.bytes.cmp(&b.bytes));
    let mut expected: Vec<Frame> = (0..COUNT)
        .filter_map(|number| match number % 3 {
            0 => None,
            1 => Some(udp_frame(Some((CUSTOMER, number)), number.into())),
            _ => Some(udp_frame(Some((SERVICE, 1000 + number)), number.into())),
        })
        .collect();
    expected.sort_by(|a, b| a.bytes.cmp(&b.bytes));
    assert_eq!(arrived, expected);
    assert_eq!(bridge.ends[1].socket.arrived(), None);
}

/// Prints a message if payloads are not replaced here.
fn replaces_payloads() -> bool {
    let replaces = common::replaces_bridge_payloads();
    if !replaces {
        untried("no way to replace the payload of a packet of a bridge here");
    }
    replaces
}

async fn payloads_are_replaced() {
    let Some((bridge, mut queue)) = crossing() else { return };
    if !replaces_payloads() {
        return;
    }
    // A tagged packet is not shortened: if the tag arrives within the bytes of the frame, its
    // transport header may be 4 bytes before its network header (`skb_vlan_untag`), and
    // `nfqnl_mangle` takes that for a minimum length of 4 GiB. Seen on 6.1.176.
    for (tag, lengths) in [(None, &[100, 200, 1500, 40][..]), (Some((CUSTOMER, 5)), &[100, 200, 1500])] {
        let sent = udp_frame(tag, 1);
        for &length in lengths {
            let come = frame(tag, IPV4, &udp(2, length));
            let replace = |packet: Packet| packet.accept().payload(udp(2, length));
            cross(&bridge, &mut queue, &sent, replace, &come).await;
        }
    }
}

async fn a_payload_longer_than_the_mtu_of_the_port_is_lost() {
    let Some((bridge, mut queue)) = crossing() else { return };
    if !replaces_payloads() {
        return;
    }
    // With a tag, so that `br_netfilter`, which would fragment it, ignores the packet.
    let tag = Some((CUSTOMER, 5));
    bridge.ends[0].socket.send(&udp_frame(tag, 1));
    let packet = next(&mut queue).await;
    // The kernel reports no error. It allows four bytes more than the MTU, with a tag or without.
    give(packet.accept().payload(udp(1, 1505))).await;
    let (sent, come) = (udp_frame(tag, 2), frame(tag, IPV4, &udp(2, 1504)));
    cross(&bridge, &mut queue, &sent, |packet| packet.accept().payload(udp(2, 1504)), &come).await;
}

/// The kernel would drop the packet and acknowledge the verdict, so this crate refuses the verdict.
async fn an_unsupported_payload_is_refused_and_gets_the_default_action() {
    if common::replaces_bridge_payloads() {
        return untried("a way to replace the payload of a packet of a bridge");
    }
    let Some((bridge, mut queue)) = crossing() else { return };
    for action in [Action::Accept, Action::Drop] {
        drop(queue);
        common::freed(0).await;
        queue = Queue::builder(0).on_unanswered(action).bind().await.unwrap();
        let sent = [
            udp_frame(None, 1),
            udp_frame(Some((CUSTOMER, 5)), 2),
            frame(None, 0x0806, &[1; 28]),
            frame(None, 0x88b5, &[1; 50]),
        ];
        for (index, sent) in sent.iter().enumerate() {
            bridge.ends[0].socket.send(sent);
            let packet = next(&mut queue).await;
            let (id, payload) = (packet.id(), packet.payload().to_vec());
            // Even the unchanged bytes are refused, and then the other changes are not made either.
            let verdict = packet.accept().payload(payload).vlan(vlan((SERVICE, 6)));
            let error = if index % 2 == 0 {
                verdict.submit().unwrap();
                soon("the report", queue.sink().refusals().recv()).await.unwrap()
            } else {
                soon("the refusal", verdict.confirm()).await.unwrap_err()
            };
            assert_eq!((error.kind(), error.packet_id()), (ErrorKind::Unsupported, Some(id)), "{error}");
            if action == Action::Accept {
                assert_eq!(arrival(&bridge.ends[1].socket).await, *sent);
            }
        }
        queue.sink().flush().await;
        assert_eq!(bridge.ends[1].socket.arrived(), None);
        assert_eq!((queue.stats().decided.unanswered, queue.stats().held.in_flight), (sent.len() as u64, 0));
        // The queue still works.
        let sent = udp_frame(None, 3);
        cross(&bridge, &mut queue, &sent, Packet::accept, &sent).await;
    }
}

async fn all_changes_work_in_one_verdict() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let mut second = Queue::builder(1).bind().await.unwrap();
    let replaces = common::replaces_bridge_payloads();
    let payload = if replaces { udp(2, 300) } else { udp(1, 100) };
    bridge.ends[0].socket.send(&udp_frame(Some((CUSTOMER, 5)), 1));
    let packet = next(&mut queue).await;
    let mut come = frame(Some((SERVICE, 0x7006)), IPV4, &payload);
    come.bytes[5] = 9;
    let mut verdict = packet.requeue(1).mark(3).vlan(vlan((SERVICE, 0x7006))).layer2_header(come.bytes[..14].to_vec());
    if replaces {
        verdict = verdict.payload(payload);
    }
    give(verdict).await;
    let packet = next(&mut second).await;
    assert_eq!((packet.mark(), packet.vlan()), (3, Some(vlan((SERVICE, 0x7006)))));
    assert_eq!((packet.layer2_header(), packet.payload()), (Some(&come.bytes[..14]), &come.bytes[14..]));
    give(packet.accept()).await;
    assert_eq!(arrival(&bridge.ends[1].socket).await, come);
}

async fn a_repeated_packet_keeps_its_changes() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let sent = udp_frame(None, 1);
    bridge.ends[0].socket.send(&sent);
    let packet = next(&mut queue).await;
    give(packet.repeat().mark(1).vlan(vlan((CUSTOMER, 5)))).await;
    let packet = next(&mut queue).await;
    assert_eq!((packet.id().get(), packet.mark(), packet.vlan()), (2, 1, Some(vlan((CUSTOMER, 5)))));
    give(packet.accept()).await;
    assert_eq!(arrival(&bridge.ends[1].socket).await, Frame { tag: Some((CUSTOMER, 5)), ..sent });
}

async fn metadata_mode_reports_the_tag() {
    let Some((bridge, queue)) = crossing() else { return };
    drop(queue);
    common::freed(0).await;
    let mut queue = Queue::builder(0).copy_metadata().bind().await.unwrap();
    let sent = udp_frame(Some((CUSTOMER, 5)), 1);
    let look = |packet: Packet| {
        assert_eq!((packet.payload(), packet.vlan()), (&[][..], Some(vlan((CUSTOMER, 5)))));
        assert_eq!(packet.layer2_header(), Some(&sent.bytes[..14]));
        packet.accept().vlan(vlan((CUSTOMER, 6)))
    };
    let come = Frame { tag: Some((CUSTOMER, 6)), ..sent.clone() };
    cross(&bridge, &mut queue, &sent, look, &come).await;
}

async fn super_packets_are_not_segmented() {
    let Some((bridge, mut queue)) = crossing() else { return };
    let addresses = [Ipv4Addr::new(10, 7, 0, 1), Ipv4Addr::new(10, 7, 0, 2)];
    for (end, address) in bridge.ends.iter().zip(addresses) {
        end.namespace.run(|| support::add_address(End::INTERFACE, address.into(), 24));
    }
    let listener = bridge.ends[1].namespace.run(|| TcpListener::bind((addresses[1], 9000)).unwrap());
    let sender = bridge.ends[0].namespace.spawn(move || {
        loop {
            match TcpStream::connect((addresses[1], 9000)) {
                // Its ARP request has waited in the queue for seconds.
                Err(error) if error.kind() == IoErrorKind::HostUnreachable => {}
                stream => return common::send_transfer(stream.unwrap()),
            }
        }
    });
    let receiver = common::receive_transfer(listener);
    let mut longest = 0;
    let serve = async {
        loop {
            let packet = next(&mut queue).await;
            assert!(packet.layer2_header().is_some());
            if packet.is_gso() {
                longest = longest.max(packet.payload().len());
            }
            packet.accept().submit().unwrap();
        }
    };
    tokio::select! {
        () = serve => {}
        () = common::eventually("the transfer", || receiver.is_finished()) => {}
    }
    receiver.join().unwrap();
    sender.join().unwrap();
    assert!(longest > 1500, "{longest}");
}

/// Not the bridge family: `br_netfilter` passes packets that cross a bridge to the rules for IP.
async fn br_netfilter_reports_the_ports_of_a_bridge() {
    let bridge = Bridge::new();
    if std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").ok().as_deref() != Some("1\n") {
        return untried("no br_netfilter at work");
    }
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Forward).protocol(Protocol::Udp).to_queue(0)]);
    let ports = bridge.ends.each_ref().map(|end| Some(index(&end.port)));
    let sent = udp_frame(None, 1);
    let look = |packet: Packet| {
        assert_eq!((packet.hook(), packet.family()), (Hook::Forward, Family::Ipv4));
        assert_eq!(
            (packet.interface_in(), packet.interface_out()),
            (Some(index(&bridge.name)), Some(index(&bridge.name)))
        );
        assert_eq!([packet.physical_in(), packet.physical_out()], ports);
        assert_eq!((packet.vlan(), packet.layer2_header()), (None, None));
        // Outside of the bridge family the kernel ignores these changes.
        packet.accept().vlan(vlan((CUSTOMER, 5))).layer2_header(vec![1; 14])
    };
    cross(&bridge, &mut queue, &sent, look, &sent).await;
}
