//! The kernel's side of the protocol, for a kernel in memory: parses what programs send, and
//! encodes what the kernel sends.

use netlink_packet_core::{NLM_F_ACK, NLM_F_CAPPED, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer};
use rustix::io::Errno;

use super::{
    ATTRIBUTE_VERDICT_HEADER, MESSAGE_CONFIG, MESSAGE_PACKET, MESSAGE_VERDICT, MESSAGE_VERDICT_BATCH, NETFILTER_HEADER,
    NETLINK_HEADER, align, attribute,
    config::{ATTRIBUTE_COMMAND, ATTRIBUTE_FLAGS, ATTRIBUTE_MASK, ATTRIBUTE_MAX_LEN, ATTRIBUTE_PARAMS},
    packet::{attributes_of, find, find_be32, vlan},
    tuple,
    writer::{Writer, put_attribute},
};
use crate::types::{FlowTuple, Vlan};

/// A message of a datagram to the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The whole message, without padding.
    bytes: &'a [u8],
}

/// The messages that `netlink_rcv_skb` finds in a datagram. A truncated tail is ignored.
pub fn requests(mut datagram: &[u8]) -> impl Iterator<Item = Request<'_>> {
    std::iter::from_fn(move || {
        let header = NetlinkBuffer::new(datagram.first_chunk::<NETLINK_HEADER>()?);
        let length = header.length() as usize;
        let bytes = datagram.get(..length).filter(|bytes| bytes.len() >= NETLINK_HEADER)?;
        datagram = datagram.get(align(length)..).unwrap_or(&[]);
        Some(Request { bytes })
    })
}

impl<'a> Request<'a> {
    fn header(&self) -> NetlinkBuffer<&'a [u8]> {
        NetlinkBuffer::new(self.bytes)
    }

    /// The length in bytes, without padding.
    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the kernel executes it. Otherwise it is acknowledged at most.
    pub fn is_executed(&self) -> bool {
        const NLMSG_MIN_TYPE: u16 = 16;
        let header = self.header();
        header.flags() & NLM_F_REQUEST != 0 && header.message_type() >= NLMSG_MIN_TYPE
    }

    /// Whether the kernel replies also on success.
    pub fn wants_acknowledgement(&self) -> bool {
        self.header().flags() & NLM_F_ACK != 0
    }

    /// The number of the queue, and what is to be done (`nfnetlink_rcv_msg`). `None` for a message
    /// that is too short, which is acknowledged.
    ///
    /// # Errors
    /// What the kernel refuses before it looks for the queue.
    pub fn parse(&self) -> Result<Option<(u16, Order<'a>)>, Errno> {
        let Some((&[_, _, high, low], attributes)) =
            self.bytes[NETLINK_HEADER..].split_first_chunk::<NETFILTER_HEADER>()
        else {
            return Ok(None);
        };
        let order = match self.header().message_type() {
            MESSAGE_VERDICT => Order::Verdict(VerdictOrder::parse(attributes)?),
            MESSAGE_VERDICT_BATCH => Order::Batch(VerdictOrder::parse(attributes)?),
            MESSAGE_CONFIG => Order::Config(ConfigOrder::parse(attributes)?),
            // nfqnl_recv_unsupp: ENOTSUPP
            MESSAGE_PACKET => return Err(Errno::from_raw_os_error(524)),
            _ => return Err(Errno::INVAL),
        };
        Ok(Some((u16::from_be_bytes([high, low]), order)))
    }
}

