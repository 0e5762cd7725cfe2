//! A datagram from the kernel, taken apart into messages.

use netlink_packet_core::{NLMSG_ERROR, NetlinkBuffer};

use super::{
    ATTRIBUTE_VERDICT_HEADER, MESSAGE_PACKET, MESSAGE_VERDICT, MESSAGE_VERDICT_BATCH, NETFILTER_HEADER, NETLINK_HEADER,
    PacketMessage, align,
    packet::{BadPacket, attributes_of, find, find_id},
};

/// One message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    Packet {
        packet: PacketMessage,
        /// What follows the netlink header; the ranges of `packet` count from here.
        body: &'a [u8],
    },
    /// An acknowledgement or an error (`NLMSG_ERROR`).
    Answer(Answer),
    /// A packet message that could not be understood.
    BadPacket(BadPacket),
    /// Not a netlink message, or one of a type that has no business here.
    Unknown,
}

/// The kernel's answer to one message of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The sequence number of the message that is answered.
    pub(crate) sequence: u32,
    /// 0, or the errno, positive.
    pub(crate) errno: i32,
    /// What was refused, as far as the echoed message tells.
    pub(crate) refused: Refused,
    /// The kernel's own words (`NLMSGERR_ATTR_MSG`), rarely there.
    pub(crate) text: Option<Box<str>>,
}

/// The message that an error answers. The kernel echoes it whole beside an error (`netlink_ack`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// With the verdict word.
    Verdict {
        id: u32,
        word: u32,
    },
    Batch {
        max: u32,
    },
    Other,
}

/// The messages of one datagram, in order. Ends at the first that is malformed.
pub(crate) struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    pub(crate) fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram }
    }

    /// Whether nothing follows what has been taken.
    pub(crate) fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        // The length need not be aligned: the kernel pads messages only where another follows.
        let header = self.rest.first_chunk::<NETLINK_HEADER>().map(NetlinkBuffer::new);
        let length = header.as_ref().map_or(0, |header| header.length() as usize);
        let (Some(header), Some(body)) = (header, self.rest.get(NETLINK_HEADER..length)) else {
            let rest = std::mem::take(&mut self.rest);
            return Some(cut_short(rest));
        };
        let (message_type, flags) = (header.message_type(), header.flags());
        self.rest = self.rest.get(align(length)..).unwrap_or(&[]);
        Some(match message_type {
            MESSAGE_PACKET => match PacketMessage::decode(body) {
                Ok(packet) => Message::Packet { packet, body },
                Err(bad) => Message::BadPacket(bad),
            },
            NLMSG_ERROR => decode_answer(body, flags).map_or(Message::Unknown, Message::Answer),
            _ => Message::Unknown,
        })
    }
}

/// A message of which only the beginning is there. A packet's id is read all the same: `NFQA_PACKET_HDR` is its first
/// attribute (`nfqnl_build_packet_message`).
fn cut_short(beginning: &[u8]) -> Message<'_> {
    let header = beginning.first_chunk::<NETLINK_HEADER>().map(NetlinkBuffer::new);
    match header {
        Some(header) if header.message_type() == MESSAGE_PACKET => {
            let attributes = beginning.get(NETLINK_HEADER + NETFILTER_HEADER..).unwrap_or(&[]);
            Message::BadPacket(BadPacket { id: find_id(attributes) })
        }
        _ => Message::Unknown,
    }
}

