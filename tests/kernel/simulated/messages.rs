//! Messages by hand, and what the kernel sends in words.

use std::fmt::Write as _;

use netlink_packet_core::{NLMSG_ERROR, NetlinkBuffer, NlasIterator};

pub(crate) const VERDICT: u16 = 0x301;
pub(crate) const CONFIG: u16 = 0x302;
pub(crate) const BATCH: u16 = 0x303;
pub(crate) const REQUEST: u16 = 1;
pub(crate) const ACK: u16 = 4;

/// A message, padded.
pub(crate) fn message(kind: u16, flags: u16, sequence: u32, queue: u16, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = (20 + attributes.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 6]);
    bytes.extend(queue.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

pub(crate) fn verdict_header(word: u32, id: u32) -> Vec<u8> {
    attribute(2, &[word.to_be_bytes(), id.to_be_bytes()].concat())
}

/// The settings of a queue, as attributes.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) command: Option<u8>,
    pub(crate) copy: Option<(u32, u8)>,
    pub(crate) max_len: Option<u32>,
    pub(crate) mask: Option<u32>,
    pub(crate) flags: Option<u32>,
}

impl Settings {
    pub(crate) fn attributes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(command) = self.command {
            bytes.extend(attribute(1, &[command, 0, 0, 0]));
        }
        if let Some((range, mode)) = self.copy {
            bytes.extend(attribute(2, &[&range.to_be_bytes()[..], &[mode]].concat()));
        }
        for (kind, value) in [(3, self.max_len), (4, self.mask), (5, self.flags)] {
            if let Some(value) = value {
                bytes.extend(attribute(kind, &value.to_be_bytes()));
            }
        }
        bytes
    }
}

/// What a datagram of the kernel says, as far as it does not depend on the host.
pub(crate) fn describe(datagram: &[u8]) -> String {
    let header = NetlinkBuffer::new_checked(datagram).expect("a message");
    assert_eq!(header.length() as usize, datagram.len(), "one message a datagram");
    let payload = header.payload();
    if header.message_type() == NLMSG_ERROR {
        // Linux 6.1 returns ENOTSUPP (524) in the place of EOPNOTSUPP.
        let code = match i32::from_ne_bytes(*payload.first_chunk().expect("a number")) {
            -524 => -95,
            code => code,
        };
        let (flags, echoed) = (header.flags(), payload.len() - 4);
        return format!("reply {code} to {} flags {flags:#x} echoed {echoed}", header.sequence_number());
    }
    let mut text = format!("packet family {} queue {}", payload[0], u16::from_be_bytes([payload[2], payload[3]]));
    let mut kinds = Vec::new();
    for attribute in NlasIterator::new(&payload[4..]) {
        let attribute = attribute.expect("a well-formed attribute");
        let (kind, value) = (attribute.kind(), attribute.value().to_vec());
        let word = || u32::from_be_bytes(*value.first_chunk().expect("a number"));
        match kind {
            1 => {
                let _ = write!(text, " id {} protocol {:02x?} hook {}", word(), &value[4..6], value[6]);
            }
            3 | 5 | 13 | 14 | 21 => {
                let _ = write!(text, " {kind}={}", word());
            }
            10 => {
                // The fragment's number and the checksums differ.
                let data = value.get(28..).unwrap_or_default();
                let _ = write!(text, " payload {} of {:?}", value.len(), &data[..data.len().min(4)]);
            }
            _ => {}
        }
        kinds.push(kind);
    }
    // A timestamp depends on whether anybody on the host wants timestamps, and the control group of
    // the sender on the kernel's configuration.
    kinds.retain(|kind| ![4, 22].contains(kind));
    kinds.sort_unstable();
    text + &format!(" attributes {kinds:?}")
}
