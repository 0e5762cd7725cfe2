//! Replies, compared with what etherparse writes or reads.

use std::cell::RefCell;

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpHeaders, NetHeaders, PacketBuilder, PacketHeaders, TcpHeader, TransportHeader, icmpv4,
    icmpv6,
};
use proptest::prelude::*;
use tokio_nfqueue::{
    edit::{Edit, PacketView, Unreachable},
    simulated::TestPacket,
};

use super::{
    received::Received,
    refusal,
    sample::{Sample, SampleTransport, assert_checksums, plain, sample},
};

const REASONS: [(Unreachable, u8, u8); 4] = [
    (Unreachable::Network, 0, 0),
    (Unreachable::Host, 1, 3),
    (Unreachable::Port, 3, 4),
    (Unreachable::AdministrativelyProhibited, 13, 1),
];

/// Exchanges the addresses of a sample's IP header, and sets the TTL.
fn reversed(ip: &IpHeaders) -> IpHeaders {
    let mut ip = ip.clone();
    match &mut ip {
        IpHeaders::Ipv4(header, _) => {
            std::mem::swap(&mut header.source, &mut header.destination);
            header.time_to_live = 64;
        }
        IpHeaders::Ipv6(header, _) => {
            std::mem::swap(&mut header.source, &mut header.destination);
            header.hop_limit = 64;
        }
    }
    ip
}

fn has_hosts(ip: &IpHeaders) -> bool {
    match ip {
        IpHeaders::Ipv4(header, _) => [header.source, header.destination].iter().all(|a| (1..=223).contains(&a[0])),
        IpHeaders::Ipv6(header, _) => [header.source, header.destination].iter().all(|a| a[0] != 0xff && *a != [0; 16]),
    }
}

/// What etherparse writes for the turned packet.
fn turned(sample: &Sample) -> Vec<u8> {
    let mut bytes = Vec::new();
    let ip = PacketBuilder::ip(reversed(&sample.ip));
    match &sample.transport {
        SampleTransport::Tcp(header) => {
            let mut header = (**header).clone();
            std::mem::swap(&mut header.source_port, &mut header.destination_port);
            ip.tcp_header(header).write(&mut bytes, &sample.payload)
        }
        SampleTransport::Udp(source, destination) => ip.udp(*destination, *source).write(&mut bytes, &sample.payload),
        &SampleTransport::Icmp(id, seq) if sample.is_ipv4() => {
            ip.icmpv4_echo_reply(id, seq).write(&mut bytes, &sample.payload)
        }
        &SampleTransport::Icmp(id, seq) => ip.icmpv6_echo_reply(id, seq).write(&mut bytes, &sample.payload),
    }
    .unwrap();
    bytes
}

proptest! {
    #[test]
    fn turned_packet_equals_newly_written_packet(sample in sample(), checksums in any::<[u8; 4]>()) {
        let mut packet = sample.bytes();
        sample.spoil_checksums(&mut packet, checksums);
        let mut edit = Edit::new(&packet).unwrap();
        if has_hosts(&sample.ip) {
            edit.turn_around().unwrap();
            prop_assert_eq!(edit.finish(), turned(&sample));
        } else {
            prop_assert!(refusal(edit.turn_around()).contains("is not the address of a host"));
        }
    }

    #[test]
    fn turned_packet_carries_another_payload(sample in sample(), payload in prop::collection::vec(any::<u8>(), 0..80)) {
        prop_assume!(has_hosts(&sample.ip));
        let mut edit = Edit::new(&sample.bytes()).unwrap();
        edit.turn_around().unwrap();
        edit.replace_payload(&payload).unwrap();
        prop_assert_eq!(edit.finish(), turned(&Sample { payload, ..sample }));
    }

    #[test]
    fn error_quotes_the_packet(
        mut sample in sample(),
        more in prop::sample::select(vec![0, 500, 1300]),
        (reason, code_v4, code_v6) in prop::sample::select(&REASONS[..]),
    ) {
        prop_assume!(has_hosts(&sample.ip));
        sample.payload.resize(sample.payload.len() + more, 7);
        let packet = sample.bytes();
        let mut edit = Edit::new(&packet).unwrap();
        edit.icmp_unreachable(reason).unwrap();
        let error = edit.finish();
        assert_checksums(&error);
        let headers = PacketHeaders::from_ip_slice(&error).unwrap();
        let quoted = headers.payload.slice();
        prop_assert_eq!(quoted, &packet[..quoted.len()]);
        let longest = if sample.is_ipv4() { 576 } else { 1280 };
        prop_assert!(error.len() == longest || quoted.len() == packet.len() && error.len() < longest);
        match (headers.net.unwrap(), headers.transport.unwrap(), &sample.ip) {
            (NetHeaders::Ipv4(ip, _), TransportHeader::Icmpv4(icmp), IpHeaders::Ipv4(of, _)) => {
                prop_assert_eq!((ip.source, ip.destination), (of.destination, of.source));
                prop_assert_eq!((ip.time_to_live, ip.options.len()), (64, 0));
                let Icmpv4Type::DestinationUnreachable(header) = icmp.icmp_type else { panic!("{icmp:?}") };
                prop_assert_eq!(header, icmpv4::DestUnreachableHeader::from_values(code_v4, 0).unwrap());
            }
            (NetHeaders::Ipv6(ip, extensions), TransportHeader::Icmpv6(icmp), IpHeaders::Ipv6(of, _)) => {
                prop_assert_eq!((ip.source, ip.destination), (of.destination, of.source));
                prop_assert_eq!((ip.hop_limit, extensions.is_empty()), (64, true));
                let Icmpv6Type::DestinationUnreachable(header) = icmp.icmp_type else { panic!("{icmp:?}") };
                prop_assert_eq!(header, icmpv6::DestUnreachableCode::from_u8(code_v6).unwrap());
            }
            other => panic!("{other:?}"),
        }
        // No error is sent in reply to an error.
        let again = refusal(Edit::new(&error).unwrap().icmp_unreachable(reason));
        prop_assert!(again.contains("the packet is an ICMP error"), "{}", again);
    }
}

