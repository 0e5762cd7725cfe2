//! Splits a datagram from the kernel into messages.

use netlink_packet_core::{NLMSG_ERROR, NetlinkBuffer};
use rustix::io::Errno;

use super::{
    ATTRIBUTE_VERDICT_HEADER, MESSAGE_PACKET, MESSAGE_VERDICT, MESSAGE_VERDICT_BATCH, NETFILTER_HEADER, NETLINK_HEADER,
    PacketMessage, align,
    packet::{BadPacket, attribute, attributes_of, find, find_be32, find_id},
    verdict::{VerdictFields, action_of},
};
use crate::types::Action;

/// One message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A packet (`NFQNL_MSG_PACKET`).
    Packet(PacketMessage),
    /// An acknowledgement or an error (`NLMSG_ERROR`).
    Reply(Reply),
    /// A malformed packet message.
    BadPacket(BadPacket),
    /// Not a netlink message, or a message of an unexpected type.
    Unknown,
}

/// The reply of the kernel to a message of this crate: an acknowledgement or an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The sequence number of the message that the kernel replies to.
    pub sequence: u32,
    /// `None` for an acknowledgement.
    pub error: Option<Errno>,
    /// What the kernel refused, as far as the echoed message contains it.
    pub refused: Refused,
    /// The extended error message of the kernel (`NLMSGERR_ATTR_MSG`). The kernel rarely sends one.
    pub text: Option<Box<str>>,
}

/// The message that an error refers to. With an error, the kernel echoes the whole message
/// (`netlink_ack`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// A verdict on one packet.
    Verdict {
        /// The packet id.
        id: u32,
        /// What the verdict was counted as. `None` for an action that this crate does not send.
        action: Option<Action>,
    },
    /// A verdict on all packets up to an id.
    Batch {
        /// The last id of the batch.
        max: u32,
    },
    /// A configuration message, or one that cannot be read.
    Other,
}

/// An iterator over the messages of one datagram, in order. It ends after the first malformed
/// message.
pub struct Messages<'a> {
    datagram: &'a [u8],
    /// Where the next message begins.
    next: usize,
}

impl<'a> Messages<'a> {
    /// The messages of this datagram.
    pub fn new(datagram: &'a [u8]) -> Self {
        Self { datagram, next: 0 }
    }

    /// Whether no message is left.
    pub fn is_at_end(&self) -> bool {
        self.next >= self.datagram.len()
    }
}

impl Iterator for Messages<'_> {
    type Item = Message;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.datagram.get(self.next..).filter(|rest| !rest.is_empty())?;
        // The length can be unaligned: the kernel pads a message only if another one follows.
        let header = rest.first_chunk::<NETLINK_HEADER>().map(NetlinkBuffer::new);
        let length = header.as_ref().map_or(0, |header| header.length() as usize);
        let (Some(header), Some(body)) = (header, rest.get(NETLINK_HEADER..length)) else {
            self.next = self.datagram.len();
            return Some(truncated(rest));
        };
        let (message_type, flags) = (header.message_type(), header.flags());
        let start = self.next + NETLINK_HEADER;
        self.next = self.next.saturating_add(align(length));
        Some(match message_type {
            MESSAGE_PACKET => match PacketMessage::decode(body, start) {
                Ok(packet) => Message::Packet(packet),
                Err(bad) => Message::BadPacket(bad),
            },
            NLMSG_ERROR => decode_reply(body, flags).map_or(Message::Unknown, Message::Reply),
            _ => Message::Unknown,
        })
    }
}

/// Decodes a truncated message. The id of a packet is usually still present, because
/// `NFQA_PACKET_HDR` is the first attribute (`nfqnl_build_packet_message`).
fn truncated(beginning: &[u8]) -> Message {
    let header = beginning.first_chunk::<NETLINK_HEADER>().map(NetlinkBuffer::new);
    match header {
        Some(header) if header.message_type() == MESSAGE_PACKET => {
            let attributes = beginning.get(NETLINK_HEADER + NETFILTER_HEADER..).unwrap_or(&[]);
            Message::BadPacket(BadPacket { id: find_id(attributes) })
        }
        _ => Message::Unknown,
    }
}

