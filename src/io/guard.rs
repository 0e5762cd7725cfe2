//! The right to decide one packet.

use std::sync::Arc;

use super::{raw_packet::RawPacket, shared::Shared};
use crate::{
    types::{Error, ErrorKind, Family, FlowMarks, Hook, PacketId},
    wire::attribute,
};

/// The right, and the duty, to decide one packet. If it is dropped, the packet gets the default
/// action.
pub(crate) struct VerdictGuard {
    /// `None` once the right has been used.
    queue: Option<Arc<Shared>>,
    id: u32,
    /// The packet's priority. 0 if the queue has no flow marks.
    priority: u32,
    /// In the bridge family: the length of the packet's link-layer header.
    bridge_header_length: Option<u16>,
    hook: u8,
}

impl VerdictGuard {
    pub(super) fn new(queue: Arc<Shared>, packet: &RawPacket) -> Self {
        let priority = queue.settings.flow_marks.and_then(|_| packet.be32(attribute::PRIORITY)).unwrap_or(0);
        Self {
            id: packet.id,
            priority,
            bridge_header_length: packet.bridge_header_length(),
            hook: packet.hook,
            queue: Some(queue),
        }
    }

    pub(crate) fn id(&self) -> PacketId {
        PacketId::new(self.id)
    }

    pub(crate) fn queue_number(&self) -> u16 {
        self.queue.as_ref().map_or(0, |queue| queue.number())
    }

    /// In the bridge family: the length of the packet's link-layer header.
    pub(crate) fn bridge_header_length(&self) -> Option<usize> {
        self.bridge_header_length.map(usize::from)
    }

    /// The flow marks of the queue, and the packet's priority.
    pub(crate) fn flow_marks(&self) -> Option<(FlowMarks, u32)> {
        Some((self.queue.as_ref()?.settings.flow_marks?, self.priority))
    }

    /// The hook that queued the packet, in the families IPv4 and IPv6.
    pub(crate) fn hook(&self) -> Hook {
        Hook::new(Family::Ipv4, self.hook)
    }

    /// Why the kernel does not take a replaced payload for this packet, if it does not.
    pub(crate) fn payload_obstacle(&self) -> Option<&'static str> {
        let queue = self.queue.as_ref()?;
        let bridge = self.bridge_header_length.and_then(|_| queue.bridge_payload_obstacle());
        bridge.or_else(|| queue.payload_obstacle())
    }

    /// Whether the queue was bound with connection tracking, which proves that the kernel supports
    /// it.
    #[cfg(feature = "conntrack")]
    pub(crate) fn has_conntrack(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.has_conntrack())
    }

    /// Whether the packet has been decided by its deadline or by a closing queue.
    pub(crate) fn is_expired(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| !queue.is_undecided(self.id))
    }

    /// The packet's memory is about to be freed.
    pub(crate) fn detach(&self) {
        if let Some(queue) = &self.queue {
            queue.detached(self.id);
        }
    }

    pub(crate) fn interface_name(&self, index: u32) -> Result<String, Error> {
        match &self.queue {
            Some(queue) => queue.interface_name(index),
            None => Err(Error::new(ErrorKind::Closed, "find the name of an interface")),
        }
    }

    /// Reports an error about the packet's verdict.
    pub(crate) fn report(&self, error: Error) {
        if let Some(queue) = &self.queue {
            queue.report(error);
        }
    }

    /// Gives up the right in exchange for the queue, in which the caller decides the packet.
    pub(crate) fn disarm(mut self) -> Option<(Arc<Shared>, u32)> {
        self.queue.take().map(|queue| (queue, self.id))
    }
}

impl Drop for VerdictGuard {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.abandoned(self.id);
        }
    }
}