/// RFC 9293, section 3.10.7.1.
#[test]
fn reset_equals_newly_written_reset() {
    let received = RefCell::new(Received::new());
    proptest!(|(sample in sample(), gso in any::<bool>())| {
        let SampleTransport::Tcp(tcp) = &sample.transport else { return Ok(()) };
        let mut packet = sample.bytes();
        let mut edit = if gso {
            let at = sample.checksum_at();
            packet[at..at + 2].copy_from_slice(&sample.partial_checksum());
            received.borrow_mut().edit(TestPacket::raw(packet).gso(1000)).unwrap()
        } else {
            Edit::new(&packet).unwrap()
        };
        if tcp.rst {
            prop_assert!(refusal(edit.tcp_reset()).contains("a reset itself"));
            return Ok(());
        }
        prop_assume!(has_hosts(&sample.ip));
        edit.tcp_reset().unwrap();
        let mut reset = TcpHeader::new(tcp.destination_port, tcp.source_port, 0, 0);
        reset.rst = true;
        if tcp.ack {
            reset.sequence_number = tcp.acknowledgment_number;
        } else {
            reset.ack = true;
            let length = sample.payload.len() as u32 + u32::from(tcp.syn) + u32::from(tcp.fin);
            reset.acknowledgment_number = tcp.sequence_number.wrapping_add(length);
        }
        let mut expected = Vec::new();
        PacketBuilder::ip(reversed(&sample.ip)).tcp_header(reset).write(&mut expected, &[]).unwrap();
        let reset = edit.finish();
        prop_assert_eq!(&reset, &expected);
        refusal(Edit::new(&reset).unwrap().tcp_reset());
    });
}

/// Sets the protocol after the IP header.
fn with_protocol(mut packet: Vec<u8>, protocol: u8) -> Vec<u8> {
    let at = if packet[0] >> 4 == 4 { 9 } else { 6 };
    packet[at] = protocol;
    packet
}

fn tcp(v6: bool) -> Vec<u8> {
    plain(v6, SampleTransport::Tcp(Box::new(TcpHeader::new(1, 2, 3, 4))), b"hello").bytes()
}

fn udp(v6: bool) -> Vec<u8> {
    plain(v6, SampleTransport::Udp(1, 2), b"hello").bytes()
}

#[test]
fn only_tcp_is_reset() {
    for v6 in [false, true] {
        assert!(refusal(Edit::new(&udp(v6)).unwrap().tcp_reset()).contains("not TCP"));
        refusal(Edit::new(&with_protocol(udp(v6), 132)).unwrap().tcp_reset());
    }
}

#[test]
fn fragments_are_not_turned_and_only_the_first_gets_an_error() {
    for packet in [tcp(false), udp(false)] {
        let fragment = |field: [u8; 2]| {
            let mut packet = packet.clone();
            packet[6..8].copy_from_slice(&field);
            Edit::new(&packet).unwrap()
        };
        for field in [[0x20, 0], [0x20, 1], [0, 1]] {
            assert!(refusal(fragment(field).turn_around()).contains("is a fragment"));
            assert!(refusal(fragment(field).tcp_reset()).contains("is a fragment"));
        }
        for field in [[0x20, 1], [0, 1]] {
            assert!(refusal(fragment(field).icmp_unreachable(Unreachable::Port)).contains("is a fragment"));
        }
        let mut first = fragment([0x20, 0]);
        first.icmp_unreachable(Unreachable::Port).unwrap();
        assert!(!first.view().is_fragment());
        assert_checksums(&first.finish());
    }
}

