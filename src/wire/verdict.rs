//! Verdict messages: one packet, or every packet up to an id.

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};

use super::{
    ATTRIBUTE_VERDICT_HEADER, MESSAGE_VERDICT, MESSAGE_VERDICT_BATCH, NETFILTER_HEADER, NETLINK_HEADER, align,
    attribute, writer::Writer,
};

/// The kernel's verdict numbers (`include/uapi/linux/netfilter.h`).
pub(crate) mod code {
    pub(crate) const DROP: u32 = 0;
    pub(crate) const ACCEPT: u32 = 1;
    pub(crate) const QUEUE: u32 = 3;
    pub(crate) const REPEAT: u32 = 4;
    pub(crate) const STOP: u32 = 5;
    /// `NF_VERDICT_FLAG_QUEUE_BYPASS`: beside `QUEUE`, accept where nobody owns the queue.
    pub(crate) const QUEUE_BYPASS: u32 = 0x8000;
}

/// What both verdict messages can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ruling {
    /// The verdict word: a [`code`], for `QUEUE` with the queue's number in the upper half.
    pub(crate) word: u32,
    pub(crate) mark: Option<u32>,
    pub(crate) priority: Option<u32>,
}

impl Ruling {
    pub(crate) const fn plain(word: u32) -> Self {
        Self { word, mark: None, priority: None }
    }
}

/// Bytes that a verdict message with these parts takes in a datagram.
pub(crate) fn length(ruling: &Ruling, payload: Option<usize>) -> usize {
    let words = usize::from(ruling.mark.is_some()) + usize::from(ruling.priority.is_some());
    NETLINK_HEADER + NETFILTER_HEADER + 12 + words * 8 + payload.map_or(0, |length| 4 + align(length))
}

/// Decides the packet `id`. With `acknowledge` the kernel answers also when all is well.
pub(crate) fn encode_single(
    buffer: &mut Vec<u8>,
    (sequence, acknowledge): (u32, bool),
    queue: u16,
    id: u32,
    ruling: &Ruling,
    payload: Option<&[u8]>,
) {
    let flags = if acknowledge { NLM_F_REQUEST | NLM_F_ACK } else { NLM_F_REQUEST };
    let mut message = Writer::begin(buffer, MESSAGE_VERDICT, flags, sequence, queue);
    put(&mut message, id, ruling);
    if let Some(payload) = payload {
        message.attribute(attribute::PAYLOAD, payload);
    }
    message.finish();
}

/// Decides every packet still queued whose id is `max` or before it.
pub(crate) fn encode_batch(buffer: &mut Vec<u8>, sequence: u32, queue: u16, max: u32, ruling: &Ruling) {
    let mut message = Writer::begin(buffer, MESSAGE_VERDICT_BATCH, NLM_F_REQUEST, sequence, queue);
    put(&mut message, max, ruling);
    message.finish();
}

fn put(message: &mut Writer<'_>, id: u32, ruling: &Ruling) {
    // struct nfqnl_msg_verdict_hdr
    let mut header = [0; 8];
    header[..4].copy_from_slice(&ruling.word.to_be_bytes());
    header[4..].copy_from_slice(&id.to_be_bytes());
    message.attribute(ATTRIBUTE_VERDICT_HEADER, &header);
    if let Some(mark) = ruling.mark {
        message.attribute_be32(attribute::MARK, mark);
    }
    if let Some(priority) = ruling.priority {
        message.attribute_be32(attribute::PRIORITY, priority);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_with_everything() {
        let mut buffer = Vec::new();
        let ruling = Ruling { word: code::ACCEPT, mark: Some(0x0a0b_0c0d), priority: Some(6) };
        encode_single(&mut buffer, (0x11, true), 5, 0x0102_0304, &ruling, Some(&[0x45; 5]));
        assert_eq!(buffer.len(), length(&ruling, Some(5)));
        #[rustfmt::skip]
        let body = [
            0, 5,
            12, 0, 2, 0, 0, 0, 0, 1, 1, 2, 3, 4,
            8, 0, 3, 0, 0x0a, 0x0b, 0x0c, 0x0d,
            8, 0, 21, 0, 0, 0, 0, 6,
            9, 0, 10, 0, 0x45, 0x45, 0x45, 0x45, 0x45, 0, 0, 0,
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(buffer[..8], [60, 0, 0, 0, 1, 3, 5, 0]);
            assert_eq!(buffer[18..], body);
        }
    }

    #[test]
    fn plain_verdicts_take_32_bytes() {
        let mut buffer = Vec::new();
        encode_batch(&mut buffer, 1, 0, 9, &Ruling::plain(code::DROP));
        encode_single(&mut buffer, (2, false), 0, 9, &Ruling::plain(code::DROP), None);
        assert_eq!(buffer.len(), 64);
    }
}
