//! In packets with a route, the transport checksum covers the final destination.

use etherparse::{IpHeaders, Ipv6RawExtHeader, Ipv6RoutingExtensions, ip_number};
use proptest::prelude::*;
use tokio_nfqueue::edit::{Edit, PacketView, complete_checksums};

use super::{
    first4,
    received::Received,
    refusal,
    sample::{Sample, SampleTransport, assert_checksums, plain, sample},
};

/// The kinds of routes that the crate knows.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// An IPv4 option of this kind.
    Option(u8),
    /// IPv6 routing header type 0.
    Source,
    /// IPv6 routing header type 2, with one address.
    Home,
    /// IPv6 routing header type 4. If `reduced`, the list omits the first hop.
    Segments { reduced: bool },
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Option(131),
        Self::Option(137),
        Self::Source,
        Self::Home,
        Self::Segments { reduced: false },
        Self::Segments { reduced: true },
    ];

    fn is_ipv4(self) -> bool {
        matches!(self, Self::Option(_))
    }
}

/// The sample with a route along `stops`, after it has visited the first `passed` of them.
fn routed(sample: &Sample, kind: Kind, stops: &[[u8; 16]], passed: usize) -> Sample {
    let (last, left) = (stops.len() - 1, stops.len() - 1 - passed);
    // A hop replaces the address that it has used with its own address.
    let addresses = stops.iter().enumerate().skip(1).map(|(index, stop)| if index > passed { *stop } else { [9; 16] });
    let mut sample = plain(!kind.is_ipv4(), sample.transport.clone(), &sample.payload);
    match &mut sample.ip {
        IpHeaders::Ipv4(header, _) => {
            let Kind::Option(kind) = kind else { unreachable!() };
            // A no-operation option comes first, for alignment.
            let mut options = vec![1, kind, 3 + 4 * last as u8, 4 + 4 * passed as u8];
            options.extend(addresses.flat_map(first4));
            header.options = options[..].try_into().unwrap();
            header.destination = first4(stops[passed]);
        }
        IpHeaders::Ipv6(header, extensions) => {
            let (number, last_entry, list) = match kind {
                Kind::Segments { reduced } => {
                    let skipped = usize::from(reduced);
                    (4, last - skipped, stops[skipped..].iter().rev().copied().collect())
                }
                Kind::Home => (2, 0, addresses.collect::<Vec<_>>()),
                _ => (0, 0, addresses.collect()),
            };
            let mut bytes = vec![number, left as u8, last_entry as u8, 0, 0, 0];
            bytes.extend(list.concat());
            let routing = Ipv6RawExtHeader::new_raw(ip_number::UDP, &bytes).unwrap();
            extensions.routing = Some(Ipv6RoutingExtensions { routing, final_destination_options: None });
            header.destination = stops[passed];
        }
    }
    sample
}

/// The sample without a route, sent directly to `destination`.
fn direct(sample: &Sample, v6: bool, destination: [u8; 16]) -> Vec<u8> {
    let mut sample = plain(v6, sample.transport.clone(), &sample.payload);
    match &mut sample.ip {
        IpHeaders::Ipv4(header, _) => header.destination = first4(destination),
        IpHeaders::Ipv6(header, _) => header.destination = destination,
    }
    sample.bytes()
}

fn ip_payload(packet: &[u8]) -> &[u8] {
    PacketView::new(packet).unwrap().ip_payload()
}

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(&Kind::ALL[..])
}