/// Decodes `struct nlmsgerr`: a negative errno, the header of the original message, its body unless
/// `NLM_F_CAPPED` is set, and attributes if `NLM_F_ACK_TLVS` is set.
fn decode_reply(body: &[u8], flags: u16) -> Option<Reply> {
    const CAPPED: u16 = netlink_packet_core::NLM_F_CAPPED;
    const TLVS: u16 = netlink_packet_core::NLM_F_ACK_TLVS;

    let (code, echoed) = body.split_first_chunk::<4>()?;
    let header = NetlinkBuffer::new(echoed.get(..NETLINK_HEADER)?);
    let error = match i32::from_ne_bytes(*code).checked_neg()? {
        0 => None,
        // MAX_ERRNO in include/linux/err.h. `Errno` accepts no other values.
        errno @ 1..=4095 => Some(Errno::from_raw_os_error(errno)),
        _ => return None,
    };
    let echoed_length = if flags & CAPPED != 0 { NETLINK_HEADER } else { header.length() as usize };
    let echoed_body = echoed.get(NETLINK_HEADER..echoed_length).unwrap_or(&[]);
    // struct nfqnl_msg_verdict_hdr: verdict, id.
    let verdict_header = || {
        let header = find(echoed_body.get(NETFILTER_HEADER..)?, ATTRIBUTE_VERDICT_HEADER)?;
        let (word, rest) = header.split_first_chunk()?;
        Some((u32::from_be_bytes(*word), u32::from_be_bytes(*rest.first_chunk()?)))
    };
    let refused = match (header.message_type(), verdict_header()) {
        (MESSAGE_VERDICT, Some((word, id))) => {
            let attributes = echoed_body.get(NETFILTER_HEADER..).unwrap_or(&[]);
            let priority = find_be32(attributes, attribute::PRIORITY);
            let counted = |action| VerdictFields { priority, ..VerdictFields::plain(action) }.counted();
            Refused::Verdict { id, action: action_of(word).map(counted) }
        }
        (MESSAGE_VERDICT_BATCH, Some((_, max))) => Refused::Batch { max },
        _ => Refused::Other,
    };
    let text = (flags & TLVS != 0).then(|| extended_text(echoed.get(align(echoed_length)..)?)).flatten();
    Some(Reply { sequence: header.sequence_number(), error, refused, text })
}

