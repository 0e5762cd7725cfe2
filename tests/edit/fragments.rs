//! In fragments, addresses can be changed, and ports and payload cannot.

use proptest::prelude::*;
use tokio_nfqueue::edit::{Edit, PacketView, complete_checksums};

use super::{
    first4, refusal,
    sample::{Sample, SampleTransport, plain, sample},
};

/// The fragments of a packet without options or extension headers, cut at `cut`, a multiple of 8.
fn cut(sample: &Sample, cut: usize) -> [Vec<u8>; 2] {
    let packet = sample.bytes();
    let (header, body) = packet.split_at(sample.ip.header_len());
    let (first, second) = body.split_at(cut);
    let offset = (cut as u16).to_be_bytes();
    [(first, [0, 0], true), (second, offset, false)].map(|(body, offset, more)| {
        let mut fragment = header.to_vec();
        if sample.is_ipv4() {
            // Flags (0x2000: more fragments), offset in units of 8.
            let field = u16::from_be_bytes(offset) >> 3 | if more { 0x2000 } else { 0 };
            fragment[6..8].copy_from_slice(&field.to_be_bytes());
            fragment[2..4].copy_from_slice(&((header.len() + body.len()) as u16).to_be_bytes());
        } else {
            fragment[6] = 44;
            fragment[4..6].copy_from_slice(&(8 + body.len() as u16).to_be_bytes());
            fragment.extend_from_slice(&[sample.protocol().0, 0, offset[0], offset[1] | u8::from(more), 0, 0, 0, 9]);
        }
        fragment.extend_from_slice(body);
        fragment
    })
}

fn body<'a>(fragment: &'a [u8], sample: &Sample) -> &'a [u8] {
    &fragment[if sample.is_ipv4() { 20 } else { 48 }..]
}

fn transports() -> impl Strategy<Value = Sample> {
    (any::<bool>(), sample()).prop_map(|(v6, sample)| {
        let payload = [&sample.payload[..], &[7; 100]].concat();
        plain(v6, sample.transport, &payload)
    })
}

proptest! {
    /// New addresses in all fragments give the same datagram as new addresses in the unfragmented
    /// packet.
    #[test]
    fn addresses_in_fragments_keep_the_checksum_correct(
        sample in transports(),
        source in any::<[u8; 16]>(),
        destination in any::<[u8; 16]>(),
    ) {
        let set = |packet: &[u8]| {
            let mut edit = Edit::new(packet).unwrap();
            if sample.is_ipv4() {
                edit.set_source_address(first4(source)).unwrap();
                edit.set_destination_address(first4(destination)).unwrap();
            } else {
                edit.set_source_address(source).unwrap();
                edit.set_destination_address(destination).unwrap();
            }
            edit.finish()
        };
        let whole = set(&sample.bytes());
        let parts = cut(&sample, 64).map(|fragment| set(&fragment));
        let mut joined = [body(&parts[0], &sample), body(&parts[1], &sample)].concat();
        let at = sample.checksum_at() - sample.ip.header_len();
        let expected = &whole[sample.ip.header_len()..];
        // The receiver treats 0 and 0xffff as equal. An updated checksum can be either of them.
        if joined[at..at + 2] == [0, 0] || joined[at..at + 2] == [0xff, 0xff] {
            joined[at..at + 2].copy_from_slice(&expected[at..at + 2]);
        }
        prop_assert_eq!(joined, expected);
    }
}

#[test]
fn fragments_refuse_transport_changes() {
    for v6 in [false, true] {
        let sample = plain(v6, SampleTransport::Udp(1, 2), &[7; 100]);
        for fragment in cut(&sample, 64) {
            assert!(PacketView::new(&fragment).unwrap().is_fragment());
            let mut edit = Edit::new(&fragment).unwrap();
            for text in [
                refusal(edit.set_source_port(1)),
                refusal(edit.replace_payload(b"other")),
                refusal(edit.payload_mut().map(|_| ())),
                refusal(edit.splice_ip_payload(..1, b"x")),
                refusal(complete_checksums(&mut fragment.clone())),
            ] {
                assert!(text.ends_with("the packet is a fragment"), "{text}");
            }
            // Fields of the IP header can be changed. The rest stays unchanged.
            edit.set_ttl(3);
            edit.set_tos(0xb8);
            assert_eq!(body(&edit.finish(), &sample), body(&fragment, &sample));
        }
    }
}

#[test]
fn first_fragment_with_an_incomplete_header_is_refused() {
    let tcp = SampleTransport::Tcp(Box::new(etherparse::TcpHeader::new(1, 2, 3, 4)));
    let [first, second] = cut(&plain(false, tcp, b"text"), 16);
    refusal(Edit::new(&first).unwrap().set_source_address([10, 0, 0, 9]));
    Edit::new(&second).unwrap().set_source_address([10, 0, 0, 9]).unwrap();
}
