//! Which packets come to a queue, and what becomes of them without the queue or the rules.

use std::net::{Ipv4Addr, UdpSocket};

use netlink_packet_core::{DefaultNla, Emitable};
use tokio_nfqueue::{Hook, Packet, Protocol, Queue, Rule, divert::Match};

use crate::{
    common::{
        self, PORT, Traffic, divert, hold, next,
        rules::{self, Expressions, NetfilterProtoFamily, Place},
        soon, udp_in,
    },
    support::{self, VethOptions},
};

tests![
    one a_rule_for_everything_queues_neighbour_discovery_and_not_arp,
    one a_rule_for_everything_queues_the_packets_of_the_program_itself,
    one without_a_divert_packets_pass_and_without_the_queue_of_another_rule_they_are_dropped,
    one removing_helpers_or_rules_that_set_zones_drops_queued_packets,
    one all_packets_of_a_burst_are_the_first_of_their_connection,
];

const MARK: u32 = 0x40;
/// Not root.
const OTHER_USER: u32 = 1000;

fn is_neighbour_solicitation(packet: &Packet) -> bool {
    let payload = packet.payload();
    packet.hw_protocol() == 0x86dd && payload.get(6) == Some(&58) && payload.get(40) == Some(&135)
}

async fn a_rule_for_everything_queues_neighbour_discovery_and_not_arp() {
    let exceptions = [None, Some(Match::user(OTHER_USER)), Some(Match::protocol(Protocol::Icmpv6))];
    for (index, without) in (0..).zip(exceptions) {
        let peer = support::veth_with(&VethOptions { index, ..VethOptions::default() });
        let mut queue = Queue::builder(0).bind().await.unwrap();
        let everything = Rule::new(Hook::Output);
        let rule = without.iter().fold(everything, |rule, condition| rule.unless(condition.clone())).to_queue(0);
        let divert = divert([rule]);
        let receivers =
            [peer.run(|| support::udp((peer.far_v4, PORT))), peer.run(|| support::udp((peer.far_v6, PORT)))];
        for receiver in receivers {
            let to = receiver.local_addr().unwrap();
            // Neither knows the other's link-layer address.
            support::udp((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).send_to(b"first", to).unwrap();
            let mut solicitations = 0;
            let serve = async {
                loop {
                    let packet = next(&mut queue).await;
                    solicitations += u32::from(is_neighbour_solicitation(&packet));
                    packet.accept().submit().unwrap();
                }
            };
            let arrived = tokio::task::spawn_blocking(move || receiver.recv(&mut [0; 8]).unwrap());
            tokio::select! {
                () = serve => {}
                arrived = arrived => assert_eq!(arrived.unwrap(), 5),
            }
            // A packet of the kernel has no user, so it meets no condition on the user.
            let expected = to.is_ipv6() && without.is_none();
            assert_eq!(solicitations > 0, expected, "{to}, without {without:?}");
        }
        queue.close().await.unwrap();
        support::drop_now(divert);
    }
}

/// A socket that belongs to this user.
fn udp_of(user: u32) -> UdpSocket {
    std::thread::spawn(move || {
        // Of the thread alone.
        let user = rustix::thread::Uid::from_raw(user);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        support::udp((Ipv4Addr::LOCALHOST, 0))
    })
    .join()
    .unwrap()
}

async fn a_rule_for_everything_queues_the_packets_of_the_program_itself() {
    let rule = || Rule::new(Hook::Output).protocol(Protocol::Udp);
    let own = nix::unistd::geteuid().as_raw();
    let cases = [
        (rule(), support::udp((Ipv4Addr::LOCALHOST, 0)), true),
        (rule().unless_mark(MARK, MARK), support::udp_marked((Ipv4Addr::LOCALHOST, 0), MARK), false),
        (rule().unless(Match::user(own)), support::udp((Ipv4Addr::LOCALHOST, 0)), false),
    ];
    let resolver = support::udp((Ipv4Addr::LOCALHOST, 0));
    for (rule, question, waits) in cases {
        let mut queue = Queue::builder(0).bind().await.unwrap();
        let divert = divert([rule.to_queue(0)]);
        // A policy that asks before it decides: no other thread decides the question in the
        // meantime.
        question.send_to(b"name?", resolver.local_addr().unwrap()).unwrap();
        if waits {
            let packet = next(&mut queue).await;
            assert_eq!(&packet.payload()[28..], b"name?");
            packet.accept().submit().unwrap();
            queue.sink().flush().await;
        }
        assert!(queue.try_recv().is_err());
        assert_eq!(resolver.recv(&mut [0; 8]).unwrap(), 5);
        queue.close().await.unwrap();
        support::drop_now(divert);
    }
    // Packets of other users do come to the queue.
    if common::outer_id("uid_map") != 0 || !nix::unistd::geteuid().is_root() {
        return;
    }
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([rule().unless(Match::user(own)).to_queue(0)]);
    udp_of(OTHER_USER).send_to(b"query", resolver.local_addr().unwrap()).unwrap();
    next(&mut queue).await.accept().submit().unwrap();
}

async fn without_a_divert_packets_pass_and_without_the_queue_of_another_rule_they_are_dropped() {
    let traffic = Traffic::new(4);
    // The kernel does the same when the process is killed.
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let installed = divert([udp_in().to_queue(0)]);
    drop(hold(&mut queue, &traffic, [0]).await);
    support::drop_now(installed);
    traffic.send([1]);
    traffic.expect([1]).await;

    let place = Place { hook: Hook::Input.number().into(), priority: 0 };
    rules::install_queue(NetfilterProtoFamily::Inet, "permanent", place, 0).unwrap();
    let packet = hold(&mut queue, &traffic, [2]).await.remove(0);
    packet.accept().submit().unwrap();
    traffic.expect([2]).await;
    drop(queue);
    common::freed(0).await;
    traffic.send([3]);
    traffic.expect_nothing();
}

/// Nothing of what is removed is a base chain, or refers to the packets.
async fn removing_helpers_or_rules_that_set_zones_drops_queued_packets() {
    const FAMILY: NetfilterProtoFamily = NetfilterProtoFamily::IPv4;
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let string = |kind, text: &str| DefaultNla::new(kind, [text.as_bytes(), b"\0"].concat());
    // immediate: 1 to register 1; ct: register 1 to ZONE
    let zone = [
        ("immediate", vec![number(1, 1), nested(2, &[DefaultNla::new(1, vec![1, 0])])]),
        ("ct", vec![number(2, 17), number(4, 1)]),
    ];
    let zone = zone.map(|(name, attributes)| Expressions::Other { expression_type: name.to_owned(), attributes });
    // NFTA_OBJ_TABLE, _NAME, _TYPE: NFT_OBJECT_CT_HELPER
    let helper = vec![string(1, "helper"), string(2, "ftp"), number(3, 3)];
    // NFTA_OBJ_DATA: NFTA_CT_HELPER_NAME, NFTA_CT_HELPER_L4PROTO
    let data = nested(4, &[string(1, "ftp"), DefaultNla::new(3, vec![6])]);
    let object = helper.iter().cloned().chain([data]).collect();
    rules::install(FAMILY, "plain", None, Vec::new()).unwrap();
    rules::install(FAMILY, "zone", None, zone.to_vec()).unwrap();
    rules::install_object(FAMILY, "helper", object).unwrap();

    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([udp_in().to_queue(0)]);
    let traffic = Traffic::new(3);
    let cases = [("a plain rule", false), ("a rule that sets a zone", true), ("a helper", true)];
    for (number, (what, drops)) in (0..).zip(cases) {
        let packet = hold(&mut queue, &traffic, [number]).await.remove(0);
        match number {
            0 => rules::remove(FAMILY, "plain").unwrap(),
            1 => rules::remove(FAMILY, "zone").unwrap(),
            _ => rules::remove_object(FAMILY, helper.clone()).unwrap(),
        }
        // The kernel removes what a rule refers to later.
        let flushed = || common::account(0).unwrap().waiting == 0;
        if drops && common::kernel_release() >= (6, 12) {
            common::eventually(what, flushed).await;
        }
        let lost = packet.accept().confirm().await.is_err();
        assert!(lost == drops || common::kernel_release() < (6, 12), "{what}: {lost}");
    }
}

fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    // NLA_F_NESTED
    DefaultNla::new(kind | 0x8000, bytes)
}

async fn all_packets_of_a_burst_are_the_first_of_their_connection() {
    const BURST: u32 = 20;
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let rule = Rule::new(Hook::Output).protocol(Protocol::Udp).first_packets(2).to_queue(0);
    let _divert = divert([rule]);
    let traffic = Traffic::new(100);
    // No packet counts before one of them has been accepted.
    let packets = soon("all of them", hold(&mut queue, &traffic, 0..BURST)).await;
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    queue.sink().flush().await;
    traffic.expect(0..BURST).await;
    // Some kernels have counted one of them by now, some have counted all.
    let mut queued = 0;
    for number in BURST..BURST + 10 {
        traffic.send([number]);
        while let Ok(packet) = queue.try_recv() {
            packet.accept().confirm().await.unwrap();
            queued += 1;
        }
        traffic.expect([number]).await;
    }
    assert!(queued <= 2, "{queued}");
}
