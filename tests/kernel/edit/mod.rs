//! Edited packets between two namespaces: the kernel of the receiver verifies them.
//!
//! Every test runs with the offloads of the interfaces on and off, with and without super-packets,
//! over IPv4 and IPv6.

pub(crate) mod arrival;
mod replies;
mod route;
mod setup;
mod tcp;
mod udp;

use std::{
    io::IoSliceMut,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use libtest_mimic::Trial;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, recvmsg,
    sendto, setsockopt, socket, sockopt,
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use tokio_nfqueue::{ErrorKind, Hook, Protocol, Queue, Rule};

use self::setup::{Case, Editor, PORT, Path, each_case};
use crate::common;

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    tests.extend(each_case("a_udp_payload_may_change_its_length", udp::other_length));
    tests.extend(each_case("udp_and_its_replies_can_be_redirected", udp::redirected));
    tests.extend(each_case("udp_super_packets_can_be_edited", udp::super_packets));
    tests.extend(each_case("forwarded_udp_super_packets_can_be_edited", udp::forwarded));
    tests.extend(each_case("udp_fragments_can_be_redirected", udp::fragments));
    tests.extend(each_case("udp_with_a_source_route_can_be_edited", udp::routed));
    tests.extend(each_case("udp_with_a_wrong_checksum_is_not_delivered", udp::wrong_checksum));
    tests.extend(each_case("tcp_can_be_edited_at_the_output_hook", tcp::substituted_out));
    tests.extend(each_case("tcp_can_be_edited_at_the_input_hook", tcp::substituted_in));
    tests.extend(each_case("tcp_can_be_redirected", tcp::redirected));
    tests.extend(each_case("tcp_with_a_source_route_can_be_edited", tcp::routed));
    tests.extend(each_case("an_echo_payload_can_be_replaced", echo));
    tests.extend(each_case("ttl_and_tos_can_be_set", ttl_and_tos));
    tests.extend(each_case("a_truncated_packet_cannot_be_edited", in_part));
    tests.extend(each_case("two_queues_take_tcp_with_gso_and_udp_without", udp::beside_tcp_with_gso));
    tests.extend(each_case("a_verdict_can_reply_to_a_query", replies::query_by_verdict));
    tests.extend(each_case("an_injector_can_reply_to_a_query", replies::query_by_injector));
    tests.extend(each_case("an_echo_request_can_be_replied_to", replies::echo));
    tests.extend(each_case("a_reset_refuses_a_connection", replies::connection_refused));
    tests.extend(each_case("a_reset_ends_a_connection", replies::connection_ended));
    tests.extend(each_case("an_icmp_error_reaches_the_sender", replies::unreachable));
    tests.extend(each_case("only_the_first_fragment_has_ports", replies::first_fragment));
    for v6 in [false, true] {
        let name = |name: &str| common::test_name(module_path!(), &format!("{name}: IPv{}", if v6 { 6 } else { 4 }));
        for (host, hook) in arrival::PLACES {
            let name = name(&format!("replies_arrive_as_documented, {host:?} {hook:?}"));
            tests.extend(common::sync(&name, move || arrival::arrive(v6, (host, hook))));
        }
        let resets = move || arrival::resets_and_stateful_rules(v6);
        tests.extend(common::multi(&name("a_stateful_rule_drops_only_resets_of_unknown_connections"), resets));
        let errors = move || arrival::errors_and_stateful_rules(v6);
        tests.extend(common::multi(&name("a_stateful_rule_drops_only_icmp_errors_of_unknown_connections"), errors));
    }
    tests
}

