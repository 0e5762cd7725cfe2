//! Encodes verdict messages, for one packet or for all packets up to an id.

use netlink_packet_core::{NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST};

use super::{
    ATTRIBUTE_VERDICT_HEADER, MESSAGE_VERDICT, MESSAGE_VERDICT_BATCH, NETFILTER_HEADER, NETLINK_HEADER, align,
    attribute,
    writer::{Writer, put_attribute},
};
use crate::types::{Action, Vlan, flow_codes};

/// The fields that both verdict messages can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerdictFields {
    /// What to do with the packet.
    pub action: Action,
    /// The new mark. `None`: it stays unchanged.
    pub mark: Option<u32>,
    /// The new priority. `None`: it stays unchanged.
    pub priority: Option<u32>,
}

impl VerdictFields {
    /// Only an action.
    pub const fn plain(action: Action) -> Self {
        Self { action, mark: None, priority: None }
    }

    /// What the verdict counts as: the rules at the hook drop a packet that they see again with a
    /// code that denies.
    pub(crate) fn counted(&self) -> Action {
        let denies = self.priority.is_some_and(flow_codes::denies);
        if denies && self.action == Action::Repeat { Action::Drop } else { self.action }
    }
}

/// The attributes that only the verdict message for one packet can carry.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attachments<'a> {
    /// The new content, from the network header on; at most [`MAX_PAYLOAD`](super::MAX_PAYLOAD)
    /// bytes.
    pub payload: Option<&'a [u8]>,
    /// The new VLAN tag.
    pub vlan: Option<Vlan>,
    /// The new link-layer header.
    pub layer2_header: Option<&'a [u8]>,
    /// The encoded attributes of a connection tracking entry.
    pub conntrack: Option<&'a [u8]>,
    /// The encoded attributes of an expectation. The kernel reads them only if `conntrack` is also
    /// present.
    pub expectation: Option<&'a [u8]>,
}

/// The length in bytes of a verdict message with these fields and attachments.
pub fn length(fields: &VerdictFields, attachments: &Attachments<'_>) -> usize {
    let words = usize::from(fields.mark.is_some()) + usize::from(fields.priority.is_some());
    let blobs = [attachments.payload, attachments.layer2_header, attachments.conntrack, attachments.expectation];
    let blobs: usize = blobs.into_iter().flatten().map(|blob| 4 + align(blob.len())).sum();
    NETLINK_HEADER + NETFILTER_HEADER + 12 + words * 8 + blobs + attachments.vlan.map_or(0, |_| 20)
}

