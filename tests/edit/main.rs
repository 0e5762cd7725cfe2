//! Edits of packets: they are compared with packets that etherparse writes, and malformed packets
//! are refused.

mod damage;
mod fragments;
mod received;
mod replies;
mod routes;
mod sample;
mod special_cases;

use std::cell::RefCell;

use etherparse::IpDscp;
use proptest::prelude::*;

use tokio_nfqueue::{
    Error, ErrorKind,
    edit::{Edit, complete_checksums},
};

use self::{
    received::Received,
    sample::{Sample, SampleTransport, sample},
};

/// The changes that a test makes to a packet.
#[derive(Debug, Clone)]
struct Change {
    addresses: Option<([u8; 16], [u8; 16])>,
    ports: Option<(u16, u16)>,
    ttl: Option<u8>,
    tos: Option<u8>,
    payload: Option<(usize, usize, Vec<u8>)>,
}

fn change() -> impl Strategy<Value = Change> {
    let payload = (any::<usize>(), any::<usize>(), prop::collection::vec(any::<u8>(), 0..80));
    (
        any::<Option<([u8; 16], [u8; 16])>>(),
        any::<Option<(u16, u16)>>(),
        any::<Option<u8>>(),
        any::<Option<u8>>(),
        prop::option::of(payload),
    )
        .prop_map(|(addresses, ports, ttl, tos, payload)| Change { addresses, ports, ttl, tos, payload })
}

impl Change {
    /// Changes the packet with the crate.
    fn apply(&self, edit: &mut Edit) -> Result<(), Error> {
        if let Some((source, destination)) = self.addresses {
            if edit.view().is_ipv4() {
                edit.set_source_address(first4(source))?;
                edit.set_destination_address(first4(destination))?;
            } else {
                edit.set_source_address(source)?;
                edit.set_destination_address(destination)?;
            }
        }
        if let Some((source, destination)) = self.ports
            && edit.view().source_port().is_some()
        {
            edit.set_source_port(source)?;
            edit.set_destination_port(destination)?;
        }
        if let Some(ttl) = self.ttl {
            edit.set_ttl(ttl);
        }
        if let Some(tos) = self.tos {
            edit.set_tos(tos);
        }
        if let Some((start, length, with)) = &self.payload {
            let payload = edit.view().payload().map_or(0, <[u8]>::len);
            let start = start % (payload + 1);
            let end = start + length % (payload - start + 1);
            edit.splice_payload(start..end, with)?;
        }
        Ok(())
    }

    /// Makes the same changes to the headers of a sample, before it is written.
    fn apply_to(&self, sample: &mut Sample) {
        if let Some((source, destination)) = self.addresses {
            match &mut sample.ip {
                etherparse::IpHeaders::Ipv4(header, _) => {
                    (header.source, header.destination) = (first4(source), first4(destination));
                }
                etherparse::IpHeaders::Ipv6(header, _) => (header.source, header.destination) = (source, destination),
            }
        }
        if let Some(ports) = self.ports {
            match &mut sample.transport {
                SampleTransport::Tcp(tcp) => (tcp.source_port, tcp.destination_port) = ports,
                SampleTransport::Udp(source, destination) => (*source, *destination) = ports,
                SampleTransport::Icmp(..) => {}
            }
        }
        match &mut sample.ip {
            etherparse::IpHeaders::Ipv4(header, _) => {
                header.time_to_live = self.ttl.unwrap_or(header.time_to_live);
                if let Some(tos) = self.tos {
                    header.dscp = IpDscp::try_new(tos >> 2).unwrap();
                    header.ecn = etherparse::IpEcn::try_new(tos & 3).unwrap();
                }
            }
            etherparse::IpHeaders::Ipv6(header, _) => {
                header.hop_limit = self.ttl.unwrap_or(header.hop_limit);
                header.traffic_class = self.tos.unwrap_or(header.traffic_class);
            }
        }
        if let Some((start, length, with)) = &self.payload {
            let payload = sample.payload.len();
            let start = start % (payload + 1);
            let end = start + length % (payload - start + 1);
            sample.payload.splice(start..end, with.iter().copied());
        }
    }
}

fn first4(octets: [u8; 16]) -> [u8; 4] {
    [octets[0], octets[1], octets[2], octets[3]]
}

proptest! {
    /// An edited packet equals the packet that etherparse writes from the same changed headers,
    /// byte for byte: lengths, checksums, and all unchanged fields.
    #[test]
    fn edited_packet_equals_newly_written_packet(
        sample in sample(),
        change in change(),
        checksums in any::<[u8; 4]>(),
    ) {
        let mut packet = sample.bytes();
        sample.spoil_checksums(&mut packet, checksums);
        // Short frames have such padding.
        packet.extend_from_slice(&[0xee; 3]);
        let mut edit = Edit::new(&packet).unwrap();
        change.apply(&mut edit).unwrap();

        let mut expected = sample;
        change.apply_to(&mut expected);
        prop_assert_eq!(edit.view().payload(), Some(&expected.payload[..]));
        prop_assert_eq!(edit.finish(), expected.bytes());
    }

    /// The checksums are correct when etherparse checks them.
    #[test]
    fn complete_checksums_are_correct(sample in sample(), checksums in any::<[u8; 4]>()) {
        let expected = sample.bytes();
        let mut packet = expected.clone();
        sample.spoil_checksums(&mut packet, checksums);
        complete_checksums(&mut packet).unwrap();
        prop_assert_eq!(&packet, &expected);
        sample::assert_checksums(&packet);
    }

    /// `splice_ip_payload` can change the bytes of transport headers.
    #[test]
    fn ip_payload_can_be_spliced(sample in sample(), window in any::<[u8; 2]>()) {
        let mut edit = Edit::new(&sample.bytes()).unwrap();
        let mut expected = sample.clone();
        match &mut expected.transport {
            SampleTransport::Tcp(tcp) => {
                edit.splice_ip_payload(14..16, &window).unwrap();
                tcp.window_size = u16::from_be_bytes(window);
            }
            SampleTransport::Udp(..) => {
                // The test itself writes the UDP length of the shorter datagram.
                let length = (8 + 1_u16).to_be_bytes();
                let new = [&edit.view().ip_payload()[..4], &length, &[0xff, 0xff, window[0]]].concat();
                edit.splice_ip_payload(.., &new).unwrap();
                expected.payload = vec![window[0]];
            }
            SampleTransport::Icmp(..) => {
                edit.splice_ip_payload(8.., &window).unwrap();
                expected.payload = window.to_vec();
            }
        }
        prop_assert_eq!(edit.finish(), expected.bytes());
    }
}

/// The sum of the pseudo header is recognised as an incomplete checksum.
#[test]
fn incomplete_checksums_are_recognised() {
    let received = RefCell::new(Received::new());
    proptest!(|(sample in sample(), with in any::<[u8; 2]>())| {
        let mut packet = sample.bytes();
        let at = sample.checksum_at();
        let partial = sample.partial_checksum();
        packet[at..at + 2].copy_from_slice(&partial);
        let has_ports = !matches!(sample.transport, SampleTransport::Icmp(..));
        prop_assert_eq!(received.borrow_mut().is_incomplete(&packet), has_ports);
        packet[at..at + 2].copy_from_slice(&with);
        prop_assert_eq!(received.borrow_mut().is_incomplete(&packet), has_ports && with == partial);
    });
}

/// Checks the kind of the error and returns its text.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    let error = result.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    error.to_string()
}
