//! The life cycle of a queue.

use std::time::Instant;

use crate::types::Action;

/// Where a queue is between `bind` and the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LifeCycle {
    /// Bound. Packets are handed out.
    Open,
    /// No packet is handed out any more. A thread asks the kernel to queue no more, and receives
    /// what is queued.
    Stopping {
        /// For packets that were not handed out.
        action: Action,
        /// How long owed verdicts are awaited.
        limit: WaitLimit,
        /// The capability was missing; it is tried again.
        failed: bool,
    },
    /// Nothing can be queued any more, and everything has been received. The verdicts that are owed
    /// are awaited.
    Waiting {
        /// As in `Stopping`.
        action: Action,
        /// As in `Stopping`.
        limit: WaitLimit,
    },
    /// Every packet is decided; somebody unbinds the queue.
    Unbinding {
        /// As in `Stopping`.
        action: Action,
        /// As in `Stopping`.
        limit: WaitLimit,
    },
    /// The queue is being handed over to another process, or taken over from one. No packet is
    /// handed out.
    HandingOver {
        /// The socket is not touched.
        frozen: bool,
        /// Until when verdicts that are owed are awaited.
        limit: WaitLimit,
        /// The shutdown that was requested meanwhile. It begins if the queue goes on here.
        then: Option<(Action, WaitLimit)>,
    },
    /// Unbound, or handed over.
    Closed {
        /// The capability was missing; unbinding is tried again.
        still_bound: bool,
    },
}

impl LifeCycle {
    /// Whether it is [`Open`](Self::Open).
    pub fn is_open(self) -> bool {
        self == Self::Open
    }

    /// Whether the stream ends. It does not while the queue is being handed over.
    pub fn has_ended(self) -> bool {
        !matches!(self, Self::Open | Self::HandingOver { .. })
    }

    /// Whether it is [`HandingOver`](Self::HandingOver).
    pub fn is_handing_over(self) -> bool {
        matches!(self, Self::HandingOver { .. })
    }

    /// Whether it is [`HandingOver`](Self::HandingOver), and the socket is not touched.
    pub fn is_frozen(self) -> bool {
        matches!(self, Self::HandingOver { frozen: true, .. })
    }

    /// Whether it is [`Closed`](Self::Closed).
    pub fn is_closed(self) -> bool {
        matches!(self, Self::Closed { .. })
    }
}

/// How long the verdicts that are owed are awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitLimit {
    /// No limit: the queue was dropped while packets are still held.
    Never,
    /// Until this time.
    At(Instant),
    /// The time is over: every packet has been decided.
    Over,
}

impl WaitLimit {
    /// The earlier of the two.
    pub(super) fn tighten(self, other: Self) -> Self {
        match (self, other) {
            (Self::Over, _) | (_, Self::Over) => Self::Over,
            (Self::Never, limit) | (limit, Self::Never) => limit,
            (Self::At(one), Self::At(another)) => Self::At(one.min(another)),
        }
    }
}