/// The kernel replies with the data that it has received, if the checksum was correct.
async fn echo(case: Case) {
    let path = Path::new(case);
    let (protocol, request, reply) = if case.v6 { (Protocol::Icmpv6, 128, 129) } else { (Protocol::Icmp, 8, 0) };
    let new = b"what the neighbour gets to see, of an odd length";
    let editor = Editor::start(case, [Rule::new(Hook::Output).protocol(protocol)], move |edit| {
        // Other ICMPv6 messages are needed by the network.
        if edit.view().ip_payload().first() == Some(&request) { edit.replace_payload(new) } else { Ok(()) }
    });
    let socket = raw_icmp(case);
    for sequence in 0..10 {
        // The kernel computes the checksum for IPv6, the edit computes it for IPv4.
        let mut message = vec![request, 0, 0, 0, 0x12, 0x34, 0, sequence];
        message.extend_from_slice(b"as it was");
        let to = SockaddrStorage::from(std::net::SocketAddr::new(path.far, 0));
        sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty()).unwrap();
        message[0] = reply;
        loop {
            let mut buffer = [0; 256];
            let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("the reply");
            // IPv4 raw sockets receive the IP header.
            let received = &buffer[if case.v6 { 0 } else { 20 }..length];
            if received[0] == reply && received[4..8] == message[4..8] {
                assert_eq!(&received[8..], new);
                break;
            }
        }
    }
    editor.stop().await;
    path.assert_checksums();
}

fn raw_icmp(case: Case) -> OwnedFd {
    let (family, protocol) = match case.v6 {
        false => (AddressFamily::Inet, SockProtocol::Icmp),
        true => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
    set_socket_timeout(&socket, Timeout::Recv, Some(common::PATIENCE)).unwrap();
    socket
}

async fn ttl_and_tos(case: Case) {
    let path = Path::new(case);
    let receiver = path.far_udp(PORT);
    if case.v6 {
        setsockopt(&receiver, sockopt::Ipv6RecvHopLimit, &true).unwrap();
        setsockopt(&receiver, sockopt::Ipv6RecvTClass, &true).unwrap();
    } else {
        setsockopt(&receiver, sockopt::Ipv4RecvTtl, &true).unwrap();
        setsockopt(&receiver, sockopt::IpRecvTos, &true).unwrap();
    }
    let editor = Editor::start(case, [Path::udp_to(Hook::Output, PORT)], |edit| {
        edit.set_ttl(17);
        edit.set_tos(0xb9);
        Ok(())
    });
    path.near_udp().send_to(b"hello", (path.far, PORT)).unwrap();

    let mut datagram = [0; 64];
    let mut parts = [IoSliceMut::new(&mut datagram)];
    let mut space = nix::cmsg_space!(i32, i32);
    let message =
        recvmsg::<SockaddrStorage>(receiver.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
    let (mut ttl, mut tos) = (None, None);
    for control in message.cmsgs().unwrap() {
        match control {
            ControlMessageOwned::Ipv4Ttl(value) | ControlMessageOwned::Ipv6HopLimit(value) => ttl = Some(value),
            ControlMessageOwned::Ipv4Tos(value) => tos = Some(value.into()),
            ControlMessageOwned::Ipv6TClass(value) => tos = Some(value),
            _ => {}
        }
    }
    assert_eq!((ttl, tos), (Some(17), Some(0xb9)));
    editor.stop().await;
    path.assert_checksums();
}

async fn in_part(case: Case) {
    let path = Path::new(case);
    let mut queue = Queue::builder(0).gso(case.gso).copy_range(60).bind().await.unwrap();
    let _divert = common::divert([Path::udp_to(Hook::Output, PORT).to_queue(0)]);
    path.near_udp().send_to(&[7; 500], (path.far, PORT)).unwrap();
    let packet = common::next(&mut queue).await;
    let error = packet.edit().unwrap_err();
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::InvalidInput, Some(packet.id())));
    assert!(error.to_string().contains("only 60 of its 5"), "{error}");
    let view = packet.view().unwrap();
    assert_eq!((view.destination_address(), view.destination_port()), (path.far, Some(PORT)));
    packet.drop().submit().unwrap();
}

/// The second address of the far side.
fn second(far: IpAddr) -> IpAddr {
    match far {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            [a, b, c, 77].into()
        }
        IpAddr::V6(address) => {
            let mut segments = address.segments();
            segments[7] = 0x77;
            segments.into()
        }
    }
}
