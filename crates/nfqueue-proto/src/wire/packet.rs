//! Decodes packet messages. One pass decodes the fields that are always needed. Other attributes
//! stay bytes until they are requested.

use std::{ops::Range, time::Duration};

use netlink_packet_core::{NLA_HEADER_SIZE, NlaBuffer};

use super::{NETFILTER_HEADER, align};
use crate::types::Vlan;

/// The attributes of packets (`enum nfqnl_attr_type`), all of them: a new accessor needs no new
/// constant.
pub mod attribute {
    /// `NFQA_PACKET_HDR`: packet id, EtherType, hook.
    pub const PACKET_HEADER: u16 = 1;
    /// `NFQA_MARK`
    pub const MARK: u16 = 3;
    /// `NFQA_TIMESTAMP`; see [`timestamp`](super::timestamp).
    pub const TIMESTAMP: u16 = 4;
    /// `NFQA_IFINDEX_INDEV`
    pub const INTERFACE_IN: u16 = 5;
    /// `NFQA_IFINDEX_OUTDEV`
    pub const INTERFACE_OUT: u16 = 6;
    /// `NFQA_IFINDEX_PHYSINDEV`: the bridge port of arrival.
    pub const PHYSICAL_IN: u16 = 7;
    /// `NFQA_IFINDEX_PHYSOUTDEV`: the bridge port of departure.
    pub const PHYSICAL_OUT: u16 = 8;
    /// `NFQA_HWADDR`; see [`hardware_address`](super::hardware_address).
    pub const HARDWARE_ADDRESS: u16 = 9;
    /// `NFQA_PAYLOAD`
    pub const PAYLOAD: u16 = 10;
    /// `NFQA_CT`: nested attributes of connection tracking (`CTA_*`).
    pub const CONNTRACK: u16 = 11;
    /// `NFQA_CT_INFO` (`enum ip_conntrack_info`)
    pub const CONNTRACK_INFO: u16 = 12;
    /// `NFQA_CAP_LEN`: the length of a packet that was not copied whole, in bytes.
    pub const CAPTURED_LENGTH: u16 = 13;
    /// `NFQA_SKB_INFO`: checksum and segmentation offload (`NFQA_SKB_*`).
    pub const OFFLOAD: u16 = 14;
    /// `NFQA_EXP`: nested attributes of an expectation (`CTA_EXPECT_*`).
    pub const EXPECTATION: u16 = 15;
    /// `NFQA_UID`
    pub const UID: u16 = 16;
    /// `NFQA_GID`
    pub const GID: u16 = 17;
    /// `NFQA_SECCTX`
    pub const SECURITY_CONTEXT: u16 = 18;
    /// `NFQA_VLAN`: nested attributes; see [`vlan`](super::vlan).
    pub const VLAN: u16 = 19;
    /// `NFQA_L2HDR`: the link-layer header.
    pub const LAYER2_HEADER: u16 = 20;
    /// `NFQA_PRIORITY`
    pub const PRIORITY: u16 = 21;
    /// `NFQA_CGROUP_CLASSID`
    pub const CGROUP_CLASS_ID: u16 = 22;
    // enum nfqnl_vlan_attr
    /// `NFQA_VLAN_PROTO`, in `NFQA_VLAN`.
    pub const VLAN_PROTOCOL: u16 = 1;
    /// `NFQA_VLAN_TCI`, in `NFQA_VLAN`.
    pub const VLAN_CONTROL: u16 = 2;
}

/// The fields that every packet message has, and where the attributes and the payload are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketMessage {
    /// The packet id.
    pub id: u32,
    /// The number of the queue.
    pub queue: u16,
    /// `NFPROTO_*`
    pub family: u8,
    /// The EtherType.
    pub hw_protocol: u16,
    /// The number of the hook in the family.
    pub hook: u8,
    /// The range of the attributes in the datagram.
    pub attributes: Range<usize>,
    /// The range of the payload in the datagram. Empty if there is no payload.
    pub payload: Range<usize>,
}

/// A malformed packet message. The kernel still waits for a verdict on the packet. `id` is `None`
/// if the id could not be read, and then no verdict is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPacket {
    /// The packet id, if it could be read.
    pub id: Option<u32>,
}

