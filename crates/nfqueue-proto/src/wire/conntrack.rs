//! Decodes the connection tracking entry that the kernel sends with a packet, and encodes changes
//! to it.

use std::{fmt, time::Duration};

use super::{
    packet::{find, find_be32},
    tuple,
    writer::put_attribute,
};
use crate::types::{ConnectionState, Direction, FlowTuple};

/// The connection tracking entry of a packet, from `Packet::conntrack`.
///
/// Fields that the kernel did not send are `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Conntrack {
    /// The original direction: the direction of the first packet.
    pub original: Option<FlowTuple>,
    /// The reply direction. With address translation (NAT), it is not the exact reverse of
    /// `original`.
    pub reply: Option<FlowTuple>,
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
    pub master: Option<FlowTuple>,
}

/// The status bits of a connection tracking entry (`IPS_*`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ConntrackStatus(u32);

impl ConntrackStatus {
    /// All status bits, in the layout of `enum ip_conntrack_status`.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Whether the connection was expected from another connection.
    #[doc(alias = "IPS_EXPECTED")]
    pub fn is_expected(self) -> bool {
        self.0 & 1 << 0 != 0
    }

    /// Whether packets were seen in both directions.
    #[doc(alias = "IPS_SEEN_REPLY")]
    pub fn has_seen_reply(self) -> bool {
        self.0 & 1 << 1 != 0
    }

    /// Whether the kernel keeps the entry until its timeout. It may remove entries without this bit
    /// earlier.
    #[doc(alias = "IPS_ASSURED")]
    pub fn is_assured(self) -> bool {
        self.0 & 1 << 2 != 0
    }

    /// Whether the entry is in the connection tracking table. It enters the table when its first
    /// packet leaves the host or reaches its socket.
    #[doc(alias = "IPS_CONFIRMED")]
    pub fn is_confirmed(self) -> bool {
        self.0 & 1 << 3 != 0
    }

    /// Whether the source is translated (SNAT).
    #[doc(alias = "IPS_SRC_NAT")]
    pub fn is_source_nat(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    /// Whether the destination is translated (DNAT).
    #[doc(alias = "IPS_DST_NAT")]
    pub fn is_destination_nat(self) -> bool {
        self.0 & 1 << 5 != 0
    }
}

/// Decodes `NFQA_CT_INFO` (`enum ip_conntrack_info`). There is no direction without a connection.
pub fn decode_info(number: u32) -> (ConnectionState, Option<Direction>) {
    match number {
        0 => (ConnectionState::Established, Some(Direction::Original)),
        1 => (ConnectionState::Related, Some(Direction::Original)),
        2 => (ConnectionState::New, Some(Direction::Original)),
        3 => (ConnectionState::Established, Some(Direction::Reply)),
        4 => (ConnectionState::Related, Some(Direction::Reply)),
        7 => (ConnectionState::Untracked, None),
        other => (ConnectionState::Other(other), None),
    }
}

impl Conntrack {
    /// Decodes the attributes in `NFQA_CT`, and skips malformed ones.
    #[doc(hidden)]
    pub fn decode(attributes: &[u8]) -> Self {
        let be32 = |kind| find_be32(attributes, kind);
        Self {
            original: find(attributes, CTA_TUPLE_ORIG).and_then(tuple::decode),
            reply: find(attributes, CTA_TUPLE_REPLY).and_then(tuple::decode),
            status: be32(CTA_STATUS).map(ConntrackStatus),
            mark: be32(CTA_MARK),
            labels: find(attributes, CTA_LABELS).and_then(|labels| labels.first_chunk().copied()),
            timeout: be32(CTA_TIMEOUT).map(|seconds| Duration::from_secs(seconds.into())),
            id: be32(CTA_ID),
            zone: find(attributes, CTA_ZONE).and_then(|zone| zone.first_chunk().copied()).map(u16::from_be_bytes),
            helper: find(attributes, CTA_HELP).and_then(helper_name),
            master: find(attributes, CTA_TUPLE_MASTER).and_then(tuple::decode),
        }
    }
}

impl fmt::Debug for ConntrackStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConntrackStatus({:#x})", self.0)
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
    let mut nested = Vec::new();
    if let Some(seconds) = timeout_seconds {
        put_attribute(&mut nested, CTA_TIMEOUT, &seconds.to_be_bytes());
    }
    if let Some((value, mask)) = mark {
        // The kernel inverts bits that are in the value but not in the mask
        // (`ctnetlink_change_mark`).
        put_attribute(&mut nested, CTA_MARK, &(value & mask).to_be_bytes());
        put_attribute(&mut nested, CTA_MARK_MASK, &mask.to_be_bytes());
    }
    if let Some((value, mask)) = labels {
        // The kernel inverts label bits in the same case (`nf_connlabels_replace`).
        let value: [u8; 16] = std::array::from_fn(|byte| value[byte] & mask[byte]);
        put_attribute(&mut nested, CTA_LABELS, &value);
        put_attribute(&mut nested, CTA_LABELS_MASK, &mask);
    }
    nested
}

fn helper_name(attributes: &[u8]) -> Option<String> {
    const CTA_HELP_NAME: u16 = 1;
    let name = find(attributes, CTA_HELP_NAME)?;
    let name = name.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

// enum ctattr_type of uapi/linux/netfilter/nfnetlink_conntrack.h
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_HELP: u16 = 5;
const CTA_TIMEOUT: u16 = 7;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_TUPLE_MASTER: u16 = 14;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_LABELS: u16 = 22;
const CTA_LABELS_MASK: u16 = 23;

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
        let flow = FlowTuple::udp(([10, 0, 0, 1], 53), ([10, 0, 0, 2], 8080));
        assert_eq!((entry.original, entry.reply), (Some(flow), None));
        let status = entry.status.unwrap();
        assert!(status.has_seen_reply() && status.is_confirmed() && !status.is_assured());
        assert_eq!((entry.timeout, entry.mark), (Some(Duration::from_secs(30)), Some(256)));
        assert_eq!((entry.helper.as_deref(), entry.master), (Some("tftp"), Some(flow)));
        assert_eq!((entry.id, entry.zone, entry.labels), (Some(0x0102_0304), Some(5), Some([7; 16])));
    }

    #[test]
    fn unknown_states_are_visible() {
        let states = [0, 1, 2, 3, 4, 7].map(decode_info);
        assert!(states.iter().all(|(state, _)| !matches!(state, ConnectionState::Other(_))));
        assert_eq!(
            states.map(|(_, direction)| direction == Some(Direction::Reply)),
            [false, false, false, true, true, false]
        );
        for number in [5, 6, 8, u32::MAX] {
            assert_eq!(decode_info(number), (ConnectionState::Other(number), None));
        }
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
