//! A packet's connection tracking entry, as the kernel sends it beside the packet.

use std::{net::IpAddr, time::Duration};

use netlink_packet_core::{NlaBuffer, NlasIterator, Parseable};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, IPTuple, ProtoTuple, Status, Tuple};

/// The connection tracking entry of a packet: [`Packet::conntrack`](crate::Packet::conntrack).
///
/// What the kernel did not send is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Conntrack {
    /// The flow as its first packet went.
    pub original: Flow,
    /// The flow as answers come; not merely turned round where addresses are translated.
    pub reply: Flow,
    /// The entry's status bits.
    pub status: Option<ConntrackStatus>,
    /// The entry's mark (`ct mark`). Where it is 0 some kernels send that, others nothing.
    pub mark: Option<u32>,
    /// The entry's labels, 128 bits, the first label being the lowest bit of the first byte on little-endian machines. Not
    /// sent where none is set.
    pub labels: Option<[u8; 16]>,
    /// How long until the entry expires.
    pub timeout: Option<Duration>,
    /// The entry's id.
    pub id: Option<u32>,
    /// The entry's zone. Not sent where it is 0.
    pub zone: Option<u16>,
    /// The helper that looks for connections to be expected, by name.
    pub helper: Option<String>,
    /// The connection that this one was expected from, as its first packet went.
    pub master: Option<Flow>,
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Flow {
    /// Where it comes from.
    pub source: Option<IpAddr>,
    /// Where it goes to.
    pub destination: Option<IpAddr>,
    /// The transport protocol's number in the IP header.
    pub protocol: Option<u8>,
    /// The port it comes from, where the protocol has ports.
    pub source_port: Option<u16>,
    /// The port it goes to, where the protocol has ports.
    pub destination_port: Option<u16>,
}

/// Status bits of a connection tracking entry (`IPS_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConntrackStatus(Status);

impl ConntrackStatus {
    /// All bits, as `enum ip_conntrack_status` numbers them.
    pub fn bits(self) -> u32 {
        self.0.bits()
    }

    /// An expected connection.
    #[doc(alias = "IPS_EXPECTED")]
    pub fn is_expected(self) -> bool {
        self.0.contains(Status::Expected)
    }

    /// Packets have been seen both ways.
    #[doc(alias = "IPS_SEEN_REPLY")]
    pub fn has_seen_reply(self) -> bool {
        self.0.contains(Status::SeenReply)
    }

    /// The entry is not expired early.
    #[doc(alias = "IPS_ASSURED")]
    pub fn is_assured(self) -> bool {
        self.0.contains(Status::Assured)
    }

    /// The entry is in the table: its first packet has left the host or reached its socket.
    #[doc(alias = "IPS_CONFIRMED")]
    pub fn is_confirmed(self) -> bool {
        self.0.contains(Status::Confirmed)
    }

    /// The source is translated.
    #[doc(alias = "IPS_SRC_NAT")]
    pub fn is_source_nat(self) -> bool {
        self.0.contains(Status::SrcNat)
    }

    /// The destination is translated.
    #[doc(alias = "IPS_DST_NAT")]
    pub fn is_destination_nat(self) -> bool {
        self.0.contains(Status::DstNat)
    }
}

/// How a packet relates to its connection (`enum ip_conntrack_info`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConntrackState {
    /// Of an established connection, in the original direction.
    Established,
    /// Related to a connection (an ICMP error, an expected connection), in the original direction.
    Related,
    /// The first of a connection, or one before any answer.
    New,
    /// Of an established connection, in the reply direction.
    EstablishedReply,
    /// Related to a connection, in the reply direction.
    RelatedReply,
    /// Exempt from connection tracking.
    Untracked,
    /// Any other number.
    Other(u32),
}

impl From<u32> for ConntrackState {
    fn from(number: u32) -> Self {
        match number {
            0 => Self::Established,
            1 => Self::Related,
            2 => Self::New,
            3 => Self::EstablishedReply,
            4 => Self::RelatedReply,
            7 => Self::Untracked,
            other => Self::Other(other),
        }
    }
}

// enum ctattr_type, what netlink-packet-netfilter leaves to `Other`.
const CTA_HELP: u16 = 5;
const CTA_ID: u16 = 12;
const CTA_TUPLE_MASTER: u16 = 14;
const CTA_ZONE: u16 = 18;
const CTA_LABELS: u16 = 22;

