//! UDP: lengths, addresses, ports, super-packets, fragments.

use std::{
    io::Write,
    net::{TcpListener, TcpStream, UdpSocket},
};

use futures::{TryStreamExt, stream};
use nix::sys::socket::{setsockopt, sockopt};
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};
use tokio_nfqueue::{ErrorKind, Hook, Protocol, Queue, Rule};

use super::{
    route, second,
    setup::{Case, Editor, PORT, Path, checksum_errors},
};
use crate::{common, support};

const REPLY_PORT: u16 = 9001;

#[track_caller]
fn expect(socket: &UdpSocket, expected: &[u8]) {
    let mut datagram = vec![0; 65_536];
    let length = socket.recv(&mut datagram).unwrap_or_else(|error| panic!("{} bytes: {error}", expected.len()));
    assert!(datagram[..length] == *expected, "{length} bytes instead of {}, or others", expected.len());
}

/// In both directions: at the output hook with unfinished checksums, and at the input hook.
pub(crate) async fn other_length(case: Case) {
    let path = Path::new(case);
    // With two bytes more, the last one is as long as the MTU allows over IPv6.
    let texts: [&'static [u8]; 6] = [b"", b"x", b"shorter", &[7; 999], &[8; 1400], &[9; 1450]];
    let rules = [Path::udp_to(Hook::Output, PORT), Path::udp_to(Hook::Input, REPLY_PORT)];
    let mut next = texts.into_iter().flat_map(|text| [text, text]);
    let editor = Editor::start(case, rules, move |edit| {
        edit.replace_payload(next.next().expect("no more packets than texts"))?;
        // In parts, and at both ends.
        edit.splice_payload(..0, b"<")?;
        let end = edit.view().payload().map_or(0, <[u8]>::len);
        edit.splice_payload(end.., b"..>")?;
        edit.splice_payload(end..end + 2, b"")
    });
    let near = support::udp((path.near, REPLY_PORT));
    let far = path.far_udp(PORT);
    for text in texts {
        let expected = [b"<", text, b">"].concat();
        near.send_to(b"as it was sent", (path.far, PORT)).unwrap();
        expect(&far, &expected);
        far.send_to(b"as it was replied", (path.near, REPLY_PORT)).unwrap();
        expect(&near, &expected);
    }
    assert_eq!(editor.stop().await.packets, 2 * texts.len() as u32);
    path.assert_checksums();
}

/// The client sends to an address and port without a receiver, and gets replies from there.
pub(crate) async fn redirected(case: Case) {
    let path = Path::new(case);
    let (asked, server_address) = (path.far, second(path.far));
    path.add_address(false, server_address);
    let server = path.peer.run(|| support::udp((server_address, REPLY_PORT)));
    let rules =
        [Path::udp_to(Hook::Output, PORT), Rule::new(Hook::Prerouting).protocol(Protocol::Udp).source_port(REPLY_PORT)];
    let editor = Editor::start(case, rules, move |edit| {
        if edit.view().destination_port() == Some(PORT) {
            edit.set_destination_address(server_address)?;
            edit.set_destination_port(REPLY_PORT)
        } else {
            assert_eq!((edit.view().source_address(), edit.view().source_port()), (server_address, Some(REPLY_PORT)));
            edit.set_source_address(asked)?;
            edit.set_source_port(PORT)
        }
    });
    let client = path.near_udp();
    // Receives only from this address.
    client.connect((asked, PORT)).unwrap();
    for number in 0..20_u8 {
        client.send(&[number; 100]).unwrap();
        let mut datagram = [0; 128];
        let (length, from) = server.recv_from(&mut datagram).unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        server.send_to(&datagram[..length], from).unwrap();
        expect(&client, &[number; 100]);
    }
    assert_eq!(editor.stop().await.packets, 40);
    path.assert_checksums();
}

/// Whether super-packets can be edited in this case. Before Linux 6.11 they cannot: without
/// checksum offload they cannot be sent, and with it an edit is refused, which is checked here.
async fn editable(case: Case, path: &Path) -> bool {
    const SEGMENT: usize = 1000;
    if common::kernel_release() >= (6, 11) || (case.offloads && !case.gso) {
        return true;
    }
    let near = path.near_udp();
    setsockopt(&near, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
    let mut queue = Queue::builder(0).gso(case.gso).bind().await.unwrap();
    let divert = common::divert([Path::udp_to(Hook::Output, PORT).to_queue(0)]);
    let sent = near.send_to(&[7; 2 * SEGMENT], (path.far, PORT));
    if case.offloads {
        sent.unwrap();
        let packet = common::next(&mut queue).await;
        let error = packet.edit().unwrap_err();
        assert!(packet.is_gso() && error.to_string().contains("UDP super-packet"), "{error}");
    } else {
        assert_eq!(sent.unwrap_err().raw_os_error(), Some(nix::errno::Errno::EIO as i32));
    }
    queue.close().await.unwrap();
    support::drop_now(divert);
    false
}

/// Super-packets of several datagrams, which the kernel segments later, are edited and redirected.
/// Before local delivery an edit is refused.
pub(crate) async fn super_packets(case: Case) {
    const SEGMENT: usize = 1000;
    let path = Path::new(case);
    if !editable(case, &path).await {
        return;
    }
    let far = path.far_udp(REPLY_PORT);
    let near = path.near_udp();
    setsockopt(&near, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
    let editor = Editor::start(case, [Path::udp_to(Hook::Output, PORT)], move |edit| {
        edit.payload_mut()?.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
        let length = edit.view().payload().map_or(0, <[u8]>::len);
        if length > SEGMENT {
            let error = edit.splice_payload(..1, b"").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
        edit.set_destination_port(REPLY_PORT)
    });
    for _ in 0..10 {
        near.send_to(&[7; 5 * SEGMENT - 1], (path.far, PORT)).unwrap();
        (0..4).for_each(|_| expect(&far, &[8; SEGMENT]));
        expect(&far, &[8; SEGMENT - 1]);
    }
    let seen = editor.stop().await;
    let expected = if case.gso { (10, 10) } else { (50, 0) };
    assert_eq!((seen.packets, seen.super_packets), expected);
    path.assert_checksums();

    // In the other direction they arrive unsegmented if the interfaces support that.
    let mut queue = Queue::builder(0).gso(case.gso).bind().await.unwrap();
    let _divert = common::divert([Path::udp_to(Hook::Input, PORT).to_queue(0)]);
    let receiver = support::udp((path.near, PORT));
    setsockopt(&far, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
    far.send_to(&[7; 2 * SEGMENT], (path.near, PORT)).unwrap();
    let packet = common::next(&mut queue).await;
    assert_eq!(packet.is_gso(), case.gso && case.offloads);
    match packet.edit() {
        Ok(mut edit) => {
            assert!(!packet.is_gso());
            edit.replace_payload(b"edited").unwrap();
            packet.accept().payload(edit.finish()).submit().unwrap();
            queue.sink().flush().await;
            expect(&receiver, b"edited");
        }
        Err(error) => {
            assert!(packet.is_gso() && error.to_string().contains("UDP super-packet"), "{error}");
            packet.drop().submit().unwrap();
        }
    }
}

/// Super-packets at the forward and postrouting hooks.
pub(crate) async fn forwarded(case: Case) {
    const SEGMENT: usize = 1000;
    let from = Path::new(case);
    if !editable(case, &from).await {
        return;
    }
    let to = Path::beside(case);
    support::forwarding();
    from.peer.route_through_near();
    to.peer.route_through_near();
    let (sender, receiver) = (from.far_udp(0), to.far_udp(PORT));
    setsockopt(&sender, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
    for hook in [Hook::Forward, Hook::Postrouting] {
        let editor = Editor::start(case, [Path::udp_to(hook, PORT)], |edit| {
            edit.payload_mut()?.fill(8);
            edit.set_tos(0x10);
            Ok(())
        });
        for _ in 0..5 {
            sender.send_to(&[7; 5 * SEGMENT - 1], (to.far, PORT)).unwrap();
            (0..4).for_each(|_| expect(&receiver, &[8; SEGMENT]));
            expect(&receiver, &[8; SEGMENT - 1]);
        }
        // An interface without offloads receives none.
        let expected = if case.gso && case.offloads { 5 } else { 0 };
        assert_eq!(editor.stop().await.super_packets, expected);
    }
    from.assert_checksums();
    to.assert_checksums();
}

/// All fragments are sent to another address; the checksum in the first one must be correct for the
/// whole datagram.
pub(crate) async fn fragments(case: Case) {
    let path = Path::new(case);
    let other = second(path.near);
    path.add_address(true, other);
    let receiver = support::udp((other, PORT));
    let far = path.far_udp(0);
    // Otherwise the sender would return an error instead of fragmenting.
    if case.v6 {
        set_ipv6_mtu_discover(&far, Ipv6PathMtuDiscovery::DONT).unwrap();
    } else {
        set_ip_mtu_discover(&far, Ipv4PathMtuDiscovery::DONT).unwrap();
    }
    // Without a port, because later fragments have none. Nothing here turns on connection tracking,
    // which would reassemble the fragments first.
    let rule = Rule::new(Hook::Prerouting).protocol(Protocol::Udp).destination_address(path.near, case.prefix());
    let editor = Editor::start(case, [rule], move |edit| {
        assert!(edit.view().is_fragment());
        edit.set_ttl(9);
        edit.set_destination_address(other)
    });
    let data: Vec<u8> = (0..4000).map(|index| (index % 251) as u8).collect();
    far.send_to(&data, (path.near, PORT)).unwrap();
    expect(&receiver, &data);
    assert_eq!(editor.stop().await.packets, 3);
    path.assert_checksums();
}

/// Through one address of a side to its other one, in both directions: at the output and at the
/// prerouting hook.
pub(crate) async fn routed(case: Case) {
    let path = Path::new(case);
    let (far_last, near_last) = (path.accept_routes(false), path.accept_routes(true));
    // At the input hook the packet no longer contains the next hop, which Linux has included in the
    // unfinished UDP checksum.
    let rules = [Path::udp_to(Hook::Output, PORT), Path::udp_to(Hook::Prerouting, REPLY_PORT)];
    let editor = Editor::start(case, rules, |edit| edit.replace_payload(b"not what was sent"));
    let (near, far) = (path.near_udp(), path.far_udp(0));
    route::set(&near, path.far);
    route::set(&far, path.near);
    let far_receiver = path.peer.run(|| support::udp((far_last, PORT)));
    let near_receiver = support::udp((near_last, REPLY_PORT));
    for _ in 0..5 {
        near.send_to(b"hello", (far_last, PORT)).unwrap();
        expect(&far_receiver, b"not what was sent");
        far.send_to(b"hello", (near_last, REPLY_PORT)).unwrap();
        expect(&near_receiver, b"not what was sent");
    }
    assert_eq!(editor.stop().await.packets, 10);

    if editable(case, &path).await {
        const SEGMENT: usize = 1000;
        setsockopt(&near, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
        let editor = Editor::start(case, [Path::udp_to(Hook::Output, PORT)], |edit| {
            edit.payload_mut()?.fill(8);
            Ok(())
        });
        let sent = near.send_to(&[7; 3 * SEGMENT], (far_last, PORT));
        let expected = if case.v6 && common::kernel_release() < (6, 11) {
            // Seen on 6.1: the sender's own socket refuses a super-packet with an extension header.
            assert_eq!(sent.unwrap_err().raw_os_error(), Some(nix::errno::Errno::EIO as i32));
            (0, 0)
        } else {
            sent.unwrap();
            (0..3).for_each(|_| expect(&far_receiver, &[8; SEGMENT]));
            if case.gso { (1, 1) } else { (3, 0) }
        };
        let seen = editor.stop().await;
        assert_eq!((seen.packets, seen.super_packets), expected);
    }
    path.assert_checksums();
}

/// Shows that the other tests would detect a wrong checksum.
pub(crate) async fn wrong_checksum(case: Case) {
    let path = Path::new(case);
    let far = path.far_udp(PORT);
    let near = path.near_udp();
    let mut queue = Queue::builder(0).gso(case.gso).bind().await.unwrap();
    let _divert = common::divert([Path::udp_to(Hook::Output, PORT).to_queue(0)]);
    for text in [b"wrong", b"right"] {
        near.send_to(text, (path.far, PORT)).unwrap();
        let packet = common::next(&mut queue).await;
        let mut payload = packet.edit().unwrap().finish();
        if text == b"wrong" {
            *payload.last_mut().unwrap() ^= 1;
        }
        packet.accept().payload(payload).submit().unwrap();
    }
    expect(&far, b"right");
    assert_eq!(path.peer.run(checksum_errors), 1);
}

/// Of TCP come super-packets; of UDP comes each datagram, whose length can be changed.
pub(crate) async fn beside_tcp_with_gso(case: Case) {
    const SEGMENT: usize = 1000;
    let path = Path::new(case);
    let with = Queue::builder(0).gso(true).bind().await.unwrap();
    let without = Queue::builder(1).gso(false).bind().await.unwrap();
    let sinks = [with.sink(), without.sink()];
    let divert = common::divert([
        Rule::new(Hook::Output).protocol(Protocol::Tcp).destination_port(PORT).to_queue(0),
        Path::udp_to(Hook::Output, PORT).to_queue(1),
    ]);
    let task = tokio::spawn(async move {
        let mut super_packets = 0;
        let mut packets = stream::select(with, without);
        while let Some(packet) = packets.try_next().await.unwrap() {
            let mut edit = packet.edit().unwrap();
            if packet.is_gso() {
                assert_eq!(packet.queue_number(), 0);
                super_packets += 1;
            }
            if edit.view().is_udp() {
                edit.replace_payload(b"another length").unwrap();
            }
            packet.accept().payload(edit.finish()).submit().unwrap();
        }
        super_packets
    });
    let listener = path.peer.run(|| TcpListener::bind((path.far, PORT)).unwrap());
    let mut client = TcpStream::connect((path.far, PORT)).unwrap();
    let mut server = listener.accept().unwrap().0;
    client.write_all(&[7; 100_000]).unwrap();
    drop(client);
    assert_eq!(std::io::copy(&mut server, &mut std::io::sink()).unwrap(), 100_000);

    let (near, far) = (path.near_udp(), path.far_udp(PORT));
    // Before Linux 6.11 an interface without offloads sends none.
    if case.offloads {
        setsockopt(&near, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
    }
    let datagrams = if case.offloads { 3 } else { 1 };
    near.send_to(&vec![7; datagrams * SEGMENT], (path.far, PORT)).unwrap();
    (0..datagrams).for_each(|_| expect(&far, b"another length"));
    divert.remove_rules().unwrap();
    for sink in sinks {
        sink.close().await.unwrap();
    }
    assert!(task.await.unwrap() > 0);
    path.assert_checksums();
}
