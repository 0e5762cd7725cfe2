//! Verdict messages: one packet, or every packet up to an id.

use netlink_packet_core::{NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST};

use super::{
    ATTRIBUTE_VERDICT_HEADER, MESSAGE_VERDICT, MESSAGE_VERDICT_BATCH, NETFILTER_HEADER, NETLINK_HEADER, align,
    attribute,
    writer::{Writer, put_attribute},
};
use crate::types::Action;

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

/// The verdict word of an action: a [`code`], for `QUEUE` with the queue's number in the upper half.
pub(crate) fn word(action: Action) -> u32 {
    match action {
        Action::Drop => code::DROP,
        Action::Accept => code::ACCEPT,
        Action::Repeat => code::REPEAT,
        Action::Stop => code::STOP,
        // No other action may have bits above the low byte: ACCEPT with such skips later hooks.
        Action::Requeue { queue, bypass } => {
            code::QUEUE | u32::from(queue) << 16 | if bypass { code::QUEUE_BYPASS } else { 0 }
        }
    }
}

/// The action of a verdict word; `None` for a word that [`word`] does not make.
pub(crate) fn action_of(word: u32) -> Option<Action> {
    Some(match word & 0xff {
        code::DROP => Action::Drop,
        code::ACCEPT => Action::Accept,
        code::REPEAT => Action::Repeat,
        code::STOP => Action::Stop,
        code::QUEUE => Action::Requeue { queue: (word >> 16) as u16, bypass: word & code::QUEUE_BYPASS != 0 },
        _ => return None,
    })
}

/// What both verdict messages can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ruling {
    pub(crate) action: Action,
    pub(crate) mark: Option<u32>,
    pub(crate) priority: Option<u32>,
}

impl Ruling {
    pub(crate) const fn plain(action: Action) -> Self {
        Self { action, mark: None, priority: None }
    }
}

/// What only a single verdict can carry.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Attachments<'a> {
    pub(crate) payload: Option<&'a [u8]>,
    /// Tag protocol identifier (an EtherType) and tag control information.
    pub(crate) vlan: Option<(u16, u16)>,
    pub(crate) layer2: Option<&'a [u8]>,
    /// Attributes of a connection tracking entry, from [`encode_conntrack`].
    pub(crate) conntrack: Option<&'a [u8]>,
    /// Attributes of an expectation. The kernel looks at it beside `conntrack` alone.
    pub(crate) expectation: Option<&'a [u8]>,
}

/// Bytes that a verdict message with these parts takes in a datagram.
pub(crate) fn length(ruling: &Ruling, attachments: &Attachments<'_>) -> usize {
    let words = usize::from(ruling.mark.is_some()) + usize::from(ruling.priority.is_some());
    let blobs = [attachments.payload, attachments.layer2, attachments.conntrack, attachments.expectation];
    let blobs: usize = blobs.into_iter().flatten().map(|blob| 4 + align(blob.len())).sum();
    NETLINK_HEADER + NETFILTER_HEADER + 12 + words * 8 + blobs + attachments.vlan.map_or(0, |_| 20)
}

/// Decides the packet `id`. With `acknowledge` the kernel answers also when all is well.
pub(crate) fn encode_single(
    buffer: &mut Vec<u8>,
    (sequence, acknowledge): (u32, bool),
    queue: u16,
    id: u32,
    ruling: &Ruling,
    attachments: &Attachments<'_>,
) {
    let flags = if acknowledge { NLM_F_REQUEST | NLM_F_ACK } else { NLM_F_REQUEST };
    let mut message = Writer::begin(buffer, MESSAGE_VERDICT, flags, sequence, queue);
    put(&mut message, id, ruling);
    if let Some(payload) = attachments.payload {
        message.attribute(attribute::PAYLOAD, payload);
    }
    if let Some((protocol, control)) = attachments.vlan {
        // NFQA_VLAN_PROTO and NFQA_VLAN_TCI, both big-endian.
        let (protocol, control) = (protocol.to_be_bytes(), control.to_be_bytes());
        let mut nested = Vec::with_capacity(16);
        put_attribute(&mut nested, 1, &protocol);
        put_attribute(&mut nested, 2, &control);
        message.attribute(attribute::VLAN | NLA_F_NESTED, &nested);
    }
    if let Some(header) = attachments.layer2 {
        message.attribute(attribute::LAYER2_HEADER, header);
    }
    if let Some(conntrack) = attachments.conntrack {
        message.attribute(attribute::CONNTRACK | NLA_F_NESTED, conntrack);
    }
    if let Some(expectation) = attachments.expectation {
        message.attribute(attribute::EXPECTATION | NLA_F_NESTED, expectation);
    }
    message.finish();
}