fn extended_text(attributes: &[u8]) -> Option<Box<str>> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let (_, text) = attributes_of(attributes).map_while(|item| item).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)?;
    std::str::from_utf8(text).ok().map(|text| text.trim_end_matches('\0').into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{
        attribute,
        verdict::{Attachments, VerdictFields, encode_single},
        writer::Writer,
    };

    fn packet(id: u32, payload: &[u8]) -> Vec<u8> {
        let mut buffer = Vec::new();
        let mut message = Writer::begin(&mut buffer, MESSAGE_PACKET, 0, 0, 3);
        let mut header = id.to_be_bytes().to_vec();
        header.extend([0x86, 0xdd, 1]);
        message.attribute(attribute::PACKET_HEADER, &header).attribute_be32(attribute::MARK, 9);
        message.attribute(attribute::PAYLOAD, payload);
        message.finish();
        buffer
    }

    /// A reply in the format of `netlink_ack`.
    fn reply(code: i32, flags: u16, echoed: &[u8], attributes: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; NETLINK_HEADER];
        bytes.extend(code.to_ne_bytes());
        bytes.extend(echoed);
        bytes.extend(attributes);
        let length = bytes.len() as u32;
        let mut header = NetlinkBuffer::new(&mut bytes[..]);
        header.set_length(length);
        header.set_message_type(NLMSG_ERROR);
        header.set_flags(flags);
        bytes
    }

    #[test]
    fn packet_with_unaligned_length_is_decoded() {
        let mut datagram = packet(77, &[1, 2, 3, 4, 5]);
        // The kernel does not pad the last attribute.
        datagram.truncate(datagram.len() - 3);
        let length = datagram.len() as u32;
        NetlinkBuffer::new(&mut datagram[..]).set_length(length);
        let messages: Vec<_> = Messages::new(&datagram).collect();
        let [Message::Packet(packet)] = &messages[..] else { panic!("{messages:?}") };
        assert_eq!((packet.id, packet.queue, packet.hw_protocol, packet.hook), (77, 3, 0x86dd, 1));
        assert_eq!(datagram[packet.payload.clone()], [1, 2, 3, 4, 5]);
        let attributes = &datagram[packet.attributes.clone()];
        assert_eq!(find_be32(attributes, attribute::MARK), Some(9));
    }

    #[test]
    fn all_messages_of_a_datagram_are_decoded() {
        let mut datagram = packet(1, &[0; 8]);
        datagram.extend(packet(2, &[7; 8]));
        let found: Vec<_> = Messages::new(&datagram)
            .map(|message| match message {
                Message::Packet(packet) => (packet.id, &datagram[packet.payload]),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(found, [(1, &[0; 8][..]), (2, &[7; 8])]);
    }

    #[test]
    fn a_verdict_that_denies_is_refused_as_it_was_counted() {
        for (priority, counted) in
            [(Some(0xac5d_19e3), Action::Drop), (Some(0xaa00_0000), Action::Repeat), (None, Action::Repeat)]
        {
            let mut echoed = Vec::new();
            let fields = VerdictFields { priority, ..VerdictFields::plain(Action::Repeat) };
            assert_eq!(fields.counted(), counted);
            encode_single(&mut echoed, (42, false), 3, 1234, &fields, &Attachments::default());
            let datagram = reply(-2, 0, &echoed, &[]);
            let Some(Message::Reply(reply)) = Messages::new(&datagram).next() else { panic!() };
            assert_eq!(reply.refused, Refused::Verdict { id: 1234, action: Some(counted) });
        }
    }

    #[test]
    fn error_contains_the_packet_id() {
        let mut echoed = Vec::new();
        encode_single(&mut echoed, (42, false), 3, 1234, &VerdictFields::plain(Action::Drop), &Attachments::default());
        let datagram = reply(-2, 0, &echoed, &[]);
        let Some(Message::Reply(reply)) = Messages::new(&datagram).next() else { panic!() };
        let refused = Refused::Verdict { id: 1234, action: Some(Action::Drop) };
        assert_eq!(reply, Reply { sequence: 42, error: Some(Errno::NOENT), refused, text: None });
    }

    #[test]
    fn capped_acknowledgement_is_decoded() {
        let mut echoed = Vec::new();
        encode_single(&mut echoed, (43, true), 3, 1234, &VerdictFields::plain(Action::Drop), &Attachments::default());
        let attributes = [8, 0, 1, 0, b'h', b'i', b'!', 0];
        let datagram = reply(0, 0x300, &echoed[..16], &attributes);
        let Some(Message::Reply(reply)) = Messages::new(&datagram).next() else { panic!() };
        let text = cfg!(target_endian = "little").then(|| "hi!".into());
        assert_eq!(reply, Reply { sequence: 43, error: None, refused: Refused::Other, text });
    }

    #[test]
    fn id_of_a_malformed_packet_message_is_decoded() {
        let mut datagram = packet(99, &[0; 4]);
        let mark_length = NETLINK_HEADER + 4 + 12;
        datagram[mark_length] = 2; // shorter than the header of an attribute
        datagram[mark_length + 1] = 0;
        assert_eq!(Messages::new(&datagram).next(), Some(Message::BadPacket(BadPacket { id: Some(99) })));
    }

    #[test]
    fn id_of_a_truncated_packet_message_is_decoded() {
        let datagram = packet(0x0102_0304, &[7; 500]);
        let header = NETLINK_HEADER + NETFILTER_HEADER + 4 + 7;
        for length in [header, header + 1, 60, 300, datagram.len() - 1] {
            let found = Messages::new(&datagram[..length]).next();
            assert_eq!(found, Some(Message::BadPacket(BadPacket { id: Some(0x0102_0304) })), "{length} bytes");
        }
        for length in [NETLINK_HEADER, NETLINK_HEADER + 4, header - 1] {
            let found = Messages::new(&datagram[..length]).next();
            assert_eq!(found, Some(Message::BadPacket(BadPacket { id: None })), "{length} bytes");
        }
        assert_eq!(Messages::new(&datagram[..15]).next(), Some(Message::Unknown));
    }

    proptest! {
        /// Arbitrary bytes cause no panic, and the iterator ends.
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Messages::new(&bytes).count() <= bytes.len() + 1);
        }

        /// A damaged valid message reaches more code of the decoder than arbitrary bytes do.
        #[test]
        fn damaged_messages_do_not_panic(
            at in prop::collection::vec((0usize..120, any::<u8>()), 1..6),
            cut in 0usize..120,
            error: bool,
        ) {
            let mut bytes = if error {
                let mut echoed = Vec::new();
                let fields = VerdictFields::plain(Action::Drop);
                let attachments = Attachments { payload: Some(&[0x45; 30]), ..Attachments::default() };
                encode_single(&mut echoed, (42, false), 3, 1234, &fields, &attachments);
                reply(-2, 0x200, &echoed, &[8, 0, 1, 0, b'h', b'i', b'!', 0])
            } else {
                packet(5, &[7; 60])
            };
            for (index, value) in at {
                if let Some(byte) = bytes.get_mut(index) {
                    *byte = value;
                }
            }
            bytes.truncate(bytes.len().max(cut));
            for message in Messages::new(&bytes) {
                if let Message::Packet(packet) = message {
                    prop_assert!(bytes.get(packet.payload).is_some());
                    prop_assert!(bytes.get(packet.attributes).is_some());
                }
            }
        }
    }
}
