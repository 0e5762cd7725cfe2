//! Decodes the connection tracking entry that the kernel sends with a packet, and encodes changes
//! to it.

use std::{net::IpAddr, time::Duration};

use netlink_packet_core::{NlaBuffer, NlasIterator, Parseable};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, IPTuple, ProtoTuple, Status, Tuple};

use super::writer::put_attribute;

/// The connection tracking entry of a packet, from `Packet::conntrack`.
///
/// Fields that the kernel did not send are `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Conntrack {
    /// The original direction: the direction of the first packet.
    pub original: Flow,
    /// The reply direction. With address translation (NAT), it is not the exact reverse of
    /// `original`.
    pub reply: Flow,
    /// The status bits of the entry.
    pub status: Option<ConntrackStatus>,
    /// The mark of the entry (`ct mark`). If the mark is 0, some kernels send 0 and others send
    /// nothing.
    pub mark: Option<u32>,
    /// The labels of the entry, 128 bits. On little-endian machines, label 0 is the lowest bit of
    /// the first byte. The kernel does not send them if no label is set.
    pub labels: Option<[u8; 16]>,
    /// The time until the entry expires.
    pub timeout: Option<Duration>,
    /// The id of the entry.
    pub id: Option<u32>,
    /// The zone of the entry. The kernel does not send it if it is 0.
    pub zone: Option<u16>,
    /// The name of the helper, which finds the connections to expect from this one.
    pub helper: Option<String>,
    /// The original direction of the master connection, from which this connection was expected.
    pub master: Option<Flow>,
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Flow {
    /// The source address.
    pub source: Option<IpAddr>,
    /// The destination address.
    pub destination: Option<IpAddr>,
    /// The number of the transport protocol, as in the IP header.
    pub protocol: Option<u8>,
    /// The source port, if the protocol has ports.
    pub source_port: Option<u16>,
    /// The destination port, if the protocol has ports.
    pub destination_port: Option<u16>,
}

/// The status bits of a connection tracking entry (`IPS_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConntrackStatus(Status);

impl ConntrackStatus {
    /// All status bits, in the layout of `enum ip_conntrack_status`.
    pub fn bits(self) -> u32 {
        self.0.bits()
    }

    /// Whether the connection was expected from another connection.
    #[doc(alias = "IPS_EXPECTED")]
    pub fn is_expected(self) -> bool {
        self.0.contains(Status::Expected)
    }

    /// Whether packets were seen in both directions.
    #[doc(alias = "IPS_SEEN_REPLY")]
    pub fn has_seen_reply(self) -> bool {
        self.0.contains(Status::SeenReply)
    }

    /// Whether the kernel keeps the entry until its timeout. It may remove entries without this bit
    /// earlier.
    #[doc(alias = "IPS_ASSURED")]
    pub fn is_assured(self) -> bool {
        self.0.contains(Status::Assured)
    }

    /// Whether the entry is in the connection tracking table. It enters the table when its first
    /// packet leaves the host or reaches its socket.
    #[doc(alias = "IPS_CONFIRMED")]
    pub fn is_confirmed(self) -> bool {
        self.0.contains(Status::Confirmed)
    }

    /// Whether the source is translated (SNAT).
    #[doc(alias = "IPS_SRC_NAT")]
    pub fn is_source_nat(self) -> bool {
        self.0.contains(Status::SrcNat)
    }

    /// Whether the destination is translated (DNAT).
    #[doc(alias = "IPS_DST_NAT")]
    pub fn is_destination_nat(self) -> bool {
        self.0.contains(Status::DstNat)
    }
}

/// How a packet relates to its connection (`enum ip_conntrack_info`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConntrackState {
    /// Part of an established connection, in the original direction.
    Established,
    /// Related to a connection (an ICMP error, an expected connection), in the original direction.
    Related,
    /// The first packet of a connection, or a later packet before the first reply.
    New,
    /// Part of an established connection, in the reply direction.
    EstablishedReply,
    /// Related to a connection, in the reply direction.
    RelatedReply,
    /// Excluded from connection tracking (`notrack`).
    Untracked,
    /// Any other value of `enum ip_conntrack_info`.
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

