//! The content of packet messages, and what messages are charged.

use std::time::Duration;

use super::packet::{Checksum, TestPacket};
use crate::wire::{
    attribute,
    config::{FLAG_SECURITY_CONTEXT, FLAG_UID_GID},
    kernel_side::PacketFields,
};

/// What the kernel says of a packet (`nfqnl_build_packet_message`). `copy_range` is `None` if only
/// metadata are copied.
pub(super) fn fields<'a>(
    packet: &'a TestPacket,
    unverified: bool,
    id: u32,
    copy_range: Option<usize>,
    flags: u32,
    connection: Option<&'a (Vec<u8>, u32)>,
    now: Duration,
) -> PacketFields<'a> {
    /// The wall clock at the start of a simulated kernel, in seconds since 1970.
    const EPOCH: u64 = 1_700_000_000;
    let copied = packet.payload.len().min(copy_range.unwrap_or(0));
    let complete = copied == packet.payload.len() || copy_range.is_none();
    let [interface_in, interface_out, physical_in, physical_out] = packet.interfaces();
    let gso = packet.segment_size > 0;
    let unready = packet.checksum == Checksum::Unfinished || gso;
    let offload = u32::from(unready) | u32::from(gso) << 1 | u32::from(unverified) << 2;
    PacketFields {
        family: packet.family,
        id,
        hw_protocol: packet.hw_protocol,
        hook: packet.hook,
        words: [
            (attribute::INTERFACE_IN, interface_in),
            (attribute::INTERFACE_OUT, interface_out),
            (attribute::PHYSICAL_IN, physical_in),
            (attribute::PHYSICAL_OUT, physical_out),
            (attribute::MARK, packet.mark),
            (attribute::PRIORITY, packet.priority),
            (attribute::OFFLOAD, offload),
        ],
        owner: packet.owner.filter(|_| flags & FLAG_UID_GID != 0),
        hardware_address: packet.sender_address(),
        timestamp: packet.is_received().then(|| (EPOCH + now.as_secs(), u64::from(now.subsec_micros()))),
        security_context: packet.sender_context().filter(|_| flags & FLAG_SECURITY_CONTEXT != 0),
        vlan: packet.vlan(),
        layer2_header: packet.layer2(),
        connection: connection.map(|(bytes, _)| &bytes[..]),
        connection_state: connection.map_or(0, |(_, state)| *state),
        captured_length: (!complete).then_some(packet.payload.len() as u32),
        payload: &packet.payload[..copied],
    }
}

/// What a message is charged in bytes (`skb->truesize`), with a payload and other attributes of
/// these lengths. Longer payloads than a page are taken to be in pages, which are charged by their
/// length. `small` is the size of small heads.
pub(super) fn charge(payload: usize, attributes: usize, small: usize) -> usize {
    /// Headers and fixed attributes.
    const FIXED: usize = 124;
    const PAGE: usize = 4096;
    if payload > PAGE {
        return SKB + small + payload;
    }
    linear_charge(FIXED + attributes + payload, small)
}

/// What a message of this length is charged, if it is in one piece (`__alloc_skb`).
pub(super) fn linear_charge(length: usize, small: usize) -> usize {
    match length.next_multiple_of(64) + SHARED {
        size if size <= small => SKB + small,
        size => SKB + size.next_power_of_two(),
    }
}

/// `sizeof(struct sk_buff)`, `sizeof(struct skb_shared_info)`, aligned.
const SKB: usize = 256;
const SHARED: usize = 320;
/// The size of small heads unless it is set (SKB_SMALL_HEAD_CACHE_SIZE).
pub(super) const SMALL: usize = 576;
