//! Any bytes at all: errors, never a panic.

use proptest::{prelude::*, sample::Index};

use super::{
    super::{Edit, PacketView, complete_checksums},
    Change, change, refusal,
    sample::{Sample, SampleTransport, plain, sample},
};

/// Everything that can be done to bytes.
fn exercise(bytes: &[u8], change: &Change) {
    let _ = complete_checksums(&mut bytes.to_vec());
    if let Ok(view) = PacketView::new(bytes) {
        let _ = (view.to_string(), view.icmpv4(), view.icmpv6(), view.tcp(), view.udp(), view.payload());
    }
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
    // What comes out goes in again, and is whole.
    assert_eq!(Edit::new(&packet).unwrap().finish(), packet);
}

proptest! {
    #[test]
    fn arbitrary_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..160), version in 0..3_u8, change in change()) {
        match (version, bytes.first_mut()) {
            (1, Some(first)) => *first = 0x45 + (*first & 3),
            (2, Some(first)) => *first = 0x60,
            _ => {}
        }
        exercise(&bytes, &change);
    }

    #[test]
    fn damaged_packets(
        sample in sample(),
        damage in prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        cut in any::<Index>(),
        change in change(),
    ) {
        let mut bytes = sample.bytes();
        exercise(&bytes[..cut.index(bytes.len())], &change);
        // Most of what can be damaged is in the first bytes.
        let reach = bytes.len().min(80);
        for (place, value) in damage {
            bytes[place.index(reach)] = value;
        }
        exercise(&bytes, &change);
        exercise(&bytes[..cut.index(bytes.len())], &change);
    }

    #[test]
    fn damaged_routes(mut route in prop::collection::vec(route_byte(), 8..=40), v6 in any::<bool>(), change in change()) {
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
    fn a_part_of_a_packet_is_refused(sample in sample(), cut in any::<Index>()) {
        let bytes = sample.bytes();
        let cut = &bytes[..cut.index(bytes.len())];
        refusal(Edit::new(cut));
        refusal(complete_checksums(&mut cut.to_vec()));
    }
}

/// What has a meaning in a route is frequent.
fn route_byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(&[0, 1, 2, 3, 4, 5, 7, 8, 11, 17, 131, 137][..])]
}

fn udp(v6: bool) -> Sample {
    plain(v6, SampleTransport::Udp(1, 2), b"hello")
}

/// What is wrong with an edit of the payload.
#[track_caller]
fn obstacle(packet: &[u8]) -> String {
    refusal(Edit::new(packet).unwrap().replace_payload(b"x"))
}

#[test]
fn refusals_say_why() {
    let part = &udp(false).bytes()[..30];
    assert_eq!(refusal(Edit::new(part)), "edit a packet: invalid value: only 30 of its 33 bytes are there");
    assert!(refusal(Edit::new(&[])).ends_with("no bytes"));
    assert!(refusal(Edit::new(&[0x50; 60])).ends_with("neither IPv4 nor IPv6"));
    let mut edit = Edit::new(&udp(false).bytes()).unwrap();
    assert!(refusal(edit.set_source_address([1; 16])).contains("for an IPv4 packet"));
    assert!(refusal(edit.splice_payload(2..6, b"")).ends_with("not within its 5 bytes"));
    #[expect(clippy::reversed_empty_ranges, reason = "it is to be refused")]
    let reversed = 3..2;
    assert!(refusal(edit.splice_payload(reversed, b"")).ends_with("not within its 5 bytes"));
    assert!(
        refusal(edit.splice_payload((std::ops::Bound::Excluded(usize::MAX), std::ops::Bound::Unbounded), b""))
            .contains("range")
    );
    let mut edit = Edit::new(&udp(true).bytes()).unwrap();
    assert!(refusal(edit.set_destination_address([1; 4])).contains("for an IPv6 packet"));
    let mut edit = Edit::new(&plain(false, SampleTransport::Icmp(1, 2), b"hello").bytes()).unwrap();
    assert!(refusal(edit.set_destination_port(1)).ends_with("ICMP has no ports"));
}

#[test]
fn protocols_that_cannot_be_edited() {
    let mut packet = udp(false).bytes();
    for (number, text) in [(50, "encrypted"), (132, "protocol 132"), (58, "protocol 58"), (47, "protocol 47")] {
        packet[9] = number;
        assert!(obstacle(&packet).contains(text));
        assert!(refusal(complete_checksums(&mut packet.clone())).contains(text));
        let set = Edit::new(&packet).unwrap().set_source_address([1, 2, 3, 4]);
        // SCTP's and GRE's checksums do not cover addresses.
        assert_eq!(set.is_ok(), [132, 47].contains(&number));
    }
    let mut packet = udp(true).bytes();
    for (number, text) in [(50, "encrypted"), (59, "nothing follows"), (135, "protocol 135"), (1, "protocol 1;")] {
        packet[6] = number;
        assert!(obstacle(&packet).contains(text));
    }
}

/// An IPv6 packet with an extension header of this kind in front of UDP.
pub(super) fn extended(kind: u8, header: &[u8]) -> Vec<u8> {
    let mut packet = udp(true).bytes();
    packet[6] = kind;
    packet[5] += header.len() as u8;
    packet.splice(40..40, header.iter().copied());
    packet
}

#[test]
fn headers_that_forbid_edits() {
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
        // The header does not cover these.
        edit.set_ttl(9);
        edit.set_tos(8);
        let behind = packet.len() - edit.view().ip_payload().len();
        assert_eq!(edit.finish()[behind..], packet[behind..]);
    }
    // It says to be longer than the packet.
    let packet = extended(60, &[17, 200, 1, 4, 0, 0, 0, 0]);
    assert!(obstacle(&packet).contains("an extension header is damaged"));
}

#[test]
fn jumbograms() {
    let mut packet = udp(true).bytes();
    packet[4..6].fill(0);
    assert!(refusal(Edit::new(&packet)).contains("jumbogram"));
    assert!(PacketView::new(&packet).unwrap().udp().is_some());
    // As IPv4 super-packets of more than 64 KiB.
    let mut packet = udp(false).bytes();
    packet[2..4].fill(0);
    refusal(Edit::new(&packet));
}