proptest! {
    #[test]
    fn transport_checksum_is_the_same_at_every_hop(
        sample in sample(),
        kind in kind(),
        stops in prop::collection::vec(any::<[u8; 16]>(), 2..6),
        spoilt in any::<[u8; 4]>(),
    ) {
        let stops = if kind == Kind::Home { &stops[..2] } else { &stops[..] };
        let expected = direct(&sample, !kind.is_ipv4(), *stops.last().unwrap());
        for passed in 0..stops.len() {
            let sample = routed(&sample, kind, stops, passed);
            let mut packet = sample.bytes();
            sample.spoil_checksums(&mut packet, spoilt);
            let edited = Edit::new(&packet).unwrap().finish();
            complete_checksums(&mut packet).unwrap();
            prop_assert_eq!(ip_payload(&packet), ip_payload(&expected), "{} passed", passed);
            prop_assert_eq!(&edited, &packet);
            if passed == stops.len() - 1 {
                assert_checksums(&packet);
            }
        }
    }

    /// A new source address changes the checksum, and a new next hop does not. This holds for a
    /// complete packet and for a first fragment.
    #[test]
    fn new_next_hop_does_not_change_the_transport_checksum(
        kind in kind(),
        stops in any::<[[u8; 16]; 2]>(),
        source in any::<[u8; 16]>(),
        hop in any::<[u8; 16]>(),
    ) {
        // Not UDP: its checksum 0 means that there is none.
        let sample = plain(!kind.is_ipv4(), SampleTransport::Tcp(Box::default()), b"hello");
        let mut packet = routed(&sample, kind, &stops, 0).bytes();
        complete_checksums(&mut packet).unwrap();
        let set = |packet: &[u8], source: Option<[u8; 16]>| {
            let mut edit = Edit::new(packet).unwrap();
            if kind.is_ipv4() {
                edit.set_destination_address(first4(hop)).unwrap();
                source.map(|source| edit.set_source_address(first4(source))).transpose().unwrap();
            } else {
                edit.set_destination_address(hop).unwrap();
                source.map(|source| edit.set_source_address(source)).transpose().unwrap();
            }
            ip_payload(&edit.finish()).to_vec()
        };
        prop_assert_eq!(set(&packet, None), ip_payload(&packet));
        let whole = set(&packet, Some(source));
        let mut fragment = packet.clone();
        if kind.is_ipv4() {
            fragment[6] |= 0x20;
        } else {
            // The fragment header follows the routing header.
            let at = packet.len() - ip_payload(&packet).len();
            fragment[40] = 44;
            fragment[5] += 8;
            fragment.splice(at..at, [6, 0, 0, 1, 0, 0, 0, 9]);
        }
        prop_assert_eq!(set(&fragment, None), ip_payload(&packet));
        prop_assert_eq!(set(&fragment, Some(source)), whole);
    }
}

#[test]
fn sum_with_the_next_hop_is_an_incomplete_checksum() {
    let mut received = Received::new();
    for kind in Kind::ALL {
        let stops = [[7; 16], [8; 16]];
        let sample = plain(!kind.is_ipv4(), SampleTransport::Udp(1, 2), b"hello");
        let mut packet = routed(&sample, kind, &stops, 0).bytes();
        let at = packet.len() - ip_payload(&packet).len() + 6;
        for (destination, is_partial) in [(stops[0], true), (stops[1], true), ([6; 16], false)] {
            let mut sample = sample.clone();
            match &mut sample.ip {
                IpHeaders::Ipv4(header, _) => header.destination = first4(destination),
                IpHeaders::Ipv6(header, _) => header.destination = destination,
            }
            packet[at..at + 2].copy_from_slice(&sample.partial_checksum());
            assert_eq!(received.is_incomplete(&packet), is_partial, "{kind:?}");
        }
    }
}