impl Conntrack {
    /// Decodes the inside of `NFQA_CT`. What is malformed is left out.
    pub(crate) fn decode(attributes: &[u8]) -> Self {
        let mut entry = Self::default();
        for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
            match (attribute.kind(), raw(&attribute)) {
                (CTA_ID, value) => entry.id = value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)),
                (CTA_ZONE, value) => entry.zone = value.first_chunk().map(|bytes| u16::from_be_bytes(*bytes)),
                (CTA_LABELS, value) => entry.labels = value.first_chunk().copied(),
                (CTA_HELP, value) => entry.helper = helper_name(value),
                (CTA_TUPLE_MASTER, value) => entry.master = Some(Flow::decode(value)),
                _ => entry.take(&attribute),
            }
        }
        entry
    }

    fn take(&mut self, attribute: &NlaBuffer<&[u8]>) {
        match ConntrackAttribute::parse(attribute) {
            Ok(ConntrackAttribute::CtaTupleOrig(tuple)) => self.original = Flow::new(&tuple),
            Ok(ConntrackAttribute::CtaTupleReply(tuple)) => self.reply = Flow::new(&tuple),
            Ok(ConntrackAttribute::CtaStatus(status)) => self.status = Some(ConntrackStatus(status)),
            Ok(ConntrackAttribute::CtaMark(mark)) => self.mark = Some(mark),
            Ok(ConntrackAttribute::CtaTimeout(seconds)) => self.timeout = Some(Duration::from_secs(seconds.into())),
            _ => {}
        }
    }
}

fn helper_name(attributes: &[u8]) -> Option<String> {
    const CTA_HELP_NAME: u16 = 1;
    let mut attributes = NlasIterator::new(attributes).map_while(Result::ok);
    let name = raw(&attributes.find(|attribute| attribute.kind() == CTA_HELP_NAME)?);
    let name = name.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

impl Flow {
    fn decode(attributes: &[u8]) -> Self {
        let parts = NlasIterator::new(attributes).map_while(Result::ok);
        Self::new(&parts.filter_map(|part| Tuple::parse(&part).ok()).collect::<Vec<_>>())
    }

    fn new(tuple: &[Tuple]) -> Self {
        let mut flow = Self::default();
        for part in tuple {
            match part {
                Tuple::Ip(addresses) => addresses.iter().for_each(|address| match address {
                    IPTuple::SourceAddress(address) => flow.source = Some(*address),
                    IPTuple::DestinationAddress(address) => flow.destination = Some(*address),
                    _ => {}
                }),
                Tuple::Proto(parts) => parts.iter().for_each(|part| match part {
                    ProtoTuple::Protocol(protocol) => flow.protocol = Some((*protocol).into()),
                    ProtoTuple::SourcePort(port) => flow.source_port = Some(*port),
                    ProtoTuple::DestinationPort(port) => flow.destination_port = Some(*port),
                    _ => {}
                }),
                _ => {}
            }
        }
        flow
    }
}

fn raw<'a>(attribute: &NlaBuffer<&'a [u8]>) -> &'a [u8] {
    let length = usize::from(attribute.length());
    attribute.into_inner().get(4..length).unwrap_or(&[])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn entry() -> Vec<u8> {
        let addresses = [attribute(1, &[10, 0, 0, 1]), attribute(2, &[10, 0, 0, 2])].concat();
        let ports = [attribute(1, &[17]), attribute(2, &[0, 53]), attribute(3, &[0x1f, 0x90])].concat();
        let tuple = [attribute(0x8001, &addresses), attribute(0x8002, &ports)].concat();
        [
            attribute(0x8001, &tuple),
            attribute(3, &[0, 0, 0, 0b1010]),
            attribute(7, &[0, 0, 0, 30]),
            attribute(8, &[0, 0, 1, 0]),
            attribute(12, &[1, 2, 3, 4]),
            attribute(18, &[0, 5]),
            attribute(0x8005, &[attribute(1, b"tftp\0"), attribute(2, b"?")].concat()),
            attribute(0x800e, &tuple),
            attribute(22, &[7; 16]),
        ]
        .concat()
    }

    #[test]
    fn an_entry() {
        let entry = Conntrack::decode(&entry());
        let flow = Flow {
            source: Some([10, 0, 0, 1].into()),
            destination: Some([10, 0, 0, 2].into()),
            protocol: Some(17),
            source_port: Some(53),
            destination_port: Some(8080),
        };
        assert_eq!((entry.original, entry.reply), (flow, Flow::default()));
        let status = entry.status.unwrap();
        assert!(status.has_seen_reply() && status.is_confirmed() && !status.is_assured());
        assert_eq!((entry.timeout, entry.mark), (Some(Duration::from_secs(30)), Some(256)));
        assert_eq!((entry.helper.as_deref(), entry.master), (Some("tftp"), Some(flow)));
        assert_eq!((entry.id, entry.zone, entry.labels), (Some(0x0102_0304), Some(5), Some([7; 16])));
    }

    proptest! {
        #[test]
        fn damage_is_left_out(at in prop::collection::vec((0usize..200, any::<u8>()), 0..8), cut in 0usize..200) {
            let mut bytes = entry();
            for (index, value) in at {
                if let Some(byte) = bytes.get_mut(index) {
                    *byte = value;
                }
            }
            bytes.truncate(cut);
            let _ = Conntrack::decode(&bytes);
        }

        #[test]
        fn noise_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Conntrack::decode(&bytes);
        }
    }
}