impl Conntrack {
    /// Decodes the attributes in `NFQA_CT`, and skips malformed ones.
    #[doc(hidden)]
    pub fn decode(attributes: &[u8]) -> Self {
        let mut entry = Self::default();
        for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
            match (attribute.kind(), raw(&attribute)) {
                (CTA_ID, value) => entry.id = value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)),
                (CTA_ZONE, value) => entry.zone = value.first_chunk().map(|bytes| u16::from_be_bytes(*bytes)),
                (CTA_LABELS, value) => entry.labels = value.first_chunk().copied(),
                (CTA_HELP, value) => entry.helper = helper_name(value),
                (CTA_TUPLE_MASTER, value) => entry.master = Some(Flow::decode(value)),
                _ => entry.decode_attribute(&attribute),
            }
        }
        entry
    }

    fn decode_attribute(&mut self, attribute: &NlaBuffer<&[u8]>) {
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

/// Encodes changes to a connection tracking entry, as the attributes in `NFQA_CT`
/// (`ctnetlink_glue_parse_ct`).
///
/// `mark` and `labels` are a value and a mask. The mask has the bits to change.
pub fn encode_changes(
    mark: Option<(u32, u32)>,
    labels: Option<([u8; 16], [u8; 16])>,
    timeout_seconds: Option<u32>,
) -> Vec<u8> {
    // enum ctattr_type
    const TIMEOUT: u16 = 7;
    const MARK: u16 = 8;
    const MARK_MASK: u16 = 21;
    const LABELS: u16 = 22;
    const LABELS_MASK: u16 = 23;

    let mut nested = Vec::new();
    if let Some(seconds) = timeout_seconds {
        put_attribute(&mut nested, TIMEOUT, &seconds.to_be_bytes());
    }
    if let Some((value, mask)) = mark {
        // The kernel inverts bits that are in the value but not in the mask
        // (`ctnetlink_change_mark`).
        put_attribute(&mut nested, MARK, &(value & mask).to_be_bytes());
        put_attribute(&mut nested, MARK_MASK, &mask.to_be_bytes());
    }
    if let Some((value, mask)) = labels {
        // The kernel inverts label bits in the same case (`nf_connlabels_replace`).
        let value: [u8; 16] = std::array::from_fn(|byte| value[byte] & mask[byte]);
        put_attribute(&mut nested, LABELS, &value);
        put_attribute(&mut nested, LABELS_MASK, &mask);
    }
    nested
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

/// The bytes of an attribute. Empty if the attribute is malformed.
fn raw<'a>(attribute: &NlaBuffer<&'a [u8]>) -> &'a [u8] {
    let length = usize::from(attribute.length());
    attribute.into_inner().get(4..length).unwrap_or(&[])
}

// enum ctattr_type: the attributes that netlink-packet-netfilter does not decode.
const CTA_HELP: u16 = 5;
const CTA_ID: u16 = 12;
const CTA_TUPLE_MASTER: u16 = 14;
const CTA_ZONE: u16 = 18;
const CTA_LABELS: u16 = 22;

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
    fn entry_is_decoded() {
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

    #[test]
    fn changes_are_encoded_within_their_masks() {
        let nested = encode_changes(Some((0x101, 0xff)), Some(([6; 16], [3; 16])), Some(60));
        assert_eq!(nested.len(), 8 + 8 + 8 + 20 + 20);
        assert_eq!(nested[12..16], [0, 0, 0, 1], "bits outside the mask must not be sent");
        assert_eq!(nested[28..44], [2; 16]);
        assert!(encode_changes(None, None, None).is_empty());
    }

    proptest! {
        #[test]
        fn damaged_entry_does_not_panic(
            at in prop::collection::vec((0usize..200, any::<u8>()), 0..8),
            cut in 0usize..200,
        ) {
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
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Conntrack::decode(&bytes);
        }
    }
}