/// What a message asks for.
#[derive(Debug)]
pub enum Order<'a> {
    /// A verdict on one packet (`NFQNL_MSG_VERDICT`).
    Verdict(VerdictOrder<'a>),
    /// A verdict on all packets up to an id (`NFQNL_MSG_VERDICT_BATCH`).
    Batch(VerdictOrder<'a>),
    /// A configuration message (`NFQNL_MSG_CONFIG`).
    Config(ConfigOrder),
}

/// A verdict on one packet, or on all packets up to `id`.
#[derive(Debug, Default)]
pub struct VerdictOrder<'a> {
    /// The verdict word and the id; `None` if the attribute is missing.
    pub header: Option<(u32, u32)>,
    /// The packet's new mark.
    pub mark: Option<u32>,
    /// The packet's new priority.
    pub priority: Option<u32>,
    /// The packet's new content, from the network header on.
    pub payload: Option<&'a [u8]>,
    /// The packet's new VLAN tag.
    pub vlan: Option<Vlan>,
    /// The packet's new link-layer header.
    pub layer2_header: Option<&'a [u8]>,
    /// Changes of the packet's connection tracking entry.
    pub conntrack: Option<ConntrackOrder>,
}

impl<'a> VerdictOrder<'a> {
    fn parse(attributes: &'a [u8]) -> Result<Self, Errno> {
        let mut order = Self::default();
        // Malformed bytes behind the last attribute are ignored (`nla_parse`).
        for (kind, value) in attributes_of(attributes).map_while(|attribute| attribute) {
            match kind {
                ATTRIBUTE_VERDICT_HEADER => {
                    let (word, id) = value.split_first_chunk().ok_or(Errno::RANGE)?;
                    order.header = Some((u32::from_be_bytes(*word), be32(id)?));
                }
                attribute::MARK => order.mark = Some(be32(value)?),
                attribute::PRIORITY => order.priority = Some(be32(value)?),
                attribute::PAYLOAD => order.payload = Some(value),
                attribute::VLAN => order.vlan = vlan(value),
                attribute::LAYER2_HEADER => order.layer2_header = Some(value),
                attribute::CONNTRACK => order.conntrack = Some(ConntrackOrder::parse(value)),
                _ => {}
            }
        }
        Ok(order)
    }
}

/// Changes of a connection tracking entry.
#[derive(Debug, Clone, Copy)]
pub struct ConntrackOrder {
    /// The new time until the entry expires, in seconds.
    pub timeout_seconds: Option<u32>,
    /// A value, and a mask of the bits to change.
    pub mark: Option<(u32, u32)>,
    /// A value, and a mask of the bits to change.
    pub labels: Option<([u8; 16], [u8; 16])>,
}

impl ConntrackOrder {
    fn parse(nested: &[u8]) -> Self {
        let labels = |kind| find(nested, kind)?.first_chunk().copied();
        let (mark, mask) = (find_be32(nested, ct::MARK), find_be32(nested, ct::MARK_MASK));
        Self {
            timeout_seconds: find_be32(nested, ct::TIMEOUT),
            mark: mark.map(|mark| (mark, mask.unwrap_or(u32::MAX))),
            labels: labels(ct::LABELS).map(|value| (value, labels(ct::LABELS_MASK).unwrap_or([0xff; 16]))),
        }
    }
}

/// A configuration message.
#[derive(Debug, Default)]
pub struct ConfigOrder {
    /// The command (`NFQNL_CFG_CMD_*`).
    pub command: Option<u8>,
    /// Copy range and copy mode.
    pub copy: Option<(u32, u8)>,
    /// How many packets the queue holds at most.
    pub max_len: Option<u32>,
    /// The flags to change.
    pub mask: Option<u32>,
    /// The new values of these flags.
    pub flags: Option<u32>,
}

impl ConfigOrder {
    fn parse(attributes: &[u8]) -> Result<Self, Errno> {
        let mut order = Self::default();
        for (kind, value) in attributes_of(attributes).map_while(|attribute| attribute) {
            match (kind, value) {
                (ATTRIBUTE_COMMAND, &[command, _, _, _, ..]) => order.command = Some(command),
                (ATTRIBUTE_PARAMS, &[a, b, c, d, mode, ..]) => {
                    order.copy = Some((u32::from_be_bytes([a, b, c, d]), mode));
                }
                (ATTRIBUTE_COMMAND | ATTRIBUTE_PARAMS, _) => return Err(Errno::RANGE),
                (ATTRIBUTE_MAX_LEN, value) => order.max_len = Some(be32(value)?),
                (ATTRIBUTE_MASK, value) => order.mask = Some(be32(value)?),
                (ATTRIBUTE_FLAGS, value) => order.flags = Some(be32(value)?),
                _ => {}
            }
        }
        Ok(order)
    }
}

