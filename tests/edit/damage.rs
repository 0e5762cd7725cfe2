//! Malformed packets and arbitrary bytes cause errors, never a panic.

use proptest::{prelude::*, sample::Index};
use tokio_nfqueue::edit::{Edit, PacketView, Unreachable, complete_checksums};

use super::{
    Change, change, refusal,
    sample::{Sample, SampleTransport, assert_checksums, plain, sample},
};

/// Calls every function on `bytes`.
fn exercise(bytes: &[u8], change: &Change) {
    let _ = complete_checksums(&mut bytes.to_vec());
    if let Ok(view) = PacketView::new(bytes) {
        let _ = (view.to_string(), view.icmp(), view.tcp(), view.transport_header(), view.ip_header(), view.payload());
    }
    reply(bytes);
    let Ok(mut edit) = Edit::new(bytes) else { return };
    if let Some((source, destination)) = change.addresses {
        let _ = edit.set_source_address(source);
        let _ = edit.set_destination_address(super::first4(destination));
    }
    let _ = edit.payload_mut().map(|payload| payload.fill(1));
    let _ = edit.set_source_port(7);
    let _ = change.apply(&mut edit);
    if let Some((start, length, with)) = &change.payload {
        let start = start % 100;
        let _ = edit.splice_ip_payload(start..start + length % 100, with);
        let _ = edit.splice_payload(..=length % 100, with);
    }
    let view = edit.view().to_string();
    let packet = edit.finish();
    assert_eq!(PacketView::new(&packet).unwrap().to_string(), view);
    // The result is a complete packet, and a second edit does not change it.
    assert_eq!(Edit::new(&packet).unwrap().finish(), packet);
}

/// Makes every reply to `bytes`. A packet that gets none is unchanged; a reply is complete, and an
/// error has correct checksums.
fn reply(bytes: &[u8]) {
    for make in [Edit::turn_around, Edit::tcp_reset, |edit: &mut Edit| edit.icmp_unreachable(Unreachable::Port)] {
        let Ok(mut edit) = Edit::new(bytes) else { return };
        let packet = whole(&edit.view());
        let (result, source) = (make(&mut edit), edit.view().source_address());
        if result.is_err() {
            assert_eq!(whole(&edit.view()), packet);
            continue;
        }
        assert_eq!((source, edit.view().ttl()), (PacketView::new(bytes).unwrap().destination_address(), 64));
        let is_error = whole(&edit.view()) != packet && matches!(edit.view().icmp(), Some((1 | 3, _)));
        let reply = edit.finish();
        assert_eq!(Edit::new(&reply).unwrap().finish(), reply);
        if is_error {
            assert_checksums(&reply);
        }
    }
}

fn whole(view: &PacketView<'_>) -> Vec<u8> {
    [view.ip_header(), view.ip_payload()].concat()
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..160),
        version in 0..3_u8,
        change in change(),
    ) {
        match (version, bytes.first_mut()) {
            (1, Some(first)) => *first = 0x45 + (*first & 3),
            (2, Some(first)) => *first = 0x60,
            _ => {}
        }
        exercise(&bytes, &change);
    }

    #[test]
    fn damaged_packets_do_not_panic(
        sample in sample(),
        damage in prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        cut in any::<Index>(),
        change in change(),
    ) {
        let mut bytes = sample.bytes();
        exercise(&bytes[..cut.index(bytes.len())], &change);
        // The headers are in the first bytes.
        let reach = bytes.len().min(80);
        for (place, value) in damage {
            bytes[place.index(reach)] = value;
        }
        exercise(&bytes, &change);
        exercise(&bytes[..cut.index(bytes.len())], &change);
    }

    #[test]
    fn damaged_routes_do_not_panic(
        mut route in prop::collection::vec(route_byte(), 8..=40),
        v6 in any::<bool>(),
        change in change(),
    ) {
        route.truncate(route.len() / 8 * 8);
        let packet = if v6 {
            extended(43, &route)
        } else {
            let mut packet = udp(false).bytes();
            packet[0] += route.len() as u8 / 4;
            packet[3] += route.len() as u8;
            packet.splice(20..20, route);
            packet
        };
        exercise(&packet, &change);
    }

    #[test]
    fn incomplete_packet_is_refused(sample in sample(), cut in any::<Index>()) {
        let bytes = sample.bytes();
        let cut = &bytes[..cut.index(bytes.len())];
        refusal(Edit::new(cut));
        refusal(complete_checksums(&mut cut.to_vec()));
    }
}

/// A byte that often has a meaning in a route.
fn route_byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(&[0, 1, 2, 3, 4, 5, 7, 8, 11, 17, 131, 137][..])]
}

fn udp(v6: bool) -> Sample {
    plain(v6, SampleTransport::Udp(1, 2), b"hello")
}