/// Encodes the verdict on packet `id`. With `acknowledge`, the kernel replies also on success.
pub fn encode_single(
    buffer: &mut Vec<u8>,
    (sequence, acknowledge): (u32, bool),
    queue: u16,
    id: u32,
    fields: &VerdictFields,
    attachments: &Attachments<'_>,
) {
    let flags = if acknowledge { NLM_F_REQUEST | NLM_F_ACK } else { NLM_F_REQUEST };
    let mut message = Writer::begin(buffer, MESSAGE_VERDICT, flags, sequence, queue);
    put(&mut message, id, fields);
    if let Some(payload) = attachments.payload {
        message.attribute(attribute::PAYLOAD, payload);
    }
    if let Some(Vlan { protocol, control }) = attachments.vlan {
        let mut nested = Vec::with_capacity(16);
        put_attribute(&mut nested, attribute::VLAN_PROTOCOL, &protocol.to_be_bytes());
        put_attribute(&mut nested, attribute::VLAN_CONTROL, &control.to_be_bytes());
        message.attribute(attribute::VLAN | NLA_F_NESTED, &nested);
    }
    if let Some(header) = attachments.layer2_header {
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

/// Encodes one verdict on all queued packets whose id is `max` or before it.
pub fn encode_batch(buffer: &mut Vec<u8>, sequence: u32, queue: u16, max: u32, fields: &VerdictFields) {
    let mut message = Writer::begin(buffer, MESSAGE_VERDICT_BATCH, NLM_F_REQUEST, sequence, queue);
    put(&mut message, max, fields);
    message.finish();
}

fn put(message: &mut Writer<'_>, id: u32, fields: &VerdictFields) {
    // struct nfqnl_msg_verdict_hdr
    let mut header = [0; 8];
    header[..4].copy_from_slice(&word(fields.action).to_be_bytes());
    header[4..].copy_from_slice(&id.to_be_bytes());
    message.attribute(ATTRIBUTE_VERDICT_HEADER, &header);
    if let Some(mark) = fields.mark {
        message.attribute_be32(attribute::MARK, mark);
    }
    if let Some(priority) = fields.priority {
        message.attribute_be32(attribute::PRIORITY, priority);
    }
}

/// The verdict word of an action: a [`code`]. For `QUEUE`, the upper 16 bits are the queue number.
pub fn word(action: Action) -> u32 {
    match action {
        Action::Drop => code::DROP,
        Action::Accept => code::ACCEPT,
        Action::Repeat => code::REPEAT,
        Action::Stop => code::STOP,
        // Other actions must have no bits above the low byte. ACCEPT with such bits skips later
        // hooks.
        Action::Requeue { queue, bypass } => {
            code::QUEUE | u32::from(queue) << 16 | if bypass { code::QUEUE_BYPASS } else { 0 }
        }
    }
}

/// The action of a verdict word. `None` for a word that [`word`] does not return.
pub fn action_of(word: u32) -> Option<Action> {
    Some(match word & 0xff {
        code::DROP => Action::Drop,
        code::ACCEPT => Action::Accept,
        code::REPEAT => Action::Repeat,
        code::STOP => Action::Stop,
        code::QUEUE => Action::Requeue { queue: (word >> 16) as u16, bypass: word & code::QUEUE_BYPASS != 0 },
        _ => return None,
    })
}

/// The verdict numbers of the kernel (`include/uapi/linux/netfilter.h`).
pub mod code {
    /// `NF_DROP`
    pub const DROP: u32 = 0;
    /// `NF_ACCEPT`
    pub const ACCEPT: u32 = 1;
    /// `NF_QUEUE`
    pub const QUEUE: u32 = 3;
    /// `NF_REPEAT`
    pub const REPEAT: u32 = 4;
    /// `NF_STOP`
    pub const STOP: u32 = 5;
    /// `NF_VERDICT_FLAG_QUEUE_BYPASS`, for `QUEUE`: accept the packet if no socket has the queue
    /// bound.
    pub const QUEUE_BYPASS: u32 = 0x8000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_decode_to_their_actions_and_only_requeue_has_bits_above_the_low_byte() {
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
    fn all_fields_of_a_single_verdict_are_encoded() {
        let mut buffer = Vec::new();
        let fields = VerdictFields { action: Action::Accept, mark: Some(0x0a0b_0c0d), priority: Some(6) };
        let attachments = Attachments { payload: Some(&[0x45; 5]), ..Attachments::default() };
        encode_single(&mut buffer, (0x11, true), 5, 0x0102_0304, &fields, &attachments);
        assert_eq!(buffer.len(), length(&fields, &attachments));
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
    fn all_attachments_are_encoded() {
        let mut buffer = Vec::new();
        let attachments = Attachments {
            vlan: Some(Vlan { protocol: 0x8100, control: 0x2005 }),
            layer2_header: Some(&[1; 14]),
            conntrack: Some(&[8, 0, 8, 0, 0, 0, 0, 9]),
            expectation: Some(&[8, 0, 9, 0, 0, 0, 0, 1]),
            payload: None,
        };
        encode_single(&mut buffer, (1, false), 0, 1, &VerdictFields::plain(Action::Accept), &attachments);
        assert_eq!(buffer.len(), length(&VerdictFields::plain(Action::Accept), &attachments));
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

    /// Linux before 6.1.167, 6.12.78 and 6.18.19 leaks a packet whose verdict has one field alone
    /// (`nfqa_parse_bridge`).
    #[test]
    fn a_vlan_tag_is_always_encoded_with_protocol_and_control_field() {
        for protocol in [0, 0x8100, 0x88a8, u16::MAX] {
            for control in [0, 1, 0x2005, u16::MAX] {
                let attachments = Attachments { vlan: Some(Vlan { protocol, control }), ..Attachments::default() };
                let mut buffer = Vec::new();
                let fields = VerdictFields::plain(Action::Accept);
                encode_single(&mut buffer, (1, false), 0, 1, &fields, &attachments);
                let nested = [
                    [6_u16.to_ne_bytes(), attribute::VLAN_PROTOCOL.to_ne_bytes(), protocol.to_be_bytes(), [0; 2]],
                    [6_u16.to_ne_bytes(), attribute::VLAN_CONTROL.to_ne_bytes(), control.to_be_bytes(), [0; 2]],
                ];
                assert_eq!(buffer[36..], *nested.as_flattened().as_flattened());
            }
        }
    }

    #[test]
    fn plain_verdicts_take_32_bytes() {
        let mut buffer = Vec::new();
        encode_batch(&mut buffer, 1, 0, 9, &VerdictFields::plain(Action::Drop));
        encode_single(&mut buffer, (2, false), 0, 9, &VerdictFields::plain(Action::Drop), &Attachments::default());
        assert_eq!(buffer.len(), 64);
    }
}
