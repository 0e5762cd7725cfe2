//! A packet as it was received.

use std::ops::Range;

use bytes::Bytes;

use crate::{
    state::Storage,
    types::Family,
    wire::{
        PacketMessage, attribute,
        packet::{Attributes, attributes_of, find, find_be32},
    },
};

/// A packet message: the datagram, and where its parts are.
#[derive(Debug)]
pub(crate) struct RawPacket {
    pub(crate) id: u32,
    pub(crate) family: u8,
    pub(crate) hook: u8,
    pub(crate) hw_protocol: u16,
    bytes: Bytes,
    // 32 bits are enough for a datagram and keep a packet small.
    attributes: Range<u32>,
    payload: Range<u32>,
    pub(super) storage: Storage,
}

impl RawPacket {
    /// `bytes` is the datagram that contained the message.
    pub(super) fn new(bytes: Bytes, message: &PacketMessage, storage: Storage) -> Self {
        let short = |range: &Range<usize>| range.start as u32..range.end as u32;
        Self {
            id: message.id,
            family: message.family,
            hook: message.hook,
            hw_protocol: message.hw_protocol,
            attributes: short(&message.attributes),
            payload: short(&message.payload),
            bytes,
            storage,
        }
    }

    /// The datagram that contained the message.
    pub(super) fn datagram(&self) -> Bytes {
        self.bytes.clone()
    }

    pub(crate) fn payload(&self) -> &[u8] {
        self.get(&self.payload)
    }

    /// The payload, sharing the datagram's memory.
    pub(crate) fn payload_bytes(&self) -> Bytes {
        self.bytes.slice(self.payload.start as usize..self.payload.end as usize)
    }

    pub(crate) fn attributes(&self) -> Attributes<'_> {
        attributes_of(self.get(&self.attributes))
    }

    pub(crate) fn attribute(&self, number: u16) -> Option<&[u8]> {
        find(self.get(&self.attributes), number)
    }

    pub(crate) fn be32(&self, number: u16) -> Option<u32> {
        find_be32(self.get(&self.attributes), number)
    }

    /// In the bridge family: the length of the link-layer header.
    pub(super) fn bridge_header_length(&self) -> Option<u16> {
        let bridged = Family::from(self.family) == Family::Bridge;
        bridged.then(|| self.attribute(attribute::LAYER2_HEADER).map_or(0, <[u8]>::len) as u16)
    }

    fn get(&self, range: &Range<u32>) -> &[u8] {
        self.bytes.get(range.start as usize..range.end as usize).unwrap_or(&[])
    }
}