/// The error text of a change of the payload.
#[track_caller]
fn obstacle(packet: &[u8]) -> String {
    refusal(Edit::new(packet).unwrap().replace_payload(b"x"))
}

#[test]
fn errors_name_the_reason() {
    let part = &udp(false).bytes()[..30];
    assert_eq!(refusal(Edit::new(part)), "edit a packet: invalid value: only 30 of its 33 bytes are present");
    assert!(refusal(Edit::new(&[])).ends_with("the packet has no bytes"));
    assert!(refusal(Edit::new(&[0x50; 60])).ends_with("the packet is neither IPv4 nor IPv6"));
    let mut edit = Edit::new(&udp(false).bytes()).unwrap();
    assert!(refusal(edit.set_source_address([1; 16])).ends_with("is not an IPv4 address, and the packet is IPv4"));
    assert!(refusal(edit.splice_payload(2..6, b"")).ends_with("the range is not within the payload of 5 bytes"));
    #[expect(clippy::reversed_empty_ranges, reason = "the range must be refused")]
    let reversed = 3..2;
    assert!(refusal(edit.splice_payload(reversed, b"")).ends_with("the range is not within the payload of 5 bytes"));
    assert!(
        refusal(edit.splice_payload((std::ops::Bound::Excluded(usize::MAX), std::ops::Bound::Unbounded), b""))
            .contains("range")
    );
    let mut edit = Edit::new(&udp(true).bytes()).unwrap();
    assert!(refusal(edit.set_destination_address([1; 4])).ends_with("is not an IPv6 address, and the packet is IPv6"));
    let mut edit = Edit::new(&plain(false, SampleTransport::Icmp(1, 2), b"hello").bytes()).unwrap();
    assert!(refusal(edit.set_destination_port(1)).ends_with("ICMP has no ports"));
}

#[test]
fn unsupported_protocols_are_refused() {
    let mut packet = udp(false).bytes();
    for (number, text) in [(50, "encrypted"), (132, "protocol 132"), (58, "protocol 58"), (47, "protocol 47")] {
        packet[9] = number;
        assert!(obstacle(&packet).contains(text));
        assert!(refusal(complete_checksums(&mut packet.clone())).contains(text));
        let set = Edit::new(&packet).unwrap().set_source_address([1, 2, 3, 4]);
        // The checksums of SCTP and GRE do not cover the addresses.
        assert_eq!(set.is_ok(), [132, 47].contains(&number));
    }
    let mut packet = udp(true).bytes();
    for (number, text) in [(50, "encrypted"), (59, "nothing follows"), (135, "protocol 135"), (1, "protocol 1 is")] {
        packet[6] = number;
        assert!(obstacle(&packet).contains(text));
    }
}

/// An IPv6 packet with an extension header of this kind before the UDP header.
pub(crate) fn extended(kind: u8, header: &[u8]) -> Vec<u8> {
    let mut packet = udp(true).bytes();
    packet[6] = kind;
    packet[5] += header.len() as u8;
    packet.splice(40..40, header.iter().copied());
    packet
}

#[test]
fn authenticated_and_malformed_packets_are_refused() {
    // Authentication header: next header, length in words less 2, reserved, SPI, sequence, ICV.
    let authentication = [17, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 9];
    let mut v4 = udp(false).bytes();
    v4[9] = 51;
    v4[3] += 16;
    v4.splice(20..20, authentication);
    for packet in [v4, extended(51, &authentication)] {
        assert!(obstacle(&packet).contains("authentication"));
        let mut edit = Edit::new(&packet).unwrap();
        assert_eq!(edit.view().payload(), Some(&b"hello"[..]));
        refusal(edit.set_source_address([1; 4]));
        refusal(edit.set_source_address([1; 16]));
        refusal(edit.splice_ip_payload(..1, b"x"));
        // The authentication header does not cover these fields.
        edit.set_ttl(9);
        edit.set_tos(8);
        let ip_payload = packet.len() - edit.view().ip_payload().len();
        assert_eq!(edit.finish()[ip_payload..], packet[ip_payload..]);
    }
    // The stated header length is greater than the packet.
    let packet = extended(60, &[17, 200, 1, 4, 0, 0, 0, 0]);
    assert!(obstacle(&packet).contains("an extension header is malformed"));
}

#[test]
fn packets_without_a_stated_length_can_only_be_viewed() {
    let mut packet = udp(true).bytes();
    packet[4..6].fill(0);
    assert!(refusal(Edit::new(&packet)).contains("jumbogram"));
    assert!(PacketView::new(&packet).unwrap().is_udp());
    // IPv4 super-packets of more than 64 KiB look like this.
    let mut packet = udp(false).bytes();
    packet[2..4].fill(0);
    refusal(Edit::new(&packet));
}