/// Changes to a connection tracking entry, as the inside of `NFQA_CT` (`ctnetlink_glue_parse_ct`). Each mask says which
/// bits to change.
#[cfg(feature = "conntrack")]
pub(crate) fn encode_conntrack(
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
        // The kernel flips bits that are in the value and not in the mask (`ctnetlink_change_mark`).
        put_attribute(&mut nested, MARK, &(value & mask).to_be_bytes());
        put_attribute(&mut nested, MARK_MASK, &mask.to_be_bytes());
    }
    if let Some((value, mask)) = labels {
        // As with the mark (`nf_connlabels_replace`).
        let value: [u8; 16] = std::array::from_fn(|byte| value[byte] & mask[byte]);
        put_attribute(&mut nested, LABELS, &value);
        put_attribute(&mut nested, LABELS_MASK, &mask);
    }
    nested
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
    header[..4].copy_from_slice(&word(ruling.action).to_be_bytes());
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
    fn words_tell_their_actions_and_only_requeue_has_bits_above_the_low_byte() {
        let requeue = |queue, bypass| Action::Requeue { queue, bypass };
        let plain = [Action::Drop, Action::Accept, Action::Repeat, Action::Stop];
        assert!(plain.iter().all(|action| word(*action) <= 5));
        for action in plain.into_iter().chain([requeue(7, false), requeue(0xffff, true)]) {
            assert_eq!(action_of(word(action)), Some(action));
        }
        assert_eq!(word(requeue(7, false)), 0x0007_0003);
        assert_eq!(word(requeue(0xffff, true)), 0xffff_8003);
        assert_eq!(action_of(2), None);
    }

    #[test]
    fn single_with_everything() {
        let mut buffer = Vec::new();
        let ruling = Ruling { action: Action::Accept, mark: Some(0x0a0b_0c0d), priority: Some(6) };
        let attachments = Attachments { payload: Some(&[0x45; 5]), ..Attachments::default() };
        encode_single(&mut buffer, (0x11, true), 5, 0x0102_0304, &ruling, &attachments);
        assert_eq!(buffer.len(), length(&ruling, &attachments));
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
    fn attachments_in_their_places() {
        let mut buffer = Vec::new();
        let attachments = Attachments {
            vlan: Some((0x8100, 0x2005)),
            layer2: Some(&[1; 14]),
            conntrack: Some(&[8, 0, 8, 0, 0, 0, 0, 9]),
            expectation: Some(&[8, 0, 9, 0, 0, 0, 0, 1]),
            payload: None,
        };
        encode_single(&mut buffer, (1, false), 0, 1, &Ruling::plain(Action::Accept), &attachments);
        assert_eq!(buffer.len(), length(&Ruling::plain(Action::Accept), &attachments));
        #[rustfmt::skip]
        let tail = [
            20, 0, 19, 0x80, 6, 0, 1, 0, 0x81, 0, 0, 0, 6, 0, 2, 0, 0x20, 5, 0, 0,
            18, 0, 20, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0,
            12, 0, 11, 0x80, 8, 0, 8, 0, 0, 0, 0, 9,
            12, 0, 15, 0x80, 8, 0, 9, 0, 0, 0, 0, 1,
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(buffer[32..], tail);
        }
    }

    #[cfg(feature = "conntrack")]
    #[test]
    fn conntrack_changes() {
        let nested = encode_conntrack(Some((0x101, 0xff)), Some(([6; 16], [3; 16])), Some(60));
        assert_eq!(nested.len(), 8 + 8 + 8 + 20 + 20);
        assert_eq!(nested[12..16], [0, 0, 0, 1], "what the mask leaves out is not sent");
        assert_eq!(nested[28..44], [2; 16]);
        assert_eq!(encode_conntrack(None, None, None), []);
    }

    #[test]
    fn plain_verdicts_take_32_bytes() {
        let mut buffer = Vec::new();
        encode_batch(&mut buffer, 1, 0, 9, &Ruling::plain(Action::Drop));
        encode_single(&mut buffer, (2, false), 0, 9, &Ruling::plain(Action::Drop), &Attachments::default());
        assert_eq!(buffer.len(), 64);
    }
}