#[test]
fn only_echo_requests_are_turned() {
    for (v6, request) in [(false, 8), (true, 128)] {
        let mut packet = plain(v6, SampleTransport::Icmp(1, 2), b"hello").bytes();
        let at = if v6 { 40 } else { 20 };
        assert_eq!(packet[at], request);
        let mut edit = Edit::new(&packet).unwrap();
        edit.turn_around().unwrap();
        assert!(refusal(edit.turn_around()).contains("not an echo request"));
        packet[at] = 3;
        refusal(Edit::new(&packet).unwrap().turn_around());
    }
}

#[test]
fn icmp_errors_and_redirects_get_no_error() {
    let kinds = |v6: bool| {
        let at = if v6 { 40 } else { 20 };
        let packet = plain(v6, SampleTransport::Icmp(1, 2), b"hello").bytes();
        (0..=255).filter(move |kind| {
            let mut packet = packet.clone();
            packet[at] = *kind;
            Edit::new(&packet).unwrap().icmp_unreachable(Unreachable::Host).is_ok()
        })
    };
    assert_eq!(kinds(false).collect::<Vec<u8>>(), [0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43]);
    assert_eq!(kinds(true).collect::<Vec<u8>>(), (128..=136).chain(138..=255).collect::<Vec<u8>>());
    // ICMP without its header.
    let mut packet = with_protocol(udp(false), 1)[..24].to_vec();
    packet[3] = 24;
    assert!(refusal(Edit::new(&packet).unwrap().icmp_unreachable(Unreachable::Host)).contains("malformed"));
}

#[test]
fn other_protocols_get_an_error() {
    for v6 in [false, true] {
        for protocol in [50, 132, 47] {
            let mut edit = Edit::new(&with_protocol(udp(v6), protocol)).unwrap();
            refusal(edit.turn_around());
            edit.icmp_unreachable(Unreachable::AdministrativelyProhibited).unwrap();
            assert_checksums(&edit.finish());
        }
    }
}

#[test]
fn addresses_of_groups_get_no_reply() {
    for bad in [[224, 0, 0, 1], [255, 255, 255, 255], [240, 0, 0, 1], [0, 0, 0, 0]] {
        for at in [12, 16] {
            let mut packet = tcp(false);
            packet[at..at + 4].copy_from_slice(&bad);
            refusal(Edit::new(&packet).unwrap().turn_around());
            refusal(Edit::new(&packet).unwrap().tcp_reset());
            refusal(Edit::new(&packet).unwrap().icmp_unreachable(Unreachable::Port));
        }
    }
    // With an own address as the destination, the packet can be turned.
    let mut packet = udp(false);
    packet[16..20].copy_from_slice(&[224, 0, 0, 251]);
    let mut edit = Edit::new(&packet).unwrap();
    edit.set_destination_address([192, 0, 2, 1]).unwrap();
    edit.turn_around().unwrap();
    assert_eq!(edit.view().source_address().to_string(), "192.0.2.1");
}

#[test]
fn routes_that_are_not_completed_are_not_turned() {
    // A loose source route with one address to go.
    let packet = tcp(false);
    let options = [1, 131, 7, 4, 192, 0, 2, 9];
    let mut routed = [&packet[..20], &options, &packet[20..]].concat();
    routed[0] = 0x47;
    routed[3] += 8;
    assert!(refusal(Edit::new(&routed).unwrap().turn_around()).contains("not completed"));
    assert!(refusal(Edit::new(&routed).unwrap().tcp_reset()).contains("not completed"));
    Edit::new(&routed).unwrap().icmp_unreachable(Unreachable::Port).unwrap();
    // Completed.
    routed[22] = 8;
    routed[23] = 8;
    Edit::new(&routed).unwrap().turn_around().unwrap();
}

#[test]
fn first_fragments_and_parts_of_packets_have_ports() {
    for v6 in [false, true] {
        for packet in [tcp(v6), udp(v6)] {
            let at = if v6 { 40 } else { 20 };
            let view = |bytes: &[u8]| {
                let view = PacketView::new(bytes).unwrap();
                (view.source_port(), view.destination_port())
            };
            assert_eq!(view(&packet[..at + 8]), (Some(1), Some(2)));
            assert_eq!(view(&packet[..at + 4]), (Some(1), Some(2)));
            assert_eq!(view(&packet[..at + 3]), (Some(1), None));
            assert_eq!(view(&packet[..at + 1]), (None, None));
        }
    }
    // The first fragment of a TCP segment, with 8 bytes of the header.
    let mut packet = tcp(false)[..28].to_vec();
    packet[3] = 28;
    packet[6..8].copy_from_slice(&[0x20, 0]);
    let first = PacketView::new(&packet).unwrap();
    assert_eq!((first.source_port(), first.destination_port()), (Some(1), Some(2)));
    assert_eq!((first.is_fragment(), first.transport_header()), (true, None));
    assert!(refusal(Edit::new(&packet).unwrap().set_source_port(9)).contains("is a fragment"));
    packet[6..8].copy_from_slice(&[0, 1]);
    let later = PacketView::new(&packet).unwrap();
    assert_eq!((later.source_port(), later.destination_port()), (None, None));
}