fn be32(value: &[u8]) -> Result<u32, Errno> {
    value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)).ok_or(Errno::RANGE)
}

/// Encodes the reply to a request (`netlink_ack`): an error with the whole request, or an
/// acknowledgement with its header.
pub fn encode_reply(buffer: &mut Vec<u8>, port: u32, error: Option<Errno>, request: Request<'_>) {
    let echoed = if error.is_some() { request.bytes } else { &request.bytes[..NETLINK_HEADER] };
    let start = buffer.len();
    buffer.resize(start + NETLINK_HEADER, 0);
    let code = error.map_or(0, |errno| -errno.raw_os_error());
    buffer.extend_from_slice(&code.to_ne_bytes());
    buffer.extend_from_slice(echoed);
    buffer.resize(start + align(buffer.len() - start), 0);
    let length = (buffer.len() - start) as u32;
    let mut header = NetlinkBuffer::new(&mut buffer[start..]);
    header.set_length(length);
    header.set_message_type(NLMSG_ERROR);
    header.set_flags(if error.is_some() { 0 } else { NLM_F_CAPPED });
    header.set_sequence_number(request.header().sequence_number());
    header.set_port_number(port);
}

/// What a packet message contains. What is absent in the kernel's message is `None` or 0.
#[derive(Debug, Default)]
pub struct PacketFields<'a> {
    /// The family of the hook (`NFPROTO_*`).
    pub family: u8,
    /// The packet id.
    pub id: u32,
    /// The EtherType.
    pub hw_protocol: u16,
    /// The number of the hook.
    pub hook: u8,
    /// By attribute number, as numbers of 32 bits: those that are 0 are left out.
    pub words: [(u16, u32); 7],
    /// User id and group id of the sender. They are sent even if they are 0.
    pub owner: Option<(u32, u32)>,
    /// The link-layer source address; at most 8 bytes are sent.
    pub hardware_address: Option<&'a [u8]>,
    /// Seconds and microseconds.
    pub timestamp: Option<(u64, u64)>,
    /// The security context of the sender, without NUL.
    pub security_context: Option<&'a [u8]>,
    /// The VLAN tag.
    pub vlan: Option<Vlan>,
    /// The link-layer header.
    pub layer2_header: Option<&'a [u8]>,
    /// The encoded entry of connection tracking, from [`encode_connection`].
    pub connection: Option<&'a [u8]>,
    /// How the packet relates to the connection (`enum ip_conntrack_info`). Sent with `connection`
    /// only.
    pub connection_state: u32,
    /// The length of the packet if it is not copied as a whole.
    pub captured_length: Option<u32>,
    /// What is copied of the packet, from the network header on.
    pub payload: &'a [u8],
}

