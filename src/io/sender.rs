//! From verdict messages to datagrams. What the send lock protects.

use super::extras::VerdictExtras;
use crate::{
    state::VerdictMessage,
    wire::verdict::{self, Attachments},
};

#[derive(Debug)]
pub(super) struct Sender {
    /// The messages of a round; kept for its memory.
    pub(super) messages: Vec<VerdictMessage<Box<VerdictExtras>>>,
    pub(super) datagram: Vec<u8>,
    /// The sequence number of the last message.
    pub(super) sequence: u32,
    /// The longest datagram that the socket sends, in bytes.
    pub(super) max_send: usize,
}

impl Sender {
    pub(super) fn new(max_send: usize) -> Self {
        Self { messages: Vec::new(), datagram: Vec::new(), sequence: 0, max_send }
    }

    pub(super) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Encodes messages into the datagram: as many as fit, and at least one. Returns their number.
    pub(super) fn encode(&mut self, messages: &[VerdictMessage<Box<VerdictExtras>>], queue: u16) -> usize {
        self.datagram.clear();
        for (index, message) in messages.iter().enumerate() {
            let extras = match message {
                VerdictMessage::Single { decision, .. } => decision.extras.as_ref(),
                VerdictMessage::Batch { .. } => None,
            };
            let attachments = extras.map_or_else(Attachments::default, |extras| extras.attachments());
            let fields = message.fields();
            let length = verdict::length(fields, &attachments);
            if index > 0 && self.datagram.len() + length > self.max_send {
                return index;
            }
            let sequence = self.next_sequence();
            match message {
                VerdictMessage::Batch { max, .. } => {
                    verdict::encode_batch(&mut self.datagram, sequence, queue, *max, fields);
                }
                VerdictMessage::Single { id, .. } => {
                    let acknowledge = extras.is_some_and(|extras| extras.confirm.is_some());
                    let tag = (sequence, acknowledge);
                    verdict::encode_single(&mut self.datagram, tag, queue, *id, fields, &attachments);
                }
            }
        }
        messages.len()
    }
}
