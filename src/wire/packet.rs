//! Packet messages, decoded in one pass for what is always needed; the rest stays bytes until asked for.

use std::ops::Range;

use netlink_packet_core::{NLA_HEADER_SIZE, NlaBuffer};

use super::{NETFILTER_HEADER, align};

/// `enum nfqnl_attr_type`.
#[allow(dead_code)] // the table is complete so that a new accessor finds its number here
pub(crate) mod attribute {
    pub(crate) const PACKET_HEADER: u16 = 1;
    pub(crate) const MARK: u16 = 3;
    pub(crate) const TIMESTAMP: u16 = 4;
    pub(crate) const INTERFACE_IN: u16 = 5;
    pub(crate) const INTERFACE_OUT: u16 = 6;
    pub(crate) const PHYSICAL_IN: u16 = 7;
    pub(crate) const PHYSICAL_OUT: u16 = 8;
    pub(crate) const HARDWARE_ADDRESS: u16 = 9;
    pub(crate) const PAYLOAD: u16 = 10;
    pub(crate) const CONNTRACK: u16 = 11;
    pub(crate) const CONNTRACK_INFO: u16 = 12;
    pub(crate) const CAPTURED_LENGTH: u16 = 13;
    pub(crate) const OFFLOAD: u16 = 14;
    pub(crate) const EXPECTATION: u16 = 15;
    pub(crate) const UID: u16 = 16;
    pub(crate) const GID: u16 = 17;
    pub(crate) const SECURITY_CONTEXT: u16 = 18;
    pub(crate) const VLAN: u16 = 19;
    pub(crate) const LAYER2_HEADER: u16 = 20;
    pub(crate) const PRIORITY: u16 = 21;
    pub(crate) const CGROUP_CLASS_ID: u16 = 22;
}

/// What every packet message says, and where in the message's bytes the rest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PacketMessage {
    pub(crate) id: u32,
    pub(crate) queue: u16,
    /// `NFPROTO_*`
    pub(crate) family: u8,
    /// The EtherType.
    pub(crate) hw_protocol: u16,
    pub(crate) hook: u8,
    /// The payload, counted from the first byte after the netlink header; empty where there is none.
    pub(crate) payload: Range<usize>,
}

/// Why a packet message was refused. The kernel still waits for a verdict on the packet, if its id could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadPacket {
    pub(crate) id: Option<u32>,
}

impl PacketMessage {
    /// Decodes what follows the netlink header of a packet message.
    #[inline]
    pub(super) fn decode(body: &[u8]) -> Result<Self, BadPacket> {
        let Some((&[family, _, queue_high, queue_low], attributes)) = body.split_first_chunk::<NETFILTER_HEADER>()
        else {
            return Err(BadPacket { id: None });
        };
        let mut header = None;
        let mut payload = 0..0;
        for item in attributes_of(attributes) {
            match item {
                Some((attribute::PACKET_HEADER, value)) => header = packet_header(value),
                Some((attribute::PAYLOAD, value)) => {
                    // Where `value` lies in `body`: both are slices of the same bytes.
                    let start = value.as_ptr() as usize - body.as_ptr() as usize;
                    payload = start..start + value.len();
                }
                Some(_) => {}
                None => return Err(BadPacket { id: header.map(|(id, _, _)| id) }),
            }
        }
        let (id, hw_protocol, hook) = header.ok_or(BadPacket { id: None })?;
        let queue = u16::from_be_bytes([queue_high, queue_low]);
        Ok(Self { id, queue, family, hw_protocol, hook, payload })
    }
}

/// The packet's id, if the attribute that has it is whole; what follows may be cut off.
pub(super) fn find_id(attributes: &[u8]) -> Option<u32> {
    packet_header(find(attributes, attribute::PACKET_HEADER)?).map(|(id, _, _)| id)
}

/// `struct nfqnl_msg_packet_hdr`, packed: packet_id, hw_protocol, hook.
fn packet_header(value: &[u8]) -> Option<(u32, u16, u8)> {
    let &[a, b, c, d, e, f, hook, ..] = value else { return None };
    Some((u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]), hook))
}

/// The first attribute of a kind, if it is there and everything before it is well-formed.
pub(crate) fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes_of(attributes).map_while(|item| item).find_map(|(k, value)| (k == kind).then_some(value))
}

/// A big-endian 32-bit attribute.
pub(crate) fn find_be32(attributes: &[u8], kind: u16) -> Option<u32> {
    find(attributes, kind)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Kind and value of each attribute; one `None` at the end if something malformed stands there.
pub(crate) fn attributes_of(bytes: &[u8]) -> Attributes<'_> {
    Attributes { rest: bytes }
}

/// As `NlasIterator`, whose checks and errors cost a packet some 500 instructions, where there is no link-time
/// optimisation.
#[derive(Debug, Clone)]
pub(crate) struct Attributes<'a> {
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