/// Encodes a packet message (`nfqnl_build_packet_message`). The last attribute is not padded.
pub fn encode_packet(buffer: &mut Vec<u8>, queue: u16, fields: &PacketFields<'_>) {
    let start = buffer.len();
    buffer.reserve(fields.payload.len() + 256);
    let mut message = Writer::begin(buffer, MESSAGE_PACKET, 0, 0, queue);
    let [a, b, c, d] = fields.id.to_be_bytes();
    let [e, f] = fields.hw_protocol.to_be_bytes();
    message.attribute(attribute::PACKET_HEADER, &[a, b, c, d, e, f, fields.hook]);
    for (kind, value) in fields.words.into_iter().filter(|(_, value)| *value != 0) {
        message.attribute_be32(kind, value);
    }
    if let Some(address) = fields.hardware_address {
        // struct nfqnl_msg_packet_hw
        let mut value = [0; 12];
        let length = address.len().min(8);
        value[..2].copy_from_slice(&(length as u16).to_be_bytes());
        value[4..4 + length].copy_from_slice(&address[..length]);
        message.attribute(attribute::HARDWARE_ADDRESS, &value);
    }
    if let Some(Vlan { protocol, control }) = fields.vlan {
        let mut nested = Vec::new();
        put_attribute(&mut nested, attribute::VLAN_CONTROL, &control.to_be_bytes());
        put_attribute(&mut nested, attribute::VLAN_PROTOCOL, &protocol.to_be_bytes());
        message.attribute(attribute::VLAN, &nested);
    }
    if let Some(header) = fields.layer2_header {
        message.attribute(attribute::LAYER2_HEADER, header);
    }
    if let Some((seconds, micros)) = fields.timestamp {
        let mut value = [0; 16];
        value[..8].copy_from_slice(&seconds.to_be_bytes());
        value[8..].copy_from_slice(&micros.to_be_bytes());
        message.attribute(attribute::TIMESTAMP, &value);
    }
    if let Some((user, group)) = fields.owner {
        message.attribute_be32(attribute::UID, user).attribute_be32(attribute::GID, group);
    }
    if let Some(context) = fields.security_context {
        message.attribute(attribute::SECURITY_CONTEXT, context);
    }
    if let Some(connection) = fields.connection {
        message.attribute(attribute::CONNTRACK, connection);
        message.attribute_be32(attribute::CONNTRACK_INFO, fields.connection_state);
    }
    if let Some(length) = fields.captured_length {
        message.attribute_be32(attribute::CAPTURED_LENGTH, length);
    }
    if !fields.payload.is_empty() {
        message.attribute(attribute::PAYLOAD, fields.payload);
    }
    message.finish();
    let padding = align(fields.payload.len()) - fields.payload.len();
    buffer.truncate(buffer.len() - padding);
    let length = (buffer.len() - start) as u32;
    NetlinkBuffer::new(&mut buffer[start..]).set_length(length);
    buffer[start + NETLINK_HEADER] = fields.family;
}

/// What is known of a connection.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionFields {
    /// The direction of the first packet.
    pub original: FlowTuple,
    /// The other direction.
    pub reply: FlowTuple,
    /// The id of the entry.
    pub id: u32,
    /// The status bits (`IPS_*`).
    pub status: u32,
    /// The mark of the connection (`ct mark`).
    pub mark: u32,
    /// The labels, sent if one is set.
    pub labels: [u8; 16],
    /// The time until the entry expires, in seconds.
    pub timeout_seconds: u32,
}

/// Encodes the attributes in `NFQA_CT`.
pub fn encode_connection(fields: &ConnectionFields) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_attribute(&mut bytes, ct::TUPLE_ORIGINAL | NESTED, &tuple::encode(fields.original));
    put_attribute(&mut bytes, ct::TUPLE_REPLY | NESTED, &tuple::encode(fields.reply));
    put_attribute(&mut bytes, ct::STATUS, &fields.status.to_be_bytes());
    put_attribute(&mut bytes, ct::TIMEOUT, &fields.timeout_seconds.to_be_bytes());
    put_attribute(&mut bytes, ct::MARK, &fields.mark.to_be_bytes());
    put_attribute(&mut bytes, ct::ID, &fields.id.to_be_bytes());
    if fields.labels != [0; 16] {
        put_attribute(&mut bytes, ct::LABELS, &fields.labels);
    }
    bytes
}

const NESTED: u16 = netlink_packet_core::NLA_F_NESTED;

/// `enum ctattr_type`
mod ct {
    pub(super) const TUPLE_ORIGINAL: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const TIMEOUT: u16 = 7;
    pub(super) const MARK: u16 = 8;
    pub(super) const ID: u16 = 12;
    pub(super) const MARK_MASK: u16 = 21;
    pub(super) const LABELS: u16 = 22;
    pub(super) const LABELS_MASK: u16 = 23;
}