/// `struct nlmsgerr`: a negative errno, the header of the message answered, its body unless `NLM_F_CAPPED`, and
/// attributes if `NLM_F_ACK_TLVS`.
fn decode_answer(body: &[u8], flags: u16) -> Option<Answer> {
    const CAPPED: u16 = netlink_packet_core::NLM_F_CAPPED;
    const TLVS: u16 = netlink_packet_core::NLM_F_ACK_TLVS;

    let (code, echoed) = body.split_first_chunk::<4>()?;
    let header = NetlinkBuffer::new(echoed.get(..NETLINK_HEADER)?);
    let errno = i32::from_ne_bytes(*code).checked_neg()?;
    let echoed_length = if flags & CAPPED != 0 { NETLINK_HEADER } else { header.length() as usize };
    let echoed_body = echoed.get(NETLINK_HEADER..echoed_length).unwrap_or(&[]);
    // struct nfqnl_msg_verdict_hdr: verdict, id.
    let verdict_header = || {
        let header = find(echoed_body.get(NETFILTER_HEADER..)?, ATTRIBUTE_VERDICT_HEADER)?;
        let (word, rest) = header.split_first_chunk()?;
        Some((u32::from_be_bytes(*word), u32::from_be_bytes(*rest.first_chunk()?)))
    };
    let refused = match (header.message_type(), verdict_header()) {
        (MESSAGE_VERDICT, Some((word, id))) => Refused::Verdict { id, word },
        (MESSAGE_VERDICT_BATCH, Some((_, max))) => Refused::Batch { max },
        _ => Refused::Other,
    };
    let text = (flags & TLVS != 0).then(|| extended_text(echoed.get(align(echoed_length)..)?)).flatten();
    Some(Answer { sequence: header.sequence_number(), errno, refused, text })
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
    use crate::{
        types::Action,
        wire::{
            attribute,
            verdict::{Attachments, Ruling, encode_single, word},
            writer::Writer,
        },
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

    /// As `netlink_ack` makes it.
    fn answer(code: i32, flags: u16, echoed: &[u8], attributes: &[u8]) -> Vec<u8> {
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
    fn a_packet_with_unaligned_length() {
        let mut datagram = packet(77, &[1, 2, 3, 4, 5]);
        // The kernel does not pad the last attribute.
        datagram.truncate(datagram.len() - 3);
        let length = datagram.len() as u32;
        NetlinkBuffer::new(&mut datagram[..]).set_length(length);
        let messages: Vec<_> = Messages::new(&datagram).collect();
        let [Message::Packet { packet, body }] = &messages[..] else { panic!("{messages:?}") };
        assert_eq!((packet.id, packet.queue, packet.hw_protocol, packet.hook), (77, 3, 0x86dd, 1));
        assert_eq!(body[packet.payload.clone()], [1, 2, 3, 4, 5]);
        assert_eq!(super::super::packet::find_be32(&body[NETFILTER_HEADER..], attribute::MARK), Some(9));
    }

    #[test]
    fn several_messages_in_one_datagram() {
        let mut datagram = packet(1, &[0; 8]);
        datagram.extend(packet(2, &[0; 8]));
        let ids: Vec<_> = Messages::new(&datagram)
            .map(|message| match message {
                Message::Packet { packet, .. } => packet.id,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn an_error_names_the_packet() {
        let mut echoed = Vec::new();
        encode_single(&mut echoed, (42, false), 3, 1234, &Ruling::plain(Action::Drop), &Attachments::default());
        let datagram = answer(-2, 0, &echoed, &[]);
        let Some(Message::Answer(answer)) = Messages::new(&datagram).next() else { panic!() };
        assert_eq!(
            answer,
            Answer {
                sequence: 42,
                errno: 2,
                refused: Refused::Verdict { id: 1234, word: word(Action::Drop) },
                text: None
            }
        );
    }

    #[test]
    fn an_acknowledgement_echoes_the_header_alone() {
        let mut echoed = Vec::new();
        encode_single(&mut echoed, (43, true), 3, 1234, &Ruling::plain(Action::Drop), &Attachments::default());
        let attributes = [8, 0, 1, 0, b'h', b'i', b'!', 0];
        let datagram = answer(0, 0x300, &echoed[..16], &attributes);
        let Some(Message::Answer(answer)) = Messages::new(&datagram).next() else { panic!() };
        let text = cfg!(target_endian = "little").then(|| "hi!".into());
        assert_eq!(answer, Answer { sequence: 43, errno: 0, refused: Refused::Other, text });
    }

    #[test]
    fn a_bad_packet_still_tells_its_id() {
        let mut datagram = packet(99, &[0; 4]);
        let mark_length = NETLINK_HEADER + 4 + 12;
        datagram[mark_length] = 2; // shorter than an attribute's own header
        datagram[mark_length + 1] = 0;
        assert_eq!(Messages::new(&datagram).next(), Some(Message::BadPacket(BadPacket { id: Some(99) })));
    }

    #[test]
    fn a_packet_cut_short_still_tells_its_id() {
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
        /// Any bytes at all: no panic, and the iterator ends.
        #[test]
        fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Messages::new(&bytes).count() <= bytes.len() + 1);
        }

        /// Damage to a valid message reaches further into the decoder than noise does.
        #[test]
        fn damaged_messages(at in prop::collection::vec((0usize..120, any::<u8>()), 1..6), cut in 0usize..120, error: bool) {
            let mut bytes = if error {
                let mut echoed = Vec::new();
                encode_single(&mut echoed, (42, false), 3, 1234, &Ruling::plain(Action::Drop), &Attachments { payload: Some(&[0x45; 30]), ..Attachments::default() });
                answer(-2, 0x200, &echoed, &[8, 0, 1, 0, b'h', b'i', b'!', 0])
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
                if let Message::Packet { packet, body } = message {
                    prop_assert!(body.get(packet.payload.clone()).is_some());
                }
            }
        }
    }
}
