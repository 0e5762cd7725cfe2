//! Appends netlink messages to a buffer. `finish` writes the length of a message.

use netlink_packet_core::{NLA_F_NESTED, NLA_HEADER_SIZE, NetlinkBuffer, NlaBuffer};

use super::{NETFILTER_HEADER, NETLINK_HEADER, align};

/// Writes one message at the end of a buffer. The caller must call [`Writer::finish`].
pub(super) struct Writer<'a> {
    buffer: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Writer<'a> {
    /// Begins a message with the netlink header, and `struct nfgenmsg` with the queue number.
    pub(super) fn begin(buffer: &'a mut Vec<u8>, message_type: u16, flags: u16, sequence: u32, queue: u16) -> Self {
        debug_assert_eq!(buffer.len() % 4, 0, "every message is padded, so the next one starts aligned");
        let start = buffer.len();
        buffer.resize(start + NETLINK_HEADER + NETFILTER_HEADER, 0);
        let mut header = NetlinkBuffer::new(&mut buffer[start..]);
        header.set_message_type(message_type);
        header.set_flags(flags);
        header.set_sequence_number(sequence);
        // AF_UNSPEC and NFNETLINK_V0 are both 0.
        buffer[start + NETLINK_HEADER + 2..].copy_from_slice(&queue.to_be_bytes());
        Self { buffer, start }
    }

    /// Appends an attribute and its padding. The caller must check that `value` is at most
    /// [`MAX_PAYLOAD`](super::MAX_PAYLOAD) long.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        put_attribute(self.buffer, kind, value);
        self
    }

    pub(super) fn attribute_be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// Writes the length of the message into its header.
    pub(super) fn finish(self) {
        let length = (self.buffer.len() - self.start) as u32;
        NetlinkBuffer::new(&mut self.buffer[self.start..]).set_length(length);
    }
}

/// Appends an attribute and its padding, to a message or to the value of a nested attribute. `kind`
/// may contain `NLA_F_NESTED`.
pub(super) fn put_attribute(buffer: &mut Vec<u8>, kind: u16, value: &[u8]) {
    debug_assert!(value.len() <= super::MAX_PAYLOAD);
    let start = buffer.len();
    let length = NLA_HEADER_SIZE + value.len();
    buffer.resize(start + NLA_HEADER_SIZE, 0);
    let mut header = NlaBuffer::new(&mut buffer[start..]);
    header.set_kind(kind);
    if kind & NLA_F_NESTED != 0 {
        header.set_nested_flag();
    }
    header.set_length(length as u16);
    buffer.extend_from_slice(value);
    buffer.resize(start + align(length), 0);
}