impl PacketMessage {
    /// Decodes `body`, the bytes after the netlink header of a packet message. `start` is the
    /// offset of `body` in the datagram.
    #[inline]
    pub(super) fn decode(body: &[u8], start: usize) -> Result<Self, BadPacket> {
        let Some((&[family, _, queue_high, queue_low], attributes)) = body.split_first_chunk::<NETFILTER_HEADER>()
        else {
            return Err(BadPacket { id: None });
        };
        let mut header = None;
        let mut payload = 0..0;
        let first = start + NETFILTER_HEADER;
        let mut rest = attributes_of(attributes);
        loop {
            let offset = first + attributes.len() - rest.rest.len();
            let Some(item) = rest.next() else { break };
            match item {
                Some((attribute::PACKET_HEADER, value)) => header = packet_header(value),
                Some((attribute::PAYLOAD, value)) => {
                    payload = offset + NLA_HEADER_SIZE..offset + NLA_HEADER_SIZE + value.len();
                }
                Some(_) => {}
                None => return Err(BadPacket { id: header.map(|(id, _, _)| id) }),
            }
        }
        let (id, hw_protocol, hook) = header.ok_or(BadPacket { id: None })?;
        let queue = u16::from_be_bytes([queue_high, queue_low]);
        let attributes = first..start + body.len();
        Ok(Self { id, queue, family, hw_protocol, hook, attributes, payload })
    }
}

/// The id of the packet, if its attribute is complete. The bytes after that attribute may be
/// truncated.
pub(super) fn find_id(attributes: &[u8]) -> Option<u32> {
    packet_header(find(attributes, attribute::PACKET_HEADER)?).map(|(id, _, _)| id)
}

/// Decodes `struct nfqnl_msg_packet_hdr`, packed: packet_id, hw_protocol, hook.
fn packet_header(value: &[u8]) -> Option<(u32, u16, u8)> {
    let &[a, b, c, d, e, f, hook, ..] = value else { return None };
    Some((u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]), hook))
}

/// The value of the first attribute of this kind. `None` if there is none, or if an attribute
/// before it is malformed.
pub fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes_of(attributes).map_while(|item| item).find_map(|(k, value)| (k == kind).then_some(value))
}

/// Decodes `struct nfqnl_msg_packet_timestamp`: seconds and microseconds since the Unix epoch.
pub fn timestamp(value: &[u8]) -> Option<Duration> {
    let (seconds, rest) = value.split_first_chunk()?;
    let micros = u64::from_be_bytes(*rest.first_chunk()?);
    Duration::from_secs(u64::from_be_bytes(*seconds)).checked_add(Duration::from_micros(micros))
}

/// Decodes `struct nfqnl_msg_packet_hw`: length, padding, address.
pub fn hardware_address(value: &[u8]) -> Option<&[u8]> {
    let (length, rest) = value.split_first_chunk()?;
    rest.get(2..)?.get(..u16::from_be_bytes(*length).into())
}

/// Decodes the attributes in `NFQA_VLAN`.
pub fn vlan(nested: &[u8]) -> Option<Vlan> {
    let be16 = |number| find(nested, number)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes));
    Some(Vlan { protocol: be16(attribute::VLAN_PROTOCOL)?, control: be16(attribute::VLAN_CONTROL)? })
}

/// The value of the first attribute of this kind, as a big-endian 32-bit number.
pub fn find_be32(attributes: &[u8], kind: u16) -> Option<u32> {
    find(attributes, kind)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Iterates over kind and value of each attribute. The last item is `None` if the bytes end with a
/// malformed attribute.
pub fn attributes_of(bytes: &[u8]) -> Attributes<'_> {
    Attributes { rest: bytes }
}

/// A faster replacement for `NlasIterator`. Without link-time optimisation, the checks and errors
/// of `NlasIterator` cost about 500 instructions a packet.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Option<(u16, &'a [u8])>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let Some(header) = self.rest.first_chunk::<NLA_HEADER_SIZE>() else {
            let malformed = !self.rest.is_empty();
            self.rest = &[];
            return malformed.then_some(None);
        };
        let header = NlaBuffer::new(header);
        let length = usize::from(header.length());
        let value = self.rest.get(NLA_HEADER_SIZE..length);
        self.rest = if value.is_some() { self.rest.get(align(length)..).unwrap_or(&[]) } else { &[] };
        Some(value.map(|value| (header.kind(), value)))
    }
}
