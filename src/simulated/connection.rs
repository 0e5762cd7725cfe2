//! Connection tracking entries of a simulated kernel.

use std::collections::HashMap;

use super::tuple::Packet;
use crate::{
    types::FlowTuple,
    wire::kernel_side::{ConnectionFields, ConntrackOrder, encode_connection},
};

/// The connection of a test packet: see
/// [`TestPacket::of_connection`](super::TestPacket::of_connection).
///
/// Packets with the same id belong to the same connection. Its mark, labels and time-out are those
/// of the first packet that names it, and later what verdicts set.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    pub(super) id: u32,
    pub(super) state: u32,
    mark: u32,
    labels: [u8; 16],
    is_reply: bool,
}

/// `enum ip_conntrack_info`
const ESTABLISHED: u32 = 0;
const NEW: u32 = 2;
const ESTABLISHED_REPLY: u32 = 3;

impl Connection {
    /// A new connection, by its first packet.
    pub fn new(id: u32) -> Self {
        Self { id, state: NEW, mark: 0, labels: [0; 16], is_reply: false }
    }

    /// An established connection, by a packet in its original direction.
    pub fn established(id: u32) -> Self {
        Self { state: ESTABLISHED, ..Self::new(id) }
    }

    /// An established connection, by a packet in the reply direction.
    pub fn reply(id: u32) -> Self {
        Self { state: ESTABLISHED_REPLY, is_reply: true, ..Self::new(id) }
    }

    /// The mark (`ct mark`).
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = mark;
        self
    }

    /// The labels, 128 bits as in
    /// [`Verdict::connection_labels`](crate::Verdict::connection_labels).
    pub fn labels(mut self, labels: [u8; 16]) -> Self {
        self.labels = labels;
        self
    }
}

/// The entries by id.
#[derive(Debug, Default)]
pub(super) struct Connections(HashMap<u32, ConnectionFields>);

impl Connections {
    pub(super) fn add(&mut self, connection: &Connection, packet: &[u8]) {
        /// IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
        const SEEN: u32 = 1 << 1 | 1 << 2 | 1 << 3;
        /// `nf_conntrack_udp_timeout`
        const TIMEOUT: u32 = 30;
        let Some(tuple) = tuple(packet) else { return };
        let reverse = tuple.reversed();
        let (original, reply) = if connection.is_reply { (reverse, tuple) } else { (tuple, reverse) };
        let status = if connection.state == NEW { 0 } else { SEEN };
        let entry = self.0.entry(connection.id).or_insert(ConnectionFields {
            original,
            reply,
            id: connection.id,
            status,
            mark: connection.mark,
            labels: connection.labels,
            timeout_seconds: TIMEOUT,
        });
        entry.status |= status;
    }

    pub(super) fn encode(&self, id: u32) -> Vec<u8> {
        self.0.get(&id).map(encode_connection).unwrap_or_default()
    }

    pub(super) fn mark(&self, id: u32) -> Option<u32> {
        self.0.get(&id).map(|entry| entry.mark)
    }

    /// `ctnetlink_glue_parse_ct`
    pub(super) fn change(&mut self, id: u32, order: &ConntrackOrder) {
        let Some(entry) = self.0.get_mut(&id) else { return };
        if let Some((mark, mask)) = order.mark {
            entry.mark = entry.mark & !mask ^ mark;
        }
        if let Some((value, mask)) = order.labels {
            entry.labels = std::array::from_fn(|byte| entry.labels[byte] & !mask[byte] ^ value[byte]);
        }
        if let Some(seconds) = order.timeout_seconds {
            entry.timeout_seconds = seconds;
        }
    }
}

fn tuple(packet: &[u8]) -> Option<FlowTuple> {
    let packet = Packet::parse(packet)?;
    let (source, destination) = packet.ports();
    Some(FlowTuple {
        protocol: packet.protocol.into(),
        source: (packet.source, source).into(),
        destination: (packet.destination, destination).into(),
    })
}