#[test]
fn checksum_covers_the_header_destination_if_options_are_malformed() {
    const HEADER: [u8; 4] = [10, 0, 0, 2];
    const FINAL: [u8; 4] = [5, 5, 5, 5];
    let cases: [(&[u8], [u8; 4]); 21] = [
        (&[131, 7, 4, 5, 5, 5, 5, 0], FINAL),
        // After other options, and before them.
        (&[7, 7, 4, 0, 0, 0, 0, 1, 137, 7, 4, 5, 5, 5, 5, 0], FINAL),
        (&[137, 7, 4, 5, 5, 5, 5, 1, 7, 7, 4, 0, 0, 0, 0, 0], FINAL),
        // The pointer points to the last address, and is not a multiple of 4.
        (&[131, 11, 8, 9, 9, 9, 9, 5, 5, 5, 5, 0], FINAL),
        (&[131, 8, 5, 9, 5, 5, 5, 5], FINAL),
        // The route is completed, or empty.
        (&[131, 7, 8, 5, 5, 5, 5, 0], HEADER),
        (&[131, 7, 255, 5, 5, 5, 5, 0], HEADER),
        (&[131, 3, 4, 0], HEADER),
        // The pointer points before the addresses.
        (&[131, 7, 3, 5, 5, 5, 5, 0], HEADER),
        (&[131, 7, 0, 5, 5, 5, 5, 0], HEADER),
        // The length is not a whole number of addresses.
        (&[131, 8, 4, 5, 5, 5, 5, 5], HEADER),
        (&[131, 7, 6, 5, 5, 5, 5, 0], HEADER),
        // The option is truncated.
        (&[1, 1, 1, 131], HEADER),
        (&[1, 1, 131, 7], HEADER),
        (&[131, 11, 4, 5, 5, 5, 5, 0], HEADER),
        // The length is invalid.
        (&[131, 0, 4, 5], HEADER),
        (&[131, 1, 131, 7, 4, 5, 5, 5, 5, 0, 0, 0], HEADER),
        // Two routes.
        (&[131, 7, 4, 5, 5, 5, 5, 137, 7, 4, 5, 5, 5, 5, 0, 0], HEADER),
        // Another option is malformed.
        (&[131, 7, 4, 5, 5, 5, 5, 68, 0, 0, 0, 0], HEADER),
        // The route is inside another option, or after the end of the options.
        (&[68, 10, 131, 7, 4, 5, 5, 5, 5, 0, 0, 0], HEADER),
        (&[0, 131, 7, 4, 5, 5, 5, 5], HEADER),
    ];
    for (options, covered) in cases {
        let mut sample = plain(false, SampleTransport::Udp(1, 2), b"hello");
        let mut destination = [0; 16];
        destination[..4].copy_from_slice(&covered);
        let expected = direct(&sample, false, destination);
        let IpHeaders::Ipv4(header, _) = &mut sample.ip else { unreachable!() };
        assert_eq!(header.destination, HEADER);
        header.options = options.try_into().unwrap();
        let packet = Edit::new(&sample.bytes()).unwrap().finish();
        assert_eq!(ip_payload(&packet), ip_payload(&expected), "{options:?}");
    }
}

#[test]
fn unknown_and_malformed_routing_headers_are_refused() {
    let list = |addresses: usize| vec![5; 16 * addresses];
    let header = |kind: u8, left: u8, last_entry: u8, rest: Vec<u8>| {
        [vec![17, (rest.len() / 8) as u8, kind, left, last_entry, 0, 0, 0], rest].concat()
    };
    let padding = vec![5, 6, 0, 0, 0, 0, 0, 0];
    for (header, is_known) in [
        (header(0, 1, 0, list(1)), true),
        (header(0, 3, 0, list(3)), true),
        (header(0, 4, 0, list(3)), false),
        (header(0, 1, 0, list(0)), false),
        (header(0, 1, 0, [list(1), padding.clone()].concat()), false),
        (header(2, 1, 0, list(1)), true),
        (header(2, 2, 0, list(1)), false),
        (header(2, 1, 0, list(2)), false),
        (header(4, 1, 1, list(2)), true),
        (header(4, 2, 1, list(2)), true),
        (header(4, 3, 1, list(2)), false),
        (header(4, 1, 2, list(2)), false),
        (header(4, 1, 0, list(0)), false),
        // TLVs may follow the list.
        (header(4, 1, 0, [list(1), padding].concat()), true),
        // Type 3 has compressed addresses. Type 253 is for experiments.
        (header(3, 1, 0, list(1)), false),
        (header(253, 1, 0, list(1)), false),
        // No segments are left.
        (header(253, 0, 0, list(1)), true),
    ] {
        let packet = super::damage::extended(43, &header);
        let mut edit = Edit::new(&packet).unwrap();
        assert_eq!(edit.payload_mut().is_ok(), is_known, "{header:?}");
        if !is_known {
            assert!(refusal(edit.payload_mut().map(drop)).contains("routing header"));
            assert!(refusal(complete_checksums(&mut packet.clone())).contains("routing header"));
            refusal(edit.set_destination_address([1; 16]));
            assert_eq!(edit.finish(), packet);
        }
    }
}
