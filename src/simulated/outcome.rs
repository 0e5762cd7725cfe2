//! What has become of a packet.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::Duration,
};

use bytes::Bytes;

use crate::types::{Action, PacketId, Vlan};

/// What has become of a packet that was sent through a simulated kernel: see [`Sent`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// Whether the packet has continued on its way; otherwise it was dropped. If the packet was
    /// segmented: whether every segment has continued.
    pub accepted: bool,
    /// Whether the packet was rejected: it was dropped, and the kernel has replied to its sender.
    /// If the packet was segmented: whether one of the segments was rejected.
    pub rejected: bool,
    /// What decided that.
    pub cause: Cause,
    /// The action of the last verdict; `None` if there was none. A packet that was
    /// [rejected](crate::Packet::reject) has [`Action::Drop`].
    pub action: Option<Action>,
    /// How many verdicts the packet had: more than one if it was repeated or requeued.
    pub verdicts: u32,
    /// The packet's mark.
    pub mark: u32,
    /// The packet's priority.
    pub priority: u32,
    /// The packet's outermost VLAN tag, in the bridge family.
    pub vlan: Option<Vlan>,
    /// The packet's link-layer header, in the bridge family.
    pub layer2_header: Option<Bytes>,
    /// The mark of the packet's [`Connection`](super::Connection), if it has one. Verdicts for
    /// connections do not change it.
    pub connection_mark: Option<u32>,
    /// The packet from its network header on. Empty if the packet was segmented.
    pub payload: Bytes,
    /// Whether a verdict has replaced the payload.
    pub payload_replaced: bool,
    /// The last queue that the packet was sent to, if the queue has given it an id.
    pub queue: Option<u16>,
    /// The id in that queue.
    pub id: Option<PacketId>,
    /// When, since the simulated kernel was made, on the kernel's clock.
    pub at: Duration,
    /// The outcomes of the segments, if the kernel has segmented the packet.
    pub segments: Vec<Outcome>,
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcome")
            .field("accepted", &self.accepted)
            .field("rejected", &self.rejected)
            .field("cause", &self.cause)
            .field("action", &self.action)
            .field("verdicts", &self.verdicts)
            .field("mark", &self.mark)
            .field("queue", &self.queue)
            .field("id", &self.id)
            .field("at", &self.at)
            .field("payload_len", &self.payload.len())
            .field("payload_replaced", &self.payload_replaced)
            .field("segments", &self.segments)
            .finish_non_exhaustive()
    }
}

/// What decided the outcome of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// A verdict.
    Verdict,
    /// The verdict for the connection, [given](crate::Verdict::for_flow) to an earlier packet: the
    /// packet did not come to the queue.
    FlowVerdict,
    /// The packet's mark excludes it: [`TestPacket::unless_mark`](super::TestPacket::unless_mark).
    Rule,
    /// The queue was not bound. The packet was accepted if the rule has
    /// [`bypass`](super::TestPacket::bypass), and dropped otherwise.
    NotBound,
    /// The queue was full. The packet was accepted with
    /// [`fail_open`](crate::QueueBuilder::fail_open), and dropped otherwise.
    QueueFull,
    /// The socket's receive buffer was full. The packet was accepted with
    /// [`fail_open`](crate::QueueBuilder::fail_open), and dropped otherwise.
    ReceiveBufferFull,
    /// The queue was unbound, or its socket was closed, while the packet was in it.
    Unbound,
    /// An interface of the packet went down.
    DeviceDown,
    /// A hook was unregistered.
    HookUnregistered,
    /// The kernel could not apply the replaced payload.
    BadPayload,
}

/// A packet that was sent through a simulated kernel, and its outcome.
///
/// Clones refer to the same packet.
#[derive(Clone)]
pub struct Sent(pub(super) Arc<Slot>);

impl Sent {
    /// The outcome; `None` while the packet waits in a queue.
    pub fn try_outcome(&self) -> Option<Outcome> {
        self.0.state().outcome.clone()
    }

    /// Waits for the outcome.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn outcome(&self) -> Outcome {
        std::future::poll_fn(|cx| {
            let waker = cx.waker().clone();
            let mut state = self.0.state();
            match &state.outcome {
                Some(outcome) => Poll::Ready(outcome.clone()),
                None => {
                    // What is dropped is dropped without the lock: it may run users' code.
                    if !state.wakers.iter().any(|other| other.will_wake(&waker)) {
                        state.wakers.push(waker);
                    }
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Whether the packet still waits in a queue.
    pub fn is_waiting(&self) -> bool {
        self.0.state().outcome.is_none()
    }
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sent").field(&self.try_outcome()).finish()
    }
}

/// Where the outcome is put.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    /// The outcomes of segments so far.
    segments: Vec<Option<Outcome>>,
    wakers: Vec<Waker>,
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the outcome of the packet, or of one of its segments (by index and number). Returns the
    /// tasks to wake.
    pub(super) fn put(&self, (index, count): (u32, u32), outcome: Outcome) -> Vec<Waker> {
        let mut state = self.state();
        if count == 1 {
            debug_assert!(state.outcome.is_none(), "a packet has one outcome");
            state.outcome = Some(outcome);
            return std::mem::take(&mut state.wakers);
        }
        state.segments.resize(count as usize, None);
        debug_assert!(state.segments[index as usize].is_none(), "a segment has one outcome");
        state.segments[index as usize] = Some(outcome);
        if state.segments.iter().any(Option::is_none) {
            return Vec::new();
        }
        let segments: Vec<Outcome> = std::mem::take(&mut state.segments).into_iter().flatten().collect();
        // What belongs to the packet as a whole is that of the last segment.
        let last = segments.iter().max_by_key(|segment| segment.at).cloned();
        state.outcome = last.map(|last| Outcome {
            accepted: segments.iter().all(|segment| segment.accepted),
            rejected: segments.iter().any(|segment| segment.rejected),
            payload: Bytes::new(),
            segments,
            ..last
        });
        std::mem::take(&mut state.wakers)
    }
}
