//! Tests the maximum length, absent checksums, bytes after the payload, and the view.

use tokio_nfqueue::{
    Protocol,
    edit::{Edit, PacketView, complete_checksums},
};

use super::{
    refusal,
    sample::{SampleTransport, assert_checksums, plain},
};

#[test]
fn packet_of_maximum_length_can_be_edited() {
    for (v6, header) in [(false, 28), (true, 48)] {
        let mut edit = Edit::new(&plain(v6, SampleTransport::Udp(1, 2), b"hello").bytes()).unwrap();
        let text = refusal(edit.replace_payload(&vec![7; 65_532 - header]));
        assert!(text.ends_with("a verdict carries at most 65531 bytes"), "{text}");
        refusal(edit.splice_ip_payload(8.., &vec![7; 65_532 - header]));
        assert_eq!(edit.view().payload(), Some(&b"hello"[..]));
        edit.replace_payload(&vec![7; 65_531 - header]).unwrap();
        let packet = edit.finish();
        assert_eq!(packet.len(), 65_531);
        assert_checksums(&packet);
        assert_eq!(packet.capacity(), packet.len(), "the verdict must not allocate again");
    }
}

#[test]
fn absent_udp_checksum_stays_absent_over_ipv4() {
    let mut packet = plain(false, SampleTransport::Udp(1, 2), b"hello").bytes();
    packet[26..28].fill(0);
    let mut edit = Edit::new(&packet).unwrap();
    edit.replace_payload(b"good morning").unwrap();
    assert_eq!(edit.finish()[26..28], [0, 0]);
    // IPv6 requires a UDP checksum.
    let mut packet = plain(true, SampleTransport::Udp(1, 2), b"hello").bytes();
    packet[46..48].fill(0);
    assert_checksums(&Edit::new(&packet).unwrap().finish());
}

#[test]
fn udp_checksum_of_zero_becomes_0xffff() {
    for v6 in [false, true] {
        let sample = plain(v6, SampleTransport::Udp(1, 2), &[0; 4]);
        let packet = sample.bytes();
        let at = sample.checksum_at();
        // With the old checksum as a word of the payload, the new checksum is 0.
        let mut edit = Edit::new(&packet).unwrap();
        edit.splice_payload(..2, &packet[at..at + 2]).unwrap();
        let packet = edit.finish();
        assert_eq!(packet[at..at + 2], [0xff, 0xff]);
        assert_checksums(&packet);
    }
}

#[test]
fn bytes_after_a_udp_datagram_are_kept() {
    let sample = plain(false, SampleTransport::Udp(1, 2), b"hello");
    let mut packet = sample.bytes();
    packet.extend_from_slice(b"surplus");
    packet[3] += 7;
    let mut edit = Edit::new(&packet).unwrap();
    assert_eq!(edit.view().payload(), Some(&b"hello"[..]));
    edit.splice_payload(5.., b" world").unwrap();
    let edited = edit.finish();
    assert_eq!(&edited[28..], b"hello worldsurplus");
    assert_eq!(u16::from_be_bytes([edited[2], edited[3]]), 46);
    assert_eq!(u16::from_be_bytes([edited[24], edited[25]]), 19);
    let whole = plain(false, SampleTransport::Udp(1, 2), b"hello world").bytes();
    assert_eq!(edited[26..28], whole[26..28], "the checksum covers only the datagram");
}

#[test]
fn view_is_displayed_in_one_line() {
    let line = |packet: &[u8]| PacketView::new(packet).unwrap().to_string();
    let mut tcp = etherparse::TcpHeader::new(80, 4000, 7, 512);
    (tcp.ack, tcp.syn, tcp.acknowledgment_number) = (true, true, 9);
    let packet = plain(true, SampleTransport::Tcp(Box::new(tcp)), b"hello").bytes();
    assert_eq!(
        line(&packet),
        "[101:101:101:101:101:101:101:101]:80 > [202:202:202:202:202:202:202:202]:4000 TCP, 65 bytes, hop limit 64, \
         traffic class 0x00, SYN ACK seq 7 ack 9 window 512, payload 5 bytes"
    );
    let packet = plain(false, SampleTransport::Icmp(1, 2), b"hello").bytes();
    let text = "10.0.0.1 > 10.0.0.2 ICMP, 33 bytes, TTL 64, TOS 0x00, type 8 code 0, payload 5 bytes";
    assert_eq!(line(&packet), text);
    // Bytes that were not copied count in the length of the packet, but not in that of the payload.
    assert_eq!(line(&packet[..29]), text.replace("payload 5", "payload 1"));
    assert_eq!(line(&packet[..24]), text.replace(", payload 5 bytes", "").replace(", type 8 code 0", ""));
    let mut gre = packet.clone();
    gre[9] = 47;
    assert_eq!(line(&gre), "10.0.0.1 > 10.0.0.2 protocol 47, 33 bytes, TTL 64, TOS 0x00");
}

#[test]
fn view_returns_header_fields() {
    let packet = plain(true, SampleTransport::Icmp(1, 2), b"hello").bytes();
    let view = PacketView::new(&packet).unwrap();
    assert_eq!((view.protocol(), view.ip_payload().len()), (Protocol::Icmpv6, 13));
    assert!(!view.is_ipv4() && !view.is_udp() && !view.is_tcp() && view.tcp().is_none());
    assert_eq!(view.icmp(), Some((128, 0)));
    assert_eq!(view.transport_header().map(<[u8]>::len), Some(8));
    assert_eq!(view.payload(), Some(&b"hello"[..]));
    assert_eq!((view.ttl(), view.ip_header().len()), (64, 40));
    assert_eq!((view.source_port(), view.destination_port()), (None, None));
    assert!(!view.is_fragment());
    let mut copy = packet.clone();
    complete_checksums(&mut copy).unwrap();
    assert_eq!(copy, packet);
}
